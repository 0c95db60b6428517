"""Active batches: an order that loses nobody, whose groups are those of a brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.negatives import active_batches
from cmacc.negatives.batches import _mutual, _nearest


def rows(count: int, size: int = 8, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def clusters(count: int, of: int) -> tuple[Tensor, Tensor]:
    """``count`` clusters of ``of`` samples each; sample i is in cluster i // of."""
    centres = torch.eye(count).repeat_interleave(of, dim=0)
    near = 0.02 * torch.randn(2, count * of, count, generator=torch.Generator().manual_seed(1))
    return normalize(centres + near[0], dim=1), normalize(centres + near[1], dim=1)


@given(
    count=st.integers(8, 60),
    batch_size=st.integers(2, 8),
    group=st.integers(2, 8),
    share=st.floats(0, 1),
    skip=st.integers(0, 70),
    known=st.floats(0, 1),
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_no_sample_comes_twice_and_only_the_remainder_is_left_out(
    count: int, batch_size: int, group: int, share: float, skip: int, known: float, seed: int
) -> None:
    there = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < known
    batches = active_batches(
        rows(count), rows(count, seed=1), batch_size, np.random.default_rng(seed), group_size=min(group, batch_size),
        active_share=share, skip_nearest=skip, known=there,
    )  # fmt: skip
    assert batches.shape == (count // batch_size, batch_size)
    assert batches.unique().numel() == batches.numel()
    assert set(batches.flatten().tolist()) <= set(range(count))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_groups_are_of_one_planted_cluster(group: int) -> None:
    video, audio = clusters(count=16, of=8)
    batches = active_batches(video, audio, 8, np.random.default_rng(3), group_size=group, neighbours=7)
    of_groups = (batches // 8).reshape(-1, group)
    assert (of_groups == of_groups[:, :1]).all()
    if group < 8:  # and a batch's groups are of several
        assert (batches // 8 != batches[:, :1] // 8).any()


def test_what_is_near_is_what_a_loop_in_float64_finds() -> None:
    video, audio = rows(30), rows(30, seed=1)
    for skip, neighbours in itertools.product((0, 3), (1, 5, 40)):
        near = _nearest(video, audio, skip, neighbours)
        mutual = _mutual(near)
        wanted = []
        for i in range(30):
            likeness = [
                (sum(video[i].double() * audio[j].double()) + sum(audio[i].double() * video[j].double())).item() / 2
                for j in range(30)
            ]
            others = sorted((j for j in range(30) if j != i), key=lambda j: -likeness[j])
            wanted.append(others[skip : skip + neighbours])
        assert near.tolist() == wanted
        assert mutual.tolist() == [[j if i in wanted[j] else -1 for j in wanted[i]] for i in range(30)]


def test_the_share_of_a_batch_that_is_hard_is_the_share_asked_for() -> None:
    video, audio = clusters(count=32, of=4)
    batches = active_batches(video, audio, 8, np.random.default_rng(0), group_size=4, neighbours=3, active_share=0.5)
    for batch in batches:
        sizes = (batch // 4).bincount()
        assert sizes.max() == 4  # one whole cluster; the other four samples are random
    alike = sum(int((batch // 4).unique().numel()) for batch in batches)
    assert alike > 3 * len(batches)


def test_the_nearest_are_left_out_where_that_is_asked() -> None:
    """Four copies of everything: with the three nearest left out no batch of pairs holds two copies."""
    copies = rows(32).repeat_interleave(4, dim=0)
    copies = normalize(copies + 0.001 * rows(128, seed=2), dim=1)
    for skip, together in ((0, True), (3, False)):
        pairs = active_batches(
            copies, copies, 2, np.random.default_rng(1), group_size=2, neighbours=6, skip_nearest=skip
        )
        same = (pairs[:, 0] // 4 == pairs[:, 1] // 4).float().mean()
        assert (same == 1) if together else (same < 0.2)  # what found no partner is paired as it comes


def test_without_any_memory_the_order_is_a_random_one() -> None:
    """Chi-square of where a sample stands, over 4,000 orders of 8: above 24.3 with p = 0.001, at 7 degrees."""
    nothing = torch.zeros(8, dtype=torch.bool)
    counts = np.zeros(8)
    for seed in range(4000):
        order = active_batches(rows(8), rows(8), 2, np.random.default_rng(seed), known=nothing).flatten()
        counts[int((order == 0).nonzero())] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 24.3


def test_whom_the_remainder_leaves_out_does_not_depend_on_neighbours() -> None:
    """17 samples, one of them alone, in batches of 4: one in 17 is left out. Above 12.1 with p = 0.0005."""
    video, audio = clusters(count=5, of=4)
    alone = 0
    for seed in range(1700):
        batches = active_batches(video[:17], audio[:17], 4, np.random.default_rng(seed), group_size=2, neighbours=3)
        alone += 16 not in batches
    assert (alone - 100) ** 2 / 100 + (alone - 100) ** 2 / 1600 < 12.1


def test_the_same_state_gives_the_same_batches_in_any_precision_that_tells_the_order() -> None:
    video, audio = rows(200), rows(200, seed=1)
    first = active_batches(video, audio, 10, np.random.default_rng(5))
    assert torch.equal(first, active_batches(video, audio, 10, np.random.default_rng(5)))
    assert torch.equal(first, active_batches(video.double(), audio.double(), 10, np.random.default_rng(5)))
    assert not torch.equal(first, active_batches(video, audio, 10, np.random.default_rng(6)))


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    rng = np.random.default_rng(0)
    for settings_, message in (
        ({"batch_size": 9}, "batch_size must be at least 2 and at most 8, got 9"),
        ({"group_size": 5}, "group_size must be at least 2 and at most 4, got 5"),
        ({"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"skip_nearest": -1}, "skip_nearest must be at least 0, got -1"),
        ({"active_share": 1.5}, "active_share must be at least 0 and at most 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=f"^active_batches: {message}"):
            active_batches(rows(8), rows(8), **({"batch_size": 4, "rng": rng} | settings_))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"as many rows as video \(8\), got \(7, 8\)"):
        active_batches(rows(8), rows(7), 4, rng)
