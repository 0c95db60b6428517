"""Whether the packages that an export needs are installed, asked before anything else of it is read."""

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from cmacc.pretraining.reading import UnfitError

# The file comes from anyone, and the message tells people what to install: so only these, and only a plain lower bound.
_PACKAGES = ("cmacc", "onnxruntime", "timm", "torchvision", "transformers")
_BOUND = re.compile(r">=[0-9]{1,6}(\.[0-9]{1,6}){0,3}")


def require_versions(requires: Mapping[str, str]) -> None:
    """Compare lower bounds such as ``{"transformers": ">=5"}`` with what is installed.

    Raises
    ------
    UnfitError
        A package is missing or too old, or the bounds are not of that form.
    """
    for name, bound in requires.items():
        if name not in _PACKAGES:
            raise UnfitError(f"requires must name only {', '.join(_PACKAGES)}, got {name!r:.60}")
        if not _BOUND.fullmatch(bound):
            raise UnfitError(f"requires.{name} must be like '>=1.2', got {bound!r:.60}")
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        if installed is None or Version(installed) < Version(bound.removeprefix(">=")):
            raise UnfitError(f"needs {name}{bound}, got {installed or 'none'}; pip install '{name}{bound}'")
