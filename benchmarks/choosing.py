"""What a clip is told apart from, and by which loss: the candidates of docs/evidence-details.md, side by side.

Problems: ``vectors`` (the controlled problem, in regimes) and ``rendered`` (clips of the synthetic world, several
windows each, drawn straight into memory, without a codec). Every run is one process with one thread; a GPU serves all.

    python benchmarks/choosing.py vectors --variants "newest" "newest, DCL" --seeds 0 1 --out vectors.json
    python benchmarks/choosing.py rendered --device cuda --workers 14 --minutes 5 --out rendered.json

    python benchmarks/choosing.py table benchmarks/results/choosing-clips-h100.json 0 1 2

Runs take turns by seed, and none is begun after ``--minutes``; what was made is written after each. A variant is a few
settings of ``cmacc pretrain``, and where the product has no such setting an objective, an order or data from here.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from stand_ins import stand_in_for_missing

stand_in_for_missing("av", "pyarrow", "jsonargparse", "soxr", "fsspec", "yaml", "jaxtyping", "rich")

import numpy as np
import torch
from torch import Tensor, nn

from cmacc.ablation import VectorWorld
from cmacc.ablation.clipset import ClipDataset
from cmacc.ablation.problem import Dataset
from cmacc.ablation.run import train_and_measure
from cmacc.ablation.vectors import VectorDataset
from cmacc.clips import AugmentConfig, ClipBatch, ClipSpec
from cmacc.clips.loading.plan import epoch_order
from cmacc.clips.seeds import seeded_rng
from cmacc.clips.synthetic import WorldConfig, describe_clip, render_clip
from cmacc.encoders import EncoderConfig
from cmacc.objectives import ObjectiveInputs, ObjectiveResult
from cmacc.pretraining import DataConfig, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig, Trainer
from cmacc.pretraining.config_files import config_from_plain, to_plain
from cmacc.pretraining.memory import SampleMemory
from cmacc.pretraining.table import TableProblem

_BATCHES = 110  # a purpose of random numbers, beside those of the product
_WINDOWS = 3  # of a rendered clip of two seconds, half a second apart
_HELD_OUT = 500
_PROBED = 1500


@dataclass(frozen=True)
class Variant:
    """Settings by dotted name, and what else is different."""

    settings: dict[str, Any] = field(default_factory=dict)
    objective: Callable[[int, float], nn.Module] | None = None  # of the number of samples and the temperature
    order: str = ""  # instead of the product's orders
    shifted_sound: bool = False


class OverBatch(nn.Module):
    """Losses of a batch among its own online keys, in which negatives or samples have weights."""

    needs_keys = False
    needs_feature_maps = False

    def __init__(self, samples: int, temperature: float, kind: str, strength: float) -> None:
        super().__init__()
        self.temperature, self.kind, self.strength = temperature, kind, strength
        self.register_buffer("means", torch.zeros(2, samples))

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        scores = inputs.queries["video"].embedding @ inputs.queries["audio"].embedding.T / self.temperature
        loss, metrics = scores.new_zeros(()), {}
        for number, (name, own) in enumerate((("video_to_audio", scores), ("audio_to_video", scores.T))):
            loss = loss + self._loss(own, inputs.sample_ids, number)
            target = torch.arange(len(own), device=own.device)
            metrics[f"{name}/batch_loss"] = nn.functional.cross_entropy(own, target).detach()
        return ObjectiveResult(loss, metrics | {"loss": loss.detach()})

    def _loss(self, scores: Tensor, ids: Tensor, number: int) -> Tensor:
        own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        margins = (scores - scores.diagonal()[:, None]).masked_fill(own, -torch.inf)
        if self.kind.startswith("HCL"):  # Robinson et al., 2021, without the correction for false negatives
            weights = (self.strength * scores.detach()).masked_fill(own, -torch.inf).softmax(1) * (len(scores) - 1)
            sums = (weights * margins.exp()).sum(1)
            return (sums.log() if self.kind == "HCL, DCL" else torch.log1p(sums)).mean()
        # SogCLR (Yuan et al., 2022): the sum over the batch in the numerator, its moving average in the denominator.
        sums = margins.exp().sum(1)
        before = self.means[number, ids]
        fresh = torch.where(before == 0, sums, (1 - self.strength) * before + self.strength * sums).detach()
        self.means[number, ids] = fresh
        return (sums / fresh).mean()


class OtherOrder(SampleMemory):
    """Orders that the product does not have."""

    kind: str
    siblings: int
    reference: tuple[Tensor, Tensor] | None = None

    def _planned(self, epoch: int) -> Tensor:
        count, size = len(self.known), self._batch_size
        rng = seeded_rng(_BATCHES, self._seed, epoch)
        if self.kind == "windows":  # two windows of a video in one batch
            videos = rng.permutation(count // self.siblings)
            windows = np.stack([rng.permutation(self.siblings) for _ in videos])
            pairs = videos[:, None] * self.siblings + windows
            halves = [pairs[:, [0, 1]].reshape(-1, 2), pairs[:, 2:].reshape(-1, 1)]
            order = np.concatenate([half[rng.permutation(len(half))].reshape(-1) for half in halves])
            batches = order[: len(self.order)].reshape(-1, size)
            return torch.from_numpy(rng.permutation(batches).reshape(-1))
        order = torch.from_numpy(epoch_order(self._seed, epoch, count).copy())
        if self.kind != "JEST" or epoch == 0:
            return order[: len(self.order)]
        return torch.cat([self._jest(rng) for _ in range(len(self.order) // size)])

    def _jest(self, rng: np.random.Generator, share: float = 0.25, chunks: int = 4) -> Tensor:
        """A batch out of four times as many: chunk by chunk by the learner's loss, less the reference's, given it."""
        count, size = len(self.known), self._batch_size
        candidates = torch.from_numpy(rng.choice(count, int(size / share), replace=False))
        gains = self._losses((self.video.float(), self.audio.float()), candidates)
        if self.reference is not None:
            gains = gains - self._losses(self.reference, candidates)
        chosen: list[int] = rng.choice(len(candidates), size // chunks, replace=False).tolist()
        while len(chosen) < size:
            score = gains[:, chosen].sum(1)
            score[chosen] = -torch.inf
            noise = torch.from_numpy(rng.gumbel(size=len(score))).float()
            chosen += (score + noise).topk(size // chunks).indices.tolist()
        return candidates[chosen]

    def _losses(self, embeddings: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        """How much candidate i loses by the presence of j, both ways."""
        video, audio = (part[rows] for part in embeddings)
        scores = video @ audio.T / 0.1
        margins = scores - scores.diagonal()[:, None], scores.T - scores.diagonal()[:, None]
        return sum(nn.functional.softplus(margin) for margin in margins)  # type: ignore[return-value]


class Windowed(ClipDataset):
    """Clips of `_WINDOWS` windows each, of which a visit takes one; measured on the middle ones."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path, device)
        self._windows = self._frames, self._waveforms, self._labels
        clips = self._training // _WINDOWS
        held_out = torch.arange(self._training, len(self._frames))
        self._of_clips = self._labels[: self._training : _WINDOWS].clone()
        self._of_clips[_PROBED:] = -1
        self._training = clips
        rows = torch.cat([torch.arange(clips)[:_PROBED] * _WINDOWS + 1, held_out])
        self._frames, self._waveforms = (table[rows.to(device)] for table in self._windows[:2])
        self._labels = self._labels[rows]
        self._cut = min(clips, _PROBED)

    @property
    def labels(self) -> Tensor:
        return self._of_clips

    @property
    def held_out_labels(self) -> Tensor:
        return self._labels[self._cut :]

    def measured(self, learner: Any) -> Any:
        self._training, clips = self._cut, self._training
        found = super().measured(learner)
        self._training = clips
        return found

    def batch(self, sample_ids: Tensor) -> ClipBatch:
        frames, waveforms, labels = self._windows
        rows = sample_ids * _WINDOWS + torch.randint(_WINDOWS, sample_ids.shape)
        own = rows.to(self._device)
        return ClipBatch(frames[own], waveforms[own].float(), sample_ids.to(self._device), labels[rows], {})


