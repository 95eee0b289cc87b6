"""Checks of a model folder that come before code, memory or other files are spent on it."""
