"""Steering carried over to other runtimes and file formats."""
