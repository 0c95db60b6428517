"""Model FLOP utilisation: the share of a device's speed that training turns into work on the model.

The model's FLOPs are those of the mathematics, counted by torch: the query encoders forward and backward, and the key
encoders forward. What a setting adds on top (activations computed again, gradient caching, keys re-encoded) is time
without model FLOPs, and lowers the utilisation. The loss, selection and augmentation are not counted either.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cmacc.encoders import EncoderPair, Modality, activations_kept, unwrapped

_MEASURED_SECONDS = 0.1
_PRODUCT_SIZE = {"cuda": 8192}
_PRODUCT_SIZE_ELSEWHERE = 1024


def model_flops_per_clip(
    encoder: nn.Module, inputs: dict[Modality, Tensor], key_encoder: EncoderPair | None = None
) -> float:
    """FLOPs of a training step for each clip; a multiplication and an addition are two.

    Nothing changes: gradients, statistics, random states and modes are left as they were. Encoders run without
    compilation and in evaluation mode, whose FLOPs are the same, so no other process takes part. Computations outside
    torch, such as ONNX graphs, count nothing.

    Parameters
    ----------
    encoder
        Query encoders. Only their trained parts have a backward pass.
    inputs
        Inputs of the encoders, two clips or more.
    key_encoder
        Key encoders, if a step uses them.
    """
    pair = unwrapped(encoder)
    trained = [parameter for parameter in pair.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in pair.modules()}
    pair.eval()
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            activations_kept(pair),
            FlopCounterMode(display=False) as counter,
        ):
            encodings = pair(**inputs)
            # Not backward(): it would leave gradients.
            total = torch.stack([encoding.embedding.sum() for encoding in encodings.values()]).sum()
            torch.autograd.grad(total, trained, allow_unused=True)
            if key_encoder is not None:
                with torch.no_grad():
                    key_encoder(**inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    flops: int = counter.get_total_flops()
    return flops / len(next(iter(inputs.values())))


def peak_flops_per_second(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """FLOPs per second that a large matrix product reaches on this device: measured in 0.1 s, not the data sheet's.

    Measured, it is what the machine really gives: other processes, power limits and, on a CPU, the number of threads
    are in it. Convolutions of float32 on a GPU may use TF32 units, which products do not, and then exceed it.

    Parameters
    ----------
    device
        The device.
    dtype
        Type of the factors. Default: float32.
    """
    size = _PRODUCT_SIZE.get(device.type, _PRODUCT_SIZE_ELSEWHERE)
    # Random numbers, because a GPU multiplies zeros faster; of a generator of our own.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype or torch.float32) for _ in "lr")

    # The first product also loads the library. On CPUs a small one is enough, and a large one takes seconds in bf16 if
    # there are no units for it.
    small = size if device.type == "cuda" else 64
    _seconds_of(1, left[:small, :small], right[:small, :small])
    seconds = _seconds_of(1, left, right)
    times = round(_MEASURED_SECONDS / seconds)
    if times > 1:
        seconds = _seconds_of(times, left, right) / times
    return 2 * size**3 / seconds


def _seconds_of(times: int, left: Tensor, right: Tensor) -> float:
    _wait_for(left.device)
    started = time.perf_counter()
    for _ in range(times):
        left @ right
    _wait_for(left.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Utilisation:
    """What turns clips per second into model FLOP utilisation; made once, at a run's first step.

    Attributes
    ----------
    flops_per_clip
        From `model_flops_per_clip`.
    peak_flops_per_second
        From `peak_flops_per_second`, of one device.
    processes
        Number of processes, each with a device of its own.

    Examples
    --------
    >>> Utilisation(flops_per_clip=2e9, peak_flops_per_second=1e12, processes=2).row(clips_per_second=400.0)
    {'flop_utilisation': 0.4}
    """

    flops_per_clip: float
    peak_flops_per_second: float
    processes: int = 1

    @classmethod
    def measured(
        cls,
        encoder: nn.Module,
        inputs: dict[Modality, Tensor],
        key_encoder: EncoderPair | None,
        device: torch.device,
        dtype: torch.dtype | None,
        processes: int = 1,
    ) -> "Utilisation":
        """Count and measure both, for inputs of two clips; ``dtype`` is the type of autocast, None for float32."""
        flops = model_flops_per_clip(encoder, inputs, key_encoder)
        return cls(flops, peak_flops_per_second(device, dtype), processes)

    def row(self, clips_per_second: float) -> dict[str, float]:
        """``flop_utilisation`` of so many clips per second, over all processes."""
        return {
            "flop_utilisation": clips_per_second * self.flops_per_clip / self.processes / self.peak_flops_per_second
        }
