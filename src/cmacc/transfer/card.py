"""The result card, ``card.json``: results with their encoder, data, protocols and provenance."""

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
    """One row: a metric of an encoder, compared with the same encoder untrained and with chance.

    Attributes
    ----------
    task, protocol, modality, metric
        What was measured; ``protocol`` is the name of the recipe. ``audio`` is the encoder's features of audio,
        ``audio_tower``, ``audio_joint`` and ``audio_text`` what its recipe says.
    value
        Mean over the splits (folds).
    untrained
        The same for the untrained encoder; None if it was not measured or does not exist.
    chance
        Expected value of random guessing.
    count
        Number of held-out items, over all splits; of the metric ``triplets``, their number.
    version
        Version of the protocol. Results of different versions are not comparable.
    windows, crops
        Number of windows per file, and of crops per window, that were averaged.
    low, high
        95 % confidence interval of ``value``: bootstrap over items, or over groups of items if they are known; of
        triplets, over their anchors.
    by_split
        Value of every split, by its name.
    settings
        Departures from the recipe, prompts, and what of the data a value cannot be read without, as ``name=value``;
        empty if there are none.
    seconds
        Time of the measurement of the encoder; short if its features were cached.
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
    """The data of one task, and how much of it was present.

    Attributes
    ----------
    path
        Folder or manifest.
    fingerprint
        Hash that depends on the content, label and split of every used file (`Manifest.fingerprint`).
    files, files_listed
        Number of used files, and of files in the official list (the same if there is no list).
    classes, classes_listed
        Number of their classes.
    """

    path: str
    fingerprint: str
    files: int
    files_listed: int
    classes: int
    classes_listed: int

    @property
    def is_partial(self) -> bool:
        """Whether files or classes of the official data set are missing."""
        return self.files < self.files_listed or self.classes < self.classes_listed


@dataclass(frozen=True)
class EncoderFacts:
    """The measured encoder.

    Attributes
    ----------
    name
        The ENCODER argument: a path, ``random``, ``statistics``, ``torchvision:...``.
    kind
        Description of the encoder: backbones and, for a run, how it was trained.
    weights
        Hash of all weights and settings, sixteen hex digits.
    checkpoint_step
        Number of training steps; 0 if not applicable.
    seed
        Seed of the weights.
    clip
        Size of its clips: the fields of `ClipSpec`.
    pretraining_data
        Fingerprint of the manifest that it was trained on, or names of public data; None if unknown.
    run_id
        Id of the training run; empty if there is none or it is unknown.
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
    """Results of one encoder, with the data of each task, and ``{file: reason}`` of skipped files (or modalities)."""

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
            The file is missing, or is not a card of this format.
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
        """Write the card atomically."""
        with written_aside(path) as aside:
            plain = {"format": _FORMAT, **dataclasses.asdict(self)}
            aside.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _with_present_direction(result: Result) -> Result:
    """The result with the current name of its direction: cards of cmacc 0.1.0 have ``video->audio``."""
    return dataclasses.replace(result, modality=result.modality.replace("->", "_to_"))


def joined(older: Card | None, new: Card, replaces: Collection[tuple[str, str]], *, overwrite: bool) -> Card:
    """``new`` together with the results of an older card that it does not replace.

    Parameters
    ----------
    older
        The existing card at the same path; None if there is none.
    new
        The new card. Its results may be missing, to only check whether they can be joined.
    replaces
        The pairs of task and protocol that ``new`` measures.
    overwrite
        Whether results may be lost.

    Raises
    ------
    CardError
        Without ``overwrite``: the older card is of another encoder, of other data, or made under other conditions, or
        already holds such results.
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
