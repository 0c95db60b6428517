"""A run that is killed again and again and resumed, beside one that is not; run by `test_scale_runs.py`.

    python tests/pretraining/killed_runs.py WHOLE KILLED

Both are run folders from `start_run`. It is a program of its own because it forks, which is safe only where nothing has
started threads. What takes long to import is imported once. Prints a JSON object for each kill: ``where`` it was aimed
at, ``steps`` that this start of the run had finished, and what lay half done in ``checkpoints/``.
"""

import json
import os
import random
import signal
import statistics
import sys
import time
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch

from cmacc.pretraining import pretrain, read_config
from cmacc.pretraining.checkpoint_files import checkpoint_folders, step_of

# pyarrow imports the one, if it is there, when a manifest is read, and torch the other for the first optimizer.
for module in ("pandas", "torch._dynamo"):
    with suppress(ImportError):
        import_module(module)

_KILLS = 20
_AIMS = ("start", "steps", "saving", "steps", "saving or after")
# So near its end, the run might end before it is killed: from there on it is killed at its start.
_LAST_STEPS = 6


class _Child:
    """A process that trains a run to its end, and reports every step."""

    def __init__(self, run_dir: Path) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            try:
                finished = pretrain(run_dir, on_step=lambda *_: _report(writing)).finished
            except BaseException:
                sys.excepthook(*sys.exc_info())
                finished = False
            os._exit(0 if finished else 1)
        os.close(writing)
        self._reports = reading

    def step(self) -> bool:
        """Wait for a step; false at the end of the run."""
        return os.read(self._reports, 1) != b""

    def wait(self) -> int:
        """The exit code, or less than 0: the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _report(pipe: int) -> None:
    os.write(pipe, b".")


def _half_done(run_dir: Path) -> dict[int, str]:
    """What is being written or deleted, or was when the run was killed: names by inode, which are new each time."""
    try:
        with os.scandir(run_dir / "checkpoints") as entries:
            return {entry.inode(): entry.name for entry in entries if entry.name.startswith(".")}
    except FileNotFoundError:
        return {}


def _uninterrupted(run_dir: Path) -> tuple[float, float]:
    """Seconds until the first step, and of a step."""
    times = [time.monotonic()]
    child = _Child(run_dir)
    while child.step():
        times.append(time.monotonic())
    assert child.wait() == 0
    seconds = [after - before for before, after in pairwise(times)]
    return seconds[0], statistics.median(seconds[1:])


def main(whole: Path, killed: Path) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    steps_of_run = read_config(killed / "config.yaml").optim.steps
    start_seconds, step_seconds = _uninterrupted(whole)
    for number in range(_KILLS):
        saved = max(map(step_of, checkpoint_folders(killed)), default=0)
        where = _AIMS[number % len(_AIMS)] if saved < steps_of_run - _LAST_STEPS else "start"
        before = _half_done(killed)
        child = _Child(killed)
        steps = 0
        if where == "start":
            time.sleep(rng.uniform(0, start_seconds))
        elif where == "steps":
            steps = sum(child.step() for _ in range(rng.randint(1, 2)))
            time.sleep(rng.uniform(0, step_seconds))
        else:
            while not _half_done(killed).keys() - before.keys():
                time.sleep(0.001)
            # On a fast disk, most of half a step is after the saving.
            time.sleep(0 if where == "saving" else rng.uniform(0, step_seconds / 2))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "the run ended before it was killed as often as it was to be"
        while child.step():
            steps += 1
        half_done = [name for inode, name in _half_done(killed).items() if inode not in before]
        print(json.dumps({"where": where, "steps": steps, "half_done": half_done}), flush=True)
    assert _Child(killed).wait() == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
