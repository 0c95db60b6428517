"""A table whose rows are distributed over processes. Without a process group, all rows are on this one.

Every row has a place in the whole table. By default the rows of a process follow those of the process before it. Where
the caller gives other places, what is chosen from the table does not depend on which process holds which rows.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
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
    places
        ``(own,)`` int64: place of each row of this process in the whole table. Over all processes, each of
        0..count - 1 stands once. Default: process after process.

    Attributes
    ----------
    rank, processes
        Rank of this process, and size of the group.
    count
        Number of rows of the whole table.
    start
        Place of this process's first row, if ``places`` is None.
    places
        As given.

    Examples
    --------
    >>> shards = Shards(3)
    >>> shards.start, shards.count
    (0, 3)
    """

    def __init__(
        self,
        own: int,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        places: Int[Tensor, " own"] | None = None,
    ) -> None:
        self.group = group
        self.device = device or torch.device("cpu")
        counts = self.each(torch.tensor(own)).tolist()
        self.processes = len(counts)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.start = sum(counts[: self.rank])
        self.count = sum(counts)
        self.places = places
        self._own = own
        self._rows: Tensor | None = None
        if places is not None:
            # The row of this process at each place, on the CPU like the places that are asked for.
            self._rows = torch.full((self.count,), -1)
            self._rows[places.cpu()] = torch.arange(own)

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
        if self.group is None and self.places is None:
            return own
        whole = own.new_zeros(self.count, *own.shape[1:])
        whole[self._own_places(own.device)] = own
        if self.group is not None:
            # A sum of one value and zeros is that value, exactly, in every type.
            dist.all_reduce(whole, group=self.group)
        return whole

    def own(self, table: Tensor) -> Tensor:
        """The rows of this process, from the whole table."""
        return table[self._own_places(table.device)]

    def held(self, indices: Int[Tensor, " picks"]) -> tuple[Bool[Tensor, " picks"], Int[Tensor, " held"]]:
        """Which places this process holds, and its rows at them.

        ``indices`` are on the CPU.
        """
        if self._rows is None:
            held = (indices >= self.start) & (indices < self.start + self._own)
            return held, indices[held] - self.start
        rows = self._rows[indices]
        return rows >= 0, rows[rows >= 0]

    def fetch(self, indices: Int[Tensor, " picks"], read: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows ``indices`` of the whole table, on every process.

        Parameters
        ----------
        indices
            Places in the whole table, the same on every process, on the CPU.
        read
            Returns rows of this process by their local places.
        """
        held, own = self.held(indices)
        rows = read(own)
        if self.group is None:
            return rows
        fetched = rows.new_zeros(len(indices), *rows.shape[1:])
        fetched[held.to(rows.device)] = rows
        dist.all_reduce(fetched, group=self.group)
        return fetched

    def _own_places(self, device: torch.device) -> slice | Tensor:
        return slice(self.start, self.start + self._own) if self.places is None else self.places.to(device)
