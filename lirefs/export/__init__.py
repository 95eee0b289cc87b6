"""Steering for other runtimes and file formats.

`lirefs.export.transformer_lens`, `lirefs.export.nnsight` and `lirefs.export.vllm` are imported by
name: each needs a package that takes seconds to load.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
