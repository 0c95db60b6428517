"""k-means++ seeding against a sampler in plain Python on explicit rows, and against enumerated probabilities."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from cmacc.negatives import kmeans_plusplus, seeding
from cmacc.negatives.rows import Rows
from cmacc.negatives.shards import Shards

# Seeds are fixed, so a test either passes for ever or fails for ever: this is the chance, once, of a false alarm.
ALPHA = 1e-6


@settings(max_examples=200, derandomize=True)
@given(
    number=st.integers(0, 10**6),
    rows=st.integers(1, 12),
    whole=st.booleans(),
    proposals=st.integers(1, 9),
    data=st.data(),
)
def test_same_picks_as_plain_python_on_explicit_outer_products(
    number: int, rows: int, whole: bool, proposals: int, data: st.DataObject
) -> None:
    """From the same random numbers. Whole numbers bring duplicates and rows of zeros, with exact distances."""
    generator = torch.Generator().manual_seed(number)
    left = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    right = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
    if whole:
        left, right = left.round(), right.round()
    eligible = torch.rand(rows, generator=generator) < 0.8
    eligible[data.draw(st.integers(0, rows - 1))] = True
    count = data.draw(st.integers(1, int(eligible.sum())))
    given = data.draw(st.integers(0, 2))
    centres = left[:given] + 1, right[:given]
    picks = _seed((left, right), count, number, most_proposals=proposals, eligible=eligible, initial_centers=centres)
    explicit = _outer(left, right)
    assert picks == _naive(explicit, _outer(*centres), eligible.tolist(), count, number, proposals)


METHODS: dict[str, dict[str, Any]] = {
    "auto": {"most_proposals": None},
    "one by one": {"most_proposals": 1},
    "blocks of 2": {"most_proposals": 2},
    "blocks of 3": {"most_proposals": 3},
    "blocks of 16": {"most_proposals": 16},
    "greedy of 2": {"most_proposals": 1, "local_trials": 2},
    "greedy of 4": {"most_proposals": 1, "local_trials": 4},
}
# Norms from 0.4 to 5, so that few runs tell D^2 from D; no two potentials are equal, which greedy could not tell apart.
LEFT = torch.tensor([[1.0, 0.2], [1.0, 0.5], [0.1, 2.0], [-1.3, 1.0], [0.3, -0.25]])
RIGHT = torch.tensor([[1.0, 1.1], [0.5, -1.0], [1.0, 0.3], [0.7, 2.9], [0.9, 0.6]])


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 4])
def test_frequencies_are_the_enumerated_probabilities(method: str, count: int) -> None:
    runs = 800
    rows = _outer(LEFT, RIGHT)
    observed = Counter(
        tuple(_seed((LEFT, RIGHT), count, number, **METHODS[method])) for number in range(runs)
    )  # fmt: skip
    local_trials = METHODS[method].get("local_trials", 1)
    assert _p_value(observed, _probabilities(rows, count, local_trials=local_trials), runs) > ALPHA
    # The test has the power to tell D^2 from D and from a uniform draw.
    assert _p_value(observed, _probabilities(rows, count, local_trials=local_trials, power=1), runs) < ALPHA
    assert _p_value(observed, _probabilities(rows, count, local_trials=local_trials, power=0), runs) < ALPHA


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize("proposals", [1, 2, 16])
def test_frequencies_from_given_centres_among_the_eligible(proposals: int) -> None:
    runs = 800
    rows, eligible = _outer(LEFT, RIGHT), torch.tensor([True, True, False, True, True])
    centres = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.5]])
    observed = Counter(
        tuple(_seed((LEFT, RIGHT), 2, number, most_proposals=proposals, eligible=eligible, initial_centers=centres))
        for number in range(runs)
    )
    fair = _probabilities(rows, 2, given=_outer(*centres), barred=(2,))
    assert _p_value(observed, fair, runs) > ALPHA
    assert _p_value(observed, _probabilities(rows, 2, barred=(2,)), runs) < ALPHA


def test_the_methods_of_the_public_function_are_those_that_were_tested() -> None:
    points = torch.randn(200, 4)
    for method, fixed in (("one_by_one", 1), ("blocks", None), ("auto", None)):
        public = kmeans_plusplus(points, 20, generator=torch.Generator().manual_seed(3), method=method)  # type: ignore[arg-type]
        number = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
        assert public.tolist() == _seed((points,), 20, number, most_proposals=fixed)
    greedy = kmeans_plusplus(points, 20, generator=torch.Generator().manual_seed(3), local_trials=3)
    assert greedy.tolist() == _seed((points,), 20, number, most_proposals=1, local_trials=3)


@pytest.mark.usefixtures("users_checks")
def test_greedy_leaves_a_smaller_potential() -> None:
    """Over 40 seeds on clustered rows; the mean falls with the number of local_trials."""
    points = 10 * torch.randn(15, 4)[torch.arange(300) % 15] + torch.randn(300, 4)

    def mean(local_trials: int) -> float:
        return float(
            np.mean(
                [
                    _potential(
                        points.numpy(), _seed((points,), 15, number, most_proposals=1, local_trials=local_trials)
                    )
                    for number in range(40)
                ]
            )
        )

    assert mean(8) < 0.9 * mean(3) < 0.81 * mean(1)


def test_parts_and_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows read 50 at a time, centres 7 at a time, weights summed 64 at a time: the same picks."""
    points, centres = (torch.randn(1000, 6), torch.randn(1000, 5)), (torch.randn(30, 6), torch.randn(30, 5))
    whole = [_seed(points, 40, number, initial_centers=centres) for number in range(10)]
    monkeypatch.setattr(seeding, "CENTRES_AT_A_TIME", 7)
    monkeypatch.setattr(seeding, "SUMMED_ROWS", 64)
    assert [_seed(points, 40, number, initial_centers=centres, part_rows=50) for number in range(10)] == whole


