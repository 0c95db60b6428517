"""What a pretraining run is told: frozen, checked dataclasses, written whole into the run folder as ``config.yaml``."""

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from cmacc.clips import AugmentConfig, ClipSpec
from cmacc.encoders import EncoderConfig
from cmacc.negatives import GradientName, InitialCenters, SelectorName
from cmacc.objectives import BatchKeys
from cmacc.pretraining.reading import UnfitError, dataclass_of

PrecisionName = Literal["auto", "bf16", "fp32"]
RefreshName = Literal["none", "selected", "dictionary"]


class ConfigError(ValueError):
    """A setting that cannot be; the message names it, what it must be, and what it is."""


@dataclass(frozen=True)
class DataConfig:
    """Which files, and how they become clips.

    Parameters
    ----------
    manifest
        Made by ``cmacc scan``.
    split
        Files of this split, and files that are in no split, are trained on; the others are held out.
    clip
        Size of the clips.
    augment
        Augmentation of training views.
    clips_per_video
        k: clips taken of a file each time that it is opened, one for each of k consecutive steps. Opening is then paid
        once for k clips, but the dictionaries' pools hold 1/k as many files, and an epoch is k times as many steps.
    workers
        Decoding processes beside the training one.
    start_method
        How they begin: ``fork`` or ``spawn``; None is the platform's way. Forking takes milliseconds, spawning seconds;
        spawned ones inherit no locks of other threads.
    max_bad_fraction
        Greatest share of the files trained on that may turn out not to decode; above it the run stops. Files that the
        scan found unfit (no audio, no video, silent, black, still, duplicate, too short where those are refused) are
        excluded before and do not count.
    shuffle_pairs
        A control: every picture gets another file's sound, so that there is nothing to learn.
    """

    manifest: Path = Path("manifest.parquet")
    split: str = "train"
    clip: ClipSpec = field(default_factory=ClipSpec)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    clips_per_video: int = 1
    workers: int = 1
    start_method: Literal["fork", "spawn"] | None = None
    max_bad_fraction: float = 0.2
    shuffle_pairs: bool = False

    def __post_init__(self) -> None:
        _require(self.clips_per_video >= 1, "data.clips_per_video", "at least 1", self.clips_per_video)
        _require(self.workers >= 0, "data.workers", "at least 0", self.workers)
        _require(
            self.start_method in (None, "fork", "spawn"), "data.start_method", "fork, spawn or null", self.start_method
        )
        _require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", "in [0, 1]", self.max_bad_fraction)


@dataclass(frozen=True)
class BatchesConfig:
    """Which samples stand in a batch together: they are each other's negatives.

    Parameters
    ----------
    selector
        ``random``, or ``active``: samples that were hard to tell apart at their last visit (`active_batches`).
    group_size
        g: how many hard ones stand together; a batch holds several groups. None: the whole batch is one.
    neighbours
        How many of those most like a sample may join its group. None: twice ``group_size``.
    skip_nearest
        How many of the very nearest may not: likely copies, and false negatives.
    active_share
        Share of every batch that is made of groups; the rest are random samples.
    start_epoch
        The first epoch whose batches are chosen; at least 1, since before there is nothing to choose by.
    """

    selector: Literal["random", "active"] = "random"
    group_size: int | None = None
    neighbours: int | None = None
    skip_nearest: int = 0
    active_share: float = 1.0
    start_epoch: int = 1

    def __post_init__(self) -> None:
        _require(self.selector in ("random", "active"), "batches.selector", "random or active", self.selector)
        _require(self.group_size is None or self.group_size >= 2, "batches.group_size", "at least 2", self.group_size)
        _require(self.neighbours is None or self.neighbours >= 1, "batches.neighbours", "at least 1", self.neighbours)
        _require(self.skip_nearest >= 0, "batches.skip_nearest", "at least 0", self.skip_nearest)
        _require(0 <= self.active_share <= 1, "batches.active_share", "in [0, 1]", self.active_share)
        _require(self.start_epoch >= 1, "batches.start_epoch", "at least 1", self.start_epoch)


