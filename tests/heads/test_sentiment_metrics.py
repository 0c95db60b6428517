"""The metrics of MOSI and MOSEI against a vector run through MMSA, scikit-learn, SciPy and cases worked out by hand."""

import math

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from cmacc.heads.sentiment_metrics import SentimentMetricsError, class_metrics, emotion_metrics, sentiment_metrics

# As run through MMSA's regression mode; of zero_negative, by hand (NEIGHBOURS, section 8).
PREDICTED = np.array([-1.0, 0.0, 0.5, -0.2, 2.6, 0.0])
TRUE = np.array([-1.0, 0.0, 1.5, 0.2, 3.0, 1.0])


def sentiment(seed: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Labels in thirds, many of them 0, and predictions some of which are 0 or out of range."""
    rng = np.random.default_rng(seed)
    true = np.round(rng.normal(0, 1.5, count).clip(-3, 3) * 3) / 3
    return (true + rng.normal(0, 1.5, count)).round(1), true


def test_the_vector_of_mmsa() -> None:
    metrics = sentiment_metrics(PREDICTED, TRUE)
    expected = {
        "acc2_has0": 0.8333, "f1_has0": 0.8519, "acc2_non0": 0.6, "f1_non0": 0.6333, "acc2_zero_negative": 0.6667,
        "acc7": 0.6667, "acc5": 0.6667, "mae": 0.4667, "pearson": 0.9482,
    }  # fmt: skip
    assert {name: round(metrics[name], 4) for name in expected} == expected


@pytest.mark.parametrize("seed", range(3))
def test_all_forms_against_scikit_learn(seed: int) -> None:
    p, y = sentiment(seed)
    kept = y != 0
    assert 0 < kept.sum() < len(y)
    assert (p == 0).any()
    metrics = sentiment_metrics(p, y)
    forms = {"has0": (y >= 0, p >= 0), "non0": (y[kept] > 0, p[kept] > 0), "zero_negative": (y > 0, p > 0)}
    for form, (truly, said) in forms.items():
        assert metrics[f"acc2_{form}"] == pytest.approx(accuracy_score(truly, said))
        assert metrics[f"f1_{form}"] == pytest.approx(f1_score(truly, said, average="weighted"))
    assert metrics["f1_has0_positive"] == pytest.approx(f1_score(y >= 0, p >= 0))
    assert metrics["pearson"] == pytest.approx(pearsonr(p, y).statistic)
    assert len({metrics[f"acc2_{form}"] for form in forms}) == 3


def test_the_forms_differ_in_what_zero_is() -> None:
    # One item each: a positive, a negative, two zeros, all predicted as slightly negative but the positive.
    metrics = sentiment_metrics(np.array([1.0, -1.0, -0.1, -0.1]), np.array([1.0, -1.0, 0.0, 0.0]))
    assert (metrics["acc2_has0"], metrics["acc2_non0"], metrics["acc2_zero_negative"]) == (0.5, 1.0, 1.0)


def test_halves_are_rounded_to_even_after_clipping() -> None:
    p = np.array([0.5, -0.5, 1.5, 2.5, 3.6, -9.0])
    y = np.array([0.0, 0.0, 2.0, 2.0, 3.0, -3.0])
    assert sentiment_metrics(p, y)["acc7"] == 1.0
    # With halves away from zero, 2.5 would be 3.
    assert sentiment_metrics(np.array([2.5, 1.0]), np.array([3.0, 1.0]))["acc7"] == 0.5
    # Acc-5 does not tell 2 from 3.
    assert sentiment_metrics(np.array([2.5, 1.0]), np.array([3.0, 1.0]))["acc5"] == 1.0


def test_what_is_not_defined_is_nan() -> None:
    metrics = sentiment_metrics(np.full(3, 0.1), np.array([0.0, 1.0, -1.0]))
    assert [name for name, value in metrics.items() if math.isnan(value)] == ["pearson"]
    metrics = sentiment_metrics(np.array([0.1, -0.1]), np.zeros(2))
    assert {name for name, value in metrics.items() if math.isnan(value)} == {"pearson", "acc2_non0", "f1_non0"}


def test_a_constant_with_rounding_noise_in_its_mean_has_no_correlation() -> None:
    assert math.isnan(sentiment_metrics(np.full(7, 0.1), np.linspace(-3, 3, 7))["pearson"])


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (np.zeros(2), np.zeros(3), r"true: must have shape .* got \(3,\) against \(2,\)"),
        (np.zeros((2, 1)), np.zeros((2, 1)), r"predicted: must have shape \(n,\).* got \(2, 1\)"),
        (np.zeros(0), np.zeros(0), "n at least 1"),
        (np.array([np.nan, 0.0]), np.zeros(2), "predicted: must be finite, got 1 value"),
        (np.zeros(2), np.array([0.0, -3.5]), r"true: sentiment must be in \[-3, 3\], got -3.5"),
    ],
)
def test_bad_sentiment_is_refused(predicted: np.ndarray, true: np.ndarray, message: str) -> None:
    with pytest.raises(SentimentMetricsError, match=message):
        sentiment_metrics(predicted, true)


def test_emotions_against_scikit_learn_and_tongs_formula() -> None:
    rng = np.random.default_rng(0)
    true = rng.random((80, 3)) < [0.1, 0.5, 0.8]
    predicted = true ^ (rng.random((80, 3)) < 0.3)
    metrics = emotion_metrics(predicted, true, ["fear", "happy", "sad"])
    for index, name in enumerate(["fear", "happy", "sad"]):
        p, y = predicted[:, index], true[:, index]
        positives, negatives = y.sum(), (~y).sum()
        tong = ((p & y).sum() * negatives / positives + (~p & ~y).sum()) / (2 * negatives)
        assert metrics[f"weighted_accuracy/{name}"] == pytest.approx(tong)
        assert metrics[f"weighted_accuracy/{name}"] == pytest.approx(balanced_accuracy_score(y, p))
        assert metrics[f"accuracy/{name}"] == pytest.approx(accuracy_score(y, p))
        assert metrics[f"f1/{name}"] == pytest.approx(f1_score(y, p, average="weighted"))
        assert metrics[f"f1_positive/{name}"] == pytest.approx(f1_score(y, p))
    assert metrics["f1"] == pytest.approx(np.mean([metrics[f"f1/{name}"] for name in ("fear", "happy", "sad")]))


def test_saying_no_to_a_rare_emotion_looks_good_but_for_the_weighted_accuracy() -> None:
    true = np.arange(20)[:, None] == 0
    metrics = emotion_metrics(np.zeros((20, 1), bool), true, ["fear"])
    assert metrics["accuracy"] == 0.95
    assert metrics["f1"] == pytest.approx(0.95 * 2 * 19 / 39)
    assert (metrics["weighted_accuracy"], metrics["f1_positive"]) == (0.5, 0.0)


def test_the_recall_of_an_emotion_that_no_item_has_is_nan() -> None:
    metrics = emotion_metrics(np.zeros((3, 1), bool), np.zeros((3, 1), bool), ["fear"])
    assert math.isnan(metrics["weighted_accuracy/fear"])
    assert math.isnan(metrics["f1_positive"])


@pytest.mark.parametrize(
    ("predicted", "names", "message"),
    [
        (np.zeros((3, 1), bool), ["a", "b"], "got \\(3, 1\\), \\(3, 2\\) and 2 names"),
        (np.zeros((3, 2), bool), ["a"], "and 1 names"),
        (np.zeros((3, 2), bool), ["a", "a"], "names must differ, got a, a"),
    ],
)
def test_bad_emotions_are_refused(predicted: np.ndarray, names: list[str], message: str) -> None:
    with pytest.raises(SentimentMetricsError, match=message):
        emotion_metrics(predicted, np.zeros((3, 2), bool), names)


def test_classes_against_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    true = rng.integers(0, 4, 90)
    predicted = np.where(rng.random(90) < 0.5, true, rng.integers(0, 5, 90))
    metrics = class_metrics(predicted, true)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert metrics["f1"] == pytest.approx(f1_score(true, predicted, average="weighted"))
    expected = np.mean([(predicted[true == one] == one).mean() for one in range(4)])
    assert metrics["uar"] == pytest.approx(expected)


def test_uar_gives_every_class_the_same_weight() -> None:
    # Nine items of class 0, all right; one of class 7, wrong.
    metrics = class_metrics(np.zeros(10, np.int64), np.array([0] * 9 + [7]))
    assert (metrics["accuracy"], metrics["uar"]) == (0.9, 0.5)


def test_bad_classes_are_refused() -> None:
    with pytest.raises(SentimentMetricsError, match="true: must have shape"):
        class_metrics(np.zeros(2, np.int64), np.zeros(1, np.int64))
