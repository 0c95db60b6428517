"""Stand-ins for libraries that a GPU machine may lack, so that cmacc can be imported there.

Such a machine has torch, but not always what reads files (PyAV, PyArrow...). A benchmark whose clips are in memory
already never calls them; it only imports modules that import them.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class _StandIns(MetaPathFinder, Loader):
    """Makes a mock of every missing package and of all that is asked for below it."""

    def __init__(self, missing: set[str]) -> None:
        self._missing = missing

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._missing:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        module.__path__ = []  # else `import av.container` says that av is no package
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: a mock has every name."""


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # A class where there should be one: scikit-learn asks isinstance(x, pyarrow.Table) of whatever it is given.
        mocked = type(name, (), {}) if name[0].isupper() else MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, mocked)
        return mocked


def stand_in_for_missing(*names: str) -> set[str]:
    """Put mocks in the place of those packages that are not installed, and say which they are."""
    missing = {name for name in names if name not in sys.modules and find_spec(name) is None}
    if missing:
        sys.meta_path.insert(0, _StandIns(missing))
    return missing
