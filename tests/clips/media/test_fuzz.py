"""Damaged files through probe, decode and examine in a guarded process: no hang, no crash here, no wrong clip."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from cmacc.clips.catalog.examine import examine
from cmacc.clips.media.guard import Guard, GuardError

from .mutants import mutants, write_sources

LIMIT_SECONDS = 20.0
SIZES = [[3, 24, 32, 3], [2_400]]
# An expression, because the guarded process knows the package and not the tests.
TRY = """(lambda media, clip: [media.probe({path!r}).duration_seconds] + [
    [list(c.frames.shape), list(c.waveform.shape)]
    for c in media.decode_clips({path!r}, [-0.1, 0.2, 5.0], clip.ClipSpec(3, 10.0, 24, 32, 0.3, 8_000))
])(__import__("cmacc.clips.media.decoding", fromlist="_"), __import__("cmacc.clips.clip", fromlist="_"))"""


def outcome_of(guard: Guard, path: Path) -> str:
    """What became of a file: decoded, refused, crashed (its process) or hung; anything else fails."""
    try:
        _, *clips = guard.call(eval, TRY.format(path=str(path)), timeout_seconds=LIMIT_SECONDS)
    except GuardError as error:
        return kind_of(str(error), path)
    assert clips == [SIZES] * 3, path.name
    return "decoded"


def kind_of(error: str, path: Path) -> str:
    for beginning, kind in (("crashes the process", "crashed"), ("takes longer than the limit", "hung")):
        if error.startswith(beginning):
            return kind
    assert error.startswith(f"{path}: "), error  # a MediaError, which names the file; no other one
    return "refused"


def try_all(folder: Path, count: int, sources: list[Path]) -> Counter[str]:
    """How many mutants met which end; every tenth is examined too, which refuses nothing."""
    outcomes: Counter[str] = Counter()
    guard = Guard()
    for number, path in enumerate(mutants(0, count, folder, sources)):
        begun = time.monotonic()
        outcomes[outcome_of(guard, path)] += 1
        if number % 10 == 0:
            try:
                json.dumps(guard.call(examine, path, timeout_seconds=LIMIT_SECONDS))
            except GuardError as error:
                outcomes["examine " + kind_of(str(error), path)] += 1
        assert time.monotonic() - begun < 2 * LIMIT_SECONDS + 10, path.name
        path.unlink()
    guard.close()
    return outcomes


@pytest.mark.slow
def test_damaged_generated_files(tmp_path: Path) -> None:
    outcomes = try_all(tmp_path / "mutants", 1_700, write_sources(tmp_path / "whole"))
    assert min(outcomes["decoded"], outcomes["refused"]) > 200  # the damage is neither harmless nor always fatal
    assert set(outcomes) <= {"decoded", "refused", "crashed", "examine crashed"}, outcomes


@pytest.mark.slow
@pytest.mark.real_data
def test_damaged_real_files(real_data: Path, tmp_path: Path) -> None:
    found = [path for kind in ("wild", "grid/clips", "esc50/audio") for path in sorted((real_data / kind).iterdir())]
    small = [path for path in found if path.suffix != ".csv" and os.path.getsize(path) < 60_000]
    outcomes = try_all(tmp_path, 400, small[:: max(1, len(small) // 40)])
    assert outcomes["decoded"] > 50
    assert set(outcomes) <= {"decoded", "refused", "crashed", "examine crashed"}, outcomes
