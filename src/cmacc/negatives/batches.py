"""Active batches: which samples to train on together. The samples of a batch are each other's negatives.

These negatives are fresh, have gradient and, unlike the keys of a dictionary, need no additional encoding. Only the
order of an epoch changes, by the samples' embeddings at their last visit (Xu et al., VideoCLIP, 2021; Thirukovalluru et
al., B3, 2025, arXiv:2505.11293):

1. The similarity of two samples is s(i, j) = (v_i.a_j + a_i.v_j) / 2, the mean of the two logits that they would add to
   each other's losses. Of the nearest neighbours of a sample, the first ``skip_nearest`` are excluded as likely copies
   and false negatives, and the next ``neighbours`` are kept.
2. Samples are visited in random order. A sample that is still free forms a group with its nearest free neighbours, as
   long as they are mutual (it is also among their neighbours), up to ``group_size`` samples.
3. Samples without a full group are grouped in the order of their visit. Groups are shuffled and dealt to batches.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

_PRODUCTS_AT_A_TIME = 1 << 24  # bounds the memory of the neighbour search, and stays near a CPU's cache


def active_batches(
    video: Float[Tensor, "samples dim"],
    audio: Float[Tensor, "samples dim"],
    batch_size: int,
    rng: np.random.Generator,
    *,
    group_size: int | None = None,
    neighbours: int | None = None,
    skip_nearest: int = 0,
    active_share: float = 1.0,
    known: Bool[Tensor, " samples"] | None = None,
) -> Int[Tensor, "batches batch"]:
    """Compute batches of samples that are hard to distinguish. Every sample is in one batch at most.

    Parameters
    ----------
    video, audio
        ``(n, d)`` L2-normalised embeddings of each sample, of any float type, usually those of its last visit.
    batch_size
        M.
    rng
        Source of randomness; the same state gives the same batches.
    group_size
        g in 2..M: number of hard samples in a group; a batch holds several groups. Default: M.
    neighbours
        Number of nearest neighbours of a sample that may join its group. Default: twice ``group_size``.
    skip_nearest
        Number of the very nearest neighbours that are excluded.
    active_share
        Share of every batch that consists of groups, in [0, 1]. The rest are random samples.
    known
        ``(n,)``: which samples have embeddings. The others are placed at random. Default: all.

    Returns
    -------
    Tensor
        ``(n // M, M)`` int64 rows of the tables, on the CPU. The n % M excluded samples are random.

    Raises
    ------
    ValueError
        Sizes do not fit, or a setting is out of range.

    Notes
    -----
    The search is exact: n^2 d products. It takes about a second for 8,192 samples of 64 numbers on one core, and hours
    for a million.

    Examples
    --------
    >>> places = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=0)
    >>> rows = torch.nn.functional.normalize(places, dim=1)  # 0 and 1 are equal, 2 and 3...
    >>> batches = active_batches(rows, rows, 4, np.random.default_rng(0), group_size=2)
    >>> batches[0].reshape(2, 2).sort(dim=1).values.diff(dim=1).flatten().tolist()
    [1, 1]
    """
    count = len(video)
    group_size = batch_size if group_size is None else group_size
    neighbours = 2 * group_size if neighbours is None else neighbours
    for name, value, least, most in (
        ("batch_size", batch_size, 2, count),
        ("group_size", group_size, 2, batch_size),
        ("neighbours", neighbours, 1, None),
        ("skip_nearest", skip_nearest, 0, None),
        ("active_share", active_share, 0, 1),
    ):
        if not (value >= least and (most is None or value <= most)):
            upper = "" if most is None else f" and at most {most}"
            raise ValueError(f"active_batches: {name} must be at least {least}{upper}, got {value}")
    if video.shape != audio.shape or (known is not None and known.shape != (count,)):
        raise ValueError(
            f"active_batches: audio and known must have as many rows as video ({count}), got {tuple(audio.shape)}"
            + ("" if known is None else f" and {tuple(known.shape)}")
        )
    batches = count // batch_size
    groups_per_batch = int(active_share * batch_size / group_size)
    # Draw the excluded samples first: what remains at the end would always be the samples without near neighbours.
    order = rng.permutation(count)[: batches * batch_size]
    usable = np.ones(count, bool) if known is None else known.cpu().numpy()
    groups = _groups(video, audio, order[usable[order]], group_size, neighbours, skip_nearest, rng)
    groups = groups[: batches * groups_per_batch]
    rng.shuffle(groups)
    rest = order[~np.isin(order, groups)]
    laid = np.empty((batches, batch_size), np.int64)
    # Deal the groups evenly: if there are too few for all batches, every batch still has about as many.
    per_batch = np.full(batches, len(groups) // batches)
    per_batch[: len(groups) % batches] += 1
    taken_groups = taken_rest = 0
    for place, own in enumerate(per_batch):
        members = groups[taken_groups : taken_groups + own].reshape(-1)
        missing = batch_size - len(members)
        laid[place] = np.concatenate([members, rest[taken_rest : taken_rest + missing]])
        taken_groups, taken_rest = taken_groups + own, taken_rest + missing
    rng.shuffle(laid)
    return torch.from_numpy(laid)


def _groups(
    video: Tensor,
    audio: Tensor,
    order: NDArray[np.int64],
    size: int,
    neighbours: int,
    skip: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Full groups ``(count, size)`` of the rows in ``order``, groups of neighbours first."""
    if len(order) < size:
        return np.empty((0, size), np.int64)
    near = _mutual(_nearest(video[order], audio[order], skip, neighbours))
    free = np.ones(len(order), bool)
    members: list[NDArray[np.int64]] = []
    loose: list[int] = []
    for seed in range(len(order)):
        if not free[seed]:
            continue
        own = near[seed]
        own = own[(own >= 0) & free[own]][: size - 1]
        if len(own) < size - 1:
            loose.append(seed)
            continue
        free[seed] = False
        free[own] = False
        members.append(np.concatenate([[seed], own]))
    rng.shuffle(members)
    left = [seed for seed in loose if free[seed]]
    together = np.array(left[: len(left) // size * size], np.int64).reshape(-1, size)
    found: NDArray[np.int64] = order[np.concatenate([np.array(members, np.int64).reshape(-1, size), together])]
    return found


def _nearest(video: Tensor, audio: Tensor, skip: int, neighbours: int) -> NDArray[np.int64]:
    """``(n, up to neighbours)``: the nearest neighbours of each row, nearest first, without the first ``skip``."""
    count = len(video)
    most = min(skip + neighbours, count - 1)
    left = torch.cat([video, audio], dim=1).float()
    right = torch.cat([audio, video], dim=1).float()
    found = []
    for rows in torch.arange(count, device=left.device).split(max(1, _PRODUCTS_AT_A_TIME // count)):
        likeness = left[rows] @ right.T
        likeness[torch.arange(len(rows)), rows] = -torch.inf
        found.append(likeness.topk(most).indices[:, min(skip, most) :])
    nearest: NDArray[np.int64] = torch.cat(found).cpu().numpy()
    return nearest


def _mutual(near: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same, with -1 instead of neighbours that do not have the row among their own neighbours."""
    count = len(near)
    rows = np.arange(count)[:, None]
    mutual: NDArray[np.int64] = np.where(np.isin(rows * count + near, near * count + rows), near, -1)
    return mutual
