"""The training engine: runs the steps of a problem. ``cmacc pretrain`` and ``cmacc ablate`` both use it.

    trainer = Trainer(problem, config, device)
    for done in trainer.steps():
        print(done.step, done.metrics["loss"])

There are no callbacks. Logging, checkpoints, measurements and stopping are done by the caller in the body of the loop;
their time is not counted.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cmacc.objectives import Objective
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.learner import Learner, autocast_dtype
from cmacc.pretraining.optimization import learning_rate
from cmacc.pretraining.problem import Batch, Problem
from cmacc.pretraining.step import DivergenceError, training_step


@dataclass(frozen=True)
class TrainedStep:
    """A finished training step.

    Attributes
    ----------
    step
        Its number, from 0.
    batch
        The batch, on the trainer's device.
    metrics
        Metrics of the objective (``loss``, ``video_to_audio/loss``...), ``learning_rate``, ``seconds/<phase>``,
        ``seconds/step`` and ``clips_per_second``; with re-encoding also ``refreshed_keys`` and ``refresh_bytes``.
    seconds
        Time from requesting the batch until the device finished the step.
    """

    step: int
    batch: Batch
    metrics: dict[str, float]
    seconds: float


class Trainer:
    """Trains encoders on a problem.

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
            The loss or the embeddings are no longer finite. The learner cannot be used any more.
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
            batch = batch.to(device)
            result = training_step(learner, batch, step, self.problem.visit(step), clock)
            if not math.isfinite(loss := float(result.loss)):
                raise DivergenceError(f"the loss is {loss}", step)
            metrics = result.row() | {"learning_rate": rate}
            if learner.input_buffer is not None:
                metrics |= {"refreshed_keys": result.refreshed, "refresh_bytes": learner.input_buffer.byte_count}
            # Synchronises with a GPU. Otherwise `seconds` would only measure how long it takes to queue the work.
            phases = clock.seconds()
            seconds = time.perf_counter() - started
            metrics |= {f"seconds/{name}": value for name, value in phases.items()}
            metrics |= {"seconds/step": seconds, "clips_per_second": len(batch.sample_ids) / seconds}
            self.next_step += 1
            yield TrainedStep(step, batch, metrics, seconds)
            started = time.perf_counter()
