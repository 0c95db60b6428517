"""Checkpoints: every format is read, what is damaged or foreign is named, and no kill and no full disk loses one."""

import dataclasses
import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmacc.encoders import EncoderConfig
from cmacc.pretraining import Provenance, best_checkpoint, checkpoint_at, last_checkpoint, mark_best, run_of
from cmacc.pretraining import checkpoint_files as files
from cmacc.pretraining.checkpoint import Loaded, load_checkpoint, random_states, save_checkpoint
from cmacc.pretraining.checkpoint_files import (
    CheckpointError,
    DamagedCheckpointError,
    checked_state,
    checkpoint_folders,
    clean_up,
    whole_checkpoint,
)
from cmacc.pretraining.learner import Learner

from .golden import LATER_TOLERANCE, RELATIVE_TOLERANCE
from .stored_checkpoints import CONFIG, SAVED_AT, STORED, losses, trainer

NAMES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint before step 6. Tests only change copies of it."""
    learning = trainer()
    losses(learning, SAVED_AT)
    return save_checkpoint(learning.learner, tmp_path_factory.mktemp("saved"), SAVED_AT, 0)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def state_of(learner: Learner) -> dict[str, Tensor]:
    """All that a checkpoint restores, copied."""
    found = {f"{name}.{k}": v.clone() for name, m in learner.modules().items() for k, v in m.state_dict().items()}
    for index, entries in learner.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": value.clone() for name, value in entries.items()}
    return found | {"random": torch.get_rng_state()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def as_format_3(folder: Path, **changes: Any) -> None:
    """Without checksums, so that what is changed is not taken for damage."""
    state = json.loads((folder / "state.json").read_text())
    state = {name: value for name, value in state.items() if name not in ("digest", "files", "processes")}
    (folder / "state.json").write_text(json.dumps(state | {"format": 3} | changes))


# ---- formats --------------------------------------------------------------------------------------------------------


def test_there_is_a_stored_checkpoint_of_each_format() -> None:
    assert {folder.name for folder in STORED.iterdir()} == {f"format-{number}" for number in (2, 3, 4)}


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_checkpoint_of_each_format_is_read_and_goes_on_as_it_did(number: int) -> None:
    folder = STORED / f"format-{number}"
    learning, fresh = trainer(), trainer()
    assert load_checkpoint(learning.learner, folder) == Loaded(SAVED_AT, 1)
    learning.next_step = fresh.next_step = SAVED_AT
    wanted, found = json.loads((folder / "continuation.json").read_text()), losses(learning)
    assert found[:3] == pytest.approx(wanted[:3], rel=RELATIVE_TOLERANCE)
    assert found[3:] == pytest.approx(wanted[3:], rel=LATER_TOLERANCE)
    assert losses(fresh)[:3] != pytest.approx(wanted[:3], rel=RELATIVE_TOLERANCE)  # it is not the data alone


def test_everything_that_the_next_step_depends_on_is_restored(tmp_path: Path) -> None:
    learning = trainer()
    losses(learning, SAVED_AT)
    folder = save_checkpoint(learning.learner, tmp_path, SAVED_AT, 0)
    before = state_of(learning.learner)
    after = losses(learning)
    torch.rand(3)
    other = trainer()
    assert load_checkpoint(other.learner, folder) == Loaded(SAVED_AT, 1)
    assert_equal(state_of(other.learner), before)
    other.next_step = SAVED_AT
    assert losses(other) == after


# ---- which are kept -------------------------------------------------------------------------------------------------


def test_the_newest_two_the_best_and_every_nth_are_kept(tmp_path: Path) -> None:
    learner = trainer().learner
    for step in range(1, 12):
        save_checkpoint(learner, tmp_path, step, 4)
        if step == 2:
            assert mark_best(tmp_path, step, 0.5, "knn")
        if step == 7:
            assert not mark_best(tmp_path, step, 0.4, "knn")
    assert [int(folder.name[5:]) for folder in checkpoint_folders(tmp_path)] == [2, 4, 8, 10, 11]
    assert best_checkpoint(tmp_path).name == "step-00000002"
    assert mark_best(tmp_path, 11, 0.6, "knn")
    save_checkpoint(learner, tmp_path, 12, 4)
    assert names_in(tmp_path) == ["best.json", *(f"step-{step:08d}" for step in (4, 8, 11, 12))]


def test_the_best_is_the_first_of_the_highest_values_of_one_metric(tmp_path: Path) -> None:
    learner = trainer().learner
    with pytest.raises(CheckpointError, match="no checkpoint is marked as the best"):
        best_checkpoint(tmp_path)
    for step in (4, 8, 12):
        save_checkpoint(learner, tmp_path, step, 4)
    assert not mark_best(tmp_path, 4, float("nan"), "knn")
    assert mark_best(tmp_path, 4, 0.5, "knn")
    assert not mark_best(tmp_path, 8, 0.5, "knn")
    assert mark_best(tmp_path, 8, 0.1, "probe")  # another metric
    with pytest.raises(CheckpointError, match=r"step-00000009: must be saved before"):
        mark_best(tmp_path, 9, 1.0, "probe")
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {
        "step": 8, "value": 0.1, "metric": "probe",
    }  # fmt: skip
    os.rename(best_checkpoint(tmp_path), tmp_path / "checkpoints" / "damaged-step-00000008")
    with pytest.raises(CheckpointError, match=r"marked as the best by best\.json, and not there"):
        best_checkpoint(tmp_path)
    assert mark_best(tmp_path, 12, 0.0, "probe")  # the better one is gone


def test_nothing_is_deleted_while_the_best_is_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learner = trainer().learner
    save_checkpoint(learner, tmp_path, 1, 0)
    mark_best(tmp_path, 1, 0.5, "knn")
    (tmp_path / "checkpoints" / "best.json").write_text('{"step": 1, "val')
    for step in (2, 3, 4):
        save_checkpoint(learner, tmp_path, step, 0)
    assert len(checkpoint_folders(tmp_path)) == 4
    assert "are not deleted" in caplog.text
    assert "best.json: cannot be read" in caplog.text


def test_a_path_names_a_checkpoint(tmp_path: Path) -> None:
    learner = trainer().learner
    first, second = (save_checkpoint(learner, tmp_path, step, 0) for step in (1, 2))
    mark_best(tmp_path, 1, 0.5, "knn")
    for path, wanted in (
        (tmp_path, second), (first, first), (second, second), (tmp_path / "checkpoints" / "best", first),
    ):  # fmt: skip
        assert (run_of(path), checkpoint_at(path)) == (tmp_path, wanted)
    with pytest.raises(CheckpointError, match=r"among those of its run \(step-00000001, step-00000002\)"):
        checkpoint_at(tmp_path / "checkpoints" / "step-00000003")
    (tmp_path / "checkpoints" / "step-copy").mkdir()  # of the user's making
    assert checkpoint_folders(tmp_path) == [first, second]


# ---- several processes ----------------------------------------------------------------------------------------------


def test_each_process_gets_its_own_random_state(tmp_path: Path) -> None:
    states = {}
    for rank in range(2):
        torch.manual_seed(100 + rank)
        states |= random_states(rank)
    drawn = {}
    for rank in range(2):
        torch.manual_seed(100 + rank)
        drawn[rank] = torch.rand(3)
    folder = save_checkpoint(trainer().learner, tmp_path, 4, 0, processes=2, random=states)
    assert load_checkpoint(trainer().learner, folder, rank=1) == Loaded(4, 2)
    assert torch.equal(torch.rand(3), drawn[1])
    load_checkpoint(trainer().learner, folder, rank=0)
    assert torch.equal(torch.rand(3), drawn[0])
    own = torch.get_rng_state()
    load_checkpoint(trainer().learner, folder, rank=2)  # there were two
    assert torch.equal(torch.get_rng_state(), own)
    load_checkpoint(trainer().learner, STORED / "format-3", rank=1)
    assert torch.equal(torch.get_rng_state(), own)
    load_checkpoint(trainer().learner, STORED / "format-3")
    saved = load_file(STORED / "format-3" / "optimizer.safetensors")["random.cpu"]
    assert torch.equal(torch.get_rng_state(), saved)


def test_what_is_held_in_parts_is_saved_whole_and_loaded_in_parts(tmp_path: Path) -> None:
    learning = trainer()
    losses(learning, SAVED_AT)
    name = "audio_dictionary.pool.embedding"
    own = learning.learner.dictionaries["audio"].pool.embedding.clone()
    others = torch.rand_like(own)
    whole = {name: torch.cat((others, own))}
    folder = save_checkpoint(learning.learner, tmp_path, SAVED_AT, 0, gathered=whole)
    assert torch.equal(load_file(folder / "model.safetensors")[name], whole[name])

    def second_half(key: str, tensor: Tensor) -> Tensor:
        return tensor[len(own) :] if key == name else tensor

    before, other = state_of(learning.learner), trainer()
    load_checkpoint(other.learner, folder, own_part=second_half)
    assert_equal(state_of(other.learner), before)
    with pytest.raises(CheckpointError, match=r"pool.embedding must have shape \(24, 16\), got \(48, 16\)"):
        load_checkpoint(other.learner, folder)


# ---- damaged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_found(copy: Path, name: str) -> None:
    """In ``state.json`` at every place, where another spelling of the same content (1e-8, 1E-8) is no damage."""
    path, rng = copy / name, random.Random(0)
    checked = () if name == "state.json" else NAMES[:2]
    whole, content = path.read_bytes(), checked_state(copy, checked)
    places = range(len(whole)) if name == "state.json" else [0, 9, len(whole) - 1, *rng.sample(range(len(whole)), 20)]
    found = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert checked_state(copy, checked) == content
        except DamagedCheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017, what else it may do is checked too
            found += 1
    assert found >= 0.95 * len(places) if name == "state.json" else found == len(places)
    before = state_of(learner := trainer().learner)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DamagedCheckpointError, match=f"{name}: "):
        load_checkpoint(learner, copy)
    assert_equal(state_of(learner), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [3, 4])
def test_a_file_that_was_cut_off_or_is_missing_is_named(copy: Path, number: int, name: str) -> None:
    if number == 3:
        as_format_3(copy)
    whole = (copy / name).read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (copy / name).write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError, match=rf"{name}: .*(cannot be read|SHA-256)"):
            load_checkpoint(trainer().learner, copy)
    (copy / name).unlink()
    with pytest.raises(DamagedCheckpointError, match=rf"{name}: cannot be read .*No such file"):
        load_checkpoint(trainer().learner, copy)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[4, 6]", "state.json: must hold an object, got list"),
        ('{"format": 3', "state.json: cannot be read"),
        ("\ufffe\x00", "state.json: cannot be read"),
        ('{"format": 5, "step": 6}', "format must be 2, 3 or 4, got 5"),
        ('{"step": 6}', "format must be 2, 3 or 4, got None"),
        ('{"format": 4, "step": 6}', "state.json: its content must have SHA-256 None"),
        ('{"format": 3, "step": "6"}', "state.json: step must be an integer, got 6"),
        ('{"format": 3, "step": 6}', "the optimizer's state cannot be read"),
        ('{"format": 3, "step": 6, "optimizer": {"param_groups": [4]}}', "the optimizer's state cannot be read"),
    ],
)
def test_another_state_is_refused_in_one_line(copy: Path, text: str, wanted: str) -> None:
    (copy / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=wanted) as caught:
        load_checkpoint(trainer().learner, copy)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_the_newest_that_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learner = trainer().learner
    assert whole_checkpoint(tmp_path) is None
    for step in range(1, 5):
        save_checkpoint(learner, tmp_path, step, 1)
    cut(tmp_path / "checkpoints" / "step-00000004" / "model.safetensors", 50)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").unlink()
    found = whole_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000002"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert "step-00000004/model.safetensors: must have SHA-256" in warnings[0]
    assert "now called damaged-step-00000004" in warnings[0]
    assert "step-00000003/state.json: cannot be read" in warnings[1]
    assert warnings[2] == "going on from the checkpoint before, step-00000002"
    left = ["damaged-step-00000003", "damaged-step-00000004", "step-00000001", "step-00000002"]
    assert names_in(tmp_path) == left
    assert whole_checkpoint(tmp_path) == found
    # The same step again, damaged again: neither of the two is lost.
    again = save_checkpoint(learner, tmp_path, 3, 1)
    cut(again / "optimizer.safetensors", 0)
    assert whole_checkpoint(tmp_path) == found
    assert names_in(tmp_path) == sorted([*left, "damaged-step-00000003-2"])


def test_a_run_with_damaged_checkpoints_alone_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        cut(save_checkpoint(trainer().learner, tmp_path, step, 0) / "optimizer.safetensors", 9)
    before = names_in(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints can be read, .*step-00000002/optimizer"):
            whole_checkpoint(tmp_path)
    assert names_in(tmp_path) == before


def test_a_newer_format_is_no_damage(tmp_path: Path) -> None:
    learner = trainer().learner
    for step in (1, 2):
        folder = save_checkpoint(learner, tmp_path, step, 0)
    as_format_3(folder, format=5)
    with pytest.raises(CheckpointError, match="format must be 2, 3 or 4, got 5"):
        whole_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path) == folder


# ---- foreign --------------------------------------------------------------------------------------------------------

FIRST = "encoder.audio.backbone.0.weight"
Tensors = dict[str, Tensor]


def dropped(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("file", "change", "wanted"),
    [
        (0, lambda t: dropped(t, FIRST), rf"{FIRST} is missing, of shape \(16, 8\)"),
        (0, lambda t: t | {"encoder.z": torch.ones(2, 3)}, r"encoder.z, of shape \(2, 3\), has no place"),
        (0, lambda t: t | {FIRST: t[FIRST][:3]}, rf"{FIRST} must have shape \(16, 8\), got \(3, 8\)"),
        (0, lambda t: t | {FIRST: t[FIRST].double()}, rf"{FIRST} must have type torch.float32, got torch.float64"),
        (1, lambda t: dropped(t, "state.0.exp_avg"), f"exp_avg of {FIRST.replace('audio', 'video')} is missing"),
        (
            1,
            lambda t: t | {"state.0.exp_avg": torch.ones(8, 16)},
            rf"exp_avg of {FIRST.replace('audio', 'video')} must have shape \(16, 8\), got \(8, 16\)",
        ),
        (
            1,
            lambda t: t | {"state.99.step": torch.ones(())},
            "must have 12 parameters, got state of another, number 99",
        ),
        (1, lambda t: t | {"nonsense": torch.ones(())}, "the optimizer's state cannot be read"),
        (1, lambda t: t | {"random.cpu": torch.ones(3)}, r"random.cpu must have shape \(\d+,\), got \(3,\)"),
    ],
)
def test_the_first_leaf_that_does_not_fit_is_named_and_nothing_is_changed(
    copy: Path, file: int, change: Callable[[Tensors], Tensors], wanted: str
) -> None:
    as_format_3(copy)
    tensors = load_file(copy / NAMES[file])
    if file == 1:
        tensors["random.cpu"] = tensors.pop("random.cpu.0")
    save_file(change(tensors), copy / NAMES[file])
    learner = trainer().learner
    before = state_of(learner)
    with pytest.raises(CheckpointError, match=wanted):
        load_checkpoint(learner, copy)
    assert_equal(state_of(learner), before)


def test_a_wider_encoder_is_named_with_both_shapes(saved: Path) -> None:
    config = dataclasses.replace(CONFIG, encoder=EncoderConfig(head="linear", embedding_size=17))
    with pytest.raises(CheckpointError, match=r"encoder.audio.last.weight must have shape \(17, 16\), got \(16, 16\)"):
        load_checkpoint(trainer(config).learner, saved)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda groups: groups[:1], "the optimizer must have 2 groups of parameters, got 1"),
        (
            lambda groups: [groups[0], groups[1] | {"params": [4, 5]}],
            r"group 1 of the optimizer must have 8 parameters \(\[4, .*\]\), got \[4, 5\]",
        ),
        (lambda groups: [groups[0], {"lr": 1.0}], r"group 1 of the optimizer must have 8 parameters .* got None"),
    ],
)
def test_another_optimizer_is_named(copy: Path, change: Callable[[list[Any]], list[Any]], wanted: str) -> None:
    groups = json.loads((copy / "state.json").read_text())["optimizer"]["param_groups"]
    as_format_3(copy, optimizer={"param_groups": change(groups)})
    with pytest.raises(CheckpointError, match=wanted):
        load_checkpoint(trainer().learner, copy)


def test_another_runs_checkpoint_is_refused_and_stays(tmp_path: Path) -> None:
    own, other = (Provenance.now(torch.device("cpu"), 0, run_id=name) for name in ("own", "other"))
    folder = save_checkpoint(trainer().learner, tmp_path, 2, 0, other)
    assert whole_checkpoint(tmp_path) == folder  # it is not damaged
    with pytest.raises(CheckpointError, match="must be of run own, got one of run other"):
        load_checkpoint(trainer().learner, folder, own)


# ---- killed, and the disk full --------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_finished(tmp_path: Path) -> None:
    learner = trainer().learner
    first, second = (save_checkpoint(learner, tmp_path, step, 0) for step in (1, 2))
    folder = first.parent
    for name in (".step-00000003.new", ".step-00000003.4711", ".step-00000001.gone", ".step-00000002.old"):
        shutil.copytree(first, folder / name)
    (folder / ".best.json.abc").write_text("{")
    clean_up(tmp_path)
    assert names_in(tmp_path) == [first.name, second.name]
    os.rename(second, folder / ".step-00000002.old")  # killed between the two renames of a replacement
    assert whole_checkpoint(tmp_path) == second


def test_a_checkpoint_is_on_disk_before_an_older_one_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut just after may find the old one deleted and the new one empty."""
    learner = trainer().learner
    for step in (1, 2):
        save_checkpoint(learner, tmp_path, step, 0)
    events: list[str] = []
    fsync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def note_fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        events.append(f"rename {source.name} {target.name}")
        replace(source, target)

    def note_rmtree(path: Path) -> None:
        events.append(f"delete {path.name}")
        rmtree(path)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(shutil, "rmtree", note_rmtree)
    save_checkpoint(learner, tmp_path, 3, 0)
    assert events == [
        *(f"fsync {name}" for name in NAMES),
        "fsync .step-00000003.new",
        "rename .step-00000003.new step-00000003",
        "fsync checkpoints",
        "rename step-00000001 .step-00000001.gone",
        "delete .step-00000001.gone",
    ]


