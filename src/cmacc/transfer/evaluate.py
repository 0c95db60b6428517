"""Evaluate an encoder, and its untrained version, with each protocol, and write a result card."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from safetensors.numpy import save_file

from cmacc.clips.progress import Progress, silent, within
from cmacc.clips.storage import written_aside
from cmacc.pretraining import Provenance, default_device
from cmacc.pretraining.clip_encoder import ClipEncoder, Modality
from cmacc.pretraining.features import Features
from cmacc.transfer.card import Card, CardError, Result, joined
from cmacc.transfer.compare import markdown
from cmacc.transfer.finetune import require_trainable
from cmacc.transfer.measure import Outcome, able_modalities, measure, modalities_with_text
from cmacc.transfer.official import OFFICIAL, official_task
from cmacc.transfer.open import OpenedEncoder, open_encoder, opened_object
from cmacc.transfer.recipes import ProtocolName
from cmacc.transfer.tasks import TaskData, TaskError, TaskName, labelled_task, pairs_task, zero_shot_task
from cmacc.transfer.text import text_modalities

DEFAULT_PROTOCOLS: dict[TaskName, tuple[ProtocolName, ...]] = {
    "ucf101": ("linear", "knn", "retrieval"),
    "hmdb51": ("linear", "knn", "retrieval"),
    "esc50": ("svm",),
    "esc10": ("svm",),
    "labelled": ("linear", "knn"),
    "pairs": ("retrieval",),
    "zero_shot": ("zero_shot",),
    "emotion": ("linear", "svm"),
    "instruments": ("linear", "knn", "prototypes", "zero_shot"),
}
"""The protocols of a task where none is named; ``zero_shot`` beside others if the encoder has a text side."""
_PREPARED: dict[TaskName, str] = {
    "emotion": "cmacc.heads.emotion.emotion_task",
    "instruments": "cmacc.heads.instrument_files.instruments_task",
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation that the protocols do not fix.

    Attributes
    ----------
    windows
        Number of windows per file to average; None uses the protocol's number. The card records it.
    lists
        Official lists of the data set, if they are not stored with the data.
    parts
        Numbers of the official splits or folds; all by default.
    folds
        Task ``labelled``: k folds by group instead of the manifest's splits.
    all_files
        Tasks ``pairs`` and ``zero_shot``: use all files instead of the held-out ones, for data that the encoder was
        not trained on.
    allow_partial
        Whether data may be missing.
    with_untrained
        Whether to measure the untrained encoder too.
    epochs
        Number of epochs of fine-tuning; None uses the protocol's number. The card records a departure.
    prompts
        Templates of protocol ``zero_shot``, with ``{}`` for the name of the class; by default, the protocol's. The card
        lists them.
    seed
        Seed of folds, fine-tuning and untrained weights.
    workers
        Number of decoding processes.
    cache
        Folder for cached features and scans of files.
    download
        Whether an encoder on the Hugging Face hub may be downloaded.
    """

    windows: int | None = None
    lists: Path | None = None
    parts: tuple[int, ...] = ()
    folds: int | None = None
    all_files: bool = False
    allow_partial: bool = False
    with_untrained: bool = True
    epochs: int | None = None
    prompts: tuple[str, ...] = ()
    seed: int = 0
    workers: int = 1
    cache: Path | None = None
    download: bool = False