SHAPES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "zeros": lambda n, _: torch.zeros(n, 4),
    "all equal": lambda n, g: torch.randn(1, 4, generator=g).expand(n, 4),
    "duplicates": lambda n, g: torch.randn(3, 4, generator=g)[torch.arange(n) % 3],
    "some zero": lambda n, g: torch.randn(n, 4, generator=g) * (torch.arange(n) % 2)[:, None],
    "one-hot": lambda n, _: torch.eye(n),
    "12 orders of magnitude": lambda n, g: torch.randn(n, 4, generator=g) * torch.logspace(-6, 6, n)[:, None],
    "two far clusters": lambda n, g: 1e4 * (torch.arange(n) % 2)[:, None] + 1e-3 * torch.randn(n, 4, generator=g),
    "at the end of the range": lambda n, g: 1e38 * torch.rand(n, 4, generator=g),
}


@settings(max_examples=150, derandomize=True)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    rows=st.integers(1, 20),
    all_rows=st.booleans(),
    factors=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_always_as_many_distinct_rows_as_asked(
    shape: str, rows: int, all_rows: bool, factors: bool, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    count = rows if all_rows else data.draw(st.integers(1, rows))
    generator = torch.Generator().manual_seed(seed)
    points = SHAPES[shape](rows, generator).to(dtype)
    picks = kmeans_plusplus((points, points) if factors else points, count, generator=generator)
    assert picks.dtype == torch.int64
    assert len(set(picks.tolist())) == len(picks) == count
    assert set(picks.tolist()) <= set(range(rows))


def test_both_far_clusters_and_every_distinct_row_come_before_any_copy() -> None:
    points = torch.tensor([[0.0, 1.0], [50.0, 0.0], [-3.0, 7.0]])[torch.arange(30) % 3]
    for seed in range(20):
        picks = kmeans_plusplus(points, 5, generator=torch.Generator().manual_seed(seed))
        assert sorted((picks[:3] % 3).tolist()) == [0, 1, 2]
    far = SHAPES["two far clusters"](20, torch.Generator().manual_seed(0))
    for seed in range(20):
        picks = kmeans_plusplus(far, 2, generator=torch.Generator().manual_seed(seed))
        assert sorted((picks % 2).tolist()) == [0, 1]


def test_rounding_is_no_distance() -> None:
    """Between copies of a long row terms cancel to rounding errors, larger than the true distances of short rows."""
    copies, short = (1e3 * torch.randn(1, 64)).expand(30, 64), 0.05 * torch.randn(5, 64)
    for seed in range(20):
        picks = kmeans_plusplus(torch.cat([copies, short]), 6, generator=torch.Generator().manual_seed(seed))
        assert set(range(30, 35)) <= set(picks.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_worked_on_in_single_precision(dtype: torch.dtype) -> None:
    """Squares of 1000 are infinite in float16; far from the origin half precision sees no distances at all."""
    points = (1000 + torch.randn(40, 300) * torch.logspace(0, 2, 40)[:, None]).to(dtype)
    for seed in range(10):
        picks = kmeans_plusplus(points, 10, generator=torch.Generator().manual_seed(seed))
        wide = kmeans_plusplus(points.float(), 10, generator=torch.Generator().manual_seed(seed))
        assert picks.tolist() == wide.tolist()
        assert len(set(picks.tolist())) == 10


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-42), (torch.float32, 1e37), (torch.float64, 1e-310), (torch.float64, 1e307)]
)
@pytest.mark.parametrize("factors", [False, True])
def test_at_both_ends_of_a_types_range(dtype: torch.dtype, scale: float, factors: bool) -> None:
    """Few digits are left of numbers as small as these; the three groups are told apart all the same."""
    points = torch.tensor([[0.0, 0.0], [0.0, 3.0], [5.0, 0.0]], dtype=dtype)[torch.arange(30) % 3] * scale
    other = torch.ones(30, 2, dtype=dtype)
    for seed in range(10):
        picks = kmeans_plusplus(
            (points, other) if factors else points, 3, generator=torch.Generator().manual_seed(seed)
        )
        assert sorted((picks % 3).tolist()) == [0, 1, 2]


