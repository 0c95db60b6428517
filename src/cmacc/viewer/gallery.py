"""Images of clips: a few frames and a spectrogram, decoded on demand and only once."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import Clip, ClipSpec, LogMel, Manifest, MediaError, decode_clip
from cmacc.viewer.figures import picture, spectrogram_picture

_PICTURE_PIXELS = 112
_SPECTROGRAM_RANGE = 6 * math.log(10)  # 60 dB, in the natural logarithm of power that LogMel gives


@dataclass(frozen=True)
class Picture:
    """A ``data:`` URL and what the image shows; with an empty URL, the reason why there is none."""

    address: str
    text: str


def shown_range(log_mel: NDArray[np.float32]) -> tuple[float, float]:
    """The quietest and the loudest level to show of a spectrogram: 60 dB, so that silence looks black."""
    loudest = max(0.0, float(log_mel.max()))  # silence must not be amplified to full range
    return loudest - _SPECTROGRAM_RANGE, loudest


class ClipPictures:
    """Images of windows of a manifest's files. A window is (sample id, start in seconds within the sample)."""

    def __init__(self, manifest: Manifest, spec: ClipSpec, mel_bins: int) -> None:
        self._manifest = manifest
        # Four frames spread over the interval that the encoder saw, no larger than the page needs.
        scale = min(1.0, _PICTURE_PIXELS / max(spec.frame_height, spec.frame_width))
        self.spec = dataclasses.replace(
            spec,
            frame_count=4,
            frame_rate_hz=4 / spec.picture_seconds,
            frame_height=max(1, round(spec.frame_height * scale)),
            frame_width=max(1, round(spec.frame_width * scale)),
        )
        self._log_mel = LogMel(spec.sample_rate_hz, mel_bins)
        self._clips: dict[tuple[int, float], Clip | str] = {}

    def name(self, sample_id: int, start_seconds: float) -> tuple[str, str]:
        """The label (or an empty string), and the file name with the clip's start."""
        record = self._manifest.records[sample_id]
        return record.label or "", f"{record.name}, {start_seconds:.1f} s"

    def sound(self, sample_id: int, start_seconds: float) -> Picture:
        """A spectrogram."""
        clip = self._clip(sample_id, start_seconds)
        if isinstance(clip, str):
            return Picture("", clip)
        log_mel = self._log_mel(clip.waveform[None])[0].numpy()
        address = spectrogram_picture(log_mel, *shown_range(log_mel))
        return Picture(address, f"spectrogram of {self.name(sample_id, start_seconds)[1]}")

    def frames(self, sample_id: int, start_seconds: float, columns: int = 2) -> Picture:
        """Four frames, with ``columns`` in a row."""
        clip = self._clip(sample_id, start_seconds)
        if isinstance(clip, str):
            return Picture("", clip)
        frames = clip.frames.numpy()
        strips = [np.concatenate(list(frames[i : i + columns]), axis=1) for i in range(0, len(frames), columns)]
        return Picture(picture(np.concatenate(strips)), f"four frames of {self.name(sample_id, start_seconds)[1]}")

    def _clip(self, sample_id: int, start_seconds: float) -> Clip | str:
        window = (sample_id, start_seconds)
        if window not in self._clips:
            record = self._manifest.records[sample_id]
            try:
                self._clips[window] = decode_clip(record.source, record.start_seconds + start_seconds, self.spec)
            except MediaError as error:
                self._clips[window] = str(error).replace(str(record.path), record.name)
        return self._clips[window]
