"""The layering of DESIGN.md: which folder may import which, and that ``__init__`` files only hand names on."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "cmacc"

GROUND = {"clips", "encoders", "negatives", "objectives"}
MAY_IMPORT: dict[str, set[str]] = {
    **{room: set() for room in GROUND},
    "objectives": {"negatives"},  # for the queue of CrossCLR
    "pretraining": GROUND,
    "transfer": GROUND | {"pretraining"},
    "ablation": GROUND | {"pretraining", "transfer"},
    "standing": GROUND | {"pretraining", "transfer"},
    "heads": GROUND | {"pretraining", "transfer"},
    "search": GROUND | {"pretraining", "transfer"},
    "viewer": GROUND | {"pretraining", "transfer", "ablation", "search"},
    "app": GROUND | {"pretraining", "transfer", "search", "viewer"},
    "cli": GROUND | {"pretraining", "transfer", "heads", "ablation", "standing", "search", "viewer", "app"},
    "__init__": GROUND | {"pretraining", "transfer"},  # for the lazy `load`
    "__main__": {"cli"},
}

# Within `clips`: what stands beside the rooms (value types, windows, seeds, storage) is for all of them.
CLIPS_ROOMS: dict[str, set[str]] = {
    "media": set(),
    "catalog": {"media"},
    "packing": {"media", "catalog"},
    "loading": {"media", "catalog"},
    "synthetic": set(),
}

FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_from_the_layers_below(file: Path) -> None:
    room = _room(file)
    assert room in MAY_IMPORT, f"{file} stands in no folder of the design"
    above = _imported_rooms(file.read_text(), file) - {room} - MAY_IMPORT[room]
    assert not above, f"{file.relative_to(PACKAGE)}: {room} must not import {', '.join(sorted(above))}"


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.is_relative_to(PACKAGE / "clips")], ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_the_rooms_of_clips_import_in_the_order_of_the_flow(file: Path) -> None:
    inside = file.relative_to(PACKAGE / "clips").parts
    if inside == ("__init__.py",):
        return
    package = ["cmacc", *file.relative_to(PACKAGE).parts[:-1]]
    modules = _imported_modules(ast.parse(file.read_text()), package)
    rooms = {parts[2] for parts in (m.split(".") for m in modules) if parts[:2] == ["cmacc", "clips"] and parts[2:]}
    above = (rooms & CLIPS_ROOMS.keys()) - {inside[0]} - CLIPS_ROOMS.get(inside[0], set())
    assert not above, f"{file.relative_to(PACKAGE)} must not import from {', '.join(sorted(above))}"


@pytest.mark.parametrize("file", [f for f in FILES if f.name == "__init__.py"], ids=lambda file: file.parent.name)
def test_init_files_only_hand_names_on(file: Path) -> None:
    extra = _more_than_names(file.read_text(), allow_load=file.parent == PACKAGE)
    assert not extra, f"{file.relative_to(PACKAGE)}: {extra[0]}"
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_the_walk_found_the_package() -> None:
    assert {_room(file) for file in FILES} >= GROUND | {"pretraining", "__init__"}


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import cmacc.clips", {"clips"}),
        ("import torch, cmacc.viewer.report as r", {"viewer"}),
        ("from cmacc.pretraining.features import embed", {"pretraining"}),
        ("from cmacc import negatives", {"negatives"}),
        ("from cmacc import load", {"load"}),
        ("from ..clips import Clip", {"clips"}),
        ("from .. import clips", {"clips"}),
        ("from .pair import Encoder", {"encoders"}),
        ("def f():\n    from cmacc import cli", {"cli"}),
        ("import importlib\nimportlib.import_module('cmacc.viewer')", {"viewer"}),
        ("import cmacc", {"cmacc itself"}),
        ("import cmaccelerate\nfrom os import path\nprint('cmacc.clips')", set()),
    ],
)
def test_the_walk_sees_every_way_to_import(source: str, rooms: set[str]) -> None:
    assert _imported_rooms(source, PACKAGE / "encoders" / "audio.py") == rooms


@pytest.mark.parametrize(
    "source", ["x = 1", "def f(): ...", "def load(): ...", "print()", "if True:\n    import os", "__all__ += ['a']"]
)
def test_the_look_at_init_files_sees_more_than_names(source: str) -> None:
    assert _more_than_names(f'"""Doc."""\n{source}\n', allow_load=False)
    assert not _more_than_names('"""Doc."""\nfrom a import b\n__all__ = ["b"]\n', allow_load=False)


def test_the_dictionary_comes_without_the_rest_of_the_package() -> None:
    """A library user of the negatives alone waits for no video library."""
    code = "import sys; from cmacc.negatives import ActiveDictionary; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split())
    assert "cmacc.negatives.dictionary" in modules
    unwanted = {"av", "torchvision", *(f"cmacc.{room}" for room in MAY_IMPORT if room != "negatives")}
    assert not modules & unwanted


def _room(file: Path) -> str:
    """The folder below the package, or the file directly in it."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(source: str, file: Path) -> set[str]:
    """First name below ``cmacc`` of everything that the source imports, also inside functions."""
    rooms = set()
    for module in _imported_modules(ast.parse(source), ["cmacc", *file.relative_to(PACKAGE).parts[:-1]]):
        if module == "cmacc":
            rooms.add("cmacc itself")
        elif module.startswith("cmacc."):
            rooms.add(module.split(".")[1])
    return rooms


def _imported_modules(tree: ast.Module, package: list[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + ([node.module] if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def _more_than_names(source: str, allow_load: bool) -> list[str]:
    """Statements that are no docstring, import or ``__all__`` (or the lazy ``load`` and its types)."""
    return [
        f"line {node.lineno} is more than a docstring, imports and __all__"
        for i, node in enumerate(ast.parse(source).body)
        if not (
            (i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            or isinstance(node, ast.Import | ast.ImportFrom)
            or (isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"])
            or (allow_load and isinstance(node, ast.FunctionDef) and node.name == "load")
            or (allow_load and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        )
    ]
