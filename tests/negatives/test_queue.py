"""The ring against collections.deque."""

import dataclasses
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmacc.negatives import KeyQueue, Keys

FIELDS = [field.name for field in dataclasses.fields(Keys)]


@settings(max_examples=60, derandomize=True)
@given(capacity=st.integers(1, 9), sizes=st.lists(st.integers(0, 20), max_size=8), penultimate=st.integers(0, 2))
def test_is_a_deque(capacity: int, sizes: list[int], penultimate: int) -> None:
    """Order, content and length after every push, of more keys than fit too."""
    queue = KeyQueue(capacity, 3, penultimate)
    reference: deque[tuple[list[float], float, list[float], int, int]] = deque(maxlen=capacity)
    for step, size in enumerate(sizes):
        keys = _keys(size, penultimate, step)
        queue.push(keys)
        reference.extend(zip(*(getattr(keys, name).tolist() for name in FIELDS), strict=True))
        held = queue.keys()
        assert list(zip(*(getattr(held, name).tolist() for name in FIELDS), strict=True)) == list(reference)
        assert len(queue) == len(held) == len(reference)


@pytest.mark.parametrize("pushes", [0, 2, 3, 5])
def test_state_dict_is_the_whole_queue(pushes: int) -> None:
    queue, other = KeyQueue(7, 3, 2), KeyQueue(7, 3, 2)
    for step in range(pushes):
        queue.push(_keys(3, 2, step))
    other.push(_keys(5, 2, 99))
    other.load_state_dict(queue.state_dict())
    assert _same(queue.keys(), other.keys())
    keys = _keys(4, 2, 100)
    queue.push(keys)
    other.push(keys)
    assert _same(queue.keys(), other.keys())


@pytest.mark.parametrize("pushed", [2, 4, 6, 8])
def test_what_keys_gives_is_not_changed_by_a_push(pushed: int) -> None:
    """Half full, full, beyond, and full with the oldest in front: a loss's negatives stay until its backward."""
    queue = KeyQueue(4, 3)
    queue.push(_keys(pushed, 0, 0))
    held = queue.keys()
    before = held.embedding.clone()
    weight = torch.ones(3, requires_grad=True)
    loss = (held.embedding * weight).square().sum()
    queue.push(_keys(3, 0, 1))
    loss.backward()
    assert torch.equal(held.embedding, before)


def test_keys_are_detached_and_brought_to_the_queues_type() -> None:
    queue = KeyQueue(4, 3)
    queue.push(Keys.from_embedding(torch.ones(2, 3, dtype=torch.float16, requires_grad=True), torch.arange(2), 0))
    assert queue.keys().embedding.dtype == torch.float32
    assert not queue.keys().embedding.requires_grad


def test_subset_of_keys() -> None:
    keys = _keys(5, 2, 3)
    picked = keys[torch.tensor([4, 0])]
    assert picked.sample_ids.tolist() == [keys.sample_ids[4].item(), keys.sample_ids[0].item()]
    assert torch.equal(picked.penultimate, torch.stack([keys.penultimate[4], keys.penultimate[0]]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 3, 0), "capacity must be at least 1, got 0"),
        ((4, 0, 0), "key_size must be at least 1, got 0"),
        ((4, 3, -1), "penultimate_size must be at least 0, got -1"),
    ],
)
def test_size_errors(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^KeyQueue: {message}"):
        KeyQueue(*sizes)


def test_a_push_of_other_sizes_is_refused_and_changes_nothing() -> None:
    queue = KeyQueue(4, 3, 2)
    queue.push(_keys(2, 2, 0))
    before = queue.keys()
    with pytest.raises(ValueError, match=r"^KeyQueue\.push: penultimate must have 2 columns, got 1"):
        queue.push(_keys(2, 1, 1))
    with pytest.raises(ValueError, match=r"^KeyQueue\.push: embedding must have 3 columns, got 5"):
        queue.push(Keys.from_embedding(torch.ones(2, 5), torch.arange(2), 1, penultimate=torch.ones(2, 2)))
    assert _same(before, queue.keys())


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("sample_ids", torch.arange(1), r"\(1,\)"),
        ("length", torch.ones(2, 1), r"\(2, 1\)"),
        ("penultimate", torch.ones(3, 2), r"\(3, 2\)"),
        ("embedding", torch.ones(2), r"\(2,\)"),
    ],
)
def test_fields_that_do_not_fit_together(name: str, value: Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=f"^Keys: {name} must have . axes and as many rows as embedding, .* got {got}"):
        dataclasses.replace(_keys(2, 2, 0), **{name: value})


def _keys(count: int, penultimate: int, step: int) -> Keys:
    return Keys(
        torch.randn(count, 3),
        torch.rand(count),
        torch.randn(count, penultimate),
        torch.randint(1000, (count,)),
        torch.full((count,), step),
        torch.randint(1000, (count,)),
    )


def _same(a: Keys, b: Keys) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
