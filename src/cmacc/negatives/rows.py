"""Rows for k-means++: plain, or rank-one as factors; read in parts, with distances that do not suffer cancellation.

A pair of factors (left, right) stands for the rows left_i (outer) right_i, which are never formed:

    |g_i - g_c|^2 = |l_i|^2 |r_i|^2 + |l_c|^2 |r_c|^2 - 2 <l_i, l_c> <r_i, r_c>

These are matrix products, and therefore fast. Their price is cancellation: in float32, a squared distance below about
1/4096 of the squared lengths has few correct digits. Such pairs are rare and recognisable by their result, and are
recomputed from differences. With lengths s = |l| |r| and unit vectors u, v along the factors,

    |g_i - g_c|^2 = (s_i - s_c)^2 + 2 s_i s_c (a + b - a b),   a = |u_i - u_c|^2 / 2,   b = |v_i - v_c|^2 / 2

where a and b are at most one (a pair with both factors reversed is first flipped), so that no term is negative. Copies
of a row are then at distance zero, and near copies at their true small distance. Plain rows are centred on a point
between them, because a large common mean would make all of them near copies.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.negatives.shards import Shards

Array = Tensor | NDArray[np.floating]

# A squared distance below this share of the squared length is recomputed: float32 has lost half of its digits there.
_NEAR = 2.0**-12
# BLAS uses other kernels for few rows or columns, which differ in the last bit. With matrix products padded to these
# sizes, the distances of a row do not depend on the number of rows beside it, and hence on the number of processes.
_LEAST_ROWS, _CENTRES_MULTIPLE = 32, 8
# Rows are scaled unless the longest is in this range; otherwise fourth powers would approach the limits of float32.
_SHORT, _LONG = 2.0**-8, 2.0**16
_NUMPY_FLOATS = (np.float16, np.float32, np.float64)
# Number of rows whose median is the point on which plain rows are centred.
_MIDST_ROWS = 15


@dataclass(frozen=True)
class Centres:
    """Rows to measure distances to, on every process: their factors, and squared lengths ``(n,)``."""

    factors: tuple[Tensor, ...]
    squared_lengths: Tensor

    @classmethod
    def of(cls, factors: tuple[Tensor, ...]) -> "Centres":
        """Centres from their factors."""
        return cls(factors, _lengths(factors).prod(0).square())

    def __len__(self) -> int:
        return len(self.squared_lengths)

    def __getitem__(self, chosen: Tensor | slice) -> "Centres":
        return Centres(tuple(factor[chosen] for factor in self.factors), self.squared_lengths[chosen])


class Rows:
    """n rows in one table ``(n, D)`` or two, ``(n, a)`` and ``(n, b)``. Nothing of the tables' size is copied.

    Parameters
    ----------
    tables
        Tensors, or numpy arrays such as memory maps; of a float type.
    shards
        The places of the rows in the table of all processes.
    device
        Where distances are computed; parts of the tables are moved there.
    part_rows
        Maximum number of rows in a part.
    owner
        Name of the calling function, for error messages.
    initial_centers
        Rows of other tables, the same on every process, that count as centres.
    eligible
        ``(n,)``: rows that may be picked. Default: all. The others may hold NaN or infinity; such rows are treated as
        zeros, so that they affect neither scales nor distances.
    on_read
        Called after each part, with its number of rows.

    Raises
    ------
    ValueError
        An eligible row, of any process, holds NaN or infinity.

    Attributes
    ----------
    squared_lengths
        ``(n,)`` of this process's rows.
    initial_centers
        The initial centers.
    """

    def __init__(
        self,
        tables: tuple[Array, ...],
        shards: Shards,
        device: torch.device,
        part_rows: int,
        owner: str,
        *,
        initial_centers: tuple[Array, ...] | None = None,
        eligible: Bool[Tensor, " rows"] | None = None,
        on_read: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.tables, self.shards, self.device, self.part_rows = tables, shards, device, part_rows
        self._initial_centers = (
            None if initial_centers is None else tuple(_of(table, slice(None)) for table in initial_centers)
        )
        self._owner, self._on_read = owner, on_read
        # At least float32: products of half-precision numbers overflow, and lose the small distances.
        self.dtype = working_type(tables)
        self._scales = [1.0] * len(tables)
        self._void: Tensor | None = None
        self._midst = self._find_midst()
        self.squared_lengths, longest = self._measure()
        # NaN and infinity are out of range too. Looking for them costs another pass, which is rarely needed.
        if not _in_range(longest) and self._exclude_void(eligible):
            self._midst = self._find_midst()
            self.squared_lengths, longest = self._measure()
        if not _in_range(longest):
            self._scales = [_scale(value, self.dtype) for value in self._largest_entries()]
            self._midst = self._find_midst()
            self.squared_lengths, _ = self._measure()
        self.initial_centers = None if self._initial_centers is None else Centres.of(self._ready(self._initial_centers))

    def __len__(self) -> int:
        """Rows of this process."""
        return len(self.tables[0])

    def parts(self) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """The rows of this process in parts: the slice, and the factors (one for plain rows), ready for products."""
        for part in self._slices():
            yield part, self._read(part)
            self._on_read(part.stop - part.start)

    def _slices(self) -> Iterator[slice]:
        for start in range(0, len(self), self.part_rows):
            yield slice(start, min(start + self.part_rows, len(self)))

    def take(self, indices: Int[Tensor, " picks"]) -> Centres:
        """Rows of the whole table by their places, on every process."""
        widths = [table.shape[1] for table in self.tables]
        factors = self.shards.fetch(indices, lambda own: torch.cat(self._read(own), dim=1)).split(widths, dim=1)
        return Centres.of(tuple(factors))

    def _read(self, which: slice | Tensor) -> tuple[Tensor, ...]:
        return self._ready(self._raw(which))

    def _raw(self, which: slice | Tensor) -> tuple[Tensor, ...]:
        tables = tuple(_of(table, which) for table in self.tables)
        if self._void is None:
            return tables
        void = self._void[which]
        return tuple(table.masked_fill(void.to(table.device)[:, None], 0) for table in tables)

    def _exclude_void(self, eligible: Bool[Tensor, " rows"] | None) -> bool:
        """Find rows that are neither finite nor eligible; returns whether any process has one."""
        if eligible is None:
            return False
        finite = [self._finite(part) for part in self._slices()]
        void = ~torch.cat(finite).cpu() & ~eligible.cpu() if finite else torch.zeros(0, dtype=torch.bool)
        self._void = void
        return bool(self.shards.each(void.any()).any())

    def _finite(self, part: slice) -> Bool[Tensor, " part"]:
        return torch.stack([torch.isfinite(factor).all(1) for factor in self._raw(part)]).all(0)

    def _ready(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tables in working type, scaled, and (plain rows) centred."""
        factors = tuple(
            factor if scale == 1 else factor * scale
            for factor, scale in zip((t.to(self.device, self.dtype) for t in tables), self._scales, strict=True)
        )
        return factors if self._midst is None else (factors[0] - self._midst,)

    def _find_midst(self) -> Tensor | None:
        """For plain rows: the column-wise median of a few rows spread evenly over the table."""
        if len(self.tables) > 1 or self.shards.count == 0:
            return None
        self._midst = None
        spread = torch.arange(_MIDST_ROWS) * (self.shards.count - 1) // (_MIDST_ROWS - 1)
        return self.take(spread).factors[0].sort(dim=0).values[_MIDST_ROWS // 2]

    def _measure(self) -> tuple[Float[Tensor, " rows"], list[float]]:
        """Squared lengths of this process's rows; the largest length of each factor, over processes and centers."""
        squared = torch.empty(len(self), dtype=self.dtype, device=self.device)
        # In the working type: some devices have no float64 (Apple's MPS), and a maximum does not need it.
        longest = torch.zeros(len(self.tables), dtype=self.dtype, device=self.device)
        for part, factors in self.parts():
            lengths = _lengths(factors)
            squared[part] = lengths.prod(0).square()
            longest = torch.maximum(longest, lengths.amax(1))
        if self._initial_centers is not None and len(self._initial_centers[0]) > 0:
            longest = torch.maximum(longest, _lengths(self._ready(self._initial_centers)).amax(1))
        return squared, self.shards.each(longest).amax(0).tolist()

    def _largest_entries(self) -> list[float]:
        """The largest absolute entry of each factor, over all processes and the initial centers."""
        peaks = torch.zeros(len(self.tables), dtype=self.dtype)
        for part in self._slices():
            peaks = torch.maximum(peaks, _peaks(self._raw(part), self.dtype))
        largest = self.shards.each(peaks).amax(0)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError(f"{self._owner}: points must be finite, got NaN or infinity in row {self._first_bad()}")
        if self._initial_centers is not None and len(self._initial_centers[0]) > 0:
            largest = torch.maximum(largest, _peaks(self._initial_centers, self.dtype))
            if not bool(torch.isfinite(largest).all()):
                raise ValueError(f"{self._owner}: initial_centers must be finite, got NaN or infinity")
        entries: list[float] = largest.tolist()
        return entries

    def _first_bad(self) -> int:
        """Place in the whole table of the first row that is not finite."""
        first = self.shards.count
        for part in self._slices():
            bad = ~self._finite(part)
            if bool(bad.any()):
                row = part.start + int(bad.nonzero()[0])
                first = int(self.shards.start + row if self.shards.places is None else self.shards.places[row])
                break
        return int(self.shards.each(torch.tensor(first)).amin())


def check_tables(
    owner: str,
    name: str,
    points: Array | tuple[Array, ...],
    *,
    like: tuple[Array, ...] | None = None,
    kinds: tuple[type, ...] = (Tensor,),
) -> tuple[Array, ...]:
    """Check and return the tables: one of plain rows, or two of factors.

    Raises
    ------
    ValueError
        The shapes, types or columns (compared with ``like``) are wrong, or a table is none of ``kinds``.
    """
    tables = points if isinstance(points, tuple) else (points,)
    if not tables or not all(isinstance(table, kinds) for table in tables):
        raise ValueError(
            f"{owner}: {name} must be a {' or '.join(kind.__name__ for kind in kinds)}, or a tuple of two, "
            f"got {' and '.join(type(table).__name__ for table in tables) or 'an empty tuple'}"
        )
    if len(tables) > 2 or any(t.ndim != 2 or t.shape[1] == 0 or len(t) != len(tables[0]) for t in tables):
        raise ValueError(
            f"{owner}: {name} must be (N, D), or a pair of (N, a) and (N, b), with at least one column, "
            f"got {' and '.join(str(tuple(t.shape)) for t in tables)}"
        )
    if not all(_is_float(table) for table in tables):
        raise ValueError(f"{owner}: {name} must be of a float type, got {' and '.join(str(t.dtype) for t in tables)}")
    if like is not None and [t.shape[1] for t in tables] != [t.shape[1] for t in like]:
        raise ValueError(
            f"{owner}: {name} must have the columns of points, {[t.shape[1] for t in like]}, "
            f"got {[t.shape[1] for t in tables]}"
        )
    return tuple(table.detach() if isinstance(table, Tensor) else table for table in tables)


def working_type(tables: tuple[Array, ...]) -> torch.dtype:
    """float64 if a table has that type, else float32."""
    is_double = any(table.dtype in (torch.float64, np.float64) for table in tables)
    return torch.float64 if is_double else torch.float32


def _is_float(table: Array) -> bool:
    """Whether the table has a float type that torch supports."""
    return table.is_floating_point() if isinstance(table, Tensor) else table.dtype in _NUMPY_FLOATS


def _in_range(lengths: list[float]) -> bool:
    return all(_SHORT <= value <= _LONG for value in lengths)


def _peaks(tables: tuple[Tensor, ...], dtype: torch.dtype) -> Float[Tensor, " tables"]:
    """The largest absolute entry of each table, on the CPU; NaN if it holds one."""
    return torch.stack([torch.stack(torch.aminmax(table.to(dtype))).abs().amax().cpu() for table in tables])


def _scale(largest: float, dtype: torch.dtype) -> float:
    """A power of two that brings the largest entry close to one: it changes no digits, and no D^2 probability."""
    most = 126 if dtype == torch.float32 else 1022  # beyond it, the power itself is out of the type's range
    return 2.0 ** max(-most, min(most, 1 - math.frexp(largest)[1])) if largest > 0 else 1.0


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute products in full float32: autocast, TF32 and bf16 would lose the small differences that matter here.

    Autocast is disabled for this thread only. The precision of products can only be set for the whole process. It is
    changed only if the calling program has lowered it, and restored at the end. Meanwhile, products of other threads
    are more exact and slower.
    """
    lowered: list[tuple[Any, str]] = []
    precision = "highest"
    # torch has two interfaces for this, and the older one raises once the caller has used the newer one.
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        lowered = [(b, b.fp32_precision) for b in backends if b.fp32_precision not in ("ieee", "none")]
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        for backend, value in lowered:
            backend.fp32_precision = value


def squared_distances(
    factors: tuple[Tensor, ...], squared_lengths: Float[Tensor, " rows"], centres: Centres
) -> Float[Tensor, "rows centres"]:
    """Squared distances of every row to every centre: none negative, and accurate to one percent however close."""
    count = len(centres)
    padded = centres[torch.arange(-(-count // _CENTRES_MULTIPLE) * _CENTRES_MULTIPLE) % count]
    squared = _products(factors, padded.factors)[:, :count]
    squared.mul_(-2).add_(centres.squared_lengths).add_(squared_lengths[:, None])
    # The two rows of a near pair have nearly equal lengths, so the row's own length is enough to recognise it.
    suspects = (squared.amin(1) <= _NEAR * squared_lengths).nonzero().flatten()
    if len(suspects) > 0:
        near = squared[suspects] <= _NEAR * squared_lengths[suspects, None]
        row, centre = near.nonzero().unbind(1)
        row = suspects[row]
        for pairs in zip(row.split(len(factors[0])), centre.split(len(factors[0])), strict=True):
            squared[pairs] = _from_differences(factors, centres.factors, *pairs)
    return squared


def _products(lefts: tuple[Tensor, ...], rights: tuple[Tensor, ...]) -> Float[Tensor, "rows centres"]:
    """Inner products of rows and centres; for rank-one rows, the product over the factors."""
    rows = len(lefts[0])
    result: Tensor | None = None
    for left, right in zip(lefts, rights, strict=True):
        if rows < _LEAST_ROWS:
            left = torch.cat([left, left.new_zeros(_LEAST_ROWS - rows, left.shape[1])])
        product = (left @ right.T)[:rows]
        result = product if result is None else result.mul_(product)
    assert result is not None
    return result


def _from_differences(
    factors: tuple[Tensor, ...], others: tuple[Tensor, ...], row: Int[Tensor, " pairs"], other: Int[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """Squared distances of near pairs, without cancellation."""
    if len(factors) == 1:
        return (factors[0][row] - others[0][other]).square().sum(1)
    own_length = other_length = torch.ones((), device=row.device)
    halves = []
    for factor, table in zip(factors, others, strict=True):
        (u, u_length), (w, w_length) = _unit(factor[row]), _unit(table[other])
        # The smaller of the two angles between the lines along the factors, as 1 - |cos|, at most one.
        halves.append(torch.minimum((u - w).square().sum(1), (u + w).square().sum(1)) / 2)
        own_length, other_length = own_length * u_length, other_length * w_length
    a, b = halves
    return (own_length - other_length).square() + 2 * own_length * other_length * (a + b - a * b)


def _unit(rows: Float[Tensor, "rows columns"]) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"]]:
    lengths = torch.linalg.vector_norm(rows, dim=1)
    return rows / lengths.clamp_min(torch.finfo(rows.dtype).tiny)[:, None], lengths


def _lengths(factors: tuple[Tensor, ...]) -> Float[Tensor, "factors rows"]:
    return torch.stack([torch.linalg.vector_norm(factor, dim=1) for factor in factors])


def _of(table: Array, which: slice | Tensor) -> Tensor:
    if isinstance(table, Tensor):
        rows: Tensor = table[which if isinstance(which, slice) else which.to(table.device)]
        return rows
    # A copy, because torch warns about read-only arrays, such as memory maps.
    return torch.from_numpy(np.array(table[which if isinstance(which, slice) else which.numpy()]))
