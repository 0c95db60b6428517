"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from cmacc.pretraining.config import OptimConfig


def build_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters of the modules, without weight decay on norms and biases."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # Not fused AdamW: with it, a resumed run differed from an uninterrupted one, because the loaded state is contiguous
    # while the kernels are channels-last.
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate(config: OptimConfig, step: int) -> float:
    """Linear warm-up over `OptimConfig.warmup` steps, then cosine decay to zero at ``steps``.

    Examples
    --------
    >>> config = OptimConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    >>> [round(learning_rate(config, step), 3) for step in (0, 9, 55, 99)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
