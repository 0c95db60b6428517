"""Run all runs of a plan. Finished runs are stored under a hash of everything they depend on, and are never repeated.

The hash includes the code and the version of torch, so that old results are not reused after an upgrade.

The folder of an ablation holds ``runs/<key>.json`` (one per run, written atomically), ``step_seconds.json`` (the basis
of equal time), decoded clips if the problem has any, and the results: ``metrics.parquet``, ``differences.parquet`` and
``table.md``. A plan may be changed and run again in the same folder; runs that both plans have in common are reused.
"""

import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cmacc.ablation.clipset import ClipDataset, ManifestClips, RenderedClips, decode_all, render
from cmacc.ablation.plan import AblationPlan, BudgetName, Cell, PlanError, run_key
from cmacc.ablation.problem import Dataset
from cmacc.ablation.run import run_cell, step_seconds
from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.clips import Manifest
from cmacc.clips.parallel import results_of
from cmacc.clips.progress import Progress, silent
from cmacc.clips.storage import written_aside
from cmacc.pretraining import PretrainConfig, Provenance, code_version, require_one_process
from cmacc.pretraining.fitting import fitted_to_towers
from cmacc.pretraining.reading import UnfitError, dataclass_of

_KINDS: dict[str, type] = {"vectors": VectorWorld, "rendered": RenderedClips, "clips": ManifestClips}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan: its cell, budget and settings (with the seed), and the key of its results."""

    cell: Cell
    budget: BudgetName
    config: PretrainConfig
    key: str


def ablate(
    plan: AblationPlan,
    folder: Path,
    *,
    workers: int = 1,
    device: torch.device | None = None,
    only_planned: bool = False,
    progress: Progress = silent,
) -> list[PlannedRun]:
    """Run all runs of a plan that are not in the folder yet.

    Parameters
    ----------
    folder
        Folder of the ablation, created if missing.
    workers
        Number of processes, each with one run at a time and, on a CPU, one torch thread. With 1, the runs are made in
        this process, with its threads.
    device
        Device of the runs. Default: the CPU.
    only_planned
        Run nothing; only return the runs of the plan.

    Returns
    -------
    list of PlannedRun
        All runs of the plan, including earlier ones.

    Raises
    ------
    PlanError, ClipSetError, ManifestError, RunError
        The data cannot be read or created, or a run fails.
    """
    require_one_process()
    device = device or torch.device("cpu")
    for cell in plan.cells:
        _world_of(cell.problem)
    (folder / "runs").mkdir(parents=True, exist_ok=True)

    @cache  # cells share manifests, which may be long
    def fingerprint(manifest: Path) -> str:
        return Manifest.read(manifest).fingerprint()

    prepared = [_prepared(cell, folder, fingerprint, progress) for cell in plan.cells]
    steps = _equal_steps(plan, prepared, folder, device, progress)
    runs = planned_runs(plan, prepared, steps, device)
    if only_planned:
        return runs
    missing = [run for run in _distinct(runs) if not _run_path(folder, run.key).exists()]
    done = len(_distinct(runs)) - len(missing)
    progress("runs", done, done + len(missing))
    work = partial(_make_run, folder, plan.points, device, workers > 1)
    if workers == 1:
        for run in missing:
            work(run)
            done += 1
            progress("runs", done, len(_distinct(runs)))
        return runs
    # spawn, because forking a process with threads (torch has some) can deadlock
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        for _ in results_of(executor, work, missing):
            done += 1
            progress("runs", done, len(_distinct(runs)))
    return runs


def planned_runs(
    plan: AblationPlan, cells: list[Cell], steps: dict[tuple[str, str], int], device: torch.device
) -> list[PlannedRun]:
    """The runs of all seeds, cells and budgets. Seeds come first, so that an interrupted ablation has complete seeds.

    Parameters
    ----------
    cells
        The prepared cells of the plan.
    steps
        For the budget ``time``: number of steps of each (regime, variant).
    """
    runs = []
    for seed in plan.seeds:
        for budget in plan.budgets:
            for cell in cells:
                if not plan.has(cell, budget):
                    continue
                config = cell.seeded(seed, steps[cell.regime, cell.variant] if budget == "time" else None)
                runs.append(PlannedRun(cell, budget, config, run_key(cell.problem, config, plan.points, device.type)))
    return runs


def run_rows(folder: Path, run: PlannedRun) -> list[dict[str, Any]] | None:
    """The points of a run as ``{"step", "seconds", "metrics"}``; None if the run is missing.

    Raises
    ------
    PlanError
        The file of the run is damaged.
    """
    path = _run_path(folder, run.key)
    if not path.exists():
        return None
    try:
        points: list[dict[str, Any]] = json.loads(path.read_text())["points"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"run {path}: cannot be read ({error}); delete it to have the run made again") from error
    return points


def _distinct(runs: list[PlannedRun]) -> list[PlannedRun]:
    return list({run.key: run for run in runs}.values())


def _run_path(folder: Path, key: str) -> Path:
    return folder / "runs" / f"{key}.json"


def _make_run(folder: Path, points: int, device: torch.device, alone: bool, run: PlannedRun) -> None:
    """Make one run. A top-level function that gets everything by arguments, because spawned processes call it."""
    if alone and device.type == "cpu":
        torch.set_num_threads(1)
    dataset = _dataset(json.dumps(run.cell.problem, sort_keys=True), run.config.seed, str(folder), str(device))
    found = run_cell(dataset, run.config, points, device)
    told = {
        "regime": run.cell.regime,
        "variant": run.cell.variant,
        "seed": run.config.seed,
        "steps": run.config.optim.steps,
        "device": str(device),
        "provenance": dataclasses.asdict(
            Provenance.now(device, run.config.seed, config=run.key, data=str(run.cell.problem.get("decoded", "")))
        ),
        "points": [dataclasses.asdict(point) for point in found],
    }
    with written_aside(_run_path(folder, run.key)) as aside:
        aside.write_text(json.dumps(told))


@lru_cache(maxsize=2)
def _dataset(plain: str, seed: int, folder: str, device: str) -> Dataset:
    """The data of a cell, cached for the runs that follow."""
    problem = json.loads(plain)
    if problem["kind"] == "vectors":
        return VectorDataset(_world_of(problem), seed, torch.device(device))
    return ClipDataset(Path(folder) / problem["decoded"], torch.device(device))


def _world_of(problem: dict[str, Any]) -> Any:
    """The checked dataclass of the problem. Missing settings have their defaults."""
    kind = _KINDS.get(str(problem.get("kind")))
    if kind is None:
        raise PlanError(f"problem.kind must be one of {', '.join(_KINDS)}, got {problem.get('kind')!r}")
    try:
        settings = {name: value for name, value in problem.items() if name != "kind"}
        return dataclass_of(kind, settings, "problem", with_defaults=True)
    except UnfitError as error:
        raise PlanError(str(error)) from error


def _prepared(cell: Cell, folder: Path, fingerprint: Callable[[Path], str], progress: Progress) -> Cell:
    """The cell with its clips decoded, and their file's name in its problem; a cell of vectors as it is."""
    world = _world_of(cell.problem)
    if isinstance(world, VectorWorld):
        return cell
    facts: list[Any] = [cell.problem, code_version("clips/synthetic")]
    named = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    if isinstance(world, RenderedClips):
        manifest = folder / f"rendered-{named}" / "manifest.parquet"
        if not manifest.exists():
            render(world, manifest.parent, progress)
    else:
        manifest = Path(world.manifest)
    data = dataclasses.replace(cell.config.data, manifest=manifest)
    config, _ = fitted_to_towers(dataclasses.replace(cell.config, data=data))
    data = config.data
    facts = [
        fingerprint(manifest), data.split, data.max_bad_fraction, dataclasses.asdict(data.clip), code_version("clips"),
        version("av"),
    ]  # fmt: skip
    decoded = f"clips-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.safetensors"
    if not (folder / decoded).exists():
        decode_all(config, folder / decoded, progress)
    return dataclasses.replace(cell, config=config, problem={"kind": cell.problem["kind"], "decoded": decoded})


