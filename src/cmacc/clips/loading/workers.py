"""The worker processes of torch's DataLoader: known, killed when done with, and off torch's watch.

Workers are killed, not asked to end: nothing of theirs is wanted any more, and one may hang in a decoder. So nothing
may depend on what a process does at its end, nor on a lock that one may hold when it is killed.
"""

import copy
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import secrets
import signal
from multiprocessing.process import BaseProcess
from typing import Any, Literal, cast

import torch

StartMethod = Literal["fork", "spawn"]


class Workers:
    """The processes of one DataLoader, which torch starts by way of ``context``, so that they are known here."""

    def __init__(self, start_method: StartMethod | None) -> None:
        self.processes: list[BaseProcess] = []  # in the order of their numbers
        context = multiprocessing.get_context(start_method or multiprocessing.get_start_method())
        self.context = cast(Any, copy.copy(context))
        start = self.context.Process

        def recorded(*arguments: Any, **options: Any) -> BaseProcess:
            self.processes.append(start(*arguments, **options))
            return self.processes[-1]

        self.context.Process = recorded
        self.context.Event = _Flag
        if not multiprocessing.util.abstract_sockets_supported:
            # See `begin_worker`. A worker whose parent has such a folder uses that one, and the parent removes it at
            # its own end.
            multiprocessing.util.get_temp_dir()

    def dead(self) -> list[int]:
        """Numbers of the workers that have ended."""
        return [number for number, process in enumerate(self.processes) if not process.is_alive()]

    def kill(self) -> None:
        """Leave none behind."""
        started = [process for process in self.processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join(timeout=5)


def begin_worker(_: int) -> None:
    """What a worker does first; torch's ``worker_init_fn``."""
    # Ctrl-C goes to the whole process group; only the main process answers it, then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A process that sends tensors listens at a socket in a folder `pymp-*` of the temp folder. It would leave that
    # behind when it is killed, and hang where the folder's path is so long that it makes no valid address (108 bytes).
    # Linux has sockets without a file, whose names begin with a zero byte.
    if multiprocessing.util.abstract_sockets_supported:
        multiprocessing.connection.arbitrary_address = _address_without_file  # type: ignore[attr-defined]


def _address_without_file(family: str) -> str:
    return f"\0cmacc-{os.getpid()}-{secrets.token_hex(8)}"


class _Flag:
    """Stands in for ``multiprocessing.Event``, whose lock a killed worker may hold for good."""

    def __init__(self) -> None:
        self._is_set = torch.zeros(1, dtype=torch.bool).share_memory_()

    def set(self) -> None:
        self._is_set.fill_(True)

    def is_set(self) -> bool:
        return bool(self._is_set.item())


def unwatch(iterator: Any) -> None:
    """Take a DataLoader's workers off the watch of torch's SIGCHLD handler.

    torch offers no way: the handler, one for the whole process, is set by the first DataLoader of anyone, and to set
    another would blind those of our host. tests/clips/loading/test_loader.py says what must hold of the two names.
    """
    torch._C._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False  # else torch would take them off a second time, which is an error
