"""Tiny models of every decoder family of transformers, made in memory from configurations.

`families.toml` lists the families; a configuration class gets the small value of each setting that
it has, from the table ``small`` there, then the settings of the family.
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

import lirefs

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_SMALL, _SMALL_IMAGES = _DATA["small"], _DATA["small-images"]
KINDS: tuple[str, ...] = tuple(_DATA["family"])


@dataclass(frozen=True)
class Family:
    """One family, or a variant of one.

    Attributes:
        name: Its ``model_type``, with a suffix for a variant: ``mistral-window``.
        kind: One of `KINDS`.
        model_type: Its name in transformers.
        config: Makes its configuration.
    """

    name: str
    kind: str
    model_type: str
    config: Callable[[], Any]


def _tiny(config: Any, given: Mapping[str, Any], small: Mapping[str, Any]) -> Any:
    """Return a configuration of class ``config``: small values, and the given ones."""
    names = {field.name for field in dataclasses.fields(config)}
    settings = {name: value for name, value in small.items() if name in names}
    settings |= {name: None if value == "none" else value for name, value in given.items()}
    for part, kind in config.sub_configs.items():
        inner = dict(given.get(part, {}))
        if kind is AutoConfig or "model_type" in inner:
            images = part.startswith(("vision", "vq"))
            default = "siglip_vision_model" if images else "llama"
            kind = CONFIG_MAPPING[inner.pop("model_type", default)]
        is_text = part in ("text_config", "decoder")
        settings[part] = _tiny(kind, inner, _SMALL if is_text else _SMALL_IMAGES)
    return config(**settings)


def _family(name: str, kind: str, settings: Mapping[str, Any]) -> Family:
    own = dict(settings)
    model_type = own.pop("model_type", name)
    return Family(name, kind, model_type, lambda: _tiny(CONFIG_MAPPING[model_type], own, _SMALL))


FAMILIES: dict[str, Family] = {
    name: _family(name, kind, settings)
    for kind, members in _DATA["family"].items()
    for name, settings in members.items()
    if settings.get("model_type", name) in CONFIG_MAPPING  # an older transformers knows fewer
}
CORE: tuple[str, ...] = tuple(_DATA["core"])
"""Quick ones, of every kind, for the ordinary tests."""
LEFT_OUT: dict[str, str] = _DATA["left-out"]
"""The other names of the causal-language-model mapping of transformers, and why."""


def build(name: str, seed: int = 0) -> Any:
    """Return a new float32 model of a family with seeded weights, in evaluation mode.

    Weights are as large as those of ``tiny.build``, but what a recurrent state forgets at each
    token stays small: otherwise nothing would be left of the first token after 20.
    """
    family = FAMILIES[name]
    images = family.kind == "vision-language"
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


