"""Plans: what cells they make, which runs are the same, and what is refused with which words."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmacc.ablation import PlanError, plan_from_plain, read_plan
from cmacc.ablation.plan import run_key
from cmacc.pretraining import ConfigError, DictionaryConfig, PretrainConfig

RECIPES = Path(__file__).parents[2] / "recipes" / "ablations"
PLAIN: dict[str, Any] = {
    "problem": {"kind": "vectors", "classes": 20},
    "settings": {"optim": {"batch_size": 8, "steps": 10}},
    "variants": {"queue": {"dictionary.selector": "newest"}, "active": {"dictionary.selector": "active"}},
}


def test_variants_grid_and_regimes_are_crossed() -> None:
    plan = plan_from_plain(
        PLAIN
        | {
            "grid": {"objective.batch_keys": ["online", "momentum"], "dictionary.size": [64, 128]},
            "regimes": {"plain": {}, "hot": {"objective.temperature": 0.5, "problem.classes": 7}},
        }
    )
    assert len(plan.cells) == 2 * 4 * 2
    assert plan.variants[:2] == ["queue, batch_keys=online, size=64", "queue, batch_keys=online, size=128"]
    assert plan.reference == plan.variants[0]
    cell = plan.cell("hot", "active, batch_keys=momentum, size=128")
    assert cell is not None
    assert cell.config.dictionary.selector == "active"
    assert (cell.config.dictionary.size, cell.config.objective.batch_keys) == (128, "momentum")
    assert (cell.config.objective.temperature, cell.problem["classes"], cell.config.optim.batch_size) == (0.5, 7, 8)
    other = plan.cell("plain", cell.variant)
    assert other is not None
    assert (other.config.objective.temperature, other.problem["classes"]) == (0.1, 20)


def test_cells_of_a_grid_that_differ_in_nothing_used_are_one() -> None:
    plan = plan_from_plain(
        PLAIN | {"variants": {}, "grid": {"dictionary.selector": ["none", "active"], "dictionary.size": [64, 128]}}
    )
    assert plan.variants == ["selector=none, size=64", "selector=active, size=64", "selector=active, size=128"]


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        ({"save_every": 7, "health_every": 3}, True),
        ({"seed": 1}, False),
        ({"dictionary": {"size": 512}}, False),
        ({"objective": {"temperature": 0.2}}, False),
    ],
)
def test_a_runs_key_is_what_shapes_it(changed: dict[str, Any], is_same: bool) -> None:
    config = PretrainConfig(dictionary=DictionaryConfig(selector="active"))
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
    other = dataclasses.replace(config, **parts)
    problem = {"kind": "vectors"}
    assert (run_key(problem, config, 6) == run_key(problem, other, 6)) == is_same
    assert run_key(problem, config, 6) != run_key({"kind": "vectors", "classes": 3}, config, 6)
    assert run_key(problem, config, 6) != run_key(problem, config, 5)


def test_a_seed_changes_nothing_but_the_seed_among_variants() -> None:
    """Paired: of one seed the same first weights and the same order of data."""
    plan = plan_from_plain(PLAIN | {"seeds": [4, 5]})
    assert {cell.seeded(5).seed for cell in plan.cells} == {5}
    assert plan.cells[0].seeded(5, steps=3).optim.steps == 3
    assert plan.cells[0].seeded(5).optim.steps == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "unknown setting variant of a plan"),
        ({"variants": {}}, "variants or grid must be given, got neither"),
        ({"seeds": [1, 1]}, r"seeds must be distinct numbers of at least 0, got \[1, 1\]"),
        ({"seeds": []}, "seeds must be distinct"),
        ({"seeds": ["a"]}, "seeds must be"),
        ({"points": 0}, "points must be at least 1, got 0"),
        ({"budgets": ["hours"]}, "budgets must be"),
        ({"budgets": []}, "budgets must be steps, time or both, got none"),
        ({"timed": ["best"]}, r"timed must be variants \(queue, active\), got 'best'"),
        ({"reference": "best"}, r"reference must be a variant \(queue, active\), got 'best'"),
        ({"variants": {"a": {"dictionary.sise": 3}}}, "variant 'a': unknown setting dictionary.sise"),
        ({"variants": {"a": {"dictionary.size": -3}}}, "variant 'a': .*dictionary.size must be at least"),
        ({"variants": {"a": {"dictionary.selector": "best"}}}, "variant 'a': "),
        ({"variants": {"a": {}, "b": {}}}, "variants must differ in what they use, but 'a' and 'b' do not"),
        ({"settings": {"optim": {"step": 3}}}, "unknown setting settings.optim.step"),
        ({"problem": 3}, "problem must be"),
    ],
)
@pytest.mark.usefixtures("users_checks")
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((PlanError, ConfigError, ValueError), match=message):
        plan_from_plain(PLAIN | changes)


def test_a_file_is_named_in_what_is_said(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan .*nothing.yaml: cannot be read"):
        read_plan(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(PlanError, match=r"list.yaml: must be a mapping"):
        read_plan(tmp_path / "list.yaml")
    (tmp_path / "vectors.yaml").write_text(yaml.safe_dump(PLAIN))
    assert read_plan(tmp_path / "vectors.yaml", seeds=[9]).seeds == (9,)
    with pytest.raises(PlanError, match=r"problem.kind must be clips where a manifest is given"):
        read_plan(tmp_path / "vectors.yaml", manifest="some.parquet")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_plans(recipe: Path) -> None:
    plan = read_plan(recipe)
    assert plan.title
    assert len(plan.cells) >= 2
