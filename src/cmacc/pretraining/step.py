"""One training step of cross-modal active contrastive coding: the algorithm on one page (`training_step`)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from cmacc.clips import seeds
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import Encoding, update_momentum
from cmacc.negatives import ActiveDictionary, Keys
from cmacc.objectives import DirectionLoss
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.refresh import refresh_newest


@runtime_checkable
class Batch(Protocol):
    """M samples, of a kind that the learner's `Views` know: clips, or pairs of anything."""

    @property
    def sample_ids(self) -> Tensor:
        """``(M,)`` int64."""
        ...


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, still on the device.

    Attributes
    ----------
    loss
        What was minimised: both directions added, for ``batch_keys: both`` the mean of its two losses in each.
    video_to_audio, audio_to_video
        Each direction against the dictionary (and the batch's keys, where they are negatives); for ``both``
        ``batch_loss`` is that of the online keys.
    refreshed
        Keys that were encoded anew.
    """

    loss: Float[Tensor, ""]
    video_to_audio: DirectionLoss
    audio_to_video: DirectionLoss
    refreshed: int

    def metrics(self) -> dict[str, float]:
        """The figures that are logged at every step; waits for the device.

        ``mi_*`` is the InfoNCE estimate of the mutual information, and ``mi_ceiling`` what it cannot exceed
        (`DirectionLoss.ceiling`), in nats; ``batch_loss_*`` is there where the batch's keys are negatives.
        """
        row = {"loss": float(self.loss)}
        for name, direction in (("v2a", self.video_to_audio), ("a2v", self.audio_to_video)):
            loss, top1, ceiling, batch_loss = torch.stack(
                [direction.loss, direction.top1, direction.ceiling, direction.batch_loss]
            ).tolist()
            row |= {f"loss_{name}": loss, f"top1_{name}": top1, f"mi_{name}": ceiling - loss}
            row |= {} if math.isnan(batch_loss) else {f"batch_loss_{name}": batch_loss}
        ceilings = self.video_to_audio.ceiling + self.audio_to_video.ceiling
        return row | {"mi_ceiling": float(ceilings) / 2}


def training_step(learner: Learner, batch: Batch, step: int, visit: int, clock: PhaseClock) -> StepResult:
    """Encode a batch, renew both dictionaries, contrast, update, and let the pools take the batch's keys in.

    ``visit``, how often the batch's samples were due before, seeds their augmentation.
    """
    config = learner.config
    with clock.phase("transform"):
        video, audio = learner.views.of(batch, visit)

    with clock.phase("encode"), learner.autocast():
        video_queries, audio_queries = learner.encoder(video, audio)

    # Selection needs the queries alone, and on a GPU runs beside the momentum encoders, on a stream of its own.
    selecting = _behind_the_rest(learner)
    with clock.phase("keys"), learner.autocast(), torch.no_grad():
        twins: tuple[Encoding, Encoding] | None = learner.twin(video, audio) if learner.needs_twins else None

    with torch.cuda.stream(selecting), clock.phase("select"):
        chosen = select_negatives(learner, video_queries, audio_queries, batch.sample_ids, step)
    if selecting is not None:
        torch.cuda.current_stream(learner.device).wait_stream(selecting)

    refreshed = 0
    if config.dictionary.refresh == "selected":
        with clock.phase("refresh"):
            refreshed = sum(refresh_newest(learner, dictionary, count, step) for dictionary, count in chosen)
    elif config.dictionary.refresh == "dictionary" and step % config.dictionary.refresh_every == 0:
        with clock.phase("refresh"):
            for dictionary in (learner.audio_dictionary, learner.video_dictionary):
                if dictionary is not None:
                    refreshed += refresh_newest(learner, dictionary, len(dictionary.dictionary), step)

    with clock.phase("loss"):
        warm = step >= config.dictionary.warmup_steps
        directions = [
            _contrast(learner, batch, queries, online, twin, dictionary if warm else None)
            for queries, online, twin, dictionary in (
                (video_queries, audio_queries, twins[1] if twins else None, learner.audio_dictionary),
                (audio_queries, video_queries, twins[0] if twins else None, learner.video_dictionary),
            )
        ]
        loss = sum(torch.stack([term.loss for term in terms]).mean() for terms in directions)
        assert isinstance(loss, Tensor)
        learner.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    handles: torch.Tensor | None = None
    if learner.inputs is not None:
        with clock.phase("refresh"):
            handles = learner.inputs.push(learner.views.kept(batch, visit))

    with clock.phase("update"):
        learner.optimizer.step()
        warming = min(config.objective.momentum, (1 + step) / (10 + step))
        update_momentum(learner.encoder, learner.twin, warming)
        for dictionary, keys in zip((learner.video_dictionary, learner.audio_dictionary), twins or (), strict=False):
            if dictionary is not None:
                dictionary.push(
                    Keys.from_embedding(
                        keys.embedding,
                        batch.sample_ids,
                        step,
                        length=keys.length,
                        penultimate=keys.penultimate,
                        handles=handles,
                    )
                )
    return StepResult(loss.detach(), _reported(directions[0]), _reported(directions[1]), refreshed)


def select_negatives(
    learner: Learner, video_queries: Encoding, audio_queries: Encoding, sample_ids: Tensor, step: int
) -> list[tuple[ActiveDictionary, int]]:
    """Renew the dictionaries that are due at this step; the choice depends on the arguments and the seed alone.

    Returns
    -------
    list
        Each dictionary that was renewed, with the number of keys that it took in: its newest.
    """
    config = learner.config
    chosen: list[tuple[ActiveDictionary, int]] = []
    crosswise = config.dictionary.pseudo_labels == "cross_modal"
    for number, (dictionary, own, other) in enumerate(
        (
            (learner.audio_dictionary, audio_queries, video_queries),
            (learner.video_dictionary, video_queries, audio_queries),
        )
    ):
        if dictionary is not None and step % config.dictionary.select_every == 0:
            seed = int(seeded_rng(seeds.SELECTION, config.seed, step, number).integers(2**63))
            count = dictionary.select(
                (other if crosswise else own).embedding,
                config.optim.batch_size * config.dictionary.select_every,
                torch.Generator().manual_seed(seed),
                query_ids=sample_ids,
            )
            chosen.append((dictionary, count))
    return chosen


def _behind_the_rest(learner: Learner) -> torch.cuda.Stream | None:
    """The stream for selection, which begins when all that was asked for so far is done; None without streams."""
    if learner.selection_stream is not None:
        learner.selection_stream.wait_stream(torch.cuda.current_stream(learner.device))
    return learner.selection_stream


def _contrast(
    learner: Learner,
    batch: Batch,
    queries: Encoding,
    online: Encoding,
    twin: Encoding | None,
    dictionary: ActiveDictionary | None,
) -> list[DirectionLoss]:
    """The losses of one direction, of which the mean is minimised; the first is the one with the dictionary."""

    def among(keys: Encoding, dictionary: ActiveDictionary | None) -> DirectionLoss:
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

    batch_keys = learner.config.objective.batch_keys
    if batch_keys == "online":
        return [among(online, dictionary)]
    assert twin is not None
    by_twin = among(twin, dictionary)
    # Never the dictionary beside online keys: its negatives would be of another kind than the positive.
    return [by_twin] if batch_keys == "momentum" else [by_twin, among(online, None)]


def _reported(terms: list[DirectionLoss]) -> DirectionLoss:
    return dataclasses.replace(terms[0], loss=terms[0].loss.detach(), batch_loss=terms[-1].batch_loss.detach())
