"""Directions in the residual stream: captured, fitted, scored and saved."""

from lirefs.directions.capture import Activations, capture
from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.directions.estimators import (
    LogisticDirection,
    MeanDifference,
    PCADirection,
    RidgeDirection,
    WhitenedMeanDifference,
)
from lirefs.directions.fitting import fit_directions
from lirefs.directions.geometry import Components, Transfer, components, cosines, transfer
from lirefs.directions.probe import LayerScores, Probe, fit
from lirefs.directions.prompts import prompts_of

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
