"""Names of `lirefs` that are public in `kfac` as well."""

from lirefs.errors import KfacError
from lirefs.model.weight_swap import EditHandle
from lirefs.statistics.intervals import Estimate, auroc

__all__ = ["EditHandle", "Estimate", "KfacError", "auroc"]
