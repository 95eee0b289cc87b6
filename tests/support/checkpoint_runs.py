"""A small collection for the tests of checkpoints to interrupt."""

from __future__ import annotations

import torch
from curvature_tools import batch, collect

import kfac

BATCHES = [
    batch([0, 1]),
    batch([2]),
    batch([3, 4], "left", 1),
    batch([5]),
    batch([0, 2]),
    batch([1]),
]


def targets(model):
    return kfac.find_targets(model, layers=[1], projections="mlp")


def run(model, path, batches=BATCHES, **kwargs):
    options = {"marginals": True, "samples": 2, "checkpoint_every": 0.0} | kwargs
    return collect(model, batches, targets(model), checkpoint=path, dtype=torch.float32, **options)
