from . import figures
from .analysis.bands import BandProfile, BandRatios, band_profile, band_ratios, task_band_ratios
from .analysis.detector import FlatShares, flat_shares
from .analysis.loss_slices import LossSlices, loss_slices
from .analysis.losses import teacher_forced_matches
from .analysis.relearning import Relearning, relearn
from .analysis.split_half import SplitHalf, split_half
from .collection.batches import Forward, language_model_forward
from .collection.collect import collect
from .collection.correct import correct
from .collection.plan import Plan, plan
from .edits.baselines import MagnitudeEdit, RandomPairsEdit, RandomRotationEdit, SVDEdit
from .edits.project import project, projected_training
from .edits.selection import OrderedSelection, Selection, TableSelection
from .edits.spectral import CurvatureEdit, SpectralEdit, TargetReport
from .edits.staircase import Staircase, staircase
from .edits.subnet import SubnetEdit, fit_balanced_subnet
from .edits.union_removal import RemovalEdit, UnionEdit
from .edits.weight_edit import WeightEdit
from .factors.eigen import Eigen, eigenbasis
from .factors.estimators import ESTIMATORS, Curvature
from .factors.factors import Factors
from .factors.merging import merge, subtract
from .ground import EditHandle, Estimate, KfacError, auroc
from .target import Target, TargetRecord, weight_digest
from .targets import find_targets, named_targets

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
