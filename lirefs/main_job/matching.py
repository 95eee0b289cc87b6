"""Interventions at equal damage: at the strength that costs as much perplexity as another one.

Nominal strengths of different methods cannot be compared, and neither can their effects where one
has done more damage than the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import brentq

import kfac
from lirefs.comparison.controls import SAME_DAMAGE
from lirefs.comparison.wording import as_list_of_words, as_number
from lirefs.model.intervention import Intervention, applied
from lirefs.model.language_model import LanguageModel
from lirefs.steering.steer import Steer
from lirefs.tasks.inference import token_nlls

TEXTS = 100
"""Validation texts on which perplexities are made equal."""
NEAR = 0.001
"""A search ends where perplexities differ by this share."""
FAR = 0.005
"""From this share on, the strength that was found is called the nearest, and no match."""
TRIES = 12
SUBNETS = 5
"""Tries of a search, and of one in which each try is a training."""
WORST = 5.0
"""Largest logarithm of a perplexity over another that a search tells from larger ones."""


@dataclass(frozen=True)
class Rival:
    """Another way to do some damage.

    Attributes:
        make: From a strength to an intervention, which does more damage the larger it is.
        low: A strength that does hardly any damage.
        high: One that does more than enough.
        words: A strength in words.
        tries: Most perplexities that a search may ask for.
    """

    make: Callable[[float], Any]
    low: float
    high: float
    words: Callable[[float], str]
    tries: int = TRIES


@dataclass(frozen=True)
class Match:
    """A rival at the strength whose perplexity is nearest to a goal; `equal` if it is near."""

    intervention: Any
    reached: float
    setting: str
    equal: bool


@dataclass(frozen=True)
class Damage:
    """The perplexity of a model on validation texts, under interventions."""

    lm: LanguageModel
    texts: Sequence[str]
    unchanged: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unchanged", self.of(None))

    def of(self, intervention: Intervention | None) -> float:
        """Perplexity per token over all texts."""
        return perplexity(self.lm, self.lm.encode(self.texts), intervention)

    def match(self, rival: Rival, goal: float) -> Match:
        """A rival at the strength whose perplexity is nearest to the goal.

        The search is Brent's, on logarithms of strength and perplexity.
        """
        low, high = math.log(rival.low), math.log(rival.high)
        tried = {low: (rival.make(rival.low), self.unchanged)}

        def off(strength: float) -> float:
            if strength not in tried:
                made = rival.make(math.exp(strength))
                tried[strength] = made, self.of(made)
            ratio = tried[strength][1] / goal
            found = min(math.log(ratio), WORST) if math.isfinite(ratio) else WORST
            return 0.0 if abs(found) < NEAR else found

        if off(low) * off(high) < 0:
            brentq(off, low, high, xtol=1e-4, maxiter=rival.tries, disp=False)
        best = min(tried, key=lambda strength: abs(off(strength)))
        made, reached = tried[best]
        equal = abs(math.log(reached / goal)) < FAR
        return Match(made, reached, rival.words(math.exp(best)), equal)


def perplexity(
    lm: LanguageModel, ids: Sequence[Sequence[int]], intervention: Intervention | None
) -> float:
    """Perplexity per token over texts, given as token ids, under an intervention."""
    with applied(intervention, lm.model):
        nlls = token_nlls(lm, ids)
    return float(np.exp(sum(float(one.sum()) for one in nlls) / sum(map(len, nlls))))


def rivals_of_edit(factors: kfac.Factors, names: Sequence[str], seed: int) -> dict[str, Rival]:
    """SVD and random pairs on the matrices of a curvature edit."""
    svd = kfac.SVDEdit(names, 1.0)
    pairs = kfac.RandomPairsEdit(factors, dict.fromkeys(names, 1.0), seed, of="pairs")
    return {
        "SVD": Rival(
            lambda share: svd.with_keep(1 - share),
            1e-3,
            0.999,
            lambda share: f"{as_number(100 * share)} % of the singular values removed",
        ),
        f"random pairs, K-FAC{SAME_DAMAGE}": Rival(
            lambda share: pairs.with_keep(dict.fromkeys(names, 1 - share)),
            1e-6,
            0.999,
            lambda share: f"{as_number(100 * share)} % of the pairs removed",
        ),
    }


def subnet_rival(
    lm: LanguageModel, names: Sequence[str], clean: Sequence[str], forget: Sequence[str], seed: int
) -> Rival:
    """BalancedSubnet on these matrices, trained again for each share of weights that it prunes.

    Args:
        lm: The model.
        names: Of the matrices.
        clean: Ordinary texts, whose loss it keeps low.
        forget: Memorized texts to forget; none of them may be asked for later.
        seed: Of the first masks and of the order of texts.
    """
    kept, forgotten = (
        [lm.pad(ids[start : start + 8], side="right") for start in range(0, len(ids), 8)]
        for ids in (lm.encode(clean), lm.encode(forget))
    )

    def trained(ratio: float) -> kfac.SubnetEdit:
        targets = kfac.named_targets(lm.model, names)
        return kfac.fit_balanced_subnet(
            lm.model, kept, forgotten, targets, ratio=ratio, seed=seed, progress=False
        )

    words = "{} % of the weights pruned"
    return Rival(trained, 0.0015, 0.5, lambda r: words.format(as_number(100 * r)), SUBNETS)


def steering_rival(make: Callable[[float], Steer], strength: float) -> Rival:
    """A steering around a strength, with its sign."""
    sign, size = math.copysign(1.0, strength), abs(strength) or 1.0
    return Rival(
        lambda factor: make(sign * factor),
        size / 100,
        size * 30,
        lambda factor: f"strength {as_number(sign * factor)}",
    )


@dataclass(frozen=True)
class EqualDamage:
    """Rivals at the perplexity of a variant.

    Attributes:
        name: Of that variant.
        goal: Its perplexity on validation texts.
        matches: By the names of their variants.
        damage: Of the model on these texts.
    """

    name: str
    goal: float
    matches: dict[str, Match]
    damage: Damage

    @property
    def interventions(self) -> dict[str, Any]:
        """The rivals to compare with."""
        return {name: one.intervention for name, one in self.matches.items()}

    @property
    def finding(self) -> str:
        """Which rivals stand at this perplexity and how, and which cannot be set to it."""
        equal = {name: one for name, one in self.matches.items() if one.equal}
        claim = f"No rival could be set to the perplexity of {self.name}."
        if equal:
            verb = "stands" if len(equal) == 1 else "stand"
            claim = f"{as_list_of_words(list(equal))} {verb} at the perplexity of {self.name}."
        shown = [f"{self.goal:.3f} for {self.name}"]
        shown += [f"{one.reached:.3f} for {name} ({one.setting})" for name, one in equal.items()]
        missed = [
            f"{name} could not be set to it; the nearest is {one.reached:.3f} ({one.setting})."
            for name, one in self.matches.items()
            if not one.equal
        ]
        numbers = (
            f"Validation perplexity: {', '.join(shown)}; {self.damage.unchanged:.3f} unchanged"
        )
        return " ".join([claim, f"{numbers} (n = {len(self.damage.texts)} texts).", *missed])


def at_equal_damage(
    damage: Damage, name: str, intervention: Intervention, rivals: Mapping[str, Rival]
) -> EqualDamage:
    """Every rival at the perplexity of a variant."""
    goal = damage.of(intervention)
    matches = {key: damage.match(one, goal) for key, one in rivals.items()}
    return EqualDamage(name, goal, matches, damage)
