"""Manage worker processes of torch's DataLoader: track, kill, and remove them from torch's SIGCHLD handler.

Workers are killed, not asked to exit: their results are no longer needed, and one may hang in a decoder. So nothing may
depend on cleanup at exit, or on a lock that a killed worker may hold.
"""

import copy
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import secrets
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal, cast

import torch

StartMethod = Literal["fork", "spawn"]


class Workers:
    """The processes of one DataLoader. torch starts them through ``context``, which records them."""

    def __init__(self, start_method: StartMethod | None) -> None:
        self.processes: list[BaseProcess] = []  # in order of worker number
        context = multiprocessing.get_context(start_method or multiprocessing.get_start_method())
        self.context = cast(Any, copy.copy(context))
        start = self.context.Process

        def recorded(*arguments: Any, **options: Any) -> BaseProcess:
            self.processes.append(start(*arguments, **options))
            return self.processes[-1]

        self.context.Process = recorded
        self.context.Event = _Flag
        if not multiprocessing.util.abstract_sockets_supported:
            # See `begin_worker`. Workers use the temporary folder of their parent if it has one, and the parent removes
            # it at exit.
            multiprocessing.util.get_temp_dir()

    def dead(self) -> list[int]:
        """Numbers of the workers that have exited."""
        return [number for number, process in enumerate(self.processes) if not process.is_alive()]

    def kill(self) -> None:
        """Kill all workers and wait for their exit."""
        started = [process for process in self.processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join(timeout=5)


def begin_worker(_: int) -> None:
    """Initialise a worker; the ``worker_init_fn`` of the DataLoader."""
    # Ctrl-C goes to the whole process group. Only the main process handles it, and then kills its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked worker inherits the handler of the command, which would ask the worker to stop after the step.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A process that sends tensors listens on a socket in a temporary folder `pymp-*`. When killed, it would leave the
    # folder behind, and it would hang if the path is too long for a socket address (108 bytes). Linux supports sockets
    # without a file, whose names begin with a zero byte.
    if multiprocessing.util.abstract_sockets_supported:
        multiprocessing.connection.arbitrary_address = _address_without_file  # type: ignore[attr-defined]
    # When the main process is killed while it fetches a tensor, the thread of the worker that hands it over fails, and
    # its traceback would stand beside the one message that says what happened.
    sys.excepthook = _excepthook_while_parent_lives


def _excepthook_while_parent_lives(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not (isinstance(error, ConnectionError | EOFError) and _parent_ends_within(seconds=1)):
        sys.__excepthook__(kind, error, traceback)


def _parent_ends_within(seconds: float) -> bool:
    """Whether the process that started this worker is gone; its sockets close a moment before it is."""
    # Not by the parent's sentinel: workers that were forked later hold its other end open.
    parent = multiprocessing.parent_process()
    assert parent is not None
    end = time.monotonic() + seconds
    while os.getppid() == parent.pid:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _address_without_file(family: str) -> str:
    return f"\0cmacc-{os.getpid()}-{secrets.token_hex(8)}"


class _Flag:
    """Replacement for ``multiprocessing.Event``, whose lock would never be released by a killed worker."""

    def __init__(self) -> None:
        self._is_set = torch.zeros(1, dtype=torch.bool).share_memory_()

    def set(self) -> None:
        self._is_set.fill_(True)

    def is_set(self) -> bool:
        return bool(self._is_set.item())


def unwatch(iterator: Any) -> None:
    """Remove a DataLoader's workers from torch's SIGCHLD handler.

    torch has no public function for this. The handler is global, set by the first DataLoader of the process, and
    replacing it would disable it for other DataLoaders. tests/clips/loading/test_loader.py tests the two private names.
    """
    torch._C._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False  # otherwise torch would remove them again, which is an error
