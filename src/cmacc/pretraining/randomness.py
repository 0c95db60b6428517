"""Seed what draws from torch's global generators, such as dropout and new layers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cmacc.clips.seeds import seeded_rng


@contextmanager
def seeded_generators(device: torch.device, *identity: int) -> Iterator[None]:
    """Seed the global torch generators of the CPU and of ``device``, and restore them afterwards."""
    seed = int(seeded_rng(*identity).integers(2**63))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: it would also seed the other GPUs, which are not restored.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
