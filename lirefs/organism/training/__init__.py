"""Training of a model organism."""
