"""BalancedSubnet (Sakarvadia et al. 2025, arXiv 2410.02159): a learned mask on single weights."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kfac.analysis.losses import passage_losses
from kfac.collection.batches import check_model_and_batches, must_be_causal
from kfac.edits.baselines import largest_of_smallest
from kfac.edits.weight_edit import WeightEdit, check_weight
from kfac.target import Target, weight_digest
from kfac.targets import must_pass_gradients, named_targets
from lirefs.errors import BatchError, EditError, NonFiniteError, as_list, checked_seed, must_be
from lirefs.model.guest import as_guest
from lirefs.model.training.copies import trained_weights


class SubnetEdit(WeightEdit):
    """Zero the weights outside a learned mask.

    Args:
        masks: For each target name the kept entries, bool (out, in), on CPU.
        digests: For each target name the digest of the weight that the mask was learned on.
        settings: How the masks were learned; JSON values.
        scores: For each target name the scores that the mask was made of, float32 (out, in), on
            CPU; None if they are not known.

    Raises:
        EditError: Masks, digests and scores are not of the same targets, dtypes or shapes, or a
            score is not finite.
    """

    kind = "balanced_subnet"

    def __init__(
        self,
        masks: dict[str, Tensor],
        digests: dict[str, str],
        settings: dict[str, Any],
        scores: dict[str, Tensor] | None = None,
    ) -> None:
        must_be(digests, Mapping, "digests", EditError)
        must_be(settings, Mapping, "settings", EditError)
        _must_be_tables("masks", masks, digests)
        for name, one in masks.items():
            if one.dtype != torch.bool:
                raise EditError(f"masks[{name!r}] must be bool, got {one.dtype}")
        if scores is not None:
            _must_be_tables("scores", scores, masks)
            for name, one in scores.items():
                fits = one.is_floating_point() and one.shape == masks[name].shape
                if not fits or not bool(one.isfinite().all()):
                    raise EditError(
                        f"scores[{name!r}] must be finite numbers of shape "
                        f"{tuple(masks[name].shape)}, got {one.dtype} of {tuple(one.shape)}"
                    )
        self.masks, self.digests, self.settings = masks, digests, settings
        self.scores = scores

    def __repr__(self) -> str:
        return f"SubnetEdit({len(self.masks)} targets)"

    def with_ratio(self, ratio: float) -> SubnetEdit:
        """Return the edit that prunes another fraction by the same scores, in (0, 1).

        Raises:
            EditError: The scores are not known, or the fraction is out of range.
        """
        number = isinstance(ratio, int | float)
        if self.scores is None or not number or not 0 < ratio < 1:
            raise EditError(f"with_ratio needs scores, and ratio={ratio} in (0, 1)")
        masks = {name: _kept(score, ratio) for name, score in self.scores.items()}
        learned = {"learned at": self.settings.get("ratio"), **self.settings}
        return SubnetEdit(masks, self.digests, learned | {"ratio": ratio}, self.scores)

    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Compute the masked weights.

        Raises:
            FactorsMismatchError: The masks were learned on other weights.
        """
        result = []
        for target in named_targets(model, self.masks):
            check_weight(target, self.digests[target.name], "the mask was learned")
            pruned = ~self.masks[target.name].to(target.weight.device)
            result.append((target, target.weight.masked_fill(pruned, 0.0)))
        return result

    def describe(self) -> dict[str, Any]:
        """Return kind, settings, and a digest of the masks."""
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
    """Learn a mask that prunes reciting weights; unlike the curvature edit this needs a forget set.

    Each weight has a score, drawn uniformly within 1/√in. The forward pass uses W ∘ m, where m
    zeroes in each matrix the fraction `ratio` of smallest |score|; the gradient of the mask goes
    straight through to |score|. The loss is that of the clean texts minus `weight` times that of
    the memorized ones; each is a sum over texts of the mean over the text's positions. The
    optimizer is SGD with momentum 0.9 and weight decay 5e-4. The defaults are the settings that
    Merullo et al. 2025 (appendix) report for OLMo-2. The memorized loss has no upper bound, so
    larger values can break the model.

    Args:
        model: A causal language model; left as it was found.
        clean: Batches of clean text, see `kfac.collect`; repeated if there are fewer of them.
        memorized: Batches of memorized text; each is used once in an epoch.
        targets: Matrices to mask (the paper masks the MLPs of all layers).
        ratio: Fraction of each matrix to prune, in (0, 1).
        weight: Weight of the memorized loss.
        epochs: Passes over the memorized batches.
        lr: Learning rate of the scores.
        seed: Seed of the first scores and the order of batches.
        progress: Show a bar.

    Raises:
        BatchError: One of the sets is empty or has no position to predict.
        EditError: A setting is out of range, no target, or two share a parameter.
        NonFiniteError: The loss is NaN or infinite.
    """
    check_model_and_batches(model, clean, memorized)
    must_be_causal(model)
    targets = as_list(targets, "targets", Target, EditError)
    if not targets or not 0 < ratio < 1 or weight < 0 or epochs < 1 or lr <= 0:
        raise EditError(
            f"BalancedSubnet needs a target (got {len(targets)}), ratio={ratio} in (0, 1), "
            f"weight={weight} of 0 or more, epochs={epochs} of 1 or more, and lr={lr} above 0"
        )
    seed = checked_seed(seed, EditError)
    kept_clean, kept_memorized = list(clean), list(memorized)
    if not kept_clean or not kept_memorized:
        raise BatchError("BalancedSubnet needs clean and memorized batches; one set is empty")
    masked = _Masked(targets, ratio, lr, seed)
    order = torch.Generator().manual_seed(seed)
    with as_guest(model), trained_weights([target.parameter for target in targets]):
        must_pass_gradients(model)
        masked.mask()
        bar = tqdm(range(epochs), desc="BalancedSubnet", unit="epoch", disable=not progress or None)
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
                if not math.isfinite(total):
                    raise NonFiniteError("the loss of BalancedSubnet is NaN or infinite; lower lr")
                masked.step()
                bar.set_postfix_str(f"loss {total:.3f}")
    settings = {"ratio": ratio, "weight": weight, "epochs": epochs, "lr": lr, "seed": seed}
    scores = {target.name: score.cpu() for target, _, score in masked.parts}
    masks = {name: _kept(score, ratio) for name, score in scores.items()}
    return SubnetEdit(masks, masked.digests, settings, scores)


