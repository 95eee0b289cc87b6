"""One matrix: the same scope touches the same tokens, however the model is called.

Every cell is compared with a reference of its own: each row alone, unpadded, without a cache,
changed by a hook that multiplies by a mask written out by hand.
"""

import functools

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache

from lirefs import Direction, Gate, Steer, wrap
from lirefs.errors import ScopeError
from lirefs.model.prompts import prompt_lengths
from lirefs.steering import scope as scopes

NEW = 5
LAYER = 1
TEXTS = ["a much longer prompt", "short", "middle one"]
TOKENIZER = tiny_tokenizer()
VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(5))
SPANS = [[(2, 6), (12, 13)], [(0, 2)], [(9, 10)]]
MARKED = [[0, 3, 4, 20], [2], []]


# What each scope means, written down without the library: from the length of the prompt, the
# length of the whole text and the row to the positions that it touches.
MEANING = {
    "all": lambda prompt, total, row: range(total),
    "prompt": lambda prompt, total, row: range(prompt),
    "generated": lambda prompt, total, row: range(prompt, total),
    "last_prompt_token": lambda prompt, total, row: [prompt - 1],
    "first_generated": lambda prompt, total, row: range(prompt, min(prompt + 2, total)),
    "from_position": lambda prompt, total, row: range(min(8, total), total),
    # One character is one token, after the token that begins the text.
    "spans": lambda prompt, total, row: [c + 1 for a, b in SPANS[row] for c in range(a, b)],
    "mask": lambda prompt, total, row: MARKED[row],
}
SCOPES = list(MEANING)


def scope_of(name, rows):
    """The scope, for these rows of TEXTS."""
    if name == "first_generated":
        return scopes.first_generated(2)
    if name == "from_position":
        return scopes.from_position(8)
    if name == "spans":
        return scopes.spans(TOKENIZER, [TEXTS[i] for i in rows], [SPANS[i] for i in rows])
    if name == "mask":
        return scopes.mask([[p in MARKED[i] for p in range(21)][: _length(i)] for i in rows])
    return name


def _length(row):
    return len(TEXTS[row]) + 1


@functools.cache
def language_model(family):
    return wrap(tiny_model(family), TOKENIZER)


def reference(lm, ids, touched):
    """Logits of one unpadded row under a hook that adds the vector at the touched positions."""
    marks = torch.zeros(len(ids), 1)
    marks[list(touched)] = 1.0
    block = lm.layout.block(lm.model, LAYER)
    hook = block.register_forward_pre_hook(lambda _, args: (args[0] + marks * VECTOR, *args[1:]))
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    hook.remove()
    return logits


