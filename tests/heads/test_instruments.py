"""Prototypes by brute force, scores against scikit-learn, planted towers told apart by the report."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, top_k_accuracy_score
from torch import Tensor, nn

from cmacc.clips import ClipSpec
from cmacc.heads.instrument_ontology import TINYSOL_CLASSES, InstrumentError, instruments
from cmacc.heads.instruments import (
    PROMPTS,
    class_scores,
    prompt_embeddings,
    prompt_texts,
    prototype_accuracy,
    prototype_cosines,
    tower_report,
)
from cmacc.transfer.protocols import Rows, zero_shot

COUNTS = (69, 10, 11, 13, 29, 13, 31, 12, 13, 11, 12, 10, 31, 28)  # TinySOL's, a tenth
LABELS = np.repeat(np.arange(14), COUNTS)


def planted(seed: int, width: int = 40, noise: float = 0.1) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Directions of the classes that keep the tree, and sounds around them."""
    rng = np.random.default_rng(seed)
    paths = [(*instruments()[name].path, name) for name in TINYSOL_CLASSES]
    nodes = {path[:depth]: rng.normal(size=width) for path in paths for depth in range(1, 6)}
    basis = dict(zip(nodes, np.linalg.qr(rng.normal(size=(width, width)))[0], strict=False))
    centres = np.stack([sum(basis[path[:depth]] for depth in range(1, 6)) for path in paths])
    sounds = centres[LABELS] + noise * rng.normal(size=(len(LABELS), width))
    return centres.astype(np.float32), sounds.astype(np.float32)


def noise_rows(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_prototypes_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), (2, 3, 5, 6)))
    rows = rng.normal(size=(16, 7)) + np.eye(4, 7)[labels] * 1.5
    for form, own_left_out, normalised in (("leave_one_out", True, True), ("published", False, False)):
        expected = np.empty((16, 4))
        for i in range(16):
            for c in range(4):
                members = [
                    rows[j] / (math.sqrt(float(rows[j] @ rows[j])) if normalised else 1.0)
                    for j in range(16)
                    if labels[j] == c and not (own_left_out and j == i)
                ]
                mean = sum(members) / len(members)
                expected[i, c] = rows[i] @ mean / math.sqrt(float(rows[i] @ rows[i]) * float(mean @ mean))
        found = prototype_cosines(rows, labels, 4, form)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, atol=1e-9)
        right = float((expected.argmax(axis=1) == labels).mean())
        assert prototype_accuracy(rows, labels, 4, form) == right  # type: ignore[arg-type]


def test_prototypes_with_the_sound_itself_flatter_noise() -> None:
    """Pure noise, 14 classes of 208 sounds: left out, accuracy is at chance; the published form is far above it."""
    rows = noise_rows(1, 14 * 15, 256)
    labels = np.repeat(np.arange(14), 15)
    spread = math.sqrt(1 / 14 * 13 / 14 / len(labels))
    assert abs(prototype_accuracy(rows, labels, 14) - 1 / 14) < 4 * spread  # four standard errors
    assert prototype_accuracy(rows, labels, 14, "published") > 0.9


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(len(LABELS), 14)) + 1.2 * np.eye(14)[LABELS]
    found = class_scores(scores, LABELS)
    one_hot = np.eye(14, dtype=int)[LABELS]
    for k in range(1, 6):
        assert found.top_k[k - 1] == pytest.approx(top_k_accuracy_score(LABELS, scores, k=k))
    assert found.weighted_f1 == pytest.approx(f1_score(LABELS, scores.argmax(axis=1), average="weighted"))
    assert found.roc_auc == pytest.approx(roc_auc_score(one_hot, scores, average="macro"))
    assert found.pr_auc == pytest.approx(average_precision_score(one_hot, scores, average="macro"))
    assert found.correct.mean() == found.top_k[0]
    assert list(found.numbers) == ["top-1", "top-2", "top-3", "top-4", "top-5", "weighted F1", "ROC-AUC", "PR-AUC"]


