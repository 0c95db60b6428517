"""The training engine: runs the steps of a problem. ``cmacc pretrain`` and ``cmacc ablate`` both use it.

    trainer = Trainer(problem, config, device)
    for done in trainer.steps():
        print(done.step, done.metrics["loss"])

There are no callbacks. Logging, checkpoints, measurements and stopping are done by the caller in the body of the loop;
their time is not counted.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cmacc.encoders import Modality
from cmacc.objectives import Objective
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.learner import Learner, autocast_dtype
from cmacc.pretraining.optimization import learning_rate
from cmacc.pretraining.problem import Batch, Problem
from cmacc.pretraining.step import DivergenceError, StepResult, training_step

log = logging.getLogger("cmacc")


@dataclass(frozen=True)
class TrainedStep:
    """A finished training step.

    Attributes
    ----------
    step
        Its number, from 0.
    batch
        This process's part of the batch, on the trainer's device.
    metrics
        Metrics of the objective (``loss``, ``video_to_audio/loss``...), ``gradient_norm``, ``learning_rate``,
        ``seconds/<phase>``, ``seconds/step`` and ``clips_per_second``; with re-encoding also ``refreshed_keys`` and
        ``refresh_bytes``. A step that was skipped has ``skipped``, and none of the objective's metrics.
    embeddings
        ``(M, d)``: query embeddings of the whole batch by modality.
    seconds
        Time from requesting the batch until the device finished the step.
    """

    step: int
    batch: Batch
    metrics: dict[str, float]
    embeddings: dict[Modality, Tensor]
    seconds: float


class Trainer:
    """Trains encoders on a problem, together with the other processes of torch.distributed, if it is initialised.

    Parameters
    ----------
    problem
        The samples, their order, and the encoders for them.
    config
        All settings.
    device
        Device to train on. Default: the CPU.
    objective
        Objective to use instead of the one in ``config.objective``.

    Attributes
    ----------
    learner
        Encoders, dictionaries and optimizer, in their state before ``next_step``.
    next_step
        The next step to run. The caller sets it after loading a checkpoint into ``learner``.
    """

    def __init__(
        self,
        problem: Problem,
        config: PretrainConfig,
        device: torch.device | None = None,
        *,
        objective: Objective | None = None,
    ) -> None:
        device = device or torch.device("cpu")
        self.problem, self.config = problem, config
        self.learner = Learner.build(
            problem.encoder(),
            problem.views,
            config,
            device,
            autocast_dtype(config.precision, device),
            objective,
            problem.memory,
        )
        self.next_step = 0

    def steps(self, last_step: int | None = None) -> Iterator[TrainedStep]:
        """Run the steps ``next_step <= step < last_step``. Default: until the end, ``config.optim.steps``.

        Raises
        ------
        DivergenceError
            A loss, gradient or embedding was not finite at more than ``max_skipped_steps`` steps in a row.
        ValueError
            The problem's batch is not this process's part of one.
        """
        learner, device = self.learner, self.learner.device
        last_step = self.config.optim.steps if last_step is None else last_step
        started = time.perf_counter()
        for batch in self.problem.batches(self.next_step, last_step):
            step = self.next_step
            clock = PhaseClock(device)
            clock.add("data", time.perf_counter() - started)
            rate = learning_rate(self.config.optim, step)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)  # checkpoints of 0.2.0 have no scale
            if len(batch.sample_ids) * learner.processes.count != self.config.optim.batch_size:
                raise ValueError(
                    f"Trainer: a batch of the problem must have optim.batch_size / processes "
                    f"({self.config.optim.batch_size} / {learner.processes.count}) samples, got {len(batch.sample_ids)}"
                )
            batch = batch.to(device)
            result = training_step(learner, batch, step, self.problem.visit(step), clock)
            if result.not_finite is not None:
                self._skipped(result, batch, step)
            else:
                learner.skipped_in_a_row = 0
            metrics = result.row() | {"learning_rate": rate}
            if learner.input_buffer is not None:
                held_bytes = learner.input_buffer.byte_count * learner.processes.count
                metrics |= {"refreshed_keys": result.refreshed, "refresh_bytes": held_bytes}
            # Synchronises with a GPU. Otherwise `seconds` would only measure how long it takes to queue the work.
            phases = clock.seconds()
            seconds = time.perf_counter() - started
            metrics |= {f"seconds/{name}": value for name, value in phases.items()}
            metrics |= {"seconds/step": seconds, "clips_per_second": self.config.optim.batch_size / seconds}
            metrics |= {"skipped": 1.0} if result.not_finite is not None else {}
            self.next_step += 1
            yield TrainedStep(step, batch, metrics, result.embeddings, seconds)
            started = time.perf_counter()

    def _skipped(self, result: StepResult, batch: Batch, step: int) -> None:
        """Note a step at which something was not finite.

        Raises
        ------
        DivergenceError
            There were too many in a row.
        """
        self.learner.skipped_in_a_row += 1
        count, most = self.learner.skipped_in_a_row, self.config.max_skipped_steps
        # Of the whole batch, so that all processes say the same.
        finite = torch.stack([rows.isfinite().all(1) for rows in result.embeddings.values()]).all(0)
        spoilt = result.sample_ids[~finite].tolist()
        where = f"in the embeddings of samples {', '.join(map(str, spoilt))}" if spoilt else "with finite embeddings"
        if count <= most:
            log.warning("skipped step %s: %s is not finite, %s", step, result.not_finite, where)
            return
        raise DivergenceError(
            f"{result.not_finite} is not finite (NaN or infinity), for {count} steps in a row (max_skipped_steps is "
            f"{most}), at the last one {where}",
            step,
            batch,
        )
