"""The guarded process: answers come back, and nothing that happens in it reaches the one that asks."""

import ctypes
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cmacc.clips.media.guard import Guard, GuardDeathError, GuardError, guarded


@pytest.fixture
def guard() -> Iterator[Guard]:
    it = Guard()
    yield it
    it.close()


def test_answers_come_from_another_process_that_is_kept(guard: Guard) -> None:
    first = guard.call(os.getpid, timeout_seconds=30.0)
    assert first != os.getpid()
    assert guard.call(os.getpid, timeout_seconds=30.0) == first
    assert guard.call(re.escape, "a.b", timeout_seconds=30.0) == "a\\.b"


def test_bad_input_comes_back_in_words(guard: Guard) -> None:
    with pytest.raises(GuardError, match=r"^invalid literal for int\(\)"):
        guard.call(int, "x", timeout_seconds=30.0)
    with pytest.raises(GuardError, match=r"FileNotFoundError: .*nowhere"):
        guard.call(os.listdir, "/nowhere", timeout_seconds=30.0)
    with pytest.raises(GuardError, match=r"TypeError: .*JSON"):
        guard.call(Path, "what JSON does not know", timeout_seconds=30.0)
    assert guard.call(int, "7", timeout_seconds=30.0) == 7


def test_a_process_that_hangs_is_ended_in_time(guard: Guard) -> None:
    guard.call(os.getpid, timeout_seconds=30.0)  # so that starting is not counted
    begun = time.monotonic()
    with pytest.raises(GuardError, match=r"takes longer than the limit of 0\.3 s"):
        guard.call(time.sleep, 60, timeout_seconds=0.3)
    assert time.monotonic() - begun < 10
    assert guard.call(int, "7", timeout_seconds=30.0) == 7


@pytest.mark.parametrize(("function", "argument"), [(ctypes.string_at, 0), (os._exit, 3), (os.abort, None)])
def test_a_crash_is_told_and_survived(guard: Guard, function: object, argument: int | None) -> None:
    before = guard.call(os.getpid, timeout_seconds=30.0)
    arguments = () if argument is None else (argument,)
    with pytest.raises(GuardError, match="crashes the process that reads it"):
        guard.call(function, *arguments, timeout_seconds=30.0)  # type: ignore[arg-type]
    assert guard.call(os.getpid, timeout_seconds=30.0) != before


# What a file that has taken the decoder over may do: answer in the decoder's place, with a pickle that would be run.
_TAKEN_OVER = """[
    os.write(int(fd), struct.pack("<Q", len(answer)) + answer)
    for os, struct in [(__import__("os"), __import__("struct"))]
    for fd in os.listdir("/proc/self/fd")
    if os.path.islink(f"/proc/self/fd/{{fd}}") and "socket" in os.readlink(f"/proc/self/fd/{{fd}}")
    for answer in [{answer!r}]
]"""


class _Touch:
    """When unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists a process's sockets so simply")
def test_a_hostile_answer_is_not_run_but_told(guard: Guard, tmp_path: Path) -> None:
    for answer in (pickle.dumps(_Touch(tmp_path / "run")), b"7", b'["result"]'):
        with pytest.raises(GuardDeathError, match="answer in no known form"):
            guard.call(eval, _TAKEN_OVER.format(answer=answer), timeout_seconds=30.0)
    assert list(tmp_path.iterdir()) == []
    assert guard.call(int, "7", timeout_seconds=30.0) == 7


def test_a_daemonic_process_has_guards_too() -> None:
    """Dask's workers are such, which multiprocessing allows no children."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=lambda: answers.put(guarded(os.getpid, timeout_seconds=60.0)), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answers.get() not in (os.getpid(), process.pid)


def test_each_thread_has_its_own() -> None:
    found: dict[int, int] = {}

    def ask(place: int) -> None:
        found[place] = guarded(os.getpid, timeout_seconds=30.0)
        guarded(time.sleep, 0.05, timeout_seconds=30.0)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*found.values(), os.getpid()}) == 4
    deadline = time.monotonic() + 10  # with the threads their processes end
    while any(psutil.pid_exists(pid) for pid in found.values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(psutil.pid_exists(pid) for pid in found.values())


def test_what_is_said_of_a_helper_that_does_not_start(tmp_path: Path) -> None:
    """It is no fault of the file's; and a module in the current folder is not taken for one of the package's own."""
    (tmp_path / "av.py").write_text("raise SystemExit('imported from the current folder')")
    code = (
        "from cmacc.clips.media import guard\n"
        "print(guard.guarded(int, '7', timeout_seconds=30.0))\n"
        "guard._forget_in_child(); guard._HELPER = 'raise SystemExit'\n"
        "try: guard.guarded(int, '7', timeout_seconds=30.0)\n"
        "except ChildProcessError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.startswith("7\nguard: no process can be started to read files in (")


def test_an_interrupted_call_leaves_no_answer_behind(guard: Guard) -> None:
    guard.call(os.getpid, timeout_seconds=30.0)
    # To this very thread, which waits for an answer: a signal to the process may be taken by another one. And with the
    # handler of an ordinary session: where tests run in the background, shells have them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, signal.pthread_kill, args=(threading.get_ident(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        guard.call(time.sleep, 20.0, timeout_seconds=60.0)
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert guard.call(int, "7", timeout_seconds=30.0) == 7


def test_a_forked_process_has_guards_of_its_own() -> None:
    ours = guarded(os.getpid, timeout_seconds=30.0)
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, str(guarded(os.getpid, timeout_seconds=60.0)).encode())
        os._exit(0)
    os.close(write)
    with open(read) as told:
        assert int(told.read()) != ours
    os.wait()
    assert guarded(os.getpid, timeout_seconds=30.0) == ours


@pytest.mark.parametrize("timeout_seconds", [0.0, -1.0])
def test_a_limit_must_be_one(guard: Guard, timeout_seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout_seconds must be positive, got"):
        guard.call(os.getpid, timeout_seconds=timeout_seconds)


@pytest.mark.slow
def test_nothing_is_left_when_the_asking_process_is_killed() -> None:
    code = (
        "import os, time; from cmacc.clips.media.guard import guarded\n"
        "print(guarded(os.getpid, timeout_seconds=30.0), guarded(os.getppid, timeout_seconds=30.0), flush=True)\n"
        "guarded(time.sleep, 60, timeout_seconds=2.0)"
    )
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    pids = [int(pid) for pid in asking.stdout.readline().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    asking.stdout.close()
    deadline = time.monotonic() + 20  # even the one that sleeps: its own alarm clock goes off
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in pids)
