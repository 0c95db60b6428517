"""Evaluate your own encoder with cmacc's protocols, and compare it with the log-mel baseline.

    python examples/03_own_encoder.py

An encoder is any object that defines the size of its clips (`spec`) and maps a batch of them to feature rows. This one
only computes the loudness over time. On a small synthetic data set, whose classes differ in rhythm, this is better than
chance. The two cards are comparable, since they use the same data and protocols.
Step by step: docs/tutorials/evaluate_your_encoder.py.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cmacc.clips import ClipSpec, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.transfer import Card, EvaluateOptions, compared, evaluate


class Loudness:
    """The audio level in intervals of 1/20 s."""

    modalities = ("audio",)
    spec = ClipSpec(audio_seconds=2.0, sample_rate_hz=16_000)
    device = torch.device("cpu")

    def embed_video(self, frames: Tensor) -> Tensor:
        """Never called, because video is not among the modalities."""
        raise NotImplementedError

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, 40)."""
        return waveforms.unflatten(1, (40, -1)).square().mean(dim=2).add(1e-6).log()


def main() -> list[Card]:
    """Generate data, evaluate both encoders, and compare the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = WorldConfig(clip_count=64, class_count=4, nuisance=0.1, frame_size=32, duration_seconds=2.0)
        write_world(world, folder / "world")
        manifest = folder / "manifest.parquet"
        scan(list_folders([folder / "world"])).manifest.write(manifest)
        # Four folds: every clip is held out once.
        options = EvaluateOptions(folds=4, workers=0)
        cards = [
            evaluate(encoder, ["labelled"], manifest, folder / name, protocols=["linear", "knn"], options=options)
            for name, encoder in (("loudness", Loudness()), ("statistics", "statistics"))
        ]
    print(compared(cards, ["loudness", "statistics"]))
    return cards


if __name__ == "__main__":
    main()
