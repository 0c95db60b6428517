"""One run of an ablation: train, and measure at points along the way."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cmacc.ablation.problem import Problem
from cmacc.ablation.scores import scores_of
from cmacc.clips.loading.plan import epoch_order
from cmacc.pretraining import PretrainConfig, learning_rate
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.health import dictionary_health
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.step import training_step

_PLATEAU_STEPS = 20
_PLATEAU_SHARE = 0.9


@dataclass(frozen=True)
class Point:
    """What was measured after ``step`` steps and ``seconds`` of training (measuring not counted)."""

    step: int
    seconds: float
    metrics: dict[str, float]


def run_cell(
    problem: Problem,
    config: PretrainConfig,
    points: int,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> list[Point]:
    """Train from step 0 to ``config.optim.steps`` and measure at ``points`` evenly spaced steps, the last at the end.

    Every metric of a step is averaged over the steps since the point before and over both directions; the dictionaries'
    health is that of the point, averaged over both. ``plateau_steps`` is how many steps it took until the loss among
    the batch's keys alone, averaged over 20 steps, fell below 0.9 of what guessing gives (log M), and
    ``left_plateau`` whether it did; if it did not, ``plateau_steps`` is the run's steps.

    Returns
    -------
    list of Point
        The same for the same problem and config, but for the seconds.
    """
    learner = problem.learner(config)
    steps, size, count = config.optim.steps, config.optim.batch_size, len(problem.labels)
    if count < size:
        raise ValueError(f"run_cell: optim.batch_size must be at most the {count} training samples, got {size}")
    due = {round(steps * (i + 1) / points) for i in range(points)}
    found: list[Point] = []
    sums: dict[str, list[float]] = defaultdict(list)
    recent: deque[float] = deque(maxlen=_PLATEAU_STEPS)
    left_at: int | None = None
    seconds = 0.0
    labels, held_out_labels = problem.labels.numpy(), problem.held_out_labels.numpy()
    for step in range(steps):
        started = time.perf_counter()
        batch, result = _step(problem, learner, step)
        row = result.metrics()
        seconds += time.perf_counter() - started
        if not math.isfinite(row["loss"]):
            raise ValueError(f"the loss at step {step} is {row['loss']}; a lower optim.learning_rate may help")
        for name, value in _both_ways(row).items():
            sums[name].append(value)
        if left_at is None and "batch_loss_v2a" in row:
            recent.append((row["batch_loss_v2a"] + row["batch_loss_a2v"]) / 2)
            if len(recent) == _PLATEAU_STEPS and sum(recent) / len(recent) < _PLATEAU_SHARE * math.log(size):
                left_at = step + 1
        if step + 1 in due:
            metrics = {name: sum(values) / len(values) for name, values in sums.items()}
            metrics |= _health(learner, batch.labels.to(learner.device), problem.labels.to(learner.device), step)
            metrics |= scores_of(problem.measured(learner), labels, held_out_labels)
            if config.objective.in_batch:
                metrics |= {"plateau_steps": float(left_at or step + 1), "left_plateau": float(left_at is not None)}
            found.append(Point(step + 1, seconds, metrics))
            sums.clear()
        progress(step + 1, steps)
    return found


def step_seconds(problems: list[tuple[Problem, PretrainConfig]], rounds: int = 3, steps: int = 16) -> list[float]:
    """Seconds of a step of each, once its pool and dictionary are full: medians of short stretches that take turns.

    Turns, so that whatever else the machine does meanwhile falls on all alike.
    """
    learners = [problem.learner(config) for problem, config in problems]
    done = [0] * len(learners)
    stretches: list[list[float]] = [[] for _ in learners]
    for turn in range(rounds + 1):
        for i, (problem, config) in enumerate(problems):
            # The first turn fills pool and dictionary, and is not counted.
            filled = (config.dictionary.pool_size + config.dictionary.size) // config.optim.batch_size + 5
            started = time.perf_counter()
            for _ in range(filled if turn == 0 else steps):
                _step(problem, learners[i], done[i])
                done[i] += 1
            if turn > 0:
                stretches[i].append((time.perf_counter() - started) / steps)
    return [sorted(own)[len(own) // 2] for own in stretches]


def _step(problem: Problem, learner: Learner, step: int) -> Any:
    """A step on the batch that is due; (batch, result). The order of samples depends on the seed and the step alone."""
    config = learner.config
    size, count = config.optim.batch_size, len(problem.labels)
    epoch, place = divmod(step, count // size)
    ids = torch.from_numpy(epoch_order(config.seed, epoch, count)[place * size : (place + 1) * size])
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, step)
    batch = problem.batch(ids)
    return batch, training_step(learner, batch, step, epoch, PhaseClock(learner.device))


def _both_ways(row: dict[str, float]) -> dict[str, float]:
    """Means of what is known of both directions, under one name."""
    means = {
        name.removesuffix("_v2a"): (value + row[name.replace("_v2a", "_a2v")]) / 2
        for name, value in row.items()
        if name.endswith("_v2a")
    }
    return means | {"mi_ceiling": row["mi_ceiling"]}


def _health(learner: Learner, query_labels: torch.Tensor, labels: torch.Tensor, step: int) -> dict[str, float]:
    both = [
        dictionary_health(dictionary.negatives(), query_labels, labels, step)
        for dictionary in (learner.audio_dictionary, learner.video_dictionary)
        if dictionary is not None
    ]
    shared = set(both[0]).intersection(*both[1:]) if both else set()
    return {name: sum(one[name] for one in both) / len(both) for name in sorted(shared)}
