import contextlib
import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file

from cmacc.clips import Manifest, list_folders, scan
from cmacc.objectives import Terms, WithinModalConfig
from cmacc.pretraining import (
    CheckpointError,
    DictionaryConfig,
    ObjectiveConfig,
    PretrainConfig,
    RunError,
    Trainer,
    last_checkpoint,
    load_encoder,
    pretrain,
    start_run,
    untrained_encoder,
)
from cmacc.pretraining.checkpoint_files import checkpoint_folders
from cmacc.pretraining.clip_stream import ClipStream, usable_files
from cmacc.pretraining.clock import is_timing


def run(config: PretrainConfig, run_dir: Path) -> Path:
    start_run(config, run_dir)
    assert pretrain(run_dir).finished
    return run_dir


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = last_checkpoint(run_dir)
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Metrics without what a clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in lines]


@pytest.fixture(scope="module")
def uninterrupted(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(small_config, tmp_path_factory.mktemp("runs") / "uninterrupted")


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    small_config: PretrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    start_run(small_config, tmp_path)
    steps_done = 0

    def on_step(done: int, total: int, row: dict[str, float]) -> None:
        nonlocal steps_done
        steps_done = done

    assert not pretrain(tmp_path, on_step=on_step, should_stop=lambda: steps_done == 6).finished
    torch.rand(7)  # the global generator moves on between the two halves
    assert pretrain(tmp_path).finished
    expected, got = tensors(uninterrupted), tensors(tmp_path)
    assert expected.keys() == got.keys()
    different = [name for name in expected if not torch.equal(expected[name], got[name]) and "random" not in name]
    assert different == []
    assert rows(tmp_path) == rows(uninterrupted)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    small_config: PretrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    start_run(small_config, tmp_path)

    class Killed(BaseException):
        pass

    def on_step(done: int, total: int, row: dict[str, float]) -> None:
        if done == 8:  # three steps after the last checkpoint
            raise Killed

    with pytest.raises(Killed):
        pretrain(tmp_path, on_step=on_step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # what a kill leaves
    assert pretrain(tmp_path).finished
    assert rows(tmp_path) == rows(uninterrupted)
    expected, got = tensors(uninterrupted), tensors(tmp_path)
    assert all(torch.equal(expected[name], got[name]) for name in expected if name.startswith(("encoder", "audio")))


def test_workers_do_not_change_a_run(small_config: PretrainConfig, uninterrupted: Path, tmp_path: Path) -> None:
    data = dataclasses.replace(small_config.data, workers=2)
    run(dataclasses.replace(small_config, data=data), tmp_path)
    assert rows(tmp_path) == rows(uninterrupted)


def test_what_a_run_folder_holds(small_config: PretrainConfig, uninterrupted: Path) -> None:
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "checkpoints", "tensorboard", "run.log"} <= {
        path.name for path in uninterrupted.iterdir()
    }
    assert [folder.name for folder in checkpoint_folders(uninterrupted)] == ["step-00000010", "step-00000012"]
    metrics = rows(uninterrupted)
    assert [row["step"] for row in metrics] == list(range(12))
    names = {"loss", "video_to_audio/loss", "audio_to_video/loss", "video_to_audio/top1", "learning_rate"}
    assert names <= metrics[0].keys()
    assert metrics[8]["audio_dictionary/key_age"] > 0
    assert metrics[8]["video_dictionary/false_negative_share"] > 0
    assert list((uninterrupted / "tensorboard").rglob("events*"))


def test_checkpoints_to_keep_are_kept(small_config: PretrainConfig, tmp_path: Path) -> None:
    run(dataclasses.replace(small_config, save_every=2, keep_every=6), tmp_path)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == [f"step-{n:08d}" for n in (6, 10, 12)]


def test_a_run_with_a_damaged_last_checkpoint_goes_on_from_the_one_before(
    small_config: PretrainConfig, uninterrupted: Path, tmp_path: Path
) -> None:
    """With the same numbers as an uninterrupted one. If none can be read, it does not begin anew."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    last, before = (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" for step in (12, 10))
    (last / "optimizer.safetensors").write_bytes(b"")
    assert pretrain(tmp_path / "run").finished
    assert rows(tmp_path / "run") == rows(uninterrupted)
    log = (tmp_path / "run" / "run.log").read_text()
    assert re.search(r"WARNING checkpoint .*step-00000012/optimizer.safetensors: must have SHA-256", log)
    assert [path.name for path in sorted(last.parent.iterdir())] == [f"damaged-{last.name}", before.name, last.name]
    for folder in (last, before):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be read"):
        pretrain(tmp_path / "run")


@pytest.mark.parametrize("selector", ["none", "newest", "random", "hardest"])
@pytest.mark.parametrize("batch_keys", ["online", "momentum"])
def test_every_way_of_making_negatives_runs(
    small_config: PretrainConfig, tmp_path: Path, selector: str, batch_keys: str
) -> None:
    config = dataclasses.replace(
        small_config,
        dictionary=DictionaryConfig(selector=selector, size=16, pool_size=24),  # type: ignore[arg-type]
        objective=ObjectiveConfig(batch_keys=batch_keys),  # type: ignore[arg-type]
        optim=dataclasses.replace(small_config.optim, steps=4),
    )
    run(config, tmp_path)
    names = tensors(tmp_path).keys()
    assert any(name.startswith("audio_dictionary.") for name in names) == (selector != "none")


REFRESHING: dict[str, dict[str, Any]] = {
    "selected": {"refresh": "selected", "initial_centers": "dictionary"},
    "dictionary": {"refresh": "dictionary", "refresh_every": 2, "select_every": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFRESHING)
def test_a_refreshing_run_resumes_bit_by_bit_and_tells_its_cost(
    small_config: PretrainConfig, tmp_path: Path, name: str
) -> None:
    """The kept inputs are in no checkpoint: they are read again."""
    dictionary = dataclasses.replace(small_config.dictionary, **REFRESHING[name])
    config = dataclasses.replace(small_config, dictionary=dictionary)
    run(config, tmp_path / "whole")
    start_run(config, tmp_path / "parts")
    done = 0

    def on_step(step: int, steps: int, row: dict[str, float]) -> None:
        nonlocal done
        done = step

    for stop in (5, 9, 12):
        pretrain(tmp_path / "parts", on_step=on_step, should_stop=lambda stop=stop: done == stop)
    expected, got = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert [key for key in expected if not torch.equal(expected[key], got[key]) and "random" not in key] == []
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    frames, samples, numbers = 4 * 32 * 32 * 3, 16000, 2
    depth = 24 if name == "selected" else 24 + 16
    assert metrics[-1]["refresh_bytes"] == depth * (frames + 2 * samples + 8 * numbers)
    assert all(row["seconds/refresh"] > 0 for row in metrics[2:])
    refreshed = [row["refreshed_keys"] for row in metrics]
    if name == "selected":
        assert refreshed[0] == 0
        assert max(refreshed) == 2 * 8
        assert all(row["audio_dictionary/key_age"] < 4 for row in metrics if "audio_dictionary/key_age" in row)
    else:
        assert max(refreshed) == 2 * 16
        assert not any(refreshed[1::2])


def test_a_key_re_encoded_by_the_same_encoder_is_the_same(small_config: PretrainConfig, tmp_path: Path) -> None:
    """With a momentum of one the copy never changes, so that refreshing changes nothing but the keys' steps.

    Random choice: rounding cannot change it, as it can the active one, and with that all that comes after.
    """
    states = {}
    for refresh in ("none", "selected", "dictionary"):
        config = dataclasses.replace(
            small_config,
            dictionary=dataclasses.replace(
                small_config.dictionary, selector="random", refresh=refresh, refresh_every=1
            ),
            optim=dataclasses.replace(small_config.optim, steps=6),
        )
        trainer = Trainer(ClipStream(Manifest.read(config.data.manifest), config, torch.device("cpu")), config)
        frozen = copy.deepcopy(trainer.learner.key_encoder.state_dict())
        for _ in trainer.steps():
            trainer.learner.key_encoder.load_state_dict(frozen)
        for modality, dictionary in trainer.learner.dictionaries.items():
            states[refresh, modality] = dictionary.negatives()
    for name in ("video", "audio"):
        plain, selected, whole = (states[refresh, name] for refresh in ("none", "selected", "dictionary"))
        for fresh in (selected, whole):
            assert torch.equal(fresh.sample_ids, plain.sample_ids)
            torch.testing.assert_close(fresh.embedding, plain.embedding, rtol=0, atol=2e-3)
            torch.testing.assert_close(fresh.penultimate, plain.penultimate, rtol=0, atol=2e-3)
        # Another sample's key would not pass.
        others = torch.cdist(plain.embedding, plain.embedding, p=torch.inf).fill_diagonal_(1)
        assert others.min() > 4e-3
        assert (selected.steps > plain.steps).all()
        assert (whole.steps == 5).all()


def test_a_dictionary_that_could_not_be_renewed_is_refused(small_config: PretrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(small_config, dictionary=DictionaryConfig(selector="active", size=30, pool_size=30))
    with pytest.raises(RunError, match=r"dictionary.size must be at most .* \(36 - 8\), .* got 30; lower it"):
        start_run(config, tmp_path)


def test_a_run_is_not_overwritten_unasked(small_config: PretrainConfig, uninterrupted: Path) -> None:
    with pytest.raises(RunError, match=r"already contains a run; resume it with --resume .* or pass --overwrite"):
        start_run(small_config, uninterrupted)


def test_what_the_scan_found_is_no_surprise_and_what_breaks_is_named(
    small_config: PretrainConfig, tmp_path: Path
) -> None:
    """Ten of 36 files are excluded in one line, whatever the limit; one that does not decode counts against it."""
    records = list(Manifest.read(small_config.data.manifest).records)
    training = [i for i, record in enumerate(records) if record.split == "train"]
    for i in training[:8]:
        records[i] = dataclasses.replace(records[i], findings=("silent",))
    for i in training[8:10]:
        records[i] = dataclasses.replace(records[i], has_audio=False)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    records[training[10]] = dataclasses.replace(records[training[10]], path=broken)
    Manifest(records).write(tmp_path / "manifest.parquet")
    data = dataclasses.replace(small_config.data, manifest=tmp_path / "manifest.parquet", max_bad_fraction=0.05)
    optim = dataclasses.replace(small_config.optim, steps=3, warmup_steps=1)
    config = dataclasses.replace(small_config, data=data, dictionary=DictionaryConfig(), optim=optim)
    line = "excluded 10 of 36 files by what the scan found: 8 silent, 2 no_audio"
    assert start_run(config, tmp_path / "run") == [line]
    outcome = pretrain(tmp_path / "run")
    assert outcome.finished
    assert list(outcome.bad_files) == [str(broken)]
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count(line) == 1
    assert str(broken) in log
    assert str(records[training[0]].path) not in log

    strict = dataclasses.replace(config, data=dataclasses.replace(data, max_bad_fraction=0.01))
    start_run(strict, tmp_path / "strict")
    with pytest.raises(RunError, match=r"share of files that do not decode, got 0.01 with 1 of 26 files bad"):
        pretrain(tmp_path / "strict")
    demanding = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=30))
    with pytest.raises(RunError, match=rf"optim.batch_size \(30\) files to train on, got 26 of 48 files; {line}"):
        start_run(demanding, tmp_path / "demanding")


def test_the_share_of_bad_files_is_always_of_the_training_split(small_config: PretrainConfig, tmp_path: Path) -> None:
    """However large the test split is: 6 of 36 training files that break are more than a tenth of them."""
    records = list(Manifest.read(small_config.data.manifest).records)
    training = [i for i, record in enumerate(records) if record.split == "train"]
    for i in training[:6]:
        path = tmp_path / f"broken-{i}.mp4"
        path.write_bytes(b"not a video")
        records[i] = dataclasses.replace(records[i], path=path)
    held_out = [record for record in records if record.split == "test"] * 10
    Manifest((*records, *held_out)).write(tmp_path / "manifest.parquet")
    data = dataclasses.replace(small_config.data, manifest=tmp_path / "manifest.parquet", max_bad_fraction=0.1)
    start_run(dataclasses.replace(small_config, data=data), tmp_path / "run")
    with pytest.raises(RunError, match=r"got 0.1 with 4 of 36 files bad"):
        pretrain(tmp_path / "run")


def test_what_a_scan_noted_keeps_files_from_training(small_config: PretrainConfig) -> None:
    records = list(Manifest.read(small_config.data.manifest).records)
    noted = {0: ("silent",), 1: ("still", "offset"), 2: ("duplicate",), 3: ("offset", "near_duplicate"), 4: ("black",)}
    records = [
        dataclasses.replace(r, findings=noted.get(i, ()), split="train", duration_seconds=0.9 if i == 5 else 2.0)
        for i, r in enumerate(records)
    ]
    ids, excluded = usable_files(Manifest(records), small_config)
    assert ids == [3, *range(5, len(records))]
    assert excluded == {0: "silent", 1: "still", 2: "duplicate", 4: "black"}
    clip = dataclasses.replace(small_config.data.clip, short_files="refuse")
    refusing = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, clip=clip))
    ids, excluded = usable_files(Manifest(records), refusing)
    assert 5 not in ids
    assert excluded[5] == "shorter than a clip"


def test_too_few_files_is_a_clear_error(small_config: PretrainConfig, tmp_path: Path) -> None:
    optim = dataclasses.replace(small_config.optim, batch_size=40)
    config = dataclasses.replace(
        small_config, optim=optim, dictionary=dataclasses.replace(small_config.dictionary, size=40, pool_size=40)
    )
    with pytest.raises(RunError, match=r"must hold at least optim.batch_size \(40\) files"):
        start_run(config, tmp_path)


def test_a_checkpoint_of_other_encoders_names_the_tensor(small_config: PretrainConfig, uninterrupted: Path) -> None:
    wider = dataclasses.replace(small_config.encoder, embedding_size=17)
    encoder = untrained_encoder(dataclasses.replace(small_config, encoder=wider))
    with pytest.raises(
        CheckpointError, match=r"encoder\.audio\.last\.weight must have shape \(17, 32\), got \(16, 32\)"
    ):
        load_encoder(encoder, last_checkpoint(uninterrupted))


def test_a_broken_checkpoint_is_named(small_config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        last_checkpoint(tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"format": 2, "step": 1}')
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_encoder(untrained_encoder(small_config), folder)


def one_stream_of(config: PretrainConfig, kind: str, count: int, folder: Path) -> Path:
    """A manifest of files that hold one stream of the small world's, as it is."""
    folder.mkdir()
    for record in Manifest.read(config.data.manifest).records[:count]:
        path = folder / (record.path.stem + (".mp4" if kind == "video" else ".m4a"))
        with contextlib.closing(av.open(str(record.path))) as source, av.open(str(path), "w", format="mp4") as target:
            (stream,) = (stream for stream in source.streams if stream.type == kind)
            copied = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copied
                    target.mux(packet)
    manifest = scan(list_folders([folder])).manifest
    manifest.write(folder / "manifest.parquet")
    has_other = [record.has_audio if kind == "video" else record.has_picture for record in manifest.records]
    assert has_other == [False] * count
    return folder / "manifest.parquet"


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_run_on_one_modality_takes_files_without_the_other(
    small_config: PretrainConfig, tmp_path: Path, modality: str
) -> None:
    """It learns, stops and resumes bit by bit, and leaves the other encoder as it was."""
    encoder = dataclasses.replace(small_config.encoder, video_input="differences", video_pooling="mean")
    config = dataclasses.replace(
        small_config,
        data=dataclasses.replace(
            small_config.data, manifest=one_stream_of(small_config, modality, 12, tmp_path / "files")
        ),
        encoder=encoder,
        dictionary=DictionaryConfig(),
        objective=ObjectiveConfig(
            terms=Terms(cross_modal=0.0, within_modal=1.0), within_modal=WithinModalConfig(modalities=(modality,))
        ),
        optim=dataclasses.replace(small_config.optim, steps=4),
        save_every=2,
        health_every=1,
    )
    whole, parts = run(config, tmp_path / "whole"), tmp_path / "parts"
    metrics = rows(whole)
    assert {f"within_modal/{modality}/top1", f"{modality}/effective_rank"} <= metrics[-1].keys()
    other = "audio" if modality == "video" else "video"
    assert not any(other in name.split("/") for name in metrics[-1])

    start_run(config, parts)
    done = 0

    def on_step(step: int, steps: int, row: dict[str, float]) -> None:
        nonlocal done
        done = step

    assert not pretrain(parts, on_step=on_step, should_stop=lambda: done == 2).finished
    assert pretrain(parts).finished
    assert rows(parts) == metrics
    trained, again, first = untrained_encoder(config), untrained_encoder(config), untrained_encoder(config)
    load_encoder(trained, last_checkpoint(whole))
    load_encoder(again, last_checkpoint(parts))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        if name.startswith(other):
            assert torch.equal(first.state_dict()[name], tensor)
    assert not torch.equal(getattr(first, modality).last.weight, getattr(trained, modality).last.weight)
