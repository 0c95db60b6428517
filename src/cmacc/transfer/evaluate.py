"""From an encoder and data to a result card: measure by each protocol, and the same for the untrained encoder."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors.numpy import save_file

from cmacc.clips.storage import written_aside
from cmacc.transfer import protocols as recipes
from cmacc.transfer.card import Card, Provenance, Result, joined
from cmacc.transfer.compare import markdown
from cmacc.transfer.encoder import ClipEncoder, Modality
from cmacc.transfer.features import Features
from cmacc.transfer.measure import Measured, Outcome, Progress, able_modalities, measure
from cmacc.transfer.official import OFFICIAL, official_task
from cmacc.transfer.open import OpenedEncoder, open_encoder, opened_object
from cmacc.transfer.protocols import RECIPES, ProtocolName
from cmacc.transfer.tasks import TaskData, TaskError, TaskName, labelled_task, pairs_task

DEFAULT_PROTOCOLS: dict[TaskName, tuple[ProtocolName, ...]] = {
    "ucf101": ("linear", "knn", "retrieval"),
    "hmdb51": ("linear", "knn", "retrieval"),
    "esc50": ("svm",),
    "esc10": ("svm",),
    "labelled": ("linear", "knn"),
    "pairs": ("retrieval",),
}


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate, beyond what the protocols fix.

    Attributes
    ----------
    windows
        Windows of a file that are averaged, instead of the protocol's own number; cards tell the difference.
    lists
        Official lists of the data set, where they do not lie with the data.
    parts
        Numbers of the official splits or folds; all by default.
    folds
        Task ``labelled``: k folds by group instead of the manifest's splits.
    allow_partial
        Whether data may be missing.
    with_untrained
        Whether the same is measured of the untrained encoder.
    epochs
        Of fine-tuning, instead of the protocol's; cards tell.
    seed
        Of folds, fine-tuning and untrained weights.
    workers
        Decoding processes.
    cache
        Folder for features and for what is known of files.
    """

    windows: int | None = None
    lists: Path | None = None
    parts: tuple[int, ...] = ()
    folds: int | None = None
    allow_partial: bool = False
    with_untrained: bool = True
    epochs: int | None = None
    seed: int = 0
    workers: int = 1
    cache: Path | None = None


