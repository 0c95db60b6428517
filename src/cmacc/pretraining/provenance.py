"""Provenance of a result: the run, code, data, settings, versions and hardware that made it.

The same type is stored in run folders, checkpoints, cards, exports and ablation results. Readers compare the parts that
matter to them, and refuse a mismatch with a message that names both values.

A version number does not distinguish two states of a checkout, and a git commit does not include edits. Caches
therefore use `code_version`, a hash of the sources. An edited comment then costs a recomputation, but a missed edit of
code would cost a wrong result.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cmacc.clips.storage import written_aside
from cmacc.pretraining.reading import dataclass_of

PROVENANCE_FILE = "provenance.json"
_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = ("torch", "torchvision", "av", "numpy", "scikit-learn")
_GIT_SECONDS = 5.0


@dataclass(frozen=True)
class Provenance:
    """How a result was made.

    Attributes
    ----------
    run_id
        Id of the training run: twelve hex digits drawn when its folder was created. Empty if there is no run.
    versions
        Versions of Python, cmacc, torch, torchvision, av, NumPy and scikit-learn.
    code
        `code_version` of the whole package.
    commit
        Git commit of the checkout with the package, with ``+`` if files were edited; empty outside a checkout.
    data
        `Manifest.fingerprint` of the data that was trained on or measured; empty if it has no manifest.
    config
        `config_hash` of the settings; empty if there are none.
    hardware
        ``machine``, ``cores`` and ``device``.
    created
        Time in UTC, in ISO 8601.
    seed
        Seed of the run or the measurement.
    command
        The command line.
    """

    versions: dict[str, str]
    hardware: dict[str, str]
    created: str
    seed: int
    command: str
    run_id: str = ""
    code: str = ""
    commit: str = ""
    data: str = ""
    config: str = ""

    @classmethod
    def now(
        cls, device: torch.device, seed: int, *, run_id: str = "", data: str = "", config: str = ""
    ) -> "Provenance":
        """Provenance of a result of this process."""
        return cls(
            versions=library_versions(),
            hardware={
                "machine": platform.machine(),
                "cores": str(os.cpu_count()),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=seed,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            run_id=run_id,
            code=code_version(),
            commit=git_commit(),
            data=data,
            config=config,
        )

    def same_conditions(self, other: "Provenance") -> bool:
        """Whether results were made with the same seed, versions, code and hardware."""
        return (self.seed, self.versions, self.code, self.hardware) == (
            other.seed,
            other.versions,
            other.code,
            other.hardware,
        )

    def differences(self, other: "Provenance", names: tuple[str, ...]) -> list[str]:
        """Descriptions of the named fields that both know and that differ, with both values."""
        found = []
        for name in names:
            own, others = getattr(self, name), getattr(other, name)
            if own and others and own != others:
                found.append(f"{name} {_shown(own)}, not {_shown(others)}")
        return found


class ProvenanceError(ValueError):
    """A ``provenance.json`` that cannot be read, or does not match what it is compared with."""


def write_provenance(provenance: Provenance, folder: Path) -> None:
    """Write ``provenance.json`` to a run folder."""
    with written_aside(folder / PROVENANCE_FILE) as aside:
        aside.write_text(json.dumps(dataclasses.asdict(provenance), indent=2) + "\n", encoding="utf-8")


def read_provenance(folder: Path) -> Provenance | None:
    """Read ``provenance.json``; None if there is none, as in folders of cmacc 0.1.0.

    Raises
    ------
    ProvenanceError
        The file cannot be read.
    """
    path = folder / PROVENANCE_FILE
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return dataclass_of(Provenance, plain, "", with_defaults=True)
    except (OSError, ValueError) as error:
        raise ProvenanceError(f"provenance {path}: cannot be read ({error})") from error


def new_run_id() -> str:
    """Twelve random hex digits. They are independent of the run's seed."""
    return uuid.uuid4().hex[:12]


def library_versions() -> dict[str, str]:
    """Versions of Python, cmacc, and the installed libraries that affect results."""
    found = {"python": platform.python_version()}
    for name in ("cmacc", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_version(*folders: str) -> str:
    """Hash of the package's source files: twelve hex digits.

    Parameters
    ----------
    *folders
        Folders of the package that affect the result, such as ``negatives``. Default: all of it.

    Examples
    --------
    >>> code_version("negatives") == code_version("negatives"), len(code_version())
    (True, 12)
    """
    digest = hashlib.sha256()
    for root in [_PACKAGE / folder for folder in folders] or [_PACKAGE]:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def git_commit() -> str:
    """Git commit of the checkout with this package, with ``+`` if files were edited; empty outside a checkout."""
    top = _git("rev-parse", "--show-toplevel")
    # The environment may be inside the checkout of another project.
    if top is None or Path(top) / "src" / "cmacc" != _PACKAGE:
        return ""
    commit = _git("rev-parse", "HEAD") or ""
    return commit + ("+" if commit and _git("status", "--porcelain", "--untracked-files=no") else "")


def config_hash(config: Any) -> str:
    """Hash of settings as plain values (`to_plain`): twelve hex digits."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _shown(value: Any) -> str:
    return ", ".join(f"{name} {text}" for name, text in value.items()) if isinstance(value, dict) else str(value)