class ShiftedSound(Windowed):
    """Sound that overlaps its picture instead of coinciding: moved by up to half its length, with silence beyond."""

    def batch(self, sample_ids: Tensor) -> ClipBatch:
        batch = super().batch(sample_ids)
        length = batch.waveforms.shape[1]
        moved = torch.zeros_like(batch.waveforms)
        for row, by in enumerate(torch.randint(-length // 2, length // 2, (len(moved),)).tolist()):
            if by >= 0:
                moved[row, by:] = batch.waveforms[row, : length - by]
            else:
                moved[row, :by] = batch.waveforms[row, -by:]
        return dataclasses.replace(batch, waveforms=moved)


NONE = {"dictionary.selector": "none", "objective.batch_keys": "online"}
NEWEST = {"dictionary.selector": "newest"}
ACTIVE = {"dictionary.selector": "active"}
DCL = {"objective.decoupled": True}


def batches(group: int | None = None, **settings: Any) -> dict[str, Any]:
    return {"batches.selector": "active", "batches.group_size": group} | {
        f"batches.{name}": value for name, value in settings.items()
    }


VARIANTS: dict[str, Variant] = {
    "newest": Variant(NEWEST),
    "newest, DCL": Variant({**NEWEST, **DCL}),
    "none": Variant(NONE),
    "none, DCL": Variant({**NONE, **DCL}),
    "active, DCL": Variant({**ACTIVE, **DCL}),
    "batches": Variant({**NONE, **batches()}),
    "batches, DCL": Variant({**NONE, **DCL, **batches()}),
    "batches g8, DCL": Variant({**NONE, **DCL, **batches(8)}),
    "batches g4, DCL": Variant({**NONE, **DCL, **batches(4)}),
    "batches g2, DCL": Variant({**NONE, **DCL, **batches(2)}),
    "batches half g8, DCL": Variant({**NONE, **DCL, **batches(8, active_share=0.5)}),
    "batches half g4, DCL": Variant({**NONE, **DCL, **batches(4, active_share=0.5)}),
    "batches half g2, DCL": Variant({**NONE, **DCL, **batches(2, active_share=0.5)}),
    "batches wide, DCL": Variant({**NONE, **DCL, **batches(neighbours=100)}),
    "batches band, DCL": Variant({**NONE, **DCL, **batches(neighbours=100, skip_nearest=30)}),
    "batches g4 band, DCL": Variant({**NONE, **DCL, **batches(4, neighbours=100, skip_nearest=30)}),
    "batches late, DCL": Variant({**NONE, **DCL, **batches(start_epoch=4)}),
    "batches g4 late, DCL": Variant({**NONE, **DCL, **batches(4, start_epoch=4)}),
    "newest + batches, DCL": Variant({**NEWEST, **DCL, **batches()}),
    "newest + batches g4, DCL": Variant({**NEWEST, **DCL, **batches(4)}),
    "newest + batches g2, DCL": Variant({**NEWEST, **DCL, **batches(2)}),
    "newest + batches": Variant({**NEWEST, **batches()}),
    "newest + batches g4": Variant({**NEWEST, **batches(4)}),
    "SogCLR 0.9": Variant(NONE, partial(OverBatch, kind="SogCLR", strength=0.9)),
    "SogCLR 0.5": Variant(NONE, partial(OverBatch, kind="SogCLR", strength=0.5)),
    "HCL 0.5": Variant(NONE, partial(OverBatch, kind="HCL", strength=0.5)),
    "HCL 0.5, DCL": Variant(NONE, partial(OverBatch, kind="HCL, DCL", strength=0.5)),
    "windows, DCL": Variant({**NONE, **DCL}, order="windows"),
    "newest, windows, DCL": Variant({**NEWEST, **DCL}, order="windows"),
    "JEST, DCL": Variant({**NONE, **DCL}, order="JEST"),
    "JEST reference, DCL": Variant({**NONE, **DCL}, order="JEST reference"),
    "overlap, DCL": Variant({**NONE, **DCL}, shifted_sound=True),
}
# The same with group norm in the backbones.
VARIANTS |= {
    f"group, {name}": dataclasses.replace(variant, settings={**variant.settings, "encoder.norm": "group"})
    for name, variant in VARIANTS.items()
}

# World and settings by regime, for choosing; those for confirming are in recipes/ablations/choosing.yaml.
REGIMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "tau 0.5": ({}, {"objective.temperature": 0.5}),
    "copies": ({"duplicate_share": 0.6}, {}),
    "even, M=32": ({"zipf_exponent": 0.0}, {"optim.batch_size": 32}),
    "skew, M=64": ({"zipf_exponent": 2.5}, {"optim.batch_size": 64}),
}


def config_of(problem: str, changes: dict[str, Any], steps: int, seed: int) -> PretrainConfig:
    base = PretrainConfig(
        dictionary=DictionaryConfig(selector="active", size=256, pool_size=1024, refresh_device="accelerator"),
        objective=ObjectiveConfig(temperature=0.1, batch_keys="both", decoupled=False),
        optim=OptimConfig(batch_size=16, steps=steps),
        encoder=EncoderConfig(head="linear", embedding_size=64)
        if problem == "vectors"
        else EncoderConfig(mel_bins=32, hidden_size=128, embedding_size=64, norm="batch"),
        data=DataConfig(
            workers=0,
            clip=ClipSpec(8, 8.0, 32, 32, 1.0),
            augment=AugmentConfig(
                min_crop_area=0.8, brightness=0.2, contrast=0.2, saturation=0.2, time_mask=0.0, frequency_mask=0.0
            ),
        ),
        seed=seed,
        precision="fp32",
    )
    plain = to_plain(base)
    for name, value in changes.items():
        group, setting = name.split(".")
        plain[group][setting] = value
    return config_from_plain(plain)


def render(clips: int, path: Path, world: dict[str, Any], workers: int, held_out: int = _HELD_OUT) -> None:
    """Clips as `ClipDataset` reads them: `_WINDOWS` rows of each training clip, and the middle of each held-out one."""
    from safetensors.torch import save_file

    work, indices = partial(_windows, world), range(clips + held_out)
    if workers == 1:
        parts = [work(index) for index in indices]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
            parts = list(executor.map(work, indices, chunksize=16))
    training, tested = parts[:clips], parts[clips:]
    frames = np.concatenate([f for f, _, _ in training] + [f[1:2] for f, _, _ in tested])
    sound = np.concatenate([s for _, s, _ in training] + [s[1:2] for _, s, _ in tested])
    labels = [c for _, _, c in training for _ in range(_WINDOWS)] + [c for _, _, c in tested]
    tensors = {"frames": torch.from_numpy(frames), "waveforms": torch.from_numpy(sound), "labels": torch.tensor(labels)}
    save_file(tensors, path, metadata={"facts": json.dumps({"training": clips * _WINDOWS, "windows": _WINDOWS})})


def _windows(world: dict[str, Any], index: int) -> tuple[np.ndarray, np.ndarray, int]:
    torch.set_num_threads(1)
    config = WorldConfig(**{"class_count": 8, "frame_size": 32, "duration_seconds": 2.0, "nuisance": 0.3, **world})
    frames, sound = render_clip(config, index)
    mono = sound.mean(1).astype(np.float16)
    starts = range(0, 8 * _WINDOWS, 8)  # in frames of 1/16 s
    return (
        np.stack([frames[s : s + 16 : 2] for s in starts]),
        np.stack([mono[s * 1000 : s * 1000 + 16000] for s in starts]),
        describe_clip(config, index).class_index,
    )


@lru_cache(maxsize=1)
def _dataset(problem: str, regime: str, seed: int, clips: str, device: str, shifted: bool, by_window: bool) -> Dataset:
    if problem == "vectors":
        world = {"samples": 2048, "held_out": 1024, **REGIMES[regime][0]}
        return VectorDataset(VectorWorld(**world), seed, torch.device(device))
    return (ShiftedSound if shifted else ClipDataset if by_window else Windowed)(Path(clips), torch.device(device))


class Problem(TableProblem):
    """`TableProblem`, with an order that the product does not have."""

    def __init__(self, dataset: Dataset, config: PretrainConfig, device: torch.device, variant: Variant) -> None:
        super().__init__(dataset, config, device)
        if variant.order:
            memory = OtherOrder(
                self._count, config.encoder.embedding_size, config.batches, config.optim.batch_size, config.seed
            )
            memory.kind, memory.siblings = variant.order.partition(" ")[0], _WINDOWS
            self.memory = memory


def run(task: dict[str, Any]) -> dict[str, Any]:
    """One run; at top level, for spawned processes."""
    torch.set_num_threads(1)
    torch.manual_seed(task["seed"])
    variant = VARIANTS[task["variant"]]
    problem, device = task["problem"], torch.device(task["device"])
    regime = REGIMES[task["regime"]][1] if problem == "vectors" else {}
    changes = {**regime, **variant.settings, **task["settings"]}
    config = config_of(problem, changes, task["steps"], task["seed"])
    dataset = _dataset(
        problem, task["regime"], task["seed"] if problem == "vectors" else 0, task["clips"], task["device"],
        variant.shifted_sound, variant.order == "windows",
    )  # fmt: skip
    started = time.perf_counter()
    table = Problem(dataset, config, device, variant)
    if variant.order == "JEST reference":
        table.memory.reference = _embeddings_after(task, dataset, device)  # type: ignore[union-attr]
    objective = None
    if variant.objective is not None:
        objective = variant.objective(len(dataset.labels), config.objective.temperature)
    trainer = Trainer(table, config, device, objective=objective)
    points = train_and_measure(trainer, dataset, points=task["points"])
    kept = ("R@1", "R@10", "R@1_in_class", "probe_video", "probe_audio", "balanced_video", "balanced_audio",
            "batch_loss", "plateau_steps", "left_plateau", "median_rank")  # fmt: skip
    return {
        **{name: task[name] for name in ("problem", "regime", "variant", "seed", "steps", "settings")},
        "wall_seconds": round(time.perf_counter() - started, 1),
        "points": [
            {"step": p.step, "seconds": round(p.seconds, 2)}
            | {k: round(p.metrics[k], 4) for k in kept if k in p.metrics}
            for p in points
        ],
    }


def _embeddings_after(task: dict[str, Any], dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """What every sample looked like to a model that was trained before, from other weights."""
    config = config_of(
        task["problem"], {**NONE, **DCL, "batches.selector": "active"}, task["steps"], task["seed"] + 1000
    )
    table = Problem(dataset, config, device, Variant(order="random"))
    for _ in Trainer(table, config, device).steps():
        pass
    assert table.memory is not None
    return table.memory.video.float(), table.memory.audio.float()


def table(path: Path, seeds: list[int]) -> str:
    """A line a regime, variant and settings: means over these seeds (all, if none is named), and which there are."""
    names = ("R@1", "R@10", "R@1_in_class", "probe_video", "probe_audio")
    lines = ["| regime | variant | settings | steps | " + " | ".join(names) + " | seeds |", "|---" * 10 + "|"]
    found: dict[tuple[str, ...], dict[int, dict[str, float]]] = {}
    for made in json.loads(path.read_text())["runs"]:
        if seeds and made["seed"] not in seeds:
            continue
        settings = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in made["settings"].items())
        key = made["regime"], made["variant"], settings, f"{made['steps']:,}"
        found.setdefault(key, {})[made["seed"]] = made["points"][-1]
    for key, ends in sorted(found.items()):
        means = [f"{np.mean([end[name] for end in ends.values()]):.3f}" for name in names]
        lines.append("| " + " | ".join([*key, *means, " ".join(map(str, sorted(ends)))]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["table"]:
        print(table(Path(arguments[1]), [int(seed) for seed in arguments[2:]]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["vectors", "rendered"])
    parser.add_argument("--regimes", nargs="+", default=["plain"], choices=REGIMES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--settings", nargs="+", default=["{}"], help="JSON of further settings, each a run of its own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--points", type=int, default=2)
    parser.add_argument("--clips", type=int, default=4000, help="rendered: training clips, three windows of each")
    parser.add_argument("--world", default="{}", help="rendered: JSON of the world's settings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    ends_at = time.monotonic() + 60 * options.minutes
    clips = ""
    if options.problem == "rendered":
        named = hashlib.sha256(f"{options.clips} {options.world}".encode()).hexdigest()[:8]
        clips = str(Path(tempfile.gettempdir()) / f"rendered-{named}.safetensors")
        if not Path(clips).exists():
            render(options.clips, Path(clips), json.loads(options.world), os.cpu_count() or 1)
        print(f"rendered after {time.monotonic() - ends_at + 60 * options.minutes:.0f} s", flush=True)
    tasks = [
        {"problem": options.problem, "regime": regime, "variant": variant, "seed": seed, "steps": options.steps,
         "settings": json.loads(settings), "clips": clips, "device": options.device, "points": options.points}
        for seed in options.seeds for regime in options.regimes for settings in options.settings
        for variant in options.variants
    ]  # fmt: skip
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu, one thread a run",
        "workers": options.workers,
        "runs": [],
    }
    if options.problem == "rendered":
        report |= {"clips": options.clips, "world": json.loads(options.world)}
    executor = ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn"))
    waiting = iter(tasks)
    running = {executor.submit(run, task) for task in itertools.islice(waiting, options.workers)}
    while running and time.monotonic() < ends_at:
        try:
            done = next(as_completed(running, timeout=max(1.0, ends_at - time.monotonic())))
        except TimeoutError:
            break
        running.remove(done)
        made = done.result()
        report["runs"].append(made)
        last = made["points"][-1]
        shown = " ".join(
            f"{n} {last.get(n, float('nan')):.3f}"
            for n in ("R@1", "R@10", "R@1_in_class", "probe_video", "probe_audio")
        )
        print(
            f"{made['regime']} | {made['variant']} {made['settings']} | {made['seed']} | {shown} | {last['seconds']} s",
            flush=True,
        )
        options.out.write_text(json.dumps(report) + "\n")
        if time.monotonic() < ends_at and (task := next(waiting, None)) is not None:
            running.add(executor.submit(run, task))
    for process in list(executor._processes.values()):  # what is not done by now is not waited for
        process.kill()
    executor.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
