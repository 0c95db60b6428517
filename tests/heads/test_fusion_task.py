"""Task ``fusion``: from a file of sequences to a card; its rows against recomputation, standardisation, resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmacc.heads import fusion_task as module
from cmacc.heads.fusion_task import FusionOptions, evaluate_fusion, standardised, task_of
from cmacc.heads.sentiment_metrics import sentiment_metrics
from cmacc.heads.sequences import SequenceError, read_sequences
from cmacc.transfer.card import Card, CardError
from cmacc.transfer.tasks import TaskError

COUNTS = {"train": 90, "valid": 30, "test": 40}


def write(path: Path, kind: str = "sentiment", shuffled: bool = False, **more: Any) -> Path:
    """Sentiment is the mean over time of text's first feature plus that of sound's; their scales differ much."""
    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {}
    for split, count in COUNTS.items():
        text, sound = rng.normal(size=(count, 5, 4)), rng.normal(size=(count, 5, 3))
        level = rng.normal(size=(2, count, 1))
        text[..., 0] += level[0]
        sound[..., 0] += level[1]
        target = np.clip(level.sum(0)[:, 0], -3, 3)
        target = rng.permutation(target) if shuffled else target
        labels = {
            "sentiment": target.astype(np.float32),
            "classes": (target > 0).astype(np.int64),
            "labels": np.stack([target > 0, target > 1], 1).astype(np.int64),
        }[kind]
        arrays |= {
            f"{split}/text": text.astype(np.float32),
            f"{split}/sound": (1000 + 50 * sound).astype(np.float32),
            f"{split}/labels": labels,
            f"{split}/lengths/sound": np.full(count, 4),
        }
    np.savez(path, **(arrays | more))
    return path


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sequences") / "sentiment.npz")


def test_features_are_standardised_by_the_valid_steps_of_the_training_part(sentiment: Path) -> None:
    data = read_sequences(sentiment)
    found = standardised(data)
    train = data.splits["train"]
    sound = data.features["sound"].astype(np.float64)
    steps = sound[train, :4].reshape(-1, 3)
    np.testing.assert_allclose(found.features["sound"], (sound - steps.mean(0)) / steps.std(0), rtol=1e-4, atol=1e-4)
    constant = read_sequences(write(sentiment.with_name("constant.npz"), **{f"{s}/text": np.ones((n, 5, 2), np.float32)
                                                                           for s, n in COUNTS.items()}))  # fmt: skip
    assert np.abs(standardised(constant).features["text"]).max() == 0


def test_a_card_has_the_metrics_of_each_seed_and_a_stopped_evaluation_goes_on(
    sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: list[np.ndarray] = []
    real = module._predicted
    monkeypatch.setattr(module, "_predicted", lambda *given: predicted.append(real(*given)) or predicted[-1])
    options = FusionOptions(seeds=(0, 3), epochs=12)
    card = evaluate_fusion(sentiment, tmp_path / "card", methods=("late",), options=options)
    targets = read_sequences(sentiment).targets[120:, 0]
    expected = [sentiment_metrics(outputs[:, 0], targets) for outputs in predicted]
    rows = {row.metric: row for row in card.results}
    assert rows.keys() == expected[0].keys()
    for name, row in rows.items():
        assert row.by_split == pytest.approx({"seed 0": expected[0][name], "seed 3": expected[1][name]})
        assert row.value == pytest.approx((expected[0][name] + expected[1][name]) / 2)
        assert row.low <= row.value <= row.high
        assert (row.task, row.protocol, row.count, row.settings) == ("fusion", "late", 40, ("epochs=12",))
    assert rows["pearson"].value > 0.6
    assert rows["pearson"].low > 0.2
    assert rows["pearson"].chance == 0
    median = np.median(read_sequences(sentiment).targets[:90])
    assert rows["mae"].chance == pytest.approx(np.abs(targets - median).mean(), rel=1e-6)
    assert Card.read(tmp_path / "card" / "card.json") == card
    page = (tmp_path / "card" / "card.md").read_text()
    assert f"| mae | {rows['mae'].value:.3f} [{rows['mae'].low:.3f}, {rows['mae'].high:.3f}] |" in page
    assert f"| acc7 | {100 * rows['acc7'].value:.1f} % [" in page
    assert not (tmp_path / "card" / "heads").exists()

    def stop(what: str, done: int, total: int) -> None:
        if "seed 3" in what and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_fusion(sentiment, tmp_path / "again", methods=("late",), options=options, progress=stop)
    told: list[tuple[str, int, int]] = []
    again = evaluate_fusion(
        sentiment, tmp_path / "again", methods=("late",), options=options, progress=lambda *done: told.append(done)
    )
    assert [row.by_split for row in again.results] == [row.by_split for row in card.results]
    assert [done for _, done, _ in told] == list(range(6, 13))  # nothing of seed 0, and what was left of seed 3


@pytest.mark.parametrize(("kind", "metric", "floor"), [("classes", "uar", 0.7), ("labels", "weighted_accuracy", 0.65)])
def test_classes_and_labels(kind: str, metric: str, floor: float, tmp_path: Path) -> None:
    options = FusionOptions(seeds=(0,), epochs=80)  # of three steps each
    found = {}
    for shuffled in (False, True):
        data = write(tmp_path / f"{shuffled}.npz", kind, shuffled)
        card = evaluate_fusion(data, tmp_path / f"card {shuffled}", methods=("early",), options=options)
        found[shuffled] = {row.metric: row for row in card.results}[metric]
    assert found[False].value > floor
    # Of 40 items: more has a probability below 0.01 at chance of a half.
    assert found[True].value < 0.69
    assert found[True].chance == 0.5


def test_errors(sentiment: Path, tmp_path: Path, users_checks: None) -> None:
    with pytest.raises(TaskError, match=r"protocol must be one of early, late, .* got loudest"):
        evaluate_fusion(sentiment, tmp_path, methods=("loudest",))  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="--seeds must be different numbers"):
        FusionOptions(seeds=(1, 1))
    with pytest.raises(TaskError, match="--epochs must be at least 1, got 0"):
        FusionOptions(epochs=0)
    several = {f"{split}/labels": np.full((count, 2), 0.5, np.float32) for split, count in COUNTS.items()}
    with pytest.raises(SequenceError, match="several targets an item must be labels of 0 and 1"):
        task_of(read_sequences(write(tmp_path / "several.npz", **several)))
    one = {f"{split}/labels": np.zeros(count, np.int64) for split, count in COUNTS.items()}
    with pytest.raises(SequenceError, match="at least 2 classes, got 1"):
        task_of(read_sequences(write(tmp_path / "one.npz", **one)))
    strong = {f"{split}/labels": np.full(count, -3.5, np.float32) for split, count in COUNTS.items()}
    with pytest.raises(SequenceError, match=r"sentiment and must be in \[-3, 3\], got 3.5 in magnitude"):
        task_of(read_sequences(write(tmp_path / "strong.npz", **strong)))
    options = FusionOptions(seeds=(0,), epochs=1)
    evaluate_fusion(sentiment, tmp_path / "card", methods=("late",), options=options)
    before = json.loads((tmp_path / "card" / "card.json").read_text())
    with pytest.raises(CardError, match="holds late of task fusion already"):
        evaluate_fusion(sentiment, tmp_path / "card", methods=("late", "early"), options=options)
    assert json.loads((tmp_path / "card" / "card.json").read_text()) == before
    more = evaluate_fusion(sentiment, tmp_path / "card", methods=("early",), options=options)
    assert {row.protocol for row in more.results} == {"late", "early"}
