"""Ways of choosing negatives that were tried beside the product's own, on the controlled problem; what came of them.

Each is a `cmacc.negatives.Selector` of a few lines, put in the place of a dictionary's own: how to try another one.
All with the batch's keys from the momentum encoder and the chosen keys re-encoded, so that they differ in the choice
alone; differences are to the plain queue (``newest``), seed by seed.

``python benchmarks/candidates.py --out benchmarks/results/candidates-cpu.json``: two of the regimes, 8 minutes on two
cores; ``--regimes`` for the others.
"""

import argparse
import copy
import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmacc.ablation import VectorWorld, interval
from cmacc.ablation.run import train_and_measure, trainer_on
from cmacc.ablation.vectors import VectorDataset
from cmacc.encoders import EncoderConfig, Modality
from cmacc.negatives import Candidates, Keys, Selector, gradient_factors, kmeans_plusplus
from cmacc.negatives.selectors import ActiveSelector
from cmacc.pretraining import DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.learner import Learner


@dataclass(frozen=True)
class KCentre:
    """Always the candidate farthest, in gradients, from those chosen (Gonzalez, 1985); the longest gradient first."""

    temperature: float

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> torch.Tensor:
        factors = gradient_factors(candidates.keys, candidates.queries, self.temperature)
        left, right, squared = factors.left, factors.right, factors.squared_norms()
        distance = torch.full_like(squared, torch.inf)
        picks = [int(torch.where(candidates.eligible, squared, -1).argmax())]
        while len(picks) < count:
            last = picks[-1]
            to_last = squared + squared[last] - 2 * (left @ left[last]) * (right @ right[last])
            distance = torch.minimum(distance, to_last.clamp_min(0))
            distance[last] = -1
            picks.append(int(torch.where(candidates.eligible, distance, -1).argmax()))
        return torch.tensor(picks)


@dataclass(frozen=True)
class FacilityLocation:
    """Greedy cover of the pool: the candidate that most raises every key's cosine with its nearest chosen one."""

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> torch.Tensor:
        keys, eligible = candidates.keys.embedding, candidates.eligible.clone()
        cosines = keys @ keys.T
        covered = torch.full((len(keys),), -1.0)
        if len(candidates.staying) > 0:
            covered = (keys @ candidates.staying.embedding.T).amax(1)
        picks = []
        for _ in range(count):
            gain = (cosines - covered[:, None]).clamp_min(0).sum(0)
            picks.append(int(torch.where(eligible, gain, -1).argmax()))
            eligible[picks[-1]] = False
            covered = torch.maximum(covered, cosines[:, picks[-1]])
        return torch.tensor(picks)


@dataclass(frozen=True)
class SpareLikely:
    """Another selector without the candidates most like a query: likely false negatives."""

    inner: Selector
    share: float

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> torch.Tensor:
        likeness = (candidates.keys.embedding @ candidates.queries.T).amax(1)
        kept = max(count, int((1 - self.share) * int(candidates.eligible.sum())))
        limit = torch.where(candidates.eligible, likeness, torch.inf).kthvalue(kept).values
        eligible = candidates.eligible & (likeness <= limit)
        return self.inner.select(dataclasses.replace(candidates, eligible=eligible), count, generator)


@dataclass(frozen=True)
class SpreadKeys:
    """k-means++ over the keys themselves, with the dictionary's staying keys as centres: spread, without gradients."""

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> torch.Tensor:
        given = candidates.staying.embedding if len(candidates.staying) else None
        return kmeans_plusplus(
            candidates.keys.embedding, count, generator=generator, initial_centers=given, eligible=candidates.eligible
        )


@dataclass(frozen=True)
class DiscountedByAge:
    """`ActiveSelector` on gradients that shrink by half with every ``half_life`` steps of the key's age."""

    temperature: float
    half_life: float

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> torch.Tensor:
        factors = gradient_factors(candidates.keys, candidates.queries, self.temperature)
        age = (candidates.keys.steps.max() - candidates.keys.steps).float()
        left = factors.left * (0.5 ** (age / self.half_life))[:, None]
        return kmeans_plusplus((left, factors.right), count, generator=generator, eligible=candidates.eligible)


@dataclass
class UnionWithBatch:
    """`ActiveSelector` with all other negatives, the staying keys and the batch's own, as centres already chosen."""

    temperature: float
    batch_keys: Keys | None = None

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> torch.Tensor:
        assert self.batch_keys is not None, "select needs the batch's keys"
        both = zip(self.batch_keys.fields(), candidates.staying.fields(), strict=True)
        centres = Keys(*(torch.cat(values) for values in both))
        return ActiveSelector(self.temperature, initial_centers="dictionary").select(
            dataclasses.replace(candidates, staying=centres), count, generator
        )


