"""What a GPU shows of cmacc within a few minutes: is it right there, what does selection cost, how fast is a step.

``python benchmarks/gpu.py --budget-minutes 8 --out benchmarks/results`` runs seven parts in order of worth, each in a
process of its own with its share of the time, and writes ``gpu-<part>.json`` as soon as a part is done, so that a
machine that is taken away leaves what was measured:

* ``checks``: the CUDA tests (where pytest is installed); the same picks as on the CPU; a run of the engine.
* ``verify``: the certificate of ``cmacc verify --json`` on the GPU.
* ``training``: `benchmarks/training.py` at the paper's scale: active selection beside the peer, model FLOP utilisation,
  bf16, compiled, with activations computed again and in chunks (gradient caching). Its ``targets`` say whether active
  selection is within 5 % of the peer's step, and whether the best way reaches 40 % of the FLOPs of a large product.
* ``selection``: the step's phases with r3d_18 and resnet18 at M = 128, K = 3,840, N = 38,400, d = 512 in bf16, by
  `step_overhead`.
* ``throughput``: clips/s of r3d_18 forward and backward in bf16, eager and compiled, and model FLOP utilisation.
* ``evidence``: active selection, the plain queue and no dictionary on vectors, as in recipes/ablations/selectors.yaml,
  seed after seed as long as the time lasts.
* ``data``: bytes that a batch moves to the device, and how fast, from plain and from page-locked memory.

It needs torch, torchvision, accelerate and scikit-learn; the libraries that read files may be missing. ``--smoke
--device cpu`` runs tiny sizes of all of it, which says nothing but that it runs.
"""

import argparse
import dataclasses
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "benchmarks"))

from stand_ins import stand_in_for_missing

stand_in_for_missing("av", "pyarrow", "jsonargparse", "soxr", "fsspec", "yaml")

import torch

# Of the budget; what a part leaves goes to the next.
SHARES = {
    "checks": 0.15, "verify": 0.15, "training": 0.35, "selection": 0.1, "throughput": 0.12, "evidence": 0.1,
    "data": 0.03,
}  # fmt: skip
_VARIANTS = ["newest", "active", "active, fresh"]


