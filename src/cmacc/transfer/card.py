"""The result card, ``card.json``: what was measured, of which encoder, on which data, by which protocol, with what."""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmacc.clips.storage import written_aside
from cmacc.pretraining import Provenance
from cmacc.pretraining.reading import UnfitError, dataclass_of, value_of

_FORMAT = 2
UNKNOWN_WEIGHTS = "unknown"


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
        Time that the measurement of the encoder took; short where its features had been kept.
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
        Fingerprint of the manifest that it was trained on; None where that is not known.
    run_id
        Of the training run; empty where there is none, or it is not known.
    """

    name: str
    kind: str
    weights: str
    checkpoint_step: int
    seed: int
    clip: dict[str, Any]
    pretraining_data: str | None = None
    run_id: str = ""


@dataclass(frozen=True)
class Card:
    """Results of one encoder; by task, its data, and ``{file: reason}`` of skipped files (or modalities)."""

    encoder: EncoderFacts
    data: dict[str, DataFacts]
    results: tuple[Result, ...]
    provenance: Provenance
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Card":
        """Read a card.

        Raises
        ------
        CardError
            The file is missing or not a card of this format.
        """
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(plain, dict) or plain.get("format") != _FORMAT:
                got = plain.get("format") if isinstance(plain, dict) else "no object"
                raise CardError(f"card {path}: format must be {_FORMAT}, got {got!r:.40}; evaluate again")
            data = value_of(dict[str, Any], plain, "data")
            rows = value_of(tuple[Any, ...], plain, "results")
            return cls(
                encoder=dataclass_of(EncoderFacts, plain.get("encoder"), "encoder", with_defaults=True),
                data={task: dataclass_of(DataFacts, facts, f"data.{task}") for task, facts in data.items()},
                results=tuple(
                    _with_present_direction(dataclass_of(Result, row, f"results[{place}]"))
                    for place, row in enumerate(rows)
                ),
                provenance=dataclass_of(Provenance, plain.get("provenance"), "provenance", with_defaults=True),
                skipped=value_of(dict[str, dict[str, str]], {"skipped": plain.get("left_out"), **plain}, "skipped"),
            )
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, UnfitError) as error:
            raise CardError(f"card {path}: cannot be read ({error})") from error

    def write(self, path: Path) -> None:
        """Write aside, then rename into place."""
        with written_aside(path) as aside:
            plain = {"format": _FORMAT, **dataclasses.asdict(self)}
            aside.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _with_present_direction(result: Result) -> Result:
    """Cards of cmacc 0.1.0 say ``video->audio``."""
    return dataclasses.replace(result, modality=result.modality.replace("->", "_to_"))


def joined(older: Card | None, new: Card, replaces: Collection[tuple[str, str]], *, overwrite: bool) -> Card:
    """``new`` together with the results of an older card that it does not replace.

    Parameters
    ----------
    older
        The card that stands where the new one will; None if there is none.
    new
        Its results may still be to come: then this only asks whether they can be joined.
    replaces
        The pairs of task and protocol that ``new`` is about.
    overwrite
        Whether results may be lost.

    Raises
    ------
    CardError
        Without ``overwrite``: the older card is of another encoder, of other data, or made in other conditions; or it
        holds such results already.
    """
    if older is None:
        return new
    reason = ""
    if older.encoder.weights != new.encoder.weights or new.encoder.weights == UNKNOWN_WEIGHTS:
        what = f"{older.encoder.name} at step {older.encoder.checkpoint_step}"
        reason = f"holds results of {what}, which may be of other weights than {new.encoder.name}"
    elif not older.provenance.same_conditions(new.provenance):
        reason = "holds results made with another seed, other code or versions, or other hardware"
    if reason and not overwrite:
        raise CardError(f"card in --out: {reason}; choose another --out, or give --overwrite to lose them")
    if reason:
        return new
    on_other_data = {
        task
        for task, facts in new.data.items()
        if task in older.data and older.data[task].fingerprint != facts.fingerprint
    }
    lost = [r for r in older.results if r.task in on_other_data or (r.task, r.protocol) in replaces]
    if lost and not overwrite:
        what = ", ".join(sorted({f"{r.protocol} of task {r.task}" for r in lost}))
        raise CardError(
            f"card in --out: holds {what} already{' on other data' if on_other_data else ''}; choose another --out, or "
            "give --overwrite to replace them"
        )
    kept = [r for r in older.results if r not in lost]
    skipped = {task: files for task, files in older.skipped.items() if task in {r.task for r in kept}}
    for task, files in new.skipped.items():
        skipped[task] = skipped.get(task, {}) | files
    return dataclasses.replace(
        new,
        data={**{task: older.data[task] for task in {r.task for r in kept}}, **new.data},
        results=(*kept, *new.results),
        skipped=skipped,
    )
