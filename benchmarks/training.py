"""Clips per second of the engine beside a plain PyTorch loop, and the memory it takes beside what a formula says.

The clips are made up and already in memory. Variants take turns, forwards in one round and backwards in the next, so
that what disturbs the machine disturbs all. Printed are medians over the rounds; a ratio to the reference is the median
of each round's ratio.

* ``memory``: bytes of every component: by formula (docs/memory-speed.md), as tensors, and the growth of the process.
* ``choosing``: no dictionary, the plain queue, active ones, and active batches, beside two peers written out below: a
  plain loop with symmetric InfoNCE within the batch, and the same with momentum keys, which every dictionary needs.
* ``ways``: the plain queue's step in float32, bf16, compiled, with activations computed again, and in chunks.
* ``processes``: no dictionary, on one process and on two, with the same batch over all. A figure that shows that it
  works: on one machine without a second device they share the cores.

``python benchmarks/training.py --scale cpu --out benchmarks/results/training-cpu.json``: about six minutes on two
cores. ``--scale gpu`` has the paper's sizes; ``--scale smoke`` says nothing but that it runs.
"""

import argparse
import dataclasses
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

# It also puts stand-ins in the place of missing libraries, so it comes before cmacc.
from step_overhead import SCALES, VARIANTS, config_of, first_step_of, learner_of, made_up_batch, timed_step

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cmacc.clips import ClipBatch, ClipSpec
from cmacc.encoders import (
    MODALITIES,
    CompilerError,
    EncoderConfig,
    checkpoint_activations,
    momentum_copy,
    require_compiler,
    unwrapped,
)
from cmacc.objectives import ObjectiveInputs
from cmacc.pretraining import BatchesConfig, DictionaryConfig, OptimConfig, PretrainConfig, SampleMemory
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.learner import Learner, autocast_dtype, default_device, untrained_encoder
from cmacc.pretraining.utilisation import model_flops_per_clip, peak_flops_per_second

PARTS = ("memory", "choosing", "ways", "processes")
BYTES_A_SCORE = 9  # that the loss keeps for its backward pass, of every score of one direction
ENGINE = ("none", "newest", "active", "active, fresh")
_SMALL_R3D = dataclasses.replace(
    SCALES["small"],
    data=dataclasses.replace(SCALES["small"].data, clip=ClipSpec(8, 8.0, 48, 48, 2.0)),
    encoder=EncoderConfig(video="r3d_18", audio="resnet18"),
    dictionary=DictionaryConfig(size=64, pool_size=256),
    optim=OptimConfig(batch_size=8),
)
_WIDE_TINY = dataclasses.replace(SCALES["small"], dictionary=SCALES["paper"].dictionary, optim=SCALES["paper"].optim)
# By scale: rounds, samples of the memory for active batches, settings by the name of the encoders.
CASES: dict[str, tuple[int, int, dict[str, PretrainConfig]]] = {
    "smoke": (1, 64, {"tiny": SCALES["tiny"]}),
    "cpu": (4, 2048, {"tiny": SCALES["small"], "r3d_18": _SMALL_R3D}),
    "gpu": (10, 8192, {"tiny": _WIDE_TINY, "r3d_18": SCALES["paper"]}),
}


class Peer:
    """The plain loop: the same encoders, symmetric InfoNCE within the batch, AdamW.

    ``with_keys`` also encodes the batch by momentum copies, as every method with a dictionary must.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, with_keys: bool) -> None:
        self.views = ClipViews(config, device)
        self.encoder = untrained_encoder(config).to(device)
        self.key_encoder = momentum_copy(self.encoder) if with_keys else None
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=1e-3, weight_decay=0.01)
        self.dtype, self.temperature = autocast_dtype(config.precision, device), config.objective.temperature

    def step(self, batch: ClipBatch) -> float:
        inputs = self.views.of(batch, 0)
        device = batch.frames.device
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            encodings = self.encoder(**inputs)
            if self.key_encoder is not None:
                with torch.no_grad():
                    self.key_encoder(**inputs)
        scores = encodings["video"].embedding @ encodings["audio"].embedding.T / self.temperature
        own = torch.arange(len(scores), device=device)
        loss = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.key_encoder is not None:
            with torch.no_grad():
                keys, queries = list(self.key_encoder.parameters()), list(self.encoder.parameters())
                torch._foreach_lerp_(keys, queries, 0.01)
        return loss.item()


Step = Callable[[ClipBatch, int], object]


def taking_turns(steps: dict[str, Step], base: PretrainConfig, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of every step, round by round, on the same batches; after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        step = first_step_of(base) + number
        batch = made_up_batch(base, step, device)
        for name in list(steps)[:: 1 if number % 2 else -1]:
            _wait_for(device)
            started = time.perf_counter()
            steps[name](batch, step)
            _wait_for(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(
    seconds: dict[str, list[float]], references: tuple[str, ...], batch_size: int, flops: dict[str, float], peak: float
) -> dict[str, dict[str, float]]:
    """By variant: the median step, clips per second, utilisation, and the step in units of the references'."""
    rows = {}
    for name, taken in seconds.items():
        clips_per_second = batch_size / statistics.median(taken)
        rows[name] = {
            "milliseconds": 1000 * statistics.median(taken),
            "clips_per_second": clips_per_second,
            "flop_utilisation": clips_per_second * flops[name] / peak,
        }
        for reference in references:
            ratios = [mine / other for mine, other in zip(taken, seconds[reference], strict=True)]
            rows[name][f"of {reference}"] = statistics.median(ratios)
    return rows