@dataclass(frozen=True)
class DictionaryConfig:
    """Where negatives beyond the batch come from.

    Parameters
    ----------
    selector
        ``none``: no dictionary, in-batch contrast alone; or ``active`` (the paper's), ``newest`` (MoCo's queue),
        ``random``, ``hardest``.
    size
        K, keys in each of the two dictionaries.
    pool_size
        N, candidates in each of the two pools.
    gradient
        What the gradient embeddings are taken with respect to.
    pseudo_labels
        Whether a candidate is assigned to the queries of the other modality (the paper's) or of its own.
    initial_centers
        ``dictionary``: the ``active`` selector counts the keys that stay in the dictionary as centers already chosen.
    allow_repeats
        Whether a sample may be chosen that stands in the dictionary already or is in the batch. If not, the run needs
        at least ``size + optim.batch_size`` files.
    select_every
        Steps between selections; each then chooses the keys for that many steps, ``select_every`` times the batch size.
    refresh
        Whether keys are re-encoded by the key encoder of the moment: ``none``; ``selected``, the chosen ones as they
        are chosen; ``dictionary``, all of it. For that the samples' uint8 frames and half-precision sound are kept
        (0.6 GB for the default sizes). By default ``selected``, since keys as old as the pool is deep cost more than
        selection gains (docs/evidence-dictionary.md), and ``none`` for ``newest``, whose keys are fresh anyway.
    refresh_every
        Steps between refreshes of the whole ``dictionary``.
    refresh_device
        Where the inputs are kept: in the ``cpu``'s memory, or on the ``accelerator`` that trains.
    warmup_steps
        Steps of plain in-batch contrast before the dictionary's keys join the loss; it fills meanwhile. Cross-batch
        memory (Wang et al., 2020) waits so, until the encoders change slowly; with ``objective.batch_keys`` other than
        ``online`` it has not been needed here.
    """

    selector: SelectorName | Literal["none"] = "none"
    size: int = 256
    pool_size: int = 1024
    gradient: GradientName = "last_layer"
    pseudo_labels: Literal["cross_modal", "within_modal"] = "cross_modal"
    initial_centers: InitialCenters = "none"
    allow_repeats: bool = False
    select_every: int = 1
    refresh: RefreshName | None = None
    refresh_every: int = 10
    refresh_device: Literal["cpu", "accelerator"] = "cpu"
    warmup_steps: int = 0

    @property
    def refresh_policy(self) -> RefreshName:
        """``refresh``, whether it was given or not."""
        if self.refresh is not None:
            return self.refresh
        return "none" if self.selector in ("none", "newest") else "selected"

    def __post_init__(self) -> None:
        _require(
            self.initial_centers == "none" or self.selector == "active",
            "dictionary.initial_centers",
            "none for another dictionary.selector than active",
            self.initial_centers,
        )
        _require(self.select_every >= 1, "dictionary.select_every", "at least 1", self.select_every)
        _require(self.refresh_every >= 1, "dictionary.refresh_every", "at least 1", self.refresh_every)
        _require(self.warmup_steps >= 0, "dictionary.warmup_steps", "at least 0", self.warmup_steps)
        _require(self.size >= 1, "dictionary.size", "at least 1", self.size)
        _require(self.pool_size >= 1, "dictionary.pool_size", "at least 1", self.pool_size)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss.

    Parameters
    ----------
    temperature
        tau, of the loss and of the pseudo-labels.
    in_batch
        Whether the other keys of the batch are negatives.
    batch_keys
        Which encoder the positive and the in-batch keys come from. ``online``: with gradient, as in CLIP.
        ``momentum``: without, as in the paper. ``both``: the mean of two losses, one among the batch's online keys and
        one in which the positive, the in-batch keys and the dictionary are all the momentum encoder's. By default
        ``both`` with a dictionary and ``online`` without one. A dictionary is always the momentum encoder's: with
        ``online`` its positives would be of another kind than its negatives (newer weights), and pairs are then matched
        worse than without any dictionary (docs/evidence-dictionary.md).
    decoupled
        Whether to leave the positive out of the denominator (DCL, Yeh et al., 2022): the gradient then does not fade
        once a small batch has become easy. The loss may be below zero, and is no InfoNCE estimate; the metrics'
        ``mutual_information`` still is one.
    momentum
        m of the key encoders, in [0, 1]. It is approached from below as (1 + t) / (10 + t), so that the first keys are
        not those of an untrained copy.
    """

    temperature: float = 0.1
    in_batch: bool = True
    batch_keys: BatchKeys | None = None
    decoupled: bool = True
    momentum: float = 0.99

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "objective.temperature", "positive", self.temperature)
        _require(0 <= self.momentum <= 1, "objective.momentum", "in [0, 1]", self.momentum)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine down to zero.

    Parameters
    ----------
    batch_size
        M, clips a step.
    steps
        Steps of the whole run.
    learning_rate
        At its height.
    warmup_steps
        Steps until then, fewer than ``steps``. By default 50, or a quarter of the steps of a shorter run.
    weight_decay
        On matrices and kernels; norms and biases have none.
    """

    batch_size: int = 32
    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, "optim.batch_size", "at least 2", self.batch_size)
        _require(self.steps >= 1, "optim.steps", "at least 1", self.steps)
        _require(self.learning_rate > 0, "optim.learning_rate", "positive", self.learning_rate)
        if self.warmup_steps is not None:
            _require(
                0 <= self.warmup_steps < self.steps,
                "optim.warmup_steps",
                f"at least 0 and below optim.steps ({self.steps}), or the rate would never fall",
                self.warmup_steps,
            )
        _require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)

    @property
    def warmup(self) -> int:
        """Steps of the warm-up, whether they were given or not."""
        return min(50, self.steps // 4) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that shapes a run.

    Parameters
    ----------
    data, encoder, batches, dictionary, objective, optim
        See there.
    seed
        Of weights, order, windows, augmentation and selection.
    precision
        ``auto`` takes bf16 autocast where the device has units for it, ``bf16`` and ``fp32`` insist.
    save_every
        Steps between checkpoints; the last one is kept, and the run's end is one.
    keep_every
        Checkpoints at multiples of this step are kept as well; 0 keeps none but the last.
    health_every
        Steps between measurements of the dictionaries.
    """

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    batches: BatchesConfig = field(default_factory=BatchesConfig)
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    precision: PrecisionName = "auto"
    save_every: int = 100
    keep_every: int = 0
    health_every: int = 20

    @property
    def batch_keys(self) -> BatchKeys:
        """``objective.batch_keys``, whether it was given or not."""
        if self.objective.batch_keys is not None:
            return self.objective.batch_keys
        return "online" if self.dictionary.selector == "none" else "both"

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        _require(self.precision in get_args(PrecisionName), "precision", "auto, bf16 or fp32", self.precision)
        _require(self.save_every >= 1, "save_every", "at least 1", self.save_every)
        _require(self.keep_every >= 0, "keep_every", "at least 0", self.keep_every)
        _require(self.health_every >= 1, "health_every", "at least 1", self.health_every)
        _require(
            self.batches.group_size is None or self.batches.group_size <= self.optim.batch_size,
            "batches.group_size",
            f"at most optim.batch_size ({self.optim.batch_size})",
            self.batches.group_size,
        )
        if self.dictionary.selector != "none":
            _require(
                self.dictionary.warmup_steps < self.optim.steps,
                "dictionary.warmup_steps",
                f"below optim.steps ({self.optim.steps}), or the dictionary would never join the loss",
                self.dictionary.warmup_steps,
            )
            chosen = self.optim.batch_size * self.dictionary.select_every
            _require(
                self.dictionary.size >= chosen,
                "dictionary.size",
                f"at least optim.batch_size times dictionary.select_every ({chosen})",
                self.dictionary.size,
            )
            _require(
                self.dictionary.pool_size >= chosen,
                "dictionary.pool_size",
                f"at least optim.batch_size times dictionary.select_every ({chosen})",
                self.dictionary.pool_size,
            )
        if self.dictionary.selector == "none" or self.dictionary.warmup_steps > 0 or self.batch_keys == "both":
            _require(
                self.objective.in_batch,
                "objective.in_batch",
                "true where dictionary.selector is none, dictionary.warmup_steps positive or objective.batch_keys both "
                "(else a loss has nothing to contrast with)",
                self.objective.in_batch,
            )


def _require(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {wanted}, got {got}")


def to_plain(config: Any) -> Any:
    """A config as nested dicts of plain values, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return str(config) if isinstance(config, Path) else config


def write_config(config: PretrainConfig, path: Path) -> None:
    """Write as YAML, with the manifest's absolute path so that the run can be resumed from anywhere."""
    data = dataclasses.replace(config.data, manifest=config.data.manifest.absolute())
    path.write_text(yaml.safe_dump(to_plain(dataclasses.replace(config, data=data)), sort_keys=False))


# Settings as cmacc 0.1.0 named them: read for one more version, with a warning.
_FORMER_NAMES = {
    "data.max_bad": "data.max_bad_fraction",
    "dictionary.given": "dictionary.initial_centers",
    "dictionary.refresh_store": "dictionary.refresh_device",
}
_FORMER_VALUES = {"dictionary.refresh_store": {"host": "cpu", "device": "accelerator"}}


def present_name(name: str, value: Any) -> tuple[str, Any]:
    """A setting's dotted name and value as they are now, with a warning where they were others before."""
    if name not in _FORMER_NAMES:
        return name, value
    present = _FORMER_NAMES[name]
    warnings.warn(
        f"the setting {name} is now {present}; the former name is read until 0.3", FutureWarning, stacklevel=3
    )
    return present, _FORMER_VALUES.get(name, {}).get(value, value)


def with_present_names(plain: Any) -> Any:
    """Nested settings with the present names instead of former ones."""
    if not isinstance(plain, dict):
        return plain
    renamed: dict[str, Any] = {}
    for group, settings in plain.items():
        if not isinstance(settings, dict):
            renamed[group] = settings
            continue
        pairs = (present_name(f"{group}.{name}", value) for name, value in settings.items())
        renamed[group] = {name.rpartition(".")[2]: value for name, value in pairs}
    return renamed


# What runs before active batches did without naming it.
SETTINGS_BEFORE: dict[str, dict[str, Any]] = {"encoder": {"norm": "batch"}, "objective": {"decoupled": False}}


def read_config(path: Path) -> PretrainConfig:
    """Read what `write_config` wrote.

    Raises
    ------
    ConfigError
        The file is missing, not YAML, or holds a setting that is unknown or cannot be.
    """
    if not path.is_file():
        raise ConfigError(f"config {path}: no such file; a run folder holds one")
    try:
        plain = yaml.safe_load(path.read_text())
        for group, settings in SETTINGS_BEFORE.items() if isinstance(plain, dict) else ():
            if isinstance(plain.get(group), dict):
                plain[group] = settings | plain[group]
        return config_from_plain(plain)
    except (ConfigError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path}: {error}") from error


def config_from_plain(plain: Any) -> PretrainConfig:
    """A config from nested dicts, as `to_plain` makes them; what they do not name is as by default.

    Raises
    ------
    ConfigError
        A setting is unknown or cannot be.
    """
    try:
        return dataclass_of(PretrainConfig, with_present_names({} if plain is None else plain), "", with_defaults=True)
    except UnfitError as error:
        raise ConfigError(str(error)) from error
