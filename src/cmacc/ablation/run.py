"""One run of an ablation: train, and measure at several points."""

import math
from collections import defaultdict, deque
from dataclasses import dataclass, replace

import torch

from cmacc.ablation.problem import Dataset
from cmacc.ablation.scores import scores_of
from cmacc.clips.progress import Progress, silent
from cmacc.pretraining import PretrainConfig, Trainer
from cmacc.pretraining.health import dictionaries_health
from cmacc.pretraining.table import TableProblem

_PLATEAU_STEPS = 20
_PLATEAU_SHARE = 0.9
_DIRECTIONS = ("video_to_audio/", "audio_to_video/")
_DICTIONARIES = ("video_dictionary/", "audio_dictionary/")


@dataclass(frozen=True)
class Point:
    """Metrics after ``step`` steps and ``seconds`` of training (without the time of measuring)."""

    step: int
    seconds: float
    metrics: dict[str, float]


def run_cell(
    dataset: Dataset,
    config: PretrainConfig,
    points: int,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> list[Point]:
    """Train from step 0 to ``config.optim.steps`` and measure at ``points`` evenly spaced steps, the last at the end.

    Returns
    -------
    list of Point
        Reproducible for the same data set and config, except the seconds; see `train_and_measure`.

    Raises
    ------
    DivergenceError
        The loss or the embeddings are no longer finite.
    ValueError
        There are fewer samples than a batch needs.
    """
    return train_and_measure(trainer_on(dataset, config, device or torch.device("cpu")), dataset, points, progress)


def trainer_on(dataset: Dataset, config: PretrainConfig, device: torch.device) -> Trainer:
    """A trainer at step 0 on a data set, in float32 if the data set requires it."""
    if dataset.in_float32:
        config = replace(config, precision="fp32")
    return Trainer(TableProblem(dataset, config, device), config, device)


def train_and_measure(
    trainer: Trainer,
    dataset: Dataset,
    points: int,
    progress: Progress = silent,
) -> list[Point]:
    """`run_cell` with an existing trainer.

    Metrics of steps are averaged over the steps since the previous point and over both directions. The health of the
    dictionaries is measured at the point, and averaged over both. ``plateau_steps`` is the number of steps until the
    in-batch loss, averaged over 20 steps, is below 0.9 of chance (log M), and ``left_plateau`` is whether that
    happened; if not, ``plateau_steps`` is the number of steps of the run.
    """
    config = trainer.config
    steps, size = config.optim.steps, config.optim.batch_size
    due = {round(steps * (i + 1) / points) for i in range(points)}
    found: list[Point] = []
    sums: dict[str, list[float]] = defaultdict(list)
    recent: deque[float] = deque(maxlen=_PLATEAU_STEPS)
    left_at: int | None = None
    seconds = 0.0
    labels, held_out_labels = dataset.labels.numpy(), dataset.held_out_labels.numpy()
    terms = config.objective.terms.weights()
    for done in trainer.steps():
        seconds += done.seconds
        figures = _over_both(done.metrics, _DIRECTIONS)
        if "mutual_information_ceiling" in done.metrics:
            figures["mutual_information_ceiling"] = done.metrics["mutual_information_ceiling"]
        # Of several terms, each has its own names.
        figures |= {name: value for name, value in done.metrics.items() if name.partition("/")[0] in terms}
        for name, value in figures.items():
            sums[name].append(value)
        if left_at is None and "batch_loss" in figures:
            recent.append(figures["batch_loss"])
            if len(recent) == _PLATEAU_STEPS and sum(recent) / len(recent) < _PLATEAU_SHARE * math.log(size):
                left_at = done.step + 1
        if done.step + 1 in due:
            metrics = {name: sum(values) / len(values) for name, values in sums.items()}
            health = dictionaries_health(trainer.learner, done.batch.labels, trainer.problem.labels, done.step)
            metrics |= _over_both(health, _DICTIONARIES)
            metrics |= scores_of(dataset.measured(trainer.learner), labels, held_out_labels)
            if recent:
                metrics |= {
                    "plateau_steps": float(left_at or done.step + 1),
                    "left_plateau": float(left_at is not None),
                }
            found.append(Point(done.step + 1, seconds, metrics))
            sums.clear()
        progress("steps", done.step + 1, steps)
    return found


def step_seconds(
    runs: list[tuple[Dataset, PretrainConfig]],
    device: torch.device | None = None,
    rounds: int = 3,
    steps: int = 16,
) -> list[float]:
    """Seconds per step of each run with full pool and dictionary: medians of short, interleaved intervals.

    The intervals are interleaved so that other load on the machine affects all runs equally.
    """
    device = device or torch.device("cpu")
    trainers = [trainer_on(dataset, config, device) for dataset, config in runs]
    stretches: list[list[float]] = [[] for _ in trainers]
    for turn in range(rounds + 1):
        for own, trainer in zip(stretches, trainers, strict=True):
            # The first round fills pool and dictionary, and is not counted.
            sizes = trainer.config.dictionary
            filling = (sizes.pool_size + sizes.size) // trainer.config.optim.batch_size + 5
            until = trainer.next_step + (filling if turn == 0 else steps)
            seconds = [done.seconds for done in trainer.steps(until)]
            if turn > 0:
                own.append(sum(seconds) / len(seconds))
    return [sorted(own)[len(own) // 2] for own in stretches]


def _over_both(row: dict[str, float], prefixes: tuple[str, str]) -> dict[str, float]:
    """Means of the metrics that exist under both prefixes, by the name without prefix."""
    first, second = prefixes
    names = [name.removeprefix(first) for name in row if name.startswith(first)]
    return {n: (row[first + n] + row[second + n]) / 2 for n in sorted(names) if second + n in row}
