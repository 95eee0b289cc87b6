"""The version of the distribution, as it stands in everything that is saved."""

__version__ = "0.1.0"
