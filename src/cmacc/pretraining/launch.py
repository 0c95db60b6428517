"""Start the processes of a run on this machine (``cmacc pretrain --processes P``), and end them together.

`torchrun` and `accelerate launch` do this too, and are needed for several machines. But their exit code is always 1,
and they print a page for a typo in a path. Here the first process that fails decides the exit code, and a line that
all processes find is shown once.

* Rank 0 writes to our stdout and stderr itself, so that its progress bars work. What the others write is passed on to
  stderr, each line after ``[rank 1]``.
* The processes are in sessions of their own: Ctrl-C in a terminal reaches only this process, which passes it on once.
* A process writes its error, one line, to the file that `ERROR_FILE` names, instead of to stderr.
* If this process is killed, its processes notice the end of their stdin, and stop as if they had got SIGTERM.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cmacc.pretraining.clip_stream import RunError

# Variable of the environment; `cmacc.cli.terminal.print_error` reads it.
ERROR_FILE = "CMACC_ERROR_FILE"
_LOOK_SECONDS = 0.05
# A process that fails tells the others (`cmacc.pretraining.watch`), who read it every three seconds and leave with a
# line of their own. What is left after that is asked to end, and then killed: it hangs in a collective operation, and
# what it has not saved cannot be saved any more, since saving needs all processes.
_PATIENCE_SECONDS = 5.0
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Launched:
    """How the processes ended: the exit ``code`` of all together, and the ``errors`` to show, each once."""

    code: int
    errors: tuple[str, ...]


def check_launch(processes: int) -> None:
    """Check that ``processes`` can be started on this machine.

    Raises
    ------
    RunError
        ``processes`` is less than 1 or more than the GPUs of this machine, or a launcher has started this process.
    """
    if processes < 1:
        raise RunError(f"--processes must be at least 1, got {processes}")
    if processes == 1:
        return
    if "WORLD_SIZE" in os.environ:
        raise RunError(
            f"--processes must be 1 under a launcher, got {processes} with WORLD_SIZE={os.environ['WORLD_SIZE']}: give "
            "the number to the launcher (`torchrun --nproc-per-node`, `accelerate launch --num_processes`) only"
        )
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise RunError(
            f"--processes must be at most {gpus}, the GPUs of this machine, got {processes}; to train on the CPU, hide "
            "the GPUs with CUDA_VISIBLE_DEVICES="
        )


def launch(
    command: Sequence[str],
    processes: int,
    *,
    stopped: Collection[int] = (),
    lost: Collection[int] = (),
    patience_seconds: float = _PATIENCE_SECONDS,
    grace_seconds: float = _GRACE_SECONDS,
) -> Launched:
    """Run a command in several processes of one ``torch.distributed`` group, and wait for all of them.

    SIGINT, SIGTERM and SIGHUP are passed on once. A second SIGINT kills the processes.

    Parameters
    ----------
    command
        The program and its arguments, the same for every process. The environment tells a process its rank.
    processes
        How many to start.
    stopped
        Exit codes of processes that all stopped together, as they were asked to. They get the time to save.
    lost
        Exit codes of processes that ended because another one did. They count only if no other code tells more.
    patience_seconds
        After one failed, the others have this time to leave by themselves; then they get SIGTERM.
    grace_seconds
        Time from SIGTERM to SIGKILL.

    Returns
    -------
    Launched
        The exit code is that of the first process that failed; of one that was killed by signal n, 128 + n.
    """
    signals: list[int] = []
    with TemporaryDirectory(prefix="cmacc-launch-") as folder, _noting(signals):
        files = [Path(folder) / str(rank) for rank in range(processes)]
        shared = _shared_environment(processes)
        children: list[_Child] = []
        try:
            for rank in range(processes):
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(files[rank])}
                children.append(_Child(rank, command, environment))
            ended = _supervise(children, signals, stopped, patience_seconds, grace_seconds)
        finally:
            for child in children:
                child.kill()
        return _outcome(ended, files, signals, stopped, lost)


def stop_with_launcher() -> None:
    """Let this process get SIGTERM when the launcher that started it is killed; without a launcher, do nothing."""
    if ERROR_FILE in os.environ:
        threading.Thread(target=_terminate_at_end_of_input, daemon=True).start()


def _terminate_at_end_of_input() -> None:
    # Not sys.stdin: Python aborts at its exit if another thread waits in it.
    if os.read(0, 1) == b"":
        os.kill(os.getpid(), signal.SIGTERM)


class _Child:
    """A process of the run, in a session of its own."""

    def __init__(self, rank: int, command: Sequence[str], environment: dict[str, str]) -> None:
        self.rank = rank
        output = None if rank == 0 else subprocess.PIPE
        self.process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.PIPE,  # nothing is written: see `stop_with_launcher`
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        if self.process.stdout is None:  # rank 0
            return
        with self.process.stdout as output:
            for line in output:
                print(f"[rank {self.rank}] {line.rstrip()}", file=sys.stderr, flush=True)

    def kill(self) -> None:
        """Kill the process, if it has not ended, and what it has started; and show what it has written."""
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reader.join(timeout=1)  # a process that has left the session may still hold the pipe


def _shared_environment(processes: int) -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:  # another program may take it until rank 0 does; it is rare
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        # gloo would listen on the address of the host's name, which may have none, or a firewall.
        "GLOO_SOCKET_IFNAME": next((name for _, name in socket.if_nameindex() if name.startswith("lo")), ""),
        # When a process ends, torch prints warnings with stacks of C++ for every connection to it.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {name: value for name, value in defaults.items() if value} | dict(os.environ) | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


@contextmanager
def _noting(signals: list[int]) -> Iterator[None]:
    passed_on = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        passed_on.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in passed_on}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(
    children: Sequence[_Child], signals: list[int], stopped: Collection[int], patience: float, grace: float
) -> dict[int, int]:
    """Exit codes by rank in the order of the ends, without those of the processes that had to be ended from here."""
    ended: dict[int, int] = {}
    passed_on: set[int] = set()
    failed_at: float | None = None
    asked = False
    while True:
        running = [child for child in children if child.process.poll() is None]
        if not asked:
            for child in children:
                code = child.process.returncode
                if code is not None and child.rank not in ended:
                    ended[child.rank] = code
                    child.kill()  # its workers have copies of its connections, whose end the others wait for
                    if code != 0 and code not in stopped and failed_at is None:
                        failed_at = time.monotonic()
        waited = 0.0 if failed_at is None else time.monotonic() - failed_at
        if not running or signals.count(signal.SIGINT) > 1 or waited > patience + grace:
            return ended
        if waited > patience and not asked:
            asked = True
            for child in running:
                child.process.terminate()
        for number in set(signals) - passed_on:
            passed_on.add(number)
            for child in running:
                child.process.send_signal(number)
        time.sleep(_LOOK_SECONDS)


def _outcome(
    ended: dict[int, int], files: Sequence[Path], signals: list[int], stopped: Collection[int], lost: Collection[int]
) -> Launched:
    if signals.count(signal.SIGINT) > 1:
        return Launched(128 + signal.SIGINT, ())
    failed = {rank: code for rank, code in ended.items() if code != 0}
    own = [rank for rank, code in failed.items() if code not in lost and code not in stopped]
    # Of those that are asked to stop before the first step, some only see that others leave.
    told = own or [rank for rank, code in failed.items() if code in stopped] or list(failed)
    if not told:
        return Launched(0, ())
    code = failed[told[0]]
    errors = {rank: _error_of(rank, failed[rank], files[rank]) for rank in told}
    ranks: dict[str, list[int]] = {}
    for rank, error in errors.items():
        if error:
            ranks.setdefault(error, []).append(rank)
    lines = []
    for error, (first, *others) in ranks.items():
        is_of_one = first != 0 and not others and failed[first] > 0
        lines.append(f"[rank {first}] {error}" if is_of_one else error)
    return Launched(code if code > 0 else 128 - code, tuple(lines))


def _error_of(rank: int, code: int, file: Path) -> str:
    if code < 0:
        memory = ", perhaps by the system for want of memory" if code == -signal.SIGKILL else ""
        return f"rank {rank} was killed by {signal.Signals(-code).name}{memory}"
    return file.read_text().strip() if file.exists() else ""
