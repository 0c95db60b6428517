"""The configurations of pre-commit and GitHub: valid YAML, and the same checks as the Makefile's."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def _read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_pre_commit_runs_the_checks_of_make_lint() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    wanted = {line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe[1].splitlines()}
    [repository] = _read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert {hook["entry"] for hook in repository["hooks"]} == wanted
    assert all(hook["language"] == "system" for hook in repository["hooks"])


def test_the_workflow_runs_make_test_on_the_oldest_and_newest_python() -> None:
    workflow = _read(".github/workflows/test.yml")
    # YAML 1.1 reads the key `on` as true.
    assert {"push", "pull_request"} <= workflow[True].keys()
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.14"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test PYTHON=python"]


def test_every_path_that_the_guide_names_is_there() -> None:
    """A guide that points to a moved file is worse than none."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`((?:src|tests|recipes|examples|benchmarks|\.github)/[\w./-]+)`", guide))
    assert len(paths) > 20
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]
