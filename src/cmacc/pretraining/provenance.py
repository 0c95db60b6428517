"""Where a result comes from: which run, code, data and settings made it, with which versions, on what.

One type goes into run folders, checkpoints, cards, exports and ablation results. Who reads one compares the parts that
matter to it and refuses a mismatch with a message that names both values.

The version number alone does not tell two states of a checkout apart, and a git commit does not see edits. So caches
ask for `code_version`, a hash of the sources: an edit of a comment there costs a second computation, a forgotten edit
of code would cost a wrong result.
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
    """With what, from what and when something was made.

    Attributes
    ----------
    run_id
        Of the training run: twelve hex digits drawn when its folder was made. Empty where there is no run.
    versions
        Of Python, cmacc, torch, torchvision, av, NumPy and scikit-learn.
    code
        `code_version` of the whole package.
    commit
        Git commit of the checkout that the package runs from, with ``+`` where files differ from it; empty elsewhere.
    data
        `Manifest.fingerprint` of what was trained on or measured; empty where that is no manifest.
    config
        `config_hash` of the settings; empty where there are none.
    hardware
        ``machine``, ``cores`` and ``device``.
    created
        UTC, in ISO 8601.
    seed
        Of the run or the measurement.
    command
        As it was typed.
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
        """Provenance of what is being made by this process."""
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
        """``name: this value, other value`` of the named fields that are known of both and differ."""
        found = []
        for name in names:
            own, others = getattr(self, name), getattr(other, name)
            if own and others and own != others:
                found.append(f"{name} {_shown(own)}, not {_shown(others)}")
        return found


class ProvenanceError(ValueError):
    """A ``provenance.json`` that cannot be read, or that says another thing than what it is compared with."""


def write_provenance(provenance: Provenance, folder: Path) -> None:
    """Write ``provenance.json`` into a run folder."""
    with written_aside(folder / PROVENANCE_FILE) as aside:
        aside.write_text(json.dumps(dataclasses.asdict(provenance), indent=2) + "\n", encoding="utf-8")


def read_provenance(folder: Path) -> Provenance | None:
    """What `write_provenance` wrote; None where there is none, as in folders of cmacc 0.1.0.

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
    """Twelve hex digits that no other run has; no part of a run's randomness."""
    return uuid.uuid4().hex[:12]


def library_versions() -> dict[str, str]:
    """Versions of Python, of cmacc and of the libraries that shape its numbers; of those that are installed."""
    found = {"python": platform.python_version()}
    for name in ("cmacc", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_version(*folders: str) -> str:
    """Twelve hex digits of the package's sources as they lie on disk.

    Parameters
    ----------
    *folders
        Folders of the package that shape the result, such as ``negatives``; all of it by default.

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
    """Commit of the checkout that holds this package, with ``+`` where its files were edited; empty elsewhere."""
    top = _git("rev-parse", "--show-toplevel")
    # An environment may lie within the checkout of another project.
    if top is None or Path(top) / "src" / "cmacc" != _PACKAGE:
        return ""
    commit = _git("rev-parse", "HEAD") or ""
    return commit + ("+" if commit and _git("status", "--porcelain", "--untracked-files=no") else "")


def config_hash(config: Any) -> str:
    """Twelve hex digits of settings as plain values (`to_plain`)."""
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
