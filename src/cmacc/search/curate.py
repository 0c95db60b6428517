"""Select samples of an index to label or to keep: a diverse subset, by the seeding engine.

A sample's row is the unit mean vector of its windows, of picture and sound side by side; a modality that it lacks is
zero. k-means++ seeding (`cmacc.negatives.select_diverse`) takes each next sample with probability proportional to the
squared distance to the nearest one taken before, or labelled before.
"""

from collections.abc import Collection
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from cmacc.encoders import MODALITIES
from cmacc.negatives import Keys, gradient_factors, select_diverse
from cmacc.search.samples import Samples
from cmacc.search.table import SearchError

By = Literal["distance", "gradient"]
_QUERIES = 128
_TEMPERATURE = 0.1


def select_samples(
    samples: Samples, count: int, *, given: Collection[int] = (), by: By = "distance", seed: int = 0
) -> list[int]:
    """Choose samples that differ from each other and from those given.

    Parameters
    ----------
    samples
        All samples of an index.
    count
        Number of samples to choose.
    given
        Samples that are labelled already. They count as chosen before, and are not chosen again.
    seed
        Seed of the draws; the same seed gives the same samples.

    Returns
    -------
    Their numbers in the order of choosing, so that the first ones are a smaller subset of the same kind.

    Raises
    ------
    SearchError
        There are fewer samples than that.
    """
    open_ = np.setdiff1d(np.arange(len(samples)), list(given))
    if not 1 <= count <= len(open_):
        without = f" without the {len(samples) - len(open_)} given" if len(given) else ""
        raise SearchError(f"--count: must be in 1..{len(open_)}, the samples of the index{without}, got {count}")
    points = sample_rows(samples) if by == "distance" else gradient_rows(samples, seed)
    picks = select_diverse(
        points[open_],
        count,
        initial_centers=points[sorted(given)] if len(given) else None,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    return [int(number) for number in open_[picks.numpy()]]


def sample_rows(samples: Samples) -> Float[np.ndarray, "samples dims"]:
    """The mean vectors of both modalities side by side."""
    return np.concatenate([samples.means(modality) for modality in MODALITIES], axis=1)


def gradient_rows(samples: Samples, seed: int) -> Float[np.ndarray, "samples dims"]:
    means = {modality: torch.from_numpy(samples.means(modality)) for modality in MODALITIES}
    drawn = torch.Generator().manual_seed(seed)
    rows = []
    for modality, other in (("video", "audio"), ("audio", "video")):
        present = torch.from_numpy(samples.has(other)).nonzero()[:, 0]
        queries = means[other][present[torch.randperm(len(present), generator=drawn)[:_QUERIES]]]
        keys = Keys.from_embedding(means[modality], torch.arange(len(samples)), 0)
        factors = gradient_factors(keys, queries, _TEMPERATURE, "key").left
        rows.append(factors * torch.from_numpy(samples.has(modality))[:, None])
    return torch.cat(rows, dim=1).numpy()
