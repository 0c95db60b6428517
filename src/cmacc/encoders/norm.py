"""Which norm follows a convolution: by the batch's statistics, or by each sample's own.

Batch norm lets a sample's features depend on who stands beside it. In a batch of samples that are alike its statistics
are those of their kind, which tells the encoder what it should learn to see, and which no other batch will have. Group
norm (Wu and He, 2018) takes each sample by itself.

Two batch norms stay wherever they are: that at the audio input, which standardises every mel band (`InputNorm`), and
that of the head, which centres the features. Without them hardly anything is learnt.
"""

import math
from typing import Literal

from torch import nn

NormName = Literal["batch", "group"]
_GROUPS = 8


class InputNorm(nn.BatchNorm1d):
    """Standardises each mel band over batch and time; never replaced."""


def replace_batch_norm(module: nn.Module) -> None:
    """Put group norm, as a rule of eight groups, into the place of every batch norm but `InputNorm`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and not isinstance(child, InputNorm):
            # Not every width of (2+1)-D ResNets can be divided by eight.
            setattr(module, name, nn.GroupNorm(math.gcd(_GROUPS, child.num_features), child.num_features))
        else:
            replace_batch_norm(child)
