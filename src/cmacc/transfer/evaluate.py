"""From an encoder and a manifest to a result card: embed, measure, and the same for the untrained encoders."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.numpy import save_file

from cmacc.clips import Manifest
from cmacc.clips.storage import written_aside
from cmacc.transfer.card import Card, Provenance, Result, kept_results
from cmacc.transfer.encoder import EncoderSource, open_encoder
from cmacc.transfer.features import Features, embed
from cmacc.transfer.tasks import TaskError, TaskName, build_task

Progress = Callable[[str, int, int], None]


def evaluate(
    encoder: str,
    tasks: Sequence[TaskName],
    data: Path,
    out: Path,
    *,
    windows_per_file: int = 1,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Card, dict[str, str]]:
    """Measure an encoder and write ``card.json`` (and for task ``pairs`` ``embeddings.safetensors``) into ``out``.

    Parameters
    ----------
    encoder
        A run folder, or ``random``.
    tasks
        Which tasks.
    data
        Manifest.
    out
        Folder; a card there on the same encoder and data keeps its other tasks' results.
    windows_per_file
        Windows averaged per file.
    workers
        Decoding processes.
    overwrite
        Whether results that are there may be lost.
    progress
        Called with (what is being embedded, windows done, windows in all).

    Returns
    -------
    Card, dict
        The card as written, and ``{path: reason}`` of files that did not decode and were left out.

    Raises
    ------
    ConfigError, CheckpointError, ManifestError, TaskError, CardError
        The encoder or the data cannot be used, or ``out`` holds results that would be lost.
    """
    manifest = Manifest.read(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_encoder(encoder, device)
    provenance = Provenance.now(
        encoder, source.step, data, manifest.fingerprint(), source.config.seed, windows_per_file, device
    )
    card_path = out / "card.json"
    # Asked before the work: an hour of embedding must not end in "choose another --out".
    kept = kept_results(card_path, provenance, tasks, overwrite=overwrite)
    results: list[Result] = []
    bad_files: dict[str, str] = {}
    pairs: Features | None = None
    for name in tasks:
        task = build_task(name)
        ids = task.sample_ids(manifest)
        trained, failures = _embed(source, True, manifest, ids, windows_per_file, workers, name, progress)
        bad_files |= {str(manifest.records[i].path): reason for i, reason in failures.items()}
        if len(trained.sample_ids) < 2:
            raise TaskError(
                f"task {name}: at least 2 of the {len(ids)} files of {data} must decode, "
                f"got {len(trained.sample_ids)}; the first fault is {next(iter(bad_files.values()))}"
            )
        measured = task.measure(manifest, trained)
        if source.trained is source.untrained:
            baseline = measured
        else:
            untrained, _ = _embed(source, False, manifest, ids, windows_per_file, workers, name, progress)
            baseline = task.measure(manifest, untrained)
        results += [
            Result(
                name,
                o.protocol,
                o.modality,
                o.metric.name,
                o.metric.value,
                b.metric.value,
                o.metric.chance,
                o.metric.count,
            )
            for o, b in zip(measured, baseline, strict=True)
        ]
        pairs = trained if name == "pairs" else pairs
    card = Card((*kept, *results), provenance)
    out.mkdir(parents=True, exist_ok=True)
    if pairs is not None:
        _write_embeddings(pairs, out / "embeddings.safetensors")
    card.write(card_path)
    return card, bad_files


def _embed(
    source: EncoderSource,
    trained: bool,
    manifest: Manifest,
    ids: Sequence[int],
    windows_per_file: int,
    workers: int,
    task: str,
    progress: Progress | None,
) -> tuple[Features, dict[int, str]]:
    what = f"{task}, {'trained' if trained else 'untrained'}"

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    return embed(
        source.trained if trained else source.untrained,
        manifest,
        ids,
        source.config,
        windows_per_file=windows_per_file,
        workers=workers,
        progress=report,
    )


def _write_embeddings(features: Features, path: Path) -> None:
    with written_aside(path) as aside:
        save_file(
            {
                "video": features.video_embedding,
                "audio": features.audio_embedding,
                "sample_ids": features.sample_ids,
                "start_seconds": features.start_seconds,
            },
            aside,
        )
