from .jobs import run

__all__ = ["run"]
