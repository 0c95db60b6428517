"""The plain head against scikit-learn's standardisation, losses by hand, and a planted problem."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from cmacc.heads.event_linear import EventLinear, EventLinearConfig
from cmacc.heads.segment_accuracy import EventError, segment_accuracy

Rows = dict[str, Tensor]
CLASSES = 3


def random_rows(count: int, times: int = 4, places: int = 2) -> Rows:
    labels = torch.full((count, times), CLASSES)
    labels[:, 1:3] = torch.randint(CLASSES, (count, 1))
    return {"video": torch.randn(count, times, places, 5), "audio": torch.randn(count, times, 2), "labels": labels}


def planted(count: int, seed: int) -> Rows:
    """Half the videos' seconds are events, of which both modalities tell the class."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (count, 1), generator=generator)
    event = torch.rand(count, 6, generator=generator) < 0.5
    labels = torch.where(event, classes, CLASSES)
    directions = torch.eye(CLASSES + 1)[:, :CLASSES][labels]
    noise = 0.3 * torch.randn(2, count, 6, CLASSES, generator=generator)
    return {"video": 10 + 5 * (directions + noise[0]), "audio": 0.1 * (directions + noise[1]), "labels": labels}


def trained(rows: Rows, config: EventLinearConfig | None = None, steps: int = 80) -> EventLinear:
    head = EventLinear(CLASSES, CLASSES, CLASSES, config)
    head.standardise(rows)
    optimiser = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        head.loss(rows, 0.0).backward()
        optimiser.step()
    return head.eval()


def accuracy(head: EventLinear, rows: Rows) -> float:
    return segment_accuracy(head.predict(rows, 1.0)["classes"], rows["labels"])


def test_features_are_standardised_as_scikit_learn_does() -> None:
    train, test = random_rows(300), random_rows(3)  # more rows than one chunk
    for rows in (train, test):
        rows["audio"][..., 1] = 7.0  # constant
    head = EventLinear(5, 2, CLASSES)
    head.standardise(train)

    def seconds(rows: Rows) -> Any:
        return torch.cat([rows["video"].mean(2), rows["audio"]], -1).flatten(0, 1).double().numpy()

    expected = StandardScaler().fit(seconds(train)).transform(seconds(test))
    scores = torch.from_numpy(expected) @ head.layer.weight.double().T + head.layer.bias.double()
    event = 1 - scores.softmax(-1)[:, CLASSES]
    predicted = head.predict(test, 0.0)
    np.testing.assert_allclose(predicted["event"].flatten().numpy(), event.detach().numpy(), atol=1e-5)
    assert predicted["classes"].flatten().tolist() == scores.argmax(-1).tolist()


def test_standardisation_is_not_forgotten() -> None:
    head = EventLinear(5, 2, CLASSES)
    with pytest.raises(EventError, match="standardise must be called with the training rows first"):
        head.predict(random_rows(2), 0.0)
    head.standardise(random_rows(9))
    copied = EventLinear(5, 2, CLASSES)
    copied.load_state_dict(head.state_dict())
    rows = random_rows(2)
    torch.testing.assert_close(copied.predict(rows, 0.0), head.predict(rows, 0.0))
    with pytest.raises(EventError, match="training rows must not be empty"):
        head.standardise(random_rows(0))


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_losses_by_hand(pooling: Any) -> None:
    rows = {name: part.double() if name != "labels" else part for name, part in random_rows(3).items()}
    head = EventLinear(5, 2, CLASSES).double()
    weak = EventLinear(5, 2, CLASSES, EventLinearConfig(weak=True, pooling=pooling)).double()
    for each in (head, weak):
        each.standardise(rows)
    rows["labels"][2] = CLASSES  # without an event
    total, total_weak = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for b in range(3):
        each_second = []
        for t in range(4):
            features = torch.cat([rows["video"][b, t].mean(0), rows["audio"][b, t]])
            scores = head.layer((features - head.mean) / head.scale)
            total = total - (scores[rows["labels"][b, t]] - scores.exp().sum().log())
            each_second.append(weak.layer((features - weak.mean) / weak.scale))
        stacked = torch.stack(each_second)
        pooled = stacked.max(0).values if pooling == "max" else stacked.mean(0)
        total_weak = total_weak - (pooled[rows["labels"][b, 1]] - pooled.exp().sum().log())
    torch.testing.assert_close(head.loss(rows, 0.0), total / 12)
    torch.testing.assert_close(weak.loss(rows, 0.0), total_weak / 3)


def test_it_learns_what_is_planted_and_nothing_of_shuffled_labels() -> None:
    train, test = planted(200, 0), planted(200, 1)
    assert accuracy(trained(train), test) > 0.95
    chance = float((test["labels"] == CLASSES).double().mean())
    shuffled = train["labels"].flatten()[torch.randperm(train["labels"].numel())].view_as(train["labels"])
    assert accuracy(trained(train | {"labels": shuffled}), test) < chance + 0.05


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_weak_training_learns_seconds_from_videos(pooling: Any) -> None:
    train, test = planted(300, 0), planted(200, 1)
    train["labels"][:100] = CLASSES
    for name in ("video", "audio"):  # of the first 100 videos, only seconds without an event
        empty = planted(300, 2)
        quiet = empty[name][empty["labels"] == CLASSES]
        train[name][:100] = quiet[:600].view(100, 6, CLASSES)
    chance = float((test["labels"] == CLASSES).double().mean())
    # The mean cannot tell videos with few event seconds from those without: it only learns a part.
    least = {"max": 0.9, "mean": chance + 0.2}[pooling]
    assert accuracy(trained(train, EventLinearConfig(weak=True, pooling=pooling), steps=150), test) > least


@pytest.mark.parametrize(("times", "places"), [(1, 1), (10, 4)])
def test_any_length_places_and_a_batch_of_one(times: int, places: int) -> None:
    head = EventLinear(5, 2, CLASSES)
    head.standardise(random_rows(4))
    rows = {"video": torch.randn(1, times, places, 5), "audio": torch.randn(1, times, 2)}
    predicted = head.predict(rows, 0.0)
    assert predicted["classes"].shape == predicted["event"].shape == (1, times)


def test_settings_are_checked() -> None:
    with pytest.raises(EventError, match="classes must be at least 1"):
        EventLinear(5, 2, 0)


@pytest.mark.usefixtures("users_checks")
def test_pooling_is_checked() -> None:
    with pytest.raises(EventError, match="pooling must be one of max, mean, got 'sum'"):
        EventLinearConfig(pooling="sum")  # type: ignore[arg-type]
