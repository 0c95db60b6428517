"""The size of clips that the towers of a run were made for."""

import dataclasses
from typing import Any

from cmacc.clips import ClipSpec
from cmacc.encoders import MODALITIES, Modality, is_tower, open_tower
from cmacc.pretraining.config import ConfigError, PretrainConfig

_OF_MODALITY: dict[Modality, tuple[str, ...]] = {
    "video": ("frame_count", "frame_rate_hz", "frame_height", "frame_width"),
    "audio": ("audio_seconds", "sample_rate_hz"),
}


def fitted_to_towers(config: PretrainConfig) -> tuple[PretrainConfig, list[str]]:
    """Set the size of clips to what the towers take, where it has its default.

    Returns
    -------
    config
        The config with ``data.clip`` changed.
    changes
        ``name=value`` of the settings that changed.

    Raises
    ------
    ConfigError
        A setting of ``data.clip`` was chosen, and a tower needs another value.
    TowerError
        A tower cannot be opened.
    """
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
    return dataclasses.replace(config, data=fitted), [f"data.clip.{name}={value:g}" for name, value in changes.items()]
