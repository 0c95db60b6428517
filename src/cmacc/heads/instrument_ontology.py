"""An ontology of instruments: names and aliases, distances in a tree, and the triplets that an embedding should keep.

1. The tree stands in ``instrument_ontology.csv``, with its source: four levels above each instrument.
2. The distance d of two instruments is the number of edges between them; between families it is infinite.
3. A triplet (anchor, positive, negative) of distinct instruments is sound if d(anchor, positive) < d(anchor, negative).
   Ties are no triplets.
4. An embedding keeps a triplet if the cosine of anchor and positive is above that of anchor and negative
   (`cmacc.transfer.nearest.triplets_kept`).

Source: Vasilakis, Bittner and Pauwels 2024, "I can listen but cannot read: an evaluation of two-tower multimodal
systems for instrument recognition" (ISMIR, arXiv 2407.18058). Its code compares distances as if they were similarities:
of its 237 triplets on TinySOL, 67 within a family have the farther instrument as the positive, and anchors see later
instruments alone. The sound triplets of its own distances are 686, those of our tree as well.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import permutations
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

_LEVELS = ("family", "section", "group", "kind")
TINYSOL_CLASSES = (
    "accordion", "alto saxophone", "bass tuba", "bassoon", "cello", "clarinet", "contrabass", "flute", "french horn",
    "oboe", "trombone", "trumpet", "viola", "violin",
)  # fmt: skip
"""The instruments of TinySOL."""


class InstrumentError(ValueError):
    """Instruments, embeddings or labels that cannot be measured; the message says which and why."""


@dataclass(frozen=True)
class Instrument:
    """An instrument of the ontology.

    Attributes
    ----------
    name
        In lower case.
    abbreviation
        In the file names of TinySOL; empty if it is not there.
    aliases
        Other names, in lower case.
    path
        Family, section, group and kind.
    hornbostel_sachs
        Its class in the classification.
    """

    name: str
    abbreviation: str
    aliases: tuple[str, ...]
    path: tuple[str, ...]
    hornbostel_sachs: str


@cache
def instruments() -> dict[str, Instrument]:
    """The ontology, by name, in the order of its file."""
    text = (resources.files(__package__) / "instrument_ontology.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {
        row["name"]: Instrument(
            row["name"],
            row["abbreviation"],
            tuple(alias for alias in row["aliases"].split("|") if alias),
            tuple(row[level] for level in _LEVELS),
            row["hornbostel_sachs"],
        )
        for row in rows
    }


def instrument_named(name: str) -> Instrument | None:
    """The instrument of a name, alias or abbreviation, in any case and with underscores for spaces; None if unknown.

    Examples
    --------
    >>> instrument_named("Violoncello").name, instrument_named("Clarinet_in_B-flat").name, instrument_named("BTb").name
    ('cello', 'clarinet', 'bass tuba')
    """
    return _by_any_name().get(" ".join(name.replace("_", " ").lower().split()))


@cache
def _by_any_name() -> dict[str, Instrument]:
    return {
        key: one for one in instruments().values() for key in (one.name, *one.aliases, one.abbreviation.lower()) if key
    }


def tree_distances(classes: Sequence[str]) -> NDArray[np.float64]:
    """``(n, n)`` number of edges between instruments; infinite between families, 0 on the diagonal.

    Raises
    ------
    InstrumentError
        A class is not in the ontology, or two are the same instrument.
    """
    found = [instrument_named(name) for name in classes]
    unknown = [name for name, one in zip(classes, found, strict=True) if one is None]
    if unknown:
        raise InstrumentError(
            f"instrument {unknown[0]!r}: must be a name or alias of instrument_ontology.csv, got {len(unknown)} "
            f"unknown of {len(classes)}; leave them out of the triplets"
        )
    leaves = [(*one.path, one.name) for one in found if one is not None]
    if len(set(leaves)) < len(leaves):
        raise InstrumentError(f"instruments: must be distinct, got two names of one among {', '.join(classes)}")
    return np.asarray([[_edges(one, other) for other in leaves] for one in leaves], np.float64)


def _edges(one: tuple[str, ...], other: tuple[str, ...]) -> float:
    shared = 0
    while shared < len(one) and one[shared] == other[shared]:
        shared += 1
    # Without a shared family the way leads over the root; how far apart families are, no tree can tell.
    return 2.0 * (len(one) - shared) if shared else math.inf


def sound_triplets(distances: NDArray[np.float64]) -> Int[NDArray[Any], "triplets 3"]:
    """All ordered triplets of distinct classes with d(anchor, positive) < d(anchor, negative), as class numbers."""
    found = [
        (anchor, positive, negative)
        for anchor, positive, negative in permutations(range(len(distances)), 3)
        if distances[anchor, positive] < distances[anchor, negative]
    ]
    return np.asarray(found, np.int64).reshape(-1, 3)
