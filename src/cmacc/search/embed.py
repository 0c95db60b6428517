"""Encode the windows of whole samples: video and audio, overlapping, in batches; rows for the table of an index."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cmacc.clips import ClipBatch, CoveringPlan, Manifest, MediaRecord, covering_loader, covering_starts
from cmacc.clips.parallel import results_of
from cmacc.clips.progress import Progress, silent
from cmacc.encoders import MODALITIES
from cmacc.pretraining import autocast_dtype, default_device
from cmacc.pretraining.clip_encoder import MatchingEncoder, Modality
from cmacc.pretraining.features import encode, match
from cmacc.search.table import Description, SearchError, table_schema, vector_column
from cmacc.transfer import open_encoder

_BATCH_SIZE = 32
_SAMPLES_PER_TASK = 16
_NO_CONTENT = "file "


@dataclass(frozen=True)
class EmbeddedSamples:
    """Some samples that are done.

    Attributes
    ----------
    rows
        Rows of the table, of whole samples.
    sample_ids
        Rows in the manifest of the samples.
    failures
        ``{sample id: reason}`` of samples that did not decode.
    """

    rows: pa.Table
    sample_ids: tuple[int, ...]
    failures: dict[int, str]


def embedded_here(
    encoder: MatchingEncoder,
    manifest: Manifest,
    description: Description,
    sample_ids: Sequence[int],
    *,
    workers: int = 0,
    progress: Progress = silent,
) -> Iterator[EmbeddedSamples]:
    """Embed samples with this process's encoder, in order.

    Parameters
    ----------
    encoder
        The encoder; its device runs the computation, in bf16 where it has units for it.
    manifest, sample_ids
        The samples.
    description
        Of the index, for the distance of windows and the root of paths.
    workers
        Number of decoding processes.
    progress
        Called with ("windows", done, total).
    """
    length, hop = description.window_seconds, description.hop_seconds
    plan = CoveringPlan(manifest, sample_ids, length, hop, _BATCH_SIZE)
    total = sum(plan.counts.values())
    # LanceDB has threads in this process, which a fork would not survive.
    loader = covering_loader(plan, encoder.spec, workers=workers, start_method="spawn")
    pending: dict[int, list[dict[str, NDArray[np.float16]]]] = {}  # vectors of samples that are not complete
    failed: set[int] = set()
    done = 0
    progress("windows", done, total)
    for requests, batch in zip(plan, loader, strict=True):
        failed |= batch.failures.keys()
        vectors = _encode(encoder, batch, description) if len(batch.sample_ids) else {}
        tables: list[pa.Table] = [table_schema(description).empty_table()]
        ids: list[int] = []
        failures = dict(batch.failures)
        for sample_id, rows in _by_sample(batch.sample_ids):
            if sample_id in failed:
                continue
            parts = pending.setdefault(sample_id, [])
            parts.append({name: column[rows] for name, column in vectors.items()})
            if sum(len(part["vector.video"]) for part in parts) == plan.counts[sample_id]:
                columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                del pending[sample_id]
                if all(np.isfinite(column).all() for column in columns.values()):
                    tables.append(_rows(manifest.records[sample_id], columns, description))
                    ids.append(sample_id)
                else:
                    failures[sample_id] = "the encoder's vectors must be finite, got NaN or infinity"
        for sample_id in batch.failures:
            pending.pop(sample_id, None)
        done += len(requests)
        progress("windows", done, total)
        if ids or failures:
            yield EmbeddedSamples(pa.concat_tables(tables), tuple(ids), failures)


def embedded_elsewhere(
    executor: Executor,
    manifest: Manifest,
    description: Description,
    sample_ids: Sequence[int],
    *,
    progress: Progress = silent,
) -> Iterator[EmbeddedSamples]:
    """The same on the workers of an executor, which open the encoder by its name, in the order of completion.

    Raises
    ------
    SearchError
        A worker's encoder has other weights.
    """
    done = 0
    tasks = [tuple(sample_ids[i : i + _SAMPLES_PER_TASK]) for i in range(0, len(sample_ids), _SAMPLES_PER_TASK)]
    parts = ((task, Manifest.of_table(manifest.table.take(pa.array(task))), description) for task in tasks)
    progress("samples", 0, len(sample_ids))
    for (task, _, _), (rows, own_ids, failures) in results_of(executor, _embed_task, parts):
        done += len(task)
        progress("samples", done, len(sample_ids))
        # What comes over a network may begin at any byte, and LanceDB panics unless numbers are aligned. `take` copies.
        rows = rows.take(pa.array(np.arange(len(rows))))
        yield EmbeddedSamples(rows, tuple(task[i] for i in own_ids), {task[i]: why for i, why in failures.items()})


def _embed_task(
    task: tuple[tuple[int, ...], Manifest, Description],
) -> tuple[pa.Table, list[int], dict[int, str]]:
    """Embed all samples of a manifest in a worker; sample ids are rows of that manifest."""
    _, manifest, description = task
    encoder, weights = _encoder_of_worker(description.encoder)
    if weights != description.weights:
        raise SearchError(
            f"embed: {description.encoder} must have weights {description.weights} on every worker, got {weights}"
        )
    done = list(embedded_here(encoder, manifest, description, range(len(manifest))))
    rows = pa.concat_tables([table_schema(description).empty_table(), *(some.rows for some in done)])
    failures = {i: why for some in done for i, why in some.failures.items()}
    return rows, [i for some in done for i in some.sample_ids], failures


@lru_cache(maxsize=1)
def _encoder_of_worker(name: str) -> tuple[MatchingEncoder, str]:
    opened = open_encoder(name, default_device())
    assert isinstance(opened.encoder, MatchingEncoder), "others are refused before there are tasks"
    return opened.encoder, opened.facts.weights


@torch.inference_mode()
def sizes_of(encoder: MatchingEncoder) -> dict[Modality, tuple[int, int]]:
    """Widths of the features and of the embeddings of each modality."""
    spec, device = encoder.spec, encoder.device
    frames = torch.zeros(1, spec.frame_count, spec.frame_height, spec.frame_width, 3, dtype=torch.uint8, device=device)
    video, audio = encoder.embed_video(frames), encoder.embed_audio(torch.zeros(1, spec.sample_count, device=device))
    return {
        "video": (video.shape[1], encoder.match_video(video).shape[1]),
        "audio": (audio.shape[1], encoder.match_audio(audio).shape[1]),
    }


@torch.inference_mode()
def _encode(encoder: MatchingEncoder, batch: ClipBatch, description: Description) -> dict[str, NDArray[np.float16]]:
    """``vector.video``, ``vector.audio`` and what text is compared with, in float16."""
    kind = encoder.device.type
    dtype = autocast_dtype("auto", encoder.device)
    columns: dict[str, NDArray[np.float16]] = {}
    for modality in MODALITIES:
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            features = encode(encoder, modality, batch)
        columns[f"vector.{modality}"] = _half(match(encoder, modality, features))
        if modality in description.text_sizes:
            columns[vector_column(modality, "text")] = _half(features)
    return columns


def _half(vectors: Float[Tensor, "batch dim"]) -> NDArray[np.float16]:
    return np.asarray(functional.normalize(vectors.float(), dim=1).cpu().numpy(), np.float16)


def _by_sample(sample_ids: Tensor) -> Iterator[tuple[int, slice]]:
    """The runs of equal sample ids in a batch."""
    ids = sample_ids.tolist()
    begin = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[begin]:
            yield ids[begin], slice(begin, place)
            begin = place


def _rows(record: MediaRecord, columns: dict[str, NDArray[np.float16]], description: Description) -> pa.Table:
    """The rows of a sample: its windows, for each modality that it has."""
    schema = table_schema(description)
    length = description.window_seconds
    starts = np.array(covering_starts(record.duration_seconds, length, description.hop_seconds)) + record.start_seconds
    count = len(starts)
    present: list[Modality] = [m for m in MODALITIES if (record.has_picture if m == "video" else record.has_audio)]
    tables = []
    for modality in present:
        facts = {
            "path": [description.relative(str(record.path))] * count,
            "key": pa.nulls(count, pa.string()) if record.key is None else [record.key] * count,
            "sample_start_seconds": [record.start_seconds] * count,
            "sample_end_seconds": [record.start_seconds + record.duration_seconds] * count,
            "start_seconds": starts,
            "end_seconds": starts + length,
            "modality": [modality] * count,
            "label": pa.nulls(count, pa.string()) if record.label is None else [record.label] * count,
            "content_hash": [content_hash(record)] * count,
            "weights": [description.weights] * count,
            "vector": _list_array(columns[f"vector.{modality}"]),
        }
        for other, size in description.text_sizes.items():
            column = vector_column(other, "text")
            facts[column] = (
                _list_array(columns[column]) if other == modality else pa.nulls(count, pa.list_(pa.float16(), size))
            )
        tables.append(pa.table(facts, schema=schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def content_hash(record: MediaRecord) -> str | None:
    """What changes with the content of a file: the manifest's hash; without one, its path, size and time."""
    if record.content_hash is not None or isinstance(record.path, str):
        return record.content_hash
    try:
        status = record.path.stat()
    except OSError:  # it will not decode either
        return f"{_NO_CONTENT}{record.path}"
    return f"{_NO_CONTENT}{record.path} {status.st_size} {status.st_mtime_ns}"


def is_content(text: str) -> bool:
    """Whether it is the hash of a content, which is the same in another place."""
    return not text.startswith(_NO_CONTENT)


def _list_array(rows: NDArray[np.float16]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
