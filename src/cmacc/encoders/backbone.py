"""The interface of backbones: from inputs to a feature map, and from the map to one feature.

What comes before the layers is a step of its own (`Backbone.prepare`), because the norm of the inputs depends on the
whole batch. Everything after it can be computed for a few samples at a time (see `cmacc.pretraining.encoding`).
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmacc.encoders.norm import statistics_kept

LAYERS_A_CONVOLUTION = 3  # of the tiny backbones: the convolution, its norm, ReLU


class Backbone(nn.Module):
    """A backbone in steps, so that the feature map is available before it is pooled.

    Attributes
    ----------
    map_channels
        C, channels of the feature map.
    recompute
        Whether the backward pass computes the activations inside each block again, instead of keeping them.
    """

    map_channels: int
    recompute = False

    def prepare(self, inputs: Tensor) -> Tensor:
        """What `body` takes, a row for each input: after a norm over the whole batch, or differences of frames.

        Without either, the inputs themselves.
        """
        return inputs

    def body(self, prepared: Tensor) -> Tensor:
        """``(M, C, ...)``: the feature map of prepared inputs."""
        raise NotImplementedError

    def pool(self, feature_map: Tensor) -> Tensor:
        """``(M, f)``."""
        raise NotImplementedError

    def feature_map(self, inputs: Tensor) -> Tensor:
        """``(M, C, ...)``, by time and, for video, space."""
        return self.body(self.prepare(inputs))

    def forward(self, inputs: Tensor, prepared: bool = False, with_map: bool = False) -> Any:
        """``(M, f)``: features before any projection, of inputs or of ``prepared`` ones; ``with_map``, and the map.

        With the map by the same call: only a call of the module is compiled by `compile_backbones`.
        """
        feature_map = self.body(inputs if prepared else self.prepare(inputs))
        feature = self.pool(feature_map)
        return (feature, feature_map) if with_map else feature

    def through(self, block: nn.Module, inputs: Tensor) -> Tensor:
        """The output of a block of `body`; with `recompute`, only the block's inputs are kept for the backward pass."""
        if not (self.recompute and torch.is_grad_enabled()):
            output: Tensor = block(inputs)
        elif torch.compiler.is_compiling():  # a compiled second pass has no effect on statistics
            output = checkpoint(block, inputs, use_reentrant=False)
        else:
            output = checkpoint(
                block, inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(block))
            )
        return output
