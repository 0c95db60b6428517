"""The tree and its triplets against brute force and against the published distances."""

import math
from collections import Counter

import numpy as np
import pytest

from cmacc.heads.instrument_ontology import (
    TINYSOL_CLASSES,
    InstrumentError,
    instrument_named,
    instruments,
    sound_triplets,
    tree_distances,
)
from cmacc.pretraining.features import unit_rows
from cmacc.transfer.nearest import triplets_kept

PUBLISHED = {  # groups of TinySOL's instruments in the paper's ontology, whose distances are stored in its repository
    "double reeds": ("bassoon", "oboe"),
    "single reeds": ("clarinet", "alto saxophone"),
    "valves": ("bass tuba", "french horn", "trumpet"),
    "no valves": ("trombone",),
    "strings": ("contrabass", "violin", "viola", "cello"),
    "edge": ("flute",),
    "free reeds": ("accordion",),
}


def published_distance(one: str, other: str) -> float:
    """2 in a group, 4 within reeds or brass, 6 among flute, reeds and brass, 9 to the accordion; no way to strings."""
    if one == other:
        return 0.0
    groups = {next(group for group, names in PUBLISHED.items() if name in names) for name in (one, other)}
    if "strings" in groups:
        return 2.0 if len(groups) == 1 else math.inf
    if len(groups) == 1:
        return 2.0
    if groups in ({"double reeds", "single reeds"}, {"valves", "no valves"}):
        return 4.0
    return 9.0 if "free reeds" in groups else 6.0


def test_every_instrument_stands_once_and_at_one_depth() -> None:
    found = instruments().values()
    names = Counter(name.lower() for one in found for name in (one.name, *one.aliases, one.abbreviation) if name)
    assert set(names.values()) == {1}
    assert {len(one.path) for one in found} == {4}
    assert all(all(one.path) and one.hornbostel_sachs for one in found)
    assert sorted(one.name for one in found if one.abbreviation) == list(TINYSOL_CLASSES)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Violoncello", "cello"),
        ("Bass_Tuba", "bass tuba"),
        ("tuba", "bass tuba"),
        ("Trumpet in C", "trumpet"),
        ("Clarinet_in_B-flat", "clarinet"),
        ("double  bass", "contrabass"),
        ("TpC", "trumpet"),
        ("French Horn", "french horn"),
        ("Alto_Saxophone", "alto saxophone"),
        ("cor anglais", "english horn"),
        ("contrabassoon", "contrabassoon"),
    ],
)
def test_names_and_aliases(name: str, known: str) -> None:
    one = instrument_named(name)
    assert one is not None
    assert one.name == known
    assert instrument_named("theremin") is None


def test_distances_by_hand() -> None:
    distances = tree_distances(["violin", "viola", "oboe", "clarinet", "flute", "accordion", "timpani"])
    inf = math.inf
    assert distances.tolist() == [
        [0, 2, inf, inf, inf, inf, inf],
        [2, 0, inf, inf, inf, inf, inf],
        [inf, inf, 0, 4, 6, 8, inf],
        [inf, inf, 4, 0, 6, 8, inf],
        [inf, inf, 6, 6, 0, 8, inf],
        [inf, inf, 8, 8, 8, 0, inf],
        [inf, inf, inf, inf, inf, inf, 0],
    ]
    plucked = tree_distances(["guitar", "banjo", "mandolin", "violin", "harp", "piano"])
    assert plucked[0].tolist() == [0, 4, 4, 6, 8, 8]
    with pytest.raises(InstrumentError, match=r"instrument 'theremin': must be a name or alias .*, got 1 unknown of 2"):
        tree_distances(["violin", "theremin"])
    with pytest.raises(InstrumentError, match="must be distinct, got two names of one among cello, Violoncello"):
        tree_distances(["cello", "Violoncello"])


def test_triplets_are_the_686_sound_ones_of_the_published_distances() -> None:
    distances = tree_distances(TINYSOL_CLASSES)
    found = {tuple(triplet) for triplet in sound_triplets(distances).tolist()}
    size = len(TINYSOL_CLASSES)
    brute = set()
    for a in range(size):
        for p in range(size):
            for n in range(size):
                one, positive, negative = (TINYSOL_CLASSES[i] for i in (a, p, n))
                if len({a, p, n}) == 3 and published_distance(one, positive) < published_distance(one, negative):
                    brute.add((a, p, n))
    assert len(brute) == 686
    assert found == brute


def test_triplets_of_three_by_hand() -> None:
    assert sound_triplets(tree_distances(["violin", "viola", "oboe"])).tolist() == [[0, 1, 2], [1, 0, 2]]
    assert sound_triplets(tree_distances(["violin", "oboe", "timpani"])).shape == (0, 3)
    assert sound_triplets(tree_distances([])).shape == (0, 3)


def test_an_embedding_of_the_tree_keeps_every_triplet_and_random_ones_keep_half() -> None:
    known = [instruments()[name] for name in TINYSOL_CLASSES]
    nodes = sorted({one.path[:depth] for one in known for depth in range(1, 5)})
    planted = np.asarray([[float(one.path[: len(node)] == node) for node in nodes] for one in known])
    triplets = sound_triplets(tree_distances(TINYSOL_CLASSES))
    assert triplets_kept(unit_rows(planted), triplets).value == 1.0
    rng = np.random.default_rng(0)
    shares = [triplets_kept(unit_rows(rng.normal(size=(14, 32))), triplets).value for _ in range(200)]
    # The mean of 200 draws within four standard errors of one half.
    assert abs(np.mean(shares) - 0.5) < 4 * np.std(shares) / math.sqrt(200)
    assert np.std(shares) < 0.15