def test_given_centres_may_be_far_longer_than_the_points() -> None:
    points = torch.randn(30, 4) * 1e-6
    for scale in (1.0, 1e20):
        picks = kmeans_plusplus(points, 10, initial_centers=torch.ones(3, 4) * scale)
        assert len(set(picks.tolist())) == 10


@pytest.mark.parametrize("setting", ["older", "cuda", "mkldnn", "all"])
def test_reduced_precision_is_set_aside_whichever_way_it_was_asked_for(setting: str) -> None:
    """torch has two interfaces for it, which it does not let a program mix. In a process of its own."""
    code = f"""
import torch
from cmacc.negatives import kmeans_plusplus
points = 10 + torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
plain = kmeans_plusplus(points, 20, generator=torch.Generator().manual_seed(0)).tolist()
def ask():
    if {setting!r} == "older": torch.set_float32_matmul_precision("medium")
    if {setting!r} == "cuda": torch.backends.cuda.matmul.fp32_precision = "tf32"
    if {setting!r} == "mkldnn": torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if {setting!r} == "all": torch.backends.fp32_precision = "tf32"
def state():
    return [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
ask(); before = state()
assert kmeans_plusplus(points, 20, generator=torch.Generator().manual_seed(0)).tolist() == plain
assert state() == before, (state(), before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("exponent", [-40, 60])
def test_the_scale_does_not_matter(exponent: int) -> None:
    """Squared lengths of outer products are fourth powers of the scale, beyond float32 in both directions."""
    left, right = torch.randn(30, 5), torch.randn(30, 4)
    scale = 2.0**exponent
    for seed in range(10):
        plain = kmeans_plusplus((left, right), 8, generator=torch.Generator().manual_seed(seed))
        scaled = kmeans_plusplus((left * scale, right * scale), 8, generator=torch.Generator().manual_seed(seed))
        assert plain.tolist() == scaled.tolist()


def test_autocast_changes_nothing() -> None:
    points = 10 + torch.randn(60, 32)
    plain = kmeans_plusplus(points, 20, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        low = kmeans_plusplus(points, 20, generator=torch.Generator().manual_seed(0))
    assert plain.tolist() == low.tolist()


def test_the_generator_alone_decides() -> None:
    points = torch.randn(50, 3)
    global_state = torch.random.get_rng_state()
    first = kmeans_plusplus(points, 10, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.random.get_rng_state(), global_state)
    torch.rand(7)
    assert torch.equal(first, kmeans_plusplus(points, 10, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(first, kmeans_plusplus(points, 10, generator=torch.Generator().manual_seed(6)))


def test_expected_potential_is_within_the_proven_bound_of_the_best() -> None:
    """Arthur and Vassilvitskii, theorem 3.1: 8 (ln k + 2). The far single rows are what a uniform draw would miss."""
    points = np.array([[0.0], [0.01], [0.02], [0.03], [0.01], [100.0], [-200.0]])
    for count in (2, 3):
        best = min(
            sum(
                float(((group - group.mean(0)) ** 2).sum())
                for label in range(count)
                if len(group := points[[i for i, of in enumerate(labels) if of == label]])
            )
            for labels in itertools.product(range(count), repeat=len(points))
        )
        bound = 8 * (math.log(count) + 2) * best
        seeded = [
            kmeans_plusplus(torch.from_numpy(points), count, generator=torch.Generator().manual_seed(seed)).tolist()
            for seed in range(300)
        ]
        assert np.mean([_potential(points, picks) for picks in seeded]) <= bound
    uniform = [_potential(points, picks) for picks in itertools.combinations(range(len(points)), 3)]
    assert np.mean(uniform) > bound


@pytest.mark.parametrize(
    ("points", "count", "message"),
    [
        (torch.ones(4, 2), 0, r"count must be in 1\.\.4 \(the number of rows\), got 0"),
        (torch.ones(4, 2), 5, r"count must be in 1\.\.4 \(the number of rows\), got 5"),
        (torch.ones(0, 2), 1, r"count must be in 1\.\.0"),
        (torch.ones(4), 1, r"points must be \(N, D\), or a pair .*, got \(4,\)"),
        (torch.ones(()), 1, r"points must be \(N, D\), or a pair .*, got \(\)"),
        (torch.ones(4, 0), 1, r"with at least one column, got \(4, 0\)"),
        ((torch.ones(4, 2), torch.ones(3, 2)), 1, r"points must be .*, got \(4, 2\) and \(3, 2\)"),
        ((torch.ones(4, 2), torch.ones(4)), 1, r"points must be .*, got \(4, 2\) and \(4,\)"),
        (torch.ones(4, 2, dtype=torch.int64), 1, r"points must be of a float type, got torch\.int64"),
        (torch.tensor([[0.0], [1.0], [float("nan")]]), 1, "points must be finite, got NaN or infinity in row 2"),
        ((torch.ones(3, 1), torch.tensor([[1.0], [float("inf")], [1.0]])), 1, "got NaN or infinity in row 1"),
        (torch.full((3, 2), 3e38).index_fill(0, torch.tensor(2), float("nan")), 1, "got NaN or infinity in row 2"),
    ],
)
def test_errors(points: Tensor | tuple[Tensor, Tensor], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^kmeans_plusplus: .*{message}"):
        kmeans_plusplus(points, count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_trials": 0}, "local_trials must be at least 1, got 0"),
        ({"local_trials": 2, "method": "blocks"}, "method must be auto or one_by_one with local_trials=2, got blocks"),
        (
            {"eligible": torch.ones(3, dtype=torch.bool)},
            r"eligible must have one bool for each of the 4 rows, got \(3,\)",
        ),
        ({"eligible": torch.arange(4) < 1}, r"count must be in 1\.\.1 \(the number of eligible rows\), got 2"),
        ({"initial_centers": torch.ones(2, 3)}, r"initial_centers must have the columns of points, \[2\], got \[3\]"),
        ({"initial_centers": torch.tensor([[1.0, float("nan")]])}, "initial_centers must be finite"),
        ({"initial_centers": torch.ones(2)}, r"initial_centers must be \(N, D\), or a pair .*, got \(2,\)"),
    ],
)
def test_errors_of_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^kmeans_plusplus: {message}"):
        kmeans_plusplus(torch.randn(4, 2), 2, **options)


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.ones((4, 2)), "points must be a Tensor, or a tuple of two, got ndarray"),
        ([torch.ones(4, 2)] * 2, "points must be a Tensor, or a tuple of two, got list"),
        ((), "points must be a Tensor, or a tuple of two, got an empty tuple"),
    ],
)
def test_other_containers(points: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^kmeans_plusplus: {message}"):
        kmeans_plusplus(points, 2)
    with pytest.raises(ValueError, match=r"eligible must have one bool for each of the 4 rows, .* of torch.int64"):
        kmeans_plusplus(torch.ones(4, 2), 2, eligible=torch.ones(4, dtype=torch.int64))


@pytest.mark.usefixtures("users_checks")
def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="method must be one of auto, blocks, one_by_one, got 'best'"):
        kmeans_plusplus(torch.ones(4, 2), 1, method="best")  # type: ignore[arg-type]


def _seed(
    tables: tuple[Tensor, ...],
    count: int,
    number: int,
    *,
    most_proposals: int | None = None,
    local_trials: int = 1,
    eligible: Tensor | None = None,
    initial_centers: tuple[Tensor, ...] | None = None,
    part_rows: int = 10_000,
) -> list[int]:
    """The bare loop, with the random numbers of ``number``."""
    rows = Rows(tables, Shards(len(tables[0])), torch.device("cpu"), part_rows, "test", initial_centers=initial_centers)
    return seeding.seed(
        rows, count, eligible, number, most_proposals=most_proposals, local_trials=local_trials, owner="test"
    ).indices.tolist()


def _outer(left: Tensor, right: Tensor) -> NDArray[np.float64]:
    return torch.einsum("na,nb->nab", left, right).flatten(1).double().numpy()


def _squared_distances(rows: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every row to its nearest centre; infinite without centres."""
    return np.array([min([float(((row - centre) ** 2).sum()) for centre in centres], default=math.inf) for row in rows])


