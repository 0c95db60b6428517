"""The watch ends all ranks of a run when one of them dies, hangs or leaves with an error, and says which one it was."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

RANKS = 3
INTERVAL, SILENCE = 0.1, 2.0
LOST = 69


def steps(rank: int) -> None:
    import torch

    for _ in range(5):
        torch.distributed.all_reduce(torch.ones(1))
        time.sleep(0.05)


def late_end(rank: int) -> None:
    """The store must wait for the others, also when rank 0 is the first at the end."""
    steps(rank)
    time.sleep(0.5 * rank)


def busy(rank: int) -> None:
    """The main thread of rank 1 keeps Python's lock, so that its other threads stand still, for less than the limit."""
    steps(rank)
    if rank == 1:
        ctypes.PyDLL(None).usleep(int(SILENCE / 2 * 1e6))
    time.sleep(0.3)


def dies(which: int, others: Callable[[int], None], how: signal.Signals) -> Callable[[int], None]:
    def body(rank: int) -> None:
        steps(rank)
        if rank == which:
            os.kill(os.getpid(), how)
        others(rank)

    return body


def hang(rank: int) -> None:
    """As in a collective of NCCL, whose other side is gone."""
    time.sleep(60)


def error_in_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("clip.mp4: no such\nfile")
    hang(rank)


def error_in_all(rank: int) -> None:
    raise ValueError("clip.mp4: no such file")


CASES: dict[str, Callable[[int], None]] = {
    "late end": late_end,
    "busy": busy,
    "killed, others in gloo": dies(2, steps, signal.SIGKILL),
    "killed, others hang": dies(1, hang, signal.SIGKILL),
    "first killed, others hang": dies(0, hang, signal.SIGKILL),
    "stopped, others hang": dies(2, hang, signal.SIGSTOP),
    "first stopped, others hang": dies(0, hang, signal.SIGSTOP),
    "error": error_in_1,
    "error in all": error_in_all,
}


def run_rank(body: Callable[[int], None], rank: int, output: Path) -> NoReturn:
    import torch

    from cmacc.pretraining.watch import watch

    file = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def end_process(text: str) -> NoReturn:
        os.write(2, f"lost: {text}\n".encode())
        os._exit(LOST)

    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        with watch(rank, RANKS, end_process, interval_seconds=INTERVAL, silence_seconds=SILENCE):
            body(rank)
    except ValueError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(2)
    torch.distributed.destroy_process_group()
    os._exit(0)


def run_case(body: Callable[[int], None], folder: Path) -> dict[str, Any]:
    """Fork the ranks, wait for their ends, and kill those that are still suspended when the others have ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    began = time.monotonic()
    pids = []
    for rank in range(RANKS):
        if (pid := os.fork()) == 0:
            run_rank(body, rank, folder / str(rank))
        pids.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < RANKS:
        assert time.monotonic() - began < 30
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            codes[pids.index(pid)] = -signal.SIGSTOP
        elif pid:
            codes[pids.index(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    seconds = time.monotonic() - began
    for rank in (rank for rank, code in codes.items() if code == -signal.SIGSTOP):
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    return {
        "codes": [codes[rank] for rank in range(RANKS)],
        "texts": [(folder / str(rank)).read_text() for rank in range(RANKS)],
        "seconds": seconds,
        "pids": pids,
    }


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, in ranks that are forked from one process: starting torch takes longer than a case."""
    folder = tmp_path_factory.mktemp("watch")
    environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("case", ["late end", "busy"])
def test_a_normal_end_is_silent(ends: dict[str, Any], case: str) -> None:
    assert ends[case]["codes"] == [0, 0, 0]
    assert ends[case]["texts"] == ["", "", ""]


@pytest.mark.parametrize(
    ("case", "lost", "code", "says"),
    [
        ("killed, others in gloo", 2, -signal.SIGKILL, "has not answered for 1 s"),
        ("killed, others hang", 1, -signal.SIGKILL, "has not answered for 2 s"),
        ("first killed, others hang", 0, -signal.SIGKILL, "is gone"),
        ("stopped, others hang", 2, -signal.SIGSTOP, "has not answered for 2 s"),
        ("first stopped, others hang", 0, -signal.SIGSTOP, "has not answered for 2 s"),
        ("error", 1, 2, "ended with an error: clip.mp4: no such file"),
    ],
)
def test_all_ranks_end_and_name_the_one_that_is_lost(
    ends: dict[str, Any], case: str, lost: int, code: int, says: str
) -> None:
    result = ends[case]
    assert result["codes"] == [code if rank == lost else LOST for rank in range(RANKS)]
    expected = f"lost: rank {lost} ({socket.gethostname()}, process {result['pids'][lost]}) {says}\n"
    assert [result["texts"][rank] for rank in range(RANKS) if rank != lost] == [expected] * 2
    # The share of 60 s at 30 s of silence, and some for a busy machine.
    assert result["seconds"] < 2 * SILENCE + 6


def test_an_error_that_all_ranks_find_is_told_as_it_is(ends: dict[str, Any]) -> None:
    result = ends["error in all"]
    assert result["codes"][0] == 2
    assert result["texts"][0] == "error: clip.mp4: no such file\n"
    assert set(result["codes"]) <= {2, LOST}


if __name__ == "__main__":
    import cmacc.pretraining.watch  # noqa: F401  # before the forks

    results = {}
    for name, case in CASES.items():
        place = Path(sys.argv[1]) / name
        place.mkdir()
        results[name] = run_case(case, place)
    print(json.dumps(results))
