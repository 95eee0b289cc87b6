"""The errors that this library raises on purpose.

Every message is one line: what was wrong, where, and what to do. `except LirefsError` catches them
all; so does `except KfacError` for curvature and weight edits. Indented classes are special cases:

    LirefsError
        SettingError, WriteError (also an OSError), DownloadError
        DataFileError, QuestionsError, DirectionsFileError, ResultsFileError, ProvenanceError
        ModelNotFoundError, ModelLoadError, LayoutError
        NonFiniteError, CaptureError
            NonFiniteStateError (both of these)
        DirectionError
        InterventionError
            ScopeError, BakeError, BackendError
        TaskError
            NoDataError
        KfacError
            TargetError, BatchError, BudgetError, CheckpointError, DistributedError
            FactorsFileError, FactorsMismatchError, EstimatorError
            KeepError and SpectrumError (also ValueErrors)
            EditError
                EditOrderError, ChangedWeightsError
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LirefsError(Exception):
    """Base of every error that this library raises on purpose."""


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
    """The processes of one collection do not agree on their data or targets."""


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
            "(training, load_state_dict, a merged adapter?); removing it would throw that away, so "
            "nothing was restored: save what you need, then call remove(discard=True) on the "
            "handle, which is also error.handle; to train an edited model, use edit.bake first"
        )
        self.handle = handle


def first_line_of_error(problem: BaseException) -> str:
    """The first line of an error's message that is not blank, to quote in a message."""
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "")
