"""Open the ENCODER argument: a ready encoder, and the same encoder untrained."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from cmacc.encoders import AudioVisualEncoder, download_tower, is_tower, release
from cmacc.pretraining import (
    PretrainConfig,
    checkpoint_at,
    read_config,
    read_provenance,
    run_of,
    trained_encoder,
    untrained_encoder,
)
from cmacc.pretraining.clip_encoder import ClipEncoder, EncoderError
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.features import weights_hash
from cmacc.transfer.adapters import LogMelStatistics, TowerEncoder
from cmacc.transfer.card import UNKNOWN_WEIGHTS, Card, CardError, EncoderFacts
from cmacc.transfer.export import is_export, read_export
from cmacc.transfer.hub import local_folder

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder with its description for the card.

    Attributes
    ----------
    encoder
        The encoder, in evaluation mode.
    untrained
        The same kind of encoder with its initial weights; None if nothing in it is trained, or if it is the caller's
        own object. The same object if ``encoder`` is itself untrained.
    facts
        Description for the card.
    """

    encoder: ClipEncoder
    untrained: ClipEncoder | None
    facts: EncoderFacts


def open_encoder(
    name: str, device: torch.device | None = None, *, seed: int = 0, download: bool = False
) -> OpenedEncoder:
    """Open an encoder by name.

    Parameters
    ----------
    name
        A run or export folder; ``RUN/checkpoints/step-00000100`` or ``RUN/checkpoints/best``, instead of the run's last
        checkpoint; ``user/name``, an export on the Hugging Face hub; ``random``, cmacc's untrained default
        encoders; ``statistics``, of log-mel spectrograms; ``torchvision:NAME[=WEIGHTS]`` or ``timm:NAME[=WEIGHTS]``
        with a local file of weights (.safetensors, or a state dict in .pth, read with ``weights_only``; without it,
        untrained); or ``hf:FOLDER_OR_ID``, a model of transformers, for which ``untrained`` is None.
    device
        Device of the encoder. Default: the CPU.
    seed
        Seed of untrained weights. For a run, the run's own seed is used instead.
    download
        Whether what the hub has may be downloaded; otherwise it must be in its cache.

    Raises
    ------
    EncoderError, TowerError, ConfigError, CheckpointError, ExportError
        The name is unknown, or the folder or file is damaged, or a download fails.
    """
    device = device or torch.device("cpu")
    if name == "random":
        config = PretrainConfig(seed=seed)
        encoder = CmaccEncoder.of_run(config, untrained_encoder(config)).to(device).eval()
        return _opened(name, encoder, None, _kind(config), seed=seed, is_untrained=True)
    if name == "statistics":
        statistics = LogMelStatistics().to(device).eval()
        return _opened(name, statistics, None, "mean, deviation and maximum of log-mel bands")
    if name.startswith(("torchvision:", "timm:", "hf:")):
        return _open_tower(name, device, seed, download)
    folder = local_folder(name, download=download)
    untrained: CmaccEncoder | None
    if is_export(folder):
        exported = read_export(folder)
        config = PretrainConfig(encoder=exported.pair.config, seed=exported.seed)
        # An export holds a tower's weights after training only.
        has_tower = is_tower(config.encoder.video) or is_tower(config.encoder.audio)
        untrained = None if has_tower else CmaccEncoder(untrained_encoder(config), exported.clip, exported.is_grey)
        trained = CmaccEncoder(exported.pair, exported.clip, exported.is_grey)
        step, data, run_id = exported.step, exported.pretraining_data, exported.run_id
    elif run_of(folder).is_dir():
        config = read_config(run_of(folder) / "config.yaml")
        if run_of(folder) != folder:
            folder = checkpoint_at(folder)
            name = str(folder)  # another one may be the best tomorrow
        pair, step = trained_encoder(folder, config)
        trained = CmaccEncoder.of_run(config, pair)
        fresh = untrained_encoder(config)
        release(fresh)
        untrained = CmaccEncoder.of_run(config, fresh)
        provenance = read_provenance(run_of(folder))
        data, run_id = (provenance.data, provenance.run_id) if provenance is not None else (None, "")
    else:
        raise EncoderError(
            f"encoder {name}: must be a run or export folder, random, statistics, torchvision:MODEL[=WEIGHTS], "
            f"timm:MODEL[=WEIGHTS] or hf:FOLDER_OR_ID, got {'a file' if folder.exists() else 'nothing there'}"
        )
    return _opened(
        name,
        trained.to(device).eval(),
        None if untrained is None else untrained.to(device).eval(),
        _kind(config),
        step=step,
        seed=config.seed,
        data=data,
        run_id=run_id,
    )


