"""Measure one encoder with one protocol on one task: a `Result` per metric, from frozen features or fine-tuning."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmacc.clips.progress import Progress, silent, within
from cmacc.pretraining.clip_encoder import ClipEncoder, MatchingEncoder, Modality
from cmacc.pretraining.features import Features, embed
from cmacc.transfer import nearest, protocols
from cmacc.transfer.card import Result
from cmacc.transfer.finetune import FinetuneConfig, FinetuneFiles, FinetuneSettings, finetune
from cmacc.transfer.metrics import Metric, summarised
from cmacc.transfer.protocols import Rows
from cmacc.transfer.recipes import RECIPES, ProtocolName, crops_of, windows_of
from cmacc.transfer.tasks import Split, TaskData, TaskError, TaskName
from cmacc.transfer.text import DEFAULT_PROMPTS, WITH_TEXT, class_texts, text_modalities

_PROBES: dict[ProtocolName, Callable[[Rows, Rows], list[Metric]]] = {
    "linear": protocols.linear,
    "svm": protocols.svm,
    "knn": protocols.knn,
    "prototypes": nearest.prototypes,
    "retrieval": protocols.class_retrieval,
}


@dataclass(frozen=True)
class Outcome:
    """Results of a protocol.

    Attributes
    ----------
    results
        Results for all modalities and metrics, over all splits, as in the card but without the untrained encoder's
        value.
    failures
        ``{sample id: reason}`` of files that did not decode.
    idle_modalities
        ``{modality: reason}`` of modalities that the encoder has but the files do not have.
    features
        The measured features; None for fine-tuning.
    """

    results: list[Result]
    failures: dict[int, str]
    idle_modalities: dict[str, str]
    features: Features | None


def able_modalities(encoder: ClipEncoder, task: TaskName, wanted: Sequence[Modality]) -> tuple[Modality, ...]:
    """The modalities of a task that the encoder can encode."""
    able = tuple(modality for modality in wanted if modality in encoder.modalities)
    if task == "zero_shot":
        return modalities_with_text(encoder, able)
    if task == "pairs" and not (len(able) == 2 and isinstance(encoder, MatchingEncoder)):
        raise TaskError(
            "task pairs: the encoder must embed video and audio in one space, got "
            f"{type(encoder).__name__}, which does not"
        )
    if not able:
        raise TaskError(
            f"task {task}: the encoder must encode {' or '.join(wanted)}, got {type(encoder).__name__}, which encodes "
            f"{', '.join(encoder.modalities)}"
        )
    return able


def modalities_with_text(encoder: ClipEncoder, among: Sequence[Modality]) -> tuple[Modality, ...]:
    """Those of some modalities that text can be compared with; a `TaskError` if there are none."""
    found = tuple(modality for modality in among if modality in text_modalities(encoder))
    if not found:
        raise TaskError(
            f"protocol zero_shot: the encoder must have a text side in the space of its {' or '.join(among)} features, "
            f"got {type(encoder).__name__} without; {WITH_TEXT}"
        )
    return found


def measure(
    encoder: ClipEncoder,
    data: TaskData,
    protocol: ProtocolName,
    *,
    windows: int | None = None,
    epochs: int | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    workers: int = 1,
    cache: Path | None = None,
    features: Features | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Measure an encoder with one protocol on one task.

    Parameters
    ----------
    encoder
        Encoder in evaluation mode; it is not modified.
    data
        Data from `labelled_task`, `pairs_task`, `zero_shot_task` or `official_task`, or from `cmacc.heads`.
    protocol
        A protocol that suits the task.
    windows, epochs
        Override the recipe's numbers.
    prompts
        Templates of ``zero_shot``, each with ``{}`` for the name of the class; by default, the recipe's.
    seed
        Seed of fine-tuning.
    workers, cache
        See `embed`.
    features
        Features of the same encoder and data from another protocol. They are reused if their number of windows is the
        same.
    progress
        Called with (what, done, total).

    Raises
    ------
    TaskError
        The encoder does not support the task, or too few files decode.
    """
    modalities = able_modalities(encoder, data.task, data.modalities)
    windows = windows or windows_of(protocol, data.task)
    if protocol == "finetune":
        settings = FinetuneSettings() if epochs is None else FinetuneSettings(epochs=epochs)
        config = FinetuneConfig(settings, windows, seed=seed, workers=workers)
        departures = () if epochs is None else (f"epochs={epochs}",)
        return _finetuned(encoder, data, modalities, config, departures, progress)

    if features is None or features.windows != windows:
        features = embed(
            encoder,
            data.manifest,
            data.sample_ids,
            modalities,
            windows=windows,
            workers=workers,
            cache=cache,
            progress=progress,
        )
    if len(features.sample_ids) < 2:
        raise TaskError(
            f"task {data.task}: at least 2 of the {len(data.sample_ids)} files of {data.facts.path} must decode, "
            f"got {len(features.sample_ids)}; the first fault is {next(iter(features.failures.values()))}"
        )
    if data.task == "pairs":
        return Outcome(_paired(features, data), features.failures, {}, features)
    if protocol == "zero_shot":
        results, idle = _zero_shot(encoder, features, data, prompts)
    else:
        results, idle = _probed(features, data, protocol, progress)
    return Outcome(results, features.failures, idle, features)


