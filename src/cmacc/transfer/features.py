"""A manifest's files to features: frozen encoders over evenly spread windows, without augmentation.

Features are extracted once: `embed` keeps them under a hash of weights, settings, files and windows, so that a second
protocol on the same features, or a run that was stopped, does not decode anything again.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
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
from cmacc.pretraining import code_version
from cmacc.transfer.encoder import ClipEncoder, EncoderError, MatchingEncoder, Modality
from cmacc.transfer.protocols import unit_rows

log = logging.getLogger("cmacc")

_BATCH_SIZE = 32
_CACHE_FORMAT = 2


@dataclass(frozen=True)
class Features:
    """Features of n files, W windows each.

    Attributes
    ----------
    sample_ids
        ``(n,)`` int64 rows of the manifest: the files of which every window decoded.
    start_seconds
        ``(n, W)`` start of each window in its file.
    by_modality
        ``(n, W, f)`` features, which probes use; of the modalities asked for.
    matched
        ``(n, W, d)``: in the space in which picture and sound are compared. Empty for encoders without such a space.
    failures
        ``{sample id: reason}`` of the other files.
    """

    sample_ids: NDArray[np.int64]
    start_seconds: NDArray[np.float64]
    by_modality: dict[Modality, NDArray[np.float32]]
    matched: dict[Modality, NDArray[np.float32]]
    failures: dict[int, str]

    def matched_by_file(self) -> dict[Modality, NDArray[np.float32]]:
        """``(n, d)``: `matched` averaged over each file's windows, of length one."""
        return {modality: unit_rows(rows.mean(1)) for modality, rows in self.matched.items()}

    @property
    def windows(self) -> int:
        """W."""
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
    """Encode files.

    Parameters
    ----------
    encoder
        Its ``spec`` says which clips are cut; its device is where the work is done.
    manifest, sample_ids
        Which files, in which order.
    modalities
        What to encode of them.
    windows
        W, windows spread evenly over each file. Where a file is no longer than one window they coincide, and are
        decoded once.
    workers
        Decoding processes.
    cache
        Folder in which features are kept and looked for. Only an encoder that is a `torch.nn.Module` has a hash, and
        only files whose content is known by a hash; others are encoded each time.
    progress
        Called with ("embed", windows done, windows in all).

    Raises
    ------
    EncoderError
        The encoder lacks a modality, or gives features of a wrong shape or that are not finite.
    """
    for modality in modalities:
        if modality not in encoder.modalities:
            raise EncoderError(f"encoder {type(encoder).__name__}: must encode {modality}, got {encoder.modalities}")
    place = None
    if cache is not None and isinstance(encoder, nn.Module):
        key = _cache_key(encoder, manifest, sample_ids, modalities, windows)
        place = None if key is None else cache / "features" / f"{key}.safetensors"
    if place is not None and (kept := _read(place)) is not None:
        # Kept by the files' contents: in another manifest they may stand in other rows.
        return dataclasses.replace(kept, sample_ids=np.asarray(sample_ids, np.int64))
    features = _embedded(encoder, manifest, sample_ids, modalities, windows, workers, progress)
    if place is not None and not features.failures:  # a fault of a disk or network must not be kept
        try:
            _write(place, features)
        except OSError as error:
            log.warning("features are not kept: %s", error)
    return features


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
    matched: dict[Modality, list[NDArray[np.float32]]] = {m: [] for m in modalities if _matches(encoder)}
    done = 0
    for batch in loader:
        failures |= batch.failures
        done += len(batch.sample_ids) + len(batch.failures)
        if len(batch.sample_ids):
            ids += batch.sample_ids.tolist()
            for modality in modalities:
                rows = encode(encoder, modality, batch)
                features[modality].append(rows.float().cpu().numpy())
                if modality in matched:
                    matched[modality].append(_match(encoder, modality, rows).float().cpu().numpy())
        progress("embed", min(done, len(requests)), len(requests))
    # A file of which one window fails is skipped whole: an average over fewer windows is another thing.
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
        matched={modality: _gathered(rows, places) for modality, rows in matched.items()},
        failures=failures,
    )


def spec_for(spec: ClipSpec, modalities: Sequence[Modality]) -> ClipSpec:
    """The clips to decode for some modalities: for sounds alone one frame, over the same window, instead of all.

    Decoding pictures that nobody looks at costs more than the sound.
    """
    if "video" in modalities:
        return spec
    return dataclasses.replace(spec, frame_count=1, frame_rate_hz=spec.frame_rate_hz / spec.frame_count)


def encode(encoder: ClipEncoder, modality: Modality, batch: ClipBatch) -> Tensor:
    """Features of a batch, ``(M, f)``.

    Raises
    ------
    EncoderError
        The encoder gives another shape.
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


def weights_hash(encoder: nn.Module) -> str:
    """Sixteen hex digits that change with every weight and statistic of the encoder, and with its settings.

    Settings are what its modules hold as numbers, texts, dataclasses and the like; code is not seen, nor is what other
    objects hold.
    """
    digest = hashlib.sha256()
    for name, module in encoder.named_modules():
        settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        # Buffers that are not saved count too: filters of a spectrogram, means of pixels.
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        tensors |= {key: value for key, value in settings.items() if isinstance(value, Tensor)}
        plain = {key: repr(value) for key, value in settings.items() if not isinstance(value, Tensor)}
        # A repr with an address in it is of an object that says nothing of itself, and another one at each start.
        plain = {key: text for key, text in sorted(plain.items()) if " at 0x" not in text}
        digest.update(json.dumps([name, type(module).__qualname__, module.extra_repr(), plain]).encode())
        for key, tensor in sorted(tensors.items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            values = tensor.detach().cpu().contiguous()
            digest.update(values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()[:16]


def _matches(encoder: ClipEncoder) -> bool:
    return isinstance(encoder, MatchingEncoder)


def _match(encoder: ClipEncoder, modality: Modality, features: Tensor) -> Tensor:
    assert isinstance(encoder, MatchingEncoder)
    return encoder.match_video(features) if modality == "video" else encoder.match_audio(features)


def _places(
    wanted: list[ClipRequest], requests: list[ClipRequest], ids: list[int], failures: dict[int, str], windows: int
) -> NDArray[np.int64]:
    """``(n, W)``: where the embedded row of every wanted window stands; several where windows coincide."""
    # The loader keeps the order of requests and leaves failed ones out; of a file that failed some may have decoded.
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
    # The sources too: a version's number stays the same while its code is worked on.
    code = code_version("clips", "encoders", "transfer")
    versions = [code, *(version(name) for name in ("cmacc", "torch", "torchvision", "av"))]
    what = [_CACHE_FORMAT, versions, weights_hash(encoder), spec, list(modalities), windows, files]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _write(path: Path, features: Features) -> None:
    tensors: dict[str, NDArray[Any]] = {"sample_ids": features.sample_ids, "start_seconds": features.start_seconds}
    for modality, rows in features.by_modality.items():
        tensors[f"features.{modality}"] = rows
    for modality, rows in features.matched.items():
        tensors[f"matched.{modality}"] = rows
    with written_aside(path) as aside:
        save_file(tensors, aside)


def _read(path: Path) -> Features | None:
    """What `_write` wrote; None where there is none, or a broken one, which is then made again."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Features(
            tensors["sample_ids"],
            tensors["start_seconds"],
            {m: tensors[f"features.{m}"] for m in get_args(Modality) if f"features.{m}" in tensors},
            {m: tensors[f"matched.{m}"] for m in get_args(Modality) if f"matched.{m}" in tensors},
            {},
        )
    except (OSError, SafetensorError, KeyError):
        return None
