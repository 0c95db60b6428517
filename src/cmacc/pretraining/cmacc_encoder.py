"""cmacc's own encoders as a `ClipEncoder`: from frames and waveforms, with all preprocessing inside."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cmacc.clips import ClipSpec, grey_video, to_video
from cmacc.encoders import MODALITIES, AudioVisualEncoder, Backbone
from cmacc.encoders.towers import TextSides, VideoTower
from cmacc.pretraining.clip_encoder import EncoderError, Modality
from cmacc.pretraining.clip_views import audio_input
from cmacc.pretraining.config import PretrainConfig


class CmaccEncoder(nn.Module):
    """cmacc's encoders with their preprocessing: normalised pixels, and log-mel spectrograms unless audio has a tower.

    Parameters
    ----------
    pair
        The encoders, in evaluation mode.
    clip
        Size of the clips they were trained on.
    is_grey
        Whether they were trained on video without colour.
    """

    modalities: tuple[Modality, ...] = ("video", "audio")

    def __init__(self, pair: AudioVisualEncoder, clip: ClipSpec, is_grey: bool) -> None:
        super().__init__()
        self.pair = pair
        # Under this name also for a tower, which takes waveforms: hashes in older cards cover the names of modules.
        self.log_mel = audio_input(pair.config, clip.sample_rate_hz)
        self.spec = clip
        self.is_grey = is_grey
        self._text = TextSides({"video": pair.config.video, "audio": pair.config.audio})

    @classmethod
    def of_run(cls, config: PretrainConfig, pair: AudioVisualEncoder) -> "CmaccEncoder":
        """Encoders with the clip size and colour setting of ``config``."""
        encoder = cls(pair, config.data.clip, config.data.augment.grey_probability == 1)
        # A tower that was trained no longer shares a space with its text side.
        frozen = [modality for modality in MODALITIES if getattr(config.train, modality) == "head"]
        encoder._text = TextSides({modality: getattr(config.encoder, modality) for modality in frozen})
        return encoder

    @property
    def backbones(self) -> "CmaccBackbones":
        """The encoders without their heads, for features that do not depend on these."""
        return CmaccBackbones(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """The backbone's features, before the projection head."""
        features: Tensor = self.pair.video.backbone(self._video_input(frames))
        return features

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch features"]:
        """The backbone's features, before the projection head."""
        features: Tensor = self.pair.audio.backbone(self.log_mel(waveforms))
        return features

    def match_video(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Output of the projection head, L2-normalised."""
        return self.pair.video.project(features).embedding

    def match_audio(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """Output of the projection head, L2-normalised."""
        return self.pair.audio.project(features).embedding

    def map_video(
        self, frames: UInt8[Tensor, "batch time height width 3"]
    ) -> Float[Tensor, "batch channels map_time map_height map_width"]:
        """The backbone's feature map.

        Raises
        ------
        EncoderError
            The backbone is a tower without one.
        """
        return self._spatial_backbone().feature_map(self._video_input(frames))

    def pool_map(
        self, feature_map: Float[Tensor, "batch channels map_time map_height map_width"]
    ) -> Float[Tensor, "batch features"]:
        """The backbone's features, from its feature map."""
        return self._spatial_backbone().pool(feature_map)

    def _video_input(self, frames: Tensor) -> Tensor:
        video = to_video(frames)
        return grey_video(video) if self.is_grey else video

    def _spatial_backbone(self) -> Backbone | VideoTower:
        backbone = self.pair.video.backbone
        if isinstance(backbone, Backbone) or (isinstance(backbone, VideoTower) and backbone.has_feature_map):
            return backbone
        raise EncoderError(
            f"encoder with video {self.pair.config.video}: must have a feature map that it pools, as cmacc's own "
            "backbones (tiny, r3d_18, ...) and these towers have: torchvision's r3d_18, mc3_18, r2plus1d_18, resnet, "
            "resnext, wide_resnet, regnet, efficientnet, mobilenet_v3, swin and swin_v2"
        )

    @property
    def text_modalities(self) -> tuple[Modality, ...]:
        """Modalities whose backbone is a tower with a text side."""
        return self._text.modalities

    def encode_text(self, texts: Sequence[str], modality: Modality) -> Float[Tensor, "texts features"]:
        """Embeddings by the text side of the tower, as it was before training, L2-normalised."""
        return self._text.encode(texts, modality, self.device)


class CmaccBackbones(nn.Module):
    """The backbones of encoders as a `ClipEncoder`: what is kept of them must not depend on the seed of new heads."""

    modalities = MODALITIES

    def __init__(self, encoder: CmaccEncoder) -> None:
        super().__init__()
        self.video, self.audio = encoder.pair.video.backbone, encoder.pair.audio.backbone
        self.log_mel = encoder.log_mel
        self.is_grey, self.spec = encoder.is_grey, encoder.spec
        # In a tuple: as a submodule, its heads would be part of the hash under which features are kept.
        self._whole = (encoder,)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._whole[0].device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        """Features of the video backbone."""
        return self._whole[0].embed_video(frames)

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch features"]:
        """Features of the audio backbone."""
        return self._whole[0].embed_audio(waveforms)
