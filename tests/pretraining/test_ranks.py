"""Several processes on gloo train as one does on the same global batches: in float64, up to rounding."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("ranks.py")
# Of losses and gradients after 5 steps of Adam, which divides small gradients by their size and rounding with them; of
# a list, relative to its largest number.
RELATIVE = 1e-9
_NAMES = runpy.run_path(str(SCRIPT))
OF_FOUR = _NAMES["OF_FOUR"]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(_NAMES["outcomes"]()))
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning:cmacc", SCRIPT, str(rank), str(request.param),
             folder / "store", folder / f"{rank}.json"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(request.param)
    ]  # fmt: skip
    try:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_several_processes_train_as_one(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, found in enumerate(ranks):
        for name, wanted in alone.items():
            if len(ranks) == 4 and name not in OF_FOUR:
                continue
            _same(found[name], wanted, f"rank {rank} of {len(ranks)}: {name}")


def _same(found: Any, wanted: Any, what: str) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), what
        for name in wanted:
            _same(found[name], wanted[name], f"{what}, {name}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=RELATIVE), what
    elif isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        assert found == pytest.approx(wanted, rel=RELATIVE, abs=RELATIVE * max(map(abs, wanted))), what
    else:
        assert found == wanted, what


def test_with_batch_norm_by_parts_all_hold_the_same_though_not_what_one_would(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    name = "of parts, batch"
    for found in ranks[1:]:
        assert found[name]["weights, keys"] == ranks[0][name]["weights, keys"]
        assert found[name]["picks"] == ranks[0][name]["picks"]
    assert ranks[0][name]["losses"][0] != pytest.approx(alone["active"]["losses"][0], rel=1e-3)


def test_a_weight_that_differs_is_found_by_all(ranks: list[dict[str, Any]]) -> None:
    wanted = f"step 0: key_encoder must be the same on all processes, but differs on rank {len(ranks) - 1} from rank 0"
    assert all(found["a weight that differs"].startswith(wanted) for found in ranks)


def test_what_cannot_be_divided_is_refused(ranks: list[dict[str, Any]]) -> None:
    said = ranks[-1]["refusals"]
    assert f"optim.batch_size must be a multiple of the {len(ranks)} processes, got 9" in said["batch"]
    assert "dictionary.pool_size must be a multiple of optim.batch_size (8) with several processes" in said["pool"]
    assert "optim.chunk_size must be null for an objective that needs feature maps, got 1" in said["maps"]


def test_what_is_compared_is_worth_comparing(alone: dict[str, Any]) -> None:
    losses = {name: tuple(found["losses"]) for name, found in alone.items() if "losses" in found}
    # The in-chunks run is the active one, but for rounding; all others differ.
    assert losses["in chunks"] == pytest.approx(losses["active"], rel=RELATIVE)
    assert len({round(values[-1], 6) for values in losses.values()}) == len(losses) - 1
    assert losses["active batches"][:-1] == losses["no dictionary"][:-1]
    assert alone["active"]["refreshed"][-1] > 0
    assert len(set(alone["active"]["picks"]["video"])) == 24
    assert alone["not finite"]["skipped"] == [0, 0, 1, 0, 0]
    assert alone["not finite on one"] == [0, 0, 1, 0, 0]
    assert "is not finite (NaN or infinity), for 2 steps in a row (max_skipped_steps is 1)" in alone["never finite"]
