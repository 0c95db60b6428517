"""A ring of keys: first in, first out, with the sample and the step that each key comes from."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Keys:
    """n keys and what selection needs to know of them.

    Attributes
    ----------
    embedding
        ``(n, d)``, of length one.
    length
        ``(n,)``: the embedding's length before it was normalised.
    penultimate
        ``(n, p)``: what entered the encoder's last linear layer; p is 0 where no selector asks for it.
    sample_ids
        ``(n,)`` int64: which sample each key is of.
    steps
        ``(n,)`` int64: at which training step it was encoded.

    Raises
    ------
    ValueError
        A field has another number of axes, or of rows, than this.
    """

    embedding: Float[Tensor, "keys dim"]
    length: Float[Tensor, " keys"]
    penultimate: Float[Tensor, "keys penultimate"]
    sample_ids: Int[Tensor, " keys"]
    steps: Int[Tensor, " keys"]

    def __post_init__(self) -> None:
        for name, axes in (("embedding", 2), ("length", 1), ("penultimate", 2), ("sample_ids", 1), ("steps", 1)):
            value: Tensor = getattr(self, name)
            # A single row would otherwise be broadcast over the others without a word.
            if value.ndim != axes or len(value) != len(self.embedding):
                raise ValueError(
                    f"Keys: {name} must have {axes} axes and as many rows as embedding, {tuple(self.embedding.shape)}, "
                    f"got {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, indices: Int[Tensor, " picks"] | slice) -> "Keys":
        return Keys(*(getattr(self, field.name)[indices] for field in dataclasses.fields(self)))

    @classmethod
    def from_embedding(
        cls,
        embedding: Tensor,
        sample_ids: Tensor,
        step: int,
        *,
        length: Tensor | None = None,
        penultimate: Tensor | None = None,
    ) -> "Keys":
        """Keys of one step; without ``penultimate`` they serve every gradient but ``last_layer`` and ``feature``."""
        return cls(
            embedding=embedding,
            length=length if length is not None else embedding.new_ones(len(embedding)),
            penultimate=penultimate if penultimate is not None else embedding.new_empty(len(embedding), 0),
            sample_ids=sample_ids,
            steps=torch.full_like(sample_ids, step),
        )


class KeyQueue(nn.Module):
    """A ring of at most ``capacity`` keys, all of it in persistent buffers, so that a state dict holds the queue.

    Parameters
    ----------
    capacity
        Most keys held.
    key_size
        d.
    penultimate_size
        p, or 0.

    Raises
    ------
    ValueError
        A size is too small.

    Examples
    --------
    >>> queue = KeyQueue(capacity=3, key_size=2)
    >>> for step in range(2):
    ...     ids = torch.tensor([2 * step, 2 * step + 1])
    ...     queue.push(Keys.from_embedding(torch.ones(2, 2), ids, step))
    >>> queue.keys().sample_ids  # oldest first; the very first key has made room
    tensor([1, 2, 3])
    """

    embedding: Tensor
    length: Tensor
    penultimate: Tensor
    sample_ids: Tensor
    steps: Tensor
    pushed: Tensor

    def __init__(self, capacity: int, key_size: int, penultimate_size: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("capacity", capacity, 1),
            ("key_size", key_size, 1),
            ("penultimate_size", penultimate_size, 0),
        ):
            if value < least:
                raise ValueError(f"KeyQueue: {name} must be at least {least}, got {value}")
        self.capacity = capacity
        self.register_buffer("embedding", torch.zeros(capacity, key_size))
        self.register_buffer("length", torch.zeros(capacity))
        self.register_buffer("penultimate", torch.zeros(capacity, penultimate_size))
        self.register_buffer("sample_ids", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("steps", torch.full((capacity,), -1, dtype=torch.int64))
        # Keys pushed since the beginning. Reading it waits for a GPU, once a push and once for `keys`.
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.pushed), self.capacity)

    @torch.no_grad()
    def push(self, keys: Keys) -> None:
        """Write keys over the oldest ones. Of more keys than ``capacity`` the last ``capacity`` stay.

        Raises
        ------
        ValueError
            The keys' sizes are not the queue's.
        """
        for name in ("embedding", "penultimate"):
            want, got = getattr(self, name).shape[1], getattr(keys, name).shape[1]
            if want != got:
                raise ValueError(f"KeyQueue.push: {name} must have {want} columns, got {got}")
        start = int(self.pushed)
        self.pushed += len(keys)
        if len(keys) > self.capacity:
            start += len(keys) - self.capacity
            keys = keys[slice(len(keys) - self.capacity, None)]
        places = (start + torch.arange(len(keys), device=self.embedding.device)) % self.capacity
        for field in dataclasses.fields(Keys):
            buffer = getattr(self, field.name)
            buffer[places] = getattr(keys, field.name).to(buffer)

    def keys(self) -> Keys:
        """The held keys, oldest first. Always a copy: a push before the backward must not change the negatives."""
        pushed = int(self.pushed)
        oldest = max(0, pushed - self.capacity)
        places = torch.arange(oldest, pushed, device=self.embedding.device) % self.capacity
        return Keys(*(getattr(self, field.name)[places] for field in dataclasses.fields(Keys)))
