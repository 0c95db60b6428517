"""Selection over several processes on gloo: bit by bit what one process chooses that holds all rows."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """As one process sees it; through JSON, as the others' answers come."""
    outcomes: dict[str, Any] = json.loads(json.dumps(runpy.run_path(str(SCRIPT))["outcomes"]()))
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_chooses_the_same(processes: int, alone: dict[str, Any], tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(processes), tmp_path / "store", tmp_path / f"{rank}.json"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    dictionaries = json.loads(json.dumps(runpy.run_path(str(SCRIPT))["dictionaries"]()))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    for rank in range(processes):
        assert found[rank]["picks"].keys() == alone.keys()
        for name, outcome in found[rank]["picks"].items():
            assert outcome == alone[name], f"rank {rank}: {name}"
        # All have the dictionary of one process, though each holds another part of the pool.
        assert found[rank]["dictionaries"] == dictionaries
    for selector, outcome in dictionaries.items():
        assert len(set(outcome["ids"])) == 24, selector


def test_what_is_compared_is_worth_comparing(alone: dict[str, Any]) -> None:
    """The picks differ from seed to seed, are distinct, and the errors were raised."""
    assert len({tuple(picks) for picks in alone["many"]}) == 3
    for name in ("many", "flat", "copies", "all", "given, eligible"):
        assert all(len(set(picks)) == len(picks) for picks in alone[name])
    assert all(pick % 3 for picks in alone["given, eligible"] for pick in picks)
    assert "NaN or infinity in row 400" in alone["not finite"]
    assert "count must be in 1..300" in alone["too many"]
