"""A buffer of the samples' compact inputs, so that chosen keys can be re-encoded with the current key encoder.

It holds the tensors that the caller needs for this: uint8 frames and half-precision waveforms, not the float tensors
that enter an encoder. `InputBuffer.byte_count` is its size; at the paper's size (N = 38,400 clips of 16 x 112 x 112
frames and 2 s of audio at 16 kHz) 25.6 GB. The buffer is not part of a state dict: it only holds inputs of the last
batches, and a resumed run reads them again.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class InputBuffer:
    """The inputs of the last ``capacity`` samples pushed.

    Parameters
    ----------
    capacity
        Maximum number of samples.
    device
        Where they are held: the host or the accelerator.
    first_handle
        Handle of the first sample; above 0 if the buffer continues after samples it never saw (a resumed run).

    Raises
    ------
    ValueError
        ``capacity`` is not positive.

    Examples
    --------
    >>> buffer = InputBuffer(capacity=3, device=torch.device("cpu"))
    >>> handles = buffer.push({"frames": torch.arange(4, dtype=torch.uint8)[:, None]})
    >>> handles, buffer.has(handles)
    (tensor([0, 1, 2, 3]), tensor([False,  True,  True,  True]))
    >>> buffer.take(handles[2:], "frames").flatten()
    tensor([2, 3], dtype=torch.uint8)
    >>> buffer.byte_count
    3
    """

    def __init__(self, capacity: int, device: torch.device, first_handle: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"InputBuffer: capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.device = device
        self._first, self._next = first_handle, first_handle
        self._tensors: dict[str, Tensor] = {}

    @property
    def byte_count(self) -> int:
        """Size of the buffer in bytes; 0 before the first push."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def push(self, inputs: dict[str, Tensor]) -> Int[Tensor, " samples"]:
        """Add a batch, overwriting the oldest samples, and return a handle for each sample.

        Parameters
        ----------
        inputs
            Tensors with one row per sample; names, row shapes and types are the same at every push.

        Raises
        ------
        ValueError
            Names, shapes or types are not those of the first push, or the numbers of rows differ.
        """
        counts = {len(tensor) for tensor in inputs.values()}
        if len(counts) != 1:
            raise ValueError(f"InputBuffer.push: inputs must have one number of rows, got {sorted(counts)}")
        if not self._tensors:
            self._tensors = {
                name: torch.empty(self.capacity, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
                for name, tensor in inputs.items()
            }
        wanted = {name: (tuple(held.shape[1:]), held.dtype) for name, held in self._tensors.items()}
        got = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in inputs.items()}
        if wanted != got:
            raise ValueError(f"InputBuffer.push: inputs must be {wanted} as at the first push, got {got}")
        handles = self._next + torch.arange(counts.pop())
        self._next += len(handles)
        self._first = max(self._first, self._next - self.capacity)
        kept = handles[-self.capacity :]
        for name, tensor in inputs.items():
            self._tensors[name][(kept % self.capacity).to(self.device)] = tensor[-self.capacity :].to(self.device)
        return handles

    def has(self, handles: Int[Tensor, " samples"]) -> Bool[Tensor, " samples"]:
        """Which inputs are still in the buffer."""
        return (handles >= self._first) & (handles < self._next)

    def take(self, handles: Int[Tensor, " samples"], name: str) -> Tensor:
        """The inputs of that name for the handles, on the buffer's device.

        Raises
        ------
        ValueError
            One of them is no longer held.
        KeyError
            No input of that name was pushed.
        """
        if not bool(self.has(handles).all()):
            gone = handles[~self.has(handles)]
            raise ValueError(
                f"InputBuffer.take: handles must be in {self._first}..{self._next - 1}, the held ones, "
                f"got {int(gone[0])}"
            )
        return self._tensors[name][(handles % self.capacity).to(self.device)]
