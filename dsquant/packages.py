"""Other packages: their versions, and those that are imported only when they are needed, which may be hours later."""

import importlib
import warnings
from functools import cache
from importlib import metadata
from typing import Any

from dsquant.errors import PackageError

PACKAGES = ("dsquant", "torch", "transformers", "accelerate", "autoawq", "compressed-tensors")
UNKNOWN = "unknown"


@cache
def version(package: str) -> str:
    """A package's version as it was when this was first asked.

    Args:
        package: the distribution's name.

    Returns:
        The version; `unknown` where the package runs from a folder without metadata, or these are damaged.
    """
    try:
        return metadata.version(package) or UNKNOWN
    except (metadata.PackageNotFoundError, KeyError, OSError, ValueError):
        return UNKNOWN


def load(package: str, module: str, requirement: str = "") -> Any:
    """Imports a module of another package.

    Args:
        package: the distribution that has it.
        module: the module's full name.
        requirement: what to install where it is missing; by default the distribution.

    Returns:
        The module.

    Raises:
        PackageError: where it cannot be imported, or something that it imports cannot.
    """
    try:
        with warnings.catch_warnings(record=True):  # autoawq announces its end of life at import
            return importlib.import_module(module)
    except Exception as error:  # a package that does not suit another raises of every kind
        raise PackageError(
            f"the package {package} cannot be imported ({type(error).__name__}: {error}); install it with all that it "
            f"needs: pip install {requirement or package}"
        ) from error
