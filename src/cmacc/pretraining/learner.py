"""What a step works on: encoders, their momentum copies, dictionaries, the optimizer."""

from dataclasses import dataclass

import torch
from torch import nn

from cmacc.encoders import AudioVisualEncoder, EncoderPair, momentum_copy
from cmacc.negatives import ActiveDictionary, InputBuffer
from cmacc.objectives import CrossModalContrast
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.views import ClipViews, Views


@dataclass
class Learner:
    """Everything that a step changes, and the settings by which it does.

    No dictionaries for ``selector: none``, no inputs without ``refresh``.
    """

    config: PretrainConfig
    encoder: nn.Module  # an EncoderPair, or a wrapper with the same forward
    twin: EncoderPair
    views: Views
    video_dictionary: ActiveDictionary | None
    audio_dictionary: ActiveDictionary | None
    inputs: InputBuffer | None
    objective: CrossModalContrast
    optimizer: torch.optim.Optimizer
    autocast_dtype: torch.dtype | None
    device: torch.device
    selection_stream: torch.cuda.Stream | None

    @classmethod
    def build(cls, config: PretrainConfig, device: torch.device, autocast_dtype: torch.dtype | None) -> "Learner":
        """A learner at step 0; its weights depend on ``config.seed`` alone, the global generator is left as it was."""
        return cls.around(untrained_encoder(config), ClipViews(config, device), config, device, autocast_dtype)

    @classmethod
    def around(
        cls,
        encoder: EncoderPair,
        views: Views,
        config: PretrainConfig,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> "Learner":
        """A learner at step 0 of encoders and inputs of any kind, not only of clips."""
        encoder = encoder.to(device)
        return cls(
            config=config,
            encoder=encoder,
            twin=momentum_copy(encoder),
            views=views,
            video_dictionary=_dictionary(config, encoder.video.penultimate_size, device),
            audio_dictionary=_dictionary(config, encoder.audio.penultimate_size, device),
            inputs=input_buffer(config, device),
            objective=CrossModalContrast(config.objective.temperature, config.objective.in_batch),
            # Not the fused one: a resumed run went another way than an uninterrupted one (its state comes back in plain
            # order, while kernels lie channels-last).
            optimizer=torch.optim.AdamW(_decayed(encoder, config.optim.weight_decay), lr=config.optim.learning_rate),
            autocast_dtype=autocast_dtype,
            device=device,
            selection_stream=torch.cuda.Stream(device) if device.type == "cuda" else None,
        )

    def autocast(self) -> torch.autocast:
        """Autocast to the learner's lower precision, or none."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    @property
    def needs_twins(self) -> bool:
        """Whether the batch's keys come from the momentum copies."""
        return self.video_dictionary is not None or self.config.objective.batch_keys != "online"


def input_buffer(config: PretrainConfig, device: torch.device, first_handle: int = 0) -> InputBuffer | None:
    """A ring deep enough for every key that may be encoded anew; None if none is.

    A key is chosen while it is among the last N pushed, and stays while about K others are chosen, one for each pushed.
    """
    if config.dictionary.selector == "none" or config.dictionary.refresh == "none":
        return None
    stays = config.dictionary.size if config.dictionary.refresh == "dictionary" else 0
    store = device if config.dictionary.refresh_device == "accelerator" else torch.device("cpu")
    return InputBuffer(config.dictionary.pool_size + stays, store, first_handle)


def untrained_encoder(config: PretrainConfig) -> AudioVisualEncoder:
    """The run's encoders as they were before the first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = AudioVisualEncoder(config.encoder)
        encoder.video.to(memory_format=torch.channels_last_3d)
        return encoder


def _dictionary(config: PretrainConfig, penultimate_size: int, device: torch.device) -> ActiveDictionary | None:
    if config.dictionary.selector == "none":
        return None
    return ActiveDictionary(
        config.encoder.embedding_size,
        config.dictionary.size,
        config.dictionary.pool_size,
        penultimate_size=penultimate_size,
        temperature=config.objective.temperature,
        selector=config.dictionary.selector,
        gradient=config.dictionary.gradient,
        initial_centers=config.dictionary.initial_centers,
        allow_repeats=config.dictionary.allow_repeats,
    ).to(device)


def _decayed(encoder: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    parameters = list(encoder.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
