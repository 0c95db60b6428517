"""Images of clips: a few frames and a spectrogram, decoded on demand and only once; with films to play, if wanted."""

import base64
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmacc.clips import Clip, ClipSpec, LogMel, Manifest, MediaError, decode_clip, encode_part
from cmacc.viewer.figures import picture, spectrogram_picture

_PICTURE_PIXELS = 112
_FILM_SECONDS = 1.0
_FILM_PIXELS = 128  # short side
_FILM_RATE_HZ = 15.0
_SPECTROGRAM_RANGE = 6 * math.log(10)  # 60 dB, in the natural logarithm of power that LogMel gives


@dataclass(frozen=True)
class Picture:
    """A ``data:`` URL and what the image shows; with an empty URL, the reason why there is none.

    Attributes
    ----------
    address, text
        The URL, and what the image shows.
    film
        ``data:`` URL of what to play in its place; empty if there is nothing to play.
    aspect
        Width of the image over its height.
    """

    address: str
    text: str
    film: str = ""
    aspect: float = 1.0


def shown_range(log_mel: NDArray[np.float32]) -> tuple[float, float]:
    """The quietest and the loudest level to show of a spectrogram: 60 dB, so that silence looks black."""
    loudest = max(0.0, float(log_mel.max()))  # silence must not be amplified to full range
    return loudest - _SPECTROGRAM_RANGE, loudest


class ClipPictures:
    """Images of windows of a manifest's files. A window is (sample id, start in seconds within the sample).

    Parameters
    ----------
    manifest, spec
        The files, and the size of a window.
    mel_bins
        Of the spectrograms.
    film_characters
        Most characters of all films together. An image that would exceed it has no film, and those after it neither.
    """

    def __init__(self, manifest: Manifest, spec: ClipSpec, mel_bins: int, film_characters: int = 0) -> None:
        self._manifest = manifest
        self._window_seconds = spec.length_seconds
        self._film_characters = film_characters
        self._films: dict[tuple[int, float, bool], str] = {}
        self.films_end = film_characters == 0
        """Whether the films have no room left."""
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
        height, width = log_mel.shape
        return Picture(
            address,
            f"spectrogram of {self.name(sample_id, start_seconds)[1]}",
            self._film(sample_id, start_seconds, has_picture=False),
            width / (2 * height if height < 100 else height),
        )

    def frames(self, sample_id: int, start_seconds: float) -> Picture:
        """Four frames, in two rows. Its film has the sound too."""
        clip = self._clip(sample_id, start_seconds)
        if isinstance(clip, str):
            return Picture("", clip)
        frames = clip.frames.numpy()
        rows = [np.concatenate(list(frames[i : i + 2]), axis=1) for i in range(0, len(frames), 2)]
        return Picture(
            picture(np.concatenate(rows)),
            f"four frames of {self.name(sample_id, start_seconds)[1]}",
            self._film(sample_id, start_seconds, has_picture=True),
            self.spec.frame_width / self.spec.frame_height,
        )

    def _film(self, sample_id: int, start_seconds: float, has_picture: bool) -> str:
        """The second in the middle of a window, of a short file all of it; empty if there is no room for it."""
        if self.films_end:
            return ""
        key = sample_id, start_seconds, has_picture
        if key not in self._films:
            self._films[key] = self._encoded(sample_id, start_seconds, has_picture)
        film = self._films[key]
        self.films_end = len(film) > self._film_characters
        if self.films_end:
            return ""
        self._film_characters -= len(film)
        return film

    def _encoded(self, sample_id: int, start_seconds: float, has_picture: bool) -> str:
        record = self._manifest.records[sample_id]
        seconds = min(_FILM_SECONDS, self._window_seconds)
        start = record.start_seconds + start_seconds + (self._window_seconds - seconds) / 2
        try:
            film = encode_part(
                record.source,
                start,
                start + seconds,
                short_side_pixels=_FILM_PIXELS if has_picture else None,
                frame_rate_hz=_FILM_RATE_HZ,
            )
        except MediaError:
            return ""  # the image, of other moments of the window, is shown without
        return f"data:{'video' if has_picture else 'audio'}/mp4;base64,{base64.b64encode(film).decode()}"

    def _clip(self, sample_id: int, start_seconds: float) -> Clip | str:
        window = (sample_id, start_seconds)
        if window not in self._clips:
            record = self._manifest.records[sample_id]
            try:
                self._clips[window] = decode_clip(record.source, record.start_seconds + start_seconds, self.spec)
            except MediaError as error:
                self._clips[window] = str(error).replace(str(record.path), record.name)
        return self._clips[window]
