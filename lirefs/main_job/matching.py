"""Interventions at equal damage: at the strength that costs as much perplexity as another one.

Nominal strengths of different methods cannot be compared, and neither can their effects where one
has done more damage than the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import kfac
from lirefs.comparison.controls import SAME_DAMAGE
from lirefs.comparison.wording import as_list_of_words, as_number
from lirefs.main_job.grid import KEEPS
from lirefs.model.intervention import Intervention, applied
from lirefs.model.language_model import LanguageModel
from lirefs.steering.steer import Steer
from lirefs.tasks.batches.lower_blocks import LowerBlocks
from lirefs.tasks.inference import token_nlls

AFFORDABLE = 1.1
"""An edit of a model of ordinary language should multiply its perplexity by at most this."""
TEXTS = 100
"""Validation texts on which perplexities are made equal."""
FEW = 20
"""Of them, about those on which a search begins."""
NEAR = 0.001
"""A search ends where perplexities differ by this share."""
FAR = 0.005
"""From this share on, the strength that was found is called the nearest, and no match."""
TRIES = 12
"""Perplexities of a search."""
FIRST_SHARE = 0.03
"""Share of weights that BalancedSubnet prunes when it is trained first: 20 times the paper's."""
WORST = 5.0
"""Largest logarithm of a damage over another that a search tells from larger ones."""
FIRST_SLOPE = 2.0
"""Damage grows as the square of a small change of what is at its best."""


