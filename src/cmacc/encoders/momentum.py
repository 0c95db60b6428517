"""The key encoders h, a momentum copy of the query encoders f: h <- m h + (1 - m) f (He et al., 2020, eq. 2).

Buffers are averaged too. The average itself is torch's (`torch.optim.swa_utils`). In addition, m may change from step
to step, modules that do not match are refused by name, and integer buffers are copied.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cmacc.encoders.pair import Encoder

_Module = TypeVar("_Module", bound=nn.Module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and `torch.compile`, wrapped in any order."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):  # set by torch.compile
            module = inner
        else:
            return module


def momentum_copy(online: _Module) -> _Module:
    """A copy without gradient, in evaluation mode.

    In evaluation mode, batch norm uses its running statistics, which `update_momentum` averages along with the
    parameters. A key then only depends on its own clip. With batch statistics, keys would reveal which batch they came
    from (the leak for which MoCo shuffles its batches).
    """
    # A frozen backbone never changes, and is shared: a second copy of a large tower may not fit into memory.
    frozen = [part.network for part in online.modules() if isinstance(part, Encoder) and part.frozen_digest]
    key_encoder = copy.deepcopy(online, {id(network): network for network in frozen})
    key_encoder.requires_grad_(False)
    return key_encoder.eval()


@torch.no_grad()
def update_momentum(online: nn.Module, key_encoder: nn.Module, momentum: float) -> None:
    """Move ``key_encoder`` towards ``online`` in place: average floating-point tensors, copy all others.

    Parameters
    ----------
    online
        The query encoders, possibly wrapped by DistributedDataParallel or `torch.compile`.
    key_encoder
        The key encoders, from `momentum_copy`.
    momentum
        m, in [0, 1].

    Raises
    ------
    ValueError
        ``momentum`` is not in [0, 1], or the two modules differ in a parameter's or buffer's name or shape.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"update_momentum: momentum must be in [0, 1], got {momentum}")
    sources, targets = _tensors(unwrapped(online)), _tensors(unwrapped(key_encoder))
    if sources.keys() != targets.keys():
        differing = sorted(sources.keys() ^ targets.keys())
        raise ValueError(f"update_momentum: the modules must match, but differ in {', '.join(differing[:5])}")
    for name, target in targets.items():
        if sources[name].shape != target.shape:
            raise ValueError(
                f"update_momentum: {name} must have equal shapes, "
                f"got {tuple(sources[name].shape)} and {tuple(target.shape)}"
            )
    averaged = [name for name, target in targets.items() if target.is_floating_point() and target is not sources[name]]
    # One call for all tensors: in a small model, a call per tensor costs more than the averaging.
    get_ema_multi_avg_fn(momentum)(
        [targets[name] for name in averaged], [sources[name].to(targets[name].dtype) for name in averaged], 0
    )
    for name, target in targets.items():
        if not target.is_floating_point():
            target.copy_(sources[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers. Shared ones appear once; a state dict would have them under each of their names."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
