"""Published results on UCF101, HMDB51, ESC-50 and AVE, read from ``docs/published.csv``.

They are for orientation. Each row names its source and only states what the source states.
`cmacc.transfer.beside.beside_published` lists how a number differs from measured ones.
"""

import csv
import io
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from cmacc.transfer.card import CardError

PublishedTask = Literal["ucf101", "hmdb51", "esc50", "ave"]
"""A task that published results are known for, by the name that cards have; ``ave`` is measured by `cmacc.heads`."""
PUBLISHED_TASKS: tuple[PublishedTask, ...] = get_args(PublishedTask)
"""All of them."""
_KINDS = ("linear", "svm", "knn", "finetune", "cmbs", "cmbs_weak", "cace_net", "other")
_COLUMNS = ["method", "backbone", "pretraining", *PUBLISHED_TASKS, "protocol", "source"]


@dataclass(frozen=True)
class PublishedResult:
    """Published accuracies of one encoder in percent; None if the source does not state one.

    Parameters
    ----------
    method, backbone, pretraining
        In the words of the source, or ``not stated``.
    ucf101, hmdb51, esc50, ave
        Accuracy on that task; on AVE, of seconds.
    protocol
        The protocol of cmacc that it corresponds to (on AVE ``cmbs``, ``cmbs_weak`` or ``cace_net``), or ``other``.
        After semicolons, what else is known: splits; the clip as ``30 frames of 112 px``; conditions in the words of a
        card's settings, as ``leaks=8``; what it does otherwise than that protocol, as ``departures: one seed, ...``.
    source
        Source of the numbers.

    Raises
    ------
    CardError
        Method or source is empty, the protocol is unknown, or there is no number in [0, 100].
    """

    method: str
    backbone: str
    pretraining: str
    ucf101: float | None
    hmdb51: float | None
    esc50: float | None
    ave: float | None
    protocol: str
    source: str

    def __post_init__(self) -> None:
        where = f"published result {self.method!r}"
        for name in ("method", "source"):
            if not getattr(self, name).strip():
                raise CardError(f"{where}: {name} must not be empty, got {getattr(self, name)!r}")
        if self.kind not in _KINDS:
            raise CardError(f"{where}: protocol must begin with one of {', '.join(_KINDS)}, got {self.protocol!r}")
        accuracies = {task: self.accuracy(task) for task in PUBLISHED_TASKS}
        if all(value is None for value in accuracies.values()):
            raise CardError(f"{where}: must have an accuracy on one of {', '.join(PUBLISHED_TASKS)}, got none")
        for task, value in accuracies.items():
            if value is not None and not 0 <= value <= 100:
                raise CardError(f"{where}: {task} must be in [0, 100], got {value}")

    def accuracy(self, task: PublishedTask) -> float | None:
        """Accuracy in percent on a task."""
        return {"ucf101": self.ucf101, "hmdb51": self.hmdb51, "esc50": self.esc50, "ave": self.ave}[task]

    @property
    def kind(self) -> str:
        """The protocol's first word."""
        return self.protocol.partition(";")[0].strip()

    @property
    def details(self) -> tuple[str, ...]:
        """What stands in the protocol after the first word."""
        return tuple(part.strip() for part in self.protocol.split(";")[1:])

    @property
    def departures(self) -> str:
        """What was done otherwise than by cmacc's protocol of that name; empty if nothing is known."""
        return ", ".join(part.removeprefix("departures: ") for part in self.details if part.startswith("departures: "))

    @property
    def clip(self) -> tuple[int, int] | None:
        """Number of frames, and their height and width in pixels; None if the source does not state it."""
        found = re.search(r"(\d+) frames of (\d+) px", self.protocol)
        return (int(found[1]), int(found[2])) if found else None


def published_results() -> tuple[PublishedResult, ...]:
    """All rows of the file, in order.

    Raises
    ------
    CardError
        The file is missing, or `parse_published` refuses it.
    """
    in_wheel = files("cmacc.transfer").joinpath("published.csv")
    in_checkout = Path(__file__).parents[3] / "docs" / "published.csv"
    for file in (in_wheel, in_checkout):
        if file.is_file():
            return parse_published(file.read_text(encoding="utf-8"))
    raise CardError(f"published results: must be at {in_wheel} or {in_checkout}, got neither")


def parse_published(text: str) -> tuple[PublishedResult, ...]:
    """Rows of a CSV file with a column for every field of `PublishedResult`. Unknown numbers are empty.

    Raises
    ------
    CardError
        A line is invalid; the message names it.
    """
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows = []
    try:
        if reader.fieldnames != _COLUMNS:
            raise CardError(f"columns must be {', '.join(_COLUMNS)}, got {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                raise CardError(f"must have {len(_COLUMNS)} columns, got {list(row.values())}")
            ucf101, hmdb51, esc50, ave = (float(row[task]) if row[task] else None for task in PUBLISHED_TASKS)
            rows.append(
                PublishedResult(
                    method=row["method"],
                    backbone=row["backbone"],
                    pretraining=row["pretraining"],
                    ucf101=ucf101,
                    hmdb51=hmdb51,
                    esc50=esc50,
                    ave=ave,
                    protocol=row["protocol"],
                    source=row["source"],
                )
            )
    except (csv.Error, ValueError) as error:
        raise CardError(f"published results, line {reader.line_num}: {error}") from error
    return tuple(rows)
