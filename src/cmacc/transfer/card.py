"""The result card, ``card.json``: what was measured, of which encoder, on which data, by which protocol, with what."""

import dataclasses
import json
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cmacc.clips.storage import written_aside

_FORMAT = 2


class CardError(ValueError):
    """A card that cannot be read or compared, or that would overwrite other results."""


@dataclass(frozen=True)
class Result:
    """One row: a metric of an encoder beside the same encoder untrained, and chance.

    Attributes
    ----------
    task, protocol, modality, metric
        What was measured; ``protocol`` is the recipe's name, ``version`` its version.
    value
        Mean over the splits (folds).
    untrained
        The same of the untrained encoder; None where it was not measured or there is no such thing.
    chance
        What guessing would give.
    count
        Held-out items, of all splits together.
    version
        Of the protocol: results of different versions are not comparable.
    windows, crops
        Windows of a file and crops of each window that were averaged.
    low, high
        95 % confidence interval of ``value``: bootstrap over items, or over groups of items where those are known.
    by_split
        Value of every split, by its name.
    settings
        What departs from the recipe, as ``name=value``; empty where it was followed.
    seconds
        Time that the measurement took, without decoding and embedding where features were frozen.
    """

    task: str
    protocol: str
    modality: str
    metric: str
    value: float
    untrained: float | None
    chance: float
    count: int
    version: int
    windows: int
    crops: int
    low: float
    high: float
    by_split: dict[str, float]
    settings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def spread(self) -> float:
        """Standard deviation over the splits; 0 for one split."""
        values = list(self.by_split.values())
        if len(values) < 2:
            return 0.0
        mean = sum(values) / len(values)
        return float((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5)


@dataclass(frozen=True)
class DataFacts:
    """The data of one task: which, and how much of it was there.

    Attributes
    ----------
    path
        Folder or manifest.
    fingerprint
        Changes with the content, label or split of any file used (`Manifest.fingerprint`).
    files, files_listed
        Files used, and files that the official list holds (the same where there is none).
    classes, classes_listed
        Of them.
    """

    path: str
    fingerprint: str
    files: int
    files_listed: int
    classes: int
    classes_listed: int

    @property
    def is_partial(self) -> bool:
        """Whether anything of the official data set is missing."""
        return self.files < self.files_listed or self.classes < self.classes_listed


@dataclass(frozen=True)
class EncoderFacts:
    """What was measured.

    Attributes
    ----------
    name
        As it was asked for: a path, ``random``, ``statistics``, ``torchvision:...``.
    kind
        Of encoder, in words: backbones and, for a run, how it was trained.
    weights
        Hash of all weights and settings, sixteen hex digits.
    checkpoint_step
        Training steps, 0 where that says nothing.
    seed
        Of the weights.
    clip
        Size of its clips: the fields of `ClipSpec`.
    pretraining_data
        Fingerprint of the manifest it was trained on, None where unknown.
    """

    name: str
    kind: str
    weights: str
    checkpoint_step: int
    seed: int
    clip: dict[str, Any]
    pretraining_data: str | None = None


@dataclass(frozen=True)
class Provenance:
    """With what and when results were made."""

    versions: dict[str, str]
    hardware: dict[str, str]
    created: str
    seed: int
    command: str = ""

    @classmethod
    def now(cls, device: torch.device, seed: int, command: str = "") -> "Provenance":
        """Provenance of results that are being made."""
        return cls(
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in ("cmacc", "torch", "av", "scikit-learn", "numpy")},
            },
            hardware={
                "machine": platform.machine(),
                "cores": str(os.cpu_count()),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=seed,
            command=command,
        )


@dataclass(frozen=True)
class Card:
    """Results of one encoder, the data of each task by its name, and ``{file: reason}`` of files left out."""

    encoder: EncoderFacts
    data: dict[str, DataFacts]
    results: tuple[Result, ...]
    provenance: Provenance
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Card":
        """Read a card.

        Raises
        ------
        CardError
            The file is missing or not a card of this format.
        """
        try:
            plain: dict[str, Any] = json.loads(path.read_text())
            if plain["format"] != _FORMAT:
                raise CardError(f"card {path}: format must be {_FORMAT}, got {plain['format']}; evaluate again")
            rows = [row | {"settings": tuple(row["settings"])} for row in plain["results"]]
            return cls(
                encoder=EncoderFacts(**plain["encoder"]),
                data={task: DataFacts(**facts) for task, facts in plain["data"].items()},
                results=tuple(Result(**row) for row in rows),
                provenance=Provenance(**plain["provenance"]),
                left_out=dict(plain["left_out"]),
            )
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise CardError(f"card {path}: cannot be read ({type(error).__name__}: {error})") from error

    def write(self, path: Path) -> None:
        """Write aside, then rename into place."""
        with written_aside(path) as aside:
            aside.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")


def joined(path: Path, new: Card, replaces: Collection[tuple[str, str]], *, overwrite: bool) -> Card:
    """``new`` together with the results of the card at ``path`` that it does not replace.

    Parameters
    ----------
    path
        Of the older card; there need not be one.
    new
        Its results may still be to come: then this only asks whether they can be joined.
    replaces
        The pairs of task and protocol that ``new`` is about.
    overwrite
        Whether results may be lost.

    Raises
    ------
    CardError
        Without ``overwrite``: the card there is of another encoder or of other data, or holds such results already.
    """
    if not path.exists():
        return new
    try:
        older = Card.read(path)
    except CardError:
        if overwrite:
            return new
        raise
    if older.encoder.weights != new.encoder.weights:
        if overwrite:
            return new
        raise CardError(
            f"card {path}: holds results of {older.encoder.name} at step {older.encoder.checkpoint_step}, of other "
            f"weights than {new.encoder.name}; choose another --out, or give --overwrite to lose them"
        )
    on_other_data = {
        task
        for task, facts in new.data.items()
        if task in older.data and older.data[task].fingerprint != facts.fingerprint
    }
    lost = [r for r in older.results if r.task in on_other_data or (r.task, r.protocol) in replaces]
    if lost and not overwrite:
        what = sorted({f"{r.protocol} of task {r.task}" for r in lost})
        raise CardError(
            f"card {path}: holds {', '.join(what)} already{' on other data' if on_other_data else ''}; choose another "
            "--out, or give --overwrite to replace them"
        )
    return dataclasses.replace(
        new,
        data={**older.data, **new.data},
        results=(*(r for r in older.results if r not in lost), *new.results),
        left_out={**older.left_out, **new.left_out},
    )