def _naive(
    rows: NDArray[np.float64],
    given: NDArray[np.float64],
    eligible: list[bool],
    count: int,
    number: int,
    proposals: int,
) -> list[int]:
    """k-means++ by blocks, as the module's head says it, on explicit rows."""
    generator = torch.Generator().manual_seed(number)
    picks: list[int] = []

    def weights() -> list[float]:
        squared = _squared_distances(rows, np.concatenate([given, rows[picks]]))
        return [
            float(d) if free and i not in picks else 0.0
            for i, (d, free) in enumerate(zip(squared, eligible, strict=True))
        ]

    while len(picks) < count:
        now = weights()
        free = [i for i in range(len(rows)) if eligible[i] and i not in picks]
        first = math.inf in now
        if first:
            now = [float(i in free) for i in range(len(rows))]
        elif sum(now) == 0:
            chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
            return picks + chance.sample(free, count - len(picks))
        drawn, chances = torch.rand(2, 1 if first else proposals, dtype=torch.float64, generator=generator).tolist()
        cumulative = np.cumsum(now)
        block = [int(np.searchsorted(cumulative, u * cumulative[-1], side="right")) for u in drawn]
        for row, chance in zip(block, chances, strict=True):
            if len(picks) < count and (first or chance * now[row] < weights()[row]):
                picks.append(row)
    return picks


