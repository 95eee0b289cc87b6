"""BalancedSubnet (Sakarvadia et al. 2025, arXiv 2410.02159): a learned mask on single weights."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kfac.analysis.losses import passage_losses
from kfac.edits.baselines import largest_of_smallest
from kfac.edits.weight_edit import WeightEdit
from kfac.target import Target, weight_digest
from kfac.targets import named_targets
from lirefs.errors import BatchError, EditError, FactorsMismatchError, NonFiniteError
from lirefs.model.guest import as_guest
from lirefs.model.weight_swap import originals_of


class SubnetEdit(WeightEdit):
    """Zero the weights outside a learned mask.

    Args:
        masks: For each target name the kept entries, bool (out, in), on CPU.
        digests: For each target name the digest of the weight that the mask was learned on.
        settings: What made the masks; JSON values.
    """

    kind = "balanced_subnet"

    def __init__(
        self, masks: dict[str, Tensor], digests: dict[str, str], settings: dict[str, Any]
    ) -> None:
        self.masks, self.digests, self.settings = masks, digests, settings

    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Compute the masked weights.

        Args:
            model: The model that the masks were learned on.

        Returns:
            Target and masked weight (out, in).

        Raises:
            FactorsMismatchError: The masks were learned on other weights.
        """
        result = []
        for target in named_targets(model, self.masks):
            weight = target.weight
            # Under other edits the weights that the mask was learned on are the replaced ones.
            held = (
                weight_digest(one)
                for one in (weight, *map(target.view, originals_of(target.parameter)))
            )
            if self.digests[target.name] not in held:
                raise FactorsMismatchError(
                    f"target {target.name!r}: the mask was learned on other weights"
                )
            kept = self.masks[target.name].to(weight.device)
            result.append((target, weight.masked_fill(~kept, 0.0)))
        return result

    def describe(self) -> dict[str, Any]:
        """Return kind, settings, and a digest of the masks.

        Returns:
            JSON values.
        """
        sha = hashlib.sha256()
        for name, mask in sorted(self.masks.items()):
            sha.update(name.encode() + mask.numpy().tobytes())
        return {"kind": self.kind, **self.settings, "masks": sha.hexdigest()}


def fit_balanced_subnet(
    model: nn.Module,
    clean: Iterable[Any],
    memorized: Iterable[Any],
    targets: Sequence[Target],
    *,
    ratio: float = 0.0015,
    weight: float = 0.7,
    epochs: int = 5,
    lr: float = 0.3,
    seed: int = 0,
    progress: bool = True,
) -> SubnetEdit:
    """Learn which weights recite and prune them; unlike the curvature edit it needs a forget set.

    Each weight has a score, drawn uniformly within 1/√in. The forward pass uses W ∘ m, where m
    zeroes in each matrix the fraction `ratio` of smallest |score|; the gradient of the mask goes
    straight through to |score|. The loss is that of the clean texts minus `weight` times that of
    the memorized ones, each the sum over texts of the mean over a text's positions. SGD with
    momentum 0.9 and weight decay 5e-4. Defaults are the settings that Merullo et al. 2025
    (appendix) report for OLMo-2; the memorized loss has no upper bound, so larger ones can break
    the model.

    Args:
        model: A causal language model; left as it was found.
        clean: Batches of clean text, see `kfac.collect`; repeated if there are fewer.
        memorized: Batches of memorized text; one epoch sees each once.
        targets: Matrices to mask (the paper masks the MLPs of all layers).
        ratio: Fraction of each matrix to prune, in (0, 1).
        weight: Of the memorized loss.
        epochs: Passes over the memorized batches.
        lr: Learning rate of the scores.
        seed: Of the first scores and of the order of batches.
        progress: Show a bar.

    Returns:
        The learned mask as an edit.

    Raises:
        BatchError: One of the sets is empty or has no position to predict.
        EditError: A setting is out of range, or two targets share a parameter.
        NonFiniteError: The loss is NaN or infinite.
    """
    if not 0 < ratio < 1 or weight < 0 or epochs < 1 or lr <= 0:
        raise EditError(
            f"ratio={ratio} must be in (0, 1), weight={weight} not negative, epochs={epochs} at "
            f"least 1, lr={lr} positive"
        )
    kept_clean, kept_memorized = list(clean), list(memorized)
    if not kept_clean or not kept_memorized:
        raise BatchError("BalancedSubnet needs clean and memorized batches; one set is empty")
    masked = _Masked(targets, ratio, lr, seed)
    order = torch.Generator().manual_seed(seed)
    with as_guest(model), masked:
        bar = tqdm(range(epochs), desc="BalancedSubnet", unit="epoch", disable=not progress)
        for _ in bar:
            turns = torch.randperm(len(kept_memorized), generator=order).tolist()
            start = int(torch.randint(len(kept_clean), (1,), generator=order))
            others = itertools.islice(itertools.cycle(kept_clean), start, None)
            for turn, other in zip(turns, others, strict=False):
                total = 0.0
                for batch, sign in ((other, 1.0), (kept_memorized[turn], -weight)):
                    loss = sign * passage_losses(model, batch).sum()
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += float(loss.detach())
                if not torch.isfinite(torch.tensor(total)):
                    raise NonFiniteError("the loss of BalancedSubnet is NaN or infinite; lower lr")
                masked.step()
                bar.set_postfix_str(f"loss {total:.3f}")
    settings = {"ratio": ratio, "weight": weight, "epochs": epochs, "lr": lr, "seed": seed}
    return SubnetEdit(masked.masks(), masked.digests, settings)


