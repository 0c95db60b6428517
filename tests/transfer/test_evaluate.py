import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import cmacc
from cmacc.clips import LogMel, Manifest, decode_clip, to_video
from cmacc.pretraining import PretrainConfig, pretrain, start_run
from cmacc.transfer import CardError, TaskError, embed, evaluate, open_encoder, retrieval


@pytest.fixture(scope="module")
def run_dir(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer") / "run"
    start_run(small_config, folder)
    pretrain(folder)
    return folder


def test_the_card_of_both_tasks(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    card, bad_files = evaluate(str(run_dir), ["pairs", "labelled"], small_world, tmp_path, workers=0)
    assert bad_files == {}
    plain = json.loads((tmp_path / "card.json").read_text())
    assert plain["results"] == [dataclasses.asdict(row) for row in card.results]
    assert set(plain["results"][0]) == {
        "task", "protocol", "modality", "metric", "value", "untrained", "chance", "count"
    }  # fmt: skip
    kinds = {(row.task, row.protocol, row.modality, row.metric) for row in card.results}
    assert {
        ("pairs", "retrieval", d, m) for d in ("video->audio", "audio->video") for m in ("R@1", "median_rank")
    } < kinds
    assert {("labelled", p, m, "accuracy") for p in ("linear_probe", "knn") for m in ("video", "audio", "both")} < kinds
    assert all(row.count == 12 for row in card.results)
    assert plain["provenance"]["checkpoint_step"] == 12
    assert plain["provenance"]["data_fingerprint"] == Manifest.read(small_world).fingerprint()

    saved = load_file(tmp_path / "embeddings.safetensors")
    by_name = {m.name: m.value for m in retrieval(saved["video"], saved["audio"])}
    rows = {r.metric: r.value for r in card.results if r.modality == "video->audio"}
    assert by_name == rows
    assert np.allclose(np.linalg.norm(saved["video"], axis=1), 1, atol=1e-5)


def test_features_are_the_encoder_on_the_middle_window(
    run_dir: Path, small_world: Path, small_config: PretrainConfig
) -> None:
    manifest = Manifest.read(small_world)
    encoder = cmacc.load(run_dir)
    features, failures = embed(encoder, manifest, [5, 3], small_config)
    assert failures == {}
    assert features.sample_ids.tolist() == [5, 3]
    record = manifest.records[3]
    start = (record.duration_seconds - 1.0) / 2
    clip = decode_clip(record.path, start, small_config.data.clip)
    log_mel = LogMel(16_000, small_config.encoder.mel_bins)
    with torch.inference_mode():
        video, audio = encoder(to_video(clip.frames[None]), log_mel(clip.waveform[None]))
    assert features.start_seconds[1] == pytest.approx(start)
    assert np.allclose(features.video[1], video.feature[0].numpy(), atol=1e-5)
    assert np.allclose(features.audio_embedding[1], audio.embedding[0].numpy(), atol=1e-5)


def test_several_windows_are_averaged(run_dir: Path, small_world: Path, small_config: PretrainConfig) -> None:
    manifest, encoder = Manifest.read(small_world), cmacc.load(run_dir)
    features, _ = embed(encoder, manifest, [0, 1], small_config, windows_per_file=2)
    record = manifest.records[1]
    each = []
    for start in (0.0, record.duration_seconds - 1.0):
        clip = decode_clip(record.path, start, small_config.data.clip)
        with torch.inference_mode():
            each.append(encoder.video(to_video(clip.frames[None])).feature[0].numpy())
    assert np.allclose(features.video[1], np.mean(each, axis=0), atol=1e-5)


def test_a_file_that_does_not_decode_is_left_out_and_named(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(small_world)
    test = manifest.ids_where(lambda r: r.split == "test")[2]
    records = list(manifest.records)
    records[test] = dataclasses.replace(records[test], path=tmp_path / "gone.mp4")
    Manifest(tuple(records)).write(tmp_path / "manifest.parquet")
    card, bad_files = evaluate(str(run_dir), ["pairs"], tmp_path / "manifest.parquet", tmp_path, workers=0)
    assert list(bad_files) == [str(tmp_path / "gone.mp4")]
    assert all(row.count == 11 for row in card.results)


def test_results_are_joined_and_never_lost_unasked(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    evaluate(str(run_dir), ["pairs"], small_world, tmp_path, workers=0)
    card, _ = evaluate(str(run_dir), ["labelled"], small_world, tmp_path, workers=0)
    assert {row.task for row in card.results} == {"pairs", "labelled"}
    before = (tmp_path / "card.json").read_bytes()
    with pytest.raises(CardError, match="holds results of task pairs already"):
        evaluate(str(run_dir), ["pairs"], small_world, tmp_path, workers=0)
    with pytest.raises(CardError, match=r"holds results of .*run at step 12"):
        evaluate("random", ["pairs"], small_world, tmp_path, workers=0)
    assert (tmp_path / "card.json").read_bytes() == before
    card, _ = evaluate(str(run_dir), ["pairs"], small_world, tmp_path, workers=0, overwrite=True)
    assert {row.task for row in card.results} == {"pairs", "labelled"}


def test_random_is_its_own_untrained(small_world: Path, tmp_path: Path) -> None:
    card, _ = evaluate("random", ["pairs"], small_world, tmp_path, workers=0)
    assert all(row.value == row.untrained for row in card.results)
    assert open_encoder("random").step == 0


def test_what_a_manifest_must_hold(run_dir: Path, small_world: Path, tmp_path: Path) -> None:
    records = Manifest.read(small_world).records

    def written(*changed: object) -> Path:
        path = tmp_path / "changed.parquet"
        Manifest(tuple(changed)).write(path)  # type: ignore[arg-type]
        return path

    no_split = written(*(dataclasses.replace(r, split=None) for r in records))
    with pytest.raises(TaskError, match="must hold labelled files in split 'train', got none"):
        evaluate(str(run_dir), ["labelled"], no_split, tmp_path)
    silent = written(*(dataclasses.replace(r, has_audio=False) for r in records))
    with pytest.raises(TaskError, match="at least 2 files with picture and sound in split 'test', got 0"):
        evaluate(str(run_dir), ["pairs"], silent, tmp_path)
    one_class = written(*(dataclasses.replace(r, label="x") for r in records))
    with pytest.raises(TaskError, match="at least 2 classes, got 1"):
        evaluate(str(run_dir), ["labelled"], one_class, tmp_path)