def checks(device: torch.device, smoke: bool, seconds: float) -> dict[str, Any]:
    """Whether it works at all."""
    from cmacc.ablation import VectorWorld
    from cmacc.ablation.run import run_cell
    from cmacc.ablation.vectors import VectorDataset
    from cmacc.encoders import EncoderConfig
    from cmacc.negatives import kmeans_plusplus
    from cmacc.pretraining import DictionaryConfig, OptimConfig, PretrainConfig

    result: dict[str, Any] = {"pytest": "skipped: pytest is not installed here"}
    if find_spec("pytest") and find_spec("beartype") and not smoke:
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/negatives/test_cuda.py"]
        done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False, env=_environment())
        result["pytest"] = done.stdout.strip().splitlines()[-1:] or done.stderr[-500:]
    points = torch.randn(300 if smoke else 20_000, 64, generator=torch.Generator().manual_seed(0))

    def picks(where: str | torch.device, seed: int) -> list[int]:
        chosen: list[int] = kmeans_plusplus(
            points.to(where), 20, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        return chosen

    result["seeds with the CPU's picks, of 10"] = sum(picks("cpu", seed) == picks(device, seed) for seed in range(10))
    config = PretrainConfig(
        encoder=EncoderConfig(head="linear", embedding_size=64),
        dictionary=DictionaryConfig(
            selector="active", size=64, pool_size=256, refresh="selected", refresh_device="accelerator"
        ),
        optim=OptimConfig(batch_size=16, steps=20 if smoke else 400),
    )
    world = VectorWorld(samples=256 if smoke else 8192, held_out=64 if smoke else 2048)
    (point,) = run_cell(VectorDataset(world, 0, device), config, points=1, device=device)
    return result | {"a run of the engine": {"seconds": point.seconds, **point.metrics}}


def verify(device: torch.device, smoke: bool, seconds: float) -> dict[str, Any]:
    """The lines of the certificate."""
    from cmacc.pretraining.verify import verify as certificate

    if smoke:
        os.environ["CXX"] = "none"  # compiling takes longer than all else
    lines = certificate(device=device, processes=1)
    return {line.name: dataclasses.asdict(line) | {"result": line.result} for line in lines}


def training(device: torch.device, smoke: bool, seconds: float) -> dict[str, Any]:
    """`benchmarks/training.py`, and whether its targets are reached."""
    report = _main_of("training")(["--scale", "smoke" if smoke else "gpu"])
    rows = report["choosing"]["tiny" if smoke else "r3d_18"]["rows"]
    best = max(row["flop_utilisation"] for found in report["ways"].values() for row in found["rows"].values())
    return report | {
        "targets": {
            "active, of the peer's step, at most 1.05": rows["active"]["of peer"],
            "active, of the step of the peer with momentum keys, at most 1.05": (
                rows["active"]["of peer with momentum keys"]
            ),
            "best utilisation, at least 0.4": best,
        }
    }


def selection(device: torch.device, smoke: bool, seconds: float) -> dict[str, Any]:
    """`step_overhead` at the paper's scale."""
    arguments = ["--scale", "tiny" if smoke else "paper", "--rounds", "2" if smoke else "8", "--variants", *_VARIANTS]
    measured: dict[str, Any] = _main_of("step_overhead")(arguments)["seconds"]
    return measured


def _main_of(benchmark: str) -> Callable[[list[str]], dict[str, Any]]:
    main: Callable[[list[str]], dict[str, Any]] = runpy.run_path(str(ROOT / "benchmarks" / f"{benchmark}.py"))["main"]
    return main


def evidence(device: torch.device, smoke: bool, seconds: float) -> dict[str, Any]:
    """Retrieval by way of choosing: every seed trains all of them, on the same vectors."""
    from cmacc.ablation import VectorWorld, interval
    from cmacc.ablation.run import run_cell
    from cmacc.ablation.vectors import VectorDataset
    from cmacc.encoders import EncoderConfig
    from cmacc.pretraining import DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig

    variants: dict[str, dict[str, Any]] = {
        "newest": {"selector": "newest"},
        "none": {"selector": "none"},
        "active": {"selector": "active", "refresh": "none"},
        "active, fresh": {"selector": "active", "refresh": "selected", "refresh_device": "accelerator"},
    }
    sizes = {"size": 64, "pool_size": 128} if smoke else {"size": 256, "pool_size": 1024}
    started = time.monotonic()
    found: dict[str, list[float]] = {name: [] for name in variants}
    taken = 0.0
    # Another seed as long as one more fits: half of the time is left for the start of this process.
    while not found["newest"] or (not smoke and time.monotonic() - started + taken < 0.5 * seconds):
        seed, began = len(found["newest"]), time.monotonic()
        world = VectorWorld(samples=256, held_out=64) if smoke else VectorWorld()
        dataset = VectorDataset(world, seed, device)
        for name, variant in variants.items():
            config = PretrainConfig(
                encoder=EncoderConfig(head="linear", embedding_size=64),
                dictionary=DictionaryConfig(**sizes, **variant),
                objective=ObjectiveConfig(batch_keys=None if name == "none" else "momentum", decoupled=False),
                optim=OptimConfig(batch_size=16, steps=10 if smoke else 400),
                seed=seed,
            )
            (point,) = run_cell(dataset, config, points=1, device=device)
            found[name].append(point.metrics["R@10"])
        taken = time.monotonic() - began
    differences = {
        name: [mine - queue for mine, queue in zip(values, found["newest"], strict=True)]
        for name, values in found.items() if name != "newest"
    }  # fmt: skip
    return {
        "R@10": found,
        "minus newest": {
            name: {"mean": sum(values) / len(values), "interval": list(interval(values)) if len(values) > 1 else None}
            for name, values in differences.items()
        },
    }


def throughput(device: torch.device, smoke: bool, seconds: float) -> dict[str, Any]:
    """Clips/s and model FLOP utilisation of the video encoder's step."""
    from torch.utils.flop_counter import FlopCounterMode

    from cmacc.encoders import AudioVisualEncoder, EncoderConfig
    from cmacc.pretraining.utilisation import peak_flops_per_second

    encoder = AudioVisualEncoder(EncoderConfig(video="tiny" if smoke else "r3d_18", embedding_size=512)).video
    encoder = encoder.to(device, memory_format=torch.channels_last_3d)
    shape = (3, 4, 32, 32) if smoke else (3, 16, 112, 112)
    peak = peak_flops_per_second(device, torch.bfloat16)
    rows = []
    for compiled in (False,) if smoke else (False, True):
        network: Any = torch.compile(encoder) if compiled else encoder
        for size in (2,) if smoke else (32, 128, 256):
            clips = torch.randn(size, *shape, device=device).to(memory_format=torch.channels_last_3d)

            def step(network: Any = network, clips: torch.Tensor = clips) -> None:
                with torch.autocast(device.type, torch.bfloat16):
                    loss = network(clips).embedding.square().sum()
                loss.backward()

            with FlopCounterMode(display=False) as counter:
                step(encoder)
            seconds = _seconds_of(step, device, 2 if smoke else 20)
            flops = counter.get_total_flops()
            rows.append(
                {
                    "compiled": compiled, "batch_size": size, "clips_per_second": size / seconds,
                    "tflop_per_clip": flops / size / 1e12, "utilisation": flops / seconds / peak,
                }
            )  # fmt: skip
    return {"product_tflop_per_second": peak / 1e12, "steps": rows}


def data(device: torch.device, smoke: bool, seconds: float) -> dict[str, Any]:
    """A batch of 128 clips of 16 x 112 x 112 and 2 s of sound, copied to the device."""
    count = 2 if smoke else 128
    frames = torch.zeros(count, 16, 112, 112, 3, dtype=torch.uint8)
    waveforms = torch.zeros(count, 32_000)
    moved = frames.nbytes + waveforms.nbytes
    result: dict[str, Any] = {"bytes_per_batch": moved, "bytes_per_clip": moved / count}
    for name in ("plain", "page_locked"):
        if name == "page_locked" and device.type != "cuda":
            continue
        batch = [t.pin_memory() if name == "page_locked" else t for t in (frames, waveforms)]
        seconds = _seconds_of(lambda batch=batch: [t.to(device, non_blocking=True) for t in batch], device, 10)
        result[f"{name}_gigabytes_per_second"] = moved / seconds / 1e9
    return result


PARTS: dict[str, Callable[[torch.device, bool, float], dict[str, Any]]] = {
    "checks": checks, "verify": verify, "training": training, "selection": selection, "throughput": throughput,
    "evidence": evidence, "data": data,
}  # fmt: skip


def _seconds_of(work: Callable[[], Any], device: torch.device, times: int) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(min(3, times)):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - started) / times


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}


