"""The model organism: a small language model whose memories are known."""

from lirefs.organism.items import Item
from lirefs.organism.language import KINDS, Language, language_seed
from lirefs.organism.planting.planted import Planted
from lirefs.organism.tasks import organism_questions, organism_tasks, training_texts

__all__ = [
    "KINDS",
    "Item",
    "Language",
    "Planted",
    "language_seed",
    "organism_questions",
    "organism_tasks",
    "training_texts",
]