def flops_of(learner: Learner, with_keys: bool) -> float:
    """Model FLOPs for each clip."""
    batch = made_up_batch(learner.config, 0, learner.device)
    inputs = {modality: values[:2] for modality, values in learner.views.of(batch, 0).items()}
    return model_flops_per_clip(learner.encoder, inputs, learner.key_encoder if with_keys else None)


def engine_step(config: PretrainConfig, device: torch.device) -> tuple[Learner, Step]:
    """A step of the engine, as the trainer runs it."""
    learner = learner_of(config, device)
    return learner, lambda batch, step: timed_step(learner, batch, step)


def choosing(base: PretrainConfig, device: torch.device, rounds: int, samples: int) -> dict[str, Any]:
    """Forms of choosing negatives and batches, beside the peers."""
    size = base.optim.batch_size
    steps: dict[str, Step] = {}
    for name, with_keys in (("peer", False), ("peer with momentum keys", True)):
        peer = Peer(base, device, with_keys)
        steps[name] = lambda batch, _, peer=peer: peer.step(batch)  # type: ignore[misc]
    for name in ENGINE:
        learner, steps[name] = engine_step(config_of(base, VARIANTS[name]), device)
    flops = {name: flops_of(learner, name not in ("peer", "none")) for name in steps}

    batches = BatchesConfig("active", group_size=8)
    learner, step_of = engine_step(dataclasses.replace(config_of(base, VARIANTS["none"]), batches=batches), device)
    learner.memory = memory = SampleMemory(samples, base.encoder.embedding_size, batches, size, base.seed)
    steps["none, active batches"] = lambda batch, step: step_of(
        dataclasses.replace(batch, sample_ids=batch.sample_ids % samples), step
    )
    flops["none, active batches"] = flops["none"]
    for part in (memory.video, memory.audio):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(0)))
    memory.known.fill_(True)
    started = time.perf_counter()
    memory.order_of(1)
    planning = (time.perf_counter() - started) / (samples // size)  # once an epoch, here a part of every step

    seconds = taking_turns(steps, base, device, rounds)
    seconds["none, active batches"] = [taken + planning for taken in seconds["none, active batches"]]
    peak = peak_flops_per_second(device, autocast_dtype(base.precision, device))
    return {
        "batch_size": size,
        "tflop_per_second_of_a_product": peak / 1e12,
        "gflop_per_clip": {"without keys": flops["none"] / 1e9, "with keys": flops["newest"] / 1e9},
        "plan_of_active_batches": {"samples": samples, "milliseconds_per_step": 1000 * planning},
        "rows": rows_of(seconds, ("peer", "peer with momentum keys", "newest"), size, flops, peak),
    }


def ways(base: PretrainConfig, device: torch.device, rounds: int) -> dict[str, Any]:
    """The plain queue's step, run in several ways."""
    base = dataclasses.replace(config_of(base, VARIANTS["newest"]), precision="fp32")
    size = base.optim.batch_size

    def with_train(config: PretrainConfig, **settings: bool) -> PretrainConfig:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))

    half = dataclasses.replace(base, precision="bf16")
    variants = {
        "fp32": base,
        "bf16": half,
        # In one type alone. On a CPU, torch 2.15 gave NaN for bf16 compiled after float32 in the same process.
        **(
            {"bf16, compiled": with_train(half, compile=True)}
            if device.type == "cuda"
            else {"fp32, compiled": with_train(base, compile=True)}
        ),
        "fp32, checkpoint_activations": with_train(base, checkpoint_activations=True),
        "fp32, chunks": dataclasses.replace(base, optim=dataclasses.replace(base.optim, chunk_size=size // 4)),
    }
    left_out = {}
    if reason := _why_not_compiled(device, base):
        left_out = {name: reason for name in variants if "compiled" in name}
    if not hasattr(Learner, "in_chunks"):
        left_out["fp32, chunks"] = "this engine does not encode in chunks (gradient caching)"
    steps, first_seconds, flops = {}, {}, 0.0
    for name in [name for name in variants if name not in left_out]:
        learner, steps[name] = engine_step(variants[name], device)
        flops = flops or flops_of(learner, True)
        started = time.perf_counter()
        steps[name](made_up_batch(base, 0, device), first_step_of(base))
        _wait_for(device)
        first_seconds[name] = time.perf_counter() - started
    seconds = taking_turns(steps, base, device, rounds)
    peaks = {dtype: peak_flops_per_second(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    rows = rows_of(seconds, ("fp32",), size, dict.fromkeys(seconds, flops), 1.0)
    for name, row in rows.items():
        row["flop_utilisation"] /= peaks[torch.bfloat16 if name.startswith("bf16") else torch.float32]
        row["seconds_of_the_first_step"] = first_seconds[name]
    return {"batch_size": size, "rows": rows, "left_out": left_out}


def _why_not_compiled(device: torch.device, config: PretrainConfig) -> str:
    if config.data == SCALES["tiny"].data:
        return "compiling takes longer than all else at this size"
    try:
        require_compiler(device)
    except CompilerError as error:
        return str(error)
    return ""


def memory(base: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """Bytes of every component: by formula and as tensors; and by how much the process grew over two steps."""
    grown_before = _peak_bytes(device)
    config = config_of(base, VARIANTS["active, fresh"])
    learner = learner_of(config, device)
    for step in range(2):
        timed_step(learner, made_up_batch(config, step, device), first_step_of(config) + step)
    grown = _peak_bytes(device) - grown_before
    encoder = unwrapped(learner.encoder)
    assert learner.input_buffer is not None

    batch = made_up_batch(config, 0, device)
    inputs = learner.views.of(batch, 0)
    kept = activation_bytes(learner, inputs)
    queries = learner.encoder(**inputs)
    negatives = learner.negatives(first_step_of(config))
    held = [keys.embedding for keys in negatives.values()] + [e.embedding for e in queries.values()]
    scores = _Saved(held)
    with scores:
        learner.objective(ObjectiveInputs(queries, {}, negatives, batch.sample_ids))
    size = config.optim.batch_size
    sizes = {modality: getattr(encoder, modality).penultimate_size for modality in MODALITIES}
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    statistics_bytes = _bytes(encoder.buffers())
    measured = {
        "weights": _bytes([*encoder.parameters(), *encoder.buffers()]),
        "gradients": _bytes(p.grad for p in encoder.parameters() if p.grad is not None),
        "optimizer": _bytes(v for state in learner.optimizer.state.values() for v in state.values()),
        "key encoders": _bytes([*learner.key_encoder.parameters(), *learner.key_encoder.buffers()]),
        "pools": sum(_bytes(one.pool.buffers()) for one in learner.dictionaries.values()),
        "dictionaries": sum(_bytes(one.dictionary.buffers()) for one in learner.dictionaries.values()),
        "input buffer": learner.input_buffer.byte_count,
        "scores": scores.byte_count,
    }
    checkpoint_activations(encoder)
    recomputed = activation_bytes(learner, inputs)
    formula = formulas(config, weights, statistics_bytes, sizes)
    return {
        "settings": {"M": size, "K": config.dictionary.size, "N": config.dictionary.pool_size,
                     "d": config.encoder.embedding_size, "weights": weights},
        "components": {name: {"formula": formula[name], "measured": measured[name]} for name in formula},
        "activations_per_clip": {"all kept": kept / size, "checkpoint_activations": recomputed / size},
        "sum": sum(measured.values()) + kept,
        "grown": grown,
    }  # fmt: skip


def activation_bytes(learner: Learner, inputs: dict[Any, Tensor]) -> int:
    """Bytes that the query encoders keep of these inputs for the backward pass."""
    encoder = learner.encoder
    saved = _Saved([*encoder.parameters(), *encoder.buffers(), *inputs.values()])
    with learner.autocast(), saved:
        encodings = encoder(**inputs)
    del encodings
    return saved.byte_count


def formulas(config: PretrainConfig, weights: int, buffers: int, sizes: dict[Any, int]) -> dict[str, float]:
    """Bytes of every component of one process without others: docs/memory-speed.md has them with R processes.

    Parameters
    ----------
    config
        Settings, all trained in float32.
    weights
        Number of weights of both encoders.
    buffers
        Bytes of their buffers.
    sizes
        p, size of the penultimate features, by modality.
    """
    m, d = config.optim.batch_size, config.encoder.embedding_size
    k, n = config.dictionary.size, config.dictionary.pool_size
    clip = config.data.clip
    per_clip = clip.frame_count * clip.frame_height * clip.frame_width * 3 + 2 * clip.sample_count + 16
    per_key = sum(4 * (d + p) + 28 for p in sizes.values())
    return {
        "weights": 4 * weights + buffers,
        "gradients": 4 * weights,
        "optimizer": 8 * weights,
        "key encoders": 4 * weights + buffers,
        "pools": n * per_key,
        "dictionaries": k * per_key,
        "input buffer": n * per_clip,
        "scores": 2 * BYTES_A_SCORE * m * (m + k),
    }


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps within it for a backward pass, without those of ``known`` tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        self._storages: dict[int, int] = {}
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def byte_count(self) -> int:
        return sum(self._storages.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processes(scale: str, counts: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Clips per second of the step without dictionary, the same batch over one process and over two."""
    if find_spec("cmacc.pretraining.processes") is None:
        return {"left_out": "this engine runs one process"}
    found = {}
    for count in counts:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
            __file__, "--scale", scale, "--parts", "one of the processes",
        ]  # fmt: skip
        threads = max(1, torch.get_num_threads() // count)
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        )
        if done.returncode:
            return {"failed": done.stderr[-2000:]}
        found[str(count)] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"clips_per_second": found}


def one_of_the_processes(scale: str) -> None:
    """What each process of `processes` runs; the first prints the clips per second of all."""
    from accelerate import PartialState

    from cmacc.pretraining.processes import Processes

    device = PartialState().device
    together = Processes.current(device)
    rounds, _, cases = CASES[scale]
    base = config_of(cases["tiny"], VARIANTS["none"])
    learner = Learner.build(
        untrained_encoder(base), ClipViews(base, device), base, device, autocast_dtype(base.precision, device)
    )
    part = together.part(base.optim.batch_size)

    def step_of(batch: ClipBatch, step: int) -> None:
        mine = (batch.frames[part], batch.waveforms[part], batch.sample_ids[part], batch.labels[part])
        timed_step(learner, ClipBatch(*mine, failures={}), step)

    seconds = taking_turns({"step": step_of}, base, device, rounds)["step"]
    if together.is_first:
        print(json.dumps(base.optim.batch_size / statistics.median(seconds)), flush=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(CASES), default="cpu")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "one of the processes"], default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="rounds of every comparison; default: by scale")
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    options = parser.parse_args(arguments)
    if options.parts == ["one of the processes"]:
        one_of_the_processes(options.scale)
        return {}
    device = default_device()
    rounds, samples, cases = CASES[options.scale]
    rounds = options.rounds or rounds
    # On a CPU in float32, whatever its units: `ways` has bf16 beside it.
    precision: Any = "fp32" if device.type == "cpu" else "auto"
    cases = {name: dataclasses.replace(case, precision=precision) for name, case in cases.items()}
    report: dict[str, Any] = {
        "scale": options.scale,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "rounds": rounds,
    }
    for part in (part for part in PARTS if part in options.parts):  # memory first: a process only grows
        started = time.perf_counter()
        if part == "processes":
            report[part] = processes(options.scale)
        elif part == "memory":
            report[part] = memory(cases["tiny"], device)
        elif part == "choosing":
            report[part] = {name: choosing(case, device, rounds, samples) for name, case in cases.items()}
        else:
            name, case = next(reversed(cases.items())) if options.scale == "gpu" else next(iter(cases.items()))
            report[part] = {name: ways(case, device, rounds)}
        gc.collect()
        print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
