"""Every kind of file that the packages read: small valid contents, and how users read them."""

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
