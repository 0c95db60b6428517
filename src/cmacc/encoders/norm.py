"""The norm after a convolution: batch norm or group norm.

With batch norm, the features of a sample depend on the other samples of its batch. In a batch of similar samples, the
statistics are those of their kind. They reveal to the encoder what it should learn to recognise, and no other batch has
them. Group norm (Wu and He, 2018) normalises each sample on its own.

Two batch norms always remain: the one at the audio input, which standardises every mel band (`InputNorm`), and the one
in the head, which centres the features. Without them, training hardly progresses.
"""

import math
from typing import Literal

from torch import nn

NormName = Literal["batch", "group"]
_GROUPS = 8


class InputNorm(nn.BatchNorm1d):
    """Standardises each mel band over batch and time. `replace_batch_norm` never replaces it."""


def replace_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm except `InputNorm` by group norm, usually with eight groups."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and not isinstance(child, InputNorm):
            # Not every width of (2+1)-D ResNets is divisible by eight.
            setattr(module, name, nn.GroupNorm(math.gcd(_GROUPS, child.num_features), child.num_features))
        else:
            replace_batch_norm(child)
