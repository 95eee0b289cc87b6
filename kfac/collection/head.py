"""The output layer of a language model, a few positions at a time: all logits may not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfac.collection.batches import counted_positions, language_model_forward
from kfac.collection.finite import first_not_finite_row, not_finite_row_error
from kfac.collection.sampling import label_gradients
from kfac.target import Target
from lirefs.model.guest import maybe_call
from lirefs.model.interrupts import undone
from lirefs.model.traits import PROBING

# Logits computed at a time: at least 256 rows of the largest vocabularies, because each product
# reads the whole matrix; 256 MB in float32.
_LOGITS = {"cpu": 2**26, "cuda": 2**28}


class Head:
    """A bias-free or biased `nn.Linear` over the final hidden states, and what follows it.

    What follows is a scaling or soft capping by the configuration's fields. `agrees` compares both
    with the model's own logits; where it is false, or `find` returns None, the model computes them.
    With a `dtype`, the products with the matrix are computed in it.
    """

    def __init__(self, linear: nn.Linear, config: Any, dtype: torch.dtype | None) -> None:
        self.linear, self._chosen = linear, dtype is not None
        self._weight = linear.weight.detach().to(dtype or linear.weight.dtype)
        self._scale = getattr(config, "logit_scale", None)  # Cohere
        self._divisor = getattr(config, "logits_scaling", None)  # Granite
        self._cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    @classmethod
    def find(
        cls,
        model: nn.Module,
        targets: Sequence[Target],
        dtype: torch.dtype | None = None,
        *,
        planned: bool = False,
    ) -> Head | None:
        """Return the head of a model; None if it is not a plain matrix, or if it is a target.

        One without data will do if a collection is only `planned`.
        """
        linear = maybe_call(model, "get_output_embeddings")
        if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
            return None
        watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
        if watched or any(one.module is linear for one in targets):
            return None
        if linear.weight.is_meta and not planned:
            return None
        config = getattr(model, "config", None)
        return cls(linear, getattr(config, "get_text_config", lambda: config)(), dtype)

    def is_needed(self, batch: Mapping[str, Any]) -> bool:
        """Whether a dtype was chosen, or the logits are more than are computed at a time."""
        return (
            self._chosen
            or int(batch["input_ids"].numel()) * self.linear.out_features > self._at_once
        )

    def agrees(self, model: nn.Module, batch: Mapping[str, Any]) -> bool:
        """Whether a few tokens of a batch get the logits that the model gives them."""
        few = {"input_ids": batch["input_ids"][:1, :8]}
        probing = PROBING.set(True)  # the hooks on targets let this pass
        try:
            with torch.no_grad():
                expected, _ = language_model_forward(model, few)
                hidden = self.hidden_states(model, few)[0]
                if hidden is None or hidden.shape[:2] != few["input_ids"].shape:
                    return False
                found = self._after(self._logits(hidden))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the model does more with logits than was expected
        finally:
            PROBING.reset(probing)
        if found.shape != expected.shape:
            return False
        # A wrong scale or cap is off by percents; the model may continue in a wider type.
        coarser = max(torch.finfo(one.dtype).eps for one in (self._weight, hidden))
        tolerance = 4 * coarser
        error = (found - expected).abs().amax()
        return bool(error <= tolerance * expected.abs().amax().clamp(min=1e-30))

    def hidden_states(
        self, model: nn.Module, batch: Mapping[str, Any]
    ) -> tuple[Tensor | None, Tensor]:
        """Return the head's input (B, T, width), and the mask of counted positions (B, T)."""
        seen: list[Tensor] = []
        with self.watching(seen):
            language_model_forward(model, batch)
        return (seen[0] if len(seen) == 1 else None), counted_positions(batch)

    def gradients(
        self, hidden: Tensor, labelled: Tensor, uniforms: Tensor | None, labels: Tensor | None,
        place: str,
    ) -> list[Tensor]:  # fmt: skip
        """Return the gradient with respect to hidden states (B, T, width), for each draw of labels.

        Arguments are as for `label_gradients`; `labelled` is the bool mask (B, T) of its rows.

        Raises:
            NonFiniteError: A counted row of logits holds NaN or infinity.
        """
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        rows = labelled.flatten().nonzero()[:, 0].to(flat.device)
        draws = 1 if uniforms is None else len(uniforms)
        result = [torch.zeros_like(flat) for _ in range(draws)]
        step = min(len(rows), max(1, self._at_once // self.linear.out_features))
        # One table for all: on a CPU, fresh pages cost a sixth of the product that fills them.
        table = self._weight.new_empty(step, self.linear.out_features)
        for start in range(0, len(rows), max(1, step)):
            part = slice(start, start + step)
            drawn = None if uniforms is None else uniforms[:, part]
            given = None if labels is None else labels[part]
            found = self._pulled_back(flat[rows[part]], drawn, given, table)
            if isinstance(found, int):
                position = int(rows[start + found])
                raise not_finite_row_error(place, position, labelled.shape, "the logits hold")
            for whole, gradient in zip(result, found, strict=True):
                whole[rows[part]] = gradient
        return [one.reshape(hidden.shape) for one in result]

    def _pulled_back(
        self, hidden: Tensor, uniforms: Tensor | None, labels: Tensor | None, table: Tensor
    ) -> list[Tensor] | int:
        """Return the gradients with respect to a few hidden states (n, width), for each draw.

        Or the first row whose logits are not finite. The logits are written to the `table`.
        """
        raw = self._logits(hidden, table[: len(hidden)]).requires_grad_()
        with torch.enable_grad():
            after = self._after(raw)
        plain = after is raw
        every = torch.arange(len(hidden), device=hidden.device)
        found = label_gradients(after.detach(), every, uniforms, labels, in_place=plain)
        if found is None:
            shown = after.detach()  # where it was overwritten, a softmax: all of a bad row is NaN
            return first_not_finite_row(shown[:, :1] if plain else shown.amax(-1, keepdim=True))
        result = []
        for gradient in found:
            if not plain:
                (gradient,) = torch.autograd.grad(after, raw, gradient, retain_graph=True)
            result.append((gradient @ self._weight).to(hidden.dtype))
        return result

    def bytes_at_once(self, positions: int) -> int:
        """Return the bytes of the logits that are computed at a time, and of what follows them."""
        rows = min(positions, max(1, self._at_once // self.linear.out_features))
        wide = (self._scale, self._divisor, self._cap) != (None, None, None)
        tables = 6 if wide else 1
        return tables * rows * self.linear.out_features * self.linear.weight.element_size()

    @property
    def _at_once(self) -> int:
        return _LOGITS.get(self.linear.weight.device.type, _LOGITS["cpu"])

    def _logits(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        hidden = hidden.to(self._weight.dtype)
        with torch.no_grad():
            logits = torch.mm(hidden.flatten(0, -2), self._weight.T, out=table)
            if self.linear.bias is not None:
                logits += self.linear.bias.to(logits.dtype)
        return logits.reshape(*hidden.shape[:-1], -1)

    def _after(self, logits: Tensor) -> Tensor:
        if self._scale is not None:
            logits = logits * self._scale
        if self._divisor is not None:
            logits = logits / self._divisor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @contextmanager
    def watching(self, seen: list[Tensor]) -> Iterator[None]:
        """Keep what the head is given; it returns one column, so that the model can go on."""

        def forward(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden.detach()[..., :1]

        with undone() as steps:
            steps.append(lambda: self.linear.__dict__.pop("forward", None))
            self.linear.forward = forward  # type: ignore[method-assign, assignment]
            yield
