"""k-means++ seeding (Arthur and Vassilvitskii, 2007): D^2 sampling of rows, exact, without Lloyd iterations.

A D^2 sampler need not pass over the rows for every pick. A *block* draws T proposals at once from the D^2 distribution
of its beginning, and goes through them in order: proposal x is accepted with probability

    D_now^2(x) / D_block^2(x)

where D_now counts the centres accepted within the block, for which only the T x T distances among the proposals are
needed. This is rejection sampling, so every accepted row is an exact D^2 sample; what is left of the block when it ends
changes nothing, for the next block draws its own proposals. One pass over the rows, as a matrix product, then counts
all accepted centres. A block of one proposal is the textbook's form (``one_by_one``).

Rows are drawn by whole numbers: squared distances are taken to the nearest multiple of max D^2 / 2^(61 - log2 N), and
sums of whole numbers do not depend on their order. So the same seed gives the same picks on every run and, where a
row's distances do not depend on the rows beside it (see `rows`; seen on CPUs), for every number of processes. The price
is a bias below the rounding of the distances.
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

# Rows whose weights are summed at a time, and centres measured to at a time: bound the memory of a pass.
SUMMED_ROWS = 1 << 20
CENTRES_AT_A_TIME = 512
# Proposals of a block at most: their distances among themselves are as many squared.
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
) -> Int[Tensor, " count"]:
    """Pick ``count`` distinct rows: the first uniformly, each next with probability proportional to D^2.

    D is the distance to the nearest row picked before. Where every remaining row coincides with a picked one, the rest
    is drawn uniformly among the rows not yet picked, so that the indices are always distinct.

    Parameters
    ----------
    points
        ``(N, D)`` rows, or ``((N, a), (N, b))`` factors of rank-one rows of size a x b; of any float type.
    count
        Number of picks, 1 <= count <= N.
    generator
        Source of randomness on the CPU, whatever the device of ``points``; one number is taken from it. The same state
        gives the same picks. Of several processes the first one's counts.
    local_trials
        Above 1, greedy k-means++: of that many D^2 draws the one that leaves the least sum of D^2 becomes the pick.
        Two passes over the rows, and a wait for a GPU, each pick.
    method
        ``blocks`` (few passes over the rows), ``one_by_one`` (one a pick), or ``auto``: blocks, or for
        ``local_trials`` > 1 the only one there is, one by one. Both give the same distribution, not the same picks.
    initial_centers
        ``(K, D)``, or factors: centres chosen before, which D counts from the beginning. Then no pick is uniform.
    eligible
        ``(N,)``: rows that may be picked; all, if not given.
    group
        Processes of which each calls this with its own part of the rows; parts may differ in size. ``initial_centers``
        is the same on all. The indices are places in all parts, one after another by rank, and on CPUs of one kind do
        not depend, for one seed, on the number of processes.

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
        shards = Shards(len(tables[0]), group, device)
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
    """Picks ``(count,)`` on the CPU, and what they took: passes over the rows, and proposals drawn."""

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
    """The bare loop of `kmeans_plusplus`, on random numbers seeded by ``number``.

    ``most_proposals`` fixes the size of the blocks; None suits it to the rows.
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
            # All that is left coincides with what was picked.
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
            # Another kind of processor may differ in a last bit: the first process's word goes.
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
    """Which proposals of a block become centres; the one loop that runs in Python, on the host."""
    among = squared_distances(centres.factors, centres.squared_lengths, centres)
    # A row's distance to itself, drawn twice, is zero whatever the rounding.
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
    """How many proposals the next block draws: twice what it should take for all that is missing to be accepted.

    A block that falls short by one pick costs another pass; proposals too many only their distances among themselves,
    which are few as long as a block is small beside the rows.
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
    """D^2 of every own row, from which rows are drawn by whole numbers."""

    def __init__(self, rows: Rows, eligible: Bool[Tensor, " rows"] | None) -> None:
        self._rows = rows
        everything = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        self._open = everything if eligible is None else eligible.to(rows.device, copy=True)
        self._nearest = torch.where(self._open, torch.inf, torch.zeros((), dtype=rows.dtype, device=rows.device))
        self._bits = 61 - math.ceil(math.log2(max(rows.shards.count, 2)))
        self._totals: list[int] = []  # of this process's rows, in lots of `SUMMED_ROWS`
        self._each: list[int] = []  # of every process
        self._unit = 1.0
        self.measured = False

    def count_in(self, centres: Centres) -> None:
        """One pass: the distances count these centres too."""
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
        """Which of the centres would leave the least sum of D^2; the first of equals."""
        sums: Tensor | int = 0
        for part, factors in self._rows.parts():
            squared = squared_distances(factors, self._rows.squared_lengths[part], centres)
            sums = sums + self._whole(torch.minimum(self._nearest[part][:, None], squared)).sum(0)
        if isinstance(sums, int):  # this process has no row
            sums = torch.zeros(len(centres), dtype=torch.int64)
        return int(self._rows.shards.each(sums).sum(0).argmin())

    def close(self, picked: Int[Tensor, " picks"]) -> None:
        """These rows are no longer to be drawn."""
        shards = self._rows.shards
        own = (picked[(picked >= shards.start) & (picked < shards.stop)] - shards.start).to(self._rows.device)
        self._open[own] = False
        self._nearest[own] = 0

    def forget_distances(self) -> None:
        """From now on all open rows weigh the same."""
        self.measured = False

    def of(self, indices: Int[Tensor, " picks"]) -> Float[Tensor, " picks"]:
        """D^2 of rows of the whole table."""
        return self._rows.shards.fetch(indices, lambda own: self._nearest[own.to(self._rows.device)])

    def total(self) -> int:
        """Sum of all processes' weights, in units that suit the largest."""
        largest = self._nearest.amax() if len(self._nearest) else self._nearest.new_zeros(())
        largest = self._rows.shards.each(largest).amax()
        # Beyond -900 the unit itself would overflow; scaled rows are never so near.
        exponent = max(math.frexp(float(largest))[1], -900) if self.measured else 0
        self._unit = 2.0 ** (self._bits - exponent)
        own = [int(self._part(start).sum()) for start in self._starts()]
        self._totals = own
        self._each = self._rows.shards.each(torch.tensor(sum(own))).tolist()
        return sum(self._each)

    def locate(self, ordinals: Int[Tensor, " draws"]) -> Int[Tensor, " draws"]:
        """The rows in which the cumulative weights of the whole table pass each ordinal in 0..total - 1."""
        shards = self._rows.shards
        found = torch.zeros_like(ordinals)
        before = sum(self._each[: shards.rank])
        for start, total in zip(self._starts(), self._totals, strict=True):
            here = (ordinals >= before) & (ordinals < before + total)
            if bool(here.any()):
                cumulative = self._part(start).cumsum(0)
                wanted = (ordinals[here] - before).to(cumulative.device)
                found[here] = shards.start + start + torch.searchsorted(cumulative, wanted, right=True).cpu()
            before += total
        # Each ordinal was found by one process; the others hold zero.
        return shards.each(found).sum(0)

    def _starts(self) -> range:
        return range(0, len(self._nearest), SUMMED_ROWS)

    def _part(self, start: int) -> Int[Tensor, " part"]:
        part = slice(start, start + SUMMED_ROWS)
        return self._whole(self._nearest[part]) if self.measured else self._open[part].long()

    def _whole(self, squared: Tensor) -> Tensor:
        # More bits than a float32 holds: on the CPU where the device has no float64.
        return (_widened(squared) * self._unit).round().long()


def _widened(values: Tensor) -> Tensor:
    """In float64, on their device if that has it: Apple's MPS has not."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _rows_at_a_time(device: torch.device, tables: tuple[Array, ...]) -> int:
    """Rows of a part, with their distances: what stays in a CPU's cache; on a GPU, where each part costs launches, what
    is at most half a gigabyte and an eighth of the free memory.
    """
    numbers = 1 << 21
    if device.type == "cuda":
        numbers = min(1 << 27, torch.cuda.mem_get_info(device)[0] // 32)
    return max(256, numbers // (sum(table.shape[1] for table in tables) + CENTRES_AT_A_TIME))
