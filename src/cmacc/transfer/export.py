"""A run as a folder to hand on: weights, settings, a model card, and if wanted ONNX graphs.

The folder holds the query encoders alone, a fraction of a checkpoint: without optimiser, key encoders and dictionaries
it cannot be trained on, and knows nothing of the files that it was trained on but a fingerprint. It can be uploaded to
the Hugging Face hub as it is. Nothing in it is unpickled: safetensors, JSON, Markdown, ONNX.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cmacc.clips import ClipSpec
from cmacc.clips.storage import fsync_tree
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.pretraining import (
    PretrainConfig,
    last_checkpoint,
    load_encoder,
    read_config,
    read_provenance,
    to_plain,
)
from cmacc.pretraining.config import SETTINGS_BEFORE
from cmacc.pretraining.reading import UnfitError, dataclass_of, value_of
from cmacc.transfer.adapters import CmaccEncoder
from cmacc.transfer.encoder import Modality
from cmacc.transfer.model_card import model_card
from cmacc.transfer.onnx import TOLERANCE, EncoderGraph, ExportError, from_extra, write_graph

__all__ = [
    "ExportError",
    "Exported",
    "ExportedEncoder",
    "export_run",
    "is_export",
    "push",
    "read_export",
]

_LIBRARY, _FORMAT = "cmacc", 1
_GRAPHS: dict[Modality, str] = {"video": "video.onnx", "audio": "audio.onnx"}
# Nothing else is ever written, read, replaced or uploaded.
_NAMES = ("config.json", "model.safetensors", "README.md", *_GRAPHS.values())


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    folder
        The export.
    step
        Training steps behind the weights.
    weights
        SHA-256 of ``model.safetensors``, 64 hex digits: equal weights give equal files.
    differences
        By modality, how far ONNX is from torch (`cmacc.transfer.onnx.largest_difference`); empty without graphs.
    """

    folder: Path
    step: int
    weights: str
    differences: dict[Modality, float]


@dataclass(frozen=True)
class ExportedEncoder:
    """What was read; `CmaccEncoder` takes the first three.

    Attributes
    ----------
    pair
        In evaluation mode, on the CPU.
    clip
        Size of the clips it was trained on.
    is_grey
        Whether it was trained on pictures without colour.
    step
        Training steps behind the weights.
    seed
        Of the run.
    weights
        SHA-256 of ``model.safetensors``.
    pretraining_data
        Fingerprint of the manifest it was trained on, None where unknown.
    run_id
        Of the training run, empty where unknown.
    """

    pair: AudioVisualEncoder
    clip: ClipSpec
    is_grey: bool
    step: int
    seed: int
    weights: str
    pretraining_data: str | None
    run_id: str


def export_run(
    run_dir: Path, out: Path, *, with_onnx: bool = False, overwrite: bool = False, results_markdown: str = ""
) -> Exported:
    """Write the encoders of a run's last checkpoint into a folder, which appears whole or not at all.

    Parameters
    ----------
    run_dir
        Run folder with a checkpoint.
    out
        Folder that is not there yet, or is empty.
    with_onnx
        Whether to add ``video.onnx`` and ``audio.onnx``, checked against torch. Takes the extra ``export`` and half a
        minute to a minute on two cores.
    overwrite
        Whether an export that is at ``out`` may be replaced.
    results_markdown
        Results for the model card; the card says that there are none where it is empty.

    Returns
    -------
    Exported
        What was written.

    Raises
    ------
    ExportError
        ``out`` holds something that would be lost, the weights are not finite, the extra is not installed, or an ONNX
        graph does not give what torch gives.
    ConfigError, CheckpointError
        The run folder has no such config or checkpoint.
    """
    config = read_config(run_dir / "config.yaml")
    provenance = read_provenance(run_dir)
    pair = AudioVisualEncoder(config.encoder)
    step = load_encoder(pair, last_checkpoint(run_dir))
    pair.eval()
    encoder = CmaccEncoder.of_run(config, pair)
    with _folder_aside(out, overwrite) as aside:
        weights = _write_weights(pair, aside / "model.safetensors")
        differences: dict[Modality, float] = {}
        if with_onnx:
            for modality, name in _GRAPHS.items():
                differences[modality] = write_graph(EncoderGraph(encoder, modality), aside / name)
        plain = {
            "library": _LIBRARY,
            "format": _FORMAT,
            "encoder": to_plain(config.encoder),
            "clip": to_plain(config.data.clip),
            "is_grey": encoder.is_grey,
            "step": step,
            "seed": config.seed,
            "weights": weights,
            "onnx": {"tolerance": TOLERANCE, "differences": differences} if with_onnx else None,
            "pretraining": {
                # Of the training itself: what lies under the manifest's name now may be another data set.
                "data": provenance.data if provenance is not None else None,
                "run_id": provenance.run_id if provenance is not None else "",
                "settings": _settings(config),
            },
        }
        (aside / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(model_card(config, pair, plain, results_markdown), encoding="utf-8")
        read_export(aside)
    return Exported(out, step, weights, differences)


def is_export(folder: Path) -> bool:
    """Whether a folder says that it is an export, of whatever format; `read_export` tells whether it is a sound one."""
    try:
        return _read_json(folder / "config.json").get("library") == _LIBRARY
    except ExportError:
        return False


def read_export(folder: Path) -> ExportedEncoder:
    """Read what `export_run` wrote.

    Parameters
    ----------
    folder
        An export, or the copy of one that the hub's ``snapshot_download`` made.

    Returns
    -------
    ExportedEncoder
        Everything that `CmaccEncoder` takes.

    Raises
    ------
    ExportError
        A file is missing, cannot be read, or does not fit the others.
    """
    path = folder / "config.json"
    plain = _read_json(path)
    for name, wanted in (("library", _LIBRARY), ("format", _FORMAT)):
        if plain.get(name) != wanted:
            raise ExportError(f"export {path}: {name} must be {wanted}, got {plain.get(name)!r}")
    try:
        told = plain.get("encoder")
        told = SETTINGS_BEFORE["encoder"] | told if isinstance(told, dict) else told
        encoder = dataclass_of(EncoderConfig, told, "encoder")
        clip = dataclass_of(ClipSpec, plain.get("clip"), "clip")
        is_grey, weights = value_of(bool, plain, "is_grey"), value_of(str, plain, "weights")
        step, seed = value_of(int, plain, "step"), value_of(int, plain, "seed")
        pretraining = value_of(dict[str, Any], plain, "pretraining")
        pretraining_data = value_of(str | None, pretraining, "data", "pretraining.")
        run_id = value_of(str, {"run_id": "", **pretraining}, "run_id", "pretraining.")  # missing in those of 0.1.0
    except UnfitError as error:
        raise ExportError(f"export {path}: {error}") from error
    pair = _read_weights(folder / "model.safetensors", encoder, weights)
    return ExportedEncoder(pair, clip, is_grey, step, seed, weights, pretraining_data, run_id)


def push(folder: Path, repo_id: str) -> str:
    """Upload an export to the Hugging Face hub, into a repository that is made, private, where it is not there yet.

    Only an export's own files are uploaded. Graphs of an earlier upload go where this one has none: they would be of
    other weights.

    Parameters
    ----------
    folder
        An export.
    repo_id
        ``owner/name``.

    Returns
    -------
    str
        The repository's address.

    Raises
    ------
    ExportError
        The folder is no sound export, or ``huggingface_hub`` is not installed.
    """
    hub = from_extra("huggingface_hub")
    read_export(folder)
    for name in _NAMES:
        # What a link points to could be any file of this machine.
        if (folder / name).is_symlink():
            raise ExportError(f"export {folder / name}: must be a file to be uploaded, got a symbolic link")
    api = hub.HfApi()
    address = str(api.create_repo(repo_id, private=True, exist_ok=True))
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(_NAMES),
        delete_patterns=list(_GRAPHS.values()),
        commit_message="Upload a cmacc encoder",
    )
    return address


