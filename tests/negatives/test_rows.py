"""Distances from factors against explicit outer products in float64, near and far."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cmacc.negatives.rows import Rows, squared_distances
from cmacc.negatives.shards import Shards


@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("kind", ["flat", "flat, far from the origin", "factors", "factors, one reversed"])
def test_distances_are_right_however_near(kind: str, distance: float) -> None:
    """Rows at a relative distance from the centres, the near half of which a plain product form gets all wrong."""
    centres = [torch.randn(5, 40), torch.randn(5, 30)]
    rows = [(c[torch.arange(50) % 5] + distance * torch.randn(50, c.shape[1])) for c in centres]
    if kind.startswith("flat"):
        centres, rows = centres[:1], rows[:1]
    if kind.startswith("flat, far"):
        # Numbers with few digits, so that moving them away rounds nothing.
        centres, rows = ([1000 + (1024 * t).round() / 1024 for t in tables] for tables in (centres, rows))
    if kind.endswith("reversed"):
        rows = [-factor for factor in rows]
    result = _distances(rows, centres)
    exact = _explicit(rows, centres)
    assert (result >= 0).all()
    np.testing.assert_allclose(result, exact, rtol=1e-2, atol=1e-12 * exact.max())
    far = exact > 1e-2 * exact.max()
    np.testing.assert_allclose(result[far], exact[far], rtol=1e-4)


def test_copies_are_at_distance_zero_and_zero_rows_at_the_length() -> None:
    left, right = torch.randn(40, 300), torch.randn(40, 200)
    left[7] = 0
    result = _distances([left, right], [left, right])
    assert (result.diagonal() == 0).all()
    lengths = (left.norm(dim=1) * right.norm(dim=1)).square().double().numpy()
    np.testing.assert_allclose(result[7], lengths, rtol=1e-5)


def test_lengths_over_twelve_orders_of_magnitude() -> None:
    scale = torch.logspace(-6, 6, 60)[:, None]
    for left, right in ((scale * torch.randn(60, 20), torch.randn(60, 10)), (scale.sqrt() * torch.randn(60, 20),) * 2):
        np.testing.assert_allclose(
            _distances([left, right], [left, right]), _explicit([left, right], [left, right]), rtol=1e-3
        )


def test_a_row_is_measured_the_same_whatever_stands_beside_it() -> None:
    """What the independence of the number of processes rests on: bit by bit, for any cut of the rows."""
    left, right = torch.randn(3000, 100), torch.randn(3000, 60)
    whole = _rows([left, right])
    for count in (1, 2, 9, 100):
        centres = whole.take(torch.arange(count) * 7)
        all_at_once = squared_distances((left, right), whole.squared_lengths, centres)
        for start, stop in ((0, 1), (1, 3), (5, 40), (17, 1500), (1999, 3000)):
            cut = _rows([left[start:stop], right[start:stop]])
            part = squared_distances((left[start:stop], right[start:stop]), cut.squared_lengths, centres)
            assert torch.equal(part, all_at_once[start:stop])


def _rows(tables: list[Tensor], given: list[Tensor] | None = None) -> Rows:
    centres = None if given is None else tuple(given)
    return Rows(tuple(tables), Shards(len(tables[0])), torch.device("cpu"), 1000, "test", initial_centers=centres)


def _distances(tables: list[Tensor], centres: list[Tensor]) -> np.ndarray:
    """In units of the tables, whatever the scale that they are worked on in."""
    rows = _rows(tables, centres)
    assert rows.initial_centers is not None
    squared = torch.cat(
        [squared_distances(factors, rows.squared_lengths[part], rows.initial_centers) for part, factors in rows.parts()]
    )
    return (squared.double() / np.prod(np.square(rows._scales))).numpy()


def _explicit(tables: list[Tensor], centres: list[Tensor]) -> np.ndarray:
    def outer(factors: list[Tensor]) -> Tensor:
        flat = [factor.double() for factor in factors]
        return flat[0] if len(flat) == 1 else torch.einsum("na,nb->nab", *flat).flatten(1)

    return (outer(tables)[:, None] - outer(centres)).square().sum(2).numpy()
