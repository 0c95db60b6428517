"""Run a function in a separate process, which may crash, hang or run out of memory without affecting the caller.

A decoder can do all three on a broken file, and no ``try`` catches it. So the caller keeps one helper process that has
imported everything, and the helper forks guarded processes when needed. This takes milliseconds instead of the seconds
of a new interpreter. The time limit is a kernel timer (``setitimer``), which kills a process even if it hangs in C code
or the caller no longer exists.

Requests are pickled (they come from this process). Replies are JSON, so that a decoder taken over by a malicious file
cannot execute code in the caller.

Why not a library: pebble 5.2 and multiprocessing's forkserver are as fast where it matters (a call takes 0.06 ms here,
0.3 ms with pebble, 0.06 ms with forkserver; a new process takes 25 ms here, 26 ms with forkserver; the next result
after a crash takes 18 ms here, 112 ms with pebble; an examination takes 30 ms). But both unpickle data from the guarded
process. Both refuse to start in daemonic processes, such as Dask's workers, and import the main script again, so that
scripts without ``if __name__ == "__main__"`` fail. And pebble measures time in the calling process: after it was
killed, a hanging worker kept running.
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
    """The function raised an error; this has its message."""


class GuardDeathError(GuardError):
    """The function did not return: its process crashed, exceeded the time limit, or sent an invalid reply."""


class Guard:
    """One guarded process, started on first use and restarted after it dies. Not thread-safe."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._owner = os.getpid()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_seconds: float) -> Any:
        """Compute ``function(*arguments)`` in the guarded process.

        Parameters
        ----------
        function
            Function that can be imported by name. Its result must be serialisable as JSON.
        *arguments
            Arguments that can be pickled.
        timeout_seconds
            Limit of wall time, after which the process is killed.

        Raises
        ------
        GuardError
            The function raised an error.
        GuardDeathError
            Its process crashed, exceeded the time limit, or sent an invalid reply.
        ChildProcessError
            No guarded process can be started. The function was not called.
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
        except BaseException:  # Ctrl-C: the next call must not receive the pending reply
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
        """Stop the guarded process."""
        if self._socket is not None:
            if self._owner == os.getpid():
                _hang_up(self._socket)
            self._socket.close()
            self._socket = None

    def __del__(self) -> None:
        self.close()


def guarded(function: Callable[..., Any], *arguments: Any, timeout_seconds: float) -> Any:
    """`Guard.call` in the guarded process of the calling thread, which is reused for later calls."""
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
                [sys.executable, "-P", "-c", _HELPER, str(theirs.fileno())],  # -P: no imports from the current folder
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # only the calling process handles Ctrl-C
            )
        atexit.register(self.close)

    def alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def fork(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with self._lock, theirs:
                socket.send_fds(self._socket, [b"f"], [theirs.fileno()])
            if ours.recv(1):  # it has started; only later failures are due to the function
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
    """Reset the state in a forked process, which shares the open sockets and would read replies to others."""
    global _ready, _ready_lock, _of_thread
    _ready, _ready_lock, _of_thread = None, threading.Lock(), threading.local()


os.register_at_fork(after_in_child=_forget_in_child)


def _hang_up(connection: socket.socket) -> None:
    """Shut down the connection, which stops the other side even if a forked process has a copy of the socket."""
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
    """Receive one message; None if the other side is gone."""
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
    """Main loop of the helper: fork a child for every received socket, until the calling process is gone.

    Parameters
    ----------
    control
        File descriptor of the control socket.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that children do not become zombies
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
    """Main loop of a guarded process: execute calls until the connection is closed."""
    # If memory runs out, the kernel should kill this process and not the caller.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    connection.sendall(b"!")
    while (request := _receive(connection)) is not None:
        try:
            function, arguments, timeout_seconds = pickle.loads(request)
            signal.setitimer(signal.ITIMER_REAL, timeout_seconds)
            answer = json.dumps(["result", function(*arguments)])
        except ValueError as error:  # invalid input; the message is sufficient
            answer = json.dumps(["error", str(error)])
        except Exception as error:
            answer = json.dumps(["error", f"{type(error).__name__}: {error}"])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        _send(connection, answer.encode())
