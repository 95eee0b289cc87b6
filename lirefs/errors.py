"""The errors that this library raises on purpose, and what an interrupt must not cut in two.

Every message is one line: what was wrong, where, and what to do. `except LirefsError` catches them
all; so does `except KfacError` for curvature and weight edits. Indented classes are special cases:

    LirefsError
        SettingError, WriteError (also an OSError), DownloadError
        DistributedError (also a KfacError)
        DataFileError, QuestionsError, DirectionsFileError, ResultsFileError, ProvenanceError
        ModelNotFoundError, ModelLoadError, LayoutError
        NonFiniteError, CaptureError
            NonFiniteStateError (both of these)
        DirectionError, MissingError (also a KeyError)
        InterventionError
            ScopeError, BakeError, BackendError
        TaskError
            NoDataError
        KfacError
            TargetError, BatchError, BudgetError, CheckpointError
            FactorsFileError, FactorsMismatchError, EstimatorError
            KeepError and SpectrumError (also ValueErrors)
            EditError
                EditOrderError, ChangedWeightsError
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Controls of terminals, marks of direction, halves of characters; not newlines and tabs."""


def visible(text: str) -> str:
    r"""A text of others to show: characters that would act on its reader are written out.

    They are written as JSON and Python have them.

    Examples:
        >>> from lirefs.errors import visible
        >>> print(visible("a\x1b[2J, \u202eb"))
        a\u001b[2J, \u202eb
    """
    return _UNSEEN.sub(lambda one: f"\\u{ord(one[0]):04x}", text)


class LirefsError(Exception):
    """Base of every error that this library raises on purpose."""

    def __str__(self) -> str:
        return visible(super().__str__())


class SettingError(LirefsError):
    """An argument has a value that cannot be used."""


class WriteError(LirefsError, OSError):
    """A file could not be written: the disk is full, or the folder is not writable."""


class DownloadError(LirefsError):
    """A file could not be fetched, or is not the expected one."""


class DataFileError(LirefsError):
    """A data file is missing, empty or malformed."""


class QuestionsError(LirefsError):
    """A question set is malformed, empty or too small for what was asked."""


class DirectionsFileError(LirefsError):
    """A directions file is missing, damaged or of an unknown version."""


class ResultsFileError(LirefsError):
    """Saved results are missing, damaged or of an unknown version."""


class ProvenanceError(LirefsError):
    """Something saved was made with another model, tokenizer or data than the one at hand."""


class ModelNotFoundError(LirefsError):
    """No built-in model, folder, GGUF file or hub id has this name."""


class ModelLoadError(LirefsError):
    """A model or tokenizer was found but could not be read."""


class LayoutError(LirefsError):
    """The parts of a model could not be found, or did not behave as their names promise."""


class NonFiniteError(LirefsError):
    """A hidden state, an activation, a gradient or a logit is NaN or infinite."""


class CaptureError(LirefsError):
    """Activations could not be captured."""


class NonFiniteStateError(CaptureError, NonFiniteError):
    """A captured hidden state is NaN or infinite.

    Attributes:
        prompt: Index of the prompt.
        found: What was found, and where in the model.
    """

    def __init__(self, prompt: int, found: str, name: str = "") -> None:
        super().__init__(
            f"activations are not finite: first at prompt {prompt}{name}, {found}; leave that "
            "prompt out, or load the model in a wider dtype (float16 ends at 65504)"
        )
        self.prompt = prompt
        self.found = found

    def named(self, question: str) -> NonFiniteStateError:
        """The same error with the id of the question in its message."""
        return NonFiniteStateError(self.prompt, self.found, f" (question {question!r})")


class DirectionError(LirefsError):
    """Directions of different places, widths or models were combined."""


class MissingError(LirefsError, KeyError):
    """Nothing is kept under this name, layer or site."""

    def __str__(self) -> str:
        return visible(Exception.__str__(self))  # that of KeyError puts the message in quotes


class InterventionError(LirefsError):
    """An intervention cannot be applied, composed or removed."""


class ScopeError(InterventionError):
    """A scope reaches past the end of its text, or the end of the prompt is unknown."""


class BakeError(InterventionError):
    """A steering cannot be written into the weights of this architecture."""


class BackendError(InterventionError):
    """A steering cannot be carried over to another runtime or file format."""


class TaskError(LirefsError):
    """A task or one of its items is malformed or cannot be scored."""


class NoDataError(TaskError):
    """The data of a task is neither on disk nor available from the hub."""


class KfacError(LirefsError):
    """Base of the errors that concern curvature and weight edits."""


class TargetError(KfacError):
    """A requested weight matrix is missing, unsupported, or was never used."""


class BatchError(KfacError):
    """A batch, or the iterable of batches, cannot be used for collection."""


class BudgetError(KfacError):
    """The memory budget is too small for a single target."""


class CheckpointError(KfacError):
    """A checkpoint cannot be read, or belongs to other data, targets or settings."""


class DistributedError(KfacError):
    """The processes of one call do not agree on what it is, or one of them has failed."""


class FactorsFileError(KfacError):
    """A file is not a readable factors file: missing, truncated, foreign or of a newer format."""


class FactorsMismatchError(KfacError):
    """Factors do not belong to this model, or cannot be merged with other factors."""


class EstimatorError(KfacError):
    """An estimator of the curvature is unknown, or its sums were not collected."""


class KeepError(KfacError, ValueError):
    """`keep` is not a number in (0, 1], or names targets that do not exist."""


