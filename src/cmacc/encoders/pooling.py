"""Pooling in place of a video backbone's own: the mean, or attention over time as in STiCA (Patrick et al., 2021)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

VideoPoolingName = Literal["own", "mean", "transformer"]
_LAYERS, _HEADS, _WIDENING, _DEVIATION = 2, 4, 4, 0.02


class MeanPool(nn.Module):
    """The mean of a feature map over time and space.

    Examples
    --------
    >>> import torch
    >>> MeanPool()(torch.ones(2, 16, 5, 3, 4)).shape
    torch.Size([2, 16])
    """

    def forward(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch channels"]:
        """``(M, C)`` from ``(M, C, T, H, W)``, for T, H and W of at least one."""
        return feature_map.mean(dim=(2, 3, 4))


class TransformerPool(nn.Module):
    """From a feature map to one feature, through two transformer layers over time.

    Each time of the map becomes a token, the mean over its places. After two layers (norm after the sum, four heads,
    GELU), the feature is the mean of the tokens. There is no position code, so a map of any length can be pooled,
    and a crop of a map like a whole one. The order of the tokens does not matter either.

    Parameters
    ----------
    channels
        C, a multiple of four: channels of the map and size of the feature.

    Raises
    ------
    ValueError
        ``channels`` is not a positive multiple of four.

    Notes
    -----
    The paper returns the first token instead of the mean. Without a position code, what sets that token apart is that
    it comes from the first frame: a crop in time would be described from another frame than the whole, and what
    happens at the end only matters as far as the first frame attends to it. In the mean all frames count alike.

    Examples
    --------
    >>> import torch
    >>> TransformerPool(16)(torch.randn(2, 16, 5, 3, 4)).shape
    torch.Size([2, 16])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1 or channels % _HEADS:
            raise ValueError(f"TransformerPool: channels must be a positive multiple of {_HEADS}, got {channels}")
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    channels, _HEADS, _WIDENING * channels, dropout=0.0, activation="gelu", batch_first=True
                )
                for _ in range(_LAYERS)
            )
        )
        # As in the paper: small, so that a layer starts as little more than its norm.
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=_DEVIATION)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch channels"]:
        """``(M, C)`` from ``(M, C, T, H, W)``, for T, H and W of at least one."""
        tokens = feature_map.mean(dim=(3, 4)).transpose(1, 2)
        attended: Tensor = self.layers(tokens)
        return attended.mean(dim=1)
