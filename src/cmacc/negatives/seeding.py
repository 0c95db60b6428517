"""k-means++ seeding (Arthur and Vassilvitskii, 2007): exact D^2 sampling of rows, without Lloyd iterations.

D^2 sampling does not need a pass over the rows for every pick. Instead, it works in *blocks*:

1. Draw T proposals at once from the D^2 distribution at the beginning of the block.
2. Go through them in order. Accept proposal x with probability D_now^2(x) / D_block^2(x), where D_now includes the
   centres accepted within the block. This only needs the T x T distances between the proposals.
3. Update the distances for all accepted centres in one pass over the rows, a matrix product.

This is rejection sampling, so every accepted row is an exact D^2 sample. The proposals that remain when a block ends do
not matter, because the next block draws its own. A block of one proposal is the textbook algorithm (``one_by_one``).

Rows are drawn with integer weights. Squared distances are rounded to multiples of max D^2 / 2^(61 - log2 N), and
integer sums do not depend on their order. The same seed therefore gives the same picks on every run, and for every
number of processes, as long as the distances of a row do not depend on the rows beside it (see `rows`; verified on
CPUs). The price is a bias below the rounding error of the distances.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.negatives.rows import Array, Centres, Rows, check_tables, exact_products, squared_distances
from cmacc.negatives.shards import Shards

Points = Tensor | tuple[Tensor, Tensor]
MethodName = Literal["auto", "blocks", "one_by_one"]

# Number of rows whose weights are summed at a time, and of centres in a tile: they bound the memory of a pass.
SUMMED_ROWS = 1 << 20
CENTRES_AT_A_TIME = 512
# Maximum number of proposals of a block, because the number of distances between them is its square.
MOST_PROPOSALS = 1024


def kmeans_plusplus(
    points: Points,
    count: int,
    *,
    generator: torch.Generator | None = None,
    local_trials: int = 1,
    method: MethodName = "auto",
    initial_centers: Points | None = None,
    eligible: Bool[Tensor, " rows"] | None = None,
    group: dist.ProcessGroup | None = None,
    places: Int[Tensor, " rows"] | None = None,
) -> Int[Tensor, " count"]:
    """Pick ``count`` distinct rows: the first uniformly, each further one with probability proportional to D^2.

    D is the distance to the nearest row picked before. If every remaining row coincides with a picked one, the rest is
    drawn uniformly among the rows not yet picked, so that the indices are always distinct.

    Parameters
    ----------
    points
        ``(N, D)`` rows, or ``((N, a), (N, b))`` factors of rank-one rows of size a x b; of any float type.
    count
        Number of picks, 1 <= count <= N.
    generator
        Source of randomness on the CPU, whatever the device of ``points``; one number is drawn from it. The same state
        gives the same picks. With several processes, that of the first one is used.
    local_trials
        Above 1: greedy k-means++. Each pick is the best of that many D^2 draws, the one with the smallest remaining sum
        of D^2. Each pick takes two passes over the rows, and synchronises with a GPU.
    method
        ``blocks`` (few passes over the rows), ``one_by_one`` (one pass per pick), or ``auto``: blocks, or one by one if
        ``local_trials`` > 1. Both sample the same distribution, but give different picks.
    initial_centers
        ``(K, D)``, or factors: centres chosen before, which D includes from the beginning. Then no pick is uniform.
    eligible
        ``(N,)``: rows that may be picked. Default: all.
    group
        Processes that seed together. Each passes its own part of the rows; parts may differ in size.
        ``initial_centers`` is the same on all. Indices count over all parts in the order of rank. On CPUs of one kind,
        they do not depend on the number of processes.
    places
        ``(N,)``: place of each row of this process among those of all. Indices are then places, and do not depend on
        which process holds which rows either.

    Returns
    -------
    Tensor
        ``(count,)`` int64 indices in the order of picking, on the device of ``points``.

    Raises
    ------
    ValueError
        Shapes do not fit, ``count`` is more than the eligible rows, or an eligible row holds NaN or infinity.

    References
    ----------
    Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.

    Examples
    --------
    >>> far_apart = torch.tensor([[0.0], [0.0], [100.0]])
    >>> sorted(kmeans_plusplus(far_apart, 2, generator=torch.Generator().manual_seed(0)).tolist())[-1]
    2
    """
    tables = check_tables("kmeans_plusplus", "points", points)
    device = (points[0] if isinstance(points, tuple) else points).device
    if method not in get_args(MethodName):
        raise ValueError(f"kmeans_plusplus: method must be one of {', '.join(get_args(MethodName))}, got {method!r}")
    if local_trials < 1:
        raise ValueError(f"kmeans_plusplus: local_trials must be at least 1, got {local_trials}")
    if local_trials > 1 and method == "blocks":
        raise ValueError(
            f"kmeans_plusplus: method must be auto or one_by_one with local_trials={local_trials}, got blocks"
        )
    if eligible is not None and (eligible.shape != (len(tables[0]),) or eligible.dtype != torch.bool):
        raise ValueError(
            f"kmeans_plusplus: eligible must have one bool for each of the {len(tables[0])} rows, "
            f"got {tuple(eligible.shape)} of {eligible.dtype}"
        )
    centres = (
        check_tables("kmeans_plusplus", "initial_centers", initial_centers, like=tables)
        if initial_centers is not None
        else None
    )
    with torch.no_grad(), exact_products(device):
        shards = Shards(len(tables[0]), group, device, places)
        rows = Rows(
            tables, shards, device, _rows_at_a_time(device, tables), "kmeans_plusplus",
            initial_centers=centres, eligible=eligible,
        )  # fmt: skip
        seeding = seed(
            rows, count, eligible, shards.agreed_number(generator),
            most_proposals=1 if method == "one_by_one" or local_trials > 1 else None,
            local_trials=local_trials, owner="kmeans_plusplus",
        )  # fmt: skip
    return seeding.indices.to(device)


@dataclass(frozen=True)
class Seeding:
    """Picks ``(count,)`` on the CPU, with the number of passes over the rows and of proposals."""

    indices: Int[Tensor, " count"]
    passes: int
    proposals: int


def seed(
    rows: Rows,
    count: int,
    eligible: Bool[Tensor, " rows"] | None,
    number: int,
    *,
    most_proposals: int | None = None,
    local_trials: int = 1,
    on_picked: Callable[[int], None] = lambda picked: None,
    owner: str,
) -> Seeding:
    """The loop of `kmeans_plusplus` without its checks, with random numbers seeded by ``number``.

    ``most_proposals`` fixes the size of the blocks; None adapts it to the rows.
    """
    shards = rows.shards
    uniform = torch.Generator().manual_seed(number)
    weights = _Weights(rows, eligible)
    most = weights.total()
    if not 1 <= count <= most:
        kind = "rows" if most == shards.count else "eligible rows"
        raise ValueError(f"{owner}: count must be in 1..{most} (the number of {kind}), got {count}")
    passes = proposed = 0
    if rows.initial_centers is not None:
        weights.count_in(rows.initial_centers)
        passes += 1
    picks: list[int] = []
    block = _BlockSize(shards.count, most_proposals)
    while len(picks) < count:
        missing = count - len(picks)
        total = weights.total()
        if total == 0:
            # All remaining rows coincide with picked ones.
            weights.forget_distances()
            chance = random.Random(int(torch.randint(2**62, (), generator=uniform)))
            picks += weights.locate(torch.tensor(chance.sample(range(weights.total()), missing))).tolist()
            break
        size = 1 if not weights.measured else local_trials if local_trials > 1 else block.size(missing)
        drawn, chances = torch.rand(2, size, dtype=torch.float64, generator=uniform)
        indices = weights.locate((drawn * total).long().clamp_max(total - 1))
        centres = rows.take(indices)
        if not weights.measured:
            accepted = [0]
        elif local_trials > 1:
            accepted = [weights.best(centres)]
            passes += 1
        else:
            own = _accepted(weights.of(indices), centres, indices, chances, missing)
            # Another kind of processor may differ in the last bit, so all use the result of the first process.
            accepted = shards.each(own)[0].nonzero().flatten().tolist()
            block.learn(len(accepted), size)
        proposed += size
        picks += indices[accepted].tolist()
        weights.close(indices[accepted])
        if len(picks) < count:
            weights.count_in(centres[torch.tensor(accepted, device=rows.device)])
            passes += 1
        on_picked(len(picks))
    return Seeding(torch.tensor(picks, dtype=torch.int64), passes, proposed)


def _accepted(
    block: Float[Tensor, " proposals"],
    centres: Centres,
    indices: Int[Tensor, " proposals"],
    chances: Float[Tensor, " proposals"],
    most: int,
) -> Bool[Tensor, " proposals"]:
    """Which proposals of a block become centres. This is the only loop over rows in Python, on the host."""
    among = squared_distances(centres.factors, centres.squared_lengths, centres)
    # A row that was drawn twice has distance zero to itself, whatever the rounding.
    rows: NDArray[np.floating[Any]] = (
        among.masked_fill_((indices[:, None] == indices).to(among.device), 0).cpu().numpy()
    )
    now: NDArray[np.float64] = block.cpu().numpy().astype(np.float64)
    limits = chances.numpy() * now
    accepted = torch.zeros(len(now), dtype=torch.bool)
    for proposal in range(len(now)):
        if limits[proposal] < now[proposal]:
            accepted[proposal] = True
            most -= 1
            if most == 0:
                break
            np.minimum(now, rows[proposal], out=now)
    return accepted


class _BlockSize:
    """The number of proposals of the next block: twice the expected number for all missing picks.

    A block with one pick too few costs another pass over the rows. Too many proposals only cost the distances between
    them, which are cheap as long as a block is small compared with the rows.
    """

    def __init__(self, rows: int, fixed: int | None) -> None:
        self._fixed = fixed
        self._most = max(16, min(MOST_PROPOSALS, rows // 16))
        self._rate = 0.8

    def size(self, missing: int) -> int:
        if self._fixed is not None:
            return self._fixed
        return min(self._most, max(8, math.ceil(2 * missing / self._rate)))

    def learn(self, accepted: int, size: int) -> None:
        self._rate = max(accepted / size, 1 / 16)


class _Weights:
    """D^2 of every row of this process, as integer sampling weights."""

    def __init__(self, rows: Rows, eligible: Bool[Tensor, " rows"] | None) -> None:
        self._rows = rows
        everything = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        self._open = everything if eligible is None else eligible.to(rows.device, copy=True)
        self._nearest = torch.where(self._open, torch.inf, torch.zeros((), dtype=rows.dtype, device=rows.device))
        self._bits = 61 - math.ceil(math.log2(max(rows.shards.count, 2)))
        self._totals: list[int] = []  # of this process's rows, in parts of `SUMMED_ROWS`
        self._each: list[int] = []  # of every process
        self._unit = 1.0
        self.measured = False

    def count_in(self, centres: Centres) -> None:
        """Include these centres in the distances, in one pass."""
        if len(centres) == 0:
            return
        tiles = [centres[slice(i, i + CENTRES_AT_A_TIME)] for i in range(0, len(centres), CENTRES_AT_A_TIME)]
        for part, factors in self._rows.parts():
            nearest = self._nearest[part]
            for tile in tiles:
                squared = squared_distances(factors, self._rows.squared_lengths[part], tile)
                torch.minimum(nearest, squared.amin(1), out=nearest)
        self.measured = True

    def best(self, centres: Centres) -> int:
        """Which of the centres would give the smallest sum of D^2; the first one of equals."""
        sums: Tensor | int = 0
        for part, factors in self._rows.parts():
            squared = squared_distances(factors, self._rows.squared_lengths[part], centres)
            sums = sums + self._whole(torch.minimum(self._nearest[part][:, None], squared)).sum(0)
        if isinstance(sums, int):  # this process has no row
            sums = torch.zeros(len(centres), dtype=torch.int64)
        return int(self._rows.shards.each(sums).sum(0).argmin())

    def close(self, picked: Int[Tensor, " picks"]) -> None:
        """Exclude rows from further draws."""
        own = self._rows.shards.held(picked)[1].to(self._rows.device)
        self._open[own] = False
        self._nearest[own] = 0

    def forget_distances(self) -> None:
        """Give equal weights to all remaining rows."""
        self.measured = False

    def of(self, indices: Int[Tensor, " picks"]) -> Float[Tensor, " picks"]:
        """D^2 of rows of the whole table."""
        return self._rows.shards.fetch(indices, lambda own: self._nearest[own.to(self._rows.device)])

    def total(self) -> int:
        """Sum of the weights of all processes, in units scaled to the largest one."""
        largest = self._nearest.amax() if len(self._nearest) else self._nearest.new_zeros(())
        largest = self._rows.shards.each(largest).amax()
        # Below -900 the unit itself would overflow; scaled rows are never that close.
        exponent = max(math.frexp(float(largest))[1], -900) if self.measured else 0
        self._unit = 2.0 ** (self._bits - exponent)
        own = [int(self._part(start).sum()) for start in self._starts()]
        self._totals = own
        self._each = self._rows.shards.each(torch.tensor(sum(own))).tolist()
        return sum(self._each)

    def locate(self, ordinals: Int[Tensor, " draws"]) -> Int[Tensor, " draws"]:
        """The rows in which the cumulative weights of the whole table pass each ordinal in 0..total - 1."""
        shards = self._rows.shards
        if shards.places is not None:
            parts = [self._part(start) for start in self._starts()]
            own = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=self._rows.device)
            cumulative = shards.table(own).cumsum(0)
            return torch.searchsorted(cumulative, ordinals.to(cumulative.device), right=True).cpu()
        found = torch.zeros_like(ordinals)
        before = sum(self._each[: shards.rank])
        for start, total in zip(self._starts(), self._totals, strict=True):
            here = (ordinals >= before) & (ordinals < before + total)
            if bool(here.any()):
                cumulative = self._part(start).cumsum(0)
                wanted = (ordinals[here] - before).to(cumulative.device)
                found[here] = shards.start + start + torch.searchsorted(cumulative, wanted, right=True).cpu()
            before += total
        # Exactly one process found each ordinal; the others hold zero.
        return shards.each(found).sum(0)

    def _starts(self) -> range:
        return range(0, len(self._nearest), SUMMED_ROWS)

    def _part(self, start: int) -> Int[Tensor, " part"]:
        part = slice(start, start + SUMMED_ROWS)
        return self._whole(self._nearest[part]) if self.measured else self._open[part].long()

    def _whole(self, squared: Tensor) -> Tensor:
        # The weights have more bits than float32, so devices without float64 compute them on the CPU.
        return (_widened(squared) * self._unit).round().long()


def _widened(values: Tensor) -> Tensor:
    """The values in float64, on the CPU if their device does not support it (Apple's MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _rows_at_a_time(device: torch.device, tables: tuple[Array, ...]) -> int:
    """Number of rows in a part.

    On a CPU, a part and its distances fit into the cache. On a GPU, where each part costs kernel launches, they are
    limited to half a gigabyte and an eighth of the free memory.
    """
    numbers = 1 << 21
    if device.type == "cuda":
        numbers = min(1 << 27, torch.cuda.mem_get_info(device)[0] // 32)
    return max(256, numbers // (sum(table.shape[1] for table in tables) + CENTRES_AT_A_TIME))
