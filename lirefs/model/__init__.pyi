from .intervention import Composition, Handle, Intervention, applied, compose
from .language_model import LanguageModel, wrap
from .layout import Layout
from .layout_search import find_layout, layout_of
from .loading import load
from .prompts import Prompted, prompt_lengths
from .traits import Traits

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
