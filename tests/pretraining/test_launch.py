"""Our own launcher: one exit code, every error once, signals passed on, nothing left behind."""

import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from cmacc.cli import main
from cmacc.pretraining import RunError
from cmacc.pretraining.launch import ERROR_FILE, Launched, check_launch, launch, stop_with_launcher

BEGIN = """
import os, pathlib, signal, subprocess, sys, time
rank, place = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
def fail(code, error=None):
    if error: pathlib.Path(os.environ["CMACC_ERROR_FILE"]).write_text(error)
    sys.exit(code)
def all_here():
    (place / str(rank)).touch()
    while not all((place / str(r)).exists() for r in range(int(os.environ["WORLD_SIZE"]))): time.sleep(0.01)
"""


def run(script: str, place: Path, processes: int = 3) -> Launched:
    command = [sys.executable, "-S", "-c", BEGIN + textwrap.dedent(script), str(place)]
    return launch(command, processes, stopped=(130, 75), lost=(69,), patience_seconds=0.5, grace_seconds=0.5)


def test_processes_know_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    script = f'(place / str(rank)).write_text(" ".join(os.environ[name] for name in {names}))'
    assert run(script, tmp_path) == Launched(0, ())
    ranks, sizes, local_sizes, addresses, ports, threads = zip(
        *((tmp_path / str(rank)).read_text().split() for rank in range(3)), strict=True
    )
    assert ranks == ("0", "1", "2")
    assert sizes == local_sizes == ("3",) * 3
    assert set(addresses) == {"127.0.0.1"}
    assert len(set(ports)) == 1
    assert set(threads) == {str(max(1, len(os.sched_getaffinity(0)) // 3))}


def test_only_rank_0_writes_to_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run('print("out"); print("warning", file=sys.stderr)', tmp_path, processes=2)
    out, err = capfd.readouterr()
    assert out == "out\n"
    assert sorted(err.splitlines()) == ["[rank 1] out", "[rank 1] warning", "warning"]


@pytest.mark.parametrize(
    ("script", "code", "errors"),
    [
        ("fail(2, 'no such file')", 2, {"no such file"}),
        ("fail(2, f'{rank}')", 2, {"0", "[rank 1] 1", "[rank 2] 2"}),
        # The others only saw that it left, one of them before it had left.
        ("time.sleep(0.2 * (rank == 1)); fail(2, 'mine') if rank == 1 else fail(69, 'lost')", 2, {"[rank 1] mine"}),
        ("os.kill(os.getpid(), 9) if rank == 1 else fail(69, 'lost')", 137, {"rank 1 was killed by SIGKILL"}),
        # A rank hangs: what the others have noticed is all that is known.
        ("time.sleep(60) if rank == 1 else fail(69, 'rank 1 has not answered')", 69, {"rank 1 has not answered"}),
        ("1 / 0 if rank == 1 else time.sleep(60)", 1, set()),  # its traceback was shown
        ("all_here(); fail(75 if rank else 69, 'lost')", 75, {"lost"}),
    ],
)  # fmt: skip
def test_the_first_that_fails_decides(tmp_path: Path, script: str, code: int, errors: set[str]) -> None:
    launched = run(script, tmp_path)
    assert launched.code == code
    assert {error.partition(",")[0] for error in launched.errors} == errors
    assert len(launched.errors) == len(errors)


def test_who_does_not_end_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    launched = run(
        """
        signal.signal(signal.SIGTERM, lambda *_: (place / f"asked {rank}").touch())
        if rank:
            child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
            (place / f"child {rank}").write_text(str(child.pid))
        all_here()
        if rank == 2:
            fail(3)
        while True: time.sleep(60)
        """,
        tmp_path,
    )
    assert launched == Launched(3, ())
    assert [path.name for path in sorted(tmp_path.glob("asked *"))] == ["asked 0", "asked 1"]
    for path in tmp_path.glob("child *"):
        pid = int(path.read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once_and_leaves_time_to_save(tmp_path: Path, number: signal.Signals) -> None:
    """The first rank takes longer to save than ranks have to leave after another one failed."""
    launched = run(
        f"""
        got = []
        signal.signal({number}, lambda *_: got.append(1))
        all_here()
        if rank == 0:
            os.kill(os.getppid(), {number})
        while not got: time.sleep(0.01)
        time.sleep(1.5 if rank == 0 else 0.2)
        (place / f"saved {{rank}}").write_text(str(len(got)))
        fail({130 if number == signal.SIGINT else 75})
        """,
        tmp_path,
    )
    assert launched == Launched(130 if number == signal.SIGINT else 75, ())
    assert [(tmp_path / f"saved {rank}").read_text() for rank in range(3)] == ["1", "1", "1"]


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    launched = run(
        """
        signal.signal(signal.SIGINT, lambda *_: None)
        all_here()
        if rank == 0:
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(0.2)
            os.kill(os.getppid(), signal.SIGINT)
        while True: time.sleep(60)
        """,
        tmp_path,
    )
    assert launched == Launched(130, ())
    assert time.monotonic() - began < 20


def test_a_process_whose_launcher_was_killed_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ERROR_FILE, "file")
    got = threading.Event()
    before, stdin = signal.signal(signal.SIGTERM, lambda *_: got.set()), os.dup(0)
    read, write = os.pipe()
    os.dup2(read, 0)
    try:
        stop_with_launcher()
        time.sleep(0.1)
        assert not got.is_set()
        os.close(write)
        assert got.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)
        os.dup2(stdin, 0)
        os.close(read)
        os.close(stdin)


def test_what_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="--processes must be at least 1, got 0"):
        check_launch(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_launch(2)
    with pytest.raises(RunError, match="--processes must be at most 2, the GPUs of this machine, got 3"):
        check_launch(3)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_launch(1)  # which torchrun has started
    with pytest.raises(RunError, match="--processes must be 1 under a launcher, got 2 with WORLD_SIZE=4"):
        check_launch(2)


def test_bad_input_is_one_line_of_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 finds it; the other waits for the run folder, and must not wait longer. YAML may give the number too."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    settings = tmp_path / "settings.yaml"
    settings.write_text("processes: 2\n")
    run_dir = tmp_path / "run"
    arguments = ["pretrain", "--config", str(settings), "--data.manifest", "none.parquet", "--out", str(run_dir)]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("cmacc pretrain: error: manifest none.parquet: no such file")
    assert not run_dir.exists()


def test_ctrl_c_while_the_others_wait_for_the_first_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All leave with 130: the first's broken connection to one that left before it is no reason to show."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    script = """
        import os, signal, sys, time
        import cmacc.pretraining
        from cmacc.cli import main
        def start_run(*_, **__):
            time.sleep(0.5)  # until the others wait in gloo
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        cmacc.pretraining.start_run = start_run
        sys.exit(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), "pretrain", "--data.manifest", "any.parquet"]
    launched = launch([*command, "--out", str(tmp_path / "run")], 2, stopped=(130, 75), lost=(69,))
    assert launched == Launched(130, ("cmacc pretrain: interrupted",))