class SpectrumError(KfacError, ValueError):
    """An array is not a valid matrix or spectrum: wrong shape, order, sign, or not finite."""


class EditError(KfacError):
    """A weight edit cannot be applied to this model."""


class EditOrderError(EditError):
    """Edits of the same weight must be removed in the reverse order of their attachment."""


class ChangedWeightsError(EditError):
    """Edited weights were changed while the edit was attached, so it was not removed.

    Attributes:
        handle: What `attach` returned; `handle.remove(discard=True)` restores the originals.
    """

    def __init__(self, names: Sequence[str], handle: Any) -> None:
        more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        super().__init__(
            f"the weights of {names[0]}{more} were changed while an edit of them was attached "
            "(training, load_state_dict, a merged adapter, a copied layer?); removing it would "
            "throw that away, so nothing was restored: save what you need, then call "
            "remove(discard=True) on the handle, which is also error.handle; to train an edited "
            "model, use edit.bake first"
        )
        self.handle = handle


_ADVICE = {
    ("LanguageModel", "str"): "load it first: lirefs.load({value!r})",
    ("LanguageModel", "Module"): "give the lm itself, which lirefs.wrap(model, tokenizer) makes",
    ("Module", "LanguageModel"): "give lm.model",
    ("Module", "str"): "load it first, and give lm.model: lm = lirefs.load({value!r})",
    ("Split", "str"): "give lirefs.load_questions({value!r})",
    ("Direction", "Probe"): "give probe.best",
    ("Direction", "Directions"): "give one of them: directions[layer]",
    ("Direction", "Tensor"): "give lirefs.Direction(vector, layer)",
    ("Direction", "str"): "read the file first: lirefs.Directions.load({value!r})",
    ("Intervention", "Direction"): 'give lirefs.Steer(direction, "add", 1.0)',
    ("Intervention", "Directions"): 'give lirefs.Steer(directions, "add", 1.0)',
    ("Intervention", "Probe"): 'give lirefs.Steer(probe.best, "add", 1.0)',
    ("Intervention", "Tensor"): 'give lirefs.Steer(lirefs.Direction(vector, layer), "add", 1.0)',
    ("Intervention", "Factors"): "give kfac.CurvatureEdit(factors, keep=0.8)",
    ("Intervention", "object"): (
        "it needs attach(model) -> handle with remove(), and describe() -> dict"
    ),
    ("Mapping", "Composable"): 'give it a name: {{"steered": steer}}',
    ("Mapping", "list"): 'give each a name: {{"steered": steer}}',
    ("Factors", "str"): "read the file first: kfac.Factors.load({value!r})",
    ("Factors", "Path"): "read the file first: kfac.Factors.load(path)",
    ("Comparison", "str"): "read it first: lirefs.load_comparison({value!r})",
    ("Comparison", "Path"): "read it first: lirefs.load_comparison(path)",
    ("Activations", "Tensor"): "give lirefs.Activations(values, places, positions)",
}
"""What to do instead, by what is needed and what was given."""


def got(value: object) -> str:
    """Words for an argument that was given, for messages."""
    if value is None or isinstance(value, str | int | float):
        return f"{value!r:.60}"
    return _with_article(type(value).__name__)


def must_be(
    value: object,
    kinds: type | tuple[type, ...],
    name: str,
    error: type[LirefsError] = SettingError,
) -> None:
    """Raise `error` unless an argument of this name is of one of these classes."""
    if isinstance(value, kinds):
        return
    wanted = [kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
    wanted = ["None" if one == "NoneType" else one for one in wanted]
    bases = [kind.__name__ for kind in type(value).__mro__]
    known = (_ADVICE.get((one, base)) for one in wanted for base in bases)
    advice = next(filter(None, known), "")
    message = f"{name} must be {_with_article(' or '.join(wanted))}, got {got(value)}"
    raise error(message + (f"; {advice.format(value=value)}" if advice else ""))


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEIOaeio' else 'a'} {kind}"


def as_list(
    values: Any,
    name: str,
    kinds: type | tuple[type, ...] | None = None,
    error: type[LirefsError] = SettingError,
) -> list[Any]:
    """The values of an argument that must be a list, each of one of these classes.

    One string, whose characters would be its values, and a mapping are refused by `error`.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        given = f"one string: use [{values!r:.40}]" if isinstance(values, str) else got(values)
        raise error(f"{name} must be a list, got {given}")
    try:
        found = list(values)
    except TypeError:  # a tensor without axes says that it can be iterated over
        raise error(f"{name} must be a list, got {got(values)}") from None
    if kinds is not None:
        for index, one in enumerate(found):
            must_be(one, kinds, f"{name}[{index}]", error)
    return found


def whole_number(
    value: Any, name: str, least: int | None = None, error: type[LirefsError] = SettingError
) -> int:
    """An argument that must be a whole number, of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} must be a whole number, got {got(value)}") from None
    if least is not None and number < least:
        raise error(f"{name} must be at least {least}, got {number}")
    return number


def checked_seed(seed: Any, error: type[LirefsError] = SettingError) -> int:
    """An argument that is a seed, of which every generator takes those from 0 to 2**63 - 1."""
    if isinstance(seed, bool):
        raise error(f"seed must be a whole number, got {seed}")
    number = whole_number(seed, "seed", error=error)
    if not 0 <= number < 2**63:
        raise error(f"seed must be from 0 to 2**63 - 1, got {number:.4g}")
    return number


def first_line_of_error(problem: BaseException) -> str:
    """The first line of an error's message that is not blank, to quote in a message."""
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
