"""Reasoning against recitation in language models: directions, steering, one harness.

LiReFs (Hong et al. 2025, arXiv 2503.23084) are linear directions in the residual stream; the sister
package `kfac` removes flat directions of the weights (Merullo et al. 2025, arXiv 2510.24256).
"""

import lazy_loader

# Names are imported when they are used: `import lirefs` and the command line's help stay quick. The
# stub says which names there are, for this line as for type checkers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