class Damage:
    """The perplexity of a model on validation texts, under interventions.

    The blocks below those that an intervention changes run once for all interventions.

    Args:
        lm: The model.
        texts: All of them.
        expected: Interventions such as those to come. What the blocks below them make of the texts
            is kept from the run of the unchanged model.

    Attributes:
        unchanged: Perplexity of the unchanged model.
    """

    def __init__(
        self, lm: LanguageModel, texts: Sequence[str], expected: Sequence[Intervention] = ()
    ) -> None:
        self.lm, self.texts = lm, texts
        self._lower = LowerBlocks(lm)
        for one in expected:
            with applied(one, lm.model):
                self._lower.expect(one)
        self._last: tuple[Any, float] = (), math.nan
        self.unchanged = self.of(None)
        few = texts[:: len(texts) // FEW] if len(texts) >= 2 * FEW else ()
        self._first = Damage(lm, few, expected) if few else None

    @property
    def stages(self) -> list[Damage]:
        """The damage on a few of the texts, if there are many, and this one."""
        return [self] if self._first is None else [self._first, self]

    def of(self, intervention: Intervention | None) -> float:
        """Perplexity per token over all texts; that of the last intervention is remembered."""
        if self._last[0] is not intervention:
            with applied(intervention, self.lm.model), self._lower.under(intervention):
                found = perplexity(self.lm, self.lm.encode(self.texts), None)
            self._last = intervention, found
        return self._last[1]

    def goals(self, intervention: Intervention) -> list[Goal]:
        """The perplexity under an intervention, on the texts of each stage."""
        return [Goal(one, one.of(intervention)) for one in self.stages]


@dataclass(frozen=True)
class Goal:
    """A perplexity to reach on the texts of a damage."""

    damage: Damage
    perplexity: float


@dataclass(frozen=True)
class Match:
    """A rival at the strength whose perplexity is nearest to a goal; `equal` if it is near."""

    intervention: Any
    strength: float
    reached: float
    setting: str
    equal: bool


class Rival(Protocol):
    """Another way to do some damage."""

    def at(self, goals: Sequence[Goal]) -> Match:
        """Itself at the strength whose perplexity is nearest to the last of the goals.

        Those before are the same goal on fewer texts, where the search begins.
        """
        ...


@dataclass(frozen=True)
class Scaled:
    """A rival of one strength.

    Attributes:
        make: From a strength to an intervention, which does more damage the larger it is.
        low: A strength that does hardly any damage.
        high: One that does more than enough.
        words: A strength in words.
    """

    make: Callable[[float], Any]
    low: float
    high: float
    words: Callable[[float], str]

    def at(self, goals: Sequence[Goal]) -> Match:
        """A secant search between `low` and `high`, on logarithms of strength and damage.

        What an intervention adds to the logarithm of the perplexity grows about as a power of its
        strength, so the logarithms of both lie near a line. A search on more texts begins at the
        strength and with the slope that were found on fewer, where less than `FAR` is near enough.
        """
        tried: dict[float, float] = {}
        place, slope = (math.log(self.low) + math.log(self.high)) / 2, FIRST_SLOPE
        for goal in goals:
            near = NEAR if goal is goals[-1] else FAR
            tried, place, slope = self._searched(goal, near, place, slope)
        wanted = goals[-1].perplexity
        best = min(tried, key=lambda one: abs(_apart(tried[one], wanted)))
        strength, reached = math.exp(best), tried[best]
        equal = abs(_apart(reached, wanted)) < FAR
        return Match(self.make(strength), strength, reached, self.words(strength), equal)

    def _searched(
        self, goal: Goal, near: float, place: float, slope: float
    ) -> tuple[dict[float, float], float, float]:
        """Perplexity by strength, the next strength to try and the slope; strengths as logarithms.

        Args:
            goal: What to reach.
            near: The search ends where perplexities differ by this share.
            place: Where to look first.
            slope: Of the logarithm of the damage there.
        """
        low, high, damage = math.log(self.low), math.log(self.high), goal.damage
        tried, last = {low: damage.unchanged}, None
        # Infinite or NaN if the other breaks the model.
        wanted = math.log(goal.perplexity / damage.unchanged)
        for _ in range(TRIES if math.isfinite(wanted) else 0):
            reached = any(abs(_apart(one, goal.perplexity)) < near for one in tried.values())
            if reached or place in tried:  # the latter at a bound that is not enough
                break
            tried[place] = damage.of(self.make(math.exp(place)))
            added = WORST if wanted <= 0 else _missed(tried[place] / damage.unchanged, wanted)
            if last is not None and (added - last[1]) * (place - last[0]) > 0:
                slope = (added - last[1]) / (place - last[0])
            last = place, added
            low, high = (low, place) if added > 0 else (place, high)
            place = min(high, max(low, place - added / slope))
            if place in tried:
                place = (low + high) / 2
        return tried, place, slope


def _apart(found: float, goal: float) -> float:
    """Logarithm of a perplexity over another; infinite where the model broke."""
    return math.log(found / goal) if math.isfinite(found) and math.isfinite(goal) else math.inf


def _missed(ratio: float, wanted: float) -> float:
    """Logarithm of a damage over what is wanted; the damage is the logarithm of this ratio."""
    added = math.log(ratio) if math.isfinite(ratio) else math.inf
    return min(WORST, math.log(added / wanted)) if added > wanted * math.exp(-WORST) else -WORST


@dataclass(frozen=True)
class Subnet:
    """BalancedSubnet; `train` learns it for a share of weights to prune.

    It is trained twice: the share at which the first scores reach the goal on few texts is that of
    the second training. Its own scores then reach the goal at another share, often a larger one.
    """

    train: Callable[[float], kfac.SubnetEdit]

    def at(self, goals: Sequence[Goal]) -> Match:
        """The second training, pruned as far as the goal needs."""
        first = self._pruned(self.train(FIRST_SHARE)).at(goals[:1])
        return self._pruned(self.train(first.strength)).at(goals)

    def _pruned(self, trained: kfac.SubnetEdit) -> Scaled:
        words = "{} % of the weights pruned"
        return Scaled(
            trained.with_ratio, 1e-4, 0.9, lambda share: words.format(as_number(100 * share))
        )


def perplexity(
    lm: LanguageModel, ids: Sequence[Sequence[int]], intervention: Intervention | None
) -> float:
    """Perplexity per token over texts, given as token ids, under an intervention."""
    with applied(intervention, lm.model):
        nlls = token_nlls(lm, ids)
    return float(np.exp(sum(float(one.sum()) for one in nlls) / sum(map(len, nlls))))


def affordable_edit(damage: Damage, edit: kfac.CurvatureEdit) -> tuple[float, kfac.CurvatureEdit]:
    """The smallest of `KEEPS` with which an edit is affordable, or the largest, and that edit."""
    edits = [(keep, edit.with_keep(keep)) for keep in KEEPS]
    most = AFFORDABLE * damage.unchanged
    return next((pair for pair in edits if damage.of(pair[1]) <= most), edits[-1])


def rivals_of_edit(factors: kfac.Factors, names: Sequence[str], seed: int) -> dict[str, Rival]:
    """SVD and random pairs on the matrices of a curvature edit."""
    svd = kfac.SVDEdit(names, 1.0)
    pairs = kfac.RandomPairsEdit(factors, dict.fromkeys(names, 1.0), seed, of="pairs")
    return {
        "SVD": Scaled(
            lambda share: svd.with_keep(1 - share),
            1e-3,
            0.999,
            lambda share: f"{as_number(100 * share)} % of the singular values removed",
        ),
        f"random pairs at K-FAC{SAME_DAMAGE}": Scaled(
            lambda share: pairs.with_keep(dict.fromkeys(names, 1 - share)),
            1e-6,
            0.999,
            lambda share: f"{as_number(100 * share)} % of the pairs removed",
        ),
    }


def subnet_rival(
    lm: LanguageModel, names: Sequence[str], clean: Sequence[str], forget: Sequence[str], seed: int
) -> Rival:
    """BalancedSubnet on these matrices.

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

    def train(ratio: float) -> kfac.SubnetEdit:
        targets = kfac.named_targets(lm.model, names)
        return kfac.fit_balanced_subnet(
            lm.model, kept, forgotten, targets, ratio=ratio, seed=seed, progress=False
        )

    return Subnet(train)


def steering_rival(make: Callable[[float], Steer], strength: float) -> Rival:
    """A steering around a strength, with its sign."""
    sign, size = math.copysign(1.0, strength), abs(strength) or 1.0
    return Scaled(
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
    goals = damage.goals(intervention)
    matches = {key: one.at(goals) for key, one in rivals.items()}
    return EqualDamage(name, goals[-1].perplexity, matches, damage)
