"""The plan of an ablation: a YAML file of variants (and regimes), each of which is run with every seed.

```yaml
problem: {kind: vectors, classes: 200}           # or rendered, or clips with a manifest
settings: {optim: {steps: 1200, batch_size: 16}} # settings of `cmacc pretrain` for all runs
variants:                                        # the variants to compare
  queue: {dictionary.selector: newest}
  active: {dictionary.selector: active}
grid: {objective.batch_keys: [online, momentum]} # optional: combine every variant with every value
regimes:                                         # optional: conditions, each compared separately
  plain: {}
  skewed: {problem.zipf_exponent: 2.0}
reference: queue                                 # the variant that the others are compared with, seed by seed
seeds: [0, 1, 2]
budgets: [steps, time]                           # equal steps; equal time, that of the reference
timed: [active]                                  # optional: variants to run at equal time (all)
points: 6                                        # measurements per run, the last one at its end
headline: R@10                                   # the metric to show first
```
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml

from cmacc.pretraining import ConfigError, PretrainConfig, code_version, config_from_plain, to_plain
from cmacc.pretraining.config_files import present_name, with_present_names
from cmacc.pretraining.reading import UnfitError, value_of

BudgetName = Literal["steps", "time"]
_RUN_FORMAT = 3
# The folders whose code affects the results of a run.
_SHAPING_CODE = ("clips", "encoders", "negatives", "objectives", "pretraining", "ablation")
_DEFAULTS: dict[str, Any] = {
    "title": "",
    "settings": {},
    "variants": {},
    "grid": {},
    "regimes": {},
    "reference": "",
    "seeds": [0, 1, 2],
    "budgets": ["steps"],
    "timed": [],
    "points": 6,
    "headline": "R@10",
}
_TYPES: dict[str, Any] = {
    "title": str,
    "problem": dict[str, Any],
    "settings": dict[str, Any],
    "variants": dict[str, dict[str, Any]],
    "grid": dict[str, tuple[Any, ...]],
    "regimes": dict[str, dict[str, Any]],
    "reference": str,
    "seeds": tuple[int, ...],
    "budgets": tuple[BudgetName, ...],
    "timed": tuple[str, ...],
    "points": int,
    "headline": str,
}
# Settings that a dictionary does not use, by selector. Cells that only differ in these are the same.
_UNUSED = {
    "none": tuple(f.name for f in dataclasses.fields(PretrainConfig().dictionary) if f.name != "selector"),
    "newest": ("gradient", "pseudo_labels", "pseudo_temperature"),
    "random": ("gradient", "pseudo_labels", "pseudo_temperature"),
}


class PlanError(ValueError):
    """An invalid plan; the message names the file, the setting, what it must be, and what it is."""


@dataclass(frozen=True)
class Cell:
    """One variant in one regime: its data and settings, without the seed."""

    regime: str
    variant: str
    problem: dict[str, Any]
    config: PretrainConfig

    def seeded(self, seed: int, steps: int | None = None) -> PretrainConfig:
        """The settings of a run with that seed; ``steps`` overrides the plan's number."""
        optim = self.config.optim if steps is None else dataclasses.replace(self.config.optim, steps=steps)
        return dataclasses.replace(self.config, seed=seed, optim=optim)


@dataclass(frozen=True)
class AblationPlan:
    """Cells, seeds and settings of the comparison; see the module's docstring.

    Attributes
    ----------
    reference
        The variant that the others are compared with, within each regime.
    timed
        The variants that are also run with the budget ``time``, in addition to the reference.
    """

    title: str
    cells: tuple[Cell, ...]
    reference: str
    seeds: tuple[int, ...]
    budgets: tuple[BudgetName, ...]
    timed: tuple[str, ...]
    points: int
    headline: str

    def has(self, cell: Cell, budget: BudgetName) -> bool:
        """Whether the plan has runs of that cell with that budget."""
        return budget == "steps" or cell.variant in (*self.timed, self.reference)

    @property
    def regimes(self) -> list[str]:
        """Names of the regimes, in the order of the plan."""
        return list(dict.fromkeys(cell.regime for cell in self.cells))

    @property
    def variants(self) -> list[str]:
        """Names of the variants, in the order of the plan."""
        return list(dict.fromkeys(cell.variant for cell in self.cells))

    def cell(self, regime: str, variant: str) -> Cell | None:
        """The cell of that name, if there is one."""
        return next((c for c in self.cells if (c.regime, c.variant) == (regime, variant)), None)


def read_plan(path: Path, *, seeds: Sequence[int] | None = None, manifest: str | None = None) -> AblationPlan:
    """Read and check a plan.

    Parameters
    ----------
    path
        YAML file.
    seeds
        Seeds instead of the plan's.
    manifest
        For plans of kind ``clips``: manifest instead of ``problem.manifest``.

    Raises
    ------
    PlanError
        The file is missing or not YAML, or a setting is unknown or invalid.
    """
    try:
        plain = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"plan {path}: cannot be read ({error})") from error
    try:
        if isinstance(plain, dict):
            plain |= {} if seeds is None else {"seeds": list(seeds)}
            if manifest is not None:
                if not isinstance(plain.get("problem"), dict) or plain["problem"].get("kind") != "clips":
                    raise PlanError("problem.kind must be clips where a manifest is given")
                plain["problem"]["manifest"] = manifest
        return plan_from_plain(plain)
    except (PlanError, UnfitError, ConfigError) as error:
        raise PlanError(f"plan {path}: {error}") from error


