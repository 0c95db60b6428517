"""The four rules and the accuracy on cases worked out by hand; AUROC against counted pairs."""

import math

import pytest
import torch

from cmacc.heads.segment_accuracy import (
    EventError,
    classes_per_second,
    event_auroc,
    gated_classes,
    released_weak_classes,
    segment_accuracy,
    video_classes,
)

# Two event classes, 2 is background.
LABELS = torch.tensor([[2, 0, 0, 2], [1, 1, 1, 1]])


def test_m1_takes_each_second_by_itself() -> None:
    scores = torch.tensor([[[1.0, 3.0, 2.0], [5.0, 5.0, 0.0], [0.0, 0.0, 0.1]]])
    assert classes_per_second(scores).tolist() == [[1, 0, 2]]
    assert torch.equal(classes_per_second(scores), classes_per_second(scores.softmax(-1)))


def test_m2_is_one_class_or_background_and_strict_at_a_half() -> None:
    predicted = gated_classes(torch.tensor([[0.2, 0.1], [0.1, 0.2]]), torch.tensor([[0.5, 0.6, 0.9, 0.0]] * 2), 2)
    assert predicted.tolist() == [[2, 0, 0, 2], [2, 1, 1, 2]]
    assert segment_accuracy(predicted, LABELS) == 6 / 8


def test_m3_may_choose_background_for_the_video() -> None:
    predicted = gated_classes(torch.tensor([[0.0, 0.1, 0.2], [0.0, 0.1, -0.2]]), torch.tensor([[1.0, 0.0]] * 2), 2)
    assert predicted.tolist() == [[2, 2], [1, 2]]


def test_m4_makes_every_second_an_event() -> None:
    gates = torch.rand(50, 4) * 0.998 + 0.001
    scores = torch.randn(50, 3)
    predicted = released_weak_classes(scores, gates, 2)
    assert torch.equal(predicted, scores.argmax(1)[:, None].expand(-1, 4))
    # The sound form has background where gates are closed.
    assert (gated_classes(scores, gates, 2) == 2).float().mean() > predicted.eq(2).float().mean()


def test_the_ceiling_without_background_is_the_share_of_event_seconds() -> None:
    right_class = released_weak_classes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.full((2, 4), 0.1), 2)
    assert segment_accuracy(right_class, LABELS) == 6 / 8
    assert segment_accuracy(torch.full((2, 4), 2), LABELS) == 2 / 8


def test_video_classes() -> None:
    labels = torch.tensor([[2, 0, 0, 2], [1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 1]])
    assert video_classes(labels, 2).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[2, 2], [0, 1]], "one event class, got 0 and 1 in row 1 of the batch"),
        ([[0, 3]], r"in \[0, 2\] with 2 for background, got 0 to 3"),
        ([[-1, 0]], r"in \[0, 2\] .* got -1 to 0"),
    ],
)
def test_labels_that_are_not_of_one_event(labels: list[list[int]], message: str) -> None:
    with pytest.raises(EventError, match=message):
        video_classes(torch.tensor(labels), 2)


def test_auroc_counts_pairs() -> None:
    gates = torch.tensor([[0.1, 0.4, 0.4], [0.9, 0.2, 0.7]])
    event = torch.tensor([[False, True, False], [True, False, True]])
    positives, negatives = gates[event].tolist(), gates[~event].tolist()
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert event_auroc(gates, event) == pytest.approx(sum(pairs) / len(pairs))


def test_auroc_without_both_kinds_is_nan() -> None:
    gates = torch.rand(2, 3)
    assert math.isnan(event_auroc(gates, torch.ones(2, 3, dtype=torch.bool)))
    assert math.isnan(event_auroc(gates, torch.zeros(2, 3, dtype=torch.bool)))


@pytest.mark.usefixtures("users_checks")
def test_bad_input_is_named() -> None:
    with pytest.raises(EventError, match=r"got \(1, 2\) and \(2, 4\)"):
        segment_accuracy(torch.zeros(1, 2, dtype=torch.long), LABELS)
    with pytest.raises(EventError, match="neither of them 0"):
        segment_accuracy(LABELS[:0], LABELS[:0])
    with pytest.raises(EventError, match="must have 2 event classes, or those and background, got 4"):
        gated_classes(torch.zeros(1, 4), torch.zeros(1, 2), 2)
    with pytest.raises(EventError, match=r"scores must be finite"):
        event_auroc(torch.tensor([[math.nan, 1.0]]), torch.tensor([[True, False]]))
    with pytest.raises(EventError, match=r"one shape, got \(1, 1\) and \(1, 2\)"):
        event_auroc(torch.zeros(1, 1), torch.tensor([[True, False]]))
