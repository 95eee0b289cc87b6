"""Curvature factors for the main job: cached or collected."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import kfac
import lirefs
from lirefs.errors import FactorsFileError, SettingError, WriteError
from lirefs.model.layout import missing_layer

_log = logging.getLogger(__name__)


def edited_layers(lm: lirefs.LanguageModel, wanted: Sequence[int] | None) -> list[int]:
    """The layers given, else three from two thirds of the depth on, as the paper's 23-25 of 32."""
    if wanted is None:
        start = round(lm.n_layers * 2 / 3)
        return list(range(start, min(start + 3, lm.n_layers)))
    if problem := missing_layer(wanted, lm.n_layers):
        raise SettingError(problem)
    return list(wanted)


def factors_of(
    lm: lirefs.LanguageModel,
    layers: Sequence[int],
    given: Path | None,
    cache: Path,
    seed: int,
    texts: Sequence[str],
    progress: bool = True,
) -> kfac.Factors:
    """Factors from the cache, or collected now and kept, there or in the file given."""
    targets = kfac.find_targets(lm.model, layers=layers)
    ids = lm.encode(texts)
    made_of = repr((lm.identity, ids, [one.name for one in targets], seed, lirefs.__version__))
    key = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    path = cache / "factors" / f"{key}.safetensors" if given is None else given
    if path.exists():
        try:
            return kfac.Factors.load(path, model=lm.model)
        except FactorsFileError:
            _log.warning("%s: damaged; collected again", path)
    provenance = {"data": hashlib.sha256(repr(ids).encode()).hexdigest(), "model": lm.fingerprint}
    collected = kfac.collect(
        lm, texts, targets, seed=seed, provenance=provenance, progress=progress
    )
    try:
        collected.save(path)
    except WriteError as error:
        if given is not None:
            raise
        _log.warning("%s; continuing, but they are collected again next time", error)
    return collected
