"""k-means++ seeding (Arthur and Vassilvitskii, 2007): D^2 sampling of rows, exact, without Lloyd iterations.

Rows may be given as factors: a pair (left, right) stands for the rows left_i (outer) right_i, whose squared distances
are |l_i|^2 |r_i|^2 + |l_c|^2 |r_c|^2 - 2 <l_i, l_c> <r_i, r_c>. One pass over the rows a pick, and no waiting for a GPU
between the picks. The price of this form is cancellation: in float32, rows closer together than about a thousandth of
their length count as equal. Where that matters, give float64 rows.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Points = Tensor | tuple[Tensor, Tensor]


def kmeans_plusplus(points: Points, count: int, *, generator: torch.Generator | None = None) -> Int[Tensor, " count"]:
    """Pick ``count`` distinct rows: the first uniformly, each next with probability proportional to D^2.

    D is the distance to the nearest row picked before. Where every remaining row coincides with a picked one, the rest
    is drawn uniformly among the rows not yet picked, so that the indices are always distinct.

    Parameters
    ----------
    points
        ``(N, D)`` rows, or ``((N, a), (N, b))`` factors of rank-one rows of size a x b.
    count
        Number of picks, 1 <= count <= N.
    generator
        Source of randomness on the CPU, whatever the device of ``points``; the same state gives the same picks.

    Returns
    -------
    Tensor
        ``(count,)`` int64 indices in the order of picking, on the device of ``points``.

    Raises
    ------
    ValueError
        Shapes do not fit, ``count`` is out of range, or a row holds NaN or infinity.

    References
    ----------
    Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.

    Examples
    --------
    >>> far_apart = torch.tensor([[0.0], [0.0], [100.0]])
    >>> sorted(kmeans_plusplus(far_apart, 2, generator=torch.Generator().manual_seed(0)).tolist())[-1]
    2
    """
    left, right = _checked(points, count)
    uniforms = torch.rand(count, dtype=torch.float64, generator=generator)
    # Autocast would take the products, of which small differences are wanted, to half precision.
    with torch.autocast(left.device.type, enabled=False):
        return _seed(left, right, uniforms)


def _checked(points: Points, count: int) -> tuple[Tensor, Tensor]:
    factors = points if isinstance(points, tuple) else (points,)
    if any(f.ndim != 2 or f.shape[1] == 0 or len(f) != len(factors[0]) for f in factors):
        raise ValueError(
            "kmeans_plusplus: points must be (N, D), or a pair of (N, a) and (N, b), with at least one column, "
            f"got {' and '.join(str(tuple(f.shape)) for f in factors)}"
        )
    left, right = (factors[0], factors[0].new_ones(len(factors[0]), 1)) if len(factors) == 1 else factors
    if not 1 <= count <= len(left):
        raise ValueError(f"kmeans_plusplus: count must be in 1..{len(left)} (the number of rows), got {count}")
    if not (left.is_floating_point() and right.is_floating_point()):
        raise ValueError(f"kmeans_plusplus: points must be of a float type, got {left.dtype} and {right.dtype}")
    # Products of half-precision numbers overflow and lose the small distances: accumulate in float32 at least.
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    left, right = left.detach().to(dtype), right.detach().to(dtype)
    if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
        bad = int((~(torch.isfinite(left).all(1) & torch.isfinite(right).all(1))).nonzero()[0])
        raise ValueError(f"kmeans_plusplus: points must be finite, got NaN or infinity in row {bad}")
    return _largest_one(left), _largest_one(right)


def _largest_one(factor: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Scaled to a largest entry of one: D^2 sampling does not see the scale, but fourth powers of it would overflow."""
    largest = factor.abs().max()
    return factor / torch.where(largest > 0, largest, 1)


def _seed(
    left: Float[Tensor, "rows left"], right: Float[Tensor, "rows right"], uniforms: Float[Tensor, " count"]
) -> Int[Tensor, " count"]:
    """The bare kernel: pick number ``k`` inverts the cumulative D^2 at ``uniforms[k]``."""
    rows, count = len(left), len(uniforms)
    norms = left.square().sum(1) * right.square().sum(1)
    picked = torch.zeros(rows, dtype=torch.bool, device=left.device)
    nearest = torch.full((rows,), float("inf"), dtype=left.dtype, device=left.device)
    uniforms = uniforms.to(left.device)
    picks = torch.empty(count, dtype=torch.int64, device=left.device)
    rounding = 8 * torch.finfo(left.dtype).eps
    # One element, not a scalar: indexing by a scalar tensor would wait for the GPU at every pick.
    pick = (uniforms[:1] * rows).long().clamp_max(rows - 1)
    for k in range(count):
        if k:
            pick = _draw(torch.where(picked, 0, nearest), picked, uniforms[k : k + 1])
        picks[k : k + 1] = pick
        picked.index_fill_(0, pick, True)
        sums = norms + norms[pick]
        squared = sums - 2 * (left @ left[pick].squeeze(0)) * (right @ right[pick].squeeze(0))
        # What cancels down to the rounding of its terms is a distance of zero, not a small random one.
        nearest = torch.minimum(nearest, torch.where(squared > rounding * sums, squared, 0))
    return picks


def _draw(
    weights: Float[Tensor, " rows"], picked: Bool[Tensor, " rows"], uniform: Float[Tensor, "1"]
) -> Int[Tensor, "1"]:
    """Invert the cumulative weights at ``uniform``; uniformly among the rows not picked where all weights are zero."""
    # float64: with many rows the tail of a float32 sum would never be drawn.
    weights = weights.double()
    weights = torch.where(weights.sum() > 0, weights, (~picked).double())
    cumulative = weights.cumsum(0)
    target = (uniform * cumulative[-1]).clamp(max=torch.nextafter(cumulative[-1], cumulative.new_zeros(())))
    return torch.searchsorted(cumulative, target, right=True)
