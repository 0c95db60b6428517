"""The active dictionary: what moves where and when, and that a state dict holds all of it."""

import copy
import dataclasses
from collections import deque
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.negatives import ActiveDictionary, Keys, SelectorName

BATCH = 4


@pytest.mark.parametrize("pool_size", [BATCH, 7, 20])
def test_newest_is_the_plain_queue_of_the_steps_before(pool_size: int) -> None:
    dictionary = ActiveDictionary(6, 10, pool_size, penultimate_size=3, selector="newest")
    queue: deque[int] = deque(maxlen=10)
    before: list[int] = []
    for step in range(8):
        dictionary.select(_queries(), BATCH)
        queue.extend(before)
        assert dictionary.negatives().sample_ids.tolist() == list(queue)
        dictionary.push(_keys(step))
        before = list(range(BATCH * step, BATCH * (step + 1)))


@pytest.mark.parametrize("selector", get_args(SelectorName))
def test_the_chosen_replace_the_oldest_and_stay_in_the_pool(selector: SelectorName) -> None:
    dictionary = _filled(selector, steps=6)
    for step in range(6, 10):
        pool, held = dictionary.pool.keys().sample_ids.tolist(), dictionary.negatives().sample_ids.tolist()
        dictionary.select(_queries(), BATCH, torch.Generator().manual_seed(step))
        after = dictionary.negatives()
        assert len(after) == 10
        assert after.sample_ids[:-BATCH].tolist() == held[BATCH:]
        chosen = after.sample_ids[-BATCH:].tolist()
        assert len(set(chosen)) == BATCH
        assert set(chosen) <= set(pool)
        assert torch.equal(after.steps, after.sample_ids // BATCH)  # a key's row stays together
        assert dictionary.pool.keys().sample_ids.tolist() == pool
        dictionary.push(_keys(step))
        assert dictionary.pool.keys().sample_ids.tolist() == pool[BATCH:] + list(range(BATCH * step, BATCH * step + 4))


def test_the_selector_decides_by_the_queries_given() -> None:
    """The hardest for one batch of queries are not those for another."""
    dictionary = _filled("hardest", steps=6)
    choices = set()
    for _ in range(10):
        trial = copy.deepcopy(dictionary)
        trial.select(_queries(), BATCH)
        choices.add(tuple(trial.negatives().sample_ids[-BATCH:].tolist()))
    assert len(choices) > 1


def test_an_empty_pool_leaves_everything() -> None:
    dictionary = ActiveDictionary(6, 10, 20, penultimate_size=3)
    before = copy.deepcopy(dictionary.state_dict())
    dictionary.select(_queries(), BATCH)
    assert len(dictionary.negatives()) == 0
    _assert_same_state(before, dictionary.state_dict())


@pytest.mark.parametrize("selector", get_args(SelectorName))
def test_a_pool_of_fewer_is_taken_whole(selector: SelectorName) -> None:
    dictionary = _filled(selector, steps=0)
    dictionary.push(_keys(0))
    dictionary.select(_queries(), 9, torch.Generator().manual_seed(0))
    assert sorted(dictionary.negatives().sample_ids.tolist()) == [0, 1, 2, 3]


def test_asking_and_using_the_negatives_changes_nothing() -> None:
    dictionary = _filled("active", steps=5)
    before = copy.deepcopy(dictionary.state_dict())
    negatives = dictionary.negatives()
    assert not negatives.embedding.requires_grad
    negatives.embedding.zero_()
    negatives.sample_ids.fill_(-5)
    _assert_same_state(before, dictionary.state_dict())


def test_selection_takes_no_gradient_and_leaves_the_queries_alone() -> None:
    dictionary = _filled("active", steps=5)
    queries = _queries().requires_grad_()
    before = queries.detach().clone()
    dictionary.select(queries, BATCH)
    assert torch.equal(queries, before)
    assert not any(tensor.requires_grad for tensor in dictionary.state_dict(keep_vars=True).values())


def test_half_precision_queries_choose() -> None:
    dictionary = _filled("active", steps=5)
    dictionary.select(_queries().bfloat16(), BATCH)
    assert len(dictionary.negatives()) == 10


@pytest.mark.parametrize("selector", get_args(SelectorName))
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_state_dict_restores_the_behaviour_exactly(selector: SelectorName, steps: int) -> None:
    dictionary, restored = _filled(selector, steps), _filled(selector, steps=3)
    restored.load_state_dict(copy.deepcopy(dictionary.state_dict()))
    for step in range(steps, steps + 4):
        queries, keys = _queries(), _keys(step)
        for one in (dictionary, restored):
            one.select(queries, BATCH, torch.Generator().manual_seed(step))
            one.push(keys)
        _assert_same_state(dictionary.state_dict(), restored.state_dict())


def test_a_state_dict_of_other_sizes_is_refused() -> None:
    small = ActiveDictionary(6, 5, 20, penultimate_size=3)
    with pytest.raises(RuntimeError, match=r"size mismatch for dictionary\.embedding"):
        small.load_state_dict(_filled("active", 2).state_dict())


@pytest.mark.parametrize("selector", get_args(SelectorName))
def test_no_sample_stands_twice_nor_beside_its_query(selector: SelectorName) -> None:
    """30 samples come round again and again; pool of 20, dictionary of 10, batch of 4."""
    dictionary = ActiveDictionary(6, 10, 20, penultimate_size=3, temperature=0.1, selector=selector)
    counts = []
    for step in range(40):
        keys = dataclasses.replace(_keys(step), sample_ids=(torch.arange(BATCH) + BATCH * step) % 30)
        staying = dictionary.negatives().sample_ids[-6:].tolist()
        counts.append(dictionary.select(_queries(), BATCH, _seeded(step), query_ids=keys.sample_ids))
        ids = dictionary.negatives().sample_ids.tolist()
        newest = ids[len(ids) - counts[-1] :]
        assert len(set(newest)) == counts[-1]
        assert not set(newest) & (set(staying) | set(keys.sample_ids.tolist()))
        assert len(set(ids)) == len(ids)
        dictionary.push(keys)
    assert counts[5:] == [BATCH] * 35


def test_no_sample_stands_twice_where_too_few_are_eligible() -> None:
    """Fewer are then chosen, so that more of the old ones stay: these must bar their samples too."""
    dictionary = ActiveDictionary(6, 4, 8, selector="newest")
    dictionary.push(_keys(0, penultimate=0))
    dictionary.select(_queries(), 4)
    assert dictionary.select(_queries(), 4, query_ids=torch.tensor([0, 1, 2, 2])) == 0
    assert dictionary.negatives().sample_ids.tolist() == [0, 1, 2, 3]
    fewer = 0
    dictionary = ActiveDictionary(6, 16, 8, selector="random")
    for step in range(300):
        ids = torch.randperm(26, generator=_seeded(step))[:BATCH]
        fewer += dictionary.select(_queries(), BATCH, _seeded(step), query_ids=ids) < BATCH
        held = dictionary.negatives().sample_ids.tolist()
        assert len(set(held)) == len(held)
        dictionary.push(dataclasses.replace(_keys(step, penultimate=0), sample_ids=ids))
    assert fewer > 50


def test_of_a_samples_keys_only_the_newest_is_chosen() -> None:
    """Three samples, each pushed at every step: the chosen are of the last step, unless repeats are allowed."""
    for allowed in (False, True):
        dictionary = ActiveDictionary(6, 10, 20, selector="random", allow_repeats=allowed)
        for step in range(5):
            dictionary.push(dataclasses.replace(_keys(step, penultimate=0), sample_ids=torch.tensor([0, 1, 2, 2])))
        chosen = dictionary.select(_queries(), 8, _seeded(0))
        assert chosen == (8 if allowed else 3)
        assert (dictionary.negatives().steps == 4).all() == (not allowed)


def test_with_nothing_eligible_nothing_changes() -> None:
    dictionary = _filled("active", steps=1)
    before = copy.deepcopy(dictionary.state_dict())
    assert dictionary.select(_queries(), BATCH, query_ids=torch.arange(BATCH)) == 0
    _assert_same_state(before, dictionary.state_dict())


def test_refresh_writes_over_the_newest() -> None:
    dictionary = _filled("newest", steps=6)
    before = dictionary.negatives()
    fresh = dataclasses.replace(before[slice(7, None)], embedding=normalize(torch.randn(3, 6), dim=1))
    dictionary.refresh(fresh)
    after = dictionary.negatives()
    assert torch.equal(after.embedding, torch.cat([before.embedding[:7], fresh.embedding]))
    assert torch.equal(after.sample_ids, before.sample_ids)
    with pytest.raises(ValueError, match="keys must be of the samples that they replace"):
        dictionary.refresh(before[slice(0, 3)])
    with pytest.raises(ValueError, match="keys must be at most the 10 held, got 11"):
        dictionary.refresh(before[torch.arange(11) % 10])


def test_the_pool_is_read_where_it_lies() -> None:
    """`held` is `keys` in another order, without a copy."""
    dictionary = _filled("newest", steps=7)
    pool, order = dictionary.pool.held()
    by_age = pool[order.argsort()]
    assert order.sort().values.tolist() == list(range(8, 28))
    for ours, theirs in zip(by_age.fields(), dictionary.pool.keys().fields(), strict=True):
        assert torch.equal(ours, theirs)
    assert pool.embedding.data_ptr() == dictionary.pool.embedding.data_ptr()


def test_errors() -> None:
    dictionary = ActiveDictionary(6, 10, 20, selector="newest")
    for count in (0, 11):
        with pytest.raises(ValueError, match=rf"^ActiveDictionary\.select: count must be in 1\.\.10 .*, got {count}"):
            dictionary.select(_queries(), count)
    with pytest.raises(ValueError, match=r"^ActiveDictionary: temperature must be positive, got 0\.0"):
        ActiveDictionary(6, 10, 20, penultimate_size=3, temperature=0.0)
    with pytest.raises(
        ValueError, match=r"gradient 'last_layer' needs penultimate_size, .* got 0; or use gradient='key'"
    ):
        ActiveDictionary(6, 10, 20)
    with pytest.raises(ValueError, match="gradient 'feature' needs penultimate_size"):
        ActiveDictionary(6, 10, 20, selector="hardest", gradient="feature")
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        ActiveDictionary(6, 10, 0, selector="newest")


@pytest.mark.usefixtures("users_checks")
def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'best'"):
        ActiveDictionary(6, 10, 20, selector="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gradient must be one of .*, got 'none'"):
        ActiveDictionary(6, 10, 20, gradient="none")  # type: ignore[arg-type]


def _filled(selector: SelectorName, steps: int) -> ActiveDictionary:
    dictionary = ActiveDictionary(6, 10, 20, penultimate_size=3, temperature=0.1, selector=selector)
    for step in range(steps):
        dictionary.select(_queries(), BATCH, torch.Generator().manual_seed(step))
        dictionary.push(_keys(step))
    return dictionary


def _queries() -> Tensor:
    return normalize(torch.randn(BATCH, 6), dim=1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _keys(step: int, penultimate: int = 3) -> Keys:
    """Sample ids 4 * step and on, so that an id tells its step."""
    return Keys.from_embedding(
        normalize(torch.randn(BATCH, 6), dim=1),
        torch.arange(BATCH) + BATCH * step,
        step,
        length=1 + torch.rand(BATCH),
        penultimate=torch.randn(BATCH, penultimate),
    )


def _assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