def _probabilities(
    rows: NDArray[np.float64],
    count: int,
    *,
    local_trials: int = 1,
    power: int = 2,
    given: NDArray[np.float64] | None = None,
    barred: tuple[int, ...] = (),
) -> dict[tuple[int, ...], float]:
    """Of every ordered choice: the product of each next one's share; greedy: of being the best of the draws."""
    given = rows[:0] if given is None else given
    free = [i for i in range(len(rows)) if i not in barred]

    def shares(picks: tuple[int, ...]) -> NDArray[np.float64]:
        squared = _squared_distances(rows, np.concatenate([given, rows[list(picks)]]))
        weights = np.array([1.0 if d == math.inf else d ** (power / 2) if d else 0.0 for d in squared])
        weights[list(barred + picks)] = 0
        weights /= weights.sum()
        if local_trials == 1 or not (picks or len(given)):
            return weights
        # The best draw is row i if all draws are among the rows no better than i, and not all among the worse.
        left_over = [
            _squared_distances(rows[free], np.concatenate([given, rows[[*picks, i]]])).sum() for i in range(len(rows))
        ]
        order = sorted(range(len(rows)), key=lambda i: (left_over[i], i))
        tail = np.cumsum([weights[i] for i in order][::-1])[::-1]
        best = tail**local_trials - np.append(tail[1:], 0) ** local_trials
        result = np.zeros(len(rows))
        result[order] = best
        return result

    result = {}
    for picks in itertools.permutations(free, count):
        probability = 1.0
        for k in range(count):
            probability *= shares(picks[:k])[picks[k]]
        result[picks] = probability
    assert sum(result.values()) == pytest.approx(1)
    return result


def _p_value(observed: dict[tuple[int, ...], int], probabilities: dict[tuple[int, ...], float], runs: int) -> float:
    """Chi-square; choices expected fewer than ten times count as one."""
    assert set(observed) <= set(probabilities)
    rare = [picks for picks, p in probabilities.items() if runs * p < 10]
    common = [picks for picks in probabilities if picks not in rare]
    counts = [observed.get(picks, 0) for picks in common]
    expected = [runs * probabilities[picks] for picks in common]
    if rare:
        counts.append(sum(observed.get(picks, 0) for picks in rare))
        expected.append(runs * sum(probabilities[picks] for picks in rare))
    return float(chisquare(counts, expected).pvalue)


def _potential(points: NDArray[np.float64], picks: Sequence[int]) -> float:
    return float(_squared_distances(points, points[list(picks)]).sum())
