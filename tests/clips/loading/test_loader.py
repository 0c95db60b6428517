"""Batches: the same whatever the workers, the ranks, the resume point, the broken files and the deaths."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cmacc.clips.catalog.manifest import Manifest, MediaRecord
from cmacc.clips.clip import Clip, ClipBatch, ClipSpec, MediaError
from cmacc.clips.loading import loader as loader_module
from cmacc.clips.loading.loader import (
    ClipRequest,
    CoveringPlan,
    TrainingPlan,
    covering_loader,
    evaluation_loader,
    evaluation_requests,
    training_loader,
)
from cmacc.clips.loading.workers import unwatch
from cmacc.clips.media.decoding import decode_clip, decode_clips
from cmacc.clips.storage import Extent

from ..conftest import Recipe

SPEC = ClipSpec(2, 10.0, 24, 32, 0.3, 8_000)
SRC = Path(__file__).parents[3] / "src"


@pytest.fixture(scope="module")
def films(media: Callable[[Recipe], Path]) -> Manifest:
    """Seven files of different lengths; the last does not decode."""
    records = [
        MediaRecord(media(Recipe(seconds=1 + i / 5)), 1 + i / 5, 25.0, 64, 48, True, 44_100, "ab"[i % 2])
        for i in range(6)
    ]
    broken = records[0].path.with_name("broken.mp4")
    broken.write_bytes(b"no film")
    records.append(dataclasses.replace(records[0], path=broken, label=None))
    return Manifest(tuple(records))


def plan(
    films: Manifest, ids: tuple[int, ...] = (0, 1, 2, 3, 4, 5), batch_size: int = 3, seed: int = 0, k: int = 1
) -> TrainingPlan:
    return TrainingPlan(films, ids, SPEC.length_seconds, batch_size, seed, k)


def batches(the_plan: TrainingPlan, first: int, last: int, workers: int = 0, **options: Any) -> list[ClipBatch]:
    loader = training_loader(the_plan, SPEC, first_step=first, last_step=last, workers=workers, **options)
    made = list(loader)
    assert len(made) == len(loader)
    return made


def assert_same(some: list[ClipBatch], others: list[ClipBatch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for name in ("frames", "waveforms", "sample_ids", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.failures == other.failures


# ---- batches --------------------------------------------------------------------------------------------------------


def test_batches_hold_what_the_plan_says(films: Manifest) -> None:
    the_plan = plan(films)
    for step, batch in enumerate(batches(the_plan, 0, 3)):
        assert batch.frames.shape == (3, 2, 24, 32, 3)
        assert batch.waveforms.shape == (3, 2_400)
        requests = the_plan.requests(step)
        assert batch.sample_ids.tolist() == [r.sample_id for r in requests]
        assert batch.labels.tolist() == [r.sample_id % 2 for r in requests]  # "a", "b", "a"...
        for i, request in enumerate(requests):
            clip = decode_clip(films.records[request.sample_id].path, request.start_seconds, SPEC)
            assert torch.equal(batch.frames[i], clip.frames)
            assert torch.equal(batch.waveforms[i], clip.waveform)
        assert batch.failures == {}


@pytest.mark.parametrize(("workers", "k"), [(1, 1), (2, 1), (2, 3)])
def test_workers_change_nothing(films: Manifest, workers: int, k: int) -> None:
    the_plan = plan(films, ids=tuple(range(7)), k=k)  # the broken file among them
    assert_same(batches(the_plan, 1, 5, workers, start_method="fork"), batches(the_plan, 1, 5))


@pytest.mark.slow
def test_spawned_workers_change_nothing(films: Manifest) -> None:
    the_plan = plan(films, ids=tuple(range(7)), k=2)
    assert_same(batches(the_plan, 1, 5, 1, start_method="spawn"), batches(the_plan, 1, 5))


def test_resuming_goes_on_as_if_nothing_had_happened(films: Manifest) -> None:
    whole = batches(plan(films), 0, 5)
    for k in (1, 2, 3):
        assert_same(batches(plan(films), k, 5), whole[k:])
    differing = batches(plan(films, seed=1), 0, 5)
    assert any(not torch.equal(a.waveforms, b.waveforms) for a, b in zip(whole, differing, strict=True))


def test_resuming_within_a_group_goes_on_too(films: Manifest) -> None:
    the_plan = plan(films, ids=tuple(range(7)), k=3)
    whole = batches(the_plan, 0, 9)
    for first, last in [(1, 9), (2, 3), (3, 9), (4, 8), (8, 9), (5, 5)]:
        assert_same(batches(the_plan, first, last), whole[first:last])


@pytest.mark.parametrize(("batch_size", "ranks", "k"), [(6, 1, 1), (6, 2, 1), (6, 3, 2), (6, 6, 1), (2, 2, 3)])
def test_ranks_share_each_batch_out(films: Manifest, batch_size: int, ranks: int, k: int) -> None:
    the_plan = plan(films, batch_size=batch_size, k=k)
    steps = the_plan.steps_per_epoch
    whole = batches(the_plan, 0, steps)
    parts = [batches(the_plan, 0, steps, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step in range(steps):
        for name in ("frames", "waveforms", "sample_ids", "labels"):
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(joined, getattr(whole[step], name))
    for visit in range(k):  # each file once a visit, over all ranks
        seen = [i for part in parts for batch in part[visit::k] for i in batch.sample_ids.tolist()]
        assert sorted(seen) == list(range(6))


@pytest.mark.usefixtures("users_checks")
def test_ranks_that_cannot_be_are_refused(films: Manifest) -> None:
    with pytest.raises(ValueError, match=r"ranks must be a divisor of batch_size \(3\), got 2"):
        batches(plan(films), 0, 1, ranks=2)
    with pytest.raises(ValueError, match=r"training_loader: ranks must be a divisor .*, got 0"):
        batches(plan(films), 0, 1, ranks=0)
    for rank in (-1, 3):
        with pytest.raises(ValueError, match=rf"training_loader: rank must be in \[0, 3\), got {rank}"):
            batches(plan(films), 0, 1, rank=rank, ranks=3)


def test_a_file_is_opened_once_for_its_k_clips(films: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, int]] = []

    def counted(source: Any, starts: Sequence[float], spec: ClipSpec) -> list[Clip]:
        calls.append((source, len(starts)))
        return decode_clips(source, starts, spec)

    monkeypatch.setattr(loader_module, "decode_clips", counted)
    the_plan = plan(films, k=3)
    made = batches(the_plan, 0, 6)
    assert sorted(calls, key=str) == [(record.source, 3) for record in films.records[:6]]
    for step, batch in enumerate(made):
        requests = the_plan.requests(step)
        assert batch.sample_ids.tolist() == [r.sample_id for r in requests]
        wanted = decode_clip(films.records[requests[1].sample_id].path, requests[1].start_seconds, SPEC)
        assert torch.equal(batch.frames[1], wanted.frames)
        assert torch.equal(batch.waveforms[1], wanted.waveform)


def test_segments_and_packed_samples_are_found(films: Manifest, tmp_path: Path) -> None:
    first, second = films.records[0], films.records[3]
    content = Path(second.path).read_bytes()
    (tmp_path / "0.tar").write_bytes(b"x" * 700 + content + b"y" * 30)
    mixed = Manifest(
        [
            dataclasses.replace(first, start_seconds=0.4, duration_seconds=0.3),
            dataclasses.replace(second, path=tmp_path / "0.tar", video=Extent(700, len(content)), duration_seconds=0.3),
        ]
    )
    (batch,) = batches(TrainingPlan(mixed, (0, 1), SPEC.length_seconds, 2, 0), 0, 1)
    assert batch.failures == {}
    for place, sample_id in enumerate(batch.sample_ids.tolist()):
        source, start = ((first.path, 0.4), (second.path, 0.0))[sample_id]
        assert torch.equal(batch.frames[place], decode_clip(source, start, SPEC).frames)


def test_global_randomness_is_neither_used_nor_touched(films: Manifest) -> None:
    torch.manual_seed(1)
    one = batches(plan(films), 0, 2)
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(after, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert_same(batches(plan(films), 0, 2), one)


def test_broken_file_is_replaced_and_reported(films: Manifest) -> None:
    the_plan = plan(films, ids=tuple(range(7)), batch_size=7)
    (batch,) = batches(the_plan, 0, 1)
    planned = [r.sample_id for r in the_plan.requests(0)]
    place = planned.index(6)
    assert batch.frames.shape[0] == 7
    assert list(batch.failures) == [6]
    assert "broken.mp4: does not decode" in batch.failures[6]
    got = batch.sample_ids.tolist()
    assert got[place] != 6
    assert got[:place] + got[place + 1 :] == planned[:place] + planned[place + 1 :]
    assert_same(batches(the_plan, 0, 1), [batch])
    others = {
        batches(the_plan, step, step + 1)[0].sample_ids[planned_place(the_plan, step)].item() for step in range(8)
    }
    assert len(others) > 1  # not always the same one steps in


def planned_place(the_plan: TrainingPlan, step: int) -> int:
    return [r.sample_id for r in the_plan.requests(step)].index(6)


def test_a_substitute_stays_for_the_whole_group(films: Manifest) -> None:
    the_plan = plan(films, ids=tuple(range(7)), batch_size=7, k=3)
    place = planned_place(the_plan, 0)
    made = batches(the_plan, 0, 3)
    assert [list(batch.failures) for batch in made] == [[6]] * 3
    (substitute,) = {batch.sample_ids[place].item() for batch in made}
    assert substitute != 6
    for step, batch in enumerate(made):
        request = the_plan.windows.request(int(substitute), the_plan.visit(step))
        wanted = decode_clip(films.records[request.sample_id].path, request.start_seconds, SPEC)
        assert torch.equal(batch.frames[place], wanted.frames)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_files_is_an_error(films: Manifest, workers: int) -> None:
    with pytest.raises(MediaError, match=r"1 files in a row do not decode, among them .*broken\.mp4"):
        batches(plan(films, ids=(6,), batch_size=1), 0, 1, workers)


# ---- deaths ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_POLL_SECONDS", 0.1)


def living_workers() -> list[int]:
    """Children of this process, without those that multiprocessing keeps for itself."""
    # Helpers that earlier tests left to be used again; from Python 3.14 on, the server that forks workers is one.
    others = ("resource_tracker", "multiprocessing.forkserver", "cmacc.clips.media.guard")
    children = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    return [c.pid for c in children if not any(o in " ".join(c.cmdline()) for o in others)]


def deaths_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "cmacc" and "restarted" in r.getMessage()]


def fatal(monkeypatch: pytest.MonkeyPatch, path: Path | str | None, end: Callable[[], object]) -> None:
    """From now on decoding this file, or any for None, meets ``end``; forked workers inherit it."""

    def decode(source: Any, starts: Sequence[float], spec: ClipSpec) -> list[Clip]:
        if path is None or source == path:
            end()
        return decode_clips(source, starts, spec)

    monkeypatch.setattr(loader_module, "decode_clips", decode)


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("quick_watch")
@pytest.mark.parametrize(("workers", "k"), [(1, 1), (2, 3)])
def test_a_killed_worker_is_survived(films: Manifest, caplog: pytest.LogCaptureFixture, workers: int, k: int) -> None:
    the_plan = plan(films, ids=tuple(range(7)), k=k)
    made = []
    loader = training_loader(the_plan, SPEC, first_step=1, last_step=30, workers=workers, start_method="fork")
    for number, batch in enumerate(loader):
        made.append(batch)
        if number in (2, 11):
            os.kill(living_workers()[0], signal.SIGKILL)
            # torch's own watch would raise here, amid the caller's work.
            time.sleep(0.2)
    assert_same(made, batches(the_plan, 1, 30))
    assert len(deaths_in(caplog)) == 2
    assert "DataLoader worker (pid" in deaths_in(caplog)[0]
    assert living_workers() == []


@pytest.mark.usefixtures("quick_watch")
@pytest.mark.parametrize(("end", "reason"), [(kill_oneself, "crashed the worker"), (time.sleep, "hung its decoder")])
def test_a_fatal_file_is_replaced_and_reported(
    films: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    end: Callable[..., object],
    reason: str,
) -> None:
    culprit = Path(films.records[4].path)

    def refuse() -> None:
        raise MediaError(f"{culprit}: {reason}")

    fatal(monkeypatch, culprit, refuse)
    the_plan = plan(films, k=2)
    expected = batches(the_plan, 0, 8)
    fatal(monkeypatch, culprit, (lambda: end(600)) if end is time.sleep else end)
    for workers in (1, 2):
        caplog.clear()
        made = batches(the_plan, 0, 8, workers, start_method="fork", hang_seconds=0.5)
        for batch, wanted in zip(made, expected, strict=True):
            assert list(batch.failures) == list(wanted.failures)
            assert all(reason in message and str(culprit) in message for message in batch.failures.values())
        assert_same([dataclasses.replace(b, failures={}) for b in made], [
            dataclasses.replace(b, failures={}) for b in expected
        ])  # fmt: skip
        assert len(deaths_in(caplog)) == 2
        assert all(culprit.name in line for line in deaths_in(caplog))
        assert living_workers() == []


@pytest.mark.usefixtures("quick_watch")
def test_evaluation_skips_a_fatal_file(films: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    fatal(monkeypatch, Path(films.records[1].path), kill_oneself)
    # The default of Python 3.14, a server that forks, inherits nothing from here.
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    requests = evaluation_requests(films, [0, 1, 2], SPEC.length_seconds)
    first, second = evaluation_loader(films, requests, SPEC, batch_size=2, workers=1)
    assert first.sample_ids.tolist() == [0]
    assert list(first.failures) == [1]
    assert second.sample_ids.tolist() == [2]


@pytest.mark.usefixtures("quick_watch")
def test_deaths_without_end_are_an_error(
    films: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fatal(monkeypatch, None, kill_oneself)
    with pytest.raises(
        MediaError, match=r"loader: workers must live for one batch .* got 6 deaths in a row .*workers=0"
    ):
        batches(plan(films), 0, 2, 1, start_method="fork")
    assert len(deaths_in(caplog)) == 6
    assert living_workers() == []


def test_torch_is_still_as_the_loader_expects() -> None:
    """Each is used by the loader; where torch changes one, this says which, before workers die and nobody knows why."""
    iterator: Any = iter(DataLoader(_Slow(), num_workers=1, timeout=0.05, multiprocessing_context="fork"))
    assert getattr(iterator, "_worker_pids_set", None) is True, "DataLoader's iterator: _worker_pids_set is gone"
    assert hasattr(torch._C, "_remove_worker_pids"), "torch._C._remove_worker_pids is gone"
    with pytest.raises(RuntimeError) as timed_out:
        next(iterator)
    assert str(timed_out.value).startswith(loader_module._TIMED_OUT), "a time-out is told in other words"
    unwatch(iterator)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)  # were it still watched, torch's handler would raise here, not in next()
    with pytest.raises(RuntimeError) as died:
        next(iterator)
    assert str(died.value).startswith(loader_module._DIED), "a death is told in other words"
    del iterator  # to take the workers off the watch a second time would be an error, which pytest reports


class _Slow(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        time.sleep(60)
        return 0


_USE = """
import os, signal, sys, time
from pathlib import Path
import psutil
from cmacc.clips import ClipSpec, Manifest, TrainingPlan, training_loader

