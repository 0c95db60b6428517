"""A ring buffer of keys (first in, first out), with the sample and the step of each key."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Keys:
    """n keys, with everything that selection needs.

    Attributes
    ----------
    embedding
        ``(n, d)``, L2-normalised.
    length
        ``(n,)``: norm of the embedding before normalisation.
    penultimate
        ``(n, p)``: input of the encoder's last linear layer; p is 0 if no selector needs it.
    sample_ids
        ``(n,)`` int64: the sample of each key.
    steps
        ``(n,)`` int64: the training step at which it was encoded.
    handles
        ``(n,)`` int64: handle of the key's input, from `InputBuffer.push`; -1 if inputs are not kept.

    Raises
    ------
    ValueError
        A field has the wrong number of axes or rows.
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
            # A single row would be broadcast over the others without an error.
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
        """Keys of one step. Without ``penultimate``, the gradients ``last_layer`` and ``feature`` are not available."""
        return cls(
            embedding=embedding,
            length=length if length is not None else embedding.new_ones(len(embedding)),
            penultimate=penultimate if penultimate is not None else embedding.new_empty(len(embedding), 0),
            sample_ids=sample_ids,
            steps=torch.full_like(sample_ids, step),
            handles=handles if handles is not None else torch.full_like(sample_ids, -1),
        )


class KeyQueue(nn.Module):
    """A ring buffer of at most ``capacity`` keys, in persistent buffers, so that it is part of the state dict.

    Parameters
    ----------
    capacity
        Maximum number of keys.
    key_size
        d, size of the embeddings.
    penultimate_size
        p, size of the penultimate features, or 0.

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
    >>> queue.keys().sample_ids  # oldest first; the first key was overwritten
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
        # Keys pushed since the beginning. Reading it synchronises with a GPU: once per push, and once in `keys`.
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.pushed), self.capacity)

    @torch.no_grad()
    def push(self, keys: Keys) -> None:
        """Overwrite the oldest keys. If there are more keys than ``capacity``, only the last ``capacity`` are kept.

        Raises
        ------
        ValueError
            The sizes of the keys are not those of the queue.
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
        """Overwrite the newest ``len(keys)`` keys, the oldest of them first.

        Raises
        ------
        ValueError
            The sizes of the keys are not those of the queue, there are more keys than it holds, or they are not of the
            same samples as the keys that they replace.
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
        """A copy of the keys, oldest first. It is a copy because a push before the backward pass must not change it."""
        pushed = int(self.pushed)
        oldest = max(0, pushed - self.capacity)
        places = self._places(oldest, pushed - oldest)
        return Keys(*(getattr(self, field.name)[places] for field in dataclasses.fields(Keys)))

    def held(self) -> tuple[Keys, Int[Tensor, " keys"]]:
        """A view of the keys in ring order, and when each was pushed. The next push changes the view.

        Returns
        -------
        Keys
            ``n`` keys, in no particular order.
        Tensor
            ``(n,)`` int64: number of keys pushed before each key, so that a larger number is newer.
        """
        pushed = int(self.pushed)
        count = min(pushed, self.capacity)
        places = torch.arange(count, device=self.embedding.device)
        # The next push writes to place `pushed % capacity`; the places before it hold the newest keys.
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
