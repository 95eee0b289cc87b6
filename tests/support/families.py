"""Tiny models of every decoder family of transformers, made in memory from configurations.

`families.toml` names the families. A configuration class gets the small value of every setting that
it has (`families_small.toml`), then what its model type needs, then what a variant asks for.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES,
)

import lirefs


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text("utf-8"))


_DATA, _SMALL = _read("families.toml"), _read("families_small.toml")
_SETTINGS: dict[str, dict[str, Any]] = _DATA["settings"]


@dataclass(frozen=True)
class Family:
    """One family, or a variant of one.

    Attributes:
        name: Its model type, with a suffix for a variant: ``mistral-window``.
        kind: One of `KINDS`.
        model_type: Its name in transformers.
        config: Makes its configuration.
    """

    name: str
    kind: str
    model_type: str
    config: Callable[[], Any]


def _tiny(config: Any, given: Mapping[str, Any], part: str = "text") -> Any:
    """Return a tiny configuration of class ``config`` with the given settings."""
    names = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in _SMALL[part].items() if name in names}
    settings |= {**_SETTINGS.get(config.model_type, {}), **given}
    settings = {name: None if value == "none" else value for name, value in settings.items()}
    for name, kind in config.sub_configs.items():
        inner = dict(settings.get(name, {}))
        inner_part = "images" if name.startswith(("vision", "vq", "audio")) else "text"
        if kind is AutoConfig or "model_type" in inner:
            default = {"images": "siglip_vision_model", "text": "llama"}[inner_part]
            kind = CONFIG_MAPPING[inner.pop("model_type", default)]
        settings[name] = _tiny(kind, inner, inner_part)
    return config(**settings)


def _family(name: str, kind: str) -> Family:
    own = dict(_SETTINGS.get(name, {}))
    model_type = own.pop("model_type", name)
    return Family(name, kind, model_type, lambda: _tiny(CONFIG_MAPPING[model_type], own))


def _families(names: list[str], kind: str) -> dict[str, Family]:
    found = [_family(name, kind) for name in names]
    # An older transformers knows fewer.
    return {family.name: family for family in found if family.model_type in CONFIG_MAPPING}


KINDS: tuple[str, ...] = tuple(_DATA["kinds"])
FAMILIES: dict[str, Family] = {
    name: family
    for kind, names in _DATA["kinds"].items()
    for name, family in _families(names, kind).items()
}
CORE: tuple[str, ...] = tuple(_DATA["core"])
"""Quick ones of every kind, for the ordinary tests."""
LEFT_OUT: dict[str, str] = _DATA["left-out"]
"""The other model types of the mapping for causal language models, and why."""
NOT_CAUSAL: dict[str, Family] = _families(_DATA["not-causal"], "not-causal")
"""Models called decoders whose logits depend on later tokens; ``build`` makes them too."""


def build(name: str, seed: int = 0) -> Any:
    """Return a new float32 model of a family with seeded weights, in evaluation mode.

    Weights are as large as those of ``tiny.build``. What a recurrent state forgets at each token
    stays small: otherwise nothing would be left of the first token after 20.
    """
    family = {**FAMILIES, **NOT_CAUSAL}[name]
    images = family.model_type in WITH_IMAGES and family.kind in ("vision-language", "not-causal")
    auto: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(family.config(), dtype=torch.float32)
        for path, parameter in model.named_parameters():
            if path.endswith("A_log"):
                torch.nn.init.uniform_(parameter, -4.0, -1.5)
            elif parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def family_lm(name: str) -> lirefs.LanguageModel:
    """Return ``build(name)`` with the tiny tokenizer."""
    return lirefs.wrap(build(name), tiny_tokenizer(), name=name)
