"""Curvature factors: what they hold, their files, their merging."""
