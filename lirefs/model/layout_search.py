"""Find the parts of a model by shape and name; believe them only after a forward pass.

Names lie: ``post_attention_layernorm`` stands before the MLP in Llama and after the attention in
OLMo 2. So every candidate is checked on a short input against what its name promises, above all
``resid_pre + attn_out + mlp_out == resid_post``.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lirefs.errors import LayoutError, SettingError, must_be
from lirefs.model.guest import maybe_call, text_config
from lirefs.model.layout import Layout
from lirefs.model.observe import TOKENS, Seen, observe

_PARTS = ("blocks", "attention", "mlp", "final_norm", "unembedding")
_BY_HAND = (
    "name the parts by hand: lirefs.wrap(model, tokenizer, layout={'blocks': 'model.layers', "
    "'attention': 'self_attn', 'mlp': 'mlp', 'final_norm': 'model.norm', 'unembedding': 'lm_head'})"
)
# Children that stand in place of attention in some blocks of hybrids.
_MIXERS = ("conv", "mamba", "temporal_block")
_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of ``model``; the first call finds it, as ``find_layout`` does."""
    must_be(model, nn.Module, "model", LayoutError)
    known = _LAYOUTS.get(model)
    return find_layout(model) if known is None else known


def decoder_blocks(model: nn.Module, likely: str | None) -> str | None:
    """Name of the list of decoder blocks; `likely` if there is none, or if none proves to be it.

    A likely list that alone has the length of the decoder is believed. Else, as in a model that
    also sees, this runs the model as `find_layout` does.
    """
    if model in _LAYOUTS:
        return _LAYOUTS[model].blocks
    try:
        candidates = _block_lists(model, None)
    except LayoutError:
        return likely
    if candidates in ([], [likely]):
        return likely
    try:
        return layout_of(model).blocks
    except LayoutError:  # it does not run on text alone: believe a model that writes text
        decoder = maybe_call(model, "get_decoder")
        if decoder is None or maybe_call(model, "get_output_embeddings") is None:
            return likely
        own = set(decoder.modules())
        inside = [name for name in candidates if model.get_submodule(name) in own]
        return inside[0] if len(inside) == 1 else likely


def find_layout(model: nn.Module, overrides: Mapping[str, str] | None = None) -> Layout:
    """Find the parts of a decoder and verify them with one forward pass on a few tokens.

    The model's hooks, training flags and random state are left as they were; ``layout_of``
    remembers the result.

    Args:
        model: A decoder of ``transformers``, or any module called with ``input_ids``.
        overrides: Names of parts found by hand: ``blocks``, ``attention``, ``mlp``,
            ``final_norm``, ``unembedding``. ``attention`` and ``mlp`` are relative to a block.

    Raises:
        SettingError: ``overrides`` has an unknown part.
        LayoutError: The parts were not found, or a part named by hand failed its check.
    """
    must_be(model, nn.Module, "model", LayoutError)
    must_be(overrides, (Mapping, type(None)), "layout")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise LayoutError(
            f"the model is wrapped in {type(model).__name__}, which is for training; give the "
            "model inside, model.module"
        )
    given = dict(overrides or {})
    for part, name in given.items():
        if part not in _PARTS:
            raise SettingError(f"unknown part {part!r} in layout: use {', '.join(_PARTS)}")
        if part not in ("attention", "mlp"):
            _submodule(model, name)
    candidates = _block_lists(model, given.get("blocks"))
    if not candidates:
        raise LayoutError(f"no list of decoder blocks found in {_found(model)}; {_BY_HAND}")
    if "final_norm" in given:
        norms = [given["final_norm"]]
    else:
        inside = tuple(f"{blocks}." for blocks in candidates)
        norms = [n for n, m in model.named_modules() if _is_norm(m) and not n.startswith(inside)]
    projection = maybe_call(model, "get_output_embeddings")
    heads = [name for name, module in model.named_modules() if module is projection]
    head = given.get("unembedding") or next(iter(heads), None)
    watched = {name: model.get_submodule(name) for name in (*norms, head) if name is not None}
    for blocks in candidates:
        parts = model.get_submodule(blocks).named_modules(prefix=blocks, remove_duplicate=False)
        watched |= parts
    seen = observe(model, watched)
    problems = []
    for blocks in candidates:
        try:
            _LAYOUTS[model] = layout = _verified(model, blocks, norms, head, given, seen)
            return layout
        except LayoutError as problem:
            problems.append(str(problem))
    raise LayoutError(f"{'; '.join(problems)}; found in {_found(model)}; {_BY_HAND}")


