"""Select samples of an index to label or to keep: a diverse subset, by the seeding engine.

A sample's row is the mean vector of its windows, of unit length, of video and audio side by side; a modality that it
lacks is zero. k-means++ seeding (`cmacc.negatives.select_diverse`) takes each next sample with probability proportional
to the squared distance to the nearest one that was taken before, or is labelled already.

Gradient embeddings of the cross-modal contrast as rows, as in the active dictionary, measured no better
(benchmarks/curate.py), and samples without both modalities have none.
"""

from collections.abc import Collection

import numpy as np
import torch

from cmacc.encoders import MODALITIES
from cmacc.negatives import select_diverse
from cmacc.search.samples import Samples
from cmacc.search.table import SearchError


def select_samples(samples: Samples, count: int, *, given: Collection[int] = (), seed: int = 0) -> list[int]:
    """Choose samples that differ from each other and from those given.

    Parameters
    ----------
    samples
        All samples of an index.
    count
        Number of samples to choose.
    given
        Numbers of samples that are labelled already. They count as chosen before, and are not chosen again.
    seed
        Seed of the draws; the same seed gives the same samples.

    Returns
    -------
    Their numbers in the order of choosing: the first n of them are what a count of n is meant to give.

    Raises
    ------
    SearchError
        There are fewer samples than that.
    """
    rows = np.concatenate([samples.means(modality) for modality in MODALITIES], axis=1)
    candidates = np.setdiff1d(np.arange(len(samples)), list(given))
    if not 1 <= count <= len(candidates):
        without = f" without the {len(given)} given" if given else ""
        raise SearchError(f"--count: must be in 1..{len(candidates)}, the samples of the index{without}, got {count}")
    picks = select_diverse(
        rows[candidates],
        count,
        initial_centers=rows[sorted(given)] if given else None,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    return [int(number) for number in candidates[picks.numpy()]]
