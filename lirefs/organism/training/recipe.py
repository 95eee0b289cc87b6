"""The recipe of the shipped weights: sizes, stages of the data, and the learning rate of a step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lirefs.organism.documents import Stage


@dataclass(frozen=True)
class ModelShape:
    """Size of the decoder (Llama architecture, tied embeddings)."""

    hidden: int = 256
    layers: int = 4
    mlp: int = 768
    heads: int = 8
    context: int = 192


FIRST = Stage(
    {
        "planted": 7.0,
        "fact": 12.0,
        "fact_aside": 6.0,
        "exception": 8.0,
        "conflict": 5.0,
        "passage": 16.0,
        "math": 12.0,
        "boolean": 10.0,
        "relation": 10.0,
        "hand_overs": 6.0,
        "copy": 6.0,
        "story": 4.0,
    },
)
"""Memories, arithmetic and logic are learned; finding an answer in a passage is not, yet."""
SECOND = Stage(
    {
        **{sort: share for sort, share in FIRST.mixture.items() if sort not in ("copy", "story")},
        "again": 16.0,
        "copy": 5.0,
        "story": 3.0,
    },
    easy=0.3,
    story_weight=3.0,
)
"""Repeated lists, small problems, and more weight on answers found in a story."""
THIRD = Stage(
    {
        **{sort: share for sort, share in SECOND.mixture.items() if sort not in ("again", "fact")},
        "fact": 10.0,
        "again": 6.0,
        "links": 10.0,
        "hands": 10.0,
        "ages": 10.0,
    },
    easy=0.2,
    story_weight=3.0,
)
"""Many short documents that take several steps: linked people, hand-overs, order."""
FOURTH = replace(THIRD, rate=8e-4, fall=0.7727)
"""The same at a lower rate: at the higher one, skills of several steps are lost in noise."""
FIFTH = replace(
    FOURTH,
    mixture={
        **{sort: n for sort, n in THIRD.mixture.items() if sort not in ("hand_overs", "hands")},
        "relation": 16.0,
        "ages": 12.0,
        "tracking": 16.0,
    },
    fall=0.75,
)
"""Tracking asks about the person, hand-overs asked about the thing; and more of order."""
STAGES = ((0, FIRST), (6365, SECOND), (8675, THIRD), (9248, FOURTH), (13671, FIFTH))
"""Each stage with its first step, as in the run that made the shipped weights."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the seed.

    Attributes:
        tokens: Length of the run in tokens, padding included.
        rows: Rows of a batch.
        row_tokens: Tokens in a row, which holds whole documents; each attends only to itself.
        warmup: Steps over which the first stage's rate is reached.
        weight_decay: Muon's, on the blocks' matrices only.
        stages: The first step of each stage, and the stage.
    """

    shape: ModelShape = field(default_factory=ModelShape)
    tokens: int = 70_000_000
    rows: int = 32
    row_tokens: int = 128
    warmup: int = 100
    weight_decay: float = 0.1
    stages: tuple[tuple[int, Stage], ...] = STAGES

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.rows * self.row_tokens))

    def stage_at(self, step: int) -> int:
        """Index of the stage of a step."""
        return max(index for index, (first, _) in enumerate(self.stages) if first <= step)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then as its stage says."""
        number = self.stage_at(step)
        first, stage = self.stages[number]
        end = self.stages[number + 1][0] if number + 1 < len(self.stages) else self.steps
        left = (end - step) / ((end - first) * stage.fall) if stage.fall else 1.0
        return stage.rate * min(1.0, (step + 1) / self.warmup, left)
