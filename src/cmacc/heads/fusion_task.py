"""Task ``fusion``: sentiment and emotion from feature sequences of several modalities, from a file to a card.

1. A file of feature sequences (`cmacc.heads.sequences`), standardised with the training part.
2. Targets say the kind of task: class numbers, one number (sentiment), or several labels an item.
3. For each fusion and seed, a head is trained on the training part. The lowest validation loss chooses the epoch; the
   test part is seen once.
4. Rows of the card: the metrics of `cmacc.heads.sentiment_metrics` for that kind, means over the seeds. The interval is
   a bootstrap over the test items.

The state of every training is kept in ``out/heads`` until the card is written, so that a stopped evaluation goes on.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.clips.progress import Progress, silent, within
from cmacc.heads.fit import FitConfig, fit, predictions, seeded_head
from cmacc.heads.fusion import FusionHead, FusionMethod, FusionTask, fusion_loss
from cmacc.heads.head import Head, ItemsInMemory, Rows, feature_statistics
from cmacc.heads.sentiment_metrics import STRONGEST, class_metrics, emotion_metrics, sentiment_metrics
from cmacc.heads.sequences import SPLITS, SequenceData, SequenceError, read_sequences
from cmacc.heads.task_parts import check_training, delete_states, state_folder
from cmacc.pretraining import Provenance, default_device
from cmacc.transfer.card import Card, DataFacts, EncoderFacts, Result, joined
from cmacc.transfer.evaluate import older_card, write_card
from cmacc.transfer.tasks import TaskError

log = logging.getLogger(__name__)

FUSION_TASK = "fusion"
VERSION = 1
TRAINING = FitConfig(epochs=40, batch_size=32, learning_rate=1e-3, max_gradient_norm=0.8, patience=8)
"""Adam, batches of 32 and 8 epochs of patience as in MMSA; 40 epochs and the gradient's bound as in MulT."""
_RESAMPLES = 500


