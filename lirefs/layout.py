"""Where the parts of a model are: found by shape and name, believed only after a forward pass.

Names lie: ``post_attention_layernorm`` stands before the MLP in Llama and after the attention in
OLMo 2. So every candidate is checked on a short input against what the words promise, first of all
``resid_pre + attn_out + mlp_out == resid_post``.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from torch import Tensor, nn

from lirefs.errors import LayoutError, SettingError
from lirefs.guest import Seen, maybe_call, observe, text_config

Site = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
# In the order in which a block computes them.
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")

_PARTS = ("blocks", "attention", "mlp", "final_norm", "unembedding")
_BY_HAND = (
    "name the parts by hand: lirefs.wrap(model, tokenizer, layout={'blocks': 'model.layers', "
    "'attention': 'self_attn', 'mlp': 'mlp', 'final_norm': 'model.norm', 'unembedding': 'lm_head'})"
)
_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Layout:
    """Dotted module names of the parts of one decoder.

    Attributes:
        blocks: The list of decoder blocks, from the model.
        attention: The module, from a block, whose output is what attention adds to the residual
            stream; None where no module gives it.
        mlp: The same for the MLP.
        final_norm: The norm that reads the last block's output, from the model; None without one.
        unembedding: The output projection, from the model; None where there is none, or where
            something stands between it and the final norm (OPT with ``project_out``).
        n_layers: Number of blocks.
        width: Size of the residual stream.
        norms: The norms inside a block, from the block.
    """

    blocks: str
    attention: str | None
    mlp: str | None
    final_norm: str | None
    unembedding: str | None
    n_layers: int
    width: int
    norms: tuple[str, ...] = ()

    def block(self, model: nn.Module, layer: int) -> nn.Module:
        """Return decoder block ``layer``, counted from 0.

        Raises:
            SettingError: ``layer`` is not an integer from 0 to ``n_layers - 1``.
        """
        try:
            index = operator.index(layer)
        except TypeError:
            raise SettingError(f"layer must be an integer, got {layer!r}") from None
        if not 0 <= index < self.n_layers:
            raise SettingError(
                f"layer {index} does not exist: this model has layers 0 to {self.n_layers - 1}"
            )
        return model.get_submodule(f"{self.blocks}.{index}")

    def module(
        self, model: nn.Module, site: str, layer: int
    ) -> tuple[nn.Module, Literal["input", "output"]]:
        """Return the module at which ``site`` of ``layer`` is read, and at which end of it.

        A module may carry the positions flattened, ``(batch * tokens, width)``, as OPT's ``fc2``
        does: read with ``hidden_of(output, batch)``. A model may also change the tensor in place
        afterwards, as Falcon does: clone what is kept.

        Raises:
            SettingError: The site or the layer does not exist.
            LayoutError: This model has no module that gives ``attn_out`` or ``mlp_out``.
        """
        if site not in SITES:
            raise SettingError(f"site must be one of {', '.join(SITES)}, got {site!r}")
        block = self.block(model, layer)
        if site == "resid_pre":
            return block, "input"
        if site == "resid_post":
            return block, "output"
        name = self.attention if site == "attn_out" else self.mlp
        if name is None:
            raise LayoutError(
                f"{site} is not available on this model: no pair of modules was found for which "
                "resid_pre + attn_out + mlp_out equals resid_post; use resid_pre or resid_post"
            )
        return block.get_submodule(name), "output"

    def describe(self) -> str:
        """Return what was found, one part a line."""
        parts = {
            "blocks": f"{self.blocks} ({self.n_layers} layers, width {self.width})",
            "attention": self.attention or "not available",
            "mlp": self.mlp or "not available",
            "final norm": self.final_norm or "none",
            "unembedding": self.unembedding or "none",
            "norms": ", ".join(self.norms) or "none",
        }
        return "\n".join(f"{part}: {name}" for part, name in parts.items())


def indices(layers: Iterable[SupportsIndex]) -> list[int]:
    """Layers as plain integers, in the order given.

    Raises:
        SettingError: They are no collection of integers.
    """
    try:
        return [operator.index(layer) for layer in layers]
    except TypeError:
        raise SettingError(f"layers must be a list of integers, got {layers!r}") from None


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of ``model``, found and verified the first time it is asked for.

    Raises:
        LayoutError: As ``find_layout``.
    """
    known = _LAYOUTS.get(model)
    return find_layout(model) if known is None else known


