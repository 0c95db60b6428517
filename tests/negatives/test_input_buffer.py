"""The ring of inputs against a plain list."""

import pytest
import torch

from cmacc.negatives import InputBuffer

HOST = torch.device("cpu")


@pytest.mark.parametrize("first", [0, 12])
@pytest.mark.parametrize("batch", [1, 3, 5, 7])
def test_hands_out_what_was_pushed(first: int, batch: int) -> None:
    ring = InputBuffer(5, HOST, first_handle=first)
    pushed: list[int] = []
    for step in range(6):
        frames = torch.arange(batch, dtype=torch.uint8)[:, None].expand(batch, 4) + 10 * step
        handles = ring.push({"frames": frames, "epochs": torch.full((batch,), step)})
        assert handles.tolist() == list(range(first + len(pushed), first + len(pushed) + batch))
        pushed += frames[:, 0].tolist()
        every = torch.arange(first - 3, first + len(pushed) + 3)
        held = every[ring.has(every)]
        assert held.tolist() == list(range(first + max(0, len(pushed) - 5), first + len(pushed)))
        shuffled = held[torch.randperm(len(held))]
        assert ring.take(shuffled, "frames")[:, 0].tolist() == [pushed[t - first] for t in shuffled.tolist()]
        assert ring.byte_count == 5 * (4 + 8)


def test_errors() -> None:
    with pytest.raises(ValueError, match="InputBuffer: capacity must be at least 1, got 0"):
        InputBuffer(0, HOST)
    ring = InputBuffer(3, HOST)
    ring.push({"a": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match=r"InputBuffer.push: inputs must be .* as at the first push, got .*float64"):
        ring.push({"a": torch.zeros(2, 4, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"inputs must be .*, got .*\(5,\)"):
        ring.push({"a": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match=r"inputs must have one number of rows, got \[2, 3\]"):
        ring.push({"a": torch.zeros(2, 4), "b": torch.zeros(3)})
    ring.push({"a": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match=r"InputBuffer.take: handles must be in 1\.\.3, the held ones, got 0"):
        ring.take(torch.tensor([2, 0]), "a")
