"""Export a run as a folder: weights, settings, a model card and, on request, ONNX graphs.

The folder only holds the query encoders, a fraction of a checkpoint. Without optimizer, key encoders and dictionaries,
training cannot be resumed from it. The only trace of the training files is a fingerprint. The folder can be uploaded to
the Hugging Face hub as it is. It contains no pickles: safetensors, JSON, Markdown, ONNX.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cmacc.clips import ClipSpec
from cmacc.clips.storage import fsync_tree
from cmacc.encoders import AudioVisualEncoder, EncoderConfig, TowerError
from cmacc.pretraining import (
    PretrainConfig,
    read_config,
    read_provenance,
    run_of,
    to_plain,
    trained_encoder,
)
from cmacc.pretraining.clip_encoder import Modality
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.config_files import SETTINGS_BEFORE
from cmacc.pretraining.reading import dataclass_of, value_of
from cmacc.transfer.model_card import model_card
from cmacc.transfer.onnx import TOLERANCE, EncoderGraph, ExportError, from_extra, write_graph
from cmacc.transfer.portable import TOWER_FILES, required_packages, with_own_towers, write_towers
from cmacc.transfer.versions import require_versions

__all__ = [
    "LOADED_FILES",
    "ExportError",
    "Exported",
    "ExportedEncoder",
    "export_run",
    "is_export",
    "push",
    "read_export",
]

_LIBRARY, _FORMAT = "cmacc", 1
# The oldest version that reads what this one writes.
_REQUIRED_CMACC = ">=0.2"
_GRAPHS: dict[Modality, str] = {"video": "video.onnx", "audio": "audio.onnx"}
# What `read_export` reads, the description first.
LOADED_FILES = ("config.json", "model.safetensors", *TOWER_FILES)
# No other file is ever written, read, replaced or uploaded.
_NAMES = (*LOADED_FILES, "README.md", *_GRAPHS.values())


@dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes
    ----------
    folder
        The folder.
    step
        Number of training steps of the weights.
    weights
        SHA-256 of ``model.safetensors``, 64 hex digits. Equal weights give equal files.
    differences
        By modality, the difference between ONNX and torch (`cmacc.transfer.onnx.largest_difference`); empty without
        graphs.
    """

    folder: Path
    step: int
    weights: str
    differences: dict[Modality, float]