if __name__ == "__main__":
    films = Manifest.read(sys.argv[1])
    plan = TrainingPlan(films, (0, 1, 2, 3, 4, 5), 0.3, 3, 0, 1)
    loader = training_loader(
        plan, ClipSpec(2, 10.0, 24, 32, 0.3, 8_000), first_step=0, last_step=8, workers=2, start_method=sys.argv[2]
    )
    for number, batch in enumerate(loader):
        if number == 2:
            workers = [p for p in psutil.Process().children() if "resource_tracker" not in " ".join(p.cmdline())]
            # Nothing is there to be left behind, should all be killed now, the parent too.
            assert sys.platform != "linux" or os.listdir(os.environ["TMPDIR"]) == []
            os.kill(workers[0].pid, signal.SIGKILL)
    assert number == 7
"""


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_killed_workers_leave_nothing_in_the_temp_folder(films: Manifest, tmp_path: Path, start_method: str) -> None:
    """All workers are killed in the end, one here in the middle. In a temp folder whose path is too long for sockets,
    the loader would wait for batches that no worker can send.
    """
    films.write(tmp_path / "films.csv")
    (tmp_path / "use.py").write_text(_USE)
    temp = tmp_path / ("long" * 30)
    temp.mkdir()
    result = subprocess.run(
        [sys.executable, str(tmp_path / "use.py"), str(tmp_path / "films.csv"), start_method],
        env=os.environ | {"TMPDIR": str(temp), "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "workers are restarted" in result.stderr
    assert list(temp.iterdir()) == []


def test_other_errors_of_workers_are_not_survived(films: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("a bug"), OSError("a disk")):

        def fail(error: Exception = error) -> None:
            raise error

        fatal(monkeypatch, None, fail)
        with pytest.raises(type(error), match=f"(?s)Caught .*{error}"):
            batches(plan(films), 0, 2, 1, start_method="fork")
    assert living_workers() == []


def test_a_loader_that_is_left_leaves_no_worker(films: Manifest) -> None:
    loader = training_loader(plan(films), SPEC, first_step=0, last_step=100, workers=2, start_method="fork")
    for _ in loader:
        assert len(living_workers()) == 2
        break
    assert living_workers() == []
    assert_same(list(loader)[:2], batches(plan(films), 0, 2))  # and it can be begun again


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("start_method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_memory_does_not_grow_with_the_manifest(films: Manifest, start_method: str, workers: int) -> None:
    """200,000 paths in a Python list are 20 MB and more, in each worker."""
    used = []
    for count in (1_000, 200_000):
        many = Manifest()
        many.table = films.table.take(np.arange(count) % 6)
        the_plan = TrainingPlan(many, tuple(range(count)), SPEC.length_seconds, 20, 0)
        loader = training_loader(the_plan, SPEC, first_step=0, last_step=10, workers=workers, start_method=start_method)
        for number, _ in enumerate(loader):
            if number == 5:
                used.append([psutil.Process(pid).memory_full_info().uss for pid in living_workers()])
    assert len(used[0]) == len(used[1]) == workers
    assert max(used[1]) - max(used[0]) < 12e6


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_skips_the_broken_file(films: Manifest) -> None:
    requests = evaluation_requests(films, [5, 6, 1], SPEC.length_seconds, windows_per_file=2)
    assert [r.sample_id for r in requests] == [5, 5, 6, 6, 1, 1]
    assert [r.start_seconds for r in requests[:2]] == pytest.approx([0.0, 2.0 - 0.3])
    loader = evaluation_loader(films, requests, SPEC, batch_size=4, workers=0)
    first, second = list(loader)
    assert first.sample_ids.tolist() == [5, 5]
    assert first.frames.shape[0] == first.waveforms.shape[0] == len(first.labels) == 2
    assert list(first.failures) == [6]
    assert second.sample_ids.tolist() == [1, 1]
    assert second.failures == {}
    wanted = decode_clip(films.records[5].path, requests[1].start_seconds, SPEC)
    assert torch.equal(first.frames[1], wanted.frames)
    np.testing.assert_array_equal(first.waveforms[1], wanted.waveform)


def test_evaluation_of_broken_files_only_gives_empty_batches(films: Manifest) -> None:
    (batch,) = evaluation_loader(films, [ClipRequest(6, 0.0)], SPEC, batch_size=4, workers=0)
    assert batch.frames.shape == (0, 2, 24, 32, 3)
    assert list(batch.failures) == [6]


# ---- windows over whole files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_covering_windows_are_those_decoded_alone(films: Manifest, workers: int) -> None:
    the_plan = CoveringPlan(films, [4, 0, 6, 5, 1], SPEC.length_seconds, 0.15, 9)  # the broken file in the middle
    loader = covering_loader(the_plan, SPEC, workers=workers)
    made = list(loader)
    assert len(made) == len(loader) == len(the_plan)
    failures = 0
    for wanted, batch in zip(the_plan, made, strict=True):
        assert list(batch.failures) == [6] * (6 in {r.sample_id for r in wanted})
        failures += len(batch.failures)
        kept = [r for r in wanted if r.sample_id not in batch.failures]
        assert batch.sample_ids.tolist() == [r.sample_id for r in kept]
        for place, request in enumerate(kept):
            alone = decode_clip(films.records[request.sample_id].path, request.start_seconds, SPEC)
            assert torch.equal(batch.frames[place], alone.frames)
            assert torch.equal(batch.waveforms[place], alone.waveform)
    assert failures > 0


def test_a_batch_opens_a_file_once_and_short_files_share_one(films: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(source: Any, starts: Sequence[float], spec: ClipSpec) -> list[Clip]:
        calls.append(len(starts))
        return decode_clips(source, starts, spec)

    monkeypatch.setattr(loader_module, "decode_clips", counted)
    the_plan = CoveringPlan(films, [0, 1, 5, 2], SPEC.length_seconds, 0.3, 8)
    sizes = [len(batch.sample_ids) for batch in covering_loader(the_plan, SPEC, workers=0)]
    assert calls == [4, 4, 7, 5]  # of 1, 1.2, 2 and 1.4 s
    assert sizes == [8, 7, 5]


@pytest.mark.usefixtures("quick_watch")
def test_covering_windows_survive_a_fatal_file(films: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    fatal(monkeypatch, Path(films.records[1].path), kill_oneself)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")
    the_plan = CoveringPlan(films, [0, 1, 2], SPEC.length_seconds, 0.3, 8)
    first, second = covering_loader(the_plan, SPEC, workers=1)
    assert first.sample_ids.tolist() == [0] * 4
    assert list(first.failures) == [1]
    assert second.sample_ids.tolist() == [2] * 5
