"""Language models: loaded, with a verified layout, and changed only reversibly."""

from lirefs.model.intervention import Composition, Handle, Intervention, applied, compose
from lirefs.model.language_model import LanguageModel, wrap
from lirefs.model.layout import Layout
from lirefs.model.layout_search import find_layout, layout_of
from lirefs.model.loading import load
from lirefs.model.prompts import Prompted, prompt_lengths
from lirefs.model.traits import Traits

__all__ = [
    "Composition",
    "Handle",
    "Intervention",
    "LanguageModel",
    "Layout",
    "Prompted",
    "Traits",
    "applied",
    "compose",
    "find_layout",
    "layout_of",
    "load",
    "prompt_lengths",
    "wrap",
]
