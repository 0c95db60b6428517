"""A process that saves checkpoints without a pause, killed again and again; run by `test_checkpoint.py`.

    python tests/pretraining/killed_savings.py RUN_DIR

It is a program of its own because it forks, which is safe only where nothing has started threads. Torch is loaded once.
Prints a JSON object for each kill: ``finished``, the newest step whose saving had returned; ``left``, what lay half
done; ``loaded``, the step of the checkpoint that a resumed run loads.
"""

import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

from cmacc.pretraining.checkpoint import load_checkpoint, save_checkpoint
from cmacc.pretraining.checkpoint_files import whole_checkpoint

_KILLS = 20
# By its path: pytest, which looks for doctests here, does not import it as this program would.
trainer = runpy.run_path(str(Path(__file__).with_name("stored_checkpoints.py")))["trainer"]


def _save_for_ever(run_dir: Path, step: int, report: int) -> None:
    learner = trainer().learner
    while True:
        step += 1
        for _ in range(2):  # the second one replaces the first
            save_checkpoint(learner, run_dir, step, 0)
            os.write(report, f"{step}\n".encode())


def main(run_dir: Path) -> None:
    rng = random.Random(0)
    finished = 0
    for _ in range(_KILLS):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _save_for_ever(run_dir, finished, writing)
        os.close(writing)
        with open(reading, "rb") as report:
            first = report.readline()  # so that it is killed while it saves, not while it starts
            time.sleep(rng.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            finished = int((first + report.read()).split()[-1])
        left = sorted(path.name for path in (run_dir / "checkpoints").glob(".step-*"))
        folder = whole_checkpoint(run_dir)
        loaded = None if folder is None else load_checkpoint(trainer().learner, folder).step
        print(json.dumps({"finished": finished, "left": left, "loaded": loaded}), flush=True)
        finished = loaded or finished


if __name__ == "__main__":
    main(Path(sys.argv[1]))
