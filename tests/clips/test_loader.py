"""Batches: the same whatever the workers, the resume point and the broken files."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cmacc.clips.clip import ClipBatch, ClipSpec
from cmacc.clips.container import MediaError
from cmacc.clips.loader import (
    ClipRequest,
    TrainingPlan,
    evaluation_loader,
    evaluation_requests,
    training_loader,
)
from cmacc.clips.manifest import Manifest, MediaRecord
from cmacc.clips.media import decode_clip

from .conftest import Recipe

SPEC = ClipSpec(2, 10.0, 24, 32, 0.3, 8_000)


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
    films: Manifest, ids: tuple[int, ...] = (0, 1, 2, 3, 4, 5), batch_size: int = 3, seed: int = 0
) -> TrainingPlan:
    return TrainingPlan(films, ids, SPEC.length_seconds, batch_size, seed)


def batches(the_plan: TrainingPlan, first: int, last: int, workers: int = 0) -> list[ClipBatch]:
    return list(training_loader(the_plan, SPEC, first_step=first, last_step=last, workers=workers))


def assert_same(some: list[ClipBatch], others: list[ClipBatch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for name in ("frames", "waveforms", "sample_ids", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.failures == other.failures


# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size"), [(6, 3), (6, 2), (5, 2), (6, 6), (6, 1)])
def test_an_epoch_visits_each_file_once(films: Manifest, count: int, batch_size: int) -> None:
    the_plan = plan(films, tuple(range(count)), batch_size)
    steps = count // batch_size
    assert the_plan.steps_per_epoch == steps
    orders = []
    for epoch in range(4):
        requests = [r for step in range(epoch * steps, (epoch + 1) * steps) for r in the_plan.requests(step)]
        visited = Counter(r.sample_id for r in requests)
        assert set(visited.values()) == {1}
        assert len(visited) == steps * batch_size
        assert {r.epoch for r in requests} == {epoch} == {the_plan.epoch(epoch * steps)}
        orders.append(tuple(r.sample_id for r in requests))
        for request in requests:
            duration = films.records[request.sample_id].duration_seconds
            assert 0 <= request.start_seconds <= duration - SPEC.length_seconds
    assert len(set(orders)) > 1


def test_windows_differ_between_epochs_seeds_and_files_only(films: Manifest) -> None:
    starts = {plan(films, seed=s).request(2, epoch).start_seconds for s in (0, 1) for epoch in range(5)}
    assert len(starts) == 10
    fewer = plan(films, ids=(1, 2, 3), batch_size=1)
    assert fewer.request(2, 4) == plan(films).request(2, 4)  # neither batch size nor the other files matter


def test_bad_plans_are_refused(films: Manifest) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be at most the number of usable files, got 3 with 2 files"):
        plan(films, ids=(0, 1))
    with pytest.raises(ValueError, match="TrainingPlan: batch_size must be at least 1, got 0"):
        plan(films, batch_size=0)


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


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(films: Manifest, workers: int) -> None:
    the_plan = plan(films, ids=tuple(range(7)))  # the broken file among them
    assert_same(batches(the_plan, 0, 5, workers), batches(the_plan, 0, 5))


def test_resuming_goes_on_as_if_nothing_had_happened(films: Manifest) -> None:
    whole = batches(plan(films), 0, 5)
    for k in (1, 2, 3):
        assert_same(batches(plan(films), k, 5), whole[k:])
    differing = batches(plan(films, seed=1), 0, 5)
    assert any(not torch.equal(a.waveforms, b.waveforms) for a, b in zip(whole, differing, strict=True))


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


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_files_is_an_error(films: Manifest, workers: int) -> None:
    with pytest.raises(MediaError, match=r"1 files in a row do not decode, among them .*broken\.mp4"):
        batches(plan(films, ids=(6,), batch_size=1), 0, 1, workers)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_leaves_the_broken_file_out(films: Manifest) -> None:
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
