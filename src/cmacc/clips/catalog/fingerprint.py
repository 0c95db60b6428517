"""Perceptual fingerprints of picture and sound, and the near-duplicates that they find among many files.

A fingerprint says of each neighbouring pair in a coarse view which one is brighter or louder. Scaling, re-encoding and
a change of brightness or level leave most of these bits as they are; other content changes half of them. Both look at
the same places of a file (shares of its length), so a copy that was cut is not found.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

BITS_PER_VIEW = 64
# Two files count as alike where at most this share of the bits differs, in picture and in sound. Of unrelated files'
# 192 bits half differ, give or take 4 %: neither share is reached by chance among millions.
PICTURE_DIFFERENCE, SOUND_DIFFERENCE = 0.10, 0.22
_FLAT_LEVELS = 6.0  # grey levels of deviation, below which noise alone decides the bits
_BAND_BYTES = 2
_NEIGHBOURS = 64  # compared within a band's equal values, so that thousands of title cards do not cost their square


def picture_bits(frame: UInt8[np.ndarray, "height width 3"]) -> bytes | None:
    """Eight bytes for a frame, a "difference hash": which of two fields abreast is brighter. None for a flat one."""
    luma = frame @ np.array([0.299, 0.587, 0.114])
    if luma.std() < _FLAT_LEVELS:
        return None
    fields = _coarse(luma, 8, 9)
    return np.packbits(fields[:, 1:] > fields[:, :-1]).tobytes()


def sound_bits(waveform: Float[np.ndarray, " samples"], sample_rate_hz: int) -> bytes | None:
    """Eight bytes for a sound: how the energy between neighbouring bands changes in time; None for silence.

    The form is that of Haitsma and Kalker (A Highly Robust Audio Fingerprinting System, ISMIR 2002), on 9 bands and 9
    moments.
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
    """Pairs of files that are alike in all that both have: picture, sound, or the two.

    Parameters
    ----------
    pictures, sounds
        For each file the bits of its views, one after the other; None where it has none. All of one kind are equally
        long.

    Returns
    -------
    list of (first, second, share of picture bits that differ or None, share of sound bits that differ or None)
        ``first < second``, sorted. A pair is found if at least one run of 16 bits agrees, which all but about one in a
        hundred pairs near the limits do.
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
    """Pairs of files of whose bits at most that share differs, if at least one band of them is equal."""
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
            # Chance alone makes a hundred million such pairs among a million files: only those alike are kept.
            alike = np.bitwise_count(rows[ones] ^ rows[others]).sum(1) <= most * 8 * rows.shape[1]
            pairs.update(zip(files[ones[alike]].tolist(), files[others[alike]].tolist(), strict=True))
    return pairs


def _difference(first: bytes | None, second: bytes | None) -> float | None:
    if first is None or second is None:
        return None
    differing = int.from_bytes(first, "big") ^ int.from_bytes(second, "big")
    return differing.bit_count() / (8 * len(first))


def _coarse(picture: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """Means over a grid of equal fields; the picture is at least that large."""
    height, width = picture.shape[0] // rows * rows, picture.shape[1] // columns * columns
    fields = picture[:height, :width].reshape(rows, height // rows, columns, width // columns)
    return np.asarray(fields.mean((1, 3)))
