"""Curvature factors for the main job: cached or collected."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import kfac
import lirefs
from lirefs.errors import DistributedError, FactorsFileError, SettingError, WriteError
from lirefs.model.layout import missing_layer
from lirefs.model.processes.world import together

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
    opened: kfac.Factors | None = None,
) -> kfac.Factors:
    """Factors from the file given, from the cache, or collected now and kept.

    `opened` are those of the file, where it was read before the model was loaded. Of several
    processes all find the same, or all collect together.
    """
    with together("factors") as world:
        path = _in_cache(lm, layers, cache, seed, texts) if given is None else given
        found = opened
        try:
            if found is None and path.exists():
                found = kfac.Factors.load(path, model=lm.model)
        except FactorsFileError:
            if given is not None:
                raise
            _log.warning("%s: damaged; collected again", path)
        digests = world.gather(found.digest if found else "") if world.size > 1 else [""]
        if found is not None and len(set(digests)) == 1:
            return found
        if given is not None and any(digests):
            having = [rank for rank, digest in enumerate(digests) if digest]
            raise DistributedError(
                f"factors {given}: processes {having} have this file, and others have another or "
                "none; copy one to the disks of all"
            )
        ids = repr(lm.encode(texts))
        provenance = {"data": hashlib.sha256(ids.encode()).hexdigest(), "model": lm.fingerprint}
        collected = kfac.collect(
            lm, texts, layers=layers, seed=seed, provenance=provenance, progress=progress
        )
    try:
        collected.save(path)
    except WriteError as error:
        if given is not None:
            raise
        _log.warning("%s; continuing, but they are collected again next time", error)
    return collected


def _in_cache(
    lm: lirefs.LanguageModel, layers: Sequence[int], cache: Path, seed: int, texts: Sequence[str]
) -> Path:
    """Where the factors of a model, data and seed are kept."""
    names = [one.name for one in kfac.find_targets(lm.model, layers=layers)]
    made_of = repr((lm.identity, lm.encode(texts), names, seed, lirefs.__version__))
    return cache / "factors" / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors"
