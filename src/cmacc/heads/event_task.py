"""Task ``ave``: event localisation with the features of an encoder, from films or published features to a card.

1. The rows, as items (`cmacc.heads.event_items`, `event_films`), of the encoder, and of the same encoder untrained.
2. For each protocol (`cmacc.heads.event_recipes`) and seed, a head is trained on the training part. Validation accuracy
   chooses the epoch; the test part is seen once. Published numbers are of the best *test* epoch, and higher for it.
3. Rows of the card: accuracy of seconds, and the AUROC of the event's probability and of gates
   (`cmacc.heads.event_results`).

The state of every training is kept in ``out/heads`` until the card is written, so that a stopped evaluation goes on.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from cmacc.clips.progress import Progress, silent, within
from cmacc.heads.ave import SECONDS
from cmacc.heads.event_films import Films, embedded, find_films, require_both
from cmacc.heads.event_items import EventSet, published_set
from cmacc.heads.event_linear import EventLinear
from cmacc.heads.event_recipes import DEFAULT_EVENT_PROTOCOLS, EVENT_RECIPES, EventProtocol, EventRecipe
from cmacc.heads.event_results import summaries
from cmacc.heads.fit import FitConfig, fit, predictions, seeded_head
from cmacc.heads.head import Rows
from cmacc.heads.segment_accuracy import segment_accuracy
from cmacc.heads.task_parts import check_training, delete_states, state_folder
from cmacc.pretraining import Provenance, default_device
from cmacc.pretraining.clip_encoder import ClipEncoder
from cmacc.transfer.card import Card, DataFacts, EncoderFacts, Result, joined
from cmacc.transfer.evaluate import older_card, write_card
from cmacc.transfer.metrics import Summary
from cmacc.transfer.open import OpenedEncoder, open_encoder, opened_object
from cmacc.transfer.tasks import TaskError

AVE_TASK = "ave"
PUBLISHED = "features"
"""ENCODER for the published features."""


@dataclass(frozen=True)
class EventOptions:
    """Options of an evaluation that the protocols do not fix.

    Attributes
    ----------
    seeds
        Of the heads: weights, order and dropout. Results are means over them.
    epochs
        Number of epochs; None uses the protocol's number. The card records a departure.
    allow_partial
        Whether films, rows or lists may be missing.
    drop_leaks
        Whether to drop training rows whose video is also in validation or test.
    with_untrained
        Whether to measure the untrained encoder too.
    seed
        Seed of untrained weights of the encoder.
    workers
        Number of decoding processes.
    cache
        Folder for cached features and scans of files.
    download
        Whether an encoder on the Hugging Face hub may be downloaded.

    Raises
    ------
    TaskError
        A number is out of range, or there is no seed, or one twice.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    allow_partial: bool = False
    drop_leaks: bool = False
    with_untrained: bool = True
    seed: int = 0
    workers: int = 1
    cache: Path | None = None
    download: bool = False

    def __post_init__(self) -> None:
        check_training(AVE_TASK, self.seeds, self.epochs)
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise TaskError(f"task ave: --{name} must be at least 0, got {getattr(self, name)}")


