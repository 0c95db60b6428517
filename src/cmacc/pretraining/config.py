"""Settings of a pretraining run: frozen, checked dataclasses, all written to ``config.yaml`` in the run folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from cmacc.clips import AugmentConfig, ClipSpec, window_length
from cmacc.encoders import MODALITIES, EncoderConfig, check_train_mode, is_tower
from cmacc.negatives import GradientName, InitialCenters, SelectorName
from cmacc.objectives import BatchKeys
from cmacc.pretraining.config_error import ConfigError, require
from cmacc.pretraining.objective_config import ObjectiveConfig

PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
TrackerName = Literal["tensorboard", "mlflow", "wandb", "none"]
RefreshName = Literal["none", "selected", "dictionary"]


@dataclass(frozen=True)
class DataConfig:
    """The data: which files, and how they become clips.

    Parameters
    ----------
    manifest
        Manifest from ``cmacc scan``.
    split
        Split to train on. Files without a split are trained on too; all others are held out.
    clip
        Size of the clips.
    augment
        Augmentation of training views.
    clips_per_video
        k: clips taken from a file each time it is opened, one for each of k consecutive steps. This saves opening the
        file k times, but the dictionaries' pools hold 1/k as many files, and an epoch has k times as many steps.
    workers
        Number of decoding processes.
    start_method
        How workers are started: ``fork`` or ``spawn``; None is the platform's default. Forking takes milliseconds,
        spawning seconds. Spawned workers inherit no locks of other threads.
    max_bad_fraction
        Maximum share of the files trained on that turn out not to decode. Above it, the run stops. Files that the scan
        found unsuitable (no audio, no video, silent, black, still, duplicate, too short where those are refused) are
        excluded beforehand and do not count.
    feature_windows
        Windows per file whose features are kept, if both backbones are frozen (``head`` in `TrainConfig`). The files
        are then decoded only once, without augmentation.
    shuffle_pairs
        A control experiment without anything to learn: every video gets the audio of another file, and the second views
        and targets of other terms of the objective are those of other files, too.
    """

    manifest: Path = Path("manifest.parquet")
    split: str = "train"
    clip: ClipSpec = field(default_factory=ClipSpec)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    clips_per_video: int = 1
    workers: int = 1
    start_method: Literal["fork", "spawn"] | None = None
    max_bad_fraction: float = 0.2
    feature_windows: int = 4
    shuffle_pairs: bool = False

    def __post_init__(self) -> None:
        require(self.clips_per_video >= 1, "data.clips_per_video", "at least 1", self.clips_per_video)
        require(self.feature_windows >= 1, "data.feature_windows", "at least 1", self.feature_windows)
        require(self.workers >= 0, "data.workers", "at least 0", self.workers)
        require(
            self.start_method in (None, "fork", "spawn"), "data.start_method", "fork, spawn or null", self.start_method
        )
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", "in [0, 1]", self.max_bad_fraction)

    @property
    def view_frame_count(self) -> int:
        """Frames of a training view: of a clip, those that ``augment.window`` covers."""
        return window_length(self.clip.frame_count, self.augment.window)


@dataclass(frozen=True)
class BatchesConfig:
    """Which samples form a batch. The samples of a batch are each other's negatives.

    Parameters
    ----------
    selector
        ``random``, or ``active``: samples that were hard to distinguish at their last visit (`active_batches`).
    group_size
        g: number of hard samples in a group; a batch holds several groups. None: the whole batch is one group.
    neighbours
        Number of nearest neighbours of a sample that may join its group. None: twice ``group_size``.
    skip_nearest
        Number of the very nearest neighbours that are excluded: likely copies and false negatives.
    active_share
        Share of every batch that consists of groups. The rest are random samples.
    start_epoch
        First epoch with active batches; at least 1, because the first epoch has no embeddings to choose by.
    """

    selector: Literal["random", "active"] = "random"
    group_size: int | None = None
    neighbours: int | None = None
    skip_nearest: int = 0
    active_share: float = 1.0
    start_epoch: int = 1

    def __post_init__(self) -> None:
        require(self.selector in ("random", "active"), "batches.selector", "random or active", self.selector)
        require(self.group_size is None or self.group_size >= 2, "batches.group_size", "at least 2", self.group_size)
        require(self.neighbours is None or self.neighbours >= 1, "batches.neighbours", "at least 1", self.neighbours)
        require(self.skip_nearest >= 0, "batches.skip_nearest", "at least 0", self.skip_nearest)
        require(0 <= self.active_share <= 1, "batches.active_share", "in [0, 1]", self.active_share)
        require(self.start_epoch >= 1, "batches.start_epoch", "at least 1", self.start_epoch)


@dataclass(frozen=True)
class DictionaryConfig:
    """The dictionary: negatives from beyond the batch.

    Parameters
    ----------
    selector
        ``none``: no dictionary, in-batch contrast only; or ``active`` (the paper's), ``newest`` (MoCo's queue),
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
        Whether a sample may be chosen that is already in the dictionary, or is in the batch. If not, the run needs at
        least ``size + optim.batch_size`` files.
    select_every
        Steps between selections. Each selection chooses ``select_every`` times the batch size.
    refresh
        Which keys are re-encoded with the current key encoder: ``none``; ``selected``, the chosen keys when they are
        chosen; ``dictionary``, all keys. The samples' uint8 frames and float16 audio are kept for this (0.6 GB for the
        default sizes). Default: ``selected``, because stale keys cost more than selection gains
        (docs/evidence-dictionary.md); ``none`` for ``newest``, whose keys are fresh anyway.
    refresh_every
        Steps between refreshes of the whole ``dictionary``.
    refresh_device
        Where the inputs are kept: in memory of the ``cpu``, or on the ``accelerator`` that trains.
    warmup_steps
        Steps with in-batch contrast only, before the dictionary's keys join the loss; the dictionary fills meanwhile.
        Cross-batch memory (Wang et al., 2020) waits like this until the encoders change slowly. With
        ``objective.batch_keys`` other than ``online`` it was not needed here.
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
        """``refresh``, or its default."""
        if self.refresh is not None:
            return self.refresh
        return "none" if self.selector in ("none", "newest") else "selected"

    def __post_init__(self) -> None:
        require(
            self.initial_centers == "none" or self.selector == "active",
            "dictionary.initial_centers",
            "none for another dictionary.selector than active",
            self.initial_centers,
        )
        require(self.select_every >= 1, "dictionary.select_every", "at least 1", self.select_every)
        require(self.refresh_every >= 1, "dictionary.refresh_every", "at least 1", self.refresh_every)
        require(self.warmup_steps >= 0, "dictionary.warmup_steps", "at least 0", self.warmup_steps)
        require(self.size >= 1, "dictionary.size", "at least 1", self.size)
        require(self.pool_size >= 1, "dictionary.pool_size", "at least 1", self.pool_size)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer: AdamW with linear warm-up and cosine decay to zero.

    Parameters
    ----------
    batch_size
        M, clips per step, over all processes.
    chunk_size
        Clips that a process encodes at a time; None: its whole part of the batch. The loss is over the whole batch all
        the same, by gradient caching (Gao et al., 2021), for one more forward pass. Exact with ``encoder.norm: group``,
        which it needs; a tower's own batch norm sees a chunk.
    steps
        Number of training steps.
    learning_rate
        Peak learning rate.
    warmup_steps
        Steps of the warm-up, fewer than ``steps``. Default: 50, or a quarter of the steps of a run of fewer than 200.
    weight_decay
        Weight decay of matrices and kernels; norms and biases have none.
    """

    batch_size: int = 32
    chunk_size: int | None = None
    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "optim.batch_size", "at least 2", self.batch_size)
        require(self.chunk_size is None or self.chunk_size >= 1, "optim.chunk_size", "at least 1", self.chunk_size)
        require(self.steps >= 1, "optim.steps", "at least 1", self.steps)
        require(self.learning_rate > 0, "optim.learning_rate", "positive", self.learning_rate)
        if self.warmup_steps is not None:
            require(
                0 <= self.warmup_steps < self.steps,
                "optim.warmup_steps",
                f"at least 0 and below optim.steps ({self.steps}), or the rate would never fall",
                self.warmup_steps,
            )
        require(self.weight_decay >= 0, "optim.weight_decay", "at least 0", self.weight_decay)

    @property
    def warmup(self) -> int:
        """``warmup_steps``, or its default."""
        return min(50, self.steps // 4) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class TrainConfig:
    """Which parts of the encoders are trained.

    Parameters
    ----------
    video, audio
        ``all``; ``head``, with a frozen backbone; ``last:N``, the head and the last N parts of the backbone; or
        ``lora``, the head and low-rank adapters. If both are ``head``, features are kept instead of decoding the files
        again (``data.feature_windows``), and thousands of clips a second train on a CPU.
    lora_rank
        Rank of the adapters.
    backbone_learning_rate
        Peak learning rate of the backbones, adapters included. Default: ``optim.learning_rate``.
    checkpoint_activations
        Whether to compute the activations of a block of the backbones again in the backward pass, instead of keeping
        them: less memory, for about one more forward pass.
    compile
        Whether to compile the backbones with `torch.compile`. It takes minutes at the start, and a C++ compiler.
    """

    video: str = "all"
    audio: str = "all"
    lora_rank: int = 8
    backbone_learning_rate: float | None = None
    checkpoint_activations: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for modality in MODALITIES:
            try:
                check_train_mode(getattr(self, modality))
            except ValueError as error:
                raise ConfigError(f"train.{modality} {error}") from error
        require(self.lora_rank >= 1, "train.lora_rank", "at least 1", self.lora_rank)
        rate = self.backbone_learning_rate
        require(rate is None or rate > 0, "train.backbone_learning_rate", "positive", rate)


@dataclass(frozen=True)
class PretrainConfig:
    """All settings of a run.

    Parameters
    ----------
    data, encoder, train, batches, dictionary, objective, optim
        Settings of the components.
    seed
        Seed of weights, order, windows, augmentation and selection.
    precision
        ``auto`` uses bf16 autocast if the device has hardware for it; ``bf16``, ``fp16`` (with a scaled loss, for GPUs
        without bf16) and ``fp32`` force one.
    save_every
        Steps between checkpoints. The last two and the best are kept, and the end of the run is always one.
    keep_every
        Also keep the checkpoints at multiples of this step; 0: none of them.
    health_every
        Steps between health measurements of the embeddings and dictionaries.
    eval_every
        Steps between evaluations on held-out files; 0: none. The checkpoint with the best result is kept.
    eval_files
        Maximum number of files for an evaluation: as many held-out ones, and as many of the training files.
    max_skipped_steps
        Steps in a row that may be skipped because a loss or gradient is not finite; one more ends the run.
    check_ranks_every
        Steps between checks that all processes hold the same weights and dictionaries; 0: none.
    tracker
        Where metrics are shown, besides ``metrics.jsonl``: ``tensorboard``, ``mlflow``, ``wandb`` or ``none``.
    """

    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    batches: BatchesConfig = field(default_factory=BatchesConfig)
    dictionary: DictionaryConfig = field(default_factory=DictionaryConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    precision: PrecisionName = "auto"
    save_every: int = 100
    keep_every: int = 0
    health_every: int = 20
    eval_every: int = 0
    eval_files: int = 512
    max_skipped_steps: int = 10
    check_ranks_every: int = 0
    tracker: TrackerName = "tensorboard"

    @property
    def keeps_features(self) -> bool:
        """Whether both backbones are frozen, so that their features are computed once and kept."""
        pooled = self.encoder.frame_pooling == "mean"  # else the pooling of the frames is trained
        return pooled and self.train.video == self.train.audio == "head"

    @property
    def trains_tower(self) -> bool:
        """Whether a tower is trained, which may have dropout."""
        return any(is_tower(getattr(self.encoder, m)) and getattr(self.train, m) != "head" for m in MODALITIES)

    @property
    def batch_keys(self) -> BatchKeys:
        """``objective.batch_keys``, or its default."""
        if self.objective.batch_keys is not None:
            return self.objective.batch_keys
        return "online" if self.dictionary.selector == "none" else "both"

    def _check_terms(self) -> None:
        """Check that the rest of the settings fits the terms of the objective."""
        objective, clip = self.objective, self.data.clip
        terms = objective.terms.weights()
        require(
            self.dictionary.selector == "none" or "cross_modal" in terms,
            "dictionary.selector",
            "none where objective.terms.cross_modal is 0",
            self.dictionary.selector,
        )
        require(
            self.optim.chunk_size is None or terms.keys() <= {"cross_modal", "crossclr"},
            "optim.chunk_size",
            "null with objective.terms that encode more than the batch, all but cross_modal and crossclr",
            self.optim.chunk_size,
        )
        require(
            "crossclr" not in terms or self.objective.crossclr.queue_size >= self.optim.batch_size,
            "objective.crossclr.queue_size",
            f"at least optim.batch_size ({self.optim.batch_size})",
            self.objective.crossclr.queue_size,
        )
        require(
            "face" not in terms or self.data.augment.window == 1,
            "data.augment.window",
            "1 with objective.terms.face, which reconstructs the whole clip from the sound of a view",
            self.data.augment.window,
        )
        for name, needs in objective.needs.items():
            require(
                not self.keeps_features or not needs.maps,
                f"objective.terms.{name}",
                "0 with train.video and train.audio both head: kept features have no feature map",
                terms[name],
            )
        both = len(objective.modalities) == 2
        require(
            self.data.augment.window == 1
            or not both
            or abs(clip.picture_seconds - clip.audio_seconds) < 1 / clip.frame_rate_hz,
            "data.augment.window",
            "1 where a clip's picture and sound are not equally long, or parts of other times would be paired",
            self.data.augment.window,
        )
        require(
            "face" not in terms or clip.picture_seconds <= clip.audio_seconds,
            "data.clip.audio_seconds",
            f"at least the {clip.picture_seconds:g} s of picture with objective.terms.face",
            clip.audio_seconds,
        )
        require(
            not self.data.shuffle_pairs or self.optim.batch_size >= 4,
            "optim.batch_size",
            "at least 4 with data.shuffle_pairs, for pictures, sounds and second views of different files",
            self.optim.batch_size,
        )
        if "ctp" in terms:
            require(self.data.view_frame_count >= 2, "data.clip.frame_count", "at least 2 in a view with ctp", 1)
            side = min(clip.frame_height, clip.frame_width)
            require(side >= 16, "data.clip.frame_height and frame_width", "at least 16 with objective.terms.ctp", side)
        if not objective.aligns:
            named = ", ".join(terms)
            no_space = f"0 where no term brings video and audio into one space ({named})"
            require(self.eval_every == 0, "eval_every", no_space, self.eval_every)
        if len(objective.trained_modalities) == 1:
            only = f"where objective.terms only train the {objective.trained_modalities[0]}"
            require(self.batches.selector == "random", "batches.selector", f"random {only}", self.batches.selector)
            require(not self.keeps_features, "train.video and train.audio", f"not both head {only}", "head")

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "at least 0", self.seed)
        require(self.precision in get_args(PrecisionName), "precision", "auto, bf16, fp16 or fp32", self.precision)
        require(self.save_every >= 1, "save_every", "at least 1", self.save_every)
        require(self.keep_every >= 0, "keep_every", "at least 0", self.keep_every)
        require(self.health_every >= 1, "health_every", "at least 1", self.health_every)
        require(self.eval_every >= 0, "eval_every", "at least 0", self.eval_every)
        require(self.eval_files >= 2, "eval_files", "at least 2", self.eval_files)
        require(self.max_skipped_steps >= 0, "max_skipped_steps", "at least 0", self.max_skipped_steps)
        require(self.check_ranks_every >= 0, "check_ranks_every", "at least 0", self.check_ranks_every)
        require(self.tracker in get_args(TrackerName), "tracker", ", ".join(get_args(TrackerName)), self.tracker)
        require(
            self.batches.group_size is None or self.batches.group_size <= self.optim.batch_size,
            "batches.group_size",
            f"at most optim.batch_size ({self.optim.batch_size})",
            self.batches.group_size,
        )
        require(
            self.encoder.video_input == "frames" or self.data.clip.frame_count >= 2,
            "data.clip.frame_count",
            f"at least 2 with encoder.video_input={self.encoder.video_input}, which is what changes between frames",
            self.data.clip.frame_count,
        )
        own = [m for m in MODALITIES if not is_tower(getattr(self.encoder, m))]
        require(
            self.optim.chunk_size is None or not own or self.encoder.norm == "group",
            "optim.chunk_size",
            f"null with encoder.norm={self.encoder.norm}, whose statistics would be those of a chunk",
            self.optim.chunk_size,
        )
        self._check_terms()
        if self.dictionary.selector != "none":
            require(
                self.dictionary.warmup_steps < self.optim.steps,
                "dictionary.warmup_steps",
                f"below optim.steps ({self.optim.steps}), or the dictionary would never join the loss",
                self.dictionary.warmup_steps,
            )
            chosen = self.optim.batch_size * self.dictionary.select_every
            require(
                self.dictionary.size >= chosen,
                "dictionary.size",
                f"at least optim.batch_size times dictionary.select_every ({chosen})",
                self.dictionary.size,
            )
            require(
                self.dictionary.pool_size >= chosen,
                "dictionary.pool_size",
                f"at least optim.batch_size times dictionary.select_every ({chosen})",
                self.dictionary.pool_size,
            )
        if self.dictionary.selector == "none" or self.dictionary.warmup_steps > 0 or self.batch_keys == "both":
            require(
                self.objective.in_batch,
                "objective.in_batch",
                "true where dictionary.selector is none, dictionary.warmup_steps positive or objective.batch_keys both "
                "(else a loss has nothing to contrast with)",
                self.objective.in_batch,
            )