def find_layout(model: nn.Module, overrides: Mapping[str, str] | None = None) -> Layout:
    """Find the parts of a decoder and verify them with one forward pass on a few tokens.

    The model's hooks, training flags and random state are left as they were.

    Args:
        model: A decoder of ``transformers``, or any module called with ``input_ids``.
        overrides: Names of parts found by hand: ``blocks``, ``attention``, ``mlp``,
            ``final_norm``, ``unembedding``. ``attention`` and ``mlp`` count from a block.

    Returns:
        The layout, also remembered for ``layout_of``.

    Raises:
        SettingError: ``overrides`` has an unknown part.
        LayoutError: The parts were not found, or a part named by hand failed its check.
    """
    given = dict(overrides or {})
    for part in given:
        if part not in _PARTS:
            raise SettingError(f"unknown part {part!r} in layout: use {', '.join(_PARTS)}")
    candidates = _block_lists(model, given.get("blocks"))
    if not candidates:
        raise LayoutError(f"no list of decoder blocks found in {_found(model)}; {_BY_HAND}")
    norms = _norms_outside(model, candidates, given.get("final_norm"))
    head = _unembedding_name(model, given.get("unembedding"))
    watched = {name: _get(model, name) for name in [*norms, *([head] if head else [])]}
    for blocks in candidates:
        for index, block in enumerate(_children(model, blocks)):
            watched[f"{blocks}.{index}"] = block
            watched |= {
                f"{blocks}.{index}.{name}": module for name, module in block.named_modules() if name
            }
    seen = observe(model, watched)
    problems = []
    for blocks in candidates:
        try:
            layout = _verified(model, blocks, norms, head, given, seen)
        except LayoutError as problem:
            problems.append(str(problem))
            continue
        _LAYOUTS[model] = layout
        return layout
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
    n_layers = len(_children(model, blocks))
    chain = [seen[f"{blocks}.{index}"] for index in range(n_layers)]
    for index, one in enumerate(chain):
        if one.input is None or one.output is None or one.output.dim() != 3:
            raise LayoutError(f"{blocks}.{index} did not carry hidden states (batch, tokens, d)")
        if index and not _same(chain[index - 1].output, one.input):
            raise LayoutError(f"the output of {blocks}.{index - 1} is not the input of the next")
    last = chain[-1].output
    assert last is not None  # checked above; tells the type checker

    fitting = [name for name in norms if _same(seen[name].input, last)]
    if not fitting and "final_norm" in given:
        raise LayoutError(f"{given['final_norm']} does not read the output of the last block")
    # Where several norms read it (multi-token heads), the one before the unembedding is meant.
    fitting.sort(key=lambda name: head is None or not _same(seen[name].output, seen[head].input))
    final_norm = fitting[0] if fitting else None
    end = seen[final_norm].output if final_norm else last
    if head is not None and not _same(end, seen[head].input):
        if "unembedding" in given:
            raise LayoutError(
                f"{head} does not read the output of {final_norm or 'the last block'}"
            )
        head = None

    attention, mlp = _additive_pair(model, blocks, given, seen)
    block = _children(model, blocks)[0]
    return Layout(
        blocks=blocks,
        attention=attention,
        mlp=mlp,
        final_norm=final_norm,
        unembedding=head,
        n_layers=n_layers,
        width=last.shape[-1],
        norms=tuple(name for name, module in block.named_children() if _is_norm(module)),
    )


def _additive_pair(
    model: nn.Module, blocks: str, given: Mapping[str, str], seen: Mapping[str, Seen]
) -> tuple[str | None, str | None]:
    """Return the modules whose outputs attention and MLP add, or (None, None) if none fit."""
    members = _children(model, blocks)
    block = members[0]
    children = dict(block.named_children())
    norms = [name for name, module in children.items() if _is_norm(module)]
    # Not GPT-NeoX's dropouts, which give the same numbers but hold nothing.
    others = [
        name
        for name, module in children.items()
        if name not in norms and next(module.parameters(), None) is not None
    ]
    attentions = [name for name in others if "attn" in name or "attention" in name]
    mlps = [name for name in others if name not in attentions]
    # The child itself; the norm after it (post-norm models); the projection inside it, for models
    # that add the residual inside the child (Bloom).
    first = [*attentions, *norms, *_projections(block, attentions)]
    second = [*mlps, *norms, *_projections(block, mlps)]
    if "attention" in given:
        first = [given["attention"]]
    if "mlp" in given:
        second = [given["mlp"]]
    for name in {"attention", "mlp"} & set(given):
        _get(block, given[name])
    ends = (0, len(members) - 1)
    for pair in itertools.product(first, second):
        if pair[0] != pair[1] and all(_adds_up(f"{blocks}.{i}", pair, seen) for i in ends):
            return pair
    if "attention" in given or "mlp" in given:
        raise LayoutError(
            f"resid_pre + {'|'.join(first)} + {'|'.join(second)} does not equal resid_post"
        )
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
        if not isinstance(_get(model, named), nn.ModuleList | nn.Sequential):
            raise LayoutError(f"{named} is not a ModuleList or Sequential; {_BY_HAND}")
        return [named] if _children(model, named) else []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise LayoutError(f"{type(model).__name__} is an encoder-decoder; a decoder is expected")
    count = getattr(text_config(model), "num_hidden_layers", None)
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        fits = isinstance(module, nn.ModuleList) and len(module) == count and not inside
        if fits and len({type(member) for member in module.children()}) == 1:
            names.append(name)
    return names


def _norms_outside(model: nn.Module, lists: list[str], named: str | None) -> list[str]:
    """Return names of the norms that are in none of the block lists."""
    if named is not None:
        _get(model, named)
        return [named]
    return [
        name
        for name, module in model.named_modules()
        if _is_norm(module) and not any(name.startswith(f"{blocks}.") for blocks in lists)
    ]


def _unembedding_name(model: nn.Module, named: str | None) -> str | None:
    """Return the name of the output projection, or None if the model has none."""
    if named is not None:
        _get(model, named)
        return named
    head = maybe_call(model, "get_output_embeddings")
    return next((name for name, module in model.named_modules() if module is head), None)


def _projections(block: nn.Module, children: list[str]) -> list[str]:
    """Return names of the matrices inside ``children``, the last one first."""
    return [
        f"{child}.{name}"
        for child in children
        for name, module in reversed(list(block.get_submodule(child).named_modules()))
        if name and getattr(module, "weight", None) is not None and module.weight.dim() == 2
    ]


def _children(model: nn.Module, blocks: str) -> list[nn.Module]:
    return list(model.get_submodule(blocks).children())


def _get(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise LayoutError(f"{type(model).__name__} has no module {name!r}; {_BY_HAND}") from None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two recorded tensors are the same numbers."""
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
