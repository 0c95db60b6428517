"""Films of scenes that are told apart by nine bits, and an encoder that reads them from picture and sound alike.

The picture shows the bits as nine bright or dark tiles, the sound has them as nine tones. The encoder's embedding is
the mean over the window of +1 and -1 for each, so that the score of a window is linear in how much of it a scene
covers.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cmacc.clips import ClipSpec

from ..clips.films import write_film

RATE_HZ = 8_000
TONES_HZ = 300.0 + 350.0 * np.arange(9)
_AMPLITUDE = 0.08
_CHUNKS = 16
Bits = Sequence[int]


def random_scenes(count: int, seed: int = 0) -> list[list[int]]:
    """Distinct scenes, each with at least three bits set and three not."""
    rng = np.random.default_rng(seed)
    numbers = [n for n in range(512) if 3 <= n.bit_count() <= 6]
    return [[n >> i & 1 for i in range(9)] for n in rng.permutation(numbers)[:count].tolist()]


def write_scenes(
    path: Path, scenes: Sequence[tuple[Bits, float]], *, has_picture: bool = True, has_sound: bool = True
) -> Path:
    """A film of scenes, each of so many seconds."""
    return write_film(
        path,
        np.concatenate([_frames(bits, seconds) for bits, seconds in scenes]) if has_picture else None,
        np.concatenate([_sound(bits, seconds) for bits, seconds in scenes]) if has_sound else None,
        rate_hz=RATE_HZ,
        crf=25,
    )


def _frames(bits: Bits, seconds: float) -> NDArray[np.uint8]:
    tiles = np.kron(np.array(bits, np.uint8).reshape(3, 3) * 200 + 25, np.ones((16, 16), np.uint8))
    return np.broadcast_to(tiles[None, :, :, None], (round(seconds * 10), 48, 48, 3))


def _sound(bits: Bits, seconds: float) -> NDArray[np.float32]:
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    tones = np.array(bits)[:, None] * np.sin(2 * np.pi * TONES_HZ[:, None] * time)
    return (_AMPLITUDE * tones.sum(axis=0)).astype(np.float32)


class SceneEncoder(nn.Module):
    """Reads the bits; ``scale`` only serves to give other weights. It also understands texts such as "scene 101...".

    Texts are compared with the features of video, which are here the embeddings.
    """

    modalities = ("video", "audio")
    text_modalities = ("video",)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=False)
        self.spec = ClipSpec(
            frame_count=8, frame_rate_hz=4.0, frame_height=48, frame_width=48, audio_seconds=2.0, sample_rate_hz=RATE_HZ
        )
        chunk = self.spec.sample_count // _CHUNKS
        time = torch.arange(chunk, dtype=torch.float64) / RATE_HZ
        waves = torch.exp(2j * torch.pi * torch.tensor(TONES_HZ)[:, None] * time) * torch.hann_window(chunk)
        self.waves = waves.to(torch.complex64) * (4.0 / chunk / _AMPLITUDE)
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def embed_video(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Float[Tensor, "batch features"]:
        tiles = functional.avg_pool2d(frames.float().mean(4), 16)
        return self.scale * ((tiles - 125) / 100).clamp(-1, 1).mean(1).flatten(1)

    def embed_audio(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch features"]:
        chunks = waveforms.unflatten(1, (_CHUNKS, -1)).to(torch.complex64)
        levels = (chunks @ self.waves.T).abs()
        return self.scale * (2 * levels - 1).clamp(-1, 1).mean(1)

    def match_video(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        return functional.normalize(features, dim=1)

    def match_audio(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        return functional.normalize(features, dim=1)

    def encode_text(self, texts: Sequence[str], modality: str) -> Float[Tensor, "texts features"]:
        """``scene 110...``: its bits; other texts: bits drawn from their letters."""
        rows = []
        for text in texts:
            code = text.removeprefix("scene ")
            if set(code) <= {"0", "1"}:
                rows.append([2.0 * int(bit) - 1 for bit in code])
            else:
                rng = np.random.default_rng(list(text.encode()))
                rows.append(rng.standard_normal(9).tolist())
        return functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)
