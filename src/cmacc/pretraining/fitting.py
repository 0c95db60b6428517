"""The size of clips that the towers of a run were made for."""

import dataclasses
from typing import Any

import torch

from cmacc.clips import ClipSpec, window_length
from cmacc.encoders import MODALITIES, Modality, is_tower, open_tower
from cmacc.encoders.towers import absolute_tower
from cmacc.pretraining.clip_views import audio_input
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.config_error import ConfigError
from cmacc.pretraining.learner import untrained_encoder

_OF_MODALITY: dict[Modality, tuple[str, ...]] = {
    "video": ("frame_count", "frame_rate_hz", "frame_height", "frame_width"),
    "audio": ("audio_seconds", "sample_rate_hz"),
}


def fitted_to_towers(config: PretrainConfig) -> tuple[PretrainConfig, list[str]]:
    """Set the size of clips to what the towers take, where it has its default, and make paths of towers absolute.

    Returns
    -------
    config
        The config with ``data.clip`` and the names of the towers changed.
    changes
        ``name=value`` of the settings that changed.

    Raises
    ------
    ConfigError
        A setting of ``data.clip`` was chosen, and a tower needs another value.
    TowerError
        A tower cannot be opened.
    """
    names = {modality: absolute_tower(getattr(config.encoder, modality)) for modality in MODALITIES}
    encoder = dataclasses.replace(config.encoder, video=names["video"], audio=names["audio"])
    clip, defaults = config.data.clip, ClipSpec()
    changes: dict[str, Any] = {}
    for modality in MODALITIES:
        name = getattr(config.encoder, modality)
        if not is_tower(name):
            continue
        takes = open_tower(name, modality, with_weights=False).takes
        for setting in _OF_MODALITY[modality]:
            needed, chosen = getattr(takes, setting), getattr(clip, setting)
            if needed is None or needed == chosen:
                continue
            if chosen != getattr(defaults, setting):
                raise ConfigError(
                    f"data.clip.{setting} must be {needed:g} for encoder.{modality}={name}, got {chosen:g}; leave it "
                    "out to have it set"
                )
            changes[setting] = needed
    fitted = dataclasses.replace(config.data, clip=dataclasses.replace(clip, **changes))
    told = [f"data.clip.{name}={value:g}" for name, value in changes.items()]
    return dataclasses.replace(config, data=fitted, encoder=encoder), told


@torch.inference_mode()
def check_towers(config: PretrainConfig) -> None:
    """Open the towers of a run with their weights, and encode one silent, black clip, before anything is written.

    With ``data.augment.window``, also one as short as the training views.

    Raises
    ------
    TowerError
        A tower cannot be opened, cannot be trained as the config says, or does not take such clips.
    """
    if not any(is_tower(getattr(config.encoder, modality)) for modality in MODALITIES):
        return
    pair, clip = untrained_encoder(config).eval(), config.data.clip
    to_audio = audio_input(config.encoder, clip.sample_rate_hz)
    for window in sorted({config.data.augment.window, 1.0}):
        frames, samples = (window_length(size, window) for size in (clip.frame_count, clip.sample_count))
        pair.video(torch.zeros(1, 3, frames, clip.frame_height, clip.frame_width))
        pair.audio(to_audio(torch.zeros(1, samples)))
