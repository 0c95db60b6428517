"""The momentum copy h of the encoders f: h <- m h + (1 - m) f, buffers included (He et al., 2020, eq. 2)."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def momentum_copy(online: _Module) -> _Module:
    """A copy without gradient, in evaluation mode.

    In evaluation mode batch norm uses its running statistics, which `update_momentum` averages along with the
    parameters: a key then depends on its own clip alone and cannot betray, by the statistics of its batch, which batch
    it came from (the leak that MoCo shuffles batches to avoid).
    """
    twin = copy.deepcopy(online)
    twin.requires_grad_(False)
    return twin.eval()


@torch.no_grad()
def update_momentum(online: nn.Module, twin: nn.Module, momentum: float) -> None:
    """Move ``twin`` towards ``online`` in place: floating parameters and buffers are averaged, others copied.

    Raises
    ------
    ValueError
        ``momentum`` is not in [0, 1], or the two modules differ in a parameter's or buffer's name or shape.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"update_momentum: momentum must be in [0, 1], got {momentum}")
    sources, targets = _tensors(online), _tensors(twin)
    if sources.keys() != targets.keys():
        differing = sorted(sources.keys() ^ targets.keys())
        raise ValueError(f"update_momentum: the modules must be alike, but differ in {', '.join(differing[:5])}")
    for name, target in targets.items():
        if sources[name].shape != target.shape:
            raise ValueError(
                f"update_momentum: {name} must have equal shapes, "
                f"got {tuple(sources[name].shape)} and {tuple(target.shape)}"
            )
    averaged = [name for name, target in targets.items() if target.is_floating_point()]
    # One call for all of them: a small model has more tensors than work in them.
    torch._foreach_lerp_(
        [targets[name] for name in averaged],
        [sources[name].to(targets[name].dtype) for name in averaged],
        1 - momentum,
    )
    for name in targets.keys() - set(averaged):
        targets[name].copy_(sources[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, one that is shared under several names only once (a state dict has it several times)."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
