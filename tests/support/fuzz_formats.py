"""Every kind of file that the packages read: a small valid one, and what a user does with it."""

import fuzz_methods
import fuzz_models
import fuzz_runs
import fuzz_texts
from fuzzing import Format

FORMATS: dict[str, Format] = {
    **fuzz_methods.FORMATS,
    **fuzz_texts.FORMATS,
    **fuzz_runs.FORMATS,
    **fuzz_models.FORMATS,
}
