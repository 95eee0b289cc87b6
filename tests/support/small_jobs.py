"""A main job that takes seconds: short texts, few tasks, and no drawing."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from PIL import Image

import lirefs
from lirefs.main_job import jobs
from lirefs.tasks import default_suite
from lirefs.tasks.papers import suite as papers

TEXTS = ["a text", "another text", "one more of them"]


def _empty_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    return file.getvalue()


EMPTY = {"png": _empty_png(), "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>'}
"""Pictures with nothing on them."""


def small_jobs(patch: pytest.MonkeyPatch) -> None:
    """Collect on short texts; keep one recitation, one short-answer and one perplexity task."""
    default_tasks = default_suite.default_tasks

    def few(*arguments, **options):
        first, second, *_, last = default_tasks(*arguments, **options)
        return [first, second, last]

    for module in (lirefs, papers):
        patch.setattr(module, "default_tasks", few)
    patch.setattr(jobs, "calibration_texts", lambda: TEXTS * 2)
    patch.setattr(jobs, "heldout_texts", lambda split: [(text, text) for text in TEXTS])


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Save figures as empty pictures, because drawing takes longer than a small job."""
    patch.setattr(Figure, "savefig", lambda self, file, format, **_: file.write(EMPTY[format]))
