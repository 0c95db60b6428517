"""Fingerprints: equal for what looks and sounds alike, half different for what does not."""

import itertools

import numpy as np
import pytest

from cmacc.clips.catalog.fingerprint import (
    BITS_PER_VIEW,
    PICTURE_DIFFERENCE,
    SOUND_DIFFERENCE,
    near_duplicates,
    picture_bits,
    sound_bits,
)

from ..films import changing_sound, moving_picture

# Clouds whose colours cancel in grey have no print; nor should those that come near it, when they are made paler.
WITH_FEATURES = [seed for seed in range(16) if picture_bits(moving_picture(0.1, seed)[0] // 2) is not None]


def share_differing(one: bytes | None, other: bytes | None) -> float:
    assert one is not None
    assert other is not None
    assert len(one) == len(other) == BITS_PER_VIEW // 8
    bits = [np.unpackbits(np.frombuffer(each, np.uint8)) for each in (one, other)]
    return float((bits[0] != bits[1]).mean())


def test_a_picture_made_brighter_smaller_and_noisy_keeps_its_bits() -> None:
    rng = np.random.default_rng(0)
    for seed in WITH_FEATURES:
        picture = moving_picture(0.1, seed)[0]
        changed = picture[::2, ::2] * 0.8 + 30 + rng.normal(0, 3, picture[::2, ::2].shape)
        assert share_differing(picture_bits(picture), picture_bits(changed.clip(0, 255).astype(np.uint8))) < 0.1


def test_a_sound_made_quieter_and_noisy_keeps_its_bits() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for seed in range(10):
        sound = changing_sound(1.0, seed)
        changed = 0.4 * sound + rng.normal(0, 0.0005, sound.shape).astype(np.float32)
        shares.append(share_differing(sound_bits(sound, 16_000), sound_bits(changed.astype(np.float32), 16_000)))
    assert np.mean(shares) < SOUND_DIFFERENCE / 2


def test_bits_of_others_differ_by_half() -> None:
    pictures = [picture_bits(moving_picture(0.1, seed)[0]) for seed in WITH_FEATURES]
    sounds = [sound_bits(changing_sound(1.0, seed), 16_000) for seed in range(16)]
    for prints in (pictures, sounds):
        shares = [share_differing(one, other) for one, other in itertools.combinations(prints, 2)]
        assert 0.4 < np.mean(shares) < 0.6


def test_what_has_no_features_has_no_print() -> None:
    assert picture_bits(np.full((72, 96, 3), 17, np.uint8)) is None
    assert sound_bits(np.zeros(16_000, np.float32), 16_000) is None


def flipped(bits: bytes, share: float, rng: np.random.Generator) -> bytes:
    array = np.unpackbits(np.frombuffer(bits, np.uint8))
    places = rng.choice(len(array), round(share * len(array)), replace=False)
    array[places] ^= 1
    return np.packbits(array).tobytes()


def test_near_duplicates_are_found_among_many_and_nothing_else() -> None:
    """Against comparing every pair; of pairs at the very limit a few in a hundred may be missed."""
    rng = np.random.default_rng(0)
    pictures = [rng.bytes(24) for _ in range(1500)]
    sounds = [rng.bytes(24) for _ in range(1500)]
    for i in range(500):
        pictures.append(flipped(pictures[i], rng.uniform(0, 0.1), rng))
        sounds.append(flipped(sounds[i], rng.uniform(0, 0.2), rng))
    pictures += [flipped(pictures[600], 0.05, rng), pictures[601], rng.bytes(24)]
    sounds += [rng.bytes(24), flipped(sounds[601], 0.3, rng), sounds[602]]  # one of the two alone is not enough
    rows = [np.unpackbits(np.array([list(each) for each in kind], np.uint8), axis=1) for kind in (pictures, sounds)]
    wanted = {
        (i, i + 1 + int(j))
        for i in range(len(pictures))
        for j in np.flatnonzero(
            ((rows[0][i + 1 :] != rows[0][i]).mean(1) <= PICTURE_DIFFERENCE)
            & ((rows[1][i + 1 :] != rows[1][i]).mean(1) <= SOUND_DIFFERENCE)
        )
    }
    assert len(wanted) == 500
    found = near_duplicates(pictures, sounds)
    assert {(first, second) for first, second, _, _ in found} <= wanted
    assert len(found) >= 0.97 * len(wanted)


def test_one_modality_is_enough_where_the_other_is_missing() -> None:
    rng = np.random.default_rng(0)
    one, two, sound = rng.bytes(24), rng.bytes(24), rng.bytes(24)
    found = near_duplicates([one, one, two, None, None], [None, sound, None, sound, None])
    assert found == [(0, 1, 0.0, None), (1, 3, None, 0.0)]
    assert near_duplicates([], []) == []


@pytest.mark.parametrize("count", [1, 2])
def test_few_files(count: int) -> None:
    assert near_duplicates([b"12345678"] * count, [None] * count) == [(0, 1, 0.0, None)] * (count - 1)
