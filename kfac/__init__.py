"""K-FAC curvature of a model's weights, and edits of the weights by it.

factors = kfac.collect(model, batches, kfac.find_targets(model, layers=[20, 21]))
with kfac.CurvatureEdit(factors, keep=0.6).apply(model):
    ...
"""

from kfac.baselines import MagnitudeEdit, RandomPairsEdit, RandomRotationEdit, SVDEdit
from kfac.collect import Forward, collect, language_model_forward
from kfac.edit import CurvatureEdit, SpectralEdit, TargetReport
from kfac.errors import (
    BatchError,
    EditError,
    EditOrderError,
    FactorsFileError,
    FactorsMismatchError,
    KeepError,
    KfacError,
    NonFiniteError,
    SpectrumError,
    TargetError,
)
from kfac.factors import Eigen, Factors, TargetRecord, weight_digest
from kfac.selection import OrderedSelection, Selection, TableSelection
from kfac.spectrum import Staircase, eigenbasis, staircase
from kfac.targets import Target, find_targets, named_targets
from kfac.weight_edit import EditHandle, WeightEdit

__all__ = [
    "BatchError",
    "CurvatureEdit",
    "EditError",
    "EditHandle",
    "EditOrderError",
    "Eigen",
    "Factors",
    "FactorsFileError",
    "FactorsMismatchError",
    "Forward",
    "KeepError",
    "KfacError",
    "NonFiniteError",
    "RandomPairsEdit",
    "SVDEdit",
    "SpectralEdit",
    "SpectrumError",
    "Staircase",
    "Target",
    "TargetError",
    "TargetRecord",
    "TargetReport",
    "WeightEdit",
    "collect",
    "eigenbasis",
    "find_targets",
    "language_model_forward",
    "named_targets",
    "staircase",
    "weight_digest",
]