def compare(lm, name, rows, texts, logits, side="left"):
    """Compare the logits that predicted each new token with the reference, and the tokens."""
    longest = max(len(ids) - len(found) for ids, found in zip(texts, logits))
    for index, (ids, found) in enumerate(zip(texts, logits)):
        prompt = len(ids) - len(found)
        touched = MEANING[name](prompt, len(ids), rows[index])
        assert name == "mask" or list(touched), "a cell that touches nothing shows nothing"
        expected = reference(lm, ids, touched)
        expected = expected[prompt - 1 : -1]
        if side == "right" and prompt < longest:
            # `generate` reads the first new token off the padding, which no unpadded text has.
            found, expected = found[1:], expected[1:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    return expected


def steered(name, rows):
    return Steer(Direction(VECTOR, LAYER), "add", scope=scope_of(name, rows))


def generate(lm, name, rows=(0, 1, 2), prompts=None, greedy=True, side="left", **settings):
    """Rows of a call of `generate`: whole unpadded texts, and the logits of their new tokens."""
    ids = lm.encode([TEXTS[i] for i in rows]) if prompts is None else prompts
    batch = lm.pad(ids, side=side)
    if side == "left":  # on the right, `generate` would go on from the position of the padding
        batch.pop("position_ids", None)
    width = batch["input_ids"].shape[1]
    settings = {
        "do_sample": False,
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "pad_token_id": 2,
        "return_dict_in_generate": True,
        "output_logits": True,
        **settings,
    }
    if settings.pop("embeds", False):
        batch["inputs_embeds"] = lm.model.get_input_embeddings()(batch.pop("input_ids")).detach()
        width = 0
    with steered(name, rows).apply(lm.model), torch.no_grad():
        out = lm.model.generate(**batch, **settings)
    new = out.sequences[:, width:]
    each = len(new) // len(ids)
    beams = getattr(out, "beam_indices", None)
    texts, logits = [], []
    for row, tokens in enumerate(new.tolist()):
        steps = [
            step[int(beams[row, index]) if beams is not None else row]
            for index, step in enumerate(out.logits)
        ]
        texts.append(ids[row // each] + tokens)
        logits.append(torch.stack(steps))
        if greedy:  # the same tokens: min_new_tokens forbids the end, so it is left out here
            scores = logits[-1].clone()
            scores[:, lm.tokenizer.eos_token_id] = -torch.inf
            assert scores.argmax(-1).tolist() == tokens
    return texts, logits


# name: settings of `generate`
GENERATE = {
    "cached, padded left": {},
    "cached, one row": {"rows": (0,)},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "static cache, one row": {"cache_implementation": "static", "rows": (2,)},
    "chunks of 4": {"prefill_chunk_size": 4},
    "chunks of 1": {"prefill_chunk_size": 1},
    "chunks that leave one token over": {"prefill_chunk_size": 10},
    "static cache in chunks": {"prefill_chunk_size": 6, "cache_implementation": "static"},
    "three beams": {"num_beams": 3, "greedy": False},
    "three beams, all returned": {"num_beams": 3, "num_return_sequences": 3, "greedy": False},
    "beams without cache": {"num_beams": 2, "use_cache": False, "greedy": False},
    "sampling": {"do_sample": True, "greedy": False, "top_k": 0},
    "sampling, four each": {"do_sample": True, "num_return_sequences": 4, "greedy": False},
    "embeddings": {"embeds": True},
    "embeddings, two rows": {"embeds": True, "rows": (1, 0)},
    "padded right": {"side": "right"},
    "padded right, no cache": {"side": "right", "use_cache": False},
    "padded right, static cache": {"side": "right", "cache_implementation": "static"},
    "padded right, chunks of 4": {"side": "right", "prefill_chunk_size": 4},
    "padded right, two each": {
        "side": "right",
        "do_sample": True,
        "num_return_sequences": 2,
        "greedy": False,
    },
}


@pytest.mark.parametrize("setting", GENERATE)
@pytest.mark.parametrize("name", SCOPES)
def test_generate(name, setting):
    lm = language_model("llama")
    torch.manual_seed(3)
    texts, logits = generate(lm, name, **GENERATE[setting])
    rows = GENERATE[setting].get("rows", (0, 1, 2))
    each = len(texts) // len(rows)
    side = GENERATE[setting].get("side", "left")
    compare(lm, name, [row for row in rows for _ in range(each)], texts, logits, side)


def test_a_row_gate_reads_the_last_token_and_not_the_padding_after_it():
    lm = language_model("llama")
    ids = lm.encode(["a longer prompt it is", "ab"])
    batch = lm.pad(ids, side="right")
    probe = Direction(VECTOR, 0, "resid_pre")
    with torch.no_grad():
        states = lm.model.get_input_embeddings()(batch["input_ids"])
    along = states @ probe.unit
    last, padding = float(along[1, len(ids[1]) - 1]), float(along[1, -1])
    seen = []
    block = lm.layout.block(lm.model, LAYER)

    def generated():
        """What the block reads of the short row."""
        hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0][1].clone()))
        lm.model.generate(**batch, max_new_tokens=1, do_sample=False, pad_token_id=2)
        hook.remove()
        return seen.pop()

    for passes in (True, False):  # the token decides so, its padding the other way
        gate = Gate(probe, (last + padding) / 2, per="row", above=passes == (last > padding))
        with Steer(Direction(VECTOR, LAYER), "add", gate=gate).apply(lm.model):
            steered_states = generated()
        moved = (steered_states - generated()).norm(dim=-1) > 1e-3
        assert moved.tolist() == [passes and i == len(ids[1]) - 1 for i in range(len(moved))]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2", "bloom", "opt", "falcon"])