def test_classes_without_a_sound_are_candidates_only() -> None:
    scores = np.asarray([[0.9, 0.1, 1.0], [0.2, 0.8, 0.0], [0.1, 0.7, 0.0]])
    found = class_scores(scores, np.asarray([0, 1, 1]))
    assert found.top_k == (pytest.approx(2 / 3), 1.0, 1.0)
    assert found.roc_auc == found.pr_auc == 1.0


def test_bad_embeddings_are_told() -> None:
    rows, labels = noise_rows(0, 6, 3), np.asarray([0, 0, 1, 1, 2, 2])
    with pytest.raises(InstrumentError, match="class 2 must have at least 2 sounds, got 1; leave the class out"):
        prototype_cosines(rows[:5], labels[:5], 3)
    assert prototype_cosines(rows[:5], labels[:5], 3, "published").shape == (5, 3)
    with pytest.raises(InstrumentError, match="class 3 must have at least 1 sounds, got 0"):
        prototype_cosines(rows, labels, 4, "published")
    with pytest.raises(InstrumentError, match="embeddings: must be finite, got NaN or infinity in 1 of 6 rows"):
        prototype_cosines(np.where(rows == rows[0, 0], np.inf, rows), labels, 3)
    with pytest.raises(InstrumentError, match=r"labels: must be in \[0, 2\), got 0 to 2"):
        prototype_cosines(rows, labels, 2)
    with pytest.raises(InstrumentError, match="labels: must be of at least 2 classes, got 1"):
        class_scores(rows, np.zeros(6, np.int64))
    with pytest.raises(
        InstrumentError, match=r"text_joint: must have shape \(templates, 3, width\), .*, got \(1, 2, 3\)"
    ):
        tower_report(None, rows, noise_rows(0, 1, 2, 3), labels, ["violin", "viola", "oboe"])


@pytest.mark.usefixtures("users_checks")
def test_rows_without_labels_and_unknown_forms_are_told() -> None:
    rows, labels = noise_rows(0, 6, 3), np.asarray([0, 0, 1, 1, 2, 2])
    with pytest.raises(InstrumentError, match=r"embeddings: must have a row for each of 5 labels, got shape \(6, 3\)"):
        prototype_cosines(rows, labels[:5], 3)
    with pytest.raises(InstrumentError, match="form must be one of leave_one_out, published, got 'loo'"):
        prototype_cosines(rows, labels, 3, "loo")  # type: ignore[arg-type]


def test_perfect_towers_score_one() -> None:
    centres, sounds = planted(0)
    report = tower_report(sounds, sounds, centres[None], LABELS, TINYSOL_CLASSES, text_before=centres[None])
    for scores in (report.audio_before, report.audio_joint, report.zero_shot):
        assert scores is not None
        assert scores.top_k == (1.0,) * 5
        assert scores.weighted_f1 == scores.roc_auc == 1.0
        assert scores.pr_auc == pytest.approx(1.0)
    assert report.triplet_count == 686
    for kept in (report.audio_before_triplets, report.audio_joint_triplets, report.text_joint_triplets):
        assert kept == 1.0
    assert report.lost_in_text == report.lost_in_projection == 0.0
    assert (report.count, report.chance) == (293, 1 / 14)
    assert report.majority == 69 / 293
    assert list(report.rows) == [
        "audio before the joint space",
        "audio in the joint space",
        "text before the joint space",
        "zero-shot: text in the joint space",
    ]
    assert report.rows["text before the joint space"] == {"triplets": 1.0}


def test_random_towers_are_at_chance() -> None:
    """Balanced labels; top-1 within four standard errors of 1/14, AUC within 0.1 of one half."""
    labels = np.repeat(np.arange(14), 20)
    report = tower_report(None, noise_rows(3, 280, 64), noise_rows(4, 1, 14, 64), labels, TINYSOL_CLASSES)
    spread = math.sqrt(1 / 14 * 13 / 14 / 280)
    for scores in (report.audio_joint, report.zero_shot):
        assert abs(scores.top_k[0] - 1 / 14) < 4 * spread
        assert abs(scores.roc_auc - 0.5) < 0.1
    assert report.lost_in_projection is None
    assert "audio before the joint space" not in report.rows


