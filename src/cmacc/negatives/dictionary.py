"""The active dictionary: a pool of recent keys, a selector, and the dictionary of negatives that it fills.

Three methods change it, and one reads it:

* ``select(queries, count)``: the selector picks ``count`` keys of the pool, which replace the oldest of the dictionary.
* ``refresh(keys)``: replaces the newest keys of the dictionary by newer encodings of the same samples.
* ``push(keys)``: adds the batch's keys to the pool, replacing its oldest.
* ``negatives()``: the current keys of the dictionary.

A training step encodes, calls ``select`` with the batch's queries, computes the loss against ``negatives()``, updates,
and calls ``push``. The batch's own keys enter the pool after the selection, so they cannot be its negatives in the same
step.
"""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cmacc.negatives.gradients import GradientName
from cmacc.negatives.queue import KeyQueue, Keys
from cmacc.negatives.selectors import Candidates, InitialCenters, SelectorName, build_selector
from cmacc.negatives.shards import Shards


class ActiveDictionary(nn.Module):
    """Actively selected negatives for one modality. All state is in persistent buffers.

    Parameters
    ----------
    key_size
        d, size of keys and queries.
    dictionary_size
        K, number of negatives once full.
    pool_size
        N, number of candidate keys once full.
    penultimate_size
        p, size of the key encoder's penultimate feature, the input of its last linear layer; needed by the gradients
        ``last_layer`` and ``feature``.
    temperature
        tau of the pseudo-posterior, usually that of the loss.
    selector
        ``active`` (the paper's method), ``newest`` (the plain queue), ``random`` or ``hardest``.
    gradient
        What the gradient is taken with respect to; see `cmacc.negatives.gradients`.
    initial_centers
        ``active`` only: ``dictionary`` counts the keys that stay in the dictionary as centers already chosen.
    allow_repeats
        Whether a sample may be chosen that is already in the dictionary, or is in the batch. If not, each sample is in
        the dictionary at most once, so that it takes at least K + M samples to fill and renew it. If the pool holds
        several keys of a sample, only the newest can be chosen.

    Raises
    ------
    ValueError
        A size or the temperature is not positive, a name is unknown, or ``penultimate_size`` is missing.

    Examples
    --------
    >>> from torch.nn.functional import normalize
    >>> dictionary = ActiveDictionary(8, dictionary_size=6, pool_size=20, gradient="key", temperature=0.1)
    >>> generator = torch.Generator().manual_seed(0)
    >>> for step in range(5):
    ...     queries, keys = normalize(torch.randn(2, 4, 8, generator=generator), dim=2)
    ...     chosen = dictionary.select(queries, count=4, generator=generator)
    ...     negatives = dictionary.negatives()
    ...     dictionary.push(Keys.from_embedding(keys, torch.arange(4) + 4 * step, step))
    >>> negatives.embedding.shape
    torch.Size([6, 8])
    """

    def __init__(
        self,
        key_size: int,
        dictionary_size: int,
        pool_size: int,
        *,
        penultimate_size: int = 0,
        temperature: float = 0.07,
        selector: SelectorName = "active",
        gradient: GradientName = "last_layer",
        initial_centers: InitialCenters = "none",
        allow_repeats: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"ActiveDictionary: temperature must be positive, got {temperature}")
        self.selector = build_selector(selector, temperature, gradient, initial_centers)
        self.allow_repeats = allow_repeats
        if selector in ("active", "hardest") and gradient != "key" and penultimate_size < 1:
            raise ValueError(
                f"ActiveDictionary: gradient {gradient!r} needs penultimate_size, the size of the feature that enters "
                f"the last linear layer, got {penultimate_size}; or use gradient='key'"
            )
        self.dictionary = KeyQueue(dictionary_size, key_size, penultimate_size)
        self.pool = KeyQueue(pool_size, key_size, penultimate_size)

    def negatives(self) -> Keys:
        """The keys of the dictionary, oldest first; fewer than K (none at first) until it is full."""
        return self.dictionary.keys()

    @torch.no_grad()
    def select(
        self,
        queries: Float[Tensor, "queries dim"],
        count: int,
        generator: torch.Generator | None = None,
        *,
        query_ids: Int[Tensor, " queries"] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> int:
        """Copy ``count`` keys of the pool into the dictionary, replacing its oldest; fewer if fewer are eligible.

        The chosen keys stay in the pool until newer ones replace them.

        Parameters
        ----------
        queries
            ``(M, d)``: the batch's queries, among which the candidates get their pseudo-labels.
        count
            Number of keys to choose; M in the paper.
        generator
            Source of randomness, on the CPU. With several processes, that of the first one is used.
        query_ids
            ``(M,)``: the batch's sample ids, which are not chosen unless ``allow_repeats`` is set.
        group
            Processes that select together. Each holds its own part of the pool and passes its own part of the batch;
            all get the same dictionary. If they push equal parts of every batch, and the pools hold whole batches, it
            is the dictionary of one process with the whole pool and batch. Handles are then only of use to a caller
            that knows which process has the input.

        Returns
        -------
        int
            Number of chosen keys: the newest ones of `negatives`.

        Raises
        ------
        ValueError
            ``count`` is not in 1..K.
        """
        if not 1 <= count <= self.dictionary.capacity:
            raise ValueError(
                f"ActiveDictionary.select: count must be in 1..{self.dictionary.capacity} (dictionary_size), "
                f"got {count}"
            )
        pool, pushed = self.pool.held()
        device = pool.embedding.device
        shards, order = _in_one_ring(self.pool, pool.steps, pushed, group)
        batch = Shards(len(queries), group, device)
        queries = batch.table(queries.to(pool.embedding.dtype))
        unbarred = torch.ones(len(pool), dtype=torch.bool, device=device)
        if not self.allow_repeats:
            unbarred = _newest_of_its_sample(pool.sample_ids, order, shards)
            if query_ids is not None:
                unbarred &= ~torch.isin(pool.sample_ids, batch.table(query_ids.to(device)))
        held = self.dictionary.keys()
        while True:
            staying = held[slice(max(0, len(held) + count - self.dictionary.capacity), None)]
            eligible = unbarred
            if not self.allow_repeats:
                eligible = unbarred & ~torch.isin(pool.sample_ids, staying.sample_ids)
            available = int(shards.each(eligible.sum()).sum())
            if available >= count:
                break
            count = available  # with fewer new keys, more old ones stay, which excludes more candidates
        picks = torch.zeros(0, dtype=torch.int64)
        if count > 0:
            candidates = Candidates(pool, order, eligible, shards, queries, staying)
            picks = self.selector.select(candidates, count, generator).cpu()
        chosen = Keys(*(shards.fetch(picks, value.__getitem__) for value in pool.fields()))
        self.dictionary.push(chosen)
        return count

    def refresh(self, keys: Keys) -> None:
        """Replace the newest ``len(keys)`` keys of the dictionary by newer encodings, in the order of `negatives`.

        Raises
        ------
        ValueError
            The keys are not of the same samples, or more than the dictionary holds.
        """
        self.dictionary.replace_newest(keys)

    def push(self, keys: Keys) -> None:
        """Add a batch's keys to the pool, replacing its oldest."""
        self.pool.push(keys)


def _newest_of_its_sample(
    sample_ids: Int[Tensor, " keys"], order: Int[Tensor, " keys"], shards: Shards
) -> Bool[Tensor, " keys"]:
    """Whether a key is the newest one of its sample, over all processes."""
    all_ids, all_orders = shards.table(sample_ids), shards.table(order)
    _, sample = all_ids.unique(return_inverse=True)
    newest = torch.full_like(all_orders, -1).scatter_reduce(0, sample, all_orders, "amax")
    return shards.own(newest[sample] == all_orders)


def _in_one_ring(
    pool: KeyQueue, steps: Int[Tensor, " keys"], pushed: Int[Tensor, " keys"], group: dist.ProcessGroup | None
) -> tuple[Shards, Int[Tensor, " keys"]]:
    """The places that the keys of all processes would have in the ring of one process, and when it had pushed them.

    Within a step, the keys of a process follow those of the process before it.
    """
    shards = Shards(len(steps), group, steps.device)
    if group is None:
        return shards, pushed
    ranks = shards.table(torch.full_like(steps, shards.rank))
    by_age = shards.table(pushed).argsort(stable=True)
    for values in (ranks, shards.table(steps)):
        by_age = by_age[values[by_age].argsort(stable=True)]
    age = torch.empty_like(by_age)
    age[by_age] = torch.arange(len(by_age), device=by_age.device)
    order = int(shards.each(pool.pushed).sum()) - shards.count + age
    # Until the ring is full, the oldest key is at its beginning.
    places = order % shards.count if shards.count == pool.capacity * shards.processes else age
    return Shards(len(steps), group, steps.device, shards.own(places)), shards.own(order)
