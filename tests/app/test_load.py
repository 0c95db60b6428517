"""Fifty visitors at once."""

import asyncio
import runpy
from pathlib import Path

import pytest

from cmacc.app.opened import Opened
from cmacc.app.server import make_app

from .conftest import World
from .serving import serving

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "app.py"


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_fifty_clients_get_their_answers(
    world: World, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    visit = runpy.run_path(str(BENCHMARK))["visit"]
    with serving(make_app(opened, uploads=tmp_path)) as host:
        report = asyncio.run(visit(f"http://{host}", world.film(1), clients=50, rounds=1))
    assert report["first_errors"] == []
    assert report["errors"] == 0
    assert report["searches"] == 50
    assert 0 < report["p50_seconds"] <= report["p95_seconds"] < 60
