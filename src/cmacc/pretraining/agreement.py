"""Check that all processes hold the same: after the start no weight is sent, so a difference would stay, and grow."""

import hashlib

from cmacc.encoders.training import hash_tensors
from cmacc.pretraining.clip_stream import RunError
from cmacc.pretraining.learner import Learner


def check_ranks(learner: Learner, step: int) -> None:
    """Compare weights, statistics and dictionaries of all processes, bit by bit; a collective.

    It hashes every tensor on the CPU, which takes about a second for a gigabyte.

    Raises
    ------
    RunError
        A module differs; raised on all processes.
    """
    if learner.processes.count == 1:
        return
    own = {name: _digest(learner, name) for name in learner.modules()}
    digests = learner.processes.objects(own)
    for name, digest in digests[0].items():
        others = [rank for rank, theirs in enumerate(digests) if theirs[name] != digest]
        if others:
            raise RunError(
                f"step {step}: {name} must be the same on all processes, but differs on rank "
                f"{', '.join(map(str, others))} from rank 0; this is a fault of the machine, the objective or cmacc: "
                "resume from the last checkpoint, and run `cmacc verify` on this machine"
            )


def _digest(learner: Learner, name: str) -> str:
    # Each process has its own part of the pools.
    state = {key: value for key, value in learner.modules()[name].state_dict().items() if not key.startswith("pool.")}
    digest = hashlib.sha256()
    hash_tensors(digest, state)
    return digest.hexdigest()
