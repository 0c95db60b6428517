"""Extract features of files with a frozen encoder, from evenly spread windows without augmentation.

Features are extracted once: `embed` caches them under a hash of weights, settings, files and windows. A second protocol
on the same features, or an evaluation that was interrupted, does not decode the files again.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from cmacc.clips import ClipBatch, ClipSpec, Manifest, evaluation_loader, evaluation_requests
from cmacc.clips.loading.plan import ClipRequest
from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import written_aside
from cmacc.encoders.training import hash_tensors
from cmacc.pretraining.clip_encoder import (
    ClipEncoder,
    EncoderError,
    HeadedEncoder,
    MatchingEncoder,
    Modality,
    ProjectedEncoder,
)
from cmacc.pretraining.provenance import code_version

log = logging.getLogger("cmacc")

_BATCH_SIZE = 32
_CACHE_FORMAT = 3
_ROWS_AT_ONCE = 4096
# Libraries that features depend on; those of towers may be missing.
_VERSIONED = (
    "cmacc", "torch", "torchvision", "av", "soxr", "timm", "transformers", "onnxruntime", "efficientnet-lite-pytorch"
)  # fmt: skip


@dataclass(frozen=True)
class Features:
    """Features of n files, with W windows each.

    Attributes
    ----------
    sample_ids
        ``(n,)`` int64: manifest rows of the files whose windows all decoded.
    start_seconds
        ``(n, W)``: start of each window in its file.
    by_modality
        ``(n, W, f)``: features for probes, for each requested modality.
    matched
        ``(n, W, d)``: embeddings in the shared space of video and audio. Empty for encoders without such a space.
    failures
        ``{sample id: reason}`` of the other files.
    unprojected
        ``(n, W, g)``: what the towers of a `ProjectedEncoder` give before the projection. Empty for other encoders.
    """

    sample_ids: NDArray[np.int64]
    start_seconds: NDArray[np.float64]
    by_modality: dict[Modality, NDArray[np.float32]]
    matched: dict[Modality, NDArray[np.float32]]
    failures: dict[int, str]
    unprojected: dict[Modality, NDArray[np.float32]] = dataclasses.field(default_factory=dict)

    def matched_by_file(self) -> dict[Modality, NDArray[np.float32]]:
        """``(n, d)``: `matched` averaged over the windows of each file, with unit length."""
        return {modality: unit_rows(rows.mean(1)).astype(np.float32) for modality, rows in self.matched.items()}

    @property
    def windows(self) -> int:
        """W, the number of windows per file."""
        return int(next(iter(self.by_modality.values())).shape[1])


def embed(
    encoder: ClipEncoder,
    manifest: Manifest,
    sample_ids: Sequence[int],
    modalities: Sequence[Modality],
    *,
    windows: int = 1,
    workers: int = 0,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Features:
    """Extract features of files.

    Parameters
    ----------
    encoder
        Its ``spec`` defines the clips; its device runs the computation.
    manifest, sample_ids
        The files, in this order.
    modalities
        Modalities to encode.
    windows
        W, the number of windows spread evenly over each file. If a file is no longer than one window, its windows
        coincide and are decoded once.
    workers
        Number of decoding processes.
    cache
        Folder of cached features. The cache needs an encoder that is a `torch.nn.Module`, and files with a content
        hash; others are encoded every time. Files that failed are tried again.
    progress
        Called with ("embed", windows done, total windows).

    Raises
    ------
    EncoderError
        The encoder lacks a modality, or returns features of a wrong shape or that are not finite.
    """
    for modality in modalities:
        if modality not in encoder.modalities:
            raise EncoderError(f"encoder {type(encoder).__name__}: must encode {modality}, got {encoder.modalities}")
    source, project = encoder, None
    if isinstance(encoder, HeadedEncoder):
        # Without its heads, an encoder has the same features before and after they are trained.
        source = encoder.backbones
    elif isinstance(encoder, ProjectedEncoder) and list(modalities) == ["audio"] and encoder.unprojected is not None:
        source, project = encoder.unprojected, encoder.project_audio
    place = None
    if cache is not None and isinstance(source, nn.Module):
        key = _cache_key(source, manifest, sample_ids, modalities, windows)
        place = None if key is None else cache / "features" / f"{key}.safetensors"
    kept = _read(place, sample_ids) if place is not None else None
    if kept is None:
        features = _embedded(source, manifest, sample_ids, modalities, windows, workers, progress)
    elif missing := sorted(set(sample_ids) - set(kept.sample_ids.tolist())):  # those that failed before
        again = _embedded(source, manifest, missing, modalities, windows, workers, progress)
        features = _joined(kept, again, sample_ids)
    else:
        features = kept
    if place is not None and len(features.sample_ids) > (0 if kept is None else len(kept.sample_ids)):
        try:
            _write(place, features, sample_ids)
        except OSError as error:
            log.warning("features are not kept: %s", error)
    if project is not None:
        rows = _checked(encoder, "audio", _mapped(project, encoder.device, features.by_modality["audio"]))
        features = dataclasses.replace(features, unprojected=features.by_modality, by_modality={"audio": rows})
    return _matched(encoder, features) if isinstance(encoder, MatchingEncoder) else features


@torch.inference_mode()
def _embedded(
    encoder: ClipEncoder,
    manifest: Manifest,
    sample_ids: Sequence[int],
    modalities: Sequence[Modality],
    windows: int,
    workers: int,
    progress: Progress,
) -> Features:
    wanted = evaluation_requests(manifest, sample_ids, encoder.spec.length_seconds, windows)
    requests = list(dict.fromkeys(wanted))
    spec = spec_for(encoder.spec, modalities)
    loader = evaluation_loader(manifest, requests, spec, batch_size=_BATCH_SIZE, workers=workers)
    failures: dict[int, str] = {}
    ids: list[int] = []
    features: dict[Modality, list[NDArray[np.float32]]] = {modality: [] for modality in modalities}
    done = 0
    for batch in loader:
        failures |= batch.failures
        done += len(batch.sample_ids) + len(batch.failures)
        if len(batch.sample_ids):
            ids += batch.sample_ids.tolist()
            for modality in modalities:
                features[modality].append(encode(encoder, modality, batch).float().cpu().numpy())
        progress("embed", min(done, len(requests)), len(requests))
    # Skip a file if any of its windows fails: an average over fewer windows is not comparable.
    kept = [i for i in sample_ids if i not in failures]
    places = _places(wanted, requests, ids, failures, windows)
    return Features(
        sample_ids=np.asarray(kept, np.int64),
        start_seconds=np.asarray(
            [request.start_seconds for request in wanted if request.sample_id not in failures]
        ).reshape(-1, windows),
        by_modality={
            modality: _checked(encoder, modality, _gathered(rows, places)) for modality, rows in features.items()
        },
        matched={},
        failures=failures,
    )


def spec_for(spec: ClipSpec, modalities: Sequence[Modality]) -> ClipSpec:
    """The clips to decode for some modalities: for audio only, one frame over the same window instead of all.

    Decoding unused frames would cost more than decoding the audio.
    """
    if "video" in modalities:
        return spec
    return dataclasses.replace(spec, frame_count=1, frame_rate_hz=spec.frame_rate_hz / spec.frame_count)


def encode(encoder: ClipEncoder, modality: Modality, batch: ClipBatch) -> Tensor:
    """Features of a batch, ``(M, f)``.

    Raises
    ------
    EncoderError
        The encoder returns another shape.
    """
    if modality == "video":
        rows = encoder.embed_video(batch.frames.to(encoder.device, non_blocking=True))
    else:
        rows = encoder.embed_audio(batch.waveforms.to(encoder.device, non_blocking=True))
    if rows.ndim != 2 or len(rows) != len(batch.sample_ids):
        raise EncoderError(
            f"encoder {type(encoder).__name__}: embed_{modality} must give a row for each of {len(batch.sample_ids)} "
            f"clips, got shape {tuple(rows.shape)}"
        )
    return rows


def match(encoder: MatchingEncoder, modality: Modality, features: Tensor) -> Tensor:
    """Features of a modality, projected into the space that video and audio share, ``(M, d)``."""
    return encoder.match_video(features) if modality == "video" else encoder.match_audio(features)


def weights_hash(encoder: nn.Module) -> str:
    """Hash of the weights, buffers and settings of the encoder, sixteen hex digits.

    Settings are attributes of its modules: numbers, strings, dataclasses and the like. The hash covers neither code nor
    the contents of other objects.
    """
    digest = hashlib.sha256()
    for name, module in encoder.named_modules():
        settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        # Includes buffers that are not saved, such as spectrogram filters and pixel means.
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        tensors |= {key: value for key, value in settings.items() if isinstance(value, Tensor)}
        plain = {key: repr(value) for key, value in settings.items() if not isinstance(value, Tensor)}
        # Skip default reprs: they contain an address, which differs between processes.
        plain = {key: text for key, text in sorted(plain.items()) if " at 0x" not in text}
        digest.update(json.dumps([name, type(module).__qualname__, module.extra_repr(), plain]).encode())
        hash_tensors(digest, tensors)
    return digest.hexdigest()[:16]


def unit_rows(rows: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Normalise rows to unit length, shape (n, width); rows of zeros stay zero."""
    exact = rows.astype(np.float64)
    return np.asarray(exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12), np.float64)


