"""`cmacc scan` and `cmacc pack` as users run them: killed in the middle, in parts, on a cluster, with one outcome."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cmacc.cli import main
from cmacc.clips.catalog.manifest import Manifest

from .clips.films import changing_sound, moving_picture, write_film

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty films: eight different ones, copies of them, and two that are broken."""
    folder = tmp_path_factory.mktemp("films")
    for seed in range(8):
        path = write_film(folder / "ab"[seed % 2] / f"{seed}.mp4", moving_picture(0.5, seed), changing_sound(0.5, seed))
        for copy in range(4):
            shutil.copy(path, path.with_name(f"{seed}_{copy}.mp4"))
    (folder / "a" / "broken.mp4").write_bytes(b"no film")
    (folder / "b" / "empty.mp4").write_bytes(b"")
    (folder / "b" / "notes.txt").touch()
    return folder


@pytest.fixture(scope="module")
def outcome(films: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What undisturbed runs write."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(scan_arguments(films, out)) == 0
    assert main(pack_arguments(out)) == 0
    return contents(out)


def scan_arguments(films: Path, out: Path) -> list[str]:
    return ["scan", str(films), "--out", str(out / "m.csv"), "--test-fraction", "0.3"]


def pack_arguments(out: Path) -> list[str]:
    return ["pack", str(out / "m.csv"), "--out", str(out / "packed"), "--samples-per-shard", "4"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that begin with a dot: they are what a kill leaves behind, and nobody reads them."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_the_commands_say(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(scan_arguments(films, tmp_path)) == 0
    told = capsys.readouterr()
    assert "40 samples (0.01 h), 40 with video and audio, 2 classes" in told.out
    assert "2 files skipped" in told.out
    assert "1 file was not examined because of the file extension: .txt 1\n" in told.out
    assert "findings: duplicate 32" in told.out
    assert "broken.mp4: unreadable: does not decode" in told.err
    assert main(scan_arguments(films, tmp_path)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*scan_arguments(films, tmp_path), "--exclude", "unreadable", "duplicate", "--overwrite"]) == 0
    assert "8 samples" in capsys.readouterr().out
    assert main(pack_arguments(tmp_path)) == 0
    assert "8 samples in 2 shards, 0 files skipped" in capsys.readouterr().out
    assert main(["pack", "--verify", str(tmp_path / "packed")]) == 0
    assert "matches its index" in capsys.readouterr().out
    shard = tmp_path / "packed" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:9_000])
    assert main(["pack", "--verify", str(tmp_path / "packed")]) == 2
    assert "shard-000001.tar: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "{films}", "--part", "3/2"], "--part must be I/N with 1 <= I <= N"),
        (["scan", "{films}", "--layout", "ucf101"], "--layout ucf101 must have one folder and --annotations"),
        (["scan", "{films}", "--workers", "0"], "workers must be at least 1, got 0"),
        (["scan", "{films}/nothing"], "must be a folder, got nothing there"),
        (["scan", "{films}", "--exclude", "ugly"], "exclude must name findings"),
        (["scan", "{films}", "--test-fraction", "1.5"], "--test-fraction must be in [0, 1), got 1.5"),
        (["pack", "{films}/none.parquet", "--out", "nope://x"], "no such file; make one"),
        (["pack", "--verify", "nope://x"], "Protocol not known: nope"),
        (["pack", "{films}/none.parquet"], "--out DIR must be given"),
        (["pack", "{films}/none.parquet", "--out", "x"], "no such file; make one with `cmacc scan"),
        (["pack", "--verify", "{films}"], "must hold index.parquet"),
    ],
)
def test_bad_input_is_told_in_a_line(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [argument.replace("{films}", str(films)) for argument in arguments]
    if filled[0] == "scan":
        filled += ["--out", str(tmp_path / "m.csv")]
    assert main(filled) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith(f"cmacc {filled[0]}: error: ")


def test_processes_that_are_ended_leave_nothing_in_the_temp_folder(films: Path, tmp_path: Path) -> None:
    (tmp_path / "temp").mkdir()
    arguments = [*scan_arguments(films, tmp_path), "--timeout-seconds", "0.001"]
    result = subprocess.run(
        [sys.executable, "-m", "cmacc", *arguments],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path / "temp")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "takes longer than the limit of 0.001 s" in result.stderr
    assert list((tmp_path / "temp").iterdir()) == []


# ---- one outcome, whatever happens on the way -----------------------------------------------------------------------


def kill_when(arguments: list[str], has_come_so_far: Callable[[], bool]) -> bool:
    """Start a command and SIGKILL it as soon as it has come so far; whether it was still running then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cmacc", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and not has_come_so_far() and time.monotonic() < deadline:
        time.sleep(0.002)
    still_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return still_running


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bytes(
    films: Path, outcome: dict[str, bytes], tmp_path: Path
) -> None:
    def has_noted(size: int) -> bool:
        journal = tmp_path / "m.csv.scan" / "journal.jsonl"
        return journal.exists() and journal.stat().st_size > size

    def has_written(pattern: str, count: int) -> bool:
        return len(list((tmp_path / "packed").glob(pattern))) >= count

    assert kill_when(scan_arguments(films, tmp_path), lambda: has_noted(0))
    kill_when(scan_arguments(films, tmp_path), lambda: has_noted(20_000))
    assert main(scan_arguments(films, tmp_path)) == 0
    assert kill_when(pack_arguments(tmp_path), lambda: has_written(".shard*", 1))
    kill_when(pack_arguments(tmp_path), lambda: has_written("shard*.tar", 4))
    assert main(pack_arguments(tmp_path)) == 0
    assert contents(tmp_path) == outcome


def test_parts_end_with_the_same_bytes(films: Path, outcome: dict[str, bytes], tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        assert main([*scan_arguments(films, tmp_path), "--part", part]) == 0
    assert main(scan_arguments(films, tmp_path)) == 0
    for part in ("2/2", "1/2"):
        assert main([*pack_arguments(tmp_path), "--part", part]) == 0
    assert main(pack_arguments(tmp_path)) == 0
    assert contents(tmp_path) == outcome


_CLUSTER = """
import os, signal, sys, threading, time
from pathlib import Path
from distributed import LocalCluster
from cmacc.cli import main

def run(arguments, has_begun):
    def kill_a_worker():
        while not has_begun():
            time.sleep(0.01)
        os.kill(victims.pop(), signal.SIGKILL)
    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    assert main([*arguments, "--cluster", cluster.scheduler_address]) == 0
    thread.join()

if __name__ == "__main__":
    scan, pack, out = eval(sys.argv[1]), eval(sys.argv[2]), Path(sys.argv[3])
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        victims = [worker.pid for worker in cluster.workers.values()]
        journal = out / "m.csv.scan" / "journal.jsonl"
        run(scan, lambda: journal.exists() and journal.stat().st_size > 0)
        run(pack, lambda: any((out / "packed").glob("shard*.tar")))
        assert not victims
"""


@pytest.mark.slow
def test_a_cluster_that_loses_workers_ends_with_the_same_bytes(
    films: Path, outcome: dict[str, bytes], tmp_path: Path
) -> None:
    """Two workers, one killed while scanning and one while packing; the cluster starts others in their place."""
    script = tmp_path / "cluster.py"
    script.write_text(_CLUSTER)
    out = tmp_path / "out"
    out.mkdir()
    arguments = [repr(scan_arguments(films, out)), repr(pack_arguments(out)), str(out)]
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(out) == outcome


def test_a_cluster_that_is_not_there(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*scan_arguments(films, tmp_path), "--cluster", "tcp://127.0.0.1:9"]) == 2
    assert "no Dask scheduler answers" in capsys.readouterr().err


def test_the_index_trains_like_a_manifest(outcome: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in outcome.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    index = Manifest.read(tmp_path / "packed" / "index.parquet")
    assert len(index) == 40
    assert {record.split for record in index.records} == {"train", "test"}
    assert index.classes() == ["a", "b"]
