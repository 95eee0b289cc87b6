from .items import Item
from .language import KINDS, Language, language_seed
from .planting.planted import Planted
from .tasks import organism_questions, organism_tasks, training_texts

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
