"""Modules that the fork server of `forked` imports once, for all processes that it starts."""

import sys

import kfac  # noqa: F401
import lirefs  # noqa: F401

OF_THE_PACKAGES = frozenset(sys.modules)
"""Names of the modules that `import lirefs, kfac` loads."""

import pytest  # noqa: E402, F401 (the main module of the tests, which each process imports)
import transformers.models.llama.modeling_llama  # noqa: E402, F401


def modules_of_the_packages(connection):
    """Send `OF_THE_PACKAGES`."""
    connection.send(OF_THE_PACKAGES)
