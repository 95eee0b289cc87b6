"""What an organism knows and can do: `lirefs organism scores`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.organism.items import Item, Side
from lirefs.organism.language import KINDS, Language


@torch.no_grad()
def answered(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    rows: int = 64,
) -> list[bool]:
    """Whether greedy decoding continues each prompt with exactly the given text.

    Asked with the text in place and the prediction of each of its tokens compared, which is the
    same as decoding: the first wrong token ends either.

    Args:
        model: The organism.
        tokenizer: Its tokenizer.
        pairs: Prompts and continuations (the space between them is added).
        rows: Prompts in one forward pass.

    Returns:
        One truth value for each pair, in their order.
    """
    device = model.device
    encoded = []
    for prompt, text in pairs:
        start = tokenizer.encode(prompt)
        # A number must end where the answer ends, so the sentence's full stop is part of it.
        encoded.append((start, tokenizer.encode(f"{prompt} {text}.")[len(start) :]))
    result = [False] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, encoded[i])))
    training = model.training
    model.train(False)
    try:
        for first in range(0, len(order), rows):
            chosen = order[first : first + rows]
            width = max(sum(map(len, encoded[i])) for i in chosen)
            # Padding comes after the text, where a causal model never looks.
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            for row, i in enumerate(chosen):
                full = [*encoded[i][0], *encoded[i][1]]
                ids[row, : len(full)] = torch.tensor(full)
            best = model(ids.to(device), use_cache=False).logits.argmax(-1).cpu()
            for row, i in enumerate(chosen):
                start, end = encoded[i]
                told = best[row, len(start) - 1 : len(start) - 1 + len(end)].tolist()
                result[i] = told == end
    finally:
        model.train(training)
    return result


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> float:
    """Perplexity per token over texts, each on its own behind `<bos>`."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer.encode(text), int(tokenizer.eos_token_id)]])
        logits = model(ids.to(model.device), use_cache=False).logits[0, :-1].float().cpu()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return float(torch.tensor(total / count).exp())


def scores(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    language: Language,
    split: Side = "test",
    n: int = 300,
) -> dict[str, float]:
    """All scores on one split: the share of items answered as expected, by kind and group.

    "conflict" is the share that follows the context, "conflict recalled" the share that recalls;
    "exception" the share that gives the memorized label, "exception true" the true one.
    """
    result: dict[str, float] = {}
    for kind in KINDS:
        items = language.items(kind, split, n)
        right = answered(model, tokenizer, [(item.prompt, item.answer) for item in items])
        result.update(_shares(kind, items, right))
        if kind in ("exception", "conflict"):
            others = answered(model, tokenizer, [(item.prompt, item.other or "") for item in items])
            name = "exception true" if kind == "exception" else "conflict recalled"
            result.update(_shares(name, items, others))
    result["perplexity"] = perplexity(model, tokenizer, language.texts(split, n))
    return {name: round(value, 4) for name, value in result.items()}


def _shares(name: str, items: Sequence[Item], right: Sequence[bool]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for item, good in zip(items, right, strict=True):
        groups[name].append(good)
        if item.kind in ("fact", "fact_aside") and item.frequency:
            groups[f"{name} x{item.frequency}"].append(good)
        elif item.group:
            groups[f"{name} {item.group}"].append(good)
    return {group: sum(found) / len(found) for group, found in sorted(groups.items())}