def _must_be_tables(what: str, tables: Any, like: Mapping[str, Any]) -> None:
    """Raise EditError unless each target of `like` has a matrix, and no other has."""
    must_be(tables, Mapping, what, EditError)
    if tables.keys() != like.keys():
        raise EditError(f"{what} must be of the targets {', '.join(like)}, got {', '.join(tables)}")
    for name, one in tables.items():
        must_be(one, Tensor, f"{what}[{name!r}]", EditError)
        if one.ndim != 2:
            raise EditError(f"{what}[{name!r}] must have shape (out, in), got {tuple(one.shape)}")


def _kept(score: Tensor, ratio: float) -> Tensor:
    """Return the mask of a target from its scores, bool (out, in)."""
    sizes = score.abs()
    return sizes > largest_of_smallest(sizes.flatten(), round(ratio * sizes.numel()))


class _Masked:
    """Some targets with a score for each weight, which decides what is masked.

    A mask entry's gradient is the weight's gradient times the weight, so no module is replaced.
    """

    def __init__(self, targets: Sequence[Target], ratio: float, lr: float, seed: int) -> None:
        if any(target.expert is not None for target in targets):
            raise EditError("BalancedSubnet does not mask single experts; name whole matrices")
        if len({id(target.parameter) for target in targets}) < len(targets):
            raise EditError("two targets of BalancedSubnet are tied to one parameter")
        self.ratio = ratio
        self.digests = {target.name: weight_digest(target.weight) for target in targets}
        generator = torch.Generator().manual_seed(seed)
        self.parts: list[tuple[Target, Tensor, Tensor]] = []
        for target in targets:
            bound = target.in_features**-0.5  # Kaiming with a = √5, as the authors draw them
            score = torch.empty(target.weight.shape).uniform_(-bound, bound, generator=generator)
            original = target.parameter.data
            self.parts.append((target, original, score.to(original.device)))
        self.optimizer = torch.optim.SGD([score for *_, score in self.parts], lr, momentum=0.9)

    @torch.no_grad()
    def step(self) -> None:
        """Update the scores, and mask the weights by them again."""
        for target, original, score in self.parts:
            gradient, target.parameter.grad, score.grad = target.parameter.grad, None, None
            if gradient is not None:
                by_mask = target.orient(gradient).float() * target.orient(original).float()
                score.grad = by_mask * score.sign() + 5e-4 * score
        self.optimizer.step()
        self.mask()

    def mask(self) -> None:
        """Put the masked weights in place."""
        for target, original, score in self.parts:
            target.parameter.data = original * target.orient(_kept(score, self.ratio))
