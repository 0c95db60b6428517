"""Notice processes of a run that die or hang, and end the run in all of them with a message that names them.

Without it, the others would wait in their next collective operation: with NCCL for ever, or until a time limit of
minutes that names nobody; with gloo until an error that names an address.

1. Rank 0 serves a `torch.distributed.TCPStore` of its own, in which every rank has one entry: how many times it has
   written, and how it ended, if it did.
2. A thread of every rank, the *messenger*, writes its rank's entry and reads all others every three seconds.
3. Another, the *judge*, ends this process when (a) an entry says that its rank ended with an error; (b) an entry has
   not changed for 30 seconds; (c) the store is gone, and thus the process of rank 0; (d) another judge has decided:
   then with the same words, so that all ranks tell the same.

There are two threads because a call to the store does not return while rank 0's process is suspended. Silence is
counted with the judge's own clock, and only while it runs itself: a process that was suspended does not blame the
others. Threads need Python's lock (GIL), which a main thread may hold for seconds, for example while it unpacks a
large manifest; 30 seconds are long enough for that and short enough for all to end within 60.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # exported with `*`

_INTERVAL_SECONDS = 3.0
_SILENCE_SECONDS = 30.0
# After a lost connection some rank is probably dead, so a third of the silence is enough to say which.
_HURRY = 3
# Entries are read once per interval, so three let the others read the last one before the store ends.
_LINGER_INTERVALS = 3


@dataclass(frozen=True)
class _Entry:
    """What a rank tells the others: ``end`` is empty, or ``done``, ``error`` or ``judged`` with a ``text``."""

    beats: int = 0
    end: str = ""
    text: str = ""


@contextmanager
def watch(
    rank: int,
    count: int,
    end_process: Callable[[str], NoReturn],
    *,
    interval_seconds: float = _INTERVAL_SECONDS,
    silence_seconds: float = _SILENCE_SECONDS,
) -> Iterator[None]:
    """Within it, this process ends if another one of the run dies, hangs or leaves with an error.

    All processes must enter it together, since they exchange addresses. An error in this process is told to the others
    and raised. A lost connection is not told at once: it is the symptom of another rank's end, which the watch names
    within seconds.

    Parameters
    ----------
    rank, count
        Of this process in ``torch.distributed``, and the number of processes. With one, nothing is done.
    end_process
        Called in a thread, with a text such as "rank 3 (host, process 71) has not answered for 30 s". It must end the
        process without waiting for the main thread, which may hang: `os._exit`.
    interval_seconds
        Time between two looks at the others.
    silence_seconds
        A rank that does not answer for so long counts as dead.

    Raises
    ------
    RuntimeError
        Rank 0 cannot be reached.
    """
    if count == 1:
        yield
        return
    watcher = _Watcher(rank, count, end_process, interval_seconds, silence_seconds)
    try:
        yield
    except BaseException as error:
        if _is_lost_connection(error):
            watcher.wait_for_judge()
        watcher.leave("error", " ".join(str(error).split()) or type(error).__name__)
        raise
    watcher.leave("done")


def _is_lost_connection(error: BaseException) -> bool:
    # gloo raises bare RuntimeErrors, with the place in its source: "[/pytorch/third_party/gloo/gloo/transport/tcp/...".
    return isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo" in str(error))


class _Watcher:
    """The two threads of a rank, and how it leaves."""

    def __init__(
        self, rank: int, count: int, end_process: Callable[[str], NoReturn], interval: float, silence: float
    ) -> None:
        self._rank, self._end_process = rank, end_process
        self._interval, self._silence = interval, silence
        self._server = _serve(count) if rank == 0 else None
        mine = (socket.gethostname(), os.getpid(), self._server.port if self._server else 0)
        everyone: list[Any] = [None] * count
        torch.distributed.all_gather_object(everyone, mine)
        self._names = [f"rank {r} ({host}, process {pid})" for r, (host, pid, _) in enumerate(everyone)]
        self._store = _connect(everyone[0][2])
        self._entries = [_Entry()] * count  # as last read
        self._exchanges = 0  # of the messenger with the store
        self._store_is_gone = False
        self._end = self._told = ("", "")  # of this rank, with its text; and what of it the store has
        self._has_failed = self._hurries = False
        self._news, self._closed = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._messenger, self._judge)]
        for thread in self._threads:
            thread.start()

    def wait_for_judge(self) -> None:
        """Give the judge the time to find a dead rank, and to end this process."""
        self._hurries = True
        time.sleep(self._silence / _HURRY + _LINGER_INTERVALS * self._interval)

    def leave(self, end: str, text: str = "") -> None:
        """Tell the others how this rank ends, and stop the threads."""
        self._has_failed = end == "error"
        self._tell(end, text)
        if self._rank == 0:
            # The store must outlive the last look of the others. At a normal end they may still be at work, for as long
            # as they answer; after an error they have no reason to stay.
            linger = _LINGER_INTERVALS * self._interval if self._has_failed else float("inf")
            self._wait_for(range(1, len(self._entries)), linger)
        self._closed.set()
        self._news.set()
        for thread in self._threads:
            thread.join(self._interval)  # the messenger hangs if the store does

    def _tell(self, end: str, text: str) -> None:
        self._end = (end, text)
        self._news.set()
        until = time.monotonic() + _LINGER_INTERVALS * self._interval
        while self._told != (end, text) and not self._store_is_gone and time.monotonic() < until:
            time.sleep(self._interval / 100)

    def _wait_for(self, others: Sequence[int], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(self._entries[rank].end for rank in others):
            time.sleep(self._interval / 10)

    def _messenger(self) -> None:
        keys = [_key(rank) for rank in range(len(self._entries))]
        while not self._closed.is_set():
            end = self._end
            entry = _Entry(self._exchanges + 1, *end)
            try:
                self._store.set(_key(self._rank), json.dumps(asdict(entry)))
                self._entries = [_Entry(**json.loads(text)) for text in self._store.multi_get(keys)]
            except DistError:
                self._store_is_gone = True
                return
            self._exchanges += 1
            self._told = end
            self._news.wait(self._interval)
            self._news.clear()

    def _judge(self) -> None:
        silences = [0.0] * len(self._entries)
        beats, exchanges, before = [0] * len(self._entries), 0, time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self._interval), now
            entries = self._entries
            if self._exchanges == exchanges:
                silences[0] += passed  # rank 0 serves the store; nothing is known of the others
            else:
                for rank, entry in enumerate(entries):
                    silences[rank] = 0.0 if entry.beats != beats[rank] else silences[rank] + passed
                beats, exchanges = [entry.beats for entry in entries], self._exchanges
            verdict = self._verdict(entries, silences)
            if self._has_failed:
                return  # this rank is the reason for what the others do now
            if verdict is not None:
                self._tell("judged", verdict)
                if self._rank == 0:
                    answering = [rank for rank in range(1, len(silences)) if silences[rank] < self._limit()]
                    self._wait_for(answering, _LINGER_INTERVALS * self._interval)
                self._end_process(verdict)

    def _verdict(self, entries: list[_Entry], silences: list[float]) -> str | None:
        others = [rank for rank in range(len(entries)) if rank != self._rank]
        for rank in others:
            if entries[rank].end == "judged":
                return entries[rank].text
        for rank in others:
            if entries[rank].end == "error":
                return f"{self._names[rank]} ended with an error: {entries[rank].text}"
        for rank in others:
            if not entries[rank].end and silences[rank] >= self._limit():
                return f"{self._names[rank]} has not answered for {self._limit():.0f} s"
        if self._store_is_gone and entries[0].end != "done":
            return f"{self._names[0]} is gone"
        return None

    def _limit(self) -> float:
        return self._silence / (_HURRY if self._hurries else 1)


def _serve(count: int) -> TCPStore:
    # Port 0: the system chooses a free one.
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for rank in range(count):
        server.set(_key(rank), json.dumps(asdict(_Entry())))  # reading an entry that is not there would wait for it
    return server


def _connect(port: int) -> TCPStore:
    store = TCPStore(os.environ.get("MASTER_ADDR", "localhost"), port, is_master=False, wait_for_workers=False)
    # The judge has the time limits; the store's own are printed as warnings.
    store.set_timeout(timedelta(days=1))
    return store


def _key(rank: int) -> str:
    return f"rank/{rank}"
