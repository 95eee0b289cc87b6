"""K-FAC curvature of a model's weights, and edits of the weights by it.

factors = kfac.collect(model, batches, kfac.find_targets(model, layers=[20, 21]))
with kfac.CurvatureEdit(factors, keep=0.6).apply(model):
    ...
"""

from kfac.baselines import RandomPairsEdit, SVDEdit
from kfac.collect import collect
from kfac.edit import CurvatureEdit, EditHandle, SpectralEdit, TargetReport, WeightEdit
from kfac.ekfac import correct
from kfac.errors import (
    BatchError,
    BudgetError,
    CheckpointError,
    DistributedError,
    EditError,
    EditOrderError,
    EstimatorError,
    FactorsFileError,
    FactorsMismatchError,
    KeepError,
    KfacError,
    NonFiniteError,
    SpectrumError,
    TargetError,
)
from kfac.estimators import ESTIMATORS, Curvature
from kfac.factors import Eigen, Factors, TargetRecord, weight_digest
from kfac.merging import merge
from kfac.passes import Forward, language_model_forward
from kfac.plan import Plan, plan
from kfac.spectrum import Staircase, eigenbasis, staircase
from kfac.targets import Target, find_targets, named_targets

__all__ = [
    "ESTIMATORS",
    "BatchError",
    "BudgetError",
    "CheckpointError",
    "Curvature",
    "CurvatureEdit",
    "DistributedError",
    "EditError",
    "EditHandle",
    "EditOrderError",
    "Eigen",
    "EstimatorError",
    "Factors",
    "FactorsFileError",
    "FactorsMismatchError",
    "Forward",
    "KeepError",
    "KfacError",
    "NonFiniteError",
    "Plan",
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
    "correct",
    "eigenbasis",
    "find_targets",
    "language_model_forward",
    "merge",
    "named_targets",
    "plan",
    "staircase",
    "weight_digest",
]
