"""Expected cost of the recipes: ``python benchmarks/recipes.py`` prints what stands in their comments.

Derived, not measured:

    clips        training clips of the data set's list, as published; of what YouTube still has, it is less
    steps        epochs x (clips // batch size)
    TFLOP        two for each multiply-add of one clip, from torch's counter of operations: 1 x for the forward pass,
                 2 x for the backward pass, and 1 x for the forward pass of the key encoders, if the recipe has them.
                 Heads, loss and choice of keys are left out: below 1 %.
    GPU hours    at 40 % of the 989 TFLOP/s of an H100 SXM in dense bf16. The 40 % are an assumption.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmacc.clips import ClipSpec
from cmacc.encoders import AudioVisualEncoder, EncoderConfig

PEAK_TFLOP_PER_SECOND = 989.0
UTILISATION = 0.4
# Clips per second that one core decodes from packed shards (docs/data-speed.md).
PACKED_CLIPS_PER_CORE_SECOND = 188


@dataclass(frozen=True)
class Size:
    """Clips and epochs of a recipe; ``forward_passes`` counts the backward pass as two."""

    clips: int
    epochs: int
    batch_size: int
    forward_passes: int
    variants: tuple[tuple[str, str, int], ...]

    @property
    def steps(self) -> int:
        return self.epochs * (self.clips // self.batch_size)


PAPER = (
    ("r3d_18", "resnet18", 112),
    ("r3d_18", "resnet18", 224),
    ("r2plus1d_18", "resnet18", 112),
    ("r2plus1d_18", "resnet18", 224),
)
RECIPES = {
    "folder": Size(100_000, 30, 32, 3, (("r3d_18", "resnet18", 112),)),
    "kinetics_sounds": Size(15_000, 200, 128, 4, PAPER),
    "kinetics400": Size(306_245 - 400 * 150, 100, 128, 4, PAPER),
    "kinetics700": Size(542_352, 50, 128, 4, PAPER),
    "audioset_240k": Size(240_000, 100, 128, 4, PAPER),
    "audioset_2m": Size(2_084_320 - 22_160 - 20_371, 20, 128, 4, PAPER),
}


@cache
def gigamacs(video: str, audio: str, pixels: int) -> tuple[float, float]:
    """Billions of multiply-adds of a forward pass of both backbones for one clip of 16 frames and 2 s."""
    spec = ClipSpec()
    with torch.device("meta"):
        pair = AudioVisualEncoder(EncoderConfig(video=video, audio=audio))
        frames = torch.empty(2, 3, spec.frame_count, pixels, pixels)
        mels = torch.empty(2, pair.config.mel_bins, 1 + 100 * int(spec.audio_seconds))
    counts = []
    for encoder, inputs in ((pair.video, frames), (pair.audio, mels)):
        with FlopCounterMode(display=False) as counter:
            encoder.backbone(inputs)
        counts.append(counter.get_total_flops() / len(inputs) / 2 / 1e9)
    return counts[0], counts[1]


def teraflop_per_clip(size: Size, variant: tuple[str, str, int]) -> float:
    return 2 * sum(gigamacs(*variant)) * size.forward_passes / 1000


def gpu_hours(size: Size, variant: tuple[str, str, int]) -> float:
    seconds = size.steps * size.batch_size * teraflop_per_clip(size, variant) / (UTILISATION * PEAK_TFLOP_PER_SECOND)
    return seconds / 3600


def lines(size: Size) -> list[str]:
    """The lines of a recipe's comment."""
    found = [f"{size.clips:,} clips x {size.epochs} epochs = {size.steps:,} steps of {size.batch_size}"]
    for variant in size.variants:
        video, audio, pixels = variant
        teraflop = teraflop_per_clip(size, variant)
        rate = UTILISATION * PEAK_TFLOP_PER_SECOND / teraflop
        found.append(
            f"{video} and {audio}, {pixels} px: {teraflop:.3g} TFLOP a clip, {gpu_hours(size, variant):.3g} GPU hours "
            f"({rate:,.0f} clips/s a GPU)"
        )
    return found


def main() -> None:
    for name, size in RECIPES.items():
        print(name)
        for line in lines(size):
            print(f"  {line}")
    print(f"{PACKED_CLIPS_PER_CORE_SECOND} clips/s: what one core decodes from packed shards")


if __name__ == "__main__":
    main()
