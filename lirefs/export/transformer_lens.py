"""Directions on TransformerLens: fit them from its caches, steer with its hooks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from lirefs.directions.capture import Activations, check_finite_states
from lirefs.errors import BackendError, CaptureError, first_line_of_error
from lirefs.export.operators import operators
from lirefs.model.intervention import refuse_steered
from lirefs.model.language_model import LanguageModel
from lirefs.steering.steer import Steer

__all__ = ["boot", "capture", "from_cache", "hook_name", "hooks"]

Hook = Callable[..., Tensor]


def boot(lm: LanguageModel) -> Any:
    """Boot a `TransformerBridge` on a copy of the model, whose modules the bridge rebuilds.

    Weights are neither folded nor centred, so a direction fitted on one runtime holds on the other.
    (`enable_compatibility_mode` would change that.)

    Args:
        lm: The model; TransformerLens must know its architecture.

    Raises:
        BackendError: TransformerLens cannot take the model, or a steering is attached, whose
            hooks the copy would keep.
    """
    refuse_steered(lm.model, BackendError, "booted")
    twin = copy.deepcopy(lm.model)
    twin.config.architectures = twin.config.architectures or [type(lm.model).__name__]
    # The bridge loads the tokenizer again, from the folder that it was last loaded from.
    with tempfile.TemporaryDirectory() as folder:
        lm.tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        try:
            bridge: Any = TransformerBridge.boot_transformers(
                lm.name, hf_model=twin, tokenizer=tokenizer, dtype=lm.model.dtype, device=lm.device
            )
        except Exception as problem:
            reason = f"{type(problem).__name__}: {first_line_of_error(problem)}"
            kind = type(lm.model).__name__
            raise BackendError(f"TransformerLens cannot take {kind}: {reason}") from problem
    return bridge.eval()


def hook_name(bridge: Any, layer: int, site: str) -> str:
    """The name of the hook point at which a site is read and changed, else BackendError."""
    # What a post-norm model adds to the stream comes out of the norm after the module.
    names = {
        "resid_pre": ["hook_in"],
        "resid_post": ["hook_out"],
        "attn_out": ["ln1_post.hook_out", "attn.hook_out"],
        "mlp_out": ["ln2_post.hook_out", "mlp.hook_out"],
    }
    for name in names.get(site, []):
        if (full := f"blocks.{layer}.{name}") in bridge.hook_dict:
            return full
    raise BackendError(f"TransformerLens has no hook point for {site} of layer {layer}")


def hooks(steer: Steer, bridge: Any, lm: LanguageModel) -> list[tuple[str, Hook]]:
    """The steering as hooks, for `bridge.hooks(fwd_hooks=...)` or `run_with_hooks`.

    Args:
        steer: Steering of every token (see `operators`).
        bridge: The bridge.
        lm: The model that the bridge was booted from.

    Raises:
        BackendError: The steering or a site cannot be carried over.
        InterventionError: The steering does not fit the model.
    """
    return [
        (hook_name(bridge, layer, site), lambda tensor, hook, operator=operator: operator(tensor))
        for layer, site, operator in operators(steer, lm)
    ]


def capture(
    bridge: Any,
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid_pre",
) -> Activations:
    """Activations of the last prompt token, read through the bridge, one prompt at a time.

    Args:
        bridge: The bridge.
        lm: The model that it was booted from; its tokenizer is used.
        prompts: Texts.
        layers: Layers to read; None for all.
        site: Where in the block.

    Raises:
        BackendError: No hook point for the site.
        CaptureError: No prompts, or a value is not finite.
    """
    if not prompts:
        raise CaptureError("no prompts to capture activations of")
    chosen = list(range(lm.n_layers)) if layers is None else list(layers)
    names = [hook_name(bridge, layer, site) for layer in chosen]
    rows = []
    with torch.no_grad():
        for ids in lm.encode(prompts):
            tokens = torch.tensor([ids], device=lm.device)
            _, cache = bridge.run_with_cache(tokens, names_filter=names)
            rows.append(from_cache(cache, bridge, layers=chosen, site=site).values)
    values, places = torch.cat(rows), tuple((layer, site) for layer in chosen)
    check_finite_states(values, places, (-1,), range(len(values)))
    return Activations(values, places, (-1,))


def from_cache(
    cache: Mapping[str, Tensor], bridge: Any, *, layers: Sequence[int], site: str = "resid_pre"
) -> Activations:
    """Activations of the last token from a cache of `run_with_cache`, for `lirefs.fit_directions`.

    Args:
        cache: Has the hook point of each layer, (rows, tokens, width), of rows that have one
            length or are padded on the left.
        bridge: The bridge.
        layers: Layers to take.
        site: Where in the block.

    Raises:
        BackendError: No hook point for the site.
        CaptureError: The cache lacks a hook point.
    """
    states = []
    for layer in layers:
        name = hook_name(bridge, layer, site)
        if name not in cache:
            raise CaptureError(f"the cache has no {name}; add it to names_filter")
        states.append(cache[name][:, -1].detach().float().cpu())
    values = torch.stack(states, dim=1)[:, :, None]
    return Activations(values, tuple((layer, site) for layer in layers), (-1,))
