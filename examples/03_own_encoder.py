"""Measure an encoder of one's own by cmacc's protocols, beside the log-mel baseline.

    python examples/03_own_encoder.py

An encoder is any object that says which clips it wants (`spec`) and turns a batch of them into rows. This one hears
nothing but how loud a sound is over time; on a small rendered world, where classes differ in rhythm, that is worth more
than chance. The two cards are put side by side: they were made on the same data by the same protocols.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cmacc.clips import ClipSpec, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.transfer import Card, EvaluateOptions, compared, evaluate


class Loudness:
    """The level of a sound in every 20th of a second."""

    modalities = ("audio",)
    spec = ClipSpec(audio_seconds=2.0, sample_rate_hz=16_000)
    device = torch.device("cpu")

    def embed_video(self, frames: Tensor) -> Tensor:
        """Never called: pictures are none of its modalities."""
        raise NotImplementedError

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, 40)."""
        return waveforms.unflatten(1, (40, -1)).square().mean(dim=2).add(1e-6).log()


def main() -> list[Card]:
    """Render, divide, measure, compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = WorldConfig(clip_count=64, class_count=4, nuisance=0.1, frame_size=32, duration_seconds=2.0)
        write_world(world, folder / "world")
        manifest = folder / "manifest.parquet"
        scan(list_folders([folder / "world"])).manifest.write(manifest)
        # Every clip is held out once, in one of four folds.
        options = EvaluateOptions(folds=4, workers=0)
        cards = [
            evaluate(encoder, ["labelled"], manifest, folder / name, protocols=["linear", "knn"], options=options)
            for name, encoder in (("loudness", Loudness()), ("statistics", "statistics"))
        ]
    print(compared(cards, ["loudness", "statistics"]))
    return cards


if __name__ == "__main__":
    main()
