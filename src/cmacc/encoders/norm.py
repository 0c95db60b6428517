"""The norm after a convolution: batch norm over a part of the batch or over the whole batch, or group norm.

With batch norm, the features of a sample depend on the other samples of its batch. In a batch of similar samples, the
statistics are those of their kind. They reveal to the encoder what it should learn to recognise, and no other batch has
them. Group norm (Wu and He, 2018) normalises each sample on its own.

With several processes, what a sample's features depend on is

* ``batch``: the samples of its own process. Other numbers of processes give other results, and the smaller the part of
  a process, the more its statistics reveal;
* ``sync``: the samples of all processes, as in one process with the whole batch, up to rounding;
* ``group``: the sample alone.

Two batch norms always remain: the one at the audio input, which standardises every mel band (`InputNorm`), and the one
in the head, which centres the features. Without them, training hardly progresses. They are over the whole batch.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NormName = Literal["batch", "sync", "group"]
_GROUPS = 8


class WholeBatchNorm(_BatchNorm):
    """Batch norm over the parts of a batch on all processes, which are of equal sizes.

    Without several processes it is plain batch norm. torch's `SyncBatchNorm` does the same on GPUs only, and
    DistributedDataParallel refuses it on CPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(M, C, ...)``; in training mode a collective, which all processes must call."""
        if not self.training or _process_count() == 1:
            return super().forward(input)
        count = _process_count()
        places = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        # The mean first: the difference of a mean square and a squared mean would lose digits.
        mean = _sum(wide.mean(places)) / count
        centred = wide - mean.view(shape)
        variance = _sum(centred.square().mean(places)) / count
        self._track(mean.detach(), variance.detach(), input.numel() // input.shape[1] * count)
        normalised: Tensor = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"WholeBatchNorm: input must be (M, C, ...), got {tuple(input.shape)}")

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_((variance * count / max(1, count - 1)).to(self.running_var), self.momentum)
        self.num_batches_tracked.add_(1)


class InputNorm(WholeBatchNorm):
    """Standardises each mel band over batch and time. `set_norms` never replaces it."""


def set_norms(module: nn.Module, name: NormName) -> None:
    """Replace every batch norm except `InputNorm`: ``group`` by group norm, usually with eight groups."""
    if name == "group":
        # Not every width of (2+1)-D ResNets is divisible by eight.
        _replace(module, lambda norm: nn.GroupNorm(math.gcd(_GROUPS, norm.num_features), norm.num_features))
    elif name == "sync":
        _replace(module, lambda norm: WholeBatchNorm(norm.num_features, norm.eps, norm.momentum))


def _replace(module: nn.Module, make: Callable[[Any], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            setattr(module, name, make(child))
        else:
            _replace(child, make)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Restore the running statistics of all batch norms at the end.

    A pass that only repeats another one must not count twice.
    """
    restore = saved_statistics(module)
    try:
        yield
    finally:
        restore()


@contextmanager
def statistics_held(module: nn.Module) -> Iterator[None]:
    """Within it, batch norms normalise as in training, but their running statistics do not move.

    Unlike `statistics_kept`, it writes no buffers, which the backward pass of an earlier graph may need.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def saved_statistics(module: nn.Module) -> Callable[[], None]:
    """A function that restores the running statistics of all batch norms to what they are now."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in saved:
            buffer.copy_(value)

    return restore


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def _sum(value: Tensor) -> Tensor:
    result: Tensor = _Sum.apply(value)
    return result


def _process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
