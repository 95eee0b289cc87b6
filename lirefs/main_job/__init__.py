"""The main job: both methods and their controls on one model, in one call."""

from lirefs.main_job.jobs import run

__all__ = ["run"]