def evaluate(
    encoder: str | ClipEncoder,
    tasks: Sequence[TaskName],
    data: Path,
    out: Path,
    *,
    protocols: Sequence[ProtocolName] = (),
    options: EvaluateOptions | None = None,
    prepared: Mapping[TaskName, TaskData] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Card:
    """Evaluate an encoder; write ``card.json`` and ``card.md`` (for task ``pairs`` also ``embeddings.safetensors``).

    Parameters
    ----------
    encoder
        A name for `open_encoder`, or an object with the functions of `ClipEncoder`.
    tasks
        Tasks to evaluate on.
    data
        Folder of the data set for the official tasks, otherwise a manifest.
    out
        Output folder. An existing card of the same weights keeps its other results.
    protocols
        Protocols to use; by default, those of each task (`DEFAULT_PROTOCOLS`).
    options
        Further options.
    prepared
        Data of tasks that are not made here: ``emotion`` and ``instruments``, from `cmacc.heads`.
    overwrite
        Whether existing results may be lost.
    progress
        Called with (what, done, total).

    Raises
    ------
    EncoderError, TaskError, ProtocolError, FinetuneError, CardError, ManifestError, ListingError
        The encoder or the data cannot be used in this way, or ``out`` holds results that would be lost.
    """
    options = options or EvaluateOptions()
    chosen = _chosen_protocols(tuple(dict.fromkeys(tasks)), protocols)
    _check_options(options, chosen)
    prepared = prepared or {}
    if lacking := [task for task in chosen if task in _PREPARED and task not in prepared]:
        raise TaskError(
            f"task {lacking[0]}: its data must be given as `prepared`, from `{_PREPARED[lacking[0]]}`, got none"
        )
    device = default_device()
    if isinstance(encoder, str):
        opened = open_encoder(encoder, device, seed=options.seed, download=options.download)
    else:
        opened = opened_object(encoder)
    for task, names in chosen.items():
        wanted = prepared[task].modalities if task in prepared else _task_modalities(task)
        able = able_modalities(opened.encoder, task, wanted)
        is_wanted = protocols or options.prompts or task == "zero_shot"
        if not is_wanted and not set(able) & set(text_modalities(opened.encoder)):
            chosen[task] = names = tuple(name for name in names if name != "zero_shot")
        if "zero_shot" in names:
            modalities_with_text(opened.encoder, able)
        if "finetune" in names:
            for modality in able:
                require_trainable(opened.encoder, modality)
    # All checks come before the work: an hour of it must not end in "choose another --out".
    path = out / "card.json"
    older = older_card(path, overwrite)
    card = Card(opened.facts, {}, (), Provenance.now(device, options.seed, run_id=opened.facts.run_id))
    replaces = {(task, name) for task, names in chosen.items() for name in names}
    joined(older, card, replaces, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    found = {task: prepared.get(task) or _task_data(task, data, options, progress) for task in chosen}
    joined(older, replace(card, data={t: d.facts for t, d in found.items()}), replaces, overwrite=overwrite)
    done: set[tuple[str, str]] = set()
    for task, names in chosen.items():
        extracted: dict[str, Features] = {}
        for name in names:
            rows, outcome = _results(opened, found[task], name, options, extracted, progress)
            if task == "pairs" and outcome.features is not None:
                _write_embeddings(outcome.features, out / "embeddings.safetensors")
            card = _with_results(card, found[task], rows, outcome)
            done.add((task, name))
            # Write after every protocol: fine-tuning takes hours, and a later protocol may fail.
            write_card(joined(older, card, done, overwrite=overwrite), out)
    return joined(older, card, done, overwrite=overwrite)


def _chosen_protocols(
    tasks: Sequence[TaskName], asked: Sequence[ProtocolName]
) -> dict[TaskName, tuple[ProtocolName, ...]]:
    """The protocols of every task: the requested ones that suit it, or its defaults."""
    chosen: dict[TaskName, tuple[ProtocolName, ...]] = {}
    for task in tasks:
        if task not in get_args(TaskName):
            raise TaskError(f"evaluate: task must be one of {', '.join(get_args(TaskName))}, got {task!r}")
        # What compares pairs or text alone has no other protocol than its default.
        possible = DEFAULT_PROTOCOLS[task] if task in ("pairs", "zero_shot") else get_args(ProtocolName)
        suiting = tuple(name for name in dict.fromkeys(asked) if name in possible)
        if asked and not suiting:
            raise TaskError(f"task {task}: protocol must be one of {', '.join(possible)}, got {', '.join(asked)}")
        chosen[task] = suiting or DEFAULT_PROTOCOLS[task]
    idle = [name for name in asked if not any(name in names for names in chosen.values())]
    if idle:
        raise TaskError(f"evaluate: protocol {idle[0]} must suit a task, got {', '.join(tasks)} alone")
    return chosen


def _check_options(options: EvaluateOptions, chosen: dict[TaskName, tuple[ProtocolName, ...]]) -> None:
    """Reject numbers out of range, and options that would have no effect."""
    for name in ("windows", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise TaskError(f"evaluate: {name} must be at least 1, got {value}")
    for name, least in (("workers", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise TaskError(f"evaluate: {name} must be at least {least}, got {getattr(options, name)}")
    official = any(task in OFFICIAL for task in chosen)
    for option, given, is_of_use, what in (
        ("--splits", options.parts, official, "the official data sets"),
        ("--annotations", options.lists, official, "the official data sets"),
        ("--folds", options.folds, "labelled" in chosen, "task labelled"),
        ("--all-files", options.all_files, not {"pairs", "zero_shot"}.isdisjoint(chosen), "tasks pairs and zero_shot"),
        ("--epochs", options.epochs, any("finetune" in n for n in chosen.values()), "protocol finetune"),
        ("--prompts", options.prompts, any("zero_shot" in n for n in chosen.values()), "protocol zero_shot"),
    ):
        if given and not is_of_use:
            raise TaskError(f"evaluate: {option} is for {what} alone, got {', '.join(chosen)}")
    for template in options.prompts:
        if "{}" not in template:
            raise TaskError(f"evaluate: --prompts must hold {{}} for the name of the class, got {template!r}")


def older_card(path: Path, overwrite: bool) -> Card | None:
    """The card at a path; None if there is none, or, with ``overwrite``, none that can be read.

    Raises
    ------
    CardError
        Without ``overwrite``: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        return Card.read(path)
    except CardError:
        if overwrite:
            return None
        raise


def _with_results(card: Card, data: TaskData, rows: list[Result], outcome: Outcome) -> Card:
    """The card with the results of a protocol added. Files that did not decode do not count as present data."""
    records = data.manifest.records
    skipped = {
        f"{records[i].path}{f' {records[i].key}' if records[i].key else ''}": why for i, why in outcome.failures.items()
    }
    skipped |= {f"modality {name}": why for name, why in outcome.idle_modalities.items()}
    before = card.skipped.get(data.task, data.skipped)
    files = data.facts.files - len(outcome.failures)
    if data.task in card.data:
        files = min(files, card.data[data.task].files)
    facts = replace(data.facts, files=files)
    return replace(
        card,
        data={**card.data, data.task: facts},
        results=(*card.results, *rows),
        skipped={**card.skipped, data.task: before | skipped} if before | skipped else card.skipped,
    )


def write_card(card: Card, out: Path) -> None:
    """Write ``card.json`` and ``card.md`` to a folder."""
    card.write(out / "card.json")
    with written_aside(out / "card.md") as aside:
        aside.write_text(markdown(card), encoding="utf-8")


def _task_modalities(task: TaskName) -> tuple[Modality, ...]:
    return (OFFICIAL[task].modality,) if task in OFFICIAL else ("video", "audio")


def _task_data(task: TaskName, data: Path, options: EvaluateOptions, progress: Progress) -> TaskData:
    if task == "pairs":
        return pairs_task(data, all_files=options.all_files)
    if task == "zero_shot":
        return zero_shot_task(data, all_files=options.all_files)
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
        progress=within(progress, task),
    )


def _results(
    opened: OpenedEncoder,
    data: TaskData,
    protocol: ProtocolName,
    options: EvaluateOptions,
    extracted: dict[str, Features],
    progress: Progress,
) -> tuple[list[Result], Outcome]:
    """The result rows of one protocol on one task, and the outcome that they are based on.

    ``extracted`` caches the features of the encoder and of the untrained encoder across the protocols of a task.
    """

    def measured_of(encoder: ClipEncoder, remark: str) -> Outcome:
        outcome = measure(
            encoder,
            data,
            protocol,
            windows=options.windows,
            epochs=options.epochs,
            prompts=options.prompts,
            seed=options.seed,
            workers=options.workers,
            cache=options.cache,
            features=extracted.get(remark),
            progress=within(progress, f"{data.task}{remark}"),
        )
        if outcome.features is not None:
            extracted[remark] = outcome.features
        return outcome

    began = time.monotonic()
    outcome = measured_of(opened.encoder, "")
    seconds = time.monotonic() - began
    if outcome.failures and (data.task in OFFICIAL or data.task in _PREPARED) and not options.allow_partial:
        raise TaskError(
            f"task {data.task}: every file must decode, got {len(outcome.failures)} that do not; the first fault is "
            f"{next(iter(outcome.failures.values()))}; --allow-partial skips them"
        )
    before: list[Result] | None = None
    if opened.untrained is opened.encoder:
        before = outcome.results
    elif opened.untrained is not None and options.with_untrained:
        before = measured_of(opened.untrained, ", untrained").results
    return [
        replace(result, untrained=None if before is None else before[place].value, seconds=round(seconds, 1))
        for place, result in enumerate(outcome.results)
    ], outcome


def _write_embeddings(features: Features, path: Path) -> None:
    with written_aside(path) as aside:
        save_file(
            {
                **{str(modality): rows for modality, rows in features.matched_by_file().items()},
                "sample_ids": features.sample_ids,
                "start_seconds": features.start_seconds[:, 0],
            },
            aside,
        )
