"""Seeded random generators: every random choice has its own generator, seeded by its purpose and identity.

The window and augmentation of a sample depend only on (seed, visit, sample id, purpose). So they do not depend on the
number of workers, the batch of the sample, or the step at which a run was resumed.
"""

import numpy as np

# One number per purpose, so that two choices for one sample never share random numbers.
WINDOW, AUGMENTATION, ORDER, SUBSTITUTE, SELECTION, BATCHES, DROPOUT, EVALUATION, OBJECTIVE = range(9)


def seeded_rng(purpose: int, *identity: int) -> np.random.Generator:
    """Create the generator for a purpose and an identity, such as ``(seed, visit, sample_id)``; all must be >= 0."""
    return np.random.default_rng([purpose, *identity])
