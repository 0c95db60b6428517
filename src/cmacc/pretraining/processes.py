"""The processes of a run: how they share a batch, and what they exchange.

Process r of R encodes rows r M/R to (r + 1) M/R of every batch. The objective is then computed over the whole batch by
every process, from the gathered embeddings. It costs each process M (M + K) products per direction, little beside an
encoder, and keeps every objective right as it is: losses, metrics and dictionaries are the same on all processes.

A gradient reaches the weights through the rows that a process encoded itself, so the gradient of the whole loss is the
*sum* over the processes. DistributedDataParallel takes the mean. `Processes.gather` therefore multiplies by R on the
way back; a plain all-gather would lose gradients, or scale them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """The processes that train together; without a group, this one alone.

    All methods are collectives, except `part` and `part_size`: all processes must call them, in the same order.

    Attributes
    ----------
    rank, count
        Rank of this process, and R, the number of processes.
    group
        Process group of torch.distributed.
    device
        Device of what is exchanged.

    Examples
    --------
    >>> alone = Processes()
    >>> alone.part(8), alone.any(True)
    (slice(0, 8, None), True)
    """

    rank: int = 0
    count: int = 1
    group: dist.ProcessGroup | None = None
    device: torch.device = _CPU

    @classmethod
    def current(cls, device: torch.device) -> "Processes":
        """Those of torch.distributed, if it is initialised; tensors on ``device`` are exchanged."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, device)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """The rows of a batch that this process encodes.

        Raises
        ------
        ValueError
            The batch cannot be divided.
        """
        size = self.part_size(batch_size)
        return slice(self.rank * size, (self.rank + 1) * size)

    def part_size(self, batch_size: int) -> int:
        """M / R: the number of rows of a batch that each process encodes.

        Raises
        ------
        ValueError
            The batch cannot be divided.
        """
        if batch_size % self.count:
            raise ValueError(f"optim.batch_size must be a multiple of the {self.count} processes, got {batch_size}")
        return batch_size // self.count

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of rank; as many on each process.

        The gradient of the rows is R times that of the result, see above.
        """
        if self.group is None:
            return rows
        gathered: Tensor = _Gather.apply(rows, self)
        return gathered

    def each(self, value: Tensor) -> Tensor:
        """``(R, *shape)``, on the CPU: the values of all processes, of one shape and type."""
        return _all_gather(value.to(self.device)[None], self).cpu()

    def all(self, flags: Bool[Tensor, " flags"]) -> list[bool]:
        """Which flags hold on all processes."""
        found: list[bool] = (flags if self.group is None else self.each(flags).all(0)).tolist()
        return found

    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, on the device of this one's."""
        if self.group is None:
            return tensor
        shared = tensor.to(self.device)
        dist.broadcast(shared, 0, group=self.group)
        return shared.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any process."""
        return flag if self.group is None else bool(self.each(torch.tensor(flag)).any())

    def objects(self, value: Any) -> list[Any]:
        """What all processes hold, in the order of rank; small things only, they are pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes: one exchange for each type."""
        if self.group is None:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for held in by_type.values():
            flat = self.sum(torch.cat([tensor.flatten() for tensor in held])) / self.count
            for tensor, mean in zip(held, flat.split([tensor.numel() for tensor in held]), strict=True):
                tensor.copy_(mean.view_as(tensor))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, processes: Processes) -> Tensor:
        ctx.processes, ctx.size = processes, len(rows)
        return _all_gather(rows, processes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = ctx.processes.rank * ctx.size
        return gradient[start : start + ctx.size] * ctx.processes.count, None


def _all_gather(rows: Tensor, processes: Processes) -> Tensor:
    if processes.group is None:
        return rows
    rows = rows.detach().contiguous()
    gathered = rows.new_empty(processes.count * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows, group=processes.group)
    return gathered
