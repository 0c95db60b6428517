"""Prototypes by brute force, triplets by hand, and what noise and collapsed encoders get."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cmacc.pretraining.features import unit_rows
from cmacc.transfer.metrics import ProtocolError
from cmacc.transfer.nearest import class_prototypes, prototypes, triplets_kept
from cmacc.transfer.protocols import Rows


def rows(features: NDArray[np.floating], labels: NDArray[np.integer]) -> Rows:  # type: ignore[type-arg]
    return Rows(features.astype(np.float32), labels.astype(np.int64), np.arange(len(labels)))


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_prototypes_by_brute_force(classes: int, windows: int, seed: int) -> None:
    """In plain loops: means over windows, unit length, means over a class's files. Labels need not be consecutive."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice(20, classes, replace=False)
    labels = numbers[np.concatenate([np.arange(classes), rng.integers(0, classes, 15)])]
    # Lengths that differ: without the first normalisation, the longest file would be the prototype.
    lengths = 10.0 ** rng.integers(-2, 3, (len(labels), 1, 1))
    train = rows(rng.normal(size=(len(labels), windows, 4)) * lengths, labels)
    test = rows(rng.normal(size=(30, windows, 4)), rng.choice(numbers, 30))
    members: dict[int, list[list[float]]] = {}
    for one, label in zip(train.features.astype(float), train.labels.tolist(), strict=True):
        members.setdefault(label, []).append(unit([float(sum(one[:, i])) for i in range(4)]))
    of_class = {label: unit([sum(row[i] for row in own) for i in range(4)]) for label, own in members.items()}
    right = []
    for one, label in zip(test.features.astype(float), test.labels.tolist(), strict=True):
        query = unit([float(sum(one[:, i])) for i in range(4)])
        cosines = {n: sum(a * b for a, b in zip(query, row, strict=True)) for n, row in of_class.items()}
        right.append(max(cosines, key=lambda n: cosines[n]) == label)
    (metric,) = prototypes(train, test)
    assert metric.name == "accuracy"
    assert metric.per_item.tolist() == right
    assert metric.chance == 1 / classes


def test_noise_is_at_chance_though_classes_are_small() -> None:
    """14 classes of 15, of which 3 are held out: training files alone make the prototypes, so there is no flattery."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(14), 15)
    noise = rng.normal(size=(len(labels), 1, 256))
    held_out = np.arange(len(labels)) % 5 == 0
    (metric,) = prototypes(rows(noise[~held_out], labels[~held_out]), rows(noise[held_out], labels[held_out]))
    assert abs(metric.value - 1 / 14) < 4 * math.sqrt(1 / 14 * 13 / 14 / held_out.sum())  # four standard errors


def test_a_collapsed_encoder_gets_nothing() -> None:
    same, labels = np.ones((6, 1, 3)), np.asarray([0, 0, 1, 1, 2, 2])
    assert prototypes(rows(same, labels), rows(same, labels))[0].value == 0
    assert triplets_kept(np.ones((3, 3)) / math.sqrt(3), np.asarray([[0, 1, 2], [1, 0, 2]])).value == 0


def test_triplets_by_hand() -> None:
    """Of violin, viola, oboe: two triplets, (violin, viola, oboe) and (viola, violin, oboe)."""
    angles = np.radians([0.0, 40.0, 70.0])  # viola is nearer to oboe: the second triplet is lost
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    metric = triplets_kept(directions, np.asarray([[0, 1, 2], [1, 0, 2]]))
    assert (metric.name, metric.per_item.tolist(), metric.chance) == ("triplets", [1, 0], 0.5)


def test_class_prototypes_are_directions_of_the_classes_that_are_there() -> None:
    features = np.asarray([[3.0, 0.0], [0.0, 0.1], [0.0, -2.0]])
    classes, directions = class_prototypes(features, np.asarray([7, 7, 2]))
    assert classes.tolist() == [2, 7]
    np.testing.assert_allclose(directions, [[0, -1], [math.sqrt(0.5), math.sqrt(0.5)]])


@pytest.mark.parametrize("triplets", [np.zeros((0, 3), np.int64), np.asarray([[0, 1, 2]]), np.asarray([[0, 1, -1]])])
def test_what_triplets_must_be(triplets: NDArray[np.int64]) -> None:
    with pytest.raises(ProtocolError, match="triplets: must be rows of the 2 classes, at least one, got "):
        triplets_kept(unit_rows(np.eye(2)), triplets)
