"""nDCG@10: whether an edited model ranks the next tokens as the unchanged model does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lirefs.errors import TaskError, as_list, must_be, whole_number
from lirefs.model.batching import check_length
from lirefs.model.guest import evaluating
from lirefs.model.intervention import refuse_steered
from lirefs.model.language_model import LanguageModel
from lirefs.model.prompts import Prompt, prompt_known, with_prompts
from lirefs.model.weight_swap import is_edited
from lirefs.tasks.batches.recomputed import Advance
from lirefs.tasks.items import ItemTask, named_texts
from lirefs.tasks.task import ItemResult


@dataclass(frozen=True, repr=False)
class RankAgreement(ItemTask):
    """Scores of `ndcg` against a frozen ranking, averaged over the tokens. Made by `ndcg_task`.

    Attributes:
        items: (id, token ids of the text, and for each of its tokens the ids of the k likeliest
            next tokens under the unchanged model, likeliest first).
    """

    items: Sequence[Any]
    group: str = "language"
    metric: str = "ndcg"
    chance: float = 0.0

    columns = ("id", "ids", "likeliest")

    def _checked(self, where: str, *values: Any) -> Iterable[Any]:
        ids, frozen = (as_list(one, where, error=TaskError) for one in values)
        if not ids or len(ids) != len(frozen) or len({len(row) for row in frozen}) != 1:
            raise TaskError(f"{where} needs k tokens for each position")
        return values

    def encoded(self, lm: LanguageModel) -> None:
        """Check the length of each text; its ids are given."""
        self._fit_positions(lm, (len(ids) for _, ids, _ in self.items))

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every text."""
        self.encoded(lm)
        results = []
        for item, ids, frozen in self.items:
            baseline = torch.tensor([list(row) for row in frozen])
            ranked = _ranked(lm, ids, baseline.shape[1])
            if bool(ranked.values.isfinite().all()):
                found = ndcg(baseline, ranked.indices.cpu())
                scores = {name: float(values.mean()) for name, values in found.items()}
            else:
                scores = dict.fromkeys(("ndcg", "ndcg_paper"), math.nan)
            results.append(ItemResult(item, scores, len(ids), lm.tokenizer.decode(ids)[:200]))
            advance(1)
        return results


def ndcg_task(
    lm: LanguageModel,
    texts: Sequence[tuple[str, str]],
    k: int = 10,
    max_tokens: int = 512,
    name: str | None = None,
) -> RankAgreement:
    """Rank the next tokens with the model as it is now, and freeze the ranking.

    The task scores nDCG@k of a changed model's ranking against it (Merullo et al. 2025, table 1).

    Args:
        lm: The unchanged model. A change that was written into the weights for good is not noticed.
        texts: (id, text), or texts alone.
        k: Number of likeliest tokens that count.
        max_tokens: Longer texts are cut to this length. The logits of one text are held at a
            time: `max_tokens` times the vocabulary.
        name: Name of the task; `nDCG@k` by default.

    Raises:
        TaskError: The model is steered or edited, k is not in 1 to the size of the vocabulary, a
            text is empty, or its logits are not finite.
    """
    must_be(lm, LanguageModel, "lm", TaskError)
    whole_number(k, "k", least=1, error=TaskError)
    whole_number(max_tokens, "max_tokens", least=1, error=TaskError)
    refuse_steered(lm.model, TaskError, "the baseline of nDCG")
    if is_edited(lm.model):
        raise TaskError(
            "a model under a weight edit cannot be the baseline of nDCG: remove the edit first "
            "(leave the `with` block, or call `remove` on the handle)"
        )
    items = []
    for item, text in named_texts("nDCG", texts):
        ids = lm.encode([text])[0][:max_tokens]
        if not ids:
            raise TaskError(f"nDCG: text {item!r} is empty")
        check_length(lm.model, len(ids), f"nDCG: text {item!r}", TaskError)
        items.append((item, ids, likeliest(lm, ids, k).tolist()))
    return RankAgreement(name or f"nDCG@{k}", items)


def likeliest(lm: LanguageModel, ids: Sequence[int], k: int) -> Tensor:
    """The k likeliest next tokens at each position of a text: ids on the CPU, (tokens, k), int64.

    For steering in scopes, the first half of a text counts as its prompt.
    """
    best = _ranked(lm, ids, k)
    if not bool(best.values.isfinite().all()):
        raise TaskError(f"{lm.name}: the logits hold NaN or infinity")
    return best.indices.cpu()


def _ranked(lm: LanguageModel, ids: Sequence[int], k: int) -> torch.return_types.topk:
    """The k highest logits at each position of a text, and their ids, (tokens, k) both."""
    # One text per batch: in a larger batch, rounding would differ and near-ties be reordered.
    whole = with_prompts(lm.model, lm.tokenizer, [ids], chats=False)
    prompt = Prompt(torch.tensor([len(whole[0]) - len(ids) + max(1, len(ids) // 2)]))
    with evaluating(lm.model), prompt_known(prompt):
        logits = lm.model(**lm.pad(whole, side="right"), use_cache=False).logits[0, -len(ids) :]
    if not 0 < k <= logits.shape[-1]:
        raise TaskError(f"k is {k}, expected 1 to {logits.shape[-1]}")
    return cast("torch.return_types.topk", logits.topk(k, dim=-1))


def ndcg(baseline: Tensor, edited: Tensor) -> dict[str, Tensor]:
    """Two definitions of nDCG at each position.

    With ranks from 1, both sum gain / log2(r + 1) over the edited model's ranks r, and divide by
    the sum for the baseline's own list. `ndcg`, the usual one: a token of rank b in the baseline's
    list gains k - b + 1, a token outside it nothing, so that order counts. `ndcg_paper`, the
    formula of Merullo et al. 2025: a token anywhere in the baseline's list gains k - r + 1, so
    that only the set counts. A list of ten in reverse gives 0.668 and 1.

    Args:
        baseline: Token ids, likeliest first, shape (positions, k).
        edited: The same for the other model.

    Returns:
        `ndcg` and `ndcg_paper`, float64, shape (positions,).
    """
    k = baseline.shape[1]
    gains = torch.arange(k, 0, -1, dtype=torch.float64)
    discounts = torch.log2(torch.arange(2, k + 2, dtype=torch.float64))
    ideal = (gains / discounts).sum()
    same = (baseline[:, :, None] == edited[:, None, :]).double()  # (positions, b, r)
    return {
        "ndcg": (torch.einsum("b,pbr->pr", gains, same) / discounts).sum(1) / ideal,
        "ndcg_paper": (same.sum(1) * gains / discounts).sum(1) / ideal,
    }
