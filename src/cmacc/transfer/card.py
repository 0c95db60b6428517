"""The result card, ``card.json``: what was measured, of which encoder, on which data, with what."""

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cmacc.clips.storage import written_aside

_FORMAT = 1


class CardError(ValueError):
    """A card that cannot be read, or that would overwrite other results."""


@dataclass(frozen=True)
class Result:
    """One row: a metric of the trained encoders beside the same encoders untrained, and chance."""

    task: str
    protocol: str
    modality: str
    metric: str
    value: float
    untrained: float
    chance: float
    count: int


@dataclass(frozen=True)
class Provenance:
    """Where results come from."""

    encoder: str
    checkpoint_step: int
    data: str
    data_fingerprint: str
    seed: int
    windows_per_file: int
    versions: dict[str, str]
    hardware: dict[str, str]
    created: str

    @classmethod
    def now(
        cls,
        encoder: str,
        step: int,
        data: Path,
        fingerprint: str,
        seed: int,
        windows_per_file: int,
        device: torch.device,
    ) -> "Provenance":
        """Provenance of results that are being made."""
        return cls(
            encoder=encoder,
            checkpoint_step=step,
            data=str(data.absolute()),
            data_fingerprint=fingerprint,
            seed=seed,
            windows_per_file=windows_per_file,
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in ("cmacc", "torch", "av", "scikit-learn")},
            },
            hardware={
                "machine": platform.machine(),
                "cores": str(os.cpu_count()),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def same_subject(self, other: "Provenance") -> bool:
        """Whether both are about the same encoder after the same training, on the same data, in the same way."""
        names = ("encoder", "checkpoint_step", "data_fingerprint", "seed", "windows_per_file")
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclass(frozen=True)
class Card:
    """Results and where they come from."""

    results: tuple[Result, ...]
    provenance: Provenance

    @classmethod
    def read(cls, path: Path) -> "Card":
        """Read a card.

        Raises
        ------
        CardError
            The file is missing or not a card.
        """
        try:
            plain: dict[str, Any] = json.loads(path.read_text())
            if plain["format"] != _FORMAT:
                raise CardError(f"card {path}: format must be {_FORMAT}, got {plain['format']}")
            return cls(tuple(Result(**row) for row in plain["results"]), Provenance(**plain["provenance"]))
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise CardError(f"card {path}: cannot be read ({type(error).__name__}: {error})") from error

    def write(self, path: Path) -> None:
        """Write aside, then rename into place."""
        plain = {"format": _FORMAT, **dataclasses.asdict(self)}
        with written_aside(path) as aside:
            aside.write_text(json.dumps(plain, indent=2) + "\n")


def kept_results(path: Path, provenance: Provenance, tasks: Sequence[str], *, overwrite: bool) -> tuple[Result, ...]:
    """Results at ``path`` that stay beside new ones of ``tasks``: those of other tasks on the same subject.

    Raises
    ------
    CardError
        Without ``overwrite``: the card there is about something else, or holds results of one of ``tasks``.
    """
    if not path.exists():
        return ()
    older = Card.read(path)
    same = provenance.same_subject(older.provenance)
    if not overwrite:
        if not same:
            raise CardError(
                f"card {path}: holds results of {older.provenance.encoder} at step {older.provenance.checkpoint_step} "
                f"on {older.provenance.data}; choose another --out, or give --overwrite to lose them"
            )
        repeated = sorted(set(tasks) & {result.task for result in older.results})
        if repeated:
            raise CardError(
                f"card {path}: holds results of task {', '.join(repeated)} already; choose another --out, or give "
                "--overwrite to replace them"
            )
    return tuple(result for result in older.results if result.task not in tasks) if same else ()