@dataclass(frozen=True)
class FusionOptions:
    """Options of an evaluation.

    Attributes
    ----------
    seeds
        Of the heads: weights, order and dropout. Results are means over them.
    epochs
        Number of epochs; None: 40. The card records a departure.

    Raises
    ------
    TaskError
        A number is out of range, or there is no seed, or one twice.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None

    def __post_init__(self) -> None:
        check_training(FUSION_TASK, self.seeds, self.epochs)


def evaluate_fusion(
    data: Path,
    out: Path,
    *,
    methods: Sequence[FusionMethod] = get_args(FusionMethod),
    options: FusionOptions | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Card:
    """Train and measure fusions of feature sequences; write ``card.json`` and ``card.md``.

    Parameters
    ----------
    data
        A file for `read_sequences`.
    out
        Output folder. An existing card of the same features keeps its other results.
    methods
        The fusions.
    options
        Further options.
    overwrite
        Whether existing results may be lost.
    progress
        Called with (what, done, total).

    Raises
    ------
    TaskError, SequenceError, FusionError, CardError, HeadError
        The data cannot be used in this way, or ``out`` holds results that would be lost.
    """
    options = options or FusionOptions()
    unknown = [name for name in methods if name not in get_args(FusionMethod)]
    if unknown or not methods:
        names = ", ".join(get_args(FusionMethod))
        raise TaskError(f"task fusion: protocol must be one of {names}, got {', '.join(unknown) or 'none'}")
    chosen = tuple(dict.fromkeys(methods))
    sequences = read_sequences(data)
    kind, outputs = task_of(sequences)
    fingerprint = _fingerprint(sequences)
    count = len(sequences.targets)
    classes = outputs if kind == "classification" else 0
    facts = DataFacts(str(data.absolute()), fingerprint, count, count, classes, classes)
    encoder = EncoderFacts("features", f"feature sequences: {', '.join(sequences.widths)}", fingerprint, 0, 0, {})
    older = older_card(out / "card.json", overwrite)
    device = default_device()
    card = Card(encoder, {FUSION_TASK: facts}, (), Provenance.now(device, 0))
    replaces = {(FUSION_TASK, name) for name in chosen}
    joined(older, card, replaces, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    states = state_folder(out, fingerprint)
    items = ItemsInMemory(standardised(sequences).rows())
    for name in chosen:
        began = time.monotonic()
        predicted = [
            _predicted(
                seeded_head(partial(FusionHead, name, sequences.widths, outputs, kind), seed).to(device),
                items,
                sequences,
                dataclasses.replace(TRAINING, seed=seed, epochs=options.epochs or TRAINING.epochs),
                states / f"{name}-seed-{seed}",
                within(progress, f"{FUSION_TASK}, {name}, seed {seed}"),
            )
            for seed in options.seeds
        ]
        rows = _results(name, kind, sequences, predicted, options, time.monotonic() - began)
        card = dataclasses.replace(card, results=(*card.results, *rows))
    card = joined(older, card, replaces, overwrite=overwrite)
    write_card(card, out)
    delete_states(states)
    return card


def task_of(sequences: SequenceData) -> tuple[FusionTask, int]:
    """The kind of task that the targets say, and its number of outputs.

    Raises
    ------
    SequenceError
        There are fewer than two classes, sentiment is not in [-3, 3], or several targets an item are not labels of 0
        and 1.
    """
    targets = sequences.targets
    if targets.ndim == 1:
        classes = int(targets.max()) + 1
        if classes < 2:
            raise SequenceError(f"sequences: class numbers must be of at least 2 classes, got {classes}")
        return "classification", classes
    if targets.shape[1] == 1:
        strongest = float(np.abs(targets).max())
        if strongest > STRONGEST:
            raise SequenceError(
                f"sequences: a float target is sentiment and must be in [-3, 3], got {strongest:g} in magnitude"
            )
        return "regression", 1
    if not np.isin(targets, (0, 1)).all():
        raise SequenceError(
            f"sequences: several targets an item must be labels of 0 and 1, got other numbers in {targets.shape[1]} "
            "targets; sentiment is one"
        )
    return "multilabel", targets.shape[1]


def standardised(sequences: SequenceData) -> SequenceData:
    """The same with each feature standardised by its mean and deviation over the valid steps of the training part.

    A constant feature is only centred.
    """
    features = {}
    for name, values in sequences.features.items():
        train = sequences.splits["train"]
        valid = np.arange(values.shape[1]) < sequences.lengths[name][train, None]
        steps = values[train][valid]
        if len(steps):  # else no training item has the modality
            mean, scale = (found.numpy() for found in feature_statistics(torch.from_numpy(steps)))
            values = ((values - mean) / scale).astype(np.float32)
        features[name] = values
    return dataclasses.replace(sequences, features=features)


def _predicted(
    head: Head,
    items: ItemsInMemory,
    sequences: SequenceData,
    training: FitConfig,
    folder: Path,
    progress: Progress,
) -> NDArray[np.float64]:
    """Train a head; its outputs for the test part."""
    train, validation, test = (sequences.splits[split].tolist() for split in SPLITS)
    score = partial(_score, task_of(sequences)[0])
    fitted = fit(head, items, train, validation, score, training, folder=folder, progress=progress)
    found = predictions(head, items, test, fitted.progress, training.batch_size)
    return np.asarray(found["outputs"].double().numpy())


def _score(kind: FusionTask, predicted: dict[str, Tensor], rows: Rows) -> float:
    """Minus the loss, as higher scores are better."""
    return -fusion_loss(kind, predicted["outputs"], rows["targets"]).item()


def _metrics(kind: FusionTask, outputs: NDArray[np.float64], targets: NDArray[np.float64]) -> dict[str, float]:
    if kind == "classification":
        return class_metrics(outputs.argmax(1), targets.astype(np.int64))
    if kind == "multilabel":
        return emotion_metrics(outputs > 0, targets > 0, [f"label {n}" for n in range(targets.shape[1])])
    return sentiment_metrics(outputs[:, 0], targets[:, 0])


def _results(
    method: FusionMethod,
    kind: FusionTask,
    sequences: SequenceData,
    predicted: Sequence[NDArray[np.float64]],
    options: FusionOptions,
    seconds: float,
) -> list[Result]:
    """A row for each metric that is defined."""
    test = sequences.splits["test"]
    targets = np.asarray(sequences.targets[test], np.float64)
    by_seed = [_metrics(kind, outputs, targets) for outputs in predicted]
    guessed = _metrics(kind, _constant(kind, sequences), targets)
    resampled: dict[str, list[float]] = {name: [] for name in by_seed[0]}
    rng = np.random.default_rng(0)
    for _ in range(_RESAMPLES):
        picks = rng.integers(len(test), size=len(test))
        found = [_metrics(kind, outputs[picks], targets[picks]) for outputs in predicted]
        for name, values in resampled.items():
            values.append(float(np.mean([of_seed[name] for of_seed in found])))
    rows = []
    for name, values in resampled.items():
        value = float(np.mean([of_seed[name] for of_seed in by_seed]))
        if np.isnan(value):
            log.warning("fusion %s: %s is not defined on the test part, and not on the card", method, name)
            continue
        low, high = np.nanpercentile(values, [2.5, 97.5])
        rows.append(
            Result(
                task=FUSION_TASK,
                protocol=method,
                modality="+".join(sequences.widths),
                metric=name,
                value=value,
                untrained=None,
                # A constant has no correlation.
                chance=0.0 if np.isnan(guessed[name]) else guessed[name],
                count=len(test),
                version=VERSION,
                windows=1,
                crops=1,
                low=float(low),
                high=float(high),
                by_split={f"seed {s}": of_seed[name] for s, of_seed in zip(options.seeds, by_seed, strict=True)},
                settings=() if options.epochs in (None, TRAINING.epochs) else (f"epochs={options.epochs}",),
                seconds=round(seconds, 1),
            )
        )
    return rows


def _constant(kind: FusionTask, sequences: SequenceData) -> NDArray[np.float64]:
    """Outputs that are the same for every test item: the best constant of the training part."""
    train, count = sequences.targets[sequences.splits["train"]], len(sequences.splits["test"])
    if kind == "classification":
        best = np.bincount(train.astype(np.int64), minlength=int(sequences.targets.max()) + 1).astype(np.float64)
    elif kind == "multilabel":
        best = train.mean(0).astype(np.float64) - 0.5
    else:
        best = np.median(train, axis=0).astype(np.float64)
    return np.tile(best, (count, 1))


def _fingerprint(sequences: SequenceData) -> str:
    digest = hashlib.sha256()
    arrays: dict[str, NDArray[Any]] = {**sequences.features, **sequences.splits, "targets": sequences.targets}
    arrays |= {f"{name} length": values for name, values in sequences.lengths.items()}
    for name, values in arrays.items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]
