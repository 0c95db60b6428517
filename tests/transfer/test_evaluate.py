"""The whole way from an encoder and files to a card."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from cmacc.clips import ClipSpec, Manifest
from cmacc.pretraining import PretrainConfig, pretrain, start_run
from cmacc.transfer import (
    RECIPES,
    Card,
    CardError,
    EncoderError,
    EvaluateOptions,
    Modality,
    TaskError,
    evaluate,
    export_run,
    open_encoder,
)
from cmacc.transfer.protocols import pair_retrieval
from cmacc.transfer.tasks import labelled_task

measure = sys.modules["cmacc.transfer.measure"]  # apart from the function of that name
ONE_WINDOW = EvaluateOptions(windows=1, workers=0)


@pytest.fixture(scope="module")
def run_dir(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer") / "run"
    start_run(small_config, folder)
    pretrain(folder)
    return folder


def written(tmp_path: Path, records: Sequence[object]) -> Path:
    path = tmp_path / "changed.parquet"
    Manifest(tuple(records)).write(path)  # type: ignore[arg-type]
    return path


def test_the_card_of_both_tasks(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    card = evaluate(str(run_dir), ["pairs", "labelled"], small_world, tmp_path, options=ONE_WINDOW)
    assert card.skipped == {}
    assert Card.read(tmp_path / "card.json") == card
    plain = json.loads((tmp_path / "card.json").read_text())
    names = {"task", "protocol", "modality", "metric", "value", "untrained", "chance", "count"}
    assert all(names <= set(row) for row in plain["results"])
    kinds = {(row.task, row.protocol, row.modality, row.metric) for row in card.results}
    assert kinds == {
        ("pairs", "retrieval", d, m)
        for d in ("video_to_audio", "audio_to_video")
        for m in ("R@1", "R@5", "R@10", "median_rank")
    } | {("labelled", p, m, "accuracy") for p in ("linear", "knn") for m in ("video", "audio", "both")}
    for row in card.results:
        assert row.count == 12
        assert row.low <= row.value <= row.high
        assert list(row.by_split.values()) == [row.value]
        assert (row.windows, row.version) == (1, RECIPES[row.protocol].version)
        assert row.untrained is not None
    assert card.encoder.checkpoint_step == 12
    assert (
        card.data["pairs"].fingerprint == card.data["labelled"].fingerprint == Manifest.read(small_world).fingerprint()
    )
    assert card.encoder.pretraining_data == Manifest.read(small_world).fingerprint()
    assert "accuracy" in (tmp_path / "card.md").read_text()

    saved = load_file(tmp_path / "embeddings.safetensors")
    by_name = {m.name: m.value for m in pair_retrieval(saved["video"], saved["audio"])}
    assert by_name == {r.metric: r.value for r in card.results if r.modality == "video_to_audio"}
    assert np.allclose(np.linalg.norm(saved["video"], axis=1), 1, atol=1e-5)


def test_prototypes_stand_before_and_after_the_heads(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    card = evaluate(
        str(run_dir), ["labelled"], small_world, tmp_path,
        protocols=["prototypes"], options=ONE_WINDOW,
    )  # fmt: skip
    assert [(row.modality, row.metric) for row in card.results] == [
        (modality, "accuracy") for modality in ("video", "audio", "both", "video_joint", "audio_joint")
    ]
    assert all(row.chance == 0.25 and row.untrained is not None for row in card.results)
    own, joint = (next(r for r in card.results if r.modality == name) for name in ("audio", "audio_joint"))
    words = f"(audio {100 * own.value:.1f} %, audio_joint {100 * joint.value:.1f} %"
    assert words in (tmp_path / "card.md").read_text().replace("\\_", "_")


def test_a_file_that_does_not_decode_is_left_out_and_named(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    records = list(Manifest.read(small_world).records)
    test = [i for i, record in enumerate(records) if record.split == "test"][2]
    records[test] = dataclasses.replace(records[test], path=tmp_path / "gone.mp4")
    card = evaluate(str(run_dir), ["pairs"], written(tmp_path, records), tmp_path, options=ONE_WINDOW)
    assert list(card.skipped["pairs"]) == [str(tmp_path / "gone.mp4")]
    assert all(row.count == 11 for row in card.results)
    assert (card.data["pairs"].files, card.data["pairs"].files_listed) == (11, 12)
    assert card.data["pairs"].is_partial


def test_results_are_joined_and_never_lost_unasked(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    def run(encoder: str, task: str, protocols: Sequence[str] = (), overwrite: bool = False) -> set[tuple[str, str]]:
        card = evaluate(
            encoder, [task], small_world, tmp_path,
            protocols=protocols, options=ONE_WINDOW, overwrite=overwrite,
        )  # type: ignore[arg-type]  # fmt: skip
        return {(row.task, row.protocol) for row in card.results}

    run(str(run_dir), "pairs")
    run(str(run_dir), "labelled", ["knn"])
    assert run(str(run_dir), "labelled", ["svm"]) == {("pairs", "retrieval"), ("labelled", "knn"), ("labelled", "svm")}
    before = (tmp_path / "card.json").read_bytes()
    with pytest.raises(CardError, match="holds retrieval of task pairs already"):
        run(str(run_dir), "pairs")
    with pytest.raises(
        CardError, match=r"holds results of .*run at step 12, which may be of other weights than random"
    ):
        run("random", "pairs")
    records = Manifest.read(small_world).records
    fewer = written(tmp_path, records[1:])
    with pytest.raises(CardError, match=r"holds knn of task labelled, svm of task labelled already on other data"):
        evaluate(str(run_dir), ["labelled"], fewer, tmp_path, protocols=["retrieval"], options=ONE_WINDOW)
    assert (tmp_path / "card.json").read_bytes() == before
    assert run(str(run_dir), "pairs", overwrite=True) >= {("pairs", "retrieval"), ("labelled", "knn")}


def test_random_is_its_own_untrained_and_statistics_have_none(small_world: Path, tmp_path: Path) -> None:
    card = evaluate("random", ["pairs"], small_world, tmp_path / "r", options=EvaluateOptions(workers=0))
    assert all(row.value == row.untrained for row in card.results)
    assert {row.windows for row in card.results} == {1}  # a moment is to be found, which an average would blur
    card = evaluate("statistics", ["labelled"], small_world, tmp_path / "s", options=ONE_WINDOW)
    assert {(row.modality, row.untrained) for row in card.results} == {("audio", None)}
    with pytest.raises(TaskError, match="task pairs: the encoder must embed video and audio in one space, got Log"):
        evaluate("statistics", ["pairs"], small_world, tmp_path / "s", options=ONE_WINDOW)
    with pytest.raises(TaskError, match=r"task ucf101: the encoder must encode video, got LogMelStatistics, which enc"):
        evaluate("statistics", ["ucf101"], small_world, tmp_path / "s", options=ONE_WINDOW)


def test_an_export_has_the_results_of_its_run(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    export_run(run_dir, tmp_path / "export")
    of_run, of_export = (
        evaluate(str(source), ["pairs"], small_world, tmp_path / source.name / "card", options=ONE_WINDOW)
        for source in (run_dir, tmp_path / "export")
    )
    assert of_run.encoder.weights == of_export.encoder.weights
    assert [(r.value, r.untrained) for r in of_run.results] == [(r.value, r.untrained) for r in of_export.results]


def test_every_labelled_file_is_held_out_once_in_folds(small_world: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(ONE_WINDOW, folds=4)
    card = evaluate("random", ["labelled"], small_world, tmp_path, protocols=["knn"], options=options)
    for row in card.results:
        assert row.count == 48
        assert row.windows == 1
        assert list(row.by_split) == ["fold 1", "fold 2", "fold 3", "fold 4"]
        assert row.value == pytest.approx(np.mean(list(row.by_split.values())))
        assert row.spread == pytest.approx(np.std(list(row.by_split.values()), ddof=1))
    other = evaluate(
        "random", ["labelled"], small_world, tmp_path / "b",
        protocols=["knn"], options=dataclasses.replace(options, seed=1),
    )  # fmt: skip
    assert other.data["labelled"].fingerprint != card.data["labelled"].fingerprint


class Planted(nn.Module):
    """An encoder that knows the class of every file by its sound, as a one-hot row with a little noise."""

    modalities: tuple[Modality, ...] = ("audio",)
    spec = ClipSpec(frame_count=1, frame_rate_hz=1.0, frame_height=16, frame_width=16, audio_seconds=1.0)
    device = torch.device("cpu")

    def __init__(self, answers: dict[float, int]) -> None:
        super().__init__()
        self.answers = answers

    def embed_video(self, frames: Tensor) -> Tensor:
        raise AssertionError("not asked for")

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        rows = torch.zeros(len(waveforms), 4)
        for row, waveform in zip(rows, waveforms, strict=True):
            row[self.answers[float(waveform.double().abs().sum())]] = 1
        return rows + 0.01 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))


class Memory(Planted):
    """Takes down which sounds it is given, in the order of the files."""

    def __init__(self) -> None:
        super().__init__({})
        self.heard: list[float] = []

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        self.heard += waveforms.double().abs().sum(1).tolist()
        return torch.rand(len(waveforms), 4)


def test_a_planted_encoder_gets_exactly_what_it_must(small_world: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(small_world)
    memory = Memory().eval()
    evaluate(memory, ["labelled"], small_world, tmp_path / "m", protocols=["knn"], options=ONE_WINDOW)
    assert len(set(memory.heard)) == 48
    labels = manifest.label_indices()
    splits = manifest.column("split")
    for wrong in (0, 3):
        answers = dict(zip(memory.heard, labels, strict=True))
        held_out = [i for i in range(48) if splits[i] == "test"]
        for i in held_out[:wrong]:
            answers[memory.heard[i]] = (labels[i] + 1) % 4
        card = evaluate(
            Planted(answers).eval(), ["labelled"], small_world, tmp_path / str(wrong),
            protocols=["linear", "svm", "knn", "prototypes", "retrieval"], options=ONE_WINDOW,
        )  # fmt: skip
        found = {(r.protocol, r.metric): r.value for r in card.results}
        for name in ("linear", "svm", "knn", "prototypes"):
            assert found[name, "accuracy"] == (12 - wrong) / 12
        assert found["retrieval", "R@1"] == (12 - wrong) / 12


@pytest.mark.usefixtures("users_checks")
def test_what_encoders_must_not_give(small_world: Path, tmp_path: Path) -> None:
    class Bad(Memory):
        def __init__(self, rows: object) -> None:
            super().__init__()
            self.rows = rows

        def embed_audio(self, waveforms: Tensor) -> Tensor:
            return self.rows(len(waveforms))  # type: ignore[operator,no-any-return]

    def nan_once(count: int) -> Tensor:
        return torch.where(torch.arange(count)[:, None] == 3, torch.nan, torch.rand(count, 4))

    for rows, reason in (
        (nan_once, r"encoder Bad: features of audio must be finite, got NaN or infinity in those of 2 of 48 files"),
        (
            lambda count: torch.rand(count - 1, 4),
            r"embed_audio must give a row for each of 32 clips, got shape \(31, 4",
        ),
        (lambda count: torch.rand(count), r"embed_audio must give a row for each of 32 clips, got shape \(32,\)"),
    ):
        with pytest.raises(EncoderError, match=reason):
            evaluate(Bad(rows).eval(), ["labelled"], small_world, tmp_path, options=ONE_WINDOW)
    with pytest.raises(EncoderError, match=r"encoder Memory: must be in evaluation mode \(\.eval\(\)\), got training"):
        evaluate(Memory(), ["labelled"], small_world, tmp_path, options=ONE_WINDOW)
    with pytest.raises(EncoderError, match="encoder object: must have modalities, spec, device, embed_video and emb"):
        evaluate(object(), ["labelled"], small_world, tmp_path, options=ONE_WINDOW)  # type: ignore[arg-type]


@pytest.mark.usefixtures("users_checks")
def test_what_data_and_options_must_be(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    records = Manifest.read(small_world).records

    def fails(reason: str, records: Sequence[object], task: str = "labelled", **changes: object) -> None:
        protocols = changes.pop("protocols", ())
        options = dataclasses.replace(ONE_WINDOW, **changes)  # type: ignore[arg-type]
        with pytest.raises(TaskError, match=reason):
            evaluate(
                "random", [task], written(tmp_path, records), tmp_path,
                protocols=protocols, options=options,
            )  # type: ignore[arg-type]  # fmt: skip

    no_split = [dataclasses.replace(record, split=None) for record in records]
    fails("must hold labelled files in split 'train', got none; .*or divide it with --folds", no_split)
    fails(r"--folds must be in \[2, 48\], the number of groups, got 49", records, folds=49)
    one_class = [dataclasses.replace(record, label="a") for record in records]
    fails("labelled, test: the training split must hold at least 2 classes, got 1", one_class)
    new_class = [
        dataclasses.replace(record, label="new") if record.split == "test" and i % 2 else record
        for i, record in enumerate(records)
    ]
    fails("every held-out class must have training files, got none of new; --allow-partial skips", new_class)
    silent = [dataclasses.replace(record, has_audio=False) for record in records]
    fails("at least 2 files with video and audio in split 'test', got 0", silent, "pairs")
    fails("protocol must be one of retrieval, got knn", records, "pairs", protocols=["knn"])
    fails("windows must be at least 1, got 0", records, windows=0)
    fails("--splits is for the official data sets alone, got labelled", records, parts=(1,))
    fails("--folds is for task labelled alone, got pairs", records, "pairs", folds=2)
    fails("--epochs is for protocol finetune alone, got labelled", records, epochs=3)
    fails(
        "task must be one of ucf101, hmdb51, esc50, esc10, labelled, pairs, zero_shot, emotion, instruments, got 'x'",
        records,
        "x",
    )


def test_a_modality_that_files_lack_is_told_and_the_others_measured(small_world: Path, tmp_path: Path) -> None:
    records = list(Manifest.read(small_world).records)
    labels = sorted({str(record.label) for record in records})
    records = [
        dataclasses.replace(record, has_audio=False)
        if record.split == "train" and record.label == labels[0]
        else record
        for record in records
    ]
    card = evaluate("random", ["labelled"], written(tmp_path, records), tmp_path, protocols=["knn"], options=ONE_WINDOW)
    assert {row.modality for row in card.results} == {"video"}
    reason = f"test: no training file of {labels[0]} has audio and decodes"
    assert card.skipped["labelled"]["modality audio"] == reason


def test_what_is_left_of_a_partial_manifest_is_told(small_world: Path, tmp_path: Path) -> None:
    records = list(Manifest.read(small_world).records)
    for i in [i for i, record in enumerate(records) if record.split == "test"][:3]:
        records[i] = dataclasses.replace(records[i], label="unseen")
    options = dataclasses.replace(ONE_WINDOW, allow_partial=True)
    card = evaluate("random", ["labelled"], written(tmp_path, records), tmp_path, protocols=["knn"], options=options)
    facts = card.data["labelled"]
    assert (facts.files, facts.files_listed, facts.classes, facts.classes_listed) == (45, 48, 4, 5)
    assert len(card.skipped["labelled"]) == 3
    assert all(row.count == 9 for row in card.results)


def test_copies_of_a_file_are_never_on_both_sides_of_a_fold(small_world: Path) -> None:
    records = Manifest.read(small_world).records
    twice = [dataclasses.replace(record, group=None) for record in records for _ in range(2)]
    path = written(small_world.parent, twice)
    data = labelled_task(path, folds=3)
    hashes = Manifest.read(path).column("content_hash")
    for split in data.splits:
        assert not {hashes[i] for i in split.train} & {hashes[i] for i in split.test}


def test_results_are_there_as_soon_as_they_are_made_and_files_are_embedded_once(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise EncoderError("worn out")

    monkeypatch.setitem(measure._PROBES, "linear", fails)
    memory = Memory().eval()
    with pytest.raises(EncoderError, match="worn out"):
        evaluate(
            memory, ["labelled"], small_world, tmp_path,
            protocols=["knn", "svm", "linear"], options=ONE_WINDOW,
        )  # fmt: skip
    assert {row.protocol for row in Card.read(tmp_path / "card.json").results} == {"knn", "svm"}
    assert len(memory.heard) == 48


@pytest.mark.real_data
@pytest.mark.slow
def test_log_mel_statistics_on_esc10(real_data: Path, tmp_path: Path) -> None:
    """83.8 % was measured elsewhere, with another log-mel: the baseline must come out within a point of it."""
    options = EvaluateOptions(workers=0, cache=tmp_path / "cache")
    card = evaluate("statistics", ["esc10"], real_data / "esc50", tmp_path, options=options)
    (row,) = card.results
    assert row.value == pytest.approx(0.838, abs=0.01)
    assert list(row.by_split) == [f"fold {number}" for number in range(1, 6)]
    assert row.count == card.data["esc10"].files == 400
    assert not card.data["esc10"].is_partial
    again = evaluate("statistics", ["esc10"], real_data / "esc50", tmp_path / "again", options=options)
    assert again.results[0].value == row.value
    assert open_encoder("statistics").facts.weights == again.encoder.weights