def plan_from_plain(plain: object) -> AblationPlan:
    """A plan from parsed YAML.

    Raises
    ------
    PlanError, UnfitError, ConfigError
        A setting is unknown or invalid.
    """
    if not isinstance(plain, Mapping):
        raise PlanError(f"must be a mapping with `problem` and `variants` or `grid`, got {plain!r:.60}")
    for name in plain:
        if name not in _TYPES:
            raise PlanError(f"unknown setting {name} of a plan; the settings are {', '.join(_TYPES)}")
    filled = {name: value for name, value in _DEFAULTS.items() if name not in plain} | dict(plain)
    values = {name: value_of(hint, filled, name) for name, hint in _TYPES.items()}
    if not values["variants"] and not values["grid"]:
        raise PlanError("variants or grid must be given, got neither")
    if len(values["seeds"]) == 0 or len(set(values["seeds"])) < len(values["seeds"]) or min(values["seeds"]) < 0:
        raise PlanError(f"seeds must be distinct numbers of at least 0, got {list(values['seeds'])}")
    if values["points"] < 1:
        raise PlanError(f"points must be at least 1, got {values['points']}")
    if len(values["budgets"]) == 0:
        raise PlanError("budgets must be steps, time or both, got none")
    variants = _crossed(values["variants"] or {"": {}}, values["grid"])
    cells: list[Cell] = []
    for regime, changes in (values["regimes"] or {"": {}}).items():
        seen: dict[str, str] = {}
        for variant, own in variants.items():
            cell = _cell(regime, variant, values["problem"], values["settings"], {**changes, **own})
            key = run_key(cell.problem, cell.config, values["points"])
            if key in seen and not values["grid"]:
                raise PlanError(f"variants must differ in what they use, but {seen[key]!r} and {variant!r} do not")
            if key not in seen:  # in a grid, several combinations can be the same run: only the first is kept
                seen[key] = variant
                cells.append(cell)
    names = list(dict.fromkeys(cell.variant for cell in cells))
    reference = values["reference"] or names[0]
    if reference not in names:
        raise PlanError(f"reference must be a variant ({', '.join(names)}), got {reference!r}")
    for name in values["timed"]:
        if name not in names:
            raise PlanError(f"timed must be variants ({', '.join(names)}), got {name!r}")
    return AblationPlan(
        values["title"], tuple(cells), reference, values["seeds"], values["budgets"], values["timed"] or tuple(names),
        values["points"], values["headline"],
    )  # fmt: skip


def run_key(problem: Mapping[str, Any], config: PretrainConfig, points: int, device: str = "cpu") -> str:
    """A hash of everything that a run depends on, and nothing else, so that equal runs are made only once."""
    plain = to_plain(config)
    plain["data"].pop("manifest")  # the path does not matter: the problem names the decoded clips by their contents
    for name in _UNUSED.get(config.dictionary.selector, ()):
        plain["dictionary"].pop(name, None)
    if "refresh" in plain["dictionary"]:
        plain["dictionary"]["refresh"] = config.dictionary.refresh_policy  # an explicit default is the same run
        if config.dictionary.refresh_policy == "none":
            plain["dictionary"].pop("refresh_every", None)
    if config.batches.selector == "random":
        plain["batches"] = {"selector": "random"}
    terms = config.objective.terms.weights()
    for name in plain["objective"]["terms"]:
        if name not in terms:
            plain["objective"].pop(name, None)
    plain["objective"]["batch_keys"] = config.batch_keys
    plain["optim"]["warmup_steps"] = config.optim.warmup
    for name in ("save_every", "keep_every", "health_every"):
        plain.pop(name)
    told = {
        "format": _RUN_FORMAT,
        "problem": dict(problem),
        "config": plain,
        "points": points,
        "device": device,
        "code": code_version(*_SHAPING_CODE),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _crossed(variants: Mapping[str, dict[str, Any]], grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    crossed = {}
    for (name, own), combination in itertools.product(variants.items(), itertools.product(*grid.values())):
        chosen = dict(zip(grid, combination, strict=True))
        words = [f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items()]
        crossed[", ".join([name, *words] if name else words)] = {**chosen, **own}
    return crossed


def _cell(
    regime: str, variant: str, problem: Mapping[str, Any], settings: Mapping[str, Any], changes: Mapping[str, Any]
) -> Cell:
    what = f"variant {variant!r}" + (f" in regime {regime!r}" if regime else "")
    own_problem = dict(problem)
    plain = cast("dict[str, Any]", to_plain(PretrainConfig()))
    _merge(plain, with_present_names(settings), "settings")
    for name, value in changes.items():
        name, value = present_name(name, value)
        if name.startswith("problem."):
            own_problem[name.removeprefix("problem.")] = value
        else:
            *path, last = name.split(".")
            inner: Any = plain
            for part in path:
                inner = inner.get(part) if isinstance(inner, dict) else None
            if not isinstance(inner, dict) or last not in inner:
                raise PlanError(
                    f"{what}: unknown setting {name}; the settings are those of `cmacc pretrain`, and problem.*"
                )
            inner[last] = value
    try:
        config = config_from_plain(plain)
    except ConfigError as error:
        raise PlanError(f"{what}: {error}") from error
    for term, needs in config.objective.needs.items():
        if needs.maps and own_problem.get("kind") == "vectors":
            raise PlanError(
                f"{what}: objective.terms.{term} must be 0 for problem.kind=vectors, since it needs pictures or "
                "spectrograms; take problem.kind rendered or clips"
            )
    return Cell(regime, variant, own_problem, config)


def _merge(into: dict[str, Any], changes: Mapping[str, Any], where: str) -> None:
    for name, value in changes.items():
        if name not in into:
            raise PlanError(f"unknown setting {where}.{name}; the settings are those of `cmacc pretrain`")
        if isinstance(into[name], dict) and isinstance(value, Mapping):
            _merge(into[name], value, f"{where}.{name}")
        else:
            into[name] = value