class _Masked:
    """Scores of some targets; inside the context the weights are masked, after it as before.

    The gradient of a mask entry is the weight's gradient times the weight, so the masked weights
    themselves are the leaves of the graph and no module needs to be replaced.
    """

    def __init__(self, targets: Sequence[Target], ratio: float, lr: float, seed: int) -> None:
        if any(target.expert is not None for target in targets):
            raise EditError("BalancedSubnet does not mask single experts; name whole matrices")
        if len({id(target.parameter) for target in targets}) < len(targets):
            raise EditError("two targets of BalancedSubnet are tied to one parameter")
        self.targets, self.ratio, self.lr = list(targets), ratio, lr
        self.digests = {target.name: weight_digest(target.weight) for target in targets}
        generator = torch.Generator().manual_seed(seed)
        self.scores, self.speeds = [], []
        for target in targets:
            bound = target.in_features**-0.5  # Kaiming with a = √5, as the authors draw them
            score = torch.empty(target.weight.shape).uniform_(-bound, bound, generator=generator)
            self.scores.append(score.to(target.parameter.device))
            self.speeds.append(torch.zeros_like(self.scores[-1]))
        self.originals: list[Tensor] = []
        self.gradients: list[Tensor | None] = []

    def __enter__(self) -> _Masked:
        self.originals = [target.parameter.data for target in self.targets]
        self.gradients = [target.parameter.grad for target in self.targets]
        for target in self.targets:
            target.parameter.grad = None
            target.parameter.requires_grad_(True)
        try:
            self._mask()
        except BaseException:  # no exit follows an entry that failed
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for target, original, gradient in zip(
            self.targets, self.originals, self.gradients, strict=True
        ):
            target.parameter.data = original
            target.parameter.grad = gradient

    @torch.no_grad()
    def step(self) -> None:
        """Update the scores by SGD with momentum, and mask anew."""
        for target, original, score, speed in zip(
            self.targets, self.originals, self.scores, self.speeds, strict=True
        ):
            gradient = target.parameter.grad
            if gradient is None:
                continue
            by_mask = target.orient(gradient).float() * target.orient(original).float()
            by_score = by_mask * score.sign() + 5e-4 * score
            speed.mul_(0.9).add_(by_score)
            score.sub_(speed, alpha=self.lr)
            target.parameter.grad = None
        self._mask()

    def masks(self) -> dict[str, Tensor]:
        """Return the kept entries of each target, bool on CPU."""
        return {
            target.name: self._kept(score).cpu()
            for target, score in zip(self.targets, self.scores, strict=True)
        }

    def _mask(self) -> None:
        for target, original, score in zip(self.targets, self.originals, self.scores, strict=True):
            target.parameter.data = original * target.orient(self._kept(score))

    def _kept(self, score: Tensor) -> Tensor:
        sizes = score.abs().flatten()
        pruned = round(self.ratio * len(sizes))
        if not pruned:
            return torch.ones_like(score, dtype=torch.bool)
        return score.abs() > largest_of_smallest(sizes, pruned)