def _matched(encoder: MatchingEncoder, features: Features) -> Features:
    """The features with their projections into the common space."""
    matched = {
        modality: _mapped(partial(match, encoder, modality), encoder.device, rows)
        for modality, rows in features.by_modality.items()
    }
    return dataclasses.replace(features, matched=matched)


@torch.inference_mode()
def _mapped(
    function: Callable[[Tensor], Tensor], device: torch.device, rows: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A function of rows ``(n, f)``, of the windows of files ``(n, W, f)``."""
    if len(rows) == 0:
        return rows
    flat = torch.from_numpy(rows).flatten(0, 1)
    parts = [function(part.to(device)).float().cpu() for part in flat.split(_ROWS_AT_ONCE)]
    return np.asarray(torch.cat(parts).unflatten(0, rows.shape[:2]).numpy())


def _joined(first: Features, second: Features, sample_ids: Sequence[int]) -> Features:
    """Both, in the order of ``sample_ids``."""
    ids = np.concatenate([first.sample_ids, second.sample_ids])
    place_of = {sample_id: place for place, sample_id in enumerate(sample_ids)}
    order = np.argsort([place_of[sample_id] for sample_id in ids.tolist()])
    by_modality = {
        modality: np.concatenate([rows, second.by_modality[modality]])[order] if len(second.sample_ids) else rows
        for modality, rows in first.by_modality.items()
    }
    starts = np.concatenate([first.start_seconds, second.start_seconds])[order]
    return Features(ids[order], starts, by_modality, {}, second.failures)


def _places(
    wanted: list[ClipRequest], requests: list[ClipRequest], ids: list[int], failures: dict[int, str], windows: int
) -> NDArray[np.int64]:
    """``(n, W)``: row number of the embedding of every window; coinciding windows share a row."""
    # The loader keeps the order of requests and drops failed ones. Some windows of a failed file may have decoded.
    row_of: dict[ClipRequest, int] = {}
    row = 0
    for request in requests:
        if row < len(ids) and ids[row] == request.sample_id:
            row_of[request] = row
            row += 1
    rows = [row_of[request] for request in wanted if request.sample_id not in failures]
    return np.asarray(rows, np.int64).reshape(-1, windows)


def _gathered(batches: list[NDArray[np.float32]], places: NDArray[np.int64]) -> NDArray[np.float32]:
    if not batches or not len(places):
        return np.zeros((0, places.shape[1], 0), np.float32)
    return np.concatenate(batches)[places]


def _checked(encoder: ClipEncoder, modality: Modality, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = int((~np.isfinite(rows)).any(axis=(1, 2)).sum())
    if bad:
        raise EncoderError(
            f"encoder {type(encoder).__name__}: features of {modality} must be finite, got NaN or infinity in those of "
            f"{bad} of {len(rows)} files"
        )
    return rows


def _cache_key(
    encoder: nn.Module, manifest: Manifest, sample_ids: Sequence[int], modalities: Sequence[Modality], windows: int
) -> str | None:
    names = ("content_hash", "start_seconds", "duration_seconds", "video_offset", "audio_offset")
    columns = [manifest.column(name) for name in names]
    files = [[column[i] for column in columns] for i in sample_ids]
    if any(file[0] is None for file in files):
        return None
    spec = dataclasses.asdict(encoder.spec)  # type: ignore[call-overload]
    # Hash the source code too: the version number does not change during development.
    code = code_version("clips", "encoders", "pretraining", "transfer")
    versions = [code, *(f"{name} {installed}" for name in _VERSIONED if (installed := _version(name)))]
    what = [_CACHE_FORMAT, versions, weights_hash(encoder), spec, list(modalities), windows, files]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(path: Path, features: Features, sample_ids: Sequence[int]) -> None:
    # Places among the files of the key, which has their contents: in another manifest they have other row numbers.
    places = np.flatnonzero(np.isin(np.asarray(sample_ids), features.sample_ids))
    tensors: dict[str, NDArray[Any]] = {"places": places, "start_seconds": features.start_seconds}
    for modality, rows in features.by_modality.items():
        tensors[f"features.{modality}"] = rows
    with written_aside(path) as aside:
        save_file(tensors, aside)


def _read(path: Path, sample_ids: Sequence[int]) -> Features | None:
    """Read cached features of these files, or of those among them that decoded; None if there are none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Features(
            np.asarray(sample_ids, np.int64)[tensors["places"]],
            tensors["start_seconds"],
            {m: tensors[f"features.{m}"] for m in get_args(Modality) if f"features.{m}" in tensors},
            {},
            {},
        )
    except (OSError, SafetensorError, KeyError):
        return None