@dataclass(frozen=True)
class ExportedEncoder:
    """A loaded export. The first three attributes are the arguments of `CmaccEncoder`.

    Attributes
    ----------
    pair
        The encoders, in evaluation mode, on the CPU.
    clip
        Size of the clips they were trained on.
    is_grey
        Whether they were trained on video without colour.
    step
        Number of training steps of the weights.
    seed
        Seed of the run.
    weights
        SHA-256 of ``model.safetensors``.
    pretraining_data
        Fingerprint of the manifest they were trained on; None if unknown.
    run_id
        Id of the training run; empty if unknown.
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
    run: Path, out: Path, *, with_onnx: bool = False, overwrite: bool = False, results_markdown: str = ""
) -> Exported:
    """Export a run's encoders to a folder, which appears complete or not at all.

    Parameters
    ----------
    run
        Run folder, for its last checkpoint; or ``RUN/checkpoints/step-00000100`` or ``RUN/checkpoints/best``.
    out
        Folder that does not exist or is empty.
    with_onnx
        Whether to add ``video.onnx`` and ``audio.onnx``, checked against torch. This needs the extra ``export``, and
        takes half a minute to a minute on two cores.
    overwrite
        Whether to replace an existing export at ``out``.
    results_markdown
        Results for the model card. If empty, the card says that there are none.

    Returns
    -------
    Exported
        The written export.

    Raises
    ------
    ExportError
        ``out`` holds other files, the weights are not finite, the extra is not installed, or a tower cannot become an
        ONNX graph, or one that agrees with torch.
    ConfigError, CheckpointError
        The run folder has no valid config or checkpoint.
    """
    config = read_config(run_of(run) / "config.yaml")
    provenance = read_provenance(run_of(run))
    pair, step = trained_encoder(run, config)
    pair.eval()
    encoder = CmaccEncoder.of_run(config, pair)
    with _folder_aside(out, overwrite) as aside:
        own = write_towers(config.encoder, aside)
        weights = _write_weights(pair, aside / "model.safetensors")
        differences: dict[Modality, float] = {}
        if with_onnx:
            for modality, name in _GRAPHS.items():
                differences[modality] = write_graph(EncoderGraph(encoder, modality), aside / name)
        plain = {
            "library": _LIBRARY,
            "format": _FORMAT,
            "requires": {"cmacc": _REQUIRED_CMACC, **required_packages(own)},
            "encoder": to_plain(own),
            "clip": to_plain(config.data.clip),
            "is_grey": encoder.is_grey,
            "step": step,
            "seed": config.seed,
            "weights": weights,
            "onnx": {"tolerance": TOLERANCE, "differences": differences} if with_onnx else None,
            "pretraining": {
                # From the training itself: the manifest's path may hold another data set by now.
                "data": provenance.data if provenance is not None else None,
                "run_id": provenance.run_id if provenance is not None else "",
                "settings": _settings(config),
            },
        }
        (aside / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(
            model_card(dataclasses.replace(config, encoder=own), pair, plain, results_markdown), encoding="utf-8"
        )
        read_export(aside)
    return Exported(out, step, weights, differences)


def is_export(folder: Path) -> bool:
    """Whether a folder claims to be an export, of any format. `read_export` checks that it is valid."""
    try:
        return _read_json(folder / "config.json").get("library") == _LIBRARY
    except ExportError:
        return False


def read_export(folder: Path) -> ExportedEncoder:
    """Read an export.

    Parameters
    ----------
    folder
        An export from `export_run`, or its copy from the hub's ``snapshot_download``.

    Returns
    -------
    ExportedEncoder
        The encoders and their description.

    Raises
    ------
    ExportError
        A file is missing, cannot be read, or does not fit the others; or the export needs newer packages.
    """
    path = folder / "config.json"
    plain = _read_json(path)
    written = plain.get("format")
    if plain.get("library") == _LIBRARY and type(written) is int and written > _FORMAT:
        raise ExportError(
            f"export {path}: made by a newer cmacc, got format {written}; cmacc {version('cmacc')} reads format "
            f"{_FORMAT}; pip install --upgrade cmacc"
        )
    for name, wanted in (("library", _LIBRARY), ("format", _FORMAT)):
        if plain.get(name) != wanted:
            raise ExportError(f"export {path}: {name} must be {wanted}, got {plain.get(name)!r}")
    try:
        require_versions(value_of(dict[str, str], {"requires": {}, **plain}, "requires"))  # missing before 0.2.0
        told = plain.get("encoder")
        told = SETTINGS_BEFORE["encoder"] | told if isinstance(told, dict) else told
        encoder = with_own_towers(dataclass_of(EncoderConfig, told, "encoder"), folder)
        clip = dataclass_of(ClipSpec, plain.get("clip"), "clip")
        is_grey, weights = value_of(bool, plain, "is_grey"), value_of(str, plain, "weights")
        step, seed = value_of(int, plain, "step"), value_of(int, plain, "seed")
        pretraining = value_of(dict[str, Any], plain, "pretraining")
        pretraining_data = value_of(str | None, pretraining, "data", "pretraining.")
        run_id = value_of(str, {"run_id": "", **pretraining}, "run_id", "pretraining.")  # missing in those of 0.1.0
    except ValueError as error:
        raise ExportError(f"export {path}: {error}") from error
    pair = _read_weights(folder / "model.safetensors", encoder, weights)
    return ExportedEncoder(pair, clip, is_grey, step, seed, weights, pretraining_data, run_id)


def push(folder: Path, repo_id: str) -> str:
    """Upload an export to the Hugging Face hub. A repository that does not exist is created as private.

    Only the files of an export are uploaded. Graphs of an earlier upload are deleted if this export has none, because
    they would have other weights.

    Parameters
    ----------
    folder
        An export.
    repo_id
        ``owner/name``.

    Returns
    -------
    str
        URL of the repository.

    Raises
    ------
    ExportError
        The folder is not a valid export, or ``huggingface_hub`` is not installed.
    """
    hub = from_extra("huggingface_hub")
    read_export(folder)
    for name in _NAMES:
        # A link could point to any file of this machine, which must not be uploaded.
        if (folder / name).is_symlink():
            raise ExportError(f"export {folder / name}: must be a file to be uploaded, got a symbolic link")
    api = hub.HfApi()
    address = str(api.create_repo(repo_id, private=True, exist_ok=True))
    api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(_NAMES),
        delete_patterns=[*_GRAPHS.values(), *TOWER_FILES],
        commit_message="Upload a cmacc encoder",
    )
    return address


@contextmanager
def _folder_aside(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that replaces ``out`` when the ``with`` block succeeds, and is deleted if it fails."""
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
        _require_free(out, overwrite)  # again, because writing took a while
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
    known = {Path(name).parts[0] for name in _NAMES}
    others = [name for name in names if name not in known]
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
        # On the meta device first, without memory: a config with absurd sizes must fail here, not exhaust the memory.
        with torch.device("meta"):
            own = AudioVisualEncoder(config, weights_of=()).state_dict()
    except (RuntimeError, TypeError, OverflowError, TowerError) as error:
        raise ExportError(f"export {path.with_name('config.json')}: encoder cannot be built ({error})") from error
    for name in sorted(own.keys() | tensors.keys()):
        _require_tensor(name, tensors.get(name), own.get(name), path)
    with torch.random.fork_rng(devices=[]):
        pair = AudioVisualEncoder(config, weights_of=())
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
    """All settings of the run except the path of its manifest."""
    settings: dict[str, Any] = to_plain(config)
    del settings["data"]["manifest"]
    return settings
