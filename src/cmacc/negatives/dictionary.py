"""The active dictionary: a pool of recent keys, a selector, and the dictionary of negatives that it fills.

It has two verbs that change it and one question:

* ``select(queries, count)``: the selector picks ``count`` keys of the pool; they replace the dictionary's oldest.
* ``push(keys)``: the pool takes in the batch's keys, over its oldest.
* ``negatives()``: what is in the dictionary now.

In a training step: encode, ``select`` with the batch's queries, compute the loss against ``negatives()``, update,
``push``. The batch's own keys enter the pool after the selection, so they cannot be its negatives in the same step.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.negatives.gradients import GradientName
from cmacc.negatives.queue import KeyQueue, Keys
from cmacc.negatives.selectors import SelectorName, build_selector


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
        p, size of the feature that enters the key encoder's last linear layer; needed by the gradients ``last_layer``
        and ``feature``.
    temperature
        tau of the pseudo-posterior, the loss's own as a rule.
    selector
        ``active`` (the method), or ``newest`` (the plain queue), ``random``, ``hardest``.
    gradient
        What the gradient is taken with respect to; see `cmacc.negatives.gradients`.

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
    ...     dictionary.select(queries, count=4, generator=generator)
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
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"ActiveDictionary: temperature must be positive, got {temperature}")
        self.selector = build_selector(selector, temperature, gradient)
        if selector in ("active", "hardest") and gradient != "key" and penultimate_size < 1:
            raise ValueError(
                f"ActiveDictionary: gradient {gradient!r} needs penultimate_size, the size of the feature that enters "
                f"the last linear layer, got {penultimate_size}; or use gradient='key'"
            )
        self.dictionary = KeyQueue(dictionary_size, key_size, penultimate_size)
        self.pool = KeyQueue(pool_size, key_size, penultimate_size)

    def negatives(self) -> Keys:
        """The dictionary's keys, oldest first; fewer than K (at first none) until it has filled."""
        return self.dictionary.keys()

    @torch.no_grad()
    def select(
        self, queries: Float[Tensor, "queries dim"], count: int, generator: torch.Generator | None = None
    ) -> None:
        """Copy ``count`` keys of the pool (all, while it holds fewer) into the dictionary, over its oldest.

        They stay in the pool until they are its oldest, so a key can be chosen again.

        Parameters
        ----------
        queries
            ``(M, d)``: the batch's queries that the candidates' pseudo-labels are about.
        count
            How many; M in the paper. More than the dictionary's size is a mistake.
        generator
            Source of randomness, on the CPU.

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
        pool = self.pool.keys()
        if len(pool) == 0:
            return
        picks = self.selector.select(pool, queries.to(pool.embedding.dtype), min(count, len(pool)), generator)
        self.dictionary.push(pool[picks])

    def push(self, keys: Keys) -> None:
        """Take a batch's keys into the pool, over its oldest."""
        self.pool.push(keys)
