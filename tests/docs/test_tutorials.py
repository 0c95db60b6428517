"""The tutorials run with small settings, and what they show is so."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
_SPEC = importlib.util.spec_from_file_location("tutorials", ROOT / "docs" / "hooks" / "tutorials.py")
assert _SPEC is not None
assert _SPEC.loader is not None
hook = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hook)
SCRIPTS = sorted(path.stem for path in TUTORIALS.glob("*.py"))


def run(name: str, **settings: int) -> dict[str, Any]:
    """Run a tutorial with other values of its constants; return its names."""
    source = (TUTORIALS / f"{name}.py").read_text()
    for setting, value in settings.items():
        source, count = re.subn(rf"(?m)^{setting} = .*$", f"{setting} = {value}", source)
        assert count == 1, f"{name}.py must set {setting} in one line"
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(source, f"{name}.py", "exec"), names)
    finally:
        pyplot.close("all")
    return names


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tutorials write into a new temporary folder; here it is one that pytest removes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")  # for speed
def test_train_and_search_trains_and_searches(capsys: pytest.CaptureFixture[str]) -> None:
    """That such encoders find the other half takes more steps; the stored outputs show it, and `test_learning.py`."""
    names = run("train_and_search", CLIPS=48, STEPS=16)
    places, count = np.concatenate(list(names["places"].values())), names["count"]
    assert len(places) == 2 * count
    assert 1 <= places.min() <= places.max() <= count
    assert np.mean(names["losses"][-4:]) < np.mean(names["losses"][:4])
    assert (names["OUT"] / "found.png").exists()
    assert "pictures nearest to the sound of" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_every_variant_of_choosing_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """Which of them is best is not asserted: one seed of a few epochs does not tell. Chance is 0.002."""
    names = run("choosing_in_your_loop", SEEDS=1, EPOCHS=1)
    assert len(names["results"]) == 4
    assert all(found[0] > 0.01 for found in names["results"].values())
    assert "active dictionary" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_own_encoder_gets_a_card_that_compares(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("evaluate_your_encoder", CLIPS=48)
    rows = {(r.protocol, r.modality): r for r in names["card"].results if r.metric == "accuracy"}
    assert {protocol for protocol, _ in rows} == {"linear", "knn", "svm"}
    assert rows["linear", "video"].low > rows["linear", "video"].chance
    assert all((names["OUT"] / "cards" / name / "card.json").exists() for name in ("own", "statistics"))
    assert "| labelled | linear@1 | audio | accuracy |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_the_notebook_runs_without_a_gpu_or_a_notebook() -> None:
    names = run("pretrain_on_gpu", CLIPS=32, STEPS=4)
    assert len(names["losses"]) == 4
    shown = names["Page"](names["report"])._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<html" not in shown  # escaped, so that the page cannot end the frame
    assert {result.task for result in names["card"].results} == {"pairs", "labelled"}


@pytest.mark.parametrize("name", hook.NOTEBOOKS)
def test_notebooks_are_those_of_the_scripts_and_hold_no_outputs(name: str) -> None:
    stored = (TUTORIALS / f"{name}.ipynb").read_text()
    assert stored == hook.notebook(TUTORIALS / f"{name}.py"), "run docs/hooks/tutorials.py"
    assert all(not cell.get("outputs") for cell in json.loads(stored)["cells"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_pages_hold_text_and_code_and_outputs_are_of_this_code(name: str) -> None:
    script = TUTORIALS / f"{name}.py"
    page, cells = hook.page(script), hook.cells_of(script)
    assert page.startswith("# ")
    assert f"python docs/tutorials/{name}.py" in page
    assert page.count("```python\n") >= sum(cell.cell_type == "code" for cell in cells)
    stored = TUTORIALS / "outputs" / f"{name}.json"
    if stored.exists():
        run = json.loads(stored.read_text())
        assert run["code"] == hook.code_hash(cells), "its code has changed: run docs/hooks/tutorials.py"
        assert all((TUTORIALS / figure).exists() for out in run["outputs"].values() for figure in out["figures"])
        assert all(out["text"] in page for out in run["outputs"].values())


def test_outputs_of_other_code_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hook, "FOLDER", tmp_path)
    script = tmp_path / "small.py"
    script.write_text("# %% [markdown]\n# # Small\n#\n# Text.\n\n# %%\nprint(6 * 7)\n")
    hook.store_outputs(script)
    assert '```text title="Output"\n42\n```' in hook.page(script)
    script.write_text(script.read_text().replace("Text", "Other text"))
    assert "42" in hook.page(script)
    script.write_text(script.read_text().replace("6 * 7", "6 * 8"))
    assert "Output" not in hook.page(script)
    assert "its stored outputs are of other code" in caplog.text
