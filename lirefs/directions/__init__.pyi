from .capture import Activations, capture
from .direction import Direction
from .directions import Directions
from .estimators import (
    LogisticDirection,
    MeanDifference,
    PCADirection,
    RidgeDirection,
    WhitenedMeanDifference,
)
from .fitting import fit_directions
from .geometry import Components, Transfer, components, cosines, transfer
from .probe import LayerScores, Probe, fit
from .prompts import prompts_of

__all__ = [
    "Activations",
    "Components",
    "Direction",
    "Directions",
    "LayerScores",
    "LogisticDirection",
    "MeanDifference",
    "PCADirection",
    "Probe",
    "RidgeDirection",
    "Transfer",
    "WhitenedMeanDifference",
    "capture",
    "components",
    "cosines",
    "fit",
    "fit_directions",
    "prompts_of",
    "transfer",
]
