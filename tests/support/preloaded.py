"""Modules that the fork server of `forked` imports once, for all processes that it starts."""

import sys
from types import ModuleType

import kfac
import lirefs


def load_all_names(package):
    """Load what the public names of a package, and of the wings among them, stand for."""
    for name in getattr(package, "__all__", ()):
        value = getattr(package, name)
        if isinstance(value, ModuleType):
            load_all_names(value)


load_all_names(lirefs)
load_all_names(kfac)
OF_THE_PACKAGES = frozenset(sys.modules)
"""Names of the modules that all public names of the packages load."""

import pytest  # noqa: E402, F401 (the main module of the tests, which each process imports)
import transformers.models.llama.modeling_llama  # noqa: E402, F401


def modules_of_the_packages(connection):
    """Send `OF_THE_PACKAGES`."""
    connection.send(OF_THE_PACKAGES)