def _paired(features: Features, data: TaskData) -> list[Result]:
    matched = features.matched_by_file()
    video, audio = matched["video"], matched["audio"]
    groups = data.groups(features.sample_ids.tolist())
    return [
        _result(data, "retrieval", modality, [metric], [groups], features.windows)
        for modality, metrics in (
            ("video_to_audio", protocols.pair_retrieval(video, audio)),
            ("audio_to_video", protocols.pair_retrieval(audio, video)),
        )
        for metric in metrics
    ]


def _probed(
    features: Features, data: TaskData, protocol: ProtocolName, progress: Progress
) -> tuple[list[Result], dict[str, str]]:
    """Probe every modality that the files have, and both together if the encoder has both."""
    sides = _sides(features, protocol)
    place_of = {sample_id: place for place, sample_id in enumerate(features.sample_ids.tolist())}
    results: list[Result] = []
    idle: dict[str, str] = {}
    done, total = 0, len(sides) * len(data.splits)
    progress(protocol, done, total)
    for name, (modality, side) in sides.items():
        splits, reason = _splits_of(modality, data, place_of.keys())
        if reason:
            idle[modality] = reason
            total -= len(data.splits)
            continue
        by_split: list[list[Metric]] = []
        groups: list[NDArray[np.int64]] = []
        for split in splits:
            train, test = (
                Rows(side[[place_of[i] for i in ids]], data.class_of[list(ids)], data.groups(ids))
                for ids in (split.train, split.test)
            )
            by_split.append(_with_recall(data.task, _PROBES[protocol](train, test), test.labels))
            groups.append(test.groups)
            done += 1
            progress(protocol, done, total)
        results += [
            _result(data, protocol, name, metrics, groups, features.windows) for metrics in zip(*by_split, strict=True)
        ]
        if protocol == "prototypes":
            ids = sorted({i for split in splits for i in (*split.train, *split.test)})
            rows = protocols.averaged(side[[place_of[i] for i in ids]])
            classes, directions = nearest.class_prototypes(rows, data.class_of[ids])
            results += _triplets(data, protocol, name, classes, directions, features.windows)
    if not results:
        raise TaskError(f"task {data.task}: {next(iter(idle.values()))}")
    return results, idle


def _sides(features: Features, protocol: ProtocolName) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """What is probed, by its name on the card: the modality that files must have, and rows ``(n, windows, width)``.

    Prototypes also of what stands before the features (``audio_tower``) and after them (``audio_joint``), if it does:
    a cosine needs no training, so that the accuracies tell what each step loses.
    """
    sides: dict[str, tuple[str, NDArray[np.float32]]] = {}
    if protocol == "prototypes":
        sides |= {f"{modality}_tower": (modality, rows) for modality, rows in features.unprojected.items()}
    sides |= {modality: (modality, rows) for modality, rows in features.by_modality.items()}
    if len(features.by_modality) == 2:
        both = np.concatenate([features.by_modality["video"], features.by_modality["audio"]], axis=2)
        sides["both"] = ("both", both)
    if protocol == "prototypes":
        sides |= {f"{modality}_joint": (modality, rows) for modality, rows in features.matched.items()}
    return sides


def _triplets(
    data: TaskData,
    protocol: ProtocolName,
    side: str,
    classes: NDArray[np.int64],
    directions: NDArray[np.float64],
    windows: int,
    departures: tuple[str, ...] = (),
) -> list[Result]:
    """The share of the task's triplets that the directions of these classes keep; nothing if there are none."""
    known = data.triplets[np.isin(data.triplets, classes).all(axis=1)]
    if not len(known):
        return []
    kept = nearest.triplets_kept(directions, np.searchsorted(classes, known))
    return [_result(data, protocol, side, [kept], [known[:, 0]], windows, departures, parts=("all",))]


