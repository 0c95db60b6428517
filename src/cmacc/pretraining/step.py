"""One training step of cross-modal active contrastive coding: the algorithm on one page, in `training_step`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from cmacc.clips import seeds
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import Encoding, Modality, saved_statistics, update_momentum
from cmacc.negatives import Keys
from cmacc.objectives import Encoded, ObjectiveInputs
from cmacc.pretraining.batch_views import draw_for
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.encoding import encode_keys, encode_queries, gather_encodings
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.problem import Batch
from cmacc.pretraining.refresh import keep_inputs, refresh_keys

# Each dictionary has its own generator, seeded by (seed, step, number).
_SELECTION_NUMBER: dict[Modality, int] = {"audio": 0, "video": 1}
_OTHER: dict[Modality, Modality] = {"audio": "video", "video": "audio"}


class DivergenceError(ValueError):
    """Embeddings or a loss are no longer finite; the message names the step and the remedy."""

    def __init__(self, what: str, step: int, batch: Batch | None = None) -> None:
        self.step = step
        self.batch = batch  # this process's part of the last batch
        super().__init__(f"step {step}: {what}; start again with a lower optim.learning_rate or precision=fp32")


@dataclass(frozen=True)
class StepResult:
    """Results of a step, still on the device; the same on all processes.

    Attributes
    ----------
    metrics
        Metrics of the objective and ``gradient_norm``, as scalars; NaN if there was nothing to measure.
    embeddings
        ``(M, d)``: query embeddings of the whole batch by modality.
    sample_ids
        ``(M,)``: its sample ids.
    refreshed
        Number of re-encoded keys.
    not_finite
        What was not finite (NaN or infinity), if anything. Then the step changed neither weights nor pools, though it
        may have chosen keys for the dictionaries, and there are no metrics.
    """

    metrics: dict[str, Tensor]
    embeddings: dict[Modality, Tensor]
    sample_ids: Tensor
    refreshed: int = 0
    not_finite: str | None = None

    def row(self) -> dict[str, float]:
        """The metrics to log: those that are not NaN. Synchronises with the device once."""
        if not self.metrics:
            return {}
        wide = any(value.dtype == torch.float64 for value in self.metrics.values())
        dtype = torch.float64 if wide else torch.float32
        values = torch.stack([value.to(dtype) for value in self.metrics.values()]).tolist()
        return {name: value for name, value in zip(self.metrics, values, strict=True) if value == value}


def training_step(learner: Learner, batch: Batch, step: int, visit: int, clock: PhaseClock) -> StepResult:
    """Encode a batch, update both dictionaries, compute the loss, update the weights, push the keys into the pools.

    Parameters
    ----------
    learner
        What the step changes.
    batch
        This process's part of the batch.
    step
        Number of the step.
    visit
        The number of earlier visits of the batch's samples. It seeds their augmentation.
    clock
        Measures the phases.
    """
    processes = learner.processes
    with clock.phase("transform"):
        views = learner.views.of(batch, visit)
        drawn = draw_for(learner, batch, visit, views)
        inputs = {modality: rows for modality, rows in views.items() if modality in learner.trained_modalities}

    restore_statistics = saved_statistics(learner.encoder)
    with clock.phase("encode"):
        encoded = encode_queries(learner, inputs, drawn.inputs, step)
    with clock.phase("gather"):
        sample_ids = processes.gather(batch.sample_ids)
        queries = gather_encodings(processes, encoded.queries)
        more = gather_encodings(processes, encoded.more)
        given = {name: processes.gather(tensor) for name, tensor in drawn.given.items()}
    embeddings = {modality: encoding.embedding.detach() for modality, encoding in queries.items()}

    # Selection only needs the queries. On a GPU it runs on its own stream, in parallel with the key encoders.
    selecting = _behind_the_rest(learner)
    with clock.phase("keys"):
        own_keys = encode_keys(learner, inputs) if learner.needs_keys else {}

    with torch.cuda.stream(selecting), clock.phase("select"):
        is_sound = not _is_selection_due(learner, step) or _all_finite(queries)
        chosen = select_negatives(learner, encoded.queries, batch.sample_ids, step) if is_sound else {}
    if selecting is not None:
        torch.cuda.current_stream(learner.device).wait_stream(selecting)
    if not is_sound:
        keep_inputs(learner, batch, visit)
        restore_statistics()
        return StepResult({}, embeddings, sample_ids, not_finite="an embedding")

    with clock.phase("refresh"):
        refreshed = refresh_keys(learner, chosen, step)
        handles = keep_inputs(learner, batch, visit)  # after that, because it takes the place of the oldest inputs

    with clock.phase("loss"):
        keys = gather_encodings(processes, own_keys)
        outcome = learner.objective(
            ObjectiveInputs(
                _by_name(queries),
                _by_name(keys),
                learner.negatives(step),
                sample_ids,
                more=_by_name(more),
                given=given,
                project=learner.project,
                rng=seeded_rng(seeds.OBJECTIVE, learner.config.seed, step),
            )
        )
        learner.optimizer.zero_grad(set_to_none=True)
        encoded.backward(learner.scaler.scale(outcome.loss))
        learner.scaler.unscale_(learner.optimizer)
        gradient_norm = get_total_norm(learner.gradients())
        sound = {"the loss": outcome.loss.isfinite(), "a gradient": gradient_norm.isfinite()}
        if keys:
            sound["a key"] = torch.stack([of_batch.embedding.isfinite().all() for of_batch in keys.values()]).all()
        # On all processes alike, or their weights would differ from now on.
        finite = processes.all(torch.stack(list(sound.values())))

    with clock.phase("update"):
        if not all(finite):
            learner.scaler.update()  # with fp16, the loss was scaled too much
            restore_statistics()
            return StepResult({}, embeddings, sample_ids, refreshed, list(sound)[finite.index(False)])
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        processes.average(learner.statistics_of_parts())
        warming = min(learner.config.objective.momentum, (1 + step) / (10 + step))
        update_momentum(learner.encoder, learner.key_encoder, warming)
        if learner.memory is not None:
            learner.memory.store(sample_ids, queries)
        for modality, dictionary in learner.dictionaries.items():
            of_batch = own_keys[modality]
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
    return StepResult(outcome.metrics | {"gradient_norm": gradient_norm}, embeddings, sample_ids, refreshed)


def select_negatives(
    learner: Learner, queries: dict[Modality, Encoding], sample_ids: Tensor, step: int
) -> dict[Modality, int]:
    """Update the dictionaries if that is due at this step. The choice only depends on the arguments and the seed.

    Returns
    -------
    dict
        Number of chosen keys by modality: the newest keys of its dictionary. Empty if no selection is due.
    """
    config = learner.config
    if not _is_selection_due(learner, step):
        return {}
    chosen: dict[Modality, int] = {}
    for modality, dictionary in learner.dictionaries.items():
        crosswise = config.dictionary.pseudo_labels == "cross_modal"
        number = int(seeded_rng(seeds.SELECTION, config.seed, step, _SELECTION_NUMBER[modality]).integers(2**63))
        chosen[modality] = dictionary.select(
            queries[_OTHER[modality] if crosswise else modality].embedding,
            config.optim.batch_size * config.dictionary.select_every,
            torch.Generator().manual_seed(number),
            query_ids=sample_ids,
            group=learner.processes.group,
        )
    return chosen


def _is_selection_due(learner: Learner, step: int) -> bool:
    return bool(learner.dictionaries) and step % learner.config.dictionary.select_every == 0


def _all_finite(encodings: dict[Modality, Encoding]) -> bool:
    return bool(torch.stack([encoding.embedding.isfinite().all() for encoding in encodings.values()]).all())


def _by_name(encodings: Mapping[Any, Encoding]) -> dict[str, Encoded]:
    return {str(name): encoding for name, encoding in encodings.items()}


def _behind_the_rest(learner: Learner) -> torch.cuda.Stream | None:
    """The stream for selection, which waits for all work queued so far; None without streams."""
    if learner.selection_stream is not None:
        learner.selection_stream.wait_stream(torch.cuda.current_stream(learner.device))
    return learner.selection_stream
