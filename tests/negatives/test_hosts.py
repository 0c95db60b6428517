"""What selection asks of its host: no float64 on the device, no lasting settings, nothing of rows it may not pick."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cmacc.negatives import ActiveDictionary, Keys, SelectorName, kmeans_plusplus, seeding

METHODS: list[dict[str, Any]] = [{"method": "blocks"}, {"method": "one_by_one"}, {"local_trials": 3}]
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def generator(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e30])
def test_what_ineligible_rows_hold_is_no_matter(options: dict[str, Any], value: float, spread: float) -> None:
    """The picks are those with zeros in these rows, also where rows are so short or long that they are scaled."""
    left, right = torch.randn(300, 6, generator=generator()) * spread, torch.randn(300, 4, generator=generator(1))
    eligible = torch.rand(300, generator=generator(2)) > 0.3
    broken, zeros = left.clone(), left.clone()
    for i, row in enumerate((~eligible).nonzero().flatten().tolist()):
        zeros[row] = 0
        broken[row] = 0
        broken[row, i % 6] = value
    for clean, spoilt in ((zeros, broken), ((zeros, right), (broken, right))):
        zero_right = right.masked_fill(~eligible[:, None], 0)
        clean = (clean[0], zero_right) if isinstance(clean, tuple) else clean
        wanted = kmeans_plusplus(clean, 40, generator=generator(5), eligible=eligible, **options)
        picks = kmeans_plusplus(spoilt, 40, generator=generator(5), eligible=eligible, **options)
        assert picks.tolist() == wanted.tolist()


def test_an_eligible_row_that_is_not_finite_is_named() -> None:
    points = torch.randn(20, 3)
    points[4] = torch.nan
    points[11, 1] = torch.inf
    eligible = torch.ones(20, dtype=torch.bool)
    eligible[4] = False
    with pytest.raises(ValueError, match="points must be finite, got NaN or infinity in row 11"):
        kmeans_plusplus(points, 3, eligible=eligible)


@pytest.mark.parametrize("selector", ["active", "hardest", "random", "newest"])
def test_a_broken_key_that_is_no_candidate_refuses_nothing(selector: SelectorName) -> None:
    """A key of a sample that is in the batch may not be chosen, so its value is no matter."""
    dictionary = ActiveDictionary(8, 6, 20, selector=selector, gradient="key", temperature=0.1)
    keys = normalize(torch.randn(20, 8, generator=generator()), dim=1)
    keys[3] = torch.nan
    dictionary.push(Keys.from_embedding(keys, torch.arange(20), 0))
    queries = normalize(torch.randn(4, 8, generator=generator(1)), dim=1)
    ids = torch.tensor([3, 100, 101, 102])
    assert dictionary.select(queries, 6, generator(), query_ids=ids) == 6
    chosen = dictionary.negatives()
    assert chosen.embedding.isfinite().all()
    assert 3 not in chosen.sample_ids.tolist()


@pytest.mark.parametrize("selector", ["active", "hardest"])
def test_a_broken_candidate_is_refused(selector: SelectorName) -> None:
    dictionary = ActiveDictionary(8, 6, 20, selector=selector, gradient="key", temperature=0.1)
    keys = normalize(torch.randn(20, 8, generator=generator()), dim=1)
    keys[3] = torch.nan
    dictionary.push(Keys.from_embedding(keys, torch.arange(20), 0))
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity"):
        dictionary.select(normalize(torch.randn(4, 8), dim=1), 6, generator())


class NoDouble(TorchDispatchMode):
    """Refuses what a device without float64 refuses: to make one, or to convert to it.

    Draws from the generator on the host, and what is computed of them, are spared: they never were on the device.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func.overloadpacket in (
            torch.ops.aten._to_copy, torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.empty,
            torch.ops.aten.full, torch.ops.aten.new_zeros, torch.ops.aten.scalar_tensor,
        )  # fmt: skip
        if made and isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result


def test_the_watch_sees_a_conversion() -> None:
    with NoDouble(), pytest.raises(TypeError, match="float64"):
        torch.ones(3).double()
    with NoDouble(), pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e30])
def test_selection_makes_no_float64_on_the_device(
    options: dict[str, Any], spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Apple's MPS. The one widening of distances goes by way of the host there, which numpy stands for here."""
    points = (torch.randn(300, 6, generator=generator()) * spread, torch.randn(300, 4, generator=generator(1)))
    wanted = kmeans_plusplus(points, 40, generator=generator(5), **options)

    def widened(values: Tensor) -> Tensor:
        return torch.from_numpy(values.numpy().astype("float64"))

    monkeypatch.setattr(seeding, "_widened", widened)
    with NoDouble():
        picks = kmeans_plusplus(points, 40, generator=generator(5), **options)
    assert picks.tolist() == wanted.tolist()


@pytest.mark.usefixtures("users_checks")
def test_distances_are_widened_on_the_host_where_the_device_cannot() -> None:
    class OnMps:
        """As much of a tensor as `_widened` looks at; its own `double` would be refused."""

        device = torch.device("mps")

        def cpu(self) -> Tensor:
            return torch.ones(2)

    assert seeding._widened(OnMps()).dtype == torch.float64  # type: ignore[arg-type]
    assert seeding._widened(torch.ones(2)).dtype == torch.float64


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_precision_of_the_hosts_products_is_left_alone(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can only be set for the whole process: it is touched where the host lowered it, and put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        asked: list[str] = []
        plain = torch.set_float32_matmul_precision
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: (asked.append(value), plain(value)))
        kmeans_plusplus(torch.randn(50, 4), 5)
        assert asked == ([] if precision == "highest" else ["highest", "high"])
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ValueError, match="points must be finite"):
            kmeans_plusplus(torch.full((5, 2), torch.nan), 2)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        monkeypatch.undo()
        torch.set_float32_matmul_precision(before)
