"""K-FAC curvature of a model's weights, and edits of the weights by it.

factors = kfac.collect(lm, texts, layers=[20, 21])
with kfac.CurvatureEdit(factors, keep=0.6).apply(lm.model):
    ...
"""

import lazy_loader

# Names are imported when they are used: `import kfac` and the command line's help stay quick. The
# stub says which names there are, for this line as for type checkers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
