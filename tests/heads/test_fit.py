"""The training loop of heads: the same result whatever the interruptions, the best validation epoch, clear errors."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cmacc.heads.fit import FitConfig, Fitted, fit, predictions, seeded_head
from cmacc.heads.head import Head, HeadError, ItemsInMemory, Rows


class TinyHead(Head):
    """A linear classifier with dropout, so that a wrong seed shows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.2)
        self.seen: list[float] = []

    def loss(self, rows: Rows, progress: float) -> Tensor:
        self.seen.append(progress)
        return functional.cross_entropy(self.linear(self.dropout(rows["x"])), rows["y"])

    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return {"class": self.linear(rows["x"]).argmax(1)}


def accuracy(found: dict[str, Tensor], rows: Rows) -> float:
    return (found["class"] == rows["y"]).float().mean().item()


def planted(shuffled: bool = False) -> ItemsInMemory:
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = functional.one_hot(y, 4).float() + 0.3 * torch.randn(120, 4, generator=rng)
    return ItemsInMemory({"x": x, "y": y[torch.randperm(120, generator=rng)] if shuffled else y})


TRAIN, VALIDATION, TEST = range(60), range(60, 90), range(90, 120)
CONFIG = FitConfig(epochs=6, batch_size=16, learning_rate=0.05, milestones=(3,), max_gradient_norm=1.0, seed=3)


def trained(config: FitConfig = CONFIG, **more: Any) -> tuple[TinyHead, Fitted]:
    head = seeded_head(TinyHead, 0)
    return head, fit(head, planted(), TRAIN, VALIDATION, accuracy, config, **more)


def test_a_planted_problem_is_learnt_and_shuffled_labels_are_not() -> None:
    head, done = trained()
    items = planted()
    assert accuracy(predictions(head, items, TEST, 0.0, 7), items.rows(TEST)) > 0.9
    assert done.losses[-1] < done.losses[0]
    head = seeded_head(TinyHead, 0)
    items = planted(shuffled=True)
    fit(head, items, TRAIN, VALIDATION, accuracy, CONFIG)
    # 30 items at chance of 1/3: more than 60 % has a probability below 0.003.
    assert accuracy(predictions(head, items, TEST, 0.0), items.rows(TEST)) < 0.6


def test_one_step_is_adam_on_the_clipped_gradient() -> None:
    config = FitConfig(epochs=1, batch_size=60, learning_rate=0.1, max_gradient_norm=0.01)
    head, twin = seeded_head(TinyHead, 0), seeded_head(TinyHead, 0)
    twin.dropout.p = head.dropout.p = 0.0
    items = planted()
    fit(head, items, TRAIN, (), accuracy, config)
    loss = twin.loss(items.rows(TRAIN), 0.0)
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.01
    for parameter, before, gradient in zip(head.parameters(), twin.parameters(), gradients, strict=True):
        clipped = gradient * 0.01 / (norm + 1e-6)
        # Adam's first step, bias corrected: m = g, v = g^2.
        expected = before - 0.1 * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


class StoppedError(Exception):
    """A training that is interrupted."""


def stop(what: str, done: int, total: int) -> None:
    if done in (2, 4):
        raise StoppedError


def test_a_stopped_training_goes_on_exactly(tmp_path: Path) -> None:
    whole, done = trained()
    for _ in range(2):
        with pytest.raises(StoppedError):
            trained(folder=tmp_path / "run", progress=stop)
    resumed, same = trained(folder=tmp_path / "run")
    assert same == done
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    # And a finished one is only read.
    again, same = trained(folder=tmp_path / "run")
    assert same == done
    assert again.seen == []


def test_the_best_validation_epoch_is_kept_the_earlier_one_of_two() -> None:
    told = iter([0.1, 0.7, 0.3, 0.7, float("nan"), 0.2])
    weights: list[Tensor] = []
    head = seeded_head(TinyHead, 0)

    def score(found: dict[str, Tensor], rows: Rows) -> float:
        weights.append(head.linear.weight.detach().clone())
        return next(told)

    done = fit(head, planted(), TRAIN, VALIDATION, score, CONFIG)
    assert (done.best_epoch, done.progress) == (2, 1 / 6)
    assert torch.equal(head.linear.weight, weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not head.training


def test_patience_ends_a_training_and_progress_is_told_to_the_head() -> None:
    head = seeded_head(TinyHead, 0)
    config = dataclasses.replace(CONFIG, patience=2, epochs=5)
    done = fit(head, planted(), TRAIN, VALIDATION, lambda found, rows: 0.5, config)
    assert (len(done.losses), done.best_epoch) == (3, 1)
    assert sorted(set(head.seen)) == [0.0, 0.2, 0.4]


class Watched(TinyHead):
    """Its gradient is constant, so that Adam moves by the learning rate itself."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[float] = []

    def loss(self, rows: Rows, progress: float) -> Tensor:
        return self.linear.weight.sum() + 0 * self.linear.bias.sum()

    def predict(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        self.places.append(self.linear.weight[0, 0].item())
        return super().predict(rows, progress)


def test_the_rate_falls_at_milestones() -> None:
    head = seeded_head(Watched, 0)
    assert isinstance(head, Watched)
    places = [head.linear.weight[0, 0].item()]
    fit(head, planted(), TRAIN, VALIDATION, accuracy, FitConfig(epochs=4, batch_size=60, milestones=(1, 3), decay=0.1))
    places += head.places
    moved = [before - after for before, after in itertools.pairwise(places)]
    assert moved == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5], rel=0.05)


def test_errors(tmp_path: Path) -> None:
    items, head = planted(), seeded_head(TinyHead, 0)
    with pytest.raises(HeadError, match=r"same number of rows, got .*'y': 3"):
        ItemsInMemory({"x": torch.zeros(2, 4), "y": torch.zeros(3)})
    with pytest.raises(HeadError, match="training items: must be at least 1"):
        fit(head, items, (), VALIDATION, accuracy)
    with pytest.raises(HeadError, match="validation items: must be none that are trained on"):
        fit(head, items, (1, 2), (2,), accuracy)
    with pytest.raises(HeadError, match="epochs: must be at least 1, got 0"):
        FitConfig(epochs=0)
    with pytest.raises(HeadError, match="learning_rate: must be positive and finite, got nan"):
        FitConfig(learning_rate=float("nan"))
    with pytest.raises(HeadError, match="the loss in epoch 1: must be finite, got nan"):
        fit(head, ItemsInMemory({"x": torch.full((4, 4), torch.nan), "y": torch.zeros(4).long()}), (0,), (), accuracy)
    trained(folder=tmp_path)
    with pytest.raises(HeadError, match="same training, got another learning_rate, seed; choose another folder"):
        trained(dataclasses.replace(CONFIG, learning_rate=0.1, seed=4), folder=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(HeadError, match="must hold the state of a training"):
        trained(folder=tmp_path)
