"""One training step of cross-modal active contrastive coding: the algorithm on one page, in `training_step`."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cmacc.clips import seeds
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import Encoding, Modality, update_momentum
from cmacc.negatives import Keys
from cmacc.objectives import ObjectiveInputs
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.problem import Batch
from cmacc.pretraining.randomness import seeded_generators
from cmacc.pretraining.refresh import refresh_keys

# Each dictionary has its own generator, seeded by (seed, step, number).
_SELECTION_NUMBER: dict[Modality, int] = {"audio": 0, "video": 1}
_OTHER: dict[Modality, Modality] = {"audio": "video", "video": "audio"}


class DivergenceError(ValueError):
    """Embeddings or a loss are no longer finite; the message names the step and the remedy."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"step {step}: {what}; start again with a lower optim.learning_rate or precision=fp32")


@dataclass(frozen=True)
class StepResult:
    """Results of a step, still on the device.

    Attributes
    ----------
    loss
        The minimised loss.
    metrics
        Metrics of the objective, as scalars; NaN if there was nothing to measure.
    refreshed
        Number of re-encoded keys.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    refreshed: int

    def row(self) -> dict[str, float]:
        """The metrics to log: those that are not NaN. Synchronises with the device once."""
        values = torch.stack([value.float() for value in self.metrics.values()]).tolist()
        return {name: value for name, value in zip(self.metrics, values, strict=True) if value == value}


def training_step(learner: Learner, batch: Batch, step: int, visit: int, clock: PhaseClock) -> StepResult:
    """Encode a batch, update both dictionaries, compute the loss, update the weights, push the keys into the pools.

    ``visit`` is the number of earlier visits of the batch's samples. It seeds their augmentation.

    Raises
    ------
    DivergenceError
        The query embeddings are not finite.
    """
    with clock.phase("transform"):
        inputs = learner.views.of(batch, visit)

    with clock.phase("encode"), learner.autocast(), _seeded_dropout(learner, step):
        queries = learner.encoder(**inputs, with_feature_maps=learner.objective.needs_feature_maps)

    # Selection only needs the queries. On a GPU it runs on its own stream, in parallel with the key encoders.
    selecting = _behind_the_rest(learner)
    with clock.phase("keys"), learner.autocast(), torch.no_grad():
        keys = learner.key_encoder(**inputs) if learner.needs_keys else {}

    with torch.cuda.stream(selecting), clock.phase("select"):
        chosen = select_negatives(learner, queries, batch.sample_ids, step)
    if selecting is not None:
        torch.cuda.current_stream(learner.device).wait_stream(selecting)

    with clock.phase("refresh"):
        refreshed = refresh_keys(learner, chosen, step)

    with clock.phase("loss"):
        outcome = learner.objective(ObjectiveInputs(queries, keys, learner.negatives(step), batch.sample_ids))
        learner.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()

    with clock.phase("update"):
        learner.optimizer.step()
        warming = min(learner.config.objective.momentum, (1 + step) / (10 + step))
        update_momentum(learner.encoder, learner.key_encoder, warming)
        buffer = learner.input_buffer
        handles = buffer.push(learner.views.kept(batch, visit)) if buffer is not None else None
        if learner.memory is not None:
            learner.memory.store(batch.sample_ids, queries)
        for modality, dictionary in learner.dictionaries.items():
            of_batch = keys[modality]
            dictionary.push(
                Keys.from_embedding(
                    of_batch.embedding,
                    batch.sample_ids,
                    step,
                    length=of_batch.length,
                    penultimate=of_batch.penultimate,
                    handles=handles,
                )
            )
    return StepResult(outcome.loss.detach(), outcome.metrics, refreshed)


def select_negatives(
    learner: Learner, queries: dict[Modality, Encoding], sample_ids: Tensor, step: int
) -> dict[Modality, int]:
    """Update the dictionaries if that is due at this step. The choice only depends on the arguments and the seed.

    Returns
    -------
    dict
        Number of chosen keys by modality: the newest keys of its dictionary. Empty if no selection is due.

    Raises
    ------
    DivergenceError
        A query is not finite, so that a selection would be meaningless.
    """
    config = learner.config
    if not learner.dictionaries or step % config.dictionary.select_every:
        return {}
    if not torch.stack([encoding.embedding.isfinite().all() for encoding in queries.values()]).all():
        raise DivergenceError("the embeddings are not finite (NaN or infinity)", step)
    chosen: dict[Modality, int] = {}
    for modality, dictionary in learner.dictionaries.items():
        crosswise = config.dictionary.pseudo_labels == "cross_modal"
        number = int(seeded_rng(seeds.SELECTION, config.seed, step, _SELECTION_NUMBER[modality]).integers(2**63))
        chosen[modality] = dictionary.select(
            queries[_OTHER[modality] if crosswise else modality].embedding,
            config.optim.batch_size * config.dictionary.select_every,
            torch.Generator().manual_seed(number),
            query_ids=sample_ids,
        )
    return chosen


def _seeded_dropout(learner: Learner, step: int) -> AbstractContextManager[None]:
    """Within it, a tower's dropout draws by (seed, step).

    cmacc's own encoders have no dropout, and copying a GPU's generator waits for the GPU.
    """
    if not learner.config.trains_tower:
        return nullcontext()
    return seeded_generators(learner.device, seeds.DROPOUT, learner.config.seed, step)


def _behind_the_rest(learner: Learner) -> torch.cuda.Stream | None:
    """The stream for selection, which waits for all work queued so far; None without streams."""
    if learner.selection_stream is not None:
        learner.selection_stream.wait_stream(torch.cuda.current_stream(learner.device))
    return learner.selection_stream
