"""Rows of cards on the report: units, words and signs, of every task that can be on a card."""

import dataclasses
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from cmacc.heads.event_recipes import EVENT_RECIPES
from cmacc.heads.event_results import AUROCS
from cmacc.heads.fusion import FusionMethod
from cmacc.heads.sentiment_metrics import class_metrics, emotion_metrics, sentiment_metrics
from cmacc.transfer import RECIPES, Result
from cmacc.viewer import results

_ROW = Result(
    task="ave",
    protocol="cmbs",
    modality="both",
    metric="accuracy",
    value=0.68,
    untrained=0.41,
    chance=0.178,
    count=402,
    version=1,
    windows=10,
    crops=1,
    low=0.65,
    high=0.71,
    by_split={"seed 0": 0.68},
)


def _row(**changes: Any) -> Result:
    return dataclasses.replace(_ROW, **changes)


def test_everything_that_heads_can_put_on_a_card_has_words() -> None:
    assert {"ave", "fusion", "emotion", "instruments"} <= results.TASKS.keys()
    assert {*RECIPES, *EVENT_RECIPES, *get_args(FusionMethod)} == results.PROTOCOLS.keys()
    numbers, yes = np.asarray([0.5, -1.0, 2.0]), np.asarray([[True, False], [False, True]])
    found = {
        *sentiment_metrics(numbers, numbers),
        *class_metrics(np.asarray([0, 1]), np.asarray([0, 1])),
        *(name.partition("/")[0] for name in emotion_metrics(yes, yes, ["a", "b"])),
        *AUROCS.values(),
        "UAR",
    }
    assert found <= results.METRICS.keys()
    # Of the metrics of one task, no two have the same words.
    assert len({results.METRICS[name] for name in sentiment_metrics(numbers, numbers)}) == 11


@pytest.mark.usefixtures("users_checks")
def test_rows_of_a_protocol_stand_together_and_labels_after_their_mean() -> None:
    rows = [
        _row(protocol=protocol, metric=metric)
        for protocol in ("new", "cmbs_weak", "newer", "linear")
        for metric in ("gate AUROC", "f1/label 10", "f1/label 2", "f1", "accuracy")
    ]
    run: Any = SimpleNamespace(card=SimpleNamespace(results=rows))
    (found,) = results.results_by_task(run).values()
    assert [one.protocol for one in found] == [
        name for name in ("linear", "cmbs_weak", "new", "newer") for _ in range(5)
    ]
    assert [one.metric for one in found[:5]] == ["accuracy", "gate AUROC", "f1", "f1/label 10", "f1/label 2"]


@pytest.mark.parametrize(
    ("metric", "value", "untrained", "sign"),
    [
        # 402 items: the standard error of the difference of shares is about 0.034.
        ("accuracy", 0.68, 0.41, "up"),
        ("accuracy", 0.68, 0.63, "level"),
        ("UAR", 0.41, 0.68, "down"),
        # The interval 0.65 to 0.71 says a standard error of 0.015, and 0.022 of the difference.
        ("gate AUROC", 0.68, 0.62, "up"),
        ("gate AUROC", 0.68, 0.645, "level"),
        ("triplets", 0.68, 0.63, "up"),
        ("triplets", 0.68, 0.645, "level"),
        ("pearson", 0.68, 0.75, "down"),
        ("mae", 0.68, 0.75, "up"),
        ("mae", 0.68, 0.62, "down"),
        ("mae", 0.68, 0.70, "level"),
        ("median_rank", 3.0, 3.5, "up"),
        ("median_rank", 3.5, 3.0, "down"),
        ("median_rank", 3.5, 3.5, "level"),
        ("accuracy", float("nan"), 0.2, "level"),
        ("accuracy", 0.68, None, ""),
    ],
)
def test_a_gain_is_one_beyond_its_error(metric: str, value: float, untrained: float | None, sign: str) -> None:
    assert results.verdict(_row(metric=metric, value=value, untrained=untrained)) == sign


def test_conditions_are_those_of_all_or_of_named_protocols() -> None:
    base = ("ceiling=82.2 %", "leaks=8")
    one = [_row(settings=base), _row(settings=base, metric="gate AUROC")]
    assert results.conditions([_row()]) == []
    assert results.conditions(one) == ["ceiling=82.2 %, leaks=8"]
    weak = _row(protocol="cmbs_weak", settings=(*base, "epochs=2"))
    assert results.conditions([*one, _row(protocol="linear", settings=base), weak, _row(protocol="knn")]) == [
        "CMBS; Linear probe: ceiling=82.2 %, leaks=8",
        "CMBS, weakly supervised: ceiling=82.2 %, leaks=8, epochs=2",
    ]
