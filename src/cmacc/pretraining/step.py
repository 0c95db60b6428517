"""One training step of cross-modal active contrastive coding: the algorithm on one page (`training_step`)."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.clips import ClipBatch, LogMel, augment_video, augment_waveforms, draw_view, mask_spectrograms, seeds
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import AudioVisualEncoder, Encoding, momentum_copy, update_momentum
from cmacc.negatives import ActiveDictionary, Keys
from cmacc.objectives import CrossModalContrast, DirectionLoss
from cmacc.pretraining.config import PretrainConfig


@dataclass
class Learner:
    """Everything that a step changes, and the settings by which it does; no dictionaries for ``selector: none``."""

    config: PretrainConfig
    encoder: nn.Module  # an AudioVisualEncoder, or a wrapper with the same forward
    twin: nn.Module
    video_dictionary: ActiveDictionary | None
    audio_dictionary: ActiveDictionary | None
    objective: CrossModalContrast
    log_mel: LogMel
    optimizer: torch.optim.Optimizer
    autocast_dtype: torch.dtype | None

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
            objective=CrossModalContrast(config.objective.temperature, config.objective.in_batch),
            log_mel=LogMel(config.data.clip.sample_rate_hz, config.encoder.mel_bins).to(device),
            optimizer=torch.optim.AdamW(_decayed(encoder, config.optim.weight_decay), lr=config.optim.learning_rate),
            autocast_dtype=autocast_dtype,
        )


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, still on the device."""

    video_to_audio: DirectionLoss
    audio_to_video: DirectionLoss


class PhaseClock:
    """Seconds per named phase. On an accelerator it waits for the device at each border: the price of true figures."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def training_step(learner: Learner, batch: ClipBatch, step: int, epoch: int, clock: PhaseClock) -> StepResult:
    """Encode a batch, renew both dictionaries, contrast, update, and let the pools take the batch's keys in."""
    config = learner.config
    with clock.phase("transform"):
        video, spectrograms = training_views(learner, batch, epoch)

    with clock.phase("encode"), learner_autocast(learner, batch.frames.device):
        video_queries, audio_queries = learner.encoder(video, spectrograms)
        with torch.no_grad():
            twins: tuple[Encoding, Encoding] | None = (
                learner.twin(video, spectrograms) if _needs_twins(config) else None
            )

    with clock.phase("select"):
        crosswise = config.dictionary.pseudo_labels == "cross_modal"
        for dictionary, own, other, stream in (
            (learner.audio_dictionary, audio_queries, video_queries, 0),
            (learner.video_dictionary, video_queries, audio_queries, 1),
        ):
            if dictionary is not None:
                seed = int(seeded_rng(seeds.SELECTION, config.seed, step, stream).integers(2**63))
                generator = torch.Generator().manual_seed(seed)
                dictionary.select((other if crosswise else own).embedding, config.optim.batch_size, generator)

    with clock.phase("loss"):
        video_keys, audio_keys = video_queries, audio_queries
        if config.objective.batch_keys == "momentum":
            assert twins is not None
            video_keys, audio_keys = twins
        warm = step >= config.dictionary.warmup_steps
        video_to_audio = _contrast(
            learner, batch, video_queries, audio_keys, learner.audio_dictionary if warm else None
        )
        audio_to_video = _contrast(
            learner, batch, audio_queries, video_keys, learner.video_dictionary if warm else None
        )
        learner.optimizer.zero_grad(set_to_none=True)
        (video_to_audio.loss + audio_to_video.loss).backward()

    with clock.phase("update"):
        learner.optimizer.step()
        warming = min(config.objective.momentum, (1 + step) / (10 + step))
        update_momentum(learner.encoder, learner.twin, warming)
        for dictionary, keys in zip((learner.video_dictionary, learner.audio_dictionary), twins or (), strict=False):
            if dictionary is not None:
                dictionary.push(
                    Keys.from_embedding(
                        keys.embedding, batch.sample_ids, step, length=keys.length, penultimate=keys.penultimate
                    )
                )
    return StepResult(_detached(video_to_audio), _detached(audio_to_video))


def training_views(
    learner: Learner, batch: ClipBatch, epoch: int
) -> tuple[Float[Tensor, "batch 3 time height width"], Float[Tensor, "batch mels frames"]]:
    """Augmented video and log-mel of a batch; what is drawn depends on (seed, epoch, sample id) alone."""
    config = learner.config
    views = [
        draw_view(config.data.augment, seeded_rng(seeds.AUGMENTATION, config.seed, epoch, sample_id))
        for sample_id in batch.sample_ids.tolist()
    ]
    # The control: a cyclic shift gives every picture the sound of another file of the batch.
    waveforms = batch.waveforms.roll(1, dims=0) if config.data.shuffle_pairs else batch.waveforms
    spectrograms = learner.log_mel(augment_waveforms(waveforms, views))
    return augment_video(batch.frames, views), mask_spectrograms(spectrograms, views)


def untrained_encoder(config: PretrainConfig) -> AudioVisualEncoder:
    """The run's encoders as they were before the first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = AudioVisualEncoder(config.encoder)
        encoder.video.to(memory_format=torch.channels_last_3d)
        return encoder


def learner_autocast(learner: Learner, device: torch.device) -> torch.autocast:
    """Autocast to the learner's lower precision, or none."""
    return torch.autocast(device.type, learner.autocast_dtype, enabled=learner.autocast_dtype is not None)


def _needs_twins(config: PretrainConfig) -> bool:
    return config.dictionary.selector != "none" or config.objective.batch_keys == "momentum"


def _contrast(
    learner: Learner, batch: ClipBatch, queries: Encoding, keys: Encoding, dictionary: ActiveDictionary | None
) -> DirectionLoss:
    negatives = dictionary.negatives() if dictionary is not None else None
    result: DirectionLoss = learner.objective(
        queries.embedding,
        keys.embedding,
        batch.sample_ids,
        batch.sample_ids,
        negatives=negatives.embedding if negatives is not None else None,
        negative_ids=negatives.sample_ids if negatives is not None else None,
    )
    return result


def _detached(result: DirectionLoss) -> DirectionLoss:
    return dataclasses.replace(result, loss=result.loss.detach())


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
    ).to(device)


def _decayed(encoder: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    parameters = list(encoder.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
