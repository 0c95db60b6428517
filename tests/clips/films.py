"""Small films of given frames and sound, for tests of what is seen and heard in them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def moving_picture(seconds: float = 2.0, seed: int = 0, size: tuple[int, int] = (96, 128)) -> NDArray[np.uint8]:
    """``(T, height, width, 3)`` at 10 fps: soft coloured clouds that drift."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width] / height
    waves = rng.uniform(2, 9, (6, 2)), rng.uniform(0, 6.3, (6, 3)), rng.uniform(-4, 4, 6)
    frames = []
    for time in np.arange(round(seconds * 10)) / 10:
        phase = sum(
            np.sin(kx * x + ky * y + speed * time)[..., None] * np.cos(colours)
            for (kx, ky), colours, speed in zip(*waves, strict=True)
        )
        frames.append(128 + 30 * phase)
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def changing_sound(seconds: float = 2.0, seed: int = 0, rate_hz: int = 16_000) -> NDArray[np.float32]:
    """``(samples,)``: many tones that come and go."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    tones = [
        np.sin(2 * np.pi * hz * time) * np.clip(np.sin(2 * np.pi * beat * time + phase), 0, 1)
        for hz, beat, phase in zip(
            rng.uniform(150, 7_000, 80), rng.uniform(0.5, 4, 80), rng.uniform(0, 6, 80), strict=True
        )
    ]
    return (0.02 * np.sum(tones, axis=0)).astype(np.float32)


def write_film(
    path: Path,
    frames: NDArray[np.uint8] | None,
    sound: NDArray[np.float32] | None,
    *,
    fps: int = 10,
    rate_hz: int = 16_000,
    crf: int = 18,
    audio_start_seconds: Fraction = Fraction(0),
) -> Path:
    """Write an .mp4 (or what the ending says) of the frames, and of the sound as AAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packets = []
    with av.open(str(path), "w") as container:
        if frames is not None:
            video = container.add_stream("libx264", rate=fps)
            video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            video.codec_context.thread_count = 1
            video.codec_context.options = {"preset": "ultrafast", "crf": str(crf)}
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, fps)
                packets += video.encode(frame)
            packets += video.encode(None)
        if sound is not None:
            audio = container.add_stream("aac", rate=rate_hz, layout="mono")
            whole = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            whole.sample_rate, whole.time_base = rate_hz, Fraction(1, rate_hz)
            whole.pts = round(audio_start_seconds * rate_hz)
            packets += audio.encode(whole) + audio.encode(None)
        container.mux(sorted(packets, key=lambda packet: (packet.dts or 0) * (packet.time_base or 0)))
    return path