def evaluate(
    encoder: str | ClipEncoder,
    tasks: Sequence[TaskName],
    data: Path,
    out: Path,
    *,
    protocols: Sequence[ProtocolName] = (),
    options: EvaluateOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Card:
    """Measure an encoder; write ``card.json`` and ``card.md`` (for task ``pairs`` also ``embeddings.safetensors``).

    Parameters
    ----------
    encoder
        See `open_encoder`; or an object with the functions of `ClipEncoder`.
    tasks
        Which tasks.
    data
        Folder of the data set for the official ones, else a manifest.
    out
        Folder; a card there of the same weights keeps its other results.
    protocols
        Which protocols; each task's own by default (`DEFAULT_PROTOCOLS`).
    options
        The rest.
    overwrite
        Whether results that are there may be lost.
    progress
        Called with (what is being done, done, total).

    Raises
    ------
    EncoderError, TaskError, ProtocolError, FinetuneError, CardError, ManifestError, ListingError
        The encoder or the data cannot be used so, or ``out`` holds results that would be lost.
    """
    options = options or EvaluateOptions()
    chosen = {task: _protocols_of(task, protocols) for task in tasks}
    if options.windows is not None and options.windows < 1:
        raise TaskError(f"evaluate: windows must be at least 1, got {options.windows}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_encoder(encoder, device, seed=options.seed) if isinstance(encoder, str) else opened_object(encoder)
    for task in tasks:
        able_modalities(opened.encoder, task, _task_modalities(task))
    card = Card(opened.facts, {}, (), Provenance.now(device, options.seed))
    path, replaces = out / "card.json", {(task, name) for task, names in chosen.items() for name in names}
    # Asked before the work: an hour of it must not end in "choose another --out".
    joined(path, card, replaces, overwrite=overwrite)
    prepared = {task: _task_data(task, data, options, progress) for task in tasks}
    card = replace(card, data={task: found.facts for task, found in prepared.items()})
    joined(path, card, replaces, overwrite=overwrite)
    results: list[Result] = []
    left_out: dict[str, str] = {}
    for task, found in prepared.items():
        left_out |= found.left_out
        for name in chosen[task]:
            rows, outcome = _results(opened, found, name, options, progress)
            results += rows
            left_out |= {str(found.manifest.records[i].path): why for i, why in outcome.failures.items()}
            if task == "pairs" and outcome.features is not None:
                _write_embeddings(outcome.features, out / "embeddings.safetensors")
    card = joined(path, replace(card, results=tuple(results), left_out=left_out), replaces, overwrite=overwrite)
    card.write(path)
    with written_aside(out / "card.md") as aside:
        aside.write_text(markdown(card))
    return card


def _protocols_of(task: TaskName, asked: Sequence[ProtocolName]) -> tuple[ProtocolName, ...]:
    if task not in get_args(TaskName):
        raise TaskError(f"evaluate: task must be one of {', '.join(get_args(TaskName))}, got {task!r}")
    possible: tuple[ProtocolName, ...] = ("retrieval",) if task == "pairs" else get_args(ProtocolName)
    chosen = tuple(name for name in asked if name in possible)
    if asked and not chosen:
        raise TaskError(f"task {task}: protocol must be one of {', '.join(possible)}, got {', '.join(asked)}")
    return chosen or DEFAULT_PROTOCOLS[task]


def _task_modalities(task: TaskName) -> tuple[Modality, ...]:
    return (OFFICIAL[task].modality,) if task in OFFICIAL else ("video", "audio")


def _task_data(task: TaskName, data: Path, options: EvaluateOptions, progress: Progress | None) -> TaskData:
    if task == "pairs":
        return pairs_task(data)
    if task == "labelled":
        return labelled_task(data, folds=options.folds, seed=options.seed, allow_partial=options.allow_partial)
    return official_task(
        task,
        data,
        lists=options.lists,
        parts=options.parts,
        allow_partial=options.allow_partial,
        workers=options.workers,
        journal=options.cache / "scans" if options.cache is not None else None,
        progress=lambda done, total: _tell(progress, f"{task}, files", done, total),
    )


def _results(
    opened: OpenedEncoder,
    data: TaskData,
    protocol: ProtocolName,
    options: EvaluateOptions,
    progress: Progress | None,
) -> tuple[list[Result], Outcome]:
    """The rows of one protocol on one task, and what they were made of."""

    def measured_of(encoder: ClipEncoder, remark: str) -> Outcome:
        return measure(
            encoder,
            data,
            protocol,
            windows=options.windows,
            epochs=options.epochs,
            seed=options.seed,
            workers=options.workers,
            cache=options.cache,
            progress=lambda what, done, total: _tell(progress, f"{data.task}{remark}, {what}", done, total),
        )

    began = time.monotonic()
    outcome = measured_of(opened.encoder, "")
    seconds = time.monotonic() - began
    if outcome.failures and data.task in OFFICIAL and not options.allow_partial:
        raise TaskError(
            f"task {data.task}: every file must decode, got {len(outcome.failures)} that do not; the first fault is "
            f"{next(iter(outcome.failures.values()))}; --allow-partial leaves them out"
        )
    untrained: list[Measured] | None = None
    if opened.untrained is opened.encoder:
        untrained = outcome.metrics
    elif opened.untrained is not None and options.with_untrained:
        untrained = measured_of(opened.untrained, ", untrained").metrics
    rows = []
    for place, what in enumerate(outcome.metrics):
        summary = recipes.summarised(what.splits, what.groups)
        before = None
        if untrained is not None:
            before = recipes.summarised(untrained[place].splits, untrained[place].groups).value
        rows.append(
            Result(
                task=data.task,
                protocol=protocol,
                modality=what.modality,
                metric=what.splits[0].name,
                value=summary.value,
                untrained=before,
                chance=summary.chance,
                count=summary.count,
                version=RECIPES[protocol].version,
                windows=options.windows or RECIPES[protocol].windows,
                crops=recipes.crops_of(protocol, what.modality),
                low=summary.low,
                high=summary.high,
                by_split=dict(zip((split.name for split in data.splits), summary.by_split, strict=True)),
                settings=(f"epochs={options.epochs}",) if protocol == "finetune" and options.epochs else (),
                seconds=round(seconds, 1),
            )
        )
    return rows, outcome


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)


def _write_embeddings(features: Features, path: Path) -> None:
    with written_aside(path) as aside:
        save_file(
            {
                "video": features.matched["video"],
                "audio": features.matched["audio"],
                "sample_ids": features.sample_ids,
                "start_seconds": features.start_seconds,
            },
            aside,
        )
