"""Clips of one selection: the keys chosen for each query, likely false negatives, duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass

from cmacc.encoders import Modality
from cmacc.negatives import Keys
from cmacc.viewer.gallery import ClipPictures, Picture
from cmacc.viewer.replay import Selection, SelectionReplay
from cmacc.viewer.selection import (
    HardNegative,
    SelectionFacts,
    hard_negatives,
    near_duplicates,
    repeated_samples,
)

SHOWN = 12  # of the chosen keys, and of the random draw
_HARD_NEGATIVES = 4
_PAIRS = 3
_LEAST_COSINE = 0.98


@dataclass(frozen=True)
class ClipView:
    """A clip to show: its halves, each with whether it is pale, its label and its file name."""

    halves: list[tuple[Picture, bool]]
    label: str | None
    file_name: str


@dataclass(frozen=True)
class KeyTile:
    """A key below its query; ``kind`` is chosen or random, ``sure`` the pseudo-posterior, ``age`` in steps."""

    kind: str
    order: int
    clip: ClipView
    same_label: bool
    sure: float
    age: int


@dataclass(frozen=True)
class Group:
    """A query of the batch (by its position) and the keys assigned to it."""

    query: int
    clip: ClipView
    keys: list[KeyTile]


@dataclass(frozen=True)
class Outdone:
    """A query with its own other half, and a negative that is more similar to it."""

    hard: HardNegative
    own: ClipView
    other: ClipView
    same_label: bool


@dataclass(frozen=True)
class HardNegatives:
    """Negatives that are more similar to a query than the right key: their share of all pairs, and the clearest ones.

    ``by_label``: the number of such keys with known labels, the number of them with the label of their query, and the
    expected number among as many random keys.
    """

    share: float
    clearest: list[Outdone]
    by_label: tuple[int, int, float] | None


@dataclass(frozen=True)
class Duplicates:
    """Redundancy of the dictionary, and the most similar pairs as (two clips, cosine)."""

    repeats: int
    keys: int
    pairs: int
    near: int
    near_among_chosen: int
    least_cosine: float
    shown: list[tuple[list[ClipView], float]]


class KeyPictures:
    """Images of exactly the windows that keys and queries were encoded from."""

    def __init__(self, replay: SelectionReplay) -> None:
        self._replay = replay
        self._pictures = ClipPictures(replay.manifest, replay.config.data.clip, replay.config.encoder.mel_bins)
        self._labels = replay.manifest.column("label")

    def key(self, keys: Keys, place: int, modality: Modality) -> ClipView:
        """The clip of a key, with the key's own half first and the other one pale."""
        return self.clip(int(keys.sample_ids[place]), int(self._replay.encoded_at(keys)[place]), modality)

    def clip(self, sample_id: int, step: int, modality: Modality | None) -> ClipView:
        """The window of a sample in the batch of a step; with a modality, the other half is pale."""
        window = sample_id, self._replay.start_seconds(sample_id, step)
        halves = [
            (self._pictures.frames(*window), modality == "audio"),
            (self._pictures.sound(*window), modality == "video"),
        ]
        ordered = halves[::-1] if modality == "audio" else halves
        return ClipView(ordered, self.label(sample_id), self._replay.manifest.records[sample_id].name)

    def label(self, sample_id: int) -> str | None:
        """The sample's label."""
        label: str | None = self._labels[sample_id]
        return label

    def same_label(self, first: int, second: int) -> bool:
        """Whether two samples have the same, known label."""
        return self.label(first) is not None and self.label(first) == self.label(second)


def groups_of(pictures: KeyPictures, selection: Selection, facts: SelectionFacts) -> list[Group]:
    """The first chosen keys and the first random ones, by the query that each was assigned to."""
    pool, by_query = selection.pool, dict[int, list[KeyTile]]()
    for kind, places in (("chosen", selection.chosen), ("random", facts.drawn)):
        for order, place in enumerate(places[:SHOWN].tolist(), start=1):
            query = int(facts.pseudo_labels[place])
            tile = KeyTile(
                kind,
                order,
                pictures.key(pool, place, selection.modality),
                pictures.same_label(int(pool.sample_ids[place]), int(selection.query_ids[query])),
                float(facts.posteriors[place]),
                selection.step - int(pool.steps[place]),
            )
            by_query.setdefault(query, []).append(tile)
    groups = [
        Group(query, pictures.clip(int(selection.query_ids[query]), selection.step, selection.query_modality), tiles)
        for query, tiles in by_query.items()
    ]
    # Queries with the most chosen keys come first.
    return sorted(groups, key=lambda group: (-sum(tile.kind == "chosen" for tile in group.keys), group.query))


def hard_negatives_of(pictures: KeyPictures, selection: Selection) -> HardNegatives:
    """Negatives that are more similar to a query than its right key."""
    found, share = hard_negatives(selection)
    keys = selection.dictionary
    by_query: dict[int, HardNegative] = {}
    for one in found:  # the clearest first, one per query: a single odd query could otherwise fill the row
        by_query.setdefault(one.query, one)
    clearest = []
    for one in list(by_query.values())[:_HARD_NEGATIVES]:
        own, other = int(selection.query_ids[one.query]), int(keys.sample_ids[one.key])
        clearest.append(
            Outdone(
                one,
                pictures.clip(own, selection.step, None),
                pictures.key(keys, one.key, selection.modality),
                pictures.same_label(own, other),
            )
        )
    return HardNegatives(share, clearest, _by_label(pictures, selection, found))


def duplicates_of(pictures: KeyPictures, selection: Selection) -> Duplicates:
    """Repeated and nearly equal keys of the dictionary."""
    keys = selection.dictionary
    pairs, count = near_duplicates(keys, _LEAST_COSINE)
    return Duplicates(
        repeats=repeated_samples(keys),
        keys=len(keys),
        pairs=len(keys) * (len(keys) - 1) // 2,
        near=count,
        near_among_chosen=near_duplicates(selection.pool[selection.chosen], _LEAST_COSINE)[1],
        least_cosine=_LEAST_COSINE,
        shown=[
            ([pictures.key(keys, place, selection.modality) for place in (pair.first, pair.second)], pair.cosine)
            for pair in pairs[:_PAIRS]
        ],
    )


def _by_label(
    pictures: KeyPictures, selection: Selection, found: Sequence[HardNegative]
) -> tuple[int, int, float] | None:
    """The number of hard negatives that are false by label, and the number expected by chance."""
    keys = selection.dictionary
    pairs = [(int(selection.query_ids[one.query]), int(keys.sample_ids[one.key])) for one in found]
    known = [(own, other) for own, other in pairs if pictures.label(own) is not None and pictures.label(other)]
    if not known:
        return None
    held = [label for place in keys.sample_ids.tolist() if (label := pictures.label(place)) is not None]
    chance = sum(held.count(label) / len(held) for own, _ in known if (label := pictures.label(own)) is not None)
    return len(known), sum(pictures.same_label(own, other) for own, other in known), chance
