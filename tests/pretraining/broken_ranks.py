"""A process of `cmacc verify` whose gradients through gathered embeddings are too small, by the number of processes."""

from typing import Any

import torch
from torch import Tensor

from cmacc.pretraining import processes
from cmacc.pretraining.verify import ranks


def worker(*arguments: Any) -> None:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = ctx.processes.rank * ctx.size
        return gradient[start : start + ctx.size], None

    processes._Gather.backward = staticmethod(backward)  # type: ignore[method-assign]
    torch.set_num_threads(1)
    ranks.worker(*arguments)
