"""The lines of the certificate that train in several processes (see `verify`)."""

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing.spawn import start_processes

from cmacc.encoders import WholeBatchNorm
from cmacc.encoders.towers.trust import is_trusting_code, trusting_code
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.verify.lines import ROUNDING, Line, Subject, Trace, compare, trace, trainer_of

# After it, processes that wait for one that died or hangs give up.
_PATIENCE = timedelta(minutes=10)


def over_processes(subject: Subject, count: int) -> list[Line]:
    """Several processes, each with its part of the batch, against one with the whole batch."""
    names = {scenario: f"{count} processes = 1, {scenario}" for scenario in subject.scenarios}
    reason = subject.depends_on_parts(WholeBatchNorm)
    if subject.config.data.shuffle_pairs:
        reason = "data.shuffle_pairs shuffles the clips of a part"
    if reason is not None:
        return [Line.skipped(name, reason) for name in names.values()]
    device = _common_device(subject.device, count)
    found = traces_of(count, subject.scenarios, device)
    compares = f"losses, gradient norms, weights, samples, float64{'' if device == subject.device else ', on the CPU'}"
    return [
        compare(names[scenario], compares, found[scenario], trace(trainer_of(config, device)), ROUNDING)
        for scenario, config in subject.scenarios.items()
    ]


def traces_of(count: int, configs: dict[str, PretrainConfig], device: torch.device) -> dict[str, Trace]:
    """The traces of these settings, by as many processes; those of the first one.

    Raises
    ------
    Exception
        A process raised it, or died.
    """
    with TemporaryDirectory(prefix="cmacc-verify-") as folder:
        start_processes(
            worker,
            (count, folder, list(configs.values()), device.type, is_trusting_code()),
            count,
            start_method="spawn",
        )
        return {name: load_file(_file(folder, number)) for number, name in enumerate(configs)}


def worker(rank: int, count: int, folder: str, configs: list[PretrainConfig], device_type: str, trusting: bool) -> None:
    """What a process does: its part of every batch of every run. The first one writes the traces."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if device_type == "cuda" else "gloo"
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        for number, config in enumerate(configs):
            with trusting_code() if trusting else nullcontext():
                found = trace(trainer_of(config, device))
            if rank == 0:
                save_file(found, _file(folder, number))
    finally:
        dist.destroy_process_group()


def _file(folder: str, number: int) -> Path:
    return Path(folder) / f"{number}.safetensors"


def _common_device(device: torch.device, count: int) -> torch.device:
    """Where that many processes can train: on GPUs if each has its own, else on the CPU."""
    enough = device.type != "cuda" or torch.cuda.device_count() >= count
    return device if enough else torch.device("cpu")