def selectors(temperature: float) -> dict[str, tuple[dict[str, Any], Selector | None]]:
    """By name: settings of the dictionary, and what takes the place of its selector."""
    fresh = {"refresh": "selected"}
    active = ActiveSelector(temperature)
    return {
        "newest": ({"selector": "newest"}, None),
        "random": ({"selector": "random", **fresh}, None),
        "active": (fresh, None),
        "active, dictionary as centres": ({**fresh, "initial_centers": "dictionary"}, None),
        "active, dictionary and batch as centres": (fresh, UnionWithBatch(temperature)),
        "active, pseudo-posterior at 5 tau": (fresh, ActiveSelector(5 * temperature)),
        "active, pseudo-posterior at tau / 5": (fresh, ActiveSelector(temperature / 5)),
        "active, without the 10 % most like a query": (fresh, SpareLikely(active, 0.1)),
        "active, without the 30 % most like a query": (fresh, SpareLikely(active, 0.3)),
        "active, discounted by age, not re-encoded": ({"refresh": "none"}, DiscountedByAge(temperature, 8)),
        "active, every 4 steps": ({**fresh, "select_every": 4}, None),
        "k-centre": (fresh, KCentre(temperature)),
        "facility location": (fresh, FacilityLocation()),
        "spread of keys, dictionary as centres": (fresh, SpreadKeys()),
    }


REGIMES: dict[str, tuple[VectorWorld, dict[str, Any]]] = {
    "plain": (VectorWorld(), {}),
    "tau 0.5": (VectorWorld(), {"temperature": 0.5}),
    "60 % near-duplicates": (VectorWorld(duplicate_share=0.6), {}),
    "no in-batch negatives": (VectorWorld(), {"in_batch": False}),
}


def replace_selectors(learner: Learner, replacement: Selector) -> None:
    """Put another selector into both dictionaries."""
    for modality, dictionary in learner.dictionaries.items():
        dictionary.selector = selector = copy.copy(replacement)
        if isinstance(selector, UnionWithBatch):
            learner.key_encoder.register_forward_hook(partial(_hand_over, selector, modality))


def _hand_over(selector: UnionWithBatch, modality: Modality, module: Any, inputs: Any, encodings: Any) -> None:
    """The batch's keys, which the key encoders have made by the time of selection; ages play no part in it."""
    if len(encodings) < 2:  # keys re-encoded, which are of one modality
        return
    own = encodings[modality]
    selector.batch_keys = Keys.from_embedding(
        own.embedding, torch.arange(len(own.embedding)), 0, length=own.length, penultimate=own.penultimate
    )


def run(task: tuple[str, str, int, int]) -> dict[str, Any]:
    """One run; at top level, for spawned processes."""
    torch.set_num_threads(1)
    regime, name, seed, steps = task
    world, objective = REGIMES[regime]
    settings, selector = selectors(objective.get("temperature", 0.1))[name]
    config = PretrainConfig(
        encoder=EncoderConfig(head="linear", embedding_size=64),
        dictionary=DictionaryConfig(size=256, pool_size=1024, **({"selector": "active"} | settings)),
        objective=ObjectiveConfig(batch_keys="momentum", decoupled=False, **objective),
        optim=OptimConfig(batch_size=16, steps=steps),
        seed=seed,
    )
    dataset, cpu = VectorDataset(world, seed, torch.device("cpu")), torch.device("cpu")
    trainer = trainer_on(dataset, config, cpu)
    if selector is not None:
        replace_selectors(trainer.learner, selector)
    (point,) = train_and_measure(trainer, dataset, points=1)
    return {"regime": regime, "selector": name, "seed": seed, "steps": steps, **point.metrics}


def table(runs: list[dict[str, Any]]) -> str:
    """A line a regime and selector: means over seeds, and the difference to ``newest`` seed by seed."""
    lines = [
        "| regime | choice | R@10 | minus newest [95 %] | probe, video | false-negative share |",
        "|---" * 6 + "|",
    ]
    ends = {(run["regime"], run["selector"], run["seed"]): run for run in runs}
    for regime, name in dict.fromkeys((run["regime"], run["selector"]) for run in runs):
        mine = {seed: run for (r, s, seed), run in ends.items() if (r, s) == (regime, name)}
        to_newest = [run["R@10"] - ends[regime, "newest", seed]["R@10"] for seed, run in mine.items()
                     if name != "newest" and (regime, "newest", seed) in ends]  # fmt: skip
        low, high = interval(to_newest) if to_newest else (np.nan, np.nan)
        metrics = ("R@10", "probe_video", "false_negative_share")
        r10, probe, wrong = (np.mean([run[metric] for run in mine.values()]) for metric in metrics)
        difference = f"{np.mean(to_newest):+.3f} [{low:+.3f}, {high:+.3f}]" if to_newest else ""
        lines.append(f"| {regime} | {name} | {r10:.3f} | {difference} | {probe:.3f} | {wrong:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--regimes", nargs="+", default=["plain", "60 % near-duplicates"], choices=REGIMES)
    parser.add_argument("--selectors", nargs="+", default=list(selectors(0.1)), choices=selectors(0.1))
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    options = parser.parse_args(arguments)
    tasks = [(r, s, seed, options.steps) for seed in range(options.seeds) for r in options.regimes
             for s in options.selectors]  # fmt: skip
    if options.workers == 1:
        runs = [run(task) for task in tasks]
    else:
        with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as executor:
            runs = list(executor.map(run, tasks))
    print(table(runs))
    report = {"torch": torch.__version__, "device": "cpu, one thread a run", "runs": runs}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
