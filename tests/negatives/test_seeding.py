"""k-means++ seeding against a sampler in plain Python on explicit rows, and against enumerated probabilities."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from cmacc.negatives import kmeans_plusplus
from cmacc.negatives.seeding import _seed

# Seeds are fixed, so a test either passes for ever or fails for ever: this is the chance, once, of a false alarm.
ALPHA = 1e-6


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), whole=st.booleans(), data=st.data())
def test_same_picks_as_plain_python_on_explicit_outer_products(
    seed: int, rows: int, whole: bool, data: st.DataObject
) -> None:
    """From the same uniform numbers. Whole numbers bring duplicates and rows of zeros, with exact distances."""
    count = data.draw(st.integers(1, rows))
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    right = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
    if whole:
        left, right = left.round(), right.round()
    uniforms = torch.rand(count, dtype=torch.float64, generator=generator)
    explicit = np.array([np.outer(a, b).ravel() for a, b in zip(left.numpy(), right.numpy(), strict=True)])
    assert _seed(left, right, uniforms).tolist() == _naive(explicit, uniforms.tolist())


@pytest.mark.parametrize("count", [2, 3])
def test_frequencies_are_the_enumerated_probabilities(count: int) -> None:
    left = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.0, 2.0], [-1.0, 1.0], [0.3, -0.8]])
    right = torch.tensor([[1.0, 1.0], [0.5, -1.0], [1.0, 0.0], [0.7, 0.7], [2.0, 0.1]])
    explicit = torch.einsum("na,nb->nab", left, right).flatten(1).double().numpy()
    runs = 3000
    observed: dict[tuple[int, ...], int] = {}
    for seed in range(runs):
        picks = kmeans_plusplus((left, right), count, generator=torch.Generator().manual_seed(seed))
        key = tuple(picks.tolist())
        observed[key] = observed.get(key, 0) + 1
    assert _p_value(observed, _probabilities(explicit, count, power=2), runs) > ALPHA
    # The test has the power to tell D^2 from D and from a uniform draw.
    assert _p_value(observed, _probabilities(explicit, count, power=1), runs) < ALPHA
    assert _p_value(observed, _probabilities(explicit, count, power=0), runs) < ALPHA


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


@settings(max_examples=150, deadline=None, derandomize=True)
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
    ],
)
def test_errors(points: Tensor | tuple[Tensor, Tensor], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^kmeans_plusplus: .*{message}"):
        kmeans_plusplus(points, count)


def _squared_distances(rows: NDArray[np.float64], centres: Sequence[int]) -> list[float]:
    """Of every row to its nearest centre; a centre's own is 0."""
    return [
        0.0 if i in centres else min(float(((row - rows[c]) ** 2).sum()) for c in centres) for i, row in enumerate(rows)
    ]


def _naive(rows: NDArray[np.float64], uniforms: list[float]) -> list[int]:
    picks = [min(int(uniforms[0] * len(rows)), len(rows) - 1)]
    for uniform in uniforms[1:]:
        weights = _squared_distances(rows, picks)
        if sum(weights) == 0:
            weights = [0.0 if i in picks else 1.0 for i in range(len(rows))]
        target, passed = uniform * sum(weights), 0.0
        for i, weight in enumerate(weights):
            passed += weight
            if passed > target:
                picks.append(i)
                break
    return picks


def _probabilities(rows: NDArray[np.float64], count: int, power: int) -> dict[tuple[int, ...], float]:
    """Of every ordered choice: 1 / N, times each next one's share of the distances to that power."""
    result = {}
    for picks in itertools.permutations(range(len(rows)), count):
        probability = 1 / len(rows)
        for k in range(1, count):
            weights = [d ** (power / 2) if d else 0.0 for d in _squared_distances(rows, picks[:k])]
            probability *= weights[picks[k]] / sum(weights)
        result[picks] = probability
    assert sum(result.values()) == pytest.approx(1)
    return result


def _p_value(observed: dict[tuple[int, ...], int], probabilities: dict[tuple[int, ...], float], runs: int) -> float:
    """Chi-square; choices expected fewer than ten times count as one."""
    rare = [picks for picks, p in probabilities.items() if runs * p < 10]
    common = [picks for picks in probabilities if picks not in rare]
    counts = [observed.get(picks, 0) for picks in common]
    expected = [runs * probabilities[picks] for picks in common]
    if rare:
        counts.append(sum(observed.get(picks, 0) for picks in rare))
        expected.append(runs * sum(probabilities[picks] for picks in rare))
    return float(chisquare(counts, expected).pvalue)


def _potential(points: NDArray[np.float64], picks: Sequence[int]) -> float:
    return sum(_squared_distances(points, picks))
