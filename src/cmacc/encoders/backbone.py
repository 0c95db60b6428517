"""The interface of backbones: from inputs to a feature map, and from the map to one feature."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """A backbone in two steps, so that the feature map is available before it is pooled."""

    def feature_map(self, inputs: Tensor) -> Tensor:
        """``(M, C, ...)``, by time and, for video, space."""
        raise NotImplementedError

    def pool(self, feature_map: Tensor) -> Tensor:
        """``(M, f)``."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """``(M, f)``: features before any projection."""
        return self.pool(self.feature_map(inputs))
