"""A table whose rows are distributed over processes, by rank. Without a process group, all rows are on this one."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor


class Shards:
    """Which rows of a table this process holds, and the collectives that selection needs.

    The constructor and each method are collectives: all processes of the group must call them, or they hang.

    Parameters
    ----------
    own
        Number of rows on this process; it may differ between processes, or be 0.
    group
        The processes; None: this one only.
    device
        Device of the collectives' tensors: the process's GPU for NCCL.

    Attributes
    ----------
    rank, processes
        Rank of this process, and size of the group.
    start, stop
        This process holds the rows ``start <= row < stop`` of the whole table.
    count
        Number of rows of the whole table.

    Examples
    --------
    >>> shards = Shards(3)
    >>> shards.start, shards.stop, shards.count
    (0, 3, 3)
    """

    def __init__(self, own: int, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self.group = group
        self.device = device or torch.device("cpu")
        counts = self.each(torch.tensor(own)).tolist()
        self.processes = len(counts)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.start = sum(counts[: self.rank])
        self.stop = self.start + own
        self.count = sum(counts)

    def each(self, value: Tensor) -> Tensor:
        """``(processes, *shape)``, on the CPU: the values of all processes, of one shape and type."""
        if self.group is None:
            return value[None].cpu()
        value = value.to(self.device)
        values = [torch.empty_like(value) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(values, value, group=self.group)
        return torch.stack(values).cpu()

    def agreed_number(self, generator: torch.Generator | None) -> int:
        """A random number that all processes share: that of the first process. All draw, to keep generators in step."""
        return int(self.each(torch.randint(2**62, (), generator=generator))[0])

    def table(self, own: Tensor) -> Tensor:
        """``(count, ...)``: the whole table, from the rows of all processes."""
        if self.group is None:
            return own
        whole = own.new_zeros(self.count, *own.shape[1:])
        whole[self.start : self.stop] = own
        # A sum of one value and zeros is that value, exactly, in every type.
        dist.all_reduce(whole, group=self.group)
        return whole

    def fetch(self, indices: Int[Tensor, " picks"], read: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows ``indices`` of the whole table, on every process.

        Parameters
        ----------
        indices
            Places in the whole table, the same on every process, on the CPU.
        read
            Returns rows of this process by their local places.
        """
        if self.group is None:
            return read(indices)
        own = (indices >= self.start) & (indices < self.stop)
        rows = read(indices[own] - self.start)
        fetched = rows.new_zeros(len(indices), *rows.shape[1:])
        fetched[own.to(rows.device)] = rows
        dist.all_reduce(fetched, group=self.group)
        return fetched
