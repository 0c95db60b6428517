"""The plan: what each step reads, and where it lies; no file is touched."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cmacc.clips.catalog.manifest import Manifest, MediaRecord
from cmacc.clips.loading.plan import (
    ClipRequest,
    CoveringPlan,
    FileTable,
    TrainingPlan,
    epoch_order,
    evaluation_requests,
)
from cmacc.clips.storage import Extent
from cmacc.clips.windows import covering_starts

LENGTH_SECONDS = 0.3


def manifest(count: int = 7) -> Manifest:
    return Manifest([MediaRecord(Path(f"/films/{i}.mp4"), 1 + i / 5, 25.0, 64, 48, True, 44_100) for i in range(count)])


def plan(ids: tuple[int, ...] = (0, 1, 2, 3, 4, 5), batch_size: int = 3, seed: int = 0, k: int = 1) -> TrainingPlan:
    return TrainingPlan(manifest(), ids, LENGTH_SECONDS, batch_size, seed, k)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(6, 3), (6, 2), (5, 2), (6, 6), (6, 1)])
def test_an_epoch_visits_each_file_k_times(count: int, batch_size: int, k: int) -> None:
    the_plan = plan(tuple(range(count)), batch_size, k=k)
    steps = count // batch_size * k
    assert the_plan.steps_per_epoch == steps
    records = the_plan.manifest.records
    orders = []
    for epoch in range(4):
        requests = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert the_plan.epoch(step) == epoch
            batch = the_plan.requests(step)
            assert len({r.sample_id for r in batch}) == len(batch) == batch_size
            assert {r.visit for r in batch} == {the_plan.visit(step)} == {epoch * k + step % k}
            requests += batch
        visited = Counter(r.sample_id for r in requests)
        assert len(visited) == count // batch_size * batch_size
        assert set(visited.values()) == {k}
        assert len({(r.sample_id, r.start_seconds) for r in requests}) == len(requests)
        orders.append(tuple(r.sample_id for r in requests))
        for request in requests:
            assert 0 <= request.start_seconds <= records[request.sample_id].duration_seconds - LENGTH_SECONDS
    assert len(set(orders)) > 1


def test_what_seeds_give_never_changes() -> None:
    """Figures of the first version: who goes on with an old run must get its order, windows and substitutes."""
    the_plan = plan(tuple(range(7)), seed=5)
    expected = {
        0: [(1, 0.263123498), (3, 0.114586793), (4, 0.142946338)],
        1: [(2, 0.909394149), (6, 0.4231717), (0, 0.267495271)],
        4: [(2, 0.311931699), (5, 1.399290944), (1, 0.543767463)],
    }
    for step, batch in expected.items():
        assert [(r.sample_id, round(r.start_seconds, 9)) for r in the_plan.requests(step)] == batch
        assert the_plan.visit(step) == the_plan.epoch(step)
    assert list(the_plan.windows.substitutes(2, 2)) == [0, 5, 5, 0, 4, 4, 2, 0, 4, 3, 6, 2, 0, 2, 4, 3]


def test_windows_follow_from_their_seeds() -> None:
    """The same, spelt out: purposes WINDOW (0) and ORDER (2), then seed, epoch or visit, sample id."""
    the_plan = plan(seed=3, k=2)
    for step in range(12):
        epoch, place = divmod(step, 4)
        order = np.random.default_rng([2, 3, epoch]).permutation(6)[place // 2 * 3 :][:3]
        visit = 2 * epoch + place % 2
        for sample_id, request in zip(order.tolist(), the_plan.requests(step), strict=True):
            slack = 1 + sample_id / 5 - LENGTH_SECONDS
            start = float(slack * np.random.default_rng([0, 3, visit, sample_id]).random())
            assert request == ClipRequest(sample_id, start, visit)


def test_windows_differ_between_visits_seeds_and_files_only() -> None:
    starts = {plan(seed=s).windows.request(2, visit).start_seconds for s in (0, 1) for visit in range(5)}
    assert len(starts) == 10
    fewer = plan(ids=(1, 2, 3), batch_size=1, k=2)
    assert fewer.windows.request(2, 4) == plan().windows.request(2, 4)  # neither batch size nor other files matter


def test_an_order_is_drawn_once_an_epoch() -> None:
    epoch_order.cache_clear()
    the_plan = plan(batch_size=1)
    for step in range(12):
        the_plan.requests(step)
    assert epoch_order.cache_info().misses == 2


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size must be at most the number of usable files, got 3 with 2 files"):
        plan(ids=(0, 1))
    with pytest.raises(ValueError, match="TrainingPlan: batch_size must be at least 1, got 0"):
        plan(batch_size=0)
    with pytest.raises(ValueError, match="TrainingPlan: clips_per_video must be at least 1, got 0"):
        plan(k=0)


def test_evaluation_spreads_windows_over_each_file() -> None:
    requests = evaluation_requests(manifest(), [5, 1], LENGTH_SECONDS, windows_per_file=2)
    assert [r.sample_id for r in requests] == [5, 5, 1, 1]
    assert [r.start_seconds for r in requests[:2]] == pytest.approx([0.0, 2.0 - 0.3])


def test_the_table_says_what_the_records_say() -> None:
    records = [
        MediaRecord(Path("/films/a.mp4"), 3.0, 25.0, 64, 48, True, 44_100, "b"),
        MediaRecord(Path("/films/Überlänge 映画.mp4"), 3.0, 25.0, 64, 48, True, 44_100, "a", start_seconds=60.5),
        MediaRecord("s3://bucket/0.tar", 3.0, 25.0, 64, 48, True, 44_100, None, video=Extent(0, 9), audio=Extent(9, 4)),
        MediaRecord(Path("/shards/1.tar"), 3.0, 0.0, 0, 0, True, 44_100, "b", audio=Extent(2**40, 2**33)),
        MediaRecord(Path("/shards/1.tar"), 3.0, 25.0, 64, 48, False, 0, "c", video=Extent(0, 0)),
    ]
    whole = Manifest(records)
    # Rows that begin within a column's memory, and columns in several pieces.
    part, pieces = Manifest(), Manifest()
    part.table = whole.table.slice(1, 3)
    pieces.table = pa.concat_tables([whole.table.slice(3), whole.table.slice(0, 3)])
    for made in (whole, part, pieces):
        files = FileTable.of(made)
        assert files.labels.tolist() == made.label_indices()
        for i, record in enumerate(made.records):
            assert files.source(i) == record.source
            assert files.path(i) == str(record.path)
            assert files.starts_seconds[i] == record.start_seconds
    assert len(FileTable.of(Manifest()).labels) == 0


def lasting(seconds: list[float]) -> Manifest:
    few = manifest(1)
    many = Manifest()
    many.table = few.table.take(np.zeros(len(seconds), np.int64))
    place = many.table.schema.get_field_index("duration_seconds")
    many.table = many.table.set_column(place, "duration_seconds", pa.array(seconds, pa.float64()))
    return many


def runs(batches: Sequence[list[ClipRequest]], sample_id: int) -> list[list[float]]:
    """The windows of a file, batch by batch."""
    found = [[r.start_seconds for r in batch if r.sample_id == sample_id] for batch in batches]
    return [starts for starts in found if starts]


@given(st.lists(st.floats(0.1, 30.0), min_size=1, max_size=12), st.integers(1, 9))
@example([34.0, 34.0, 1.0, 1.0, 3.0], 32)
@example([6.0], 2)
def test_covering_plan_has_each_window_once_in_well_filled_batches(seconds: list[float], batch_size: int) -> None:
    films, ids = lasting(seconds), list(reversed(range(len(seconds))))
    the_plan = CoveringPlan(films, ids, 2.0, 1.0, batch_size)
    batches = list(the_plan)
    assert [r for batch in batches for r in batch] == [
        ClipRequest(i, start) for i in ids for start in covering_starts(seconds[i], 2.0, 1.0)
    ]
    sizes = [len(batch) for batch in batches]
    assert all(1 <= size <= batch_size for size in sizes)
    assert all(one + other > batch_size for one, other in pairwise(sizes)) or len(sizes) == 1
    for i in ids:  # the same windows are decoded together, whatever files are beside it
        assert runs(batches, i) == runs(CoveringPlan(films, [i], 2.0, 1.0, batch_size), i)
    assert the_plan[-1] == batches[-1] == the_plan[-1:][0]
    with pytest.raises(IndexError):
        the_plan[len(batches)]


def test_covering_plan_of_many_long_files_is_made_on_access() -> None:
    count = 20_000
    the_plan = CoveringPlan(lasting([3600.0] * count), range(count), 2.0, 1.0, 64)
    assert len(the_plan) == count * 57  # of 3599 windows
    assert the_plan[-1][-1] == ClipRequest(count - 1, 3598.0)
    assert len(CoveringPlan(manifest(), [], 2.0, 1.0, 64)) == 0


@pytest.mark.usefixtures("users_checks")
def test_bad_covering_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="CoveringPlan: batch_size must be at least 1, got 0"):
        CoveringPlan(manifest(), [0], 2.0, 1.0, 0)
    with pytest.raises(ValueError, match="hop_seconds must be positive and at most length_seconds"):
        CoveringPlan(manifest(), [0], 2.0, 3.0, 8)
