"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from cmacc.pretraining.config import OptimConfig


def build_optimizer(
    modules: Iterable[nn.Module], config: OptimConfig, backbone_learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """AdamW over all parameters of the modules that are trained, without weight decay on norms and biases.

    Parameters
    ----------
    modules
        Encoders, and objectives with parameters.
    config
        Settings of the optimizer.
    backbone_learning_rate
        Peak learning rate of the encoders' backbones; None: ``config.learning_rate``. Groups hold it as ``lr_scale``,
        relative to ``config.learning_rate``.
    """
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    scale = 1.0 if backbone_learning_rate is None else backbone_learning_rate / config.learning_rate
    backbones = {name for name, _ in named if scale != 1.0 and "backbone" in name.split(".")}
    groups = [
        {
            "params": [p for name, p in named if (p.ndim > 1) == is_matrix and (name in backbones) == in_backbone],
            "weight_decay": config.weight_decay if is_matrix else 0.0,
            "lr_scale": scale if in_backbone else 1.0,
        }
        for in_backbone in (False, True)
        for is_matrix in (True, False)
    ]
    # Not fused AdamW: with it, a resumed run differed from an uninterrupted one, because the loaded state is contiguous
    # while the kernels are channels-last.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)


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
