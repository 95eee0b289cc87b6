"""Where the parts of a model are, and at which end of which module each site is read."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

from torch import nn

from lirefs.errors import LayoutError, SettingError
from lirefs.files import html_table

Side = Literal["input", "output"]
Site = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""In the order in which a block computes them."""


@dataclass(frozen=True)
class Layout:
    """Dotted module names of the parts of one decoder.

    Attributes:
        blocks: The list of decoder blocks, from the model.
        attention: For each block the module, from the block, whose output is what attention adds to
            the residual stream; None where no module gives it. In hybrids it is the state-space
            model, convolution or recurrence where that stands in place of attention.
        mlp: The same for the MLP.
        final_norm: The norm that reads the last block's output, from the model; None without one.
        unembedding: The output projection, from the model; None if there is none, or if something
            stands between it and the final norm (OPT with ``project_out``).
        n_layers: Number of blocks.
        width: Size of the residual stream.
        norms: For each block the norms inside it, from the block.
    """

    blocks: str
    attention: tuple[str | None, ...]
    mlp: tuple[str | None, ...]
    final_norm: str | None
    unembedding: str | None
    n_layers: int
    width: int
    norms: tuple[tuple[str, ...], ...]

    def __repr__(self) -> str:
        return f"Layout({self.blocks}, layers={self.n_layers}, width={self.width})"

    def _repr_html_(self) -> str:
        parts = (line.split(": ", 1) for line in self.describe().split("\n"))
        return html_table(repr(self), [{"part": part, "module": name} for part, name in parts])

    def owner(self, model: nn.Module) -> nn.Module:
        """Return the innermost module around the blocks whose forward pass takes token ids."""
        path = self.blocks
        while path := path.rpartition(".")[0]:
            owner = model.get_submodule(path)
            if "input_ids" in inspect.signature(owner.forward).parameters:
                return owner
        return model

    def block(self, model: nn.Module, layer: int) -> nn.Module:
        """Return the decoder block of a layer, counted from 0.

        Raises:
            SettingError: ``layer`` is not an integer from 0 to ``n_layers - 1``.
            LayoutError: The model has lost this block since.
        """
        try:
            index = operator.index(layer)
        except TypeError:
            raise SettingError(f"layer must be an integer, got {layer!r}") from None
        if problem := missing_layer([index], self.n_layers):
            raise SettingError(problem)
        name = f"{self.blocks}.{index}"
        try:
            return model.get_submodule(name)
        except AttributeError:
            raise LayoutError(
                f"the model has no module {name} any more: its blocks were changed after its "
                "layout was found; wrap the model again"
            ) from None

    def module(self, model: nn.Module, site: str, layer: int) -> tuple[nn.Module, Side]:
        """Return the module at which ``site`` of ``layer`` is read, and at which side of it.

        A module may flatten its output to ``(batch * tokens, width)``, as OPT's ``fc2`` does: read
        it with ``hidden_of(output, batch)``. A model may also change the tensor in place
        afterwards, as Falcon does: clone what you keep.

        Args:
            model: The model of this layout.
            site: `resid_pre`, `resid_post`, `attn_out` or `mlp_out`.
            layer: Index of the block, from 0.

        Raises:
            SettingError: The site or the layer does not exist.
            LayoutError: This block has no module that gives ``attn_out`` or ``mlp_out``.
        """
        site_must_exist(site)
        block = self.block(model, layer)
        if site in ("resid_pre", "resid_post"):
            return block, "input" if site == "resid_pre" else "output"
        names = self.attention if site == "attn_out" else self.mlp
        name = names[layer]
        if name is None:
            having = [str(index) for index, one in enumerate(names) if one is not None]
            raise LayoutError(
                f"{site} is not available at layer {layer} of this model: no pair of modules was "
                "found for which resid_pre + attn_out + mlp_out equals resid_post; use resid_pre "
                "or resid_post" + (f", or layers {', '.join(having)}" if having else "")
            )
        return block.get_submodule(name), "output"

    def describe(self) -> str:
        """List the parts that were found, one on each line."""
        parts = {
            "blocks": f"{self.blocks} ({self.n_layers} layers, width {self.width})",
            "attention": _by_layer([name or "not available" for name in self.attention]),
            "mlp": _by_layer([name or "not available" for name in self.mlp]),
            "final norm": self.final_norm or "none",
            "unembedding": self.unembedding or "none",
            "norms": _by_layer([", ".join(names) or "none" for names in self.norms]),
        }
        return "\n".join(f"{part}: {name}" for part, name in parts.items())


def _by_layer(names: Sequence[str]) -> str:
    """One name if all layers share it, else each with its layers."""
    if len(set(names)) == 1:
        return names[0]
    layers = {name: [str(at) for at, one in enumerate(names) if one == name] for name in names}
    return "; ".join(f"{name} (layers {', '.join(at)})" for name, at in layers.items())


def site_must_exist(site: str) -> None:
    """Raise SettingError unless this is one of `SITES`."""
    if site not in SITES:
        raise SettingError(f"site must be one of {', '.join(SITES)}, got {site!r}")


def missing_layer(layers: Iterable[int], n_layers: int) -> str | None:
    """Say which of these layers does not exist, for a message; None if all do."""
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    exist = f"the model has layers 0 to {n_layers - 1}"
    return f"layer {wrong[0]} does not exist: {exist}" if wrong else None


def layer_indices(layers: Iterable[SupportsIndex], what: str = "layers") -> list[int]:
    """Return layers as plain integers, in the given order; raise SettingError for others."""
    try:
        return [operator.index(layer) for layer in layers]
    except TypeError:
        raise SettingError(f"{what} must be a list of integers, got {layers!r:.60}") from None
