"""Worked calculations, read and evaluated."""
