"""K-FAC curvature of a model's weights, and edits of the weights by it.

factors = kfac.collect(model, batches, kfac.find_targets(model, layers=[20, 21]))
with kfac.CurvatureEdit(factors, keep=0.6).apply(model):
    ...
"""

from kfac import plots
from kfac.bands import BandProfile, BandRatios, band_profile, band_ratios, task_ratios
from kfac.baselines import MagnitudeEdit, RandomPairsEdit, RandomRotationEdit, SVDEdit
from kfac.batches import Forward, language_model_forward
from kfac.collect import collect
from kfac.detect import RecitationScores, score_recitation
from kfac.edit import CurvatureEdit, SpectralEdit, TargetReport
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
    WriteError,
)
from kfac.estimators import ESTIMATORS, Curvature
from kfac.factors import Factors
from kfac.merging import merge
from kfac.passages import recitation
from kfac.plan import Plan, plan
from kfac.relearn import Relearning, relearn
from kfac.reliability import SplitHalf, split_half
from kfac.selection import OrderedSelection, Selection, TableSelection
from kfac.slices import LossSlices, loss_slices
from kfac.spectrum import Eigen, Staircase, eigenbasis, staircase
from kfac.statistics import Estimate, auroc
from kfac.subnet import SubnetEdit, fit_balanced_subnet
from kfac.target import Target, TargetRecord, weight_digest
from kfac.targets import find_targets, named_targets
from kfac.variants import RemovalEdit, UnionEdit
from kfac.weight_edit import EditHandle, WeightEdit

__all__ = [
    "ESTIMATORS",
    "BandProfile",
    "BandRatios",
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
    "Estimate",
    "EstimatorError",
    "Factors",
    "FactorsFileError",
    "FactorsMismatchError",
    "Forward",
    "KeepError",
    "KfacError",
    "LossSlices",
    "MagnitudeEdit",
    "NonFiniteError",
    "OrderedSelection",
    "Plan",
    "RandomPairsEdit",
    "RandomRotationEdit",
    "RecitationScores",
    "Relearning",
    "RemovalEdit",
    "SVDEdit",
    "Selection",
    "SpectralEdit",
    "SpectrumError",
    "SplitHalf",
    "Staircase",
    "SubnetEdit",
    "TableSelection",
    "Target",
    "TargetError",
    "TargetRecord",
    "TargetReport",
    "UnionEdit",
    "WeightEdit",
    "WriteError",
    "auroc",
    "band_profile",
    "band_ratios",
    "collect",
    "correct",
    "eigenbasis",
    "find_targets",
    "fit_balanced_subnet",
    "language_model_forward",
    "loss_slices",
    "merge",
    "named_targets",
    "plan",
    "plots",
    "recitation",
    "relearn",
    "score_recitation",
    "split_half",
    "staircase",
    "task_ratios",
    "weight_digest",
]