@contextmanager
def _folder_aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when the ``with`` ends well, and is gone if it does not."""
    out = out.absolute()
    _require_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise ExportError(f"out {out}: must be where a folder can be made ({error})") from error
    try:
        yield aside
        aside.chmod(0o755)
        fsync_tree(aside)
        _require_free(out, overwrite)  # writing took a while
        if out.is_dir() and any(out.iterdir()):
            older = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
            out.replace(older)
            try:
                aside.replace(out)
            except OSError:
                older.replace(out)
                raise
            shutil.rmtree(older)
        else:
            aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _require_free(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"out {out}: must be a folder, got {'a symbolic link' if out.is_symlink() else 'a file'}")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if not names:
        return
    others = [name for name in names if name not in _NAMES]
    if others or not is_export(out):
        raise ExportError(f"out {out}: must be new, empty or an export, got a folder with {(others or names)[0]}")
    if not overwrite:
        raise ExportError(f"out {out}: must be new or empty, got an export; give --overwrite to replace it")


def _write_weights(pair: AudioVisualEncoder, path: Path) -> str:
    tensors = {
        name: (value.float() if value.is_floating_point() else value).contiguous()
        for name, value in pair.state_dict().items()
    }
    data = safetensors.torch.save(tensors, {"format": "pt"})
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _read_weights(path: Path, config: EncoderConfig, digest: str) -> AudioVisualEncoder:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ExportError(f"export {path}: cannot be read ({error})") from error
    got = hashlib.sha256(data).hexdigest()
    if got != digest:
        raise ExportError(f"export {path}: must have SHA-256 {digest}, as config.json says, got {got}")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ExportError(f"export {path}: cannot be read ({error})") from error
    try:
        # Without memory at first: a config of absurd sizes must end here, not take the machine's.
        with torch.device("meta"):
            own = AudioVisualEncoder(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ExportError(f"export {path.with_name('config.json')}: encoder cannot be built ({error})") from error
    for name in sorted(own.keys() | tensors.keys()):
        _require_tensor(name, tensors.get(name), own.get(name), path)
    with torch.random.fork_rng(devices=[]):
        pair = AudioVisualEncoder(config)
    pair.load_state_dict(tensors)
    return pair.eval()


def _require_tensor(name: str, tensor: Tensor | None, own: Tensor | None, path: Path) -> None:
    if tensor is None:
        raise ExportError(f"export {path}: {name} is missing")
    if own is None:
        raise ExportError(f"export {path}: {name} has no place in the encoders of config.json")
    if tensor.shape != own.shape or tensor.dtype != own.dtype:
        raise ExportError(
            f"export {path}: {name} must be {own.dtype} of shape {tuple(own.shape)}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if not tensor.isfinite().all():
        raise ExportError(f"export {path}: {name} must be finite, got infinite or NaN values")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"export {path}: cannot be read ({error})") from error
    if not isinstance(plain, dict):
        raise ExportError(f"export {path}: must be an object, got {plain!r:.60}")
    return plain


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """All that shaped the run, without where its files lay."""
    settings: dict[str, Any] = to_plain(config)
    del settings["data"]["manifest"]
    return settings
