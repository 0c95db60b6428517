"""Selectors against explicit gradients, a chi-square, and a pool built so that the right choice is known."""

from collections import Counter
from itertools import permutations
from typing import get_args

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cmacc.negatives import Candidates, GradientName, Keys, Selector, SelectorName, build_selector
from cmacc.negatives.shards import Shards

TEMPERATURE = 0.1


def test_newest_are_the_last() -> None:
    assert _select(build_selector("newest", TEMPERATURE), _pool(7), 3).tolist() == [4, 5, 6]


def test_random_is_uniform_over_ordered_choices() -> None:
    """Chi-square over 3000 fixed seeds at a significance of 1e-6."""
    pool, selector = _pool(5), build_selector("random", TEMPERATURE)
    seen = Counter(tuple(_select(selector, pool, 2, seed).tolist()) for seed in range(3000))
    choices = list(permutations(range(5), 2))
    assert set(seen) <= set(choices)
    assert chisquare([seen[choice] for choice in choices]).pvalue > 1e-6


@pytest.mark.parametrize("gradient", ["last_layer", "key", "feature"])
def test_hardest_are_the_longest_explicit_gradients(gradient: GradientName) -> None:
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    penultimate = torch.randn(20, 4, dtype=torch.float64)
    queries = normalize(torch.randn(5, 6, dtype=torch.float64), dim=1)
    norms = []
    for p in penultimate:
        key = normalize(weight @ p, dim=0)
        logits = queries @ key / TEMPERATURE
        loss = cross_entropy(logits[None], logits.argmax()[None])
        at_weight, at_key = torch.autograd.grad(loss, (weight, key))
        norms.append({"last_layer": at_weight, "key": at_key, "feature": p}[gradient].norm())
    projected = (penultimate @ weight.T).detach()
    keys = Keys.from_embedding(
        normalize(projected, dim=1), torch.arange(20), 0, length=projected.norm(dim=1), penultimate=penultimate
    )
    picks = _select(build_selector("hardest", TEMPERATURE, gradient), keys, 8, queries=queries)
    assert picks.tolist() == torch.stack(norms).argsort(descending=True)[:8].tolist()


def test_active_prefers_the_uncertain_and_takes_each_kind_once() -> None:
    """Four kinds of candidates between two queries, three copies of each, among forty right on a query.

    The forty have gradients of about 1e-4 against 5, so that five picks are one of each kind, and one more.
    """
    queries = torch.eye(8)[:4]
    between = torch.stack([0.75 * queries[i] + (0.64 + 0.01 * i) * queries[(i + 1) % 4] for i in range(4)])
    sure = queries[torch.arange(40) % 4] + 0.01 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    pool = Keys.from_embedding(normalize(torch.cat([between.repeat(3, 1), sure]), dim=1), torch.arange(52), 0)

    def kinds(selector: SelectorName, seed: int) -> int:
        choose = build_selector(selector, TEMPERATURE, "key")
        picks = _select(choose, pool, 5, seed, queries=queries)
        return len({int(pick) % 4 for pick in picks if pick < 12})

    assert [kinds("active", seed) for seed in range(50)] == [4] * 50
    assert kinds("hardest", 0) == 2  # copies of the longest
    assert max(kinds("random", seed) for seed in range(50)) < 4
    assert kinds("newest", 0) == 0


@pytest.mark.parametrize("name", get_args(SelectorName))
def test_every_selector_gives_distinct_indices_for_every_count(name: SelectorName) -> None:
    selector = build_selector(name, TEMPERATURE)
    assert isinstance(selector, Selector)
    for count in range(1, 8):
        picks = _select(selector, _pool(7), count, count)
        assert picks.dtype == torch.int64
        assert len(picks) == count
        assert len(set(picks.tolist()) & set(range(7))) == count


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    with pytest.raises(ValueError, match="name must be one of newest, random, hardest, active, got 'best'"):
        build_selector("best", TEMPERATURE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient must be one of last_layer, key, feature, got 'none'"):
        build_selector("active", TEMPERATURE, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="initial_centers must be none for selector 'random', got 'dictionary'"):
        build_selector("random", TEMPERATURE, initial_centers="dictionary")


@pytest.mark.parametrize("name", get_args(SelectorName))
def test_no_selector_takes_what_is_not_eligible(name: SelectorName) -> None:
    eligible = torch.tensor([True, False, True, False, False, True, True])
    for count in range(1, 5):
        picks = _select(build_selector(name, TEMPERATURE), _pool(7), count, count, eligible=eligible)
        assert len(set(picks.tolist()) & {0, 2, 5, 6}) == count


def test_active_with_initial_centers_avoids_what_the_dictionary_has() -> None:
    """Four kinds of uncertain candidates; the dictionary holds three: the first pick is the fourth."""
    queries = torch.eye(8)[:4]
    between = torch.stack([0.75 * queries[i] + (0.64 + 0.01 * i) * queries[(i + 1) % 4] for i in range(4)])
    pool = Keys.from_embedding(normalize(between.repeat(5, 1), dim=1), torch.arange(20), 0)
    held = Keys.from_embedding(normalize(between[:3], dim=1), torch.arange(3), 0)
    for initial_centers, kinds in (("dictionary", {3}), ("none", {0, 1, 2, 3})):
        choose = build_selector("active", TEMPERATURE, "key", initial_centers)  # type: ignore[arg-type]
        picks = [int(_select(choose, pool, 1, seed, queries=queries, staying=held)) % 4 for seed in range(50)]
        assert set(picks) == kinds


def _select(
    selector: Selector,
    pool: Keys,
    count: int,
    seed: int = 0,
    *,
    queries: Tensor | None = None,
    eligible: Tensor | None = None,
    staying: Keys | None = None,
) -> Tensor:
    return selector.select(
        Candidates(
            pool,
            torch.arange(len(pool)),
            torch.ones(len(pool), dtype=torch.bool) if eligible is None else eligible,
            Shards(len(pool)),
            _queries() if queries is None else queries,
            pool[slice(0)] if staying is None else staying,
        ),
        count,
        torch.Generator().manual_seed(seed),
    )


def _pool(count: int) -> Keys:
    embedding = normalize(torch.randn(count, 6), dim=1)
    return Keys.from_embedding(
        embedding, torch.arange(count), 0, length=1 + torch.rand(count), penultimate=torch.randn(count, 3)
    )


def _queries() -> Tensor:
    return normalize(torch.randn(4, 6), dim=1)
