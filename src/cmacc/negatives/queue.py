"""A ring buffer of keys: first in, first out, with the sample and the step that each key comes from."""

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
    handles
        ``(n,)`` int64: what `InputBuffer.push` gave for the key's input; -1 where inputs are not kept.

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
    handles: Int[Tensor, " keys"]

    def __post_init__(self) -> None:
        for field, value in zip(dataclasses.fields(self), self.fields(), strict=True):
            name, axes = field.name, 2 if field.name in ("embedding", "penultimate") else 1
            # A single row would otherwise be broadcast over the others without a word.
            if value.ndim != axes or len(value) != len(self.embedding):
                raise ValueError(
                    f"Keys: {name} must have {axes} axes and as many rows as embedding, {tuple(self.embedding.shape)}, "
                    f"got {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, indices: Int[Tensor, " picks"] | slice) -> "Keys":
        return Keys(*(value[indices] for value in self.fields()))

    def fields(self) -> list[Tensor]:
        """The tensors, in the order of the attributes."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @classmethod
    def from_embedding(
        cls,
        embedding: Tensor,
        sample_ids: Tensor,
        step: int,
        *,
        length: Tensor | None = None,
        penultimate: Tensor | None = None,
        handles: Tensor | None = None,
    ) -> "Keys":
        """Keys of one step; without ``penultimate`` they serve every gradient but ``last_layer`` and ``feature``."""
        return cls(
            embedding=embedding,
            length=length if length is not None else embedding.new_ones(len(embedding)),
            penultimate=penultimate if penultimate is not None else embedding.new_empty(len(embedding), 0),
            sample_ids=sample_ids,
            steps=torch.full_like(sample_ids, step),
            handles=handles if handles is not None else torch.full_like(sample_ids, -1),
        )


class KeyQueue(nn.Module):
    """A ring buffer of at most ``capacity`` keys, in persistent buffers, so that a state dict holds the queue.

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
    handles: Tensor
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
        self.register_buffer("handles", torch.full((capacity,), -1, dtype=torch.int64))
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
        self._check_sizes("push", keys)
        start = int(self.pushed)
        self.pushed += len(keys)
        if len(keys) > self.capacity:
            start += len(keys) - self.capacity
            keys = keys[slice(len(keys) - self.capacity, None)]
        self._write(start, keys)

    @torch.no_grad()
    def replace_newest(self, keys: Keys) -> None:
        """Write keys over the newest ``len(keys)``, the oldest of them first.

        Raises
        ------
        ValueError
            The keys' sizes are not the queue's, they are more than it holds, or not of the samples that stand there.
        """
        self._check_sizes("replace_newest", keys)
        start = int(self.pushed) - len(keys)
        if len(keys) > len(self):
            raise ValueError(f"KeyQueue.replace_newest: keys must be at most the {len(self)} held, got {len(keys)}")
        places = self._places(start, len(keys))
        if not torch.equal(self.sample_ids[places], keys.sample_ids.to(places.device)):
            raise ValueError("KeyQueue.replace_newest: keys must be of the samples that they replace, got others")
        self._write(start, keys)

    def keys(self) -> Keys:
        """The held keys, oldest first. Always a copy: a push before the backward must not change the negatives."""
        pushed = int(self.pushed)
        oldest = max(0, pushed - self.capacity)
        places = self._places(oldest, pushed - oldest)
        return Keys(*(getattr(self, field.name)[places] for field in dataclasses.fields(Keys)))

    def held(self) -> tuple[Keys, Int[Tensor, " keys"]]:
        """The held keys as they lie in the ring, not copied (the next push changes them), and when each was pushed.

        Returns
        -------
        Keys
            ``n`` keys, in no particular order.
        Tensor
            ``(n,)`` int64: how many keys had been pushed before each, so that a greater number is newer.
        """
        pushed = int(self.pushed)
        count = min(pushed, self.capacity)
        places = torch.arange(count, device=self.embedding.device)
        # The next push would write to place `pushed % capacity`; the places before it hold the newest.
        return (
            Keys(*(getattr(self, field.name)[:count] for field in dataclasses.fields(Keys))),
            pushed - 1 - (pushed - 1 - places) % self.capacity,
        )

    def _places(self, start: int, count: int) -> Int[Tensor, " keys"]:
        return (start + torch.arange(count, device=self.embedding.device)) % self.capacity

    def _write(self, start: int, keys: Keys) -> None:
        places = self._places(start, len(keys))
        for field, value in zip(dataclasses.fields(keys), keys.fields(), strict=True):
            buffer = getattr(self, field.name)
            buffer[places] = value.to(buffer)

    def _check_sizes(self, verb: str, keys: Keys) -> None:
        for name in ("embedding", "penultimate"):
            want, got = getattr(self, name).shape[1], getattr(keys, name).shape[1]
            if want != got:
                raise ValueError(f"KeyQueue.{verb}: {name} must have {want} columns, got {got}")