def card_of_run(run: Path) -> Card | None:
    """The results in a run folder; None if there are none. ``run`` is a run folder, or a checkpoint of `open_encoder`.

    Raises
    ------
    CardError
        The results are not of the run's last checkpoint, or of the given one, or cannot be read.
    """
    path = run_of(run) / "card.json"
    if not path.exists():
        return None
    card = Card.read(path)
    own = open_encoder(str(run)).facts
    if card.encoder.weights != own.weights:
        raise CardError(
            f"card {path}: must be of weights {own.weights}, run {own.name} at step {own.checkpoint_step}, got results "
            f"of weights {card.encoder.weights}, {card.encoder.name} at step {card.encoder.checkpoint_step}; evaluate "
            "the run again, or pass --without-results"
        )
    return card


def load_pair(folder: Path) -> AudioVisualEncoder:
    """The trained encoders of a run, a checkpoint or an export folder, on the CPU and in evaluation mode.

    Raises
    ------
    ConfigError, CheckpointError, ExportError
        The folder holds neither, or is damaged.
    """
    if is_export(folder):
        return read_export(folder).pair
    pair, _ = trained_encoder(folder, read_config(run_of(folder) / "config.yaml"))
    return pair.eval()


def _opened(
    name: str,
    encoder: "CmaccEncoder | TowerEncoder | LogMelStatistics",
    untrained: ClipEncoder | None,
    kind: str,
    *,
    step: int = 0,
    seed: int = 0,
    data: str | None = None,
    run_id: str = "",
    is_untrained: bool = False,
) -> OpenedEncoder:
    facts = EncoderFacts(name, kind, weights_hash(encoder), step, seed, dataclasses.asdict(encoder.spec), data, run_id)
    return OpenedEncoder(encoder, encoder if is_untrained else untrained, facts)


def opened_object(encoder: ClipEncoder) -> OpenedEncoder:
    """The caller's own encoder, under the name of its class.

    Raises
    ------
    EncoderError
        The object lacks a part of `ClipEncoder`, or is in training mode: batch norm would learn from held-out data.
    """
    name = type(encoder).__name__
    if not isinstance(encoder, ClipEncoder):
        raise EncoderError(f"encoder {name}: must have modalities, spec, device, embed_video and embed_audio")
    if isinstance(encoder, nn.Module) and any(module.training for module in encoder.modules()):
        raise EncoderError(f"encoder {name}: must be in evaluation mode (.eval()), got training mode")
    weights = weights_hash(encoder) if isinstance(encoder, nn.Module) else UNKNOWN_WEIGHTS
    facts = EncoderFacts(name, "an object of the caller's", weights, 0, 0, dataclasses.asdict(encoder.spec))
    return OpenedEncoder(encoder, None, facts)


def _kind(config: PretrainConfig) -> str:
    return f"cmacc, video {config.encoder.video}, audio {config.encoder.audio}"


def _open_tower(name: str, device: torch.device, seed: int, download: bool) -> OpenedEncoder:
    library, _, named = name.partition(":")
    if library == "hf":
        if download:
            download_tower(name)
        return _opened(name, TowerEncoder(name).to(device).eval(), None, f"transformers' {named}")
    model, has_weights, file = named.partition("=")
    untrained = _seeded(seed, lambda: TowerEncoder(f"{library}:{model}")).to(device).eval()
    kind = f"{library}'s {model}"
    if not has_weights:
        return _opened(name, untrained, None, f"{kind}, untrained", seed=seed, is_untrained=True)
    trained = TowerEncoder(name).to(device).eval()
    return _opened(name, trained, untrained, f"{kind}, weights {Path(file).name}", seed=seed)


def _seeded(seed: int, make: Callable[[], _Made]) -> _Made:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # unlike torch.manual_seed, leaves the caller's GPU generators alone
        return make()