def _verified(
    model: nn.Module,
    blocks: str,
    norms: list[str],
    head: str | None,
    given: Mapping[str, str],
    seen: Mapping[str, Seen],
) -> Layout:
    """Return the layout with ``blocks`` as the block list, or raise what speaks against it."""
    members = list(model.get_submodule(blocks).children())
    chain = [seen.get(f"{blocks}.{index}", Seen()) for index in range(len(members))]
    for index, one in enumerate(chain):
        if one.input is None or one.output is None or one.output.dim() != 3:
            raise LayoutError(
                f"{blocks}.{index} was not run on a text alone, or did not carry hidden states "
                "(batch, tokens, d)"
            )
        if one.output.shape[:2] != (1, TOKENS):
            raise LayoutError(
                f"{blocks}.{index} carried hidden states {tuple(one.output.shape)} for 1 text of "
                f"{TOKENS} tokens, so the positions of a text are not those of its states (virtual "
                "tokens of prompt tuning, or another order of axes)"
            )
        if one.runs > 1:
            raise LayoutError(
                f"{blocks}.{index} runs {one.runs} times in a forward pass, so a layer is not one "
                "place in the model"
            )
        if index and not _same(chain[index - 1].output, one.input):
            raise LayoutError(f"the output of {blocks}.{index - 1} is not the input of the next")
        if index and _second_stream(chain[index - 1], one):
            raise LayoutError(
                f"{blocks}.{index - 1} hands on a second tensor of hidden states: the residual "
                "stream is their sum, which no module carries"
            )
    last = chain[-1].output
    assert last is not None  # checked above; tells the type checker

    fitting = [name for name in norms if _same(seen[name].input, last)]
    if not fitting and "final_norm" in given:
        raise LayoutError(f"{given['final_norm']} does not read the output of the last block")
    # If several norms read it (multi-token heads), the one before the unembedding is meant.
    fitting.sort(key=lambda name: head is None or not _same(seen[name].output, seen[head].input))
    final_norm = fitting[0] if fitting else None
    end = seen[final_norm].output if final_norm else last
    if head is not None and not _same(end, seen[head].input):
        if "unembedding" in given:
            source = final_norm or "the last block"
            raise LayoutError(f"{head} does not read the output of {source}")
        head = None

    pairs = _additive_pairs(blocks, members, given, seen)
    return Layout(
        blocks=blocks,
        attention=tuple(attention for attention, _ in pairs),
        mlp=tuple(mlp for _, mlp in pairs),
        final_norm=final_norm,
        unembedding=head,
        n_layers=len(members),
        width=last.shape[-1],
        norms=tuple(map(_norms, members)),
    )


def _additive_pairs(
    blocks: str, members: list[nn.Module], given: Mapping[str, str], seen: Mapping[str, Seen]
) -> list[tuple[str | None, str | None]]:
    """Return for each block what `_additive_pair` finds for the blocks of the same parts."""
    alike: dict[tuple[str, ...], list[int]] = {}  # hybrids have blocks of several kinds
    for index, block in enumerate(members):
        alike.setdefault(tuple(name for name, _ in block.named_children()), []).append(index)
    for part in given.keys() & {"attention", "mlp"}:
        if not any(_has(members[group[0]], given[part]) for group in alike.values()):
            _submodule(members[0], given[part])
    pairs: dict[int, tuple[str | None, str | None]] = {}
    for group in alike.values():
        names = [f"{blocks}.{index}" for index in group]
        pairs |= dict.fromkeys(group, _additive_pair(members[group[0]], names, given, seen))
    return [pairs[index] for index in range(len(members))]


