"""Online evaluation: the right numbers, from the right files, the same on all processes; and nothing else changes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cmacc.clips import Manifest, MediaRecord
from cmacc.pretraining import PretrainConfig, RunError, TrainConfig, pretrain, start_run, untrained_encoder
from cmacc.pretraining.clock import is_timing
from cmacc.pretraining.features import embed, unit_rows
from cmacc.pretraining.kept_features import heads_of
from cmacc.pretraining.online import OnlineEvaluation, check_online, online_files
from cmacc.transfer import open_encoder

CPU = torch.device("cpu")
KNN = ["eval/video/knn", "eval/audio/knn", "eval/both/knn"]
R1 = ["eval/video_to_audio/R@1", "eval/audio_to_video/R@1"]


@pytest.fixture(scope="module")
def config(small_config: PretrainConfig) -> PretrainConfig:
    optim = dataclasses.replace(small_config.optim, steps=5)
    return dataclasses.replace(small_config, optim=optim, eval_every=2, save_every=5)


@pytest.fixture(scope="module")
def run(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config, tmp_path_factory.mktemp("online"))


def trained(config: PretrainConfig, run_dir: Path) -> Path:
    start_run(config, run_dir)
    assert pretrain(run_dir).finished
    return run_dir


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def with_records(config: PretrainConfig, path: Path, records: Sequence[MediaRecord]) -> PretrainConfig:
    Manifest(records).write(path)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, manifest=path))


def records_of(config: PretrainConfig) -> list[MediaRecord]:
    return list(Manifest.read(config.data.manifest).records)


# Numbers


def test_the_last_metrics_are_those_of_the_saved_encoder(config: PretrainConfig, run: Path) -> None:
    """Against scikit-learn's vote of neighbours, and a sort of all cosines."""
    manifest = Manifest.read(config.data.manifest)
    labels = np.array(manifest.label_indices())
    is_test = np.array([record.split == "test" for record in manifest.records])
    found = embed(open_encoder(str(run)).encoder, manifest, range(len(manifest)), ["video", "audio"])
    expected = {}
    features = {name: unit_rows(part[:, 0]) for name, part in found.by_modality.items()}
    features["both"] = np.concatenate([features["video"], features["audio"]], axis=1)  # type: ignore[index]
    for name, part in features.items():
        vote = KNeighborsClassifier(20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07))
        vote.fit(part[~is_test], labels[~is_test])
        expected[f"eval/{name}/knn"] = vote.score(part[is_test], labels[is_test])
    video, audio = (found.matched[modality][is_test, 0] for modality in ("video", "audio"))
    for way, cosines in (("video_to_audio", video @ audio.T), ("audio_to_video", audio @ video.T)):
        order = np.argsort(-cosines, axis=1)
        for k in (1, 5):
            own = [i in order[i, :k] for i in range(len(order))]
            expected[f"eval/{way}/R@{k}"] = np.mean(own)
    expected |= {"eval/score": np.mean([expected[name] for name in KNN]), "eval/files": is_test.sum()}
    got = {name: value for name, value in rows(run)[-1].items() if name.startswith("eval/")}
    assert got == pytest.approx(expected)
    assert 0 < got["eval/score"] < 1


def test_without_labels_the_score_is_retrieval(config: PretrainConfig, tmp_path: Path) -> None:
    unlabelled = [dataclasses.replace(record, label=None) for record in records_of(config)]
    config = with_records(config, tmp_path / "unlabelled.parquet", unlabelled)
    measured = OnlineEvaluation(Manifest(unlabelled), config, CPU).measured(untrained_encoder(config))
    assert not measured.keys() & set(KNN)
    assert measured["eval/score"] == pytest.approx(np.mean([measured[name] for name in R1]))


def test_frozen_backbones_are_decoded_once_and_their_heads_are_measured(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = dataclasses.replace(config, train=TrainConfig(video="head", audio="head"))
    run_dir = trained(frozen, tmp_path / "run")
    evaluated = [row for row in rows(run_dir) if "eval/score" in row]
    assert [row["step"] for row in evaluated] == [1, 3, 4]
    assert evaluated[0] | evaluated[-1] != evaluated[0]

    manifest = Manifest.read(config.data.manifest)
    evaluation = OnlineEvaluation(manifest, frozen, CPU)
    monkeypatch.setattr("cmacc.pretraining.online.evaluation_loader", None)  # nothing is decoded any more
    of_heads = evaluation.measured(heads_of(untrained_encoder(frozen)))
    monkeypatch.undo()
    of_clips = OnlineEvaluation(manifest, config, CPU).measured(untrained_encoder(config))
    recalls = [name for name in of_clips if "R@" in name]
    assert recalls
    assert {name: of_heads[name] for name in recalls} == {name: of_clips[name] for name in recalls}
    assert of_heads.keys() == of_clips.keys()


def test_outputs_that_are_not_finite_are_no_measurement(
    config: PretrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = untrained_encoder(config)
    torch.nn.init.constant_(encoder.audio.last.weight, float("inf"))
    assert OnlineEvaluation(Manifest.read(config.data.manifest), config, CPU).measured(encoder) == {}
    assert "no online evaluation: outputs of the encoders are not finite" in caplog.text


# Nothing else changes


def test_a_run_is_the_same_with_and_without_evaluation(config: PretrainConfig, run: Path, tmp_path: Path) -> None:
    without = trained(dataclasses.replace(config, eval_every=0), tmp_path)

    def plain(run_dir: Path) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not is_timing(k) and "eval/" not in k} for row in rows(run_dir)]

    assert plain(run) == plain(without)
    name = "checkpoints/step-00000005/model.safetensors"
    assert (run / name).read_bytes() == (without / name).read_bytes()
    assert [row["step"] for row in rows(run) if "eval/score" in row] == [1, 3, 4]  # every second, and the last
    assert not [row for row in rows(without) if "eval/score" in row]


