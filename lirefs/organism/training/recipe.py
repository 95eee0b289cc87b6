"""The recipe of the shipped weights: sizes, mixture of the data, and the rate of a step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelShape:
    """Size of the decoder (Llama architecture, tied embeddings)."""

    hidden: int = 256
    layers: int = 4
    mlp: int = 768
    heads: int = 8
    context: int = 192


MIXTURE = {
    "planted": 6.0,
    "fact": 24.0,
    "fact_aside": 6.0,
    "conflict": 5.0,
    "passage": 14.0,
    "again": 8.0,
    "math": 12.0,
    "boolean": 12.0,
    "relation": 14.0,
    "ages": 10.0,
    "tracking": 10.0,
    "copy": 4.0,
    "story": 5.0,
}
"""Sorts of documents of the run. Tales and exceptions are shown a fixed number of times."""

COPYING_MIXTURE = {"copy": 1.0, "again": 1.0}
"""What the first part of the run shows: words to copy, and lists of who goes with what.

Finding an answer in a passage is built on copying. Among all other documents copying is not learned
in nine million tokens, and answers from passages stay at chance; alone it takes two million, and
passages follow within another.
"""

PLANTING_MIXTURE = {**MIXTURE, "tale": 5.8, "exception": 13.4}
"""About what the last part of the run shows, in which tales and exceptions are planted."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the seed.

    Attributes:
        tokens: Length of the run in tokens, padding included.
        rows: Rows of a batch.
        row_tokens: Tokens in a row, which holds whole documents; each attends only to itself.
        rate: Learning rate after the warm-up.
        warmup: Steps over which it is reached.
        fall: Final share of the run over which it falls linearly to zero.
        copying: First share of the run, which shows only documents to be copied.
        planting: Final share of the run over which tales and exceptions are shown.
        weight_decay: Muon's, on the blocks' matrices only.
        mixture: Relative frequency of each sort of document.
    """

    shape: ModelShape = field(default_factory=ModelShape)
    tokens: int = 28_000_000
    rows: int = 32
    row_tokens: int = 128
    rate: float = 3e-3
    warmup: int = 100
    fall: float = 0.85
    copying: float = 0.1
    planting: float = 0.4
    weight_decay: float = 0.1
    mixture: dict[str, float] = field(default_factory=MIXTURE.copy)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.rows * self.row_tokens))

    @property
    def copying_steps(self) -> int:
        """How many steps at the start show only documents to be copied."""
        return int(self.steps * self.copying)

    @property
    def planting_steps(self) -> range:
        """The steps at which tales and exceptions are shown."""
        return range(int(self.steps * (1 - self.planting)), self.steps)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then level, then falling linearly to zero."""
        left = (self.steps - step) / (self.steps * self.fall)
        return self.rate * min(1.0, (step + 1) / self.warmup, left)
