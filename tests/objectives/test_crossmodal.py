"""The loss and its gradients against a loop over queries and negatives in plain Python, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.objectives import CrossModalContrast

TEMPERATURE = 0.2


@pytest.mark.parametrize(
    ("in_batch", "dictionary", "repeats", "extra", "decoupled"),
    list(itertools.product((True, False), (None, 0, 1, 6), (False, True), (0, 3), (False, True))),
)
def test_loss_top1_and_gradients_are_those_of_the_naive_loop(
    in_batch: bool, dictionary: int | None, repeats: bool, extra: int, decoupled: bool
) -> None:
    """``repeats``: one sample twice in the batch, own samples in the dictionary. ``extra``: keys of other processes."""
    queries, keys = _unit(5).requires_grad_(), _unit(5 + extra).requires_grad_()
    key_ids = torch.tensor([3, 1, 3, 7, 9, 1, 11, 12] if repeats else range(8))[: 5 + extra]
    query_ids = key_ids[:5]
    negatives = None if dictionary is None else _unit(dictionary)
    negative_ids = None if dictionary is None else torch.tensor([9, 3, 50, 51, 9, 52] if repeats else range(20, 26))
    if dictionary is not None and negative_ids is not None:
        negative_ids = negative_ids[:dictionary]
    result = CrossModalContrast(TEMPERATURE, in_batch, decoupled)(
        queries, keys, query_ids, key_ids, negatives=negatives, negative_ids=negative_ids
    )
    told = (queries, keys, query_ids, key_ids, in_batch, negatives, negative_ids)
    expected, expected_top1 = _naive(*told, decoupled)
    assert result.cross_entropy.item() == pytest.approx(_naive(*told)[0].item(), rel=1e-12, abs=1e-14)
    assert not result.cross_entropy.requires_grad
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-14)
    assert result.top1.item() == pytest.approx(expected_top1, nan_ok=True)
    actual_gradients = torch.autograd.grad(result.loss, (queries, keys))
    for actual, wanted in zip(actual_gradients, torch.autograd.grad(expected, (queries, keys)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-14)


def test_gradients_are_finite_differences() -> None:
    queries, keys, negatives, ids = _unit(3), _unit(3), _unit(4), torch.tensor([0, 1, 0])

    def loss(q: Tensor, k: Tensor, n: Tensor) -> Tensor:
        negative_ids = torch.tensor([5, 1, 6, 7])
        result = CrossModalContrast(TEMPERATURE)(q, k, ids, ids, negatives=n, negative_ids=negative_ids)
        total: Tensor = result.loss
        return total

    inputs = tuple(x.requires_grad_() for x in (queries, keys, negatives))
    assert torch.autograd.gradcheck(loss, inputs)
    assert all(gradient.abs().max() > 1e-3 for gradient in torch.autograd.grad(loss(*inputs), inputs))


def test_known_values() -> None:
    """All scores equal: the logarithm of how many there are, and no query whose positive is above the others."""
    same, ids = torch.ones(4, 1, dtype=torch.float64), torch.arange(4)
    contrast = CrossModalContrast(0.5)
    result = contrast(same, same, ids, ids, negatives=same[:3], negative_ids=ids[:3] + 10)
    assert result.loss.item() == pytest.approx(math.log(7))
    assert result.top1.item() == 0.0
    alone = contrast(same[:1], same[:1], ids[:1], ids[:1])
    assert alone.loss.item() == 0.0
    assert math.isnan(alone.top1.item())  # it stood above nothing


def test_the_decoupled_gradient_is_the_plain_one_without_its_fading_factor() -> None:
    """InfoNCE's gradient is DCL's times the negatives' share of the denominator (Yeh et al., 2022, eq. 4 and 6).

    In the scores, DCL's is the negatives' softmax: a false negative is pushed by at most 1 / tau in all, however like
    the positive it is, and the positive pulled by just 1 / tau, however easy the batch.
    """
    ids = torch.arange(1)
    for likeness in (0.99, 0.0, -0.99):
        query = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        keys = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        others = torch.tensor([[likeness, math.sqrt(1 - likeness**2)], [-1.0, 0.0]], dtype=torch.float64)
        others.requires_grad_()
        told = {"negatives": others, "negative_ids": torch.tensor([5, 6])}
        plain, decoupled = (
            torch.autograd.grad(CrossModalContrast(0.1, False, d)(query, keys, ids, ids, **told).loss, [keys, others])
            for d in (False, True)
        )
        scores = torch.tensor([1.0, likeness, -1.0], dtype=torch.float64) / 0.1
        share = 1 - scores.softmax(0)[0]
        for mine, theirs in zip(plain, decoupled, strict=True):
            torch.testing.assert_close(mine, theirs * share, rtol=1e-9, atol=1e-12)
        assert decoupled[0][0, 0].item() == pytest.approx(-10)
        assert decoupled[1][:, 0].sum().item() == pytest.approx(10)


def test_own_sample_in_the_dictionary_has_no_influence() -> None:
    queries, keys, ids = _unit(3), _unit(3), torch.arange(3)
    contrast = CrossModalContrast(TEMPERATURE)
    others = {"negatives": _unit(2), "negative_ids": torch.tensor([8, 9])}
    plain = contrast(queries[:1], keys, ids[:1], ids, **others)
    own = contrast(
        queries[:1],
        keys,
        ids[:1],
        ids,
        negatives=torch.cat([others["negatives"], queries[:1]]),
        negative_ids=torch.tensor([8, 9, 0]),
    )
    assert own.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast_are_worked_on_in_single_precision(dtype: torch.dtype) -> None:
    queries, keys, negatives = (_unit(n, 64).to(dtype) for n in (6, 6, 9))
    ids, negative_ids = torch.arange(6), torch.arange(9) + 6
    contrast = CrossModalContrast(0.05)
    exact = contrast(
        queries.double(), keys.double(), ids, ids, negatives=negatives.double(), negative_ids=negative_ids
    ).loss.item()
    low = contrast(queries, keys, ids, ids, negatives=negatives, negative_ids=negative_ids)
    assert low.loss.dtype == torch.float32
    assert low.loss.item() == pytest.approx(exact, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = contrast(
            queries.float(), keys.float(), ids, ids, negatives=negatives.float(), negative_ids=negative_ids
        )
    assert mixed.loss.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("in_batch", "repeats"), list(itertools.product((True, False), (False, True))))
def test_the_ceiling_counts_keys_and_the_batch_loss_leaves_the_dictionary_out(in_batch: bool, repeats: bool) -> None:
    queries, keys, negatives = _unit(5), _unit(5), _unit(6)
    ids = torch.tensor([3, 1, 3, 7, 9] if repeats else range(5))
    negative_ids = torch.tensor([9, 3, 50, 51, 9, 52] if repeats else range(20, 26))
    result = CrossModalContrast(TEMPERATURE, in_batch)(
        queries, keys, ids, ids, negatives=negatives, negative_ids=negative_ids
    )
    counts = [
        1 + in_batch * sum(int(k != q) for k in ids) + sum(int(n != q) for n in negative_ids) for q in ids.tolist()
    ]
    assert result.ceiling.item() == pytest.approx(sum(math.log(count) for count in counts) / 5)
    if in_batch:
        alone, _ = _naive(queries, keys, ids, ids, True, None, None)
        assert result.batch_loss.item() == pytest.approx(alone.item(), rel=1e-12)
    else:
        assert math.isnan(result.batch_loss.item())


def test_the_estimate_of_mutual_information_is_right_where_it_is_known() -> None:
    """Pairs that share one of 16 directions, all else at right angles: I = log 16, told exactly but for the ceiling.

    With n keys of which each is as likely to share a query's direction, InfoNCE at a low temperature comes to
    log n - E[log(number of keys of the query's direction)], a little below log 16, and never above log n.
    """
    generator = torch.Generator().manual_seed(0)
    for count in (4, 64, 1024):
        directions = torch.randint(16, (count,), generator=generator)
        rows = torch.eye(16, dtype=torch.float64)[directions]
        result = CrossModalContrast(0.02)(rows, rows, torch.arange(count), torch.arange(count))
        estimate = (result.ceiling - result.loss).item()
        alike = torch.bincount(directions)[directions].double()
        assert estimate == pytest.approx(math.log(count) - alike.log().mean().item(), abs=1e-6)
        assert estimate <= min(math.log(16), math.log(count)) + 1e-6
    assert estimate > 0.98 * math.log(16)


def test_has_no_state() -> None:
    assert CrossModalContrast().state_dict() == {}


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    for temperature in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"^CrossModalContrast: temperature must be positive, got {temperature}"):
            CrossModalContrast(temperature)
    contrast, x, ids = CrossModalContrast(), _unit(3), torch.arange(3)
    with pytest.raises(ValueError, match="negatives and negative_ids must be given together"):
        contrast(x, x, ids, ids, negatives=x)
    with pytest.raises(ValueError, match="negatives and negative_ids must be given together"):
        contrast(x, x, ids, ids, negative_ids=ids)
    with pytest.raises(ValueError, match="keys must be at least as many as queries, got 2 and 3"):
        contrast(x, x[:2], ids, ids[:2])
    with pytest.raises(ValueError, match=r"query_ids must have one id for each of the 3 rows, got \(1,\)"):
        contrast(x, x, ids[:1], ids)
    with pytest.raises(ValueError, match=r"key_ids must have one id for each of the 3 rows, got \(1,\)"):
        contrast(x, x, ids, ids[:1])
    with pytest.raises(ValueError, match=r"negative_ids must have one id for each of the 3 rows, got \(2,\)"):
        contrast(x, x, ids, ids, negatives=x, negative_ids=ids[:2])


def _unit(count: int, size: int = 4) -> Tensor:
    return normalize(torch.randn(count, size, dtype=torch.float64), dim=1)


def _naive(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    in_batch: bool,
    negatives: Tensor | None,
    negative_ids: Tensor | None,
    decoupled: bool = False,
) -> tuple[Tensor, float]:
    """Mean over queries of -log(e^positive / (e^positive + sum of e^negative)), and the share of queries on top.

    ``decoupled``: without the positive in the denominator, and 0 where then nothing is there.
    """
    losses, on_top, contrasted = [], 0, False
    for i, query in enumerate(queries):
        others = []
        if in_batch:
            others += [keys[j] for j in range(len(keys)) if key_ids[j] != query_ids[i]]
        if negatives is not None and negative_ids is not None:
            others += [negatives[j] for j in range(len(negatives)) if negative_ids[j] != query_ids[i]]
        positive = sum(query[c] * keys[i][c] for c in range(len(query))) / TEMPERATURE
        scores = [sum(query[c] * other[c] for c in range(len(query))) / TEMPERATURE for other in others]
        below = sum((torch.exp(s) for s in scores), start=torch.zeros((), dtype=torch.float64))
        if not decoupled:
            losses.append(-torch.log(torch.exp(positive) / (torch.exp(positive) + below)))
        else:
            losses.append(-torch.log(torch.exp(positive) / below) if scores else 0 * positive)
        on_top += all(positive > score for score in scores)
        contrasted |= bool(scores)
    top1 = on_top / len(queries) if contrasted else math.nan
    return sum(losses, start=torch.zeros((), dtype=torch.float64)) / len(queries), top1
