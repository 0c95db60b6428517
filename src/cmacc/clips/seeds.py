"""Randomness by name: every random choice has its own generator, seeded by what the choice is about.

A sample's window and augmentation depend on (seed, visit, sample id, purpose) alone, so they are the same whatever the
number of workers, the batch that the sample falls in, or the step at which a run was resumed.
"""

import numpy as np

# One number a purpose, so that two choices about one sample never share random numbers.
WINDOW, AUGMENTATION, ORDER, SUBSTITUTE, SELECTION, BATCHES = range(6)


def seeded_rng(purpose: int, *identity: int) -> np.random.Generator:
    """A generator for one purpose and one identity, such as ``(seed, visit, sample_id)``; all must be >= 0."""
    return np.random.default_rng([purpose, *identity])
