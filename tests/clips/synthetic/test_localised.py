"""Films in which picture and sound agree in some seconds only: who is seen and heard when, and the lists."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmacc.clips.synthetic import WorldConfig, describe_clip, describe_film, render_clip, render_film
from cmacc.clips.synthetic.localised import BACKGROUNDS, SECONDS, write_localised_world

SMALL = WorldConfig(clip_count=12, class_count=6, frame_size=32, frame_rate_hz=8, sample_rate_hz=8000)


def test_films_are_drawn_from_their_number_alone_and_their_three_classes_differ() -> None:
    films = [describe_film(SMALL, number) for number in range(60)]
    assert films == [describe_film(replace(SMALL, clip_count=99), number) for number in range(60)]
    for film in films:
        labels = {describe_clip(SMALL, index).label for index in (film.event, *film.others)}
        assert len(labels) == 3
        assert film.label == describe_clip(SMALL, film.event).label
        assert 0 <= film.start_seconds < film.end_seconds <= SECONDS
        assert film.end_seconds - film.start_seconds >= 2
    full = sum(film.end_seconds - film.start_seconds == SECONDS for film in films)
    assert 5 <= full <= 26  # a quarter of 60; outside with a probability below 0.002
    kinds = Counter(kind for film in films for kind in (film.before, film.after))
    assert min(kinds[kind] for kind in BACKGROUNDS) > 20  # 40 each; fewer with a probability below 0.001


def test_each_second_shows_and_sounds_what_is_said() -> None:
    whole = replace(SMALL, duration_seconds=float(SECONDS))
    seen = set()
    for number in range(8):
        film = describe_film(SMALL, number)
        frames, sound = render_film(SMALL, number)
        clips = {index: render_clip(whole, index) for index in (film.event, *film.others)}
        assert frames.shape == (80, 32, 32, 3)
        assert sound.shape == (80_000, 2)
        for second in range(SECONDS):
            inside = film.start_seconds <= second < film.end_seconds
            kind = "event" if inside else film.before if second < film.start_seconds else film.after
            seen.add(kind)
            picture, source = {
                "event": (film.event, film.event),
                "other sound": (film.event, film.others[0]),
                "other picture": (film.others[0], film.event),
                "neither": film.others,
            }[kind]
            at = slice(8 * second, 8 * second + 8)
            assert np.array_equal(frames[at], clips[picture][0][at])
            # Away from the fades of 160 samples.
            at = slice(8000 * second + 160, 8000 * second + 7840)
            np.testing.assert_array_equal(sound[at], clips[source][1][at])
        assert np.abs(sound[:: 8000 * SECONDS]).max() == 0
    assert seen == {"event", *BACKGROUNDS}


def test_the_lists_are_those_of_ave_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    config = replace(SMALL, clip_count=10)
    films = tmp_path / "world" / "AVE"
    told: list[tuple[str, int, int]] = []
    write_localised_world(config, tmp_path / "world", workers=1, progress=lambda *done: told.append(done))
    assert told[-1] == ("films", 10, 10)
    first = {path.name: path.read_bytes() for path in films.iterdir()}
    assert len(first) == 10
    lines = (tmp_path / "world" / "Annotations.txt").read_text().splitlines()
    film = describe_film(config, 3)
    assert lines[3] == f"{film.label}&film_000003&good&{film.start_seconds}&{film.end_seconds}"
    parts = [(tmp_path / "world" / f"{name}Set.txt").read_text().splitlines() for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [7, 1, 2]
    assert sorted(line for part in parts for line in part) == sorted(lines)
    (films / "film_000004.mp4").unlink()
    (films / "film_000005.mp4").write_bytes(b"kept")
    write_localised_world(config, tmp_path / "world", workers=1)
    again = {path.name: path.read_bytes() for path in films.iterdir()}
    assert again == first | {"film_000005.mp4": b"kept"}


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_count must be at least 3 and duplicate_share 0, got 2"):
        write_localised_world(replace(SMALL, class_count=2), tmp_path, workers=1)
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        write_localised_world(SMALL, tmp_path, workers=-1)
    (tmp_path / "Annotations.txt").write_text("Bark&film&good&0&10\n")
    with pytest.raises(ValueError, match="must be new or hold the same films"):
        write_localised_world(SMALL, tmp_path, workers=1)
    with pytest.raises(ValueError, match="index must be at least 0"):
        describe_film(SMALL, -1)
