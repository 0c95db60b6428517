"""Random clips in memory: something to train on where only the engine is to be checked or timed."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from cmacc.clips import ClipBatch
from cmacc.encoders import AudioVisualEncoder, Modality
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.learner import untrained_encoder
from cmacc.pretraining.problem import Views


class RandomClips:
    """A table of clips of noise, of the size in ``config.data.clip``.

    Parameters
    ----------
    count
        Number of clips.
    config
        Settings of the clips.
    device
        Device of the views.
    dtype
        Type of the encoders and their inputs.
    """

    def __init__(
        self, count: int, config: PretrainConfig, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        clip, generator = config.data.clip, torch.Generator().manual_seed(config.seed)
        shape = (count, clip.frame_count, clip.frame_height, clip.frame_width, 3)
        self._frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._waveforms = 0.1 * torch.randn(count, clip.sample_count, generator=generator)
        self._device, self._dtype = device, dtype
        self.labels: Tensor = torch.arange(count) % 4

    def encoder(self, config: PretrainConfig) -> AudioVisualEncoder:
        """The untrained encoders of the config."""
        return untrained_encoder(config).to(self._dtype)

    def views(self, config: PretrainConfig) -> Views:
        """Augmented views, as of decoded clips."""
        return _Typed(ClipViews(config, self._device), self._dtype)

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> ClipBatch:
        """The clips of these samples."""
        return ClipBatch(self._frames[sample_ids], self._waveforms[sample_ids], sample_ids, self.labels[sample_ids], {})


class _Typed:
    """Views whose floating-point inputs have a given type."""

    def __init__(self, views: ClipViews, dtype: torch.dtype) -> None:
        self._views, self._dtype = views, dtype

    def of(self, batch: ClipBatch, visit: int) -> dict[Modality, Tensor]:
        return {modality: rows.to(self._dtype) for modality, rows in self._views.of(batch, visit).items()}

    def another(self, modality: Modality, batch: ClipBatch, visit: int) -> Tensor:
        return self._views.another(modality, batch, visit).to(self._dtype)

    def plain(self, modality: Modality, batch: ClipBatch, visit: int) -> Tensor:
        return self._views.plain(modality, batch, visit).to(self._dtype)

    def kept(self, batch: ClipBatch, visit: int) -> dict[str, Tensor]:
        return self._views.kept(batch, visit)

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        return self._views.again(modality, kept).to(self._dtype)
