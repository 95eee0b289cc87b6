"""Every error that the package raises on purpose, under one base class."""


class KfacError(Exception):
    """Base of all errors raised by `kfac`."""


class TargetError(KfacError):
    """A weight matrix that was asked for is missing, unsupported, or was never used."""


class BatchError(KfacError):
    """A batch, or the iterable of batches, cannot be used for collection."""


class NonFiniteError(KfacError):
    """An activation, a gradient or a logit was NaN or infinite while data was run."""


class FactorsFileError(KfacError):
    """A file is not a readable factors file: missing, truncated, foreign or from a newer format."""


class WriteError(KfacError, OSError):
    """A file could not be written: the disk is full, or the folder cannot be written to."""


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
