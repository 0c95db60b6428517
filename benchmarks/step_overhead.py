"""Seconds per phase of a training step: what active selection, and re-encoding keys, cost beside the plain queue.

The real `training_step` on made-up clips already in memory, with full pools and dictionaries; the variants take
turns within each round, so that what disturbs the machine disturbs all. Printed are the medians of the rounds, and each
variant's step in units of the plain queue's.

* ``--scale small``: the tiny encoders, M = 32, K = 256, N = 1,024, clips of 16 x 64 x 64: a CPU's runs.
* ``--scale paper``: r3d_18 and resnet18, M = 128, K = 3,840, N = 38,400, d = 512, clips of 16 x 112 x 112: for a GPU.
* ``--scale tiny``: says nothing; to see that it runs.

``python benchmarks/step_overhead.py --scale small --out benchmarks/results/step-cpu.json``: about two minutes on two
cores. On a machine without the libraries that read files (PyAV, PyArrow) their modules are replaced by empty ones.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from stand_ins import stand_in_for_missing

stand_in_for_missing("av", "pyarrow", "jsonargparse", "soxr", "fsspec", "yaml")

import torch
from torch.nn.functional import normalize

from cmacc.clips import ClipBatch, ClipSpec
from cmacc.encoders import EncoderConfig
from cmacc.negatives import ActiveDictionary, Keys
from cmacc.pretraining import DataConfig, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.learner import Learner, autocast_dtype, untrained_encoder
from cmacc.pretraining.step import training_step

PHASES = ("transform", "encode", "keys", "select", "refresh", "loss", "update")
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"selector": "none"},
    "newest": {"selector": "newest"},
    "random": {"selector": "random", "refresh": "none"},
    "active": {"selector": "active", "refresh": "none"},
    "active, initial centers": {"selector": "active", "initial_centers": "dictionary", "refresh": "none"},
    "active, every 4": {"selector": "active", "select_every": 4, "refresh": "none"},
    "active, fresh": {"selector": "active", "refresh": "selected"},
    "active, all fresh": {"selector": "active", "refresh": "dictionary", "refresh_every": 10},
}


SCALES = {
    "tiny": PretrainConfig(
        data=DataConfig(clip=ClipSpec(4, 4.0, 32, 32, 1.0)),
        dictionary=DictionaryConfig(size=32, pool_size=128),
        optim=OptimConfig(batch_size=8),
    ),
    "small": PretrainConfig(
        data=DataConfig(clip=ClipSpec(16, 16.0, 64, 64, 2.0)),
        dictionary=DictionaryConfig(size=256, pool_size=1024),
        optim=OptimConfig(batch_size=32),
    ),
    "paper": PretrainConfig(
        data=DataConfig(clip=ClipSpec(16, 16.0, 112, 112, 2.0)),
        encoder=EncoderConfig(video="r3d_18", audio="resnet18", embedding_size=512),
        dictionary=DictionaryConfig(size=3840, pool_size=38_400, refresh_device="accelerator"),
        optim=OptimConfig(batch_size=128),
    ),
}  # fmt: skip


def config_of(base: PretrainConfig, variant: dict[str, Any]) -> PretrainConfig:
    """The settings with another dictionary."""
    dictionary = dataclasses.replace(base.dictionary, **variant)
    # With online keys of the batch, no key encoder is asked without a dictionary.
    return dataclasses.replace(base, dictionary=dictionary, objective=ObjectiveConfig(batch_keys="online"))


def made_up_batch(config: PretrainConfig, step: int, device: torch.device) -> ClipBatch:
    """Noise, of samples that never come again."""
    spec, count = config.data.clip, config.optim.batch_size
    generator = torch.Generator().manual_seed(step)
    shape = (count, spec.frame_count, spec.frame_height, spec.frame_width, 3)
    return ClipBatch(
        frames=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        waveforms=torch.randn(count, spec.sample_count, generator=generator).mul_(0.1),
        sample_ids=torch.arange(count) + count * step,
        labels=torch.full((count,), -1),
        failures={},
    ).to(device)


def full(learner: Learner, first_step: int) -> None:
    """Fill pools, dictionaries and kept inputs, as after many steps."""
    config, device = learner.config, learner.device
    size = config.optim.batch_size
    for dictionary in learner.dictionaries.values():
        generator = torch.Generator().manual_seed(0)
        for step in range(first_step):
            keys = _made_up_keys(dictionary, size, step, generator)
            if step < config.dictionary.size // size:
                dictionary.dictionary.push(keys)
            dictionary.push(keys)
    if learner.input_buffer is not None:
        batch = made_up_batch(config, 0, device)
        for step in range(first_step):
            ids = torch.arange(size) + size * step
            learner.input_buffer.push(learner.views.kept(dataclasses.replace(batch, sample_ids=ids.to(device)), 0))


def _made_up_keys(dictionary: ActiveDictionary, count: int, step: int, generator: torch.Generator) -> Keys:
    pool = dictionary.pool
    ids = torch.arange(count) + count * step
    return Keys.from_embedding(
        normalize(torch.randn(count, pool.embedding.shape[1], generator=generator), dim=1),
        ids,
        step,
        penultimate=torch.randn(count, pool.penultimate.shape[1], generator=generator),
        handles=ids,
    )


def learner_of(config: PretrainConfig, device: torch.device) -> Learner:
    """A learner with full pools, on clips."""
    learner = Learner.build(
        untrained_encoder(config), ClipViews(config, device), config, device, autocast_dtype(config.precision, device)
    )
    full(learner, first_step_of(config))
    return learner


def first_step_of(config: PretrainConfig) -> int:
    """The first step after pool and dictionary are full."""
    return (config.dictionary.pool_size + config.dictionary.size) // config.optim.batch_size


def timed_step(learner: Learner, batch: ClipBatch, step: int) -> dict[str, float]:
    """One step; its seconds by phase, and of the whole as ``step``."""
    clock, whole = PhaseClock(learner.device), PhaseClock(learner.device)
    with whole.phase("step"):
        training_step(learner, batch, step, 0, clock)
    return clock.seconds() | whole.seconds()


def measure(
    scale: str, device: torch.device, rounds: int, names: list[str], compiled: bool = False
) -> dict[str, dict[str, float]]:
    """Median seconds of every phase and of the whole step, variant by variant."""
    base = SCALES[scale]
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, compile=compiled))
    learners = {name: learner_of(config_of(base, VARIANTS[name]), device) for name in names}
    first_step = first_step_of(base)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    # Whole cycles of what happens only every few steps, after one to warm up.
    for step in range(first_step, first_step + rounds + 1):
        for name, learner in learners.items():
            taken = timed_step(learner, made_up_batch(learner.config, step, device), step)
            if step > first_step:
                seconds[name].append(taken)
    return {name: _typical(rows, learners[name].config) for name, rows in seconds.items()}


def _typical(rows: list[dict[str, float]], config: PretrainConfig) -> dict[str, float]:
    """Medians; of what happens only every few steps the mean, or the median would leave it out."""
    uneven = config.dictionary.select_every > 1 or config.dictionary.refresh_policy == "dictionary"
    result = {}
    for name in (*PHASES, "step"):
        values = [row.get(name, 0.0) for row in rows]
        result[name] = statistics.fmean(values) if uneven else statistics.median(values)
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--compile", action="store_true", help="the backbones by torch.compile")
    parser.add_argument("--out", type=Path, help="write the JSON here as well as to stdout's end")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = measure(options.scale, device, options.rounds, options.variants, options.compile)
    reference = measured.get("newest", next(iter(measured.values())))["step"]
    print(f"{'milliseconds':18}" + "".join(f"{phase:>10}" for phase in (*PHASES, "step")) + "  of newest   selection")
    for name, row in measured.items():
        row["of_newest"] = row["step"] / reference
        row["selection_share"] = row["select"] / row["step"]
        print(
            f"{name:18}"
            + "".join(f"{1000 * row[phase]:10.1f}" for phase in (*PHASES, "step"))
            + f"{row['of_newest']:11.3f}{row['selection_share']:12.1%}"
        )
    report = {
        "scale": options.scale,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "seconds": measured,
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
