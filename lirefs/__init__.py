"""Reasoning against recitation in language models: directions, steering, one harness.

LiReFs (Hong et al. 2025, arXiv 2503.23084) are linear directions in the residual stream; the sister
package `kfac` removes flat directions of the weights (Merullo et al. 2025, arXiv 2510.24256).
"""

import os
import sys

# `python -m lirefs` looks for modules in the working folder first, and they may be a stranger's
# (even pathlib, which is why it is not used here). A checkout is our own.
if sys.argv[:1] == ["-m"] and sys.path[0] == os.getcwd() not in map(os.path.dirname, __path__):  # noqa: PTH109
    del sys.path[0]

import lazy_loader

# Names are imported when they are used: `import lirefs` and the command line's help stay quick. The
# stub says which names there are, for this line as for type checkers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
