from .bake import bake
from .gguf import from_gguf, to_gguf
from .hub import load_directions, model_card, push_directions
from .operators import operators
from .ways import ways

__all__ = [
    "bake",
    "from_gguf",
    "load_directions",
    "model_card",
    "operators",
    "push_directions",
    "to_gguf",
    "ways",
]
