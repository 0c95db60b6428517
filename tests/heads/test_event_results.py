"""Numbers of the card against loops over seconds and resamples, with scikit-learn's AUROC."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cmacc.heads import event_results
from cmacc.heads.event_results import auroc_summary, summaries

BACKGROUND = 3


def made(rows: int = 7, seeds: int = 2) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.full((rows, 10), BACKGROUND)
    for row in range(rows):
        labels[row, row % 4 : 10 - row % 3] = row % BACKGROUND
    labels[0] = 0  # no background
    predicted = [
        {
            "classes": torch.where(torch.rand(rows, 10, generator=generator) < 0.6, labels, 1),
            "gates": torch.randint(5, (rows, 10), generator=generator) / 5,  # with ties
        }
        for _ in range(seeds)
    ]
    return labels, predicted


def test_accuracy_is_the_share_of_right_seconds() -> None:
    labels, predicted = made()
    videos = np.asarray([0, 1, 2, 2, 3, 4, 5])
    found = summaries(predicted, labels, BACKGROUND, videos)["accuracy"]
    for value, of_seed in zip(found.by_split, predicted, strict=True):
        right = sum(int(of_seed["classes"][i, t] == labels[i, t]) for i in range(7) for t in range(10))
        assert value == pytest.approx(right / 70)
    assert found.value == pytest.approx(np.mean(found.by_split))
    assert found.chance == pytest.approx(sum(int(x) == BACKGROUND for x in labels.flatten()) / 70)
    assert found.count == 7
    assert found.low < found.value < found.high
    alone = summaries(predicted, labels, BACKGROUND, np.zeros(7, np.int64))["accuracy"]
    assert alone.low == pytest.approx(alone.value)
    assert alone.high == pytest.approx(alone.value)


def test_gates_are_resampled_by_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_results, "_RESAMPLES", 40)
    labels, predicted = made()
    event = labels != BACKGROUND
    videos = np.asarray([0, 1, 2, 2, 3, 4, 5])
    gates = [of_seed["gates"] for of_seed in predicted]
    found = auroc_summary(gates, event, videos)
    truth = event.flatten().numpy()
    assert found.by_split == pytest.approx([roc_auc_score(truth, g.flatten().numpy()) for g in gates])
    assert found.value == pytest.approx(np.mean(found.by_split))
    generator, values = np.random.default_rng(0), []
    for _ in range(40):
        drawn = generator.integers(6, size=6)
        rows = [row for video in drawn for row in np.flatnonzero(videos == video)]
        resampled = event[rows].flatten().numpy()
        values.append(np.mean([roc_auc_score(resampled, g[rows].flatten().numpy()) for g in gates]))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_where_gates_have_nothing_to_tell_apart() -> None:
    labels, predicted = made()
    videos = np.arange(7)
    assert list(summaries(predicted, labels, BACKGROUND, videos)) == ["accuracy", "gate AUROC"]
    for same in (torch.zeros_like(labels), torch.full_like(labels, BACKGROUND)):
        assert list(summaries(predicted, same, BACKGROUND, videos)) == ["accuracy"]
    both = [{**of_seed, "event": 1 - of_seed["gates"]} for of_seed in predicted]
    found = summaries(both, labels, BACKGROUND, videos)
    assert list(found) == ["accuracy", "event AUROC", "gate AUROC"]
    assert found["event AUROC"].value == pytest.approx(1 - found["gate AUROC"].value)
    without = [{"classes": of_seed["classes"]} for of_seed in predicted]
    assert list(summaries(without, labels, BACKGROUND, videos)) == ["accuracy"]
