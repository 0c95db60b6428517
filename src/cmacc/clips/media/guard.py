"""Run a function in a process that may crash, hang or run out of memory without harm to the one that asks.

A decoder that meets a broken file can do all three, and no ``try`` catches it. So the asking process keeps one helper
process beside it that has imported everything, and whenever a guarded process is needed the helper forks one, which
takes milliseconds instead of the seconds of a fresh start. The time limit is the kernel's alarm clock, which ends a
process however deep in C it hangs, and even if the asking process is gone by then.

Requests are pickled (they come from this process); answers are JSON, so that a decoder taken over by a hostile file has
nothing to answer with that would be run here.

Why not a library: pebble 5.2 and multiprocessing's forkserver are as quick where it matters (a call takes 0.06 ms here,
0.3 ms with pebble, 0.06 ms through forkserver; a new process 25 ms here, 26 ms from forkserver; after a crash the next
answer comes in 18 ms here, in 112 ms with pebble; an examination takes 30 ms). But both unpickle what the guarded
process sends. Both refuse to start in daemonic processes, which Dask's workers are, and import the asking script again,
so that one without ``if __name__ == "__main__"`` fails. And pebble keeps the time in the asking process: when that was
killed, a hanging worker was still there.
"""

import atexit
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_HELPER = "import sys; from cmacc.clips.media.guard import serve; serve(int(sys.argv[1]))"
_LENGTH = struct.Struct("<Q")
_ready_lock = threading.Lock()
_ready: "_Forker | None" = None
_of_thread = threading.local()


class GuardError(RuntimeError):
    """What was asked failed: the function raised an error, whose message this is."""


class GuardDeathError(GuardError):
    """What was asked gave no answer: its process crashed, took too long, or was taken over; the message says which."""


class Guard:
    """One guarded process, started when first needed and again whenever it is gone. For one thread at a time."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._owner = os.getpid()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_seconds: float) -> Any:
        """The answer of ``function(*arguments)``, computed in the guarded process.

        Parameters
        ----------
        function
            Importable by name; what it returns must be fit for JSON.
        *arguments
            Anything that can be pickled.
        timeout_seconds
            Wall time after which the process is ended.

        Raises
        ------
        GuardError
            The function raised an error.
        GuardDeathError
            Its process crashed, the time was over, or its answer is none.
        ChildProcessError
            No guarded process can be started: nothing is said of what was asked.
        ValueError
            ``timeout_seconds`` is not positive.
        """
        if not timeout_seconds > 0:
            raise ValueError(f"guard: timeout_seconds must be positive, got {timeout_seconds}")
        if self._socket is None:
            self._socket = _forker().fork()
        begun = time.monotonic()
        try:
            _send(self._socket, pickle.dumps((function, arguments, timeout_seconds)))
            reply = _receive(self._socket)
        except OSError:
            reply = None
        except BaseException:  # Ctrl-C: the answer to come must not be taken for that of the next call
            self.close()
            raise
        if reply is None:
            self.close()
            if time.monotonic() - begun >= timeout_seconds:
                raise GuardDeathError(f"takes longer than the limit of {timeout_seconds:g} s")
            raise GuardDeathError("crashes the process that reads it")
        try:
            kind, answer = json.loads(reply)
        except (ValueError, TypeError) as error:
            self.close()
            raise GuardDeathError("makes the process that reads it answer in no known form") from error
        if kind == "error":
            raise GuardError(answer)
        return answer

    def close(self) -> None:
        """End the guarded process."""
        if self._socket is not None:
            if self._owner == os.getpid():
                _hang_up(self._socket)
            self._socket.close()
            self._socket = None

    def __del__(self) -> None:
        self.close()


def guarded(function: Callable[..., Any], *arguments: Any, timeout_seconds: float) -> Any:
    """`Guard.call` in the guarded process of the calling thread, which is kept for the thread's next call."""
    if not hasattr(_of_thread, "guard"):
        _of_thread.guard = Guard()
    return _of_thread.guard.call(function, *arguments, timeout_seconds=timeout_seconds)


class _Forker:
    """The helper process that has imported everything."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _HELPER, str(theirs.fileno())],  # -P: nothing from the current folder
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the asking process to answer
            )
        atexit.register(self.close)

    def alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def fork(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with self._lock, theirs:
                socket.send_fds(self._socket, [b"f"], [theirs.fileno()])
            if ours.recv(1):  # it greets; only from then on is what becomes of it the fault of what is asked
                return ours
            raise ConnectionError("it ended at once")
        except OSError as error:
            ours.close()
            raise ChildProcessError(
                f"guard: no process can be started to read files in ({error}); "
                "`python -P -c 'import cmacc.clips'` may tell why"
            ) from error

    def close(self) -> None:
        if self.owner == os.getpid():
            _hang_up(self._socket)
            self._socket.close()
            self._process.wait()


def _forget_in_child() -> None:
    """A forked process shares the open sockets, and would read another's answers."""
    global _ready, _ready_lock, _of_thread
    _ready, _ready_lock, _of_thread = None, threading.Lock(), threading.local()


os.register_at_fork(after_in_child=_forget_in_child)


def _hang_up(connection: socket.socket) -> None:
    """End the connection, which is what the other side waits for, also where a forked process holds a copy of it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _forker() -> _Forker:
    global _ready
    with _ready_lock:
        if _ready is None or not _ready.alive():
            _ready = _Forker()
        return _ready


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket) -> bytes | None:
    """One message; None when the other side is gone."""
    head = _receive_exactly(connection, _LENGTH.size)
    return None if head is None else _receive_exactly(connection, _LENGTH.unpack(head)[0])


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def serve(control: int) -> None:
    """The helper's work: a child for every socket that comes in, until the asking process is gone.

    Parameters
    ----------
    control
        Number of the open socket over which it is asked.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no ended child lingers
    with socket.socket(fileno=control) as asked:
        while True:
            message, descriptors, _, _ = socket.recv_fds(asked, 1, 1)
            if not message:
                return
            if os.fork() == 0:
                asked.close()
                with socket.socket(fileno=descriptors[0]) as connection:
                    _answer(connection)
                os._exit(0)
            os.close(descriptors[0])


def _answer(connection: socket.socket) -> None:
    """The guarded process's work: one call after the other, until nobody asks any more."""
    # Should memory run out, let the kernel take this process and not the one that asks.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    connection.sendall(b"!")
    while (request := _receive(connection)) is not None:
        try:
            function, arguments, timeout_seconds = pickle.loads(request)
            signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
            answer = json.dumps(["result", function(*arguments)])
        except ValueError as error:  # bad input, and the message says all
            answer = json.dumps(["error", str(error)])
        except Exception as error:
            answer = json.dumps(["error", f"{type(error).__name__}: {error}"])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        _send(connection, answer.encode())
