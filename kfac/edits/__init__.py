"""Weight edits and their controls."""
