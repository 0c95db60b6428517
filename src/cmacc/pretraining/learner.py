"""What a step works on: encoders, their momentum copies, dictionaries, the optimizer; and how a batch becomes views."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.clips import (
    ClipBatch,
    LogMel,
    View,
    augment_waveforms,
    draw_view,
    mask_spectrograms,
    seeds,
)
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import AudioVisualEncoder, momentum_copy
from cmacc.negatives import ActiveDictionary, InputRing
from cmacc.objectives import CrossModalContrast
from cmacc.pretraining.config import PretrainConfig


@dataclass
class Learner:
    """Everything that a step changes, and the settings by which it does.

    No dictionaries for ``selector: none``, no inputs without ``refresh``.
    """

    config: PretrainConfig
    encoder: nn.Module  # an AudioVisualEncoder, or a wrapper with the same forward
    twin: AudioVisualEncoder
    video_dictionary: ActiveDictionary | None
    audio_dictionary: ActiveDictionary | None
    inputs: InputRing | None
    objective: CrossModalContrast
    log_mel: LogMel
    optimizer: torch.optim.Optimizer
    autocast_dtype: torch.dtype | None
    device: torch.device
    selection_stream: torch.cuda.Stream | None

    @classmethod
    def build(cls, config: PretrainConfig, device: torch.device, autocast_dtype: torch.dtype | None) -> "Learner":
        """A learner at step 0; its weights depend on ``config.seed`` alone, the global generator is left as it was."""
        encoder = untrained_encoder(config).to(device)
        return cls(
            config=config,
            encoder=encoder,
            twin=momentum_copy(encoder),
            video_dictionary=_dictionary(config, encoder.video.penultimate_size, device),
            audio_dictionary=_dictionary(config, encoder.audio.penultimate_size, device),
            inputs=input_ring(config, device),
            objective=CrossModalContrast(config.objective.temperature, config.objective.in_batch),
            log_mel=LogMel(config.data.clip.sample_rate_hz, config.encoder.mel_bins).to(device),
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
        return self.video_dictionary is not None or self.config.objective.batch_keys == "momentum"


def input_ring(config: PretrainConfig, device: torch.device, first_ticket: int = 0) -> InputRing | None:
    """A ring deep enough for every key that may be encoded anew; None if none is.

    A key is chosen while it is among the last N pushed, and stays while about K others are chosen, one for each pushed.
    """
    if config.dictionary.selector == "none" or config.dictionary.refresh == "none":
        return None
    stays = config.dictionary.size if config.dictionary.refresh == "dictionary" else 0
    store = device if config.dictionary.refresh_store == "device" else torch.device("cpu")
    return InputRing(config.dictionary.pool_size + stays, store, first_ticket)


def pairing(config: PretrainConfig, batch: ClipBatch) -> ClipBatch:
    """The batch as it is trained on: with its own sounds or, as a control, with those of other files of the batch."""
    if not config.data.shuffle_pairs:
        return batch
    # A cyclic shift gives every picture the sound of another file.
    return dataclasses.replace(batch, waveforms=batch.waveforms.roll(1, dims=0))


def drawn_views(config: PretrainConfig, sample_ids: Sequence[int], visits: Sequence[int]) -> list[View]:
    """How each sample of a batch is augmented: depends on (seed, visit, sample id) alone."""
    return [
        draw_view(config.data.augment, seeded_rng(seeds.AUGMENTATION, config.seed, visit, sample_id))
        for sample_id, visit in zip(sample_ids, visits, strict=True)
    ]


def audio_views(
    learner: Learner, waveforms: Float[Tensor, "batch samples"], views: list[View]
) -> Float[Tensor, "batch mels frames"]:
    """Augmented log-mel spectrograms."""
    return mask_spectrograms(learner.log_mel(augment_waveforms(waveforms, views)), views)


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
        given=config.dictionary.given == "dictionary",
        allow_repeats=config.dictionary.allow_repeats,
    ).to(device)


def _decayed(encoder: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    parameters = list(encoder.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