class FullDisk:
    """Stands in for what writes: the ``number``-th call fails as on a full disk, and if ``lasting`` all after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, *, lasting: bool) -> None:
        self.calls, self._number, self._lasting = 0, number, lasting
        places: list[tuple[Any, str]] = [
            (files, "save_file"), (Path, "mkdir"), (Path, "chmod"), (Path, "write_text"),
            (os, "fsync"), (os, "replace"),
        ]  # fmt: skip
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._instead_of(name, getattr(owner, name)))

    def _instead_of(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._number or (self._lasting and self.calls > self._number):
                if name in ("save_file", "write_text"):  # what it could write
                    real(*arguments, **options)
                    cut(arguments[1] if name == "save_file" else arguments[0], 20)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
def test_a_full_disk_loses_nothing_wherever_it_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: int, lasting: bool
) -> None:
    learning = trainer()
    failures = 0
    for number in range(1, 100):
        run_dir = tmp_path / str(number)
        for before in (1, 2):
            save_checkpoint(learning.learner, run_dir, before, 0)
        caplog.clear()
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, number, lasting=lasting)
            try:
                save_checkpoint(learning.learner, run_dir, step, 0)
            except CheckpointError as error:
                assert f"step-{step:08d}: cannot be written ([Errno 28] No space left" in str(error)  # noqa: PT017
                failures += 1
            else:  # only the deletion of older ones may have failed
                assert checkpoint_folders(run_dir)[-1].name == f"step-{step:08d}"
                assert disk.calls < number or "are not deleted: [Errno 28]" in caplog.text
        if not lasting:
            assert not list((run_dir / "checkpoints").glob(".*"))
        for folder in checkpoint_folders(run_dir):
            checked_state(folder, NAMES[:2])
        newest = whole_checkpoint(run_dir)
        assert newest is not None
        assert load_checkpoint(trainer().learner, newest).step >= 2
        assert not list((run_dir / "checkpoints").glob(".*"))
        assert not list((run_dir / "checkpoints").glob("damaged*"))
        if disk.calls < number:
            break
    # A folder, two files with their modes, the state, four fsyncs, the renames, and the fsync of the names.
    assert failures == {3: 12, 2: 13}[step]


def test_a_disk_that_is_really_full_loses_nothing(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()})")
    try:
        learner, failures = trainer().learner, 0
        save_checkpoint(learner, tmp_path, 1, 0)
        left = os.statvfs(tmp_path)
        for free in range(0, 64 * 1024, 8 * 1024):
            ballast = tmp_path / "ballast"
            ballast.write_bytes(bytes(left.f_bavail * left.f_bsize - free))
            try:
                save_checkpoint(learner, tmp_path, 2, 0)
            except CheckpointError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
                failures += 1
                assert names_in(tmp_path) == ["step-00000001"]
                assert load_checkpoint(learner, last_checkpoint(tmp_path)).step == 1
            else:
                break
            ballast.unlink()
        assert failures >= 3
        assert load_checkpoint(learner, last_checkpoint(tmp_path)).step == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_finished_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_savings.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 20
    assert all(kill["loaded"] >= kill["finished"] for kill in kills)
    assert sum(bool(kill["left"]) for kill in kills) >= 5, "they were to strike within savings"
    assert not list((tmp_path / "checkpoints").glob("damaged*"))
