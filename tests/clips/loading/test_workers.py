"""Worker processes when their main process is killed."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

# A worker that meets errors where its file says so, as the thread that hands tensors over does.
SCRIPT = """
import multiprocessing, sys, time
from pathlib import Path
from cmacc.clips.loading.workers import begin_worker

def report(error):
    try:
        raise error
    except Exception:
        sys.excepthook(*sys.exc_info())

def work(folder):
    begin_worker(0)
    report(ConnectionResetError("while the main process lives"))
    (folder / "begun").touch()
    end = time.monotonic() + 120  # where the test has failed, nobody lets it go
    while not (folder / "go").exists() and time.monotonic() < end:
        time.sleep(0.01)
    report(ConnectionResetError("by the main process"))
    report(EOFError("by the main process"))
    report(ValueError("of the worker"))
    (folder / "done").touch()

worker = multiprocessing.get_context("fork").Process(target=work, args=(Path(sys.argv[1]),))
worker.start()
worker.join()
"""


def test_a_lost_connection_is_reported_unless_the_main_process_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with (tmp_path / "errors").open("w") as errors, subprocess.Popen(command, stderr=errors) as main:
        _wait_for(tmp_path / "begun")
        worker = psutil.Process(main.pid).children()[0]
        (tmp_path / "go").touch()  # before the end of the main process, as its sockets close before it is gone
        main.kill()
        main.wait()
        _wait_for(tmp_path / "done")
        psutil.wait_procs([worker], timeout=10)
    reported = (tmp_path / "errors").read_text()
    assert "ConnectionResetError: while the main process lives\n" in reported
    assert "ValueError: of the worker\n" in reported
    assert "by the main process" not in reported


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)
