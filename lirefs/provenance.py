"""Which model is this: a fingerprint of a bare module, computed once."""

from __future__ import annotations

import weakref

from torch import nn

from lirefs.models import _model_hash

_FIRST_SEEN: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def fingerprint_of(model: nn.Module) -> str:
    """SHA-256 of a model as it was when first asked for, as 64 hex digits.

    Unlike `LanguageModel.fingerprint` it is not computed again when weights change: an edit that
    comes and goes leaves the model the one that it was.

    Raises:
        ProvenanceError: A weight is offloaded and cannot be read.
    """
    if model not in _FIRST_SEEN:
        _FIRST_SEEN[model] = _model_hash(model)
    return _FIRST_SEEN[model]