def test_modes_gradients_and_random_states_are_left_as_they_were(config: PretrainConfig) -> None:
    encoder = untrained_encoder(config).train()
    encoder.video.mark_frozen([encoder.video.backbone])

    def draw(*_: object) -> None:  # as wav2vec 2.0 does
        torch.rand(1)

    encoder.audio.backbone.register_forward_hook(draw)
    modes = [module.training for module in encoder.modules()]
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    random = torch.get_rng_state()
    OnlineEvaluation(Manifest.read(config.data.manifest), config, CPU).measured(encoder)
    assert [module.training for module in encoder.modules()] == modes
    assert set(modes) == {True, False}
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert all(weight.grad is None for weight in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# Files


def test_processes_share_the_files_and_agree(
    config: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three processes, one after the other; a held-out file and one of training are broken."""
    records = records_of(config)
    broken = [next(i for i, r in enumerate(records) if r.split == split) for split in ("test", "train")]
    for i in broken:
        path = tmp_path / f"broken-{i}.mp4"
        path.write_bytes(Path(records[i].path).read_bytes()[:2000])
        records[i] = dataclasses.replace(records[i], path=path)
    config = with_records(config, tmp_path / "broken.parquet", records)
    manifest, encoder = Manifest(records), untrained_encoder(config)
    whole = OnlineEvaluation(manifest, config, CPU)
    alone = whole.measured(encoder)
    assert len(whole.bad_files) == 2
    assert alone["eval/files"] == sum(record.split == "test" for record in records) - 1
    assert caplog.text.count("skipped: ") == 2
    whole.measured(encoder)
    assert caplog.text.count("skipped: ") == 2  # they are told once

    sent: dict[int, Tensor] = {}

    def results(rank: int) -> dict[str, float]:
        def gather(own: Tensor) -> Tensor:
            sent[rank] = own
            return torch.cat([sent.get(r, own) for r in range(3)])

        evaluation = OnlineEvaluation(manifest, config, CPU, rank=rank, count=3, gather=gather)
        shares[rank] = len(evaluation.bad_files), evaluation.measured(encoder), len(evaluation.bad_files)
        return shares[rank][1]

    shares: dict[int, tuple[int, dict[str, float], int]] = {}
    for rank in range(3):  # the last one has what the others sent
        results(rank)
    assert results(2) == pytest.approx(alone)
    assert results(0) == pytest.approx(alone)
    assert sum(bad for _, _, bad in shares.values()) == 2


def test_held_out_files_are_drawn_from_the_test_split_without_those_that_are_not_used(config: PretrainConfig) -> None:
    record = MediaRecord("a.mp4", 5.0, 25.0, 64, 64, True, 16_000)
    train = [dataclasses.replace(record, label="ab"[i % 2], split="train") for i in range(20)]
    test = [dataclasses.replace(record, label="b", split="test") for _ in range(20)]
    test[3] = dataclasses.replace(test[3], findings=("silent",))
    other = [dataclasses.replace(record, label="c", split="val") for _ in range(5)]
    every = Manifest([*train, *test, *other])
    optim = dataclasses.replace(config.optim, batch_size=2)
    plain = dataclasses.replace(config.dictionary, selector="none")
    config = dataclasses.replace(config, optim=optim, dictionary=plain)

    files = online_files(every, config)
    assert files.held_out == tuple(i for i in range(20, 40) if i != 23)
    assert files.training == tuple(range(20))
    few = online_files(every, dataclasses.replace(config, eval_files=6, seed=3))
    assert len(few.held_out) == len(few.training) == 6
    assert few == online_files(every, dataclasses.replace(config, eval_files=6, seed=4))
    assert few.held_out not in (tuple(range(20, 26)), few.training)
    assert set(few.held_out) < set(files.held_out)
    # Another split where there is no test; its class is not among the training files', so there is nothing to vote on.
    without = online_files(Manifest([*train, *other]), config)
    assert without.held_out == tuple(range(20, 25))
    assert without.training == ()
    # One class is not enough either.
    one = [dataclasses.replace(r, label="b") for r in train]
    assert online_files(Manifest([*one, *test]), config).training == ()


def test_a_run_without_held_out_files_is_refused_at_its_start(config: PretrainConfig, tmp_path: Path) -> None:
    records = records_of(config)
    one = next(i for i, record in enumerate(records) if record.split == "test")
    two = next(i for i, record in enumerate(records) if record.split == "test" and i != one)
    kept = [r for i, r in enumerate(records) if r.split == "train" or i in (one, two)]
    kept = [dataclasses.replace(r, findings=("silent",)) if r is records[two] else r for r in kept]
    bare = with_records(config, tmp_path / "bare.parquet", kept)
    reason = (
        r"manifest .*bare.parquet: at least 2 usable files must be held out from split 'train' for eval_every=2, got 1 "
        r"of 38 files \(excluded 1 of 2 files by what the scan found: 1 silent\); make a manifest with `cmacc scan "
        r"--test-fraction 0.2`, or set eval_every=0"
    )
    with pytest.raises(RunError, match=reason):
        start_run(bare, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match=reason):
        OnlineEvaluation(Manifest(kept), bare, CPU)
    check_online(Manifest(kept), dataclasses.replace(bare, eval_every=0))
