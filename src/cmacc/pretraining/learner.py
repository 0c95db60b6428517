"""The state that a step changes: query encoders, key encoders, dictionaries, the objective, the optimizer."""

import inspect
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cmacc.encoders import (
    MODALITIES,
    AudioVisualEncoder,
    Backbone,
    Encoder,
    EncoderPair,
    Encoding,
    Modality,
    WholeBatchNorm,
    checkpoint_activations,
    compile_backbones,
    is_tower,
    momentum_copy,
    set_trained,
    statistics_held,
)
from cmacc.negatives import ActiveDictionary, InputBuffer, Keys
from cmacc.objectives import BidirectionalContrast, Objective
from cmacc.pretraining.config import PrecisionName, PretrainConfig
from cmacc.pretraining.memory import SampleMemory
from cmacc.pretraining.optimization import build_optimizer
from cmacc.pretraining.problem import Views
from cmacc.pretraining.processes import Processes
from cmacc.pretraining.terms import build_objective

_NEW_NAME = "forward_sync_buffers"
_SYNCS_BUFFERS = (
    _NEW_NAME if _NEW_NAME in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
)


@dataclass
class Learner:
    """Everything that a step changes, and its settings.

    There are no dictionaries with ``selector: none``, no input buffer without ``refresh``, and no memory with random
    batches. With several processes, each holds a part of the pools and of the input buffer; all else is the same on
    all of them.
    """

    config: PretrainConfig
    processes: Processes
    encoder: EncoderPair
    replica: nn.Module  # the encoder; with several processes, wrapped so that gradients are exchanged
    key_encoder: EncoderPair
    views: Views
    dictionaries: dict[Modality, ActiveDictionary]
    input_buffer: InputBuffer | None
    memory: SampleMemory | None
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast_dtype: torch.dtype | None
    device: torch.device
    selection_stream: torch.cuda.Stream | None
    trained_modalities: tuple[Modality, ...]  # only these are encoded
    query_modalities: tuple[Modality, ...]  # the loss depends on their queries
    query_maps: tuple[Modality, ...]  # whose queries come with their feature map
    skipped_in_a_row: int = 0  # steps

    @classmethod
    def build(
        cls,
        encoder: EncoderPair,
        views: Views,
        config: PretrainConfig,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        objective: Objective | None = None,
        memory: SampleMemory | None = None,
    ) -> "Learner":
        """A learner at step 0, for encoders and inputs of any kind.

        Parameters
        ----------
        encoder
            Query encoders, untrained or pretrained.
        views
            How batches become inputs of the encoders.
        config
            All settings.
        device
            Device to train on.
        autocast_dtype
            Autocast type of the encoders; None: float32.
        objective
            Objective. Default: the one in ``config.objective``.
        memory
            Embeddings for active batches; None if batches are random.

        Raises
        ------
        ValueError
            The batch or the pools cannot be divided among the processes, or the objective needs feature maps, which
            there are none of in chunks.
        """
        processes = Processes.current(device)
        _check_divisible(config, processes)
        encoder = encoder.to(device)
        trained_modalities = query_modalities = MODALITIES
        query_maps = MODALITIES if objective is not None and objective.needs_feature_maps else ()
        if objective is None:
            objective, own = build_objective(config, encoder), config.objective
            trained_modalities, query_modalities = own.trained_modalities, own.query_modalities
            query_maps = own.query_maps
        trained: list[nn.Module] = [encoder]
        if isinstance(objective, nn.Module):
            trained.append(objective.to(device))
        if _in_chunks(config, processes) and objective.needs_feature_maps:
            raise ValueError(
                f"optim.chunk_size must be null for an objective that needs feature maps, got {config.optim.chunk_size}"
            )
        if config.train.checkpoint_activations:
            checkpoint_activations(encoder)
        # Towers and objectives of others may have weights that no loss depends on.
        finds_unused = config.trains_tower or not isinstance(objective, BidirectionalContrast)
        replica, key_encoder = _replica(encoder, config, processes, finds_unused), momentum_copy(encoder)
        if config.train.compile:
            for pair in (encoder, key_encoder):
                compile_backbones(pair)
        return cls(
            config=config,
            processes=processes,
            encoder=encoder,
            replica=replica,
            key_encoder=key_encoder,
            views=views,
            dictionaries=_dictionaries(config, encoder, processes),
            input_buffer=input_buffer(config, processes),
            memory=memory,
            objective=objective,
            optimizer=build_optimizer(trained, config.optim, config.train.backbone_learning_rate),
            scaler=torch.amp.GradScaler(device.type, enabled=autocast_dtype == torch.float16),
            autocast_dtype=autocast_dtype,
            device=device,
            selection_stream=torch.cuda.Stream(device) if device.type == "cuda" else None,
            trained_modalities=trained_modalities,
            query_modalities=query_modalities,
            query_maps=query_maps,
        )

    def autocast(self) -> torch.autocast:
        """Autocast context; disabled if the learner uses float32."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def project(self, modality: str, feature_map: Tensor) -> Encoding:
        """What a query encoder makes of (a crop of) its feature map ``(M, C, ...)``: pooling and head.

        The running statistics do not change: evaluation and key encoders are for whole clips.
        """
        encoder: Encoder = getattr(self.encoder, modality)
        assert isinstance(encoder.backbone, Backbone)  # as it has given the map
        with self.autocast(), statistics_held(encoder):
            return encoder.project(encoder.backbone.pool(feature_map))

    @property
    def in_chunks(self) -> bool:
        """Whether this process encodes its part of a batch in chunks."""
        return _in_chunks(self.config, self.processes)

    @property
    def rows_at_a_time(self) -> int:
        """Clips that this process encodes at a time."""
        part = self.processes.part_size(self.config.optim.batch_size)
        return min(part, self.config.optim.chunk_size or part)

    @property
    def needs_keys(self) -> bool:
        """Whether a step needs the batch's keys from the key encoders."""
        return bool(self.dictionaries) or self.objective.needs_keys

    def negatives(self, step: int) -> dict[str, Keys]:
        """Keys of every dictionary, for the loss of a step; empty during ``dictionary.warmup_steps``."""
        if step < self.config.dictionary.warmup_steps:
            return {}
        return {modality: dictionary.negatives() for modality, dictionary in self.dictionaries.items()}

    def gradients(self) -> list[Tensor]:
        """The gradients of all weights that are trained."""
        groups = self.optimizer.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def statistics_of_parts(self) -> list[Tensor]:
        """Running statistics of norms that only see this process's part of a batch."""
        norms = (norm for norm in self.encoder.modules() if isinstance(norm, _BatchNorm) and norm.training)
        return [
            buffer
            for norm in norms
            if not isinstance(norm, WholeBatchNorm)
            for buffer in norm.buffers()
            if buffer.is_floating_point()
        ]

    def modules(self) -> dict[str, nn.Module]:
        """All modules with state, by their names in checkpoints."""
        modules: dict[str, nn.Module] = {"encoder": self.encoder, "key_encoder": self.key_encoder}
        modules |= {f"{modality}_dictionary": dictionary for modality, dictionary in self.dictionaries.items()}
        if isinstance(self.objective, nn.Module):
            modules["objective"] = self.objective
        if self.memory is not None:
            modules["memory"] = self.memory
        return modules

    def whole_pools(self) -> dict[str, Tensor]:
        """The pools of all processes as one, as a single process would hold them, by their names in checkpoints.

        A collective. In the ring of one process, the parts of a batch stand side by side.
        """
        if self.processes.count == 1:
            return {}
        size = self.processes.part_size(self.config.optim.batch_size)
        whole: dict[str, Tensor] = {}
        for modality, dictionary in self.dictionaries.items():
            for name, own in dictionary.pool.state_dict().items():
                if name == "pushed":
                    gathered = own * self.processes.count
                else:
                    parts = self.processes.gather(own).unflatten(0, (self.processes.count, -1, size))
                    gathered = parts.transpose(0, 1).flatten(0, 2)
                whole[f"{modality}_dictionary.pool.{name}"] = gathered
        return whole

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a tensor of a checkpoint: a part of the pools, and all of everything else."""
        if self.processes.count == 1 or "_dictionary.pool." not in name:
            return whole
        if name.endswith(".pushed"):
            return whole // self.processes.count
        batch_size = self.config.optim.batch_size
        if len(whole) != self.config.dictionary.pool_size:
            return whole  # of another configuration, as loading it will say
        own: Tensor = whole.unflatten(0, (-1, batch_size))[:, self.processes.part(batch_size)].flatten(0, 1)
        return own


def input_buffer(config: PretrainConfig, processes: Processes, first_handle: int = 0) -> InputBuffer | None:
    """A buffer deep enough for every key of this process that may be re-encoded; None if none may.

    A key is chosen while it is among the last N pushed. It then stays until about K others have been chosen, and one is
    chosen for each key pushed. So the buffer needs N samples, or N + K to re-encode the whole dictionary.
    """
    if config.dictionary.selector == "none" or config.dictionary.refresh_policy == "none":
        return None
    stays = config.dictionary.size if config.dictionary.refresh_policy == "dictionary" else 0
    store = processes.device if config.dictionary.refresh_device == "accelerator" else torch.device("cpu")
    # Whole batches, so that the oldest input does not depend on the number of processes.
    batches = math.ceil((config.dictionary.pool_size + stays) / config.optim.batch_size)
    return InputBuffer(batches * processes.part_size(config.optim.batch_size), store, first_handle)


def untrained_encoder(config: PretrainConfig, *, weights_of: Collection[Modality] = MODALITIES) -> AudioVisualEncoder:
    """The run's encoders before the first step: new ones, or towers with their own weights and new heads.

    Parameters
    ----------
    config
        Settings of the run.
    weights_of
        The modalities whose towers start from their own weights, see `AudioVisualEncoder`.

    Raises
    ------
    TowerError
        A tower cannot be opened, or cannot be trained as ``config.train`` says.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would also seed the caller's GPUs, which fork_rng does not restore here.
        torch.default_generator.manual_seed(config.seed)
        encoder = AudioVisualEncoder(config.encoder, weights_of=weights_of)
        if not is_tower(config.encoder.video):  # which may hold 2-D convolutions
            encoder.video.to(memory_format=torch.channels_last_3d)
        for modality in MODALITIES:
            set_trained(encoder, modality, getattr(config.train, modality), config.train.lora_rank)
        return encoder


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(precision: PrecisionName, device: torch.device) -> torch.dtype | None:
    """fp16 or bf16 if requested, or bf16 if ``auto`` finds hardware for it; else None."""
    if precision == "auto":
        if device.type == "cuda":
            has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # AMX multiplies bf16 tiles in hardware; without it bf16 on a CPU is slower than float32.
            has_units = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if has_units else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def _check_divisible(config: PretrainConfig, processes: Processes) -> None:
    size, pool = config.optim.batch_size, config.dictionary.pool_size
    processes.part(size)
    # Else the processes would not hold the keys that one process would: the end of its pool lies within a batch.
    if processes.count > 1 and config.dictionary.selector != "none" and pool % size:
        raise ValueError(
            f"dictionary.pool_size must be a multiple of optim.batch_size ({size}) with several processes, got {pool}"
        )


