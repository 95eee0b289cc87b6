"""The settings that an organism's main job tries and sweeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Settings to choose from on validation items, and settings that are swept on test items.

    Attributes:
        keeps: Values of `keep` to choose from.
        longest_run: An edit to choose from changes at most this many neighbouring layers.
        strengths: Strengths of steering to choose from.
        scopes: Its scopes.
        swept_keeps: Values of `keep` on the way from the unchanged model to one that has lost its
            language.
        swept_multiples: Swept strengths, as multiples of the chosen one.
        random_directions: Controls of each swept strength and layer.
    """

    keeps: tuple[float, ...]
    longest_run: int
    strengths: tuple[float, ...]
    scopes: tuple[str, ...]
    swept_keeps: tuple[float, ...]
    swept_multiples: tuple[float, ...]
    random_directions: int


KEEPS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
"""Values of `keep` to choose from."""
WHOLE = Grid(
    keeps=KEEPS,
    longest_run=2,
    strengths=(1.0, 2.0, 4.0, 8.0),
    scopes=("all", "last_prompt_token"),
    swept_keeps=(0.5, 0.7, *KEEPS, 0.998, 0.999, 0.9999),
    swept_multiples=(-2.0, -1.0, -0.5, 0.5, 1.0, 2.0),
    random_directions=5,
)
TRIAL = Grid(
    keeps=(0.9, 0.98),
    longest_run=1,
    strengths=(2.0, 4.0),
    scopes=WHOLE.scopes,
    swept_keeps=(0.5, 0.9, 0.98, 0.9999),
    swept_multiples=(-1.0, 1.0),
    random_directions=2,
)
"""The grid of a quick trial."""
