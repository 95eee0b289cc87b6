"""The tasks of both papers."""