def _in_chunks(config: PretrainConfig, processes: Processes) -> bool:
    size = config.optim.chunk_size
    return size is not None and size < processes.part_size(config.optim.batch_size)


def _replica(encoder: EncoderPair, config: PretrainConfig, processes: Processes, finds_unused: bool) -> nn.Module:
    """The encoder, wrapped so that a backward pass exchanges its gradients with the other processes."""
    if processes.count == 1 or _in_chunks(config, processes):
        return encoder
    options: dict[str, Any] = {
        "device_ids": [processes.device] if processes.device.type == "cuda" else None,
        "find_unused_parameters": finds_unused,
        "gradient_as_bucket_view": True,
        _SYNCS_BUFFERS: False,  # they are equal, and a difference should be found
    }
    return DistributedDataParallel(encoder, **options)


def _dictionaries(
    config: PretrainConfig, encoder: EncoderPair, processes: Processes
) -> dict[Modality, ActiveDictionary]:
    if config.dictionary.selector == "none":
        return {}
    sizes: dict[Modality, int] = {modality: getattr(encoder, modality).penultimate_size for modality in MODALITIES}
    return {
        modality: ActiveDictionary(
            config.encoder.embedding_size,
            config.dictionary.size,
            config.dictionary.pool_size // processes.count,
            penultimate_size=penultimate_size,
            temperature=config.objective.temperature,
            selector=config.dictionary.selector,
            gradient=config.dictionary.gradient,
            initial_centers=config.dictionary.initial_centers,
            allow_repeats=config.dictionary.allow_repeats,
        ).to(processes.device, getattr(encoder, modality).last.weight.dtype)
        for modality, penultimate_size in sizes.items()
    }
