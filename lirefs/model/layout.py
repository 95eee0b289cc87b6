"""Where the parts of a model are, and at which end of which module each site is read."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, SupportsIndex

from torch import nn

from lirefs.errors import LayoutError, SettingError

Side = Literal["input", "output"]
Site = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""In the order in which a block computes them."""


@dataclass(frozen=True)
class Layout:
    """Dotted module names of the parts of one decoder.

    Attributes:
        blocks: The list of decoder blocks, from the model.
        attention: The module, from a block, whose output is what attention adds to the residual
            stream; None if no module gives it.
        mlp: The same for the MLP.
        final_norm: The norm that reads the last block's output, from the model; None without one.
        unembedding: The output projection, from the model; None if there is none, or if something
            stands between it and the final norm (OPT with ``project_out``).
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
        """Return the decoder block of a layer, counted from 0.

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
            LayoutError: This model has no module that gives ``attn_out`` or ``mlp_out``.
        """
        if site not in SITES:
            raise SettingError(f"site must be one of {', '.join(SITES)}, got {site!r}")
        block = self.block(model, layer)
        if site in ("resid_pre", "resid_post"):
            return block, "input" if site == "resid_pre" else "output"
        name = self.attention if site == "attn_out" else self.mlp
        if name is None:
            raise LayoutError(
                f"{site} is not available on this model: no pair of modules was found for which "
                "resid_pre + attn_out + mlp_out equals resid_post; use resid_pre or resid_post"
            )
        return block.get_submodule(name), "output"

    def describe(self) -> str:
        """List the parts that were found, one on each line."""
        parts = {
            "blocks": f"{self.blocks} ({self.n_layers} layers, width {self.width})",
            "attention": self.attention or "not available",
            "mlp": self.mlp or "not available",
            "final norm": self.final_norm or "none",
            "unembedding": self.unembedding or "none",
            "norms": ", ".join(self.norms) or "none",
        }
        return "\n".join(f"{part}: {name}" for part, name in parts.items())


def layer_indices(layers: Iterable[SupportsIndex]) -> list[int]:
    """Return layers as plain integers, in the given order; raise SettingError for others."""
    try:
        return [operator.index(layer) for layer in layers]
    except TypeError:
        raise SettingError(f"layers must be a list of integers, got {layers!r:.60}") from None