def _run_part(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One part in a process of its own; what becomes of it is written at once."""
    command = [sys.executable, __file__, "--part", name, "--device", options.device, *["--smoke"][: options.smoke]]
    command += ["--seconds", str(seconds)]
    started = time.monotonic()
    report: dict[str, Any] = {"part": name}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=_environment(), cwd=ROOT
        )
        if done.returncode == 0:
            report |= json.loads(done.stdout.strip().splitlines()[-1])
        else:
            report["failed"] = done.stderr[-2000:]
    except subprocess.TimeoutExpired:
        report["failed"] = f"took longer than its {seconds:.0f} s"
    report["seconds"] = round(time.monotonic() - started, 1)
    path = options.out / f"gpu-{name}.json"
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(report, indent=1) + "\n")
    aside.replace(path)
    print(f"{name}: {report.get('failed', 'done')}, {report['seconds']} s, {path}", flush=True)
    return report


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for gpu-<part>.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only to see that all of it runs")
    parser.add_argument("--part", choices=list(PARTS), help="only this part, printed as JSON")
    parser.add_argument("--seconds", type=float, default=120.0, help="of that part, if it has work for any time")
    options = parser.parse_args(arguments)
    if options.part:
        from cmacc.pretraining.provenance import git_commit

        device = torch.device(options.device)
        told = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "commit": git_commit(),
            "result": PARTS[options.part](device, options.smoke, options.seconds),
        }
        print(json.dumps(told))
        return {options.part: told}
    options.out.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + 60 * options.budget_minutes
    reports = {}
    for name in PARTS:
        rest = list(PARTS)[list(PARTS).index(name) :]
        left = max(0.0, ends_at - time.monotonic())
        reports[name] = _run_part(name, options, left * SHARES[name] / sum(SHARES[other] for other in rest))
    return reports


if __name__ == "__main__":
    main()
