"""Errors with a name: each message is one line that says what was wrong, where, what to do."""


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