def _zero_shot(
    encoder: ClipEncoder, features: Features, data: TaskData, prompts: Sequence[str]
) -> tuple[list[Result], dict[str, str]]:
    """Compare every modality that has a text side, and that the files have, with the names of the classes."""
    place_of = {sample_id: place for place, sample_id in enumerate(features.sample_ids.tolist())}
    results: list[Result] = []
    idle: dict[str, str] = {}
    for modality in modalities_with_text(encoder, tuple(features.by_modality)):
        splits = _present(modality, data, place_of.keys())
        empty = [split.name for split in splits if not split.test]
        if empty:
            idle[modality] = f"{empty[0]}: no held-out file has {modality} and decodes"
            continue
        templates = tuple(prompts) or data.prompts or DEFAULT_PROMPTS[modality]
        settings = tuple(f"prompt={template}" for template in templates)
        texts = class_texts(encoder, modality, data.manifest.classes(), templates)
        tests = [
            Rows(
                features.by_modality[modality][[place_of[i] for i in split.test]],
                data.class_of[list(split.test)],
                data.groups(split.test),
            )
            for split in splits
        ]
        groups = [test.groups for test in tests]
        results += [
            _result(data, "zero_shot", modality, metrics, groups, features.windows, settings)
            for metrics in zip(
                *(_with_recall(data.task, nearest.zero_shot(test, texts), test.labels) for test in tests), strict=True
            )
        ]
        directions = nearest.text_directions(texts)
        classes = np.arange(len(directions))
        side = f"{modality}_text"
        results += _triplets(data, "zero_shot", side, classes, directions, features.windows, settings)
    if not results:
        raise TaskError(f"task {data.task}: {next(iter(idle.values()))}")
    return results, idle


def _with_recall(task: TaskName, metrics: list[Metric], labels: NDArray[np.int64]) -> list[Metric]:
    """The metrics of one split; for emotion, whose classes are unequal, with UAR beside accuracy."""
    if task != "emotion":
        return metrics
    return metrics + [protocols.unweighted_recall(one, labels) for one in metrics if one.name == "accuracy"]


def _result(
    data: TaskData,
    protocol: ProtocolName,
    modality: str,
    metrics: Sequence[Metric],
    groups: Sequence[NDArray[np.int64]],
    windows: int,
    departures: tuple[str, ...] = (),
    parts: Sequence[str] = (),
) -> Result:
    """One metric over the splits (or ``parts``), as in the card. The caller adds the untrained encoder's value."""
    summary = summarised(metrics, groups)
    return Result(
        task=data.task,
        protocol=protocol,
        modality=modality,
        metric=metrics[0].name,
        value=summary.value,
        untrained=None,
        chance=summary.chance,
        count=summary.count,
        version=RECIPES[protocol].version,
        windows=windows,
        crops=crops_of(protocol, modality),
        low=summary.low,
        high=summary.high,
        by_split=dict(zip(parts or [split.name for split in data.splits], summary.by_split, strict=True)),
        settings=departures,
    )


def _present(modality: str, data: TaskData, usable: Collection[int]) -> list[Split]:
    """The splits, restricted to usable files with that modality."""
    columns = {
        "video": [width > 0 for width in data.manifest.column("width")],
        "audio": data.manifest.column("has_audio"),
    }
    has = [columns[name] for name in (columns if modality == "both" else (modality,))]
    return [
        Split(
            split.name,
            *(
                tuple(i for i in ids if i in usable and all(column[i] for column in has))
                for ids in (split.train, split.test)
            ),
        )
        for split in data.splits
    ]


def _splits_of(modality: str, data: TaskData, usable: Collection[int]) -> tuple[list[Split], str]:
    """The splits, restricted to files with that modality; or no splits and a reason, if it cannot be measured."""
    splits = _present(modality, data, usable)
    for split in splits:
        trained = {int(data.class_of[i]) for i in split.train}
        if len(trained) < 2 or not split.test:
            return [], f"{split.name}: too few files with {'both' if modality == 'both' else modality} to probe it"
        lost = sorted({int(data.class_of[i]) for i in split.test} - trained)
        if lost:
            names = ", ".join(data.manifest.classes()[c] for c in lost[:5])
            return [], f"{split.name}: no training file of {names} has {modality} and decodes"
    return splits, ""


def _finetuned(
    encoder: ClipEncoder,
    data: TaskData,
    modalities: Sequence[Modality],
    config: FinetuneConfig,
    departures: tuple[str, ...],
    progress: Progress,
) -> Outcome:
    results: list[Result] = []
    failures: dict[int, str] = {}
    idle: dict[str, str] = {}
    for modality in modalities:
        splits, reason = _splits_of(modality, data, range(len(data.manifest)))
        if reason:
            idle[modality] = reason
            continue
        by_split: list[list[Metric]] = []
        groups: list[NDArray[np.int64]] = []
        for split in splits:
            tuned = finetune(
                encoder,
                modality,
                FinetuneFiles(data.manifest, data.class_of, split.train, split.test),
                replace(config, crops=crops_of("finetune", modality)),
                within(progress, f"{modality}, {split.name}"),
            )
            failures |= tuned.failures
            labels = data.class_of[tuned.sample_ids]
            metrics = protocols.scores_accuracy(tuned.scores, labels, data.class_of[list(split.train)])
            by_split.append(_with_recall(data.task, metrics, labels))
            groups.append(data.groups(tuned.sample_ids.tolist()))
        results += [
            _result(data, "finetune", modality, of_splits, groups, config.windows, departures)
            for of_splits in zip(*by_split, strict=True)
        ]
    if not results:
        raise TaskError(f"task {data.task}: {next(iter(idle.values()))}")
    return Outcome(results, failures, idle, None)
