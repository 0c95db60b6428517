"""The ENCODER argument: a run folder, or ``random``, made into encoders that are ready to be used."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cmacc.encoders import AudioVisualEncoder
from cmacc.pretraining import PretrainConfig, last_checkpoint, load_encoder, read_config, untrained_encoder


@dataclass(frozen=True)
class EncoderSource:
    """Encoders of one configuration: as they are after ``step`` steps, and beside them the same untrained.

    Attributes
    ----------
    name
        What the user asked for.
    config
        Of the run; the defaults for ``random``.
    trained, untrained
        In evaluation mode, in float32; the same weights for ``random``.
    step
        Training steps that ``trained`` has had.
    """

    name: str
    config: PretrainConfig
    trained: AudioVisualEncoder
    untrained: AudioVisualEncoder
    step: int


def open_encoder(name: str, device: torch.device | None = None) -> EncoderSource:
    """Encoders of a run folder's last checkpoint, or untrained ones for ``random``.

    Raises
    ------
    ConfigError, CheckpointError
        The folder holds no run, or no checkpoint that fits its config.
    """
    device = device or torch.device("cpu")
    if name == "random":
        config = PretrainConfig()
        untrained = untrained_encoder(config).to(device).eval()
        return EncoderSource(name, config, untrained, untrained, 0)
    run_dir = Path(name)
    config = read_config(run_dir / "config.yaml")
    trained, untrained = untrained_encoder(config), untrained_encoder(config)
    step = load_encoder(trained, last_checkpoint(run_dir))
    return EncoderSource(name, config, trained.to(device).eval(), untrained.to(device).eval(), step)
