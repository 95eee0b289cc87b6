"""What runs of tasks can be set to: the command line shows it without loading torch."""

from __future__ import annotations

from enum import StrEnum

BATCH_TOKENS = 4096
"""Tokens of a batch, padding included."""
QUICK = 14
"""Items of a task in a quick trial."""


class Suite(StrEnum):
    """What to measure besides the recited passages and the perplexity of the default tasks."""

    MEMORIZATION = "memorization"
    """Recited passages, windows and quotes; the position stress test; perplexity and nDCG@10."""
    SKILLS = "skills"
    """The K-FAC paper's tasks in their groups, and the datasets of the LiReF paper."""
    PAPERS = "papers"
    """Both, and the default tasks."""