def _additive_pair(
    block: nn.Module, alike: list[str], given: Mapping[str, str], seen: Mapping[str, Seen]
) -> tuple[str | None, str | None]:
    """Return the modules whose outputs attention and MLP add in `block` and the blocks like it.

    (None, None) if none fit.
    """
    norms = _norms(block)
    # Not GPT-NeoX's dropouts, which give the same numbers but hold nothing.
    others = [
        name
        for name, module in block.named_children()
        if name not in norms and next(module.parameters(), None) is not None
    ]
    attentions = [
        name for name in others if "attn" in name or "attention" in name or name in _MIXERS
    ]
    mlps = [name for name in others if name not in attentions]
    # The child itself; the norm after it (post-norm models); the projection inside it, for models
    # that add the residual inside the child (Bloom).
    options = {
        "attention": [*attentions, *norms, *_projections(block, attentions)],
        "mlp": [*mlps, *norms, *_projections(block, mlps)],
    }
    by_hand = [part for part in options if part in given and _has(block, given[part])]
    for part in by_hand:
        options[part] = [given[part]]
    for one, other in itertools.product(*options.values()):
        if one != other and all(_adds_up(name, (one, other), seen) for name in alike):
            return one, other
    if by_hand:
        first, second = map("|".join, options.values())
        raise LayoutError(f"resid_pre + {first} + {second} does not equal resid_post")
    return None, None


def _adds_up(block: str, pair: tuple[str, str], seen: Mapping[str, Seen]) -> bool:
    """Return whether the outputs of ``pair`` are what ``block`` added, at every position."""
    before, after = seen[block].input, seen[block].output
    if before is None or after is None:
        return False
    change = after.double() - before.double()
    rest = change.clone()
    for name in pair:
        output = seen.get(f"{block}.{name}", Seen()).output
        if output is None or output.numel() != change.numel():
            return False
        rest -= output.double().reshape(change.shape)
    # Measured against the change and not the stream, which in some layers is a thousand times
    # larger; the second term is the rounding of the stream itself in a half-precision model.
    rounding = torch.finfo(after.dtype).eps * (before.double().norm(dim=-1) + after.norm(dim=-1))
    return bool((rest.norm(dim=-1) <= 1e-3 * change.norm(dim=-1) + rounding).all())


def _block_lists(model: nn.Module, named: str | None) -> list[str]:
    """Return names of the lists that may be the decoder's blocks, outermost first."""
    if named is not None:
        blocks = model.get_submodule(named)
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            raise LayoutError(f"{named} is not a ModuleList or Sequential; {_BY_HAND}")
        return [named] if len(blocks) else []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise LayoutError(f"{type(model).__name__} is an encoder-decoder; a decoder is expected")
    config = text_config(model)
    # LongCat counts two attentions in each of its blocks as two hidden layers.
    counts = [getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")]
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        listed = isinstance(module, nn.ModuleList) and len(module) > 0 and len(module) in counts
        if listed and not inside:
            names.append(name)
    return names


def _projections(block: nn.Module, children: list[str]) -> list[str]:
    """Return names of the matrices inside ``children``, the last one first."""
    found: list[str] = []
    for child in children:
        inside: list[str] = []
        for name, module in block.get_submodule(child).named_modules(prefix=child):
            matrix = name != child and getattr(module, "weight", None) is not None
            # What an adapter wraps is only a part of what the matrix adds.
            if matrix and module.weight.dim() == 2 and not name.startswith(tuple(inside)):
                inside.append(f"{name}.")
        found += [name[:-1] for name in reversed(inside)]
    return found


def _second_stream(one: Seen, following: Seen) -> bool:
    """Whether two blocks pass on another tensor of the same shape, as a residual apart does."""
    assert one.output is not None
    shape = one.output.shape
    gave = [part for part in one.also_gave if isinstance(part, Tensor) and part.shape == shape]
    return any(part is other for part in gave for other in following.also_took)


def _norms(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in block.named_children() if _is_norm(module))


def _has(block: nn.Module, name: str) -> bool:
    return name in dict(block.named_modules())


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise LayoutError(f"{type(model).__name__} has no module {name!r}; {_BY_HAND}") from None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _found(model: nn.Module) -> str:
    """Return the class and the module lists of ``model``, for a message."""
    lists = [
        f"{name} ({len(module)} x {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    count = getattr(text_config(model), "num_hidden_layers", "unknown")
    shown = ", ".join(lists[:6]) or "none"
    return f"{type(model).__name__}: ModuleLists {shown}; config.num_hidden_layers {count}"
