"""Perceptual fingerprints of video and audio, and the search for near-duplicates.

Each bit of a fingerprint says which of two neighbouring values in a coarse view is brighter or louder. Scaling,
re-encoding and changes of brightness or level preserve most bits; different content changes half of them. Fingerprints
are taken at fixed relative positions in a file, so copies that were cut are not found.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

BITS_PER_VIEW = 64
# Two files are near-duplicates if at most these shares of the bits differ, in video and in audio. For unrelated files,
# half of the 192 bits differ, with a deviation of 4 %: even among millions, neither share is reached by chance.
PICTURE_DIFFERENCE, SOUND_DIFFERENCE = 0.10, 0.22
_FLAT_LEVELS = 6.0  # standard deviation in grey levels, below which noise determines the bits
_BAND_BYTES = 2
_NEIGHBOURS = 64  # compared among equal values of a band, so that thousands of title cards do not take quadratic time


def picture_bits(frame: UInt8[np.ndarray, "height width 3"]) -> bytes | None:
    """Difference hash of a frame, eight bytes: which of two horizontal neighbours is brighter. None if it is flat."""
    luma = frame @ np.array([0.299, 0.587, 0.114])
    if luma.std() < _FLAT_LEVELS:
        return None
    fields = _coarse(luma, 8, 9)
    return np.packbits(fields[:, 1:] > fields[:, :-1]).tobytes()


def sound_bits(waveform: Float[np.ndarray, " samples"], sample_rate_hz: int) -> bytes | None:
    """Fingerprint of audio, eight bytes: how energy differences of neighbouring bands change in time. None for silence.

    It follows Haitsma and Kalker (A Highly Robust Audio Fingerprinting System, ISMIR 2002), with 9 bands and 9 times.
    """
    if np.sqrt(np.mean(np.square(waveform))) < 1e-3:
        return None
    size = len(waveform) // 9
    pieces = waveform[: size * 9].reshape(9, size) * np.hanning(size)
    power = np.square(np.abs(np.fft.rfft(pieces)))
    edges = np.geomspace(150, 0.45 * sample_rate_hz, 10) * size / sample_rate_hz
    bands = np.add.reduceat(power, np.round(edges).astype(int), axis=1)[:, :9]
    change = np.diff(np.diff(np.log(bands + 1e-9), axis=1), axis=0)
    return np.packbits(change > 0).tobytes()


def near_duplicates(
    pictures: Sequence[bytes | None], sounds: Sequence[bytes | None]
) -> list[tuple[int, int, float | None, float | None]]:
    """Pairs of files that are alike in every modality that both have: video, audio, or both.

    Parameters
    ----------
    pictures, sounds
        For each file, the concatenated bits of its views; None if there are none. All video fingerprints have the same
        length, and so have all audio fingerprints.

    Returns
    -------
    list of (first, second, share of differing video bits or None, share of differing audio bits or None)
        Sorted, with ``first < second``. A pair is found only if at least one aligned group of 16 bits is equal. About
        one in a hundred pairs near the limits is missed.
    """
    pairs = _candidates(pictures, PICTURE_DIFFERENCE) | _candidates(sounds, SOUND_DIFFERENCE)
    found = []
    for first, second in sorted(pairs):
        picture = _difference(pictures[first], pictures[second])
        sound = _difference(sounds[first], sounds[second])
        alike = (picture is None or picture <= PICTURE_DIFFERENCE) and (sound is None or sound <= SOUND_DIFFERENCE)
        if alike and (picture is not None or sound is not None):
            found.append((first, second, picture, sound))
    return found


def _candidates(prints: Sequence[bytes | None], most: float) -> set[tuple[int, int]]:
    """Pairs of files with at least one equal band, of whose bits at most the share ``most`` differs."""
    present = [i for i, bits in enumerate(prints) if bits is not None]
    if not present:
        return set()
    rows = np.array([np.frombuffer(prints[i] or b"", np.uint8) for i in present])
    bands = rows.view(np.dtype(f"u{_BAND_BYTES}"))
    files = np.array(present)
    pairs: set[tuple[int, int]] = set()
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            equal = band[order[step:]] == band[order[:-step]]
            if not equal.any():
                break
            ones, others = order[:-step][equal], order[step:][equal]
            # Filter here: a million files have a hundred million such pairs by chance alone.
            alike = np.bitwise_count(rows[ones] ^ rows[others]).sum(1) <= most * 8 * rows.shape[1]
            pairs.update(zip(files[ones[alike]].tolist(), files[others[alike]].tolist(), strict=True))
    return pairs


def _difference(first: bytes | None, second: bytes | None) -> float | None:
    if first is None or second is None:
        return None
    differing = int.from_bytes(first, "big") ^ int.from_bytes(second, "big")
    return differing.bit_count() / (8 * len(first))


def _coarse(picture: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """Means over a grid of equal fields; the picture must be at least as large as the grid."""
    height, width = picture.shape[0] // rows * rows, picture.shape[1] // columns * columns
    fields = picture[:height, :width].reshape(rows, height // rows, columns, width // columns)
    return np.asarray(fields.mean((1, 3)))
