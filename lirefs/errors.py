"""Errors with a name: each message is one line that says what was wrong, where, what to do."""

from __future__ import annotations


class LirefsError(Exception):
    """Base of every error that this package raises on purpose."""


class ModelNotFoundError(LirefsError):
    """No built-in model, folder, GGUF file or hub id answers to the name."""


class ModelLoadError(LirefsError):
    """A model or tokenizer was found but could not be read."""


class LayoutError(LirefsError):
    """The parts of a model could not be found, or did not behave as their names promise."""


class QuestionsError(LirefsError):
    """A question set is malformed, empty or too small for what was asked."""


class DataFileError(LirefsError):
    """A data file is missing, empty or malformed."""


class DirectionsFileError(LirefsError):
    """A directions file is missing, damaged or of an unknown version."""


class ProvenanceError(LirefsError):
    """Something saved was made with another model, tokenizer or data than the one at hand."""


class InterventionError(LirefsError):
    """An intervention cannot be applied, composed or removed."""


class ScopeError(InterventionError):
    """A scope reaches past the end of its text, or nobody said where the prompt ends."""


class BakeError(InterventionError):
    """A steering cannot be written into the weights of this architecture."""


class DirectionError(LirefsError):
    """Directions of different places, widths or models were put together."""


class CaptureError(LirefsError):
    """Activations could not be captured."""


class NonFiniteError(LirefsError):
    """A hidden state, an activation, a gradient or a logit is NaN or infinite."""


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
        """The same with the id of the question that the prompt asks."""
        return NonFiniteStateError(self.prompt, self.found, f" (question {question!r})")


class TaskError(LirefsError):
    """A task or one of its items is malformed or cannot be scored."""


class WriteError(LirefsError, OSError):
    """A file could not be written: the disk is full, or the folder cannot be written to."""


class ResultsFileError(LirefsError):
    """Saved results are missing, damaged or of an unknown version."""


class DownloadError(LirefsError):
    """A file could not be fetched, or is not the file that was expected."""


class SettingError(LirefsError):
    """An argument has a value that cannot be used."""


class NoDataError(TaskError):
    """The data of a task is neither on the disk nor to be had from the hub."""


class BackendError(InterventionError):
    """A steering cannot be carried over to another runtime or file format."""


def first_line(problem: BaseException) -> str:
    """The first line of an error's message that is not blank, for a message of one line."""
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), "")


class KfacError(LirefsError):
    """Base of the errors that concern curvature and weight edits."""


class TargetError(KfacError):
    """A weight matrix that was asked for is missing, unsupported, or was never used."""


class BatchError(KfacError):
    """A batch, or the iterable of batches, cannot be used for collection."""


class FactorsFileError(KfacError):
    """A file is not a readable factors file: missing, truncated, foreign or from a newer format."""


class FactorsMismatchError(KfacError):
    """Factors do not belong to this model, or cannot be merged with other factors."""


class KeepError(KfacError, ValueError):
    """`keep` is not a number in (0, 1], or names targets that do not exist."""


class SpectrumError(KfacError, ValueError):
    """An array is not a valid matrix or spectrum: wrong shape, order, sign, or not finite."""


class EditError(KfacError):
    """A weight edit cannot be applied to this model."""


class EditOrderError(EditError):
    """Edits of the same weight must be removed in the reverse order of their attachment."""


class EstimatorError(KfacError):
    """An estimator of the curvature is unknown, or its sums were not collected."""


class CheckpointError(KfacError):
    """A checkpoint cannot be read, or belongs to other data, targets or settings."""


class BudgetError(KfacError):
    """The memory budget is too small for a single target."""


class DistributedError(KfacError):
    """The processes of one collection do not agree on their data or targets."""