def evaluate_events(
    encoder: str | ClipEncoder,
    data: Path,
    out: Path,
    *,
    protocols: Sequence[EventProtocol] = DEFAULT_EVENT_PROTOCOLS,
    options: EventOptions | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Card:
    """Train and measure heads of event localisation; write ``card.json`` and ``card.md``.

    Parameters
    ----------
    encoder
        A name for `cmacc.transfer.open.open_encoder`, an object with the functions of `ClipEncoder`, or ``features``
        for the published features.
    data
        Folder of ``Annotations.txt`` and the lists, with the films or the published .h5 files.
    out
        Output folder. An existing card of the same weights keeps its other results.
    protocols
        Heads, with ``_weak`` those trained with the classes of videos alone.
    options
        Further options.
    overwrite
        Whether existing results may be lost.
    progress
        Called with (what, done, total).

    Raises
    ------
    EncoderError, TaskError, AveError, ListingError, CardError, HeadError
        The encoder or the data cannot be used in this way, or ``out`` holds results that would be lost.
    """
    options = options or EventOptions()
    chosen = _chosen_protocols(protocols)
    device = default_device()
    source: EventSet | OpenedEncoder
    if encoder == PUBLISHED:
        source = published_set(data, allow_partial=options.allow_partial, drop_leaks=options.drop_leaks)
        facts = features_facts(source)
    else:
        source = _opened(encoder, device, options)
        facts = source.facts
    # All checks that can come before the work do.
    older = older_card(out / "card.json", overwrite)
    card = Card(facts, {}, (), Provenance.now(device, options.seed, run_id=facts.run_id))
    replaces = {(AVE_TASK, name) for name in chosen}
    joined(older, card, replaces, overwrite=overwrite)
    if isinstance(source, EventSet):
        inputs = _Inputs(source, None, (), 0.0)
    else:
        inputs = _of_films(source, data, options, progress)
    events = inputs.events
    card = dataclasses.replace(card, data={AVE_TASK: _data_facts(events)})
    if events.skipped:
        card = dataclasses.replace(card, skipped={AVE_TASK: dict(events.skipped)})
    joined(older, card, replaces, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        rows = _results(inputs, EVENT_RECIPES[name], options, out, device, progress)
        card = dataclasses.replace(card, results=(*card.results, *rows))
    card = joined(older, card, replaces, overwrite=overwrite)
    write_card(card, out)
    for used in (inputs.events, inputs.untrained):
        if used is not None:
            delete_states(_states(out, used))
    return card


@dataclass(frozen=True)
class _Inputs:
    """The items of the encoder; of it untrained, if it was trained; settings of its clips; seconds to embed."""

    events: EventSet
    untrained: EventSet | None
    settings: tuple[str, ...]
    seconds: float


def features_facts(events: EventSet) -> EncoderFacts:
    """What the card says of features in files: the published ones, if annotations and widths are as published.

    In the words of ``docs/published.csv``, so that a card of the same features does not differ from its rows in them.
    """
    first = events.items.rows([0])
    widths = (first["video"].shape[-1], first["audio"].shape[-1])
    if not events.data.facts.published_order or widths != (512, 128):
        return EncoderFacts(PUBLISHED, "features in files named as AVE's", events.features_hash, 0, 0, {})
    kind, pretraining = "published features of AVE (VGG-19, VGGish)", "ImageNet, AudioSet (with labels)"
    return EncoderFacts(PUBLISHED, kind, events.features_hash, 0, 0, {}, pretraining)


def _chosen_protocols(asked: Sequence[EventProtocol]) -> tuple[EventProtocol, ...]:
    unknown = [name for name in asked if name not in get_args(EventProtocol)]
    if unknown or not asked:
        raise TaskError(
            f"task ave: protocol must be one of {', '.join(get_args(EventProtocol))}, got "
            f"{', '.join(map(str, unknown)) or 'none'}"
        )
    return tuple(dict.fromkeys(asked))


def _opened(encoder: str | ClipEncoder, device: torch.device, options: EventOptions) -> OpenedEncoder:
    if isinstance(encoder, str):
        opened = open_encoder(encoder, device, seed=options.seed, download=options.download)
    else:
        opened = opened_object(encoder)
    require_both(opened.encoder)
    return opened


def _of_films(opened: OpenedEncoder, data: Path, options: EventOptions, progress: Progress) -> _Inputs:
    films = find_films(
        data,
        allow_partial=options.allow_partial,
        drop_leaks=options.drop_leaks,
        workers=options.workers,
        journal=None if options.cache is None else options.cache / "scans",
        progress=within(progress, AVE_TASK),
    )
    began = time.monotonic()
    events = _embedded(films, opened.encoder, options, within(progress, AVE_TASK))
    seconds = time.monotonic() - began
    untrained = None
    if opened.untrained is opened.encoder:
        untrained = events
    elif opened.untrained is not None and options.with_untrained:
        untrained = _embedded(films, opened.untrained, options, within(progress, f"{AVE_TASK}, untrained"))
        if untrained.fingerprint() != events.fingerprint():
            raise TaskError("task ave: films must decode for the untrained encoder too, got others; try again")
    length = opened.encoder.spec.length_seconds
    return _Inputs(events, untrained, () if length == 1 else (f"window={length:g} s",), seconds)


def _embedded(films: Films, encoder: ClipEncoder, options: EventOptions, progress: Progress) -> EventSet:
    return embedded(films, encoder, workers=options.workers, cache=options.cache, progress=progress)


def _data_facts(events: EventSet) -> DataFacts:
    facts = events.data.facts
    event_labels = events.data.labels[events.rows]
    return DataFacts(
        path=str(events.data.root.absolute()),
        fingerprint=events.fingerprint(),
        files=len(events.rows),
        # What was dropped on purpose is not missing; what no list names is.
        files_listed=facts.rows + facts.unknown_rows - facts.dropped_rows,
        classes=len(set(event_labels[event_labels != events.data.background].tolist())),
        classes_listed=len(events.data.classes),
    )


def _states(out: Path, events: EventSet) -> Path:
    return state_folder(out, f"{events.features_hash} {events.fingerprint()}")


def _results(
    inputs: _Inputs,
    recipe: EventRecipe,
    options: EventOptions,
    out: Path,
    device: torch.device,
    progress: Progress,
) -> list[Result]:
    """The rows of one protocol."""
    began = time.monotonic()
    found = _measured(inputs.events, recipe, options, out, device, progress)
    seconds = time.monotonic() - began + inputs.seconds  # every protocol needs the features
    before: dict[str, Summary] = {}
    if inputs.untrained is inputs.events:
        before = found
    elif inputs.untrained is not None:
        before = _measured(inputs.untrained, recipe, options, out, device, within(progress, "untrained"))
    settings = (*inputs.settings, *_settings(inputs.events, recipe, options))
    return [
        Result(
            task=AVE_TASK,
            protocol=recipe.name,
            modality="both",
            metric=metric,
            value=summary.value,
            untrained=before[metric].value if metric in before else None,
            chance=summary.chance,
            count=summary.count,
            version=recipe.version,
            windows=SECONDS,
            crops=1,
            low=summary.low,
            high=summary.high,
            by_split={f"seed {seed}": value for seed, value in zip(options.seeds, summary.by_split, strict=True)},
            settings=settings,
            seconds=round(seconds, 1),
        )
        for metric, summary in found.items()
    ]


def _measured(
    events: EventSet, recipe: EventRecipe, options: EventOptions, out: Path, device: torch.device, progress: Progress
) -> dict[str, Summary]:
    """The metrics of one protocol over the seeds."""
    predicted = []
    for seed in options.seeds:
        training = dataclasses.replace(recipe.training, seed=seed, epochs=options.epochs or recipe.training.epochs)
        where = within(progress, f"{AVE_TASK}, {recipe.name}, seed {seed}")
        folder = _states(out, events) / f"{recipe.name}-seed-{seed}"
        predicted.append(_predicted(events, recipe, training, folder, device, where))
    return summaries(predicted, events.labels("test"), events.data.background, events.videos("test"))


def _predicted(
    events: EventSet, recipe: EventRecipe, training: FitConfig, folder: Path, device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    """Train a head; its predictions for the test part."""
    items = events.items
    train = [*events.split("train"), *(events.background if recipe.is_weak else ())]
    first = items.rows(train[:1])
    widths = (first["video"].shape[-1], first["audio"].shape[-1])
    head = seeded_head(lambda: recipe.build(*widths, events.data.background), training.seed)
    if isinstance(head, EventLinear):
        items = events.pooled
        head.standardise(items.rows(train))
    head.to(device)
    validation = events.split("validation")
    fitted = fit(head, items, train, validation, _accuracy, training, folder=folder, progress=progress)
    return predictions(head, items, events.split("test"), fitted.progress, training.batch_size)


def _accuracy(predicted: dict[str, Tensor], rows: Rows) -> float:
    return segment_accuracy(predicted["classes"], rows["labels"])


def _settings(events: EventSet, recipe: EventRecipe, options: EventOptions) -> list[str]:
    """Departures from the recipe, and what of the data numbers cannot be read without."""
    facts = events.data.facts
    told = []
    if options.epochs not in (None, recipe.training.epochs):
        told.append(f"epochs={options.epochs}")
    # The most that a method can reach that never says background.
    ceiling = float((events.labels("test") != events.data.background).double().mean())
    told.append(f"ceiling={100 * ceiling:.1f} %")
    if not facts.published_order:
        told.append("annotations=not as published")
    elif not facts.official and not _data_facts(events).is_partial:
        told.append("lists=not as published")
    if options.drop_leaks:
        told.append(f"dropped training rows={facts.dropped_rows}")
    elif facts.leaks["test"]:
        told.append(f"leaks={facts.leaks['test']}")
    if not events.split("validation"):
        told.append("epoch=last")
    if facts.untrained_classes:
        told.append(f"untrained classes={facts.untrained_classes}")
    if recipe.is_weak:
        told.append(f"training videos without events={len(events.background)}")
    return told