@pytest.mark.parametrize("name", ["prompt", "generated", "last_prompt_token", "spans"])
def test_generate_on_other_architectures(name, family):
    lm = language_model(family)
    texts, logits = generate(lm, name)
    compare(lm, name, (0, 1, 2), texts, logits)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "mistral"])
@pytest.mark.parametrize("name", ["prompt", "generated", "from_position", "mask"])
def test_static_cache_on_other_architectures(name, family):
    lm = language_model(family)
    texts, logits = generate(lm, name, cache_implementation="static", prefill_chunk_size=7)
    compare(lm, name, (0, 1, 2), texts, logits)


@pytest.mark.parametrize("setting", ["cached", "no cache", "static", "beams"])
@pytest.mark.parametrize("name", ["prompt", "generated", "last_prompt_token", "first_generated"])
def test_prompts_of_one_token(name, setting):
    lm = language_model("llama")
    more = {
        "cached": {},
        "no cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 2, "greedy": False},
    }[setting]
    texts, logits = generate(lm, name, rows=(0, 1), prompts=[[40], [50, 60, 70]], **more)
    compare(lm, name, (0, 1), texts, logits)


def forward(lm, texts, side, mask=True, positions=True):
    """Logits of whole texts in one padded batch, given back without the padding."""
    batch = lm.pad(texts, side=side)
    if not mask:
        batch.pop("attention_mask")
    if not positions:
        batch.pop("position_ids", None)
    with torch.no_grad():
        logits = lm.model(**batch, use_cache=False).logits
    return [row[-len(t) :] if side == "left" else row[: len(t)] for t, row in zip(texts, logits)]


# name: (padding, rows, whether a mask is given, whether position ids are given)
FORWARD = {
    "padded right": ("right", (0, 1, 2), True, True),
    "padded left": ("left", (0, 1, 2), True, True),
    "padded right, no mask": ("right", (0, 1, 2), False, False),
    "padded right, no position ids": ("right", (0, 2), True, False),
    "one row": ("right", (1,), True, True),
    "one row, nothing given": ("right", (2,), False, False),
}


@pytest.mark.parametrize("setting", FORWARD)
@pytest.mark.parametrize("name", SCOPES)
def test_forward_without_a_cache(name, setting):
    side, rows, mask, positions = FORWARD[setting]
    lm = language_model("llama")
    prompts = lm.encode([TEXTS[i] for i in rows])
    texts = [[*ids, 30 + i, 40, 50, 60] for i, ids in enumerate(prompts)]
    with steered(name, rows).apply(lm.model), prompt_lengths([len(ids) for ids in prompts]):
        found = forward(lm, texts, side, mask, positions)
    for row, ids, prompt, logits in zip(rows, texts, prompts, found):
        expected = reference(lm, ids, MEANING[name](len(prompt), len(ids), row))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", ["cache made", "cache given", "lengths", "chunks, lengths"])
@pytest.mark.parametrize("name", SCOPES)
def test_a_loop_written_by_hand(name, setting):
    lm = language_model("llama")
    rows = (0, 1, 2)
    prompts = lm.encode([TEXTS[i] for i in rows])
    batch = lm.pad(prompts)
    width = batch["input_ids"].shape[1]
    pieces = [(0, 7), (7, width - 1), (width - 1, width)] if "chunks" in setting else [(0, width)]
    cache = DynamicCache(config=lm.model.config) if setting != "cache made" else None
    mask, steps = batch["attention_mask"], []

    def loop():
        nonlocal cache, mask
        for start, end in pieces:
            out = lm.model(
                batch["input_ids"][:, start:end],
                attention_mask=mask[:, :end],
                position_ids=batch["position_ids"][:, start:end],
                past_key_values=cache,
            )
            cache = out.past_key_values
        for step in range(NEW):
            steps.append(out.logits[:, -1])
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            out = lm.model(
                steps[-1].argmax(-1, keepdim=True),
                attention_mask=mask,
                position_ids=batch["position_ids"][:, -1:] + step + 1,
                past_key_values=cache,
            )

    with steered(name, rows).apply(lm.model), torch.no_grad():
        if "lengths" in setting:
            with prompt_lengths([len(ids) for ids in prompts]):
                loop()
        else:
            loop()
    texts = [ids + [int(step[row].argmax()) for step in steps] for row, ids in enumerate(prompts)]
    compare(lm, name, rows, texts, torch.stack(steps, dim=1))