def _equal_steps(
    plan: AblationPlan, cells: list[Cell], folder: Path, device: torch.device, progress: Progress
) -> dict[tuple[str, str], int]:
    """Steps of each cell that fit into the time of its regime's reference; measured once, and kept in the folder."""
    if "time" not in plan.budgets:
        return {}
    path = folder / "step_seconds.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    steps: dict[tuple[str, str], int] = {}
    if device.type == "cpu":
        before = torch.get_num_threads()
        torch.set_num_threads(1)
    for number, regime in enumerate(plan.regimes):
        own = [cell for cell in cells if cell.regime == regime and plan.has(cell, "time")]
        keys = [run_key(cell.problem, cell.seeded(plan.seeds[0]), 0, device.type) for cell in own]
        if any(key not in known for key in keys):
            datasets = [
                _dataset(json.dumps(c.problem, sort_keys=True), plan.seeds[0], str(folder), str(device)) for c in own
            ]
            pairs = [(d, c.seeded(plan.seeds[0])) for d, c in zip(datasets, own, strict=True)]
            known |= dict(zip(keys, step_seconds(pairs, device), strict=True))
            with written_aside(path) as aside:
                aside.write_text(json.dumps(known, indent=1))
        progress("step times", number + 1, len(plan.regimes))
        of_reference = next((k for k, c in zip(keys, own, strict=True) if c.variant == plan.reference), None)
        for key, cell in zip(keys, own, strict=True):
            ratio = known[key] / known[of_reference] if of_reference else 1.0
            steps[regime, cell.variant] = max(plan.points, round(cell.config.optim.steps / ratio))
    if device.type == "cpu":
        torch.set_num_threads(before)
    return steps
