"""Steering for other runtimes and file formats.

`lirefs.export.transformer_lens`, `lirefs.export.nnsight` and `lirefs.export.vllm` are imported by
name: each needs a package that takes seconds to load.
"""

from lirefs.export.bake import bake
from lirefs.export.gguf import from_gguf, to_gguf
from lirefs.export.hub import load_directions, model_card, push_directions
from lirefs.export.operators import operators
from lirefs.export.ways import ways

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
