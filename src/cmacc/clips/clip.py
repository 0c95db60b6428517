"""The value types of clips, which all later stages use.

A clip is one half-open window ``[start_seconds, start_seconds + length_seconds)`` of a file. Video and audio need not
have the same length: the defaults take 1 s of video (16 frames at 16 fps) in the middle of 2 s of audio. Both have the
same centre::

    window    |<----------------- length_seconds = 2.0 ----------------->|
    audio     |s s s s s s s s s s s s s s s s s s s s s s s s s s s s s s|   sample_count = 32,000
    video                     |f . f . f . f . f . f|                         frame_count = 16
                              ^ picture_start_seconds

Frame ``i`` is the frame on display in the *middle* of its slot, at ``picture_start + (i + 0.5) / frame_rate_hz``. If
slots coincide with source frames, this is half a frame away from their boundaries, so rounded time stamps do no harm.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

ShortFiles = Literal["pad", "loop", "refuse"]


class MediaError(ValueError):
    """A media file that cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class ClipSpec:
    """The exact size of every clip: ``frame_count`` frames and ``sample_count`` samples.

    Parameters
    ----------
    frame_count
        T, frames per clip.
    frame_rate_hz
        Frame rate of the clip, whatever the rate of the source.
    frame_height, frame_width
        Size in pixels. The source is scaled to cover it, and cropped around its centre.
    audio_seconds
        Length of the audio. The clip has exactly ``round(audio_seconds * sample_rate_hz)`` samples.
    sample_rate_hz
        Sample rate of the mono audio.
    short_files
        How to handle a file shorter than ``length_seconds``: ``pad``, centre the window on it, hold the first and last
        frame and pad the audio with zeros; ``loop``, repeat video and audio together; ``refuse``, treat it as
        unreadable.
    """

    frame_count: int = 16
    frame_rate_hz: float = 16.0
    frame_height: int = 112
    frame_width: int = 112
    audio_seconds: float = 2.0
    sample_rate_hz: int = 16_000
    short_files: ShortFiles = "pad"

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name != "short_files" and not 0 < value < float("inf"):
                raise ValueError(f"ClipSpec: {name} must be positive, got {value}")
        if self.short_files not in get_args(ShortFiles):
            raise ValueError(f"ClipSpec: short_files must be pad, loop or refuse, got {self.short_files!r}")

    @property
    def sample_count(self) -> int:
        """Samples per clip, S."""
        return round(self.audio_seconds * self.sample_rate_hz)

    @property
    def picture_seconds(self) -> float:
        """Length of the video."""
        return self.frame_count / self.frame_rate_hz

    @property
    def length_seconds(self) -> float:
        """Length of the whole window: the longer of video and audio."""
        return max(self.picture_seconds, self.audio_seconds)

    def picture_start_seconds(self, start_seconds: float) -> float:
        """Start of the video in a window that starts at ``start_seconds``."""
        return start_seconds + (self.length_seconds - self.picture_seconds) / 2

    def frame_times(self, start_seconds: float) -> NDArray[np.float64]:
        """Middle of the slot of every frame, ``(T,)``, in a window that starts at ``start_seconds``."""
        slots = np.arange(self.frame_count, dtype=np.float64) + 0.5
        return self.picture_start_seconds(start_seconds) + slots / self.frame_rate_hz

    def audio_start_seconds(self, start_seconds: float) -> float:
        """Start of the audio in a window that starts at ``start_seconds``."""
        return start_seconds + (self.length_seconds - self.audio_seconds) / 2


@dataclass(frozen=True)
class Clip:
    """One decoded window of one file.

    Attributes
    ----------
    frames
        ``(T, height, width, 3)`` uint8 RGB.
    waveform
        ``(S,)`` float32 mono in [-1, 1]; zeros where the file has no audio.
    start_seconds
        Start of the window on the file's clock (0 is the first frame, or the first sample of a file without video).
    frame_seconds
        ``(T,)`` float64: time at which each frame appears, on the same clock; NaN without video.
    audio_start_seconds
        Time of the first sample, at most half a source sample from the requested time; NaN without audio.
    """

    frames: UInt8[Tensor, "time height width 3"]
    waveform: Float[Tensor, " samples"]
    start_seconds: float
    frame_seconds: Float[Tensor, " time"]
    audio_start_seconds: float


@dataclass(frozen=True)
class ClipBatch:
    """M clips of equal size, each with the id of its file.

    Attributes
    ----------
    frames
        ``(M, T, height, width, 3)`` uint8.
    waveforms
        ``(M, S)`` float32.
    sample_ids
        ``(M,)`` int64: the file's row in its manifest.
    labels
        ``(M,)`` int64: index into ``Manifest.classes()``, -1 without a label.
    failures
        ``{sample id: reason}`` of files that could not be decoded. Training batches have others in their place.
    """

    frames: UInt8[Tensor, "batch time height width 3"]
    waveforms: Float[Tensor, "batch samples"]
    sample_ids: Int[Tensor, " batch"]
    labels: Int[Tensor, " batch"]
    failures: dict[int, str]

    def to(self, device: torch.device) -> "ClipBatch":
        """Copy the tensors to ``device``."""
        return dataclasses.replace(
            self,
            frames=self.frames.to(device, non_blocking=True),
            waveforms=self.waveforms.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "ClipBatch":
        """Called by torch's DataLoader when ``pin_memory`` is set."""
        return dataclasses.replace(
            self,
            frames=self.frames.pin_memory(),
            waveforms=self.waveforms.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
            labels=self.labels.pin_memory(),
        )
