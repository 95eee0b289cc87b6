"""K-FAC curvature of a model's weights, and edits of the weights by it.

factors = kfac.collect(lm, texts, layers=[20, 21])
with kfac.CurvatureEdit(factors, keep=0.6).apply(lm.model):
    ...
"""

from kfac import figures
from kfac.analysis.bands import BandProfile, BandRatios, band_profile, band_ratios, task_band_ratios
from kfac.analysis.detector import FlatShares, flat_shares
from kfac.analysis.loss_slices import LossSlices, loss_slices
from kfac.analysis.losses import teacher_forced_matches
from kfac.analysis.relearning import Relearning, relearn
from kfac.analysis.split_half import SplitHalf, split_half
from kfac.collection.batches import Forward, language_model_forward
from kfac.collection.collect import collect
from kfac.collection.correct import correct
from kfac.collection.plan import Plan, plan
from kfac.edits.baselines import MagnitudeEdit, RandomPairsEdit, RandomRotationEdit, SVDEdit
from kfac.edits.project import project, projected_training
from kfac.edits.selection import OrderedSelection, Selection, TableSelection
from kfac.edits.spectral import CurvatureEdit, SpectralEdit, TargetReport
from kfac.edits.staircase import Staircase, staircase
from kfac.edits.subnet import SubnetEdit, fit_balanced_subnet
from kfac.edits.union_removal import RemovalEdit, UnionEdit
from kfac.edits.weight_edit import WeightEdit
from kfac.factors.eigen import Eigen, eigenbasis
from kfac.factors.estimators import ESTIMATORS, Curvature
from kfac.factors.factors import Factors
from kfac.factors.merging import merge, subtract
from kfac.target import Target, TargetRecord, weight_digest
from kfac.targets import find_targets, named_targets
from lirefs.errors import KfacError
from lirefs.model.weight_swap import EditHandle
from lirefs.statistics.intervals import Estimate, auroc

__all__ = [
    "ESTIMATORS",
    "BandProfile",
    "BandRatios",
    "Curvature",
    "CurvatureEdit",
    "EditHandle",
    "Eigen",
    "Estimate",
    "Factors",
    "FlatShares",
    "Forward",
    "KfacError",
    "LossSlices",
    "MagnitudeEdit",
    "OrderedSelection",
    "Plan",
    "RandomPairsEdit",
    "RandomRotationEdit",
    "Relearning",
    "RemovalEdit",
    "SVDEdit",
    "Selection",
    "SpectralEdit",
    "SplitHalf",
    "Staircase",
    "SubnetEdit",
    "TableSelection",
    "Target",
    "TargetRecord",
    "TargetReport",
    "UnionEdit",
    "WeightEdit",
    "auroc",
    "band_profile",
    "band_ratios",
    "collect",
    "correct",
    "eigenbasis",
    "figures",
    "find_targets",
    "fit_balanced_subnet",
    "flat_shares",
    "language_model_forward",
    "loss_slices",
    "merge",
    "named_targets",
    "plan",
    "project",
    "projected_training",
    "relearn",
    "split_half",
    "staircase",
    "subtract",
    "task_band_ratios",
    "teacher_forced_matches",
    "weight_digest",
]