def test_the_report_tells_which_tower_is_weak() -> None:
    centres, sounds = planted(1)
    shuffled = centres[np.random.default_rng(5).permutation(14)]
    noise = noise_rows(6, *sounds.shape)
    bad_text = tower_report(sounds, sounds, shuffled[None], LABELS, TINYSOL_CLASSES)
    assert bad_text.audio_joint.top_k[0] == bad_text.audio_joint_triplets == 1.0
    assert bad_text.lost_in_projection == 0.0
    assert bad_text.lost_in_text > 0.5
    assert bad_text.text_joint_triplets is not None
    assert bad_text.text_joint_triplets < 0.75
    bad_audio = tower_report(noise, noise, centres[None], LABELS, TINYSOL_CLASSES)
    assert bad_audio.text_joint_triplets == 1.0
    assert bad_audio.audio_joint.top_k[0] < 0.3
    assert bad_audio.zero_shot.top_k[0] < 0.3
    bad_projection = tower_report(sounds, noise, centres[None], LABELS, TINYSOL_CLASSES)
    assert bad_projection.lost_in_projection is not None
    assert bad_projection.lost_in_projection > 0.5
    assert abs(bad_projection.lost_in_text) < 0.3


def test_zero_shot_is_that_of_the_protocol() -> None:
    texts, sounds = noise_rows(7, 3, 14, 24), noise_rows(8, 293, 24)
    report = tower_report(None, sounds, texts, LABELS, TINYSOL_CLASSES)
    protocol = zero_shot(Rows(sounds[:, None], LABELS, np.arange(293)), texts)
    assert [metric.value for metric in protocol] == [report.zero_shot.top_k[0], report.zero_shot.top_k[4]]
    np.testing.assert_array_equal(protocol[0].per_item, report.zero_shot.correct)


def test_classes_that_the_ontology_does_not_know_make_no_triplets() -> None:
    labels = np.repeat(np.arange(4), 3)
    names = ["violin", "theremin", "viola", "oboe"]
    report = tower_report(None, noise_rows(9, 12, 8), noise_rows(10, 1, 4, 8), labels, names)
    assert report.triplet_count == 2
    none = tower_report(None, noise_rows(9, 12, 8), noise_rows(10, 1, 4, 8), labels, ["a", "b", "c", "violin"])
    assert none.triplet_count == 0
    assert none.text_joint_triplets is None


class Texts(nn.Module):
    """An encoder whose text side gives each text's length and number of vowels."""

    modalities = ("audio",)
    text_modalities = ("audio",)
    spec = ClipSpec()
    device = torch.device("cpu")

    def embed_video(self, frames: Tensor) -> Tensor:
        raise AssertionError("it has no eyes")

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        return waveforms[:, :2]

    def encode_text(self, texts: list[str], modality: str) -> Tensor:
        return torch.tensor([[float(len(text)), float(sum(text.count(v) for v in "aeiou"))] for text in texts])


def test_prompts() -> None:
    assert prompt_texts("track", ["bass tuba"]) == ["A bass tuba track"]
    assert prompt_texts("negated", ["oboe"]) == ["A no oboe track"]
    assert prompt_texts("recording", ["oboe"]) == ["This is a recording of oboe"]
    assert prompt_texts("solo", ["oboe"]) == ["Solo musical instrument sound of oboe"]
    drawn = prompt_texts("random", TINYSOL_CLASSES, seed=3)
    assert drawn == prompt_texts("random", TINYSOL_CLASSES, seed=3) != prompt_texts("random", TINYSOL_CLASSES, seed=4)
    assert len({text.partition(" lorem")[0] for text in drawn}) == 14
    for text, name in zip(drawn, TINYSOL_CLASSES, strict=True):
        assert text.startswith(f"{name} ")
        assert len(text.removeprefix(name).split()) == 8
    found = prompt_embeddings(Texts(), ["track", "sound"], ["oboe", "bass tuba"])
    assert found.shape == (2, 2, 2)
    text = PROMPTS["sound"].replace("{}", "bass tuba")
    expected = np.asarray([len(text), sum(text.count(v) for v in "aeiou")], float)
    np.testing.assert_allclose(found[1, 1], expected / np.linalg.norm(expected), rtol=1e-6)