def test_sampling_gives_the_same_tokens_in_every_setting():
    lm = language_model("llama")
    drawn = []
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(11)
        texts, _ = generate(lm, "generated", do_sample=True, top_k=0, greedy=False, **more)
        drawn.append(texts)
    assert drawn[0] == drawn[1] == drawn[2]


def test_generate_is_uncovered_again_and_nesting_is_safe():
    model = language_model("llama").model
    one, two = (Steer(Direction(VECTOR, LAYER), "add", scope="prompt") for _ in range(2))
    first, second = one.attach(model), two.attach(model)
    assert "generate" in vars(model)
    first.remove()
    assert "generate" in vars(model)
    second.remove()
    assert "generate" not in vars(model)
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_unknown_prompts_are_refused_and_not_guessed():
    lm = language_model("llama")
    ids = torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        cache = lm.model(ids, use_cache=True).past_key_values
    with Steer(Direction(VECTOR, LAYER), "add", scope="generated").apply(lm.model), torch.no_grad():
        with pytest.raises(ScopeError, match="unknown where its prompt ends"):
            lm.model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ScopeError, match="rest of a prompt or generated"):
            lm.model(ids, past_key_values=lm.model(ids, use_cache=True).past_key_values)
    with Steer(Direction(VECTOR, LAYER), "add", scope="all").apply(lm.model), torch.no_grad():
        lm.model(ids[:, :1], past_key_values=cache)  # needs no prompt length


def test_named_errors():
    lm = language_model("llama")
    one = Direction(VECTOR, LAYER)
    for wrong in [
        lambda: scopes.as_scope("answer"),
        lambda: scopes.as_scope(["prompt"]),
        lambda: scopes.first_generated(0),
        lambda: scopes.from_position(-1),
        lambda: scopes.mask([]),
        lambda: scopes.mask([[1, 0]]),
        lambda: scopes.spans(TOKENIZER, ["abc"], [[(0, 4)]]),
        lambda: scopes.spans(TOKENIZER, ["abc"], [[(1, 1)]]),
        lambda: scopes.spans(TOKENIZER, ["abc"], []),
        lambda: prompt_lengths([]).__enter__(),
        lambda: prompt_lengths([3, 0]).__enter__(),
        lambda: Steer(one, "add", scope=scopes.from_position(128)).attach(lm.model),
    ]:
        with pytest.raises(ScopeError):
            wrong()
    late = scopes.mask([[True] * 30, [True]])
    seen = []
    block = lm.layout.block(lm.model, 0)
    hook = block.register_forward_pre_hook(lambda *_: seen.append(1))
    with Steer(one, "add", scope=late).apply(lm.model):
        with pytest.raises(ScopeError, match="position 29 of row 0, which has 21"):
            lm.generate(TEXTS[:2], max_new_tokens=2)
        with pytest.raises(ScopeError, match="made for 2 row"):
            lm.generate(TEXTS, max_new_tokens=2)
    for scope in ("prompt", "all"):
        with Steer(one, "add", scope=scope).apply(lm.model):
            with pytest.raises(ScopeError, match="batch is empty"):
                lm.model(torch.zeros(0, 4, dtype=torch.long))
            with pytest.raises(ScopeError, match="batch is empty"):
                lm.model.generate(torch.zeros(0, 4, dtype=torch.long))
    hook.remove()
    assert not seen  # nothing ran


def test_a_scope_of_ones_own_is_told_apart_by_its_settings():
    def every_second(tokens):
        return tokens.position % 2 == 0

    said = {"every": 2}
    assert scopes.Scope("own", every_second, said).describe() == {"name": "own", "every": 2}
    assert "give it settings" in scopes.Scope("own", every_second).describe()["unknown"]
    assert scopes.generated().describe() == {"name": "generated"}
