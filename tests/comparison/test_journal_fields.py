"""Tasks whose settings are arrays: a journal tells them apart though their `repr` does not."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from lirefs.comparison.journal import task_digest
from lirefs.tasks import Perplexity


@dataclass(frozen=True)
class Weighted(Perplexity):
    weights: object = field(default=None)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, lambda values: [torch.tensor(values)]])
def test_a_change_in_the_middle_of_a_large_array_counts(lm, kind):
    values = [0.0] * 2000
    digests = []
    for changed in (0.0, 1.0, 0.0):
        values[1000] = changed
        task = Weighted("t", [("a", "some text")], weights=kind(values))
        digests.append(task_digest("me", lm, task))
    assert digests[0] == digests[2] != digests[1]
