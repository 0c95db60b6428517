"""Search against brute force and against what was planted in films."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmacc.clips import MediaError
from cmacc.search import EmbedResult, Index, Query, SearchError, query_of_file
from cmacc.search import writer as writer_module

from ..clips.films import write_film
from .conftest import FILMS, SCENES, SECONDS
from .scenes import RATE_HZ, SceneEncoder, write_scenes

Built = tuple[Path, EmbedResult]
# Twelve films of half a minute cannot hold a lower one.
RATE = 0.05


@pytest.fixture(scope="module")
def index(built: Built) -> Index:
    return Index.open(built[0], encoder=SceneEncoder())


@pytest.mark.parametrize("into", ["audio", "video"])
def test_a_sound_finds_its_scene_with_start_and_end(
    index: Index, scenes: list[list[int]], tmp_path: Path, into: str
) -> None:
    number = 27  # film 4, scene 3: 15 s to 20 s
    sound = write_scenes(tmp_path / "query.m4a", [(scenes[number], 3.0)], has_picture=False)
    answer = index.search(sound, into=into, false_alarm_rate=RATE)
    first = answer.moments[0]
    assert (Path(first.path).name, first.modality, first.by) == ("film-04.mp4", into, "audio")
    assert first.start_seconds == pytest.approx(15, abs=1.5)
    assert first.end_seconds == pytest.approx(20, abs=1.5)
    assert first.percentile > 99
    assert len(answer.moments) < 5


def test_scores_are_those_of_brute_force_and_percentiles_those_of_all_pairs(
    index: Index, films: Path, tmp_path: Path
) -> None:
    clip = films / "film-07.mp4"
    answer = index.search(clip, at_seconds=12.5, by="audio", into="video", top=3, false_alarm_rate=1.0)
    vector = next(iter(query_of_file(SceneEncoder(), clip, 1.0, at_seconds=12.5, by="audio").vectors.values()))
    table = index.table.columns("path", "start_seconds", "modality", "vector").to_pylist()
    audio = [row for row in table if row["modality"] == "audio"]
    video = {
        (row["path"], row["start_seconds"]): float(np.dot(np.float64(row["vector"]), np.float64(vector)))
        for row in table
        if row["modality"] == "video"
    }
    best = max(video, key=lambda place: video[place])
    assert best[0] == "film-07.mp4"
    assert answer.moments[0].score == pytest.approx(video[best], abs=2e-3)
    pairs = np.array(
        [
            np.dot(np.float64(one["vector"]), np.float64(other["vector"]))
            for one in audio
            for other in table
            if other["modality"] == "video"
            and (one["path"] != other["path"] or abs(one["start_seconds"] - other["start_seconds"]) >= 10)
        ]
    )
    # Scores are nearly discrete here, so that rounding moves many pairs from one side to the other.
    last = answer.moments[-1]
    low, high = (100 * (pairs < last.score + shift).mean() for shift in (-0.02, 0.02))
    assert low - 1 <= last.percentile <= high + 1


def test_a_sound_that_is_not_there_gives_nothing(index: Index, scenes: list[list[int]], tmp_path: Path) -> None:
    unseen = write_scenes(tmp_path / "unseen.m4a", [(scenes[FILMS * SCENES + 3], 3.0)], has_picture=False)
    answer = index.search(unseen, into="video", false_alarm_rate=RATE)
    assert answer.moments == ()
    assert answer.notes == ()
    assert answer.chance > RATE
    (note,) = index.search(unseen).notes
    assert "takes more videos than the index has" in note
    assert note.endswith("the lowest that it can hold, for 2 searches by and in picture or sound, is 0.054")
    shown = index.search(unseen, false_alarm_rate=1.0, top=4)
    assert len(shown.moments) == 4
    assert shown.moments[0].score <= answer.best_score + 1e-6


def test_nothing_found_at_the_stated_rate_for_scenes_that_are_not_there(index: Index, scenes: list[list[int]]) -> None:
    """All 20 scenes outside of the films: more than 4 found has probability 0.003 at a rate of 5 %."""
    unseen = np.array(scenes[FILMS * SCENES :]) * 2.0 - 1
    vectors = (unseen / np.linalg.norm(unseen, axis=1, keepdims=True)).astype(np.float32)
    queries = [Query({("audio", None): vector}) for vector in vectors]
    answers = [index.search_vectors(query, into="video", false_alarm_rate=RATE) for query in queries]
    assert sum(bool(answer.moments) for answer in answers) <= 4


def test_a_film_finds_itself_by_picture_and_sound(index: Index, films: Path) -> None:
    answer = index.search(films / "film-02.mp4", window=(5.0, 10.0), false_alarm_rate=0.15)
    moment = answer.moments[0]
    assert Path(moment.path) == films / "film-02.mp4"
    assert moment.start_seconds == pytest.approx(5, abs=1)
    assert moment.end_seconds == pytest.approx(10, abs=1)
    # Its picture and its sound were found by both, in one place.
    assert [one for one in answer.moments if (one.path, one.start_seconds) == (moment.path, moment.start_seconds)] == [
        moment
    ]
    places = [(one.path, one.start_seconds, one.end_seconds) for one in answer.moments]
    for place, (path, start, end) in enumerate(places):
        assert all(path != other or end <= begin or stop <= start for other, begin, stop in places[place + 1 :])


def test_a_png_is_a_still_clip(index: Index, scenes: list[list[int]], tmp_path: Path) -> None:
    tiles = np.kron(np.array(scenes[8], np.uint8).reshape(3, 3) * 200 + 25, np.ones((40, 40), np.uint8))
    Image.fromarray(np.repeat(tiles[..., None], 3, axis=2)).save(tmp_path / "scene.png")
    answer = index.search(tmp_path / "scene.png", into="audio", false_alarm_rate=RATE)
    assert Path(answer.moments[0].path).name == "film-01.mp4"
    assert answer.moments[0].start_seconds == pytest.approx(10, abs=1)
    assert "does not move" in answer.notes[0]


def test_a_cover_picture_is_not_searched_for(built: Built, scenes: list[list[int]], tmp_path: Path) -> None:
    song = tmp_path / "song.mp3"
    write_scenes(tmp_path / "song.m4a", [(scenes[30], 3.0)], has_picture=False)
    _with_cover(tmp_path / "song.m4a", song)
    query = query_of_file(SceneEncoder(), song, 1.0)
    assert list(query.vectors) == [("audio", None)]
    answer = Index.open(built[0], encoder=SceneEncoder()).search(
        song, at_seconds=1.5, into="audio", false_alarm_rate=RATE
    )
    assert Path(answer.moments[0].path).name == "film-05.mp4"


def _with_cover(sound: Path, song: Path) -> None:
    """An .mp3 with a cover picture."""
    import av
    from av.stream import Disposition

    with av.open(str(sound)) as source, av.open(str(song), "w") as target:
        audio = target.add_stream("libmp3lame", rate=RATE_HZ * 2)
        cover = target.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "rgb24", Disposition.attached_pic
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE_HZ * 2)
        frames = [out for frame in source.decode(audio=0) for out in resampler.resample(frame)]
        picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 200, np.uint8), format="rgb24")
        target.mux([*cover.encode(picture), *cover.encode(None)])
        for frame in frames:
            target.mux(audio.encode(frame))
        target.mux(audio.encode(None))


def test_silence_is_not_searched_for(index: Index, scenes: list[list[int]], tmp_path: Path) -> None:
    silent = write_scenes(tmp_path / "silent.mp4", [(scenes[3], 3.0)], has_sound=False)
    assert {moment.by for moment in index.search(silent, false_alarm_rate=0.1).moments} == {"video"}
    with pytest.raises(SearchError, match=r"must have audio to search by it, got a file that is without sound"):
        index.search(silent, by="audio")
    muted = write_film(tmp_path / "muted.m4a", None, np.zeros(3 * RATE_HZ, np.float32), rate_hz=RATE_HZ)
    with pytest.raises(SearchError, match="got silence"):
        index.search(muted)


def test_text_is_compared_with_what_the_encoder_says(index: Index, scenes: list[list[int]]) -> None:
    answer = index.search(text="scene " + "".join(map(str, scenes[40])))
    assert {(moment.by, moment.modality) for moment in answer.moments} == {("text", "video")}
    assert Path(answer.moments[0].path).name == f"film-{40 // SCENES:02}.mp4"
    assert answer.moments[0].start_seconds == pytest.approx(40 % SCENES * SECONDS, abs=1)
    assert index.search(text="a thing that is nowhere").moments == ()
    with pytest.raises(SearchError, match="must have windows of audio"):
        index.search(text="a", into="audio")


def test_where_restricts_the_search(index: Index, films: Path) -> None:
    clip = films / "film-03.mp4"
    found = index.search(clip, at_seconds=2.5, where="path <> 'film-03.mp4'", false_alarm_rate=1.0, top=50)
    assert found.moments
    assert all(Path(moment.path).name != "film-03.mp4" for moment in found.moments)
    late = index.search(clip, at_seconds=2.5, into="video", where="start_seconds >= 10", false_alarm_rate=1.0)
    assert all(moment.end_seconds > 10 for moment in late.moments)
    with pytest.raises(SearchError, match=r"--where is not a valid condition: .*labl"):
        index.search(clip, where="labl = 3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"into": "smell"}, "must be in audio, video or both, got 'smell'"),
        ({"top": 0}, "top must be at least 1"),
        ({"false_alarm_rate": 0.0}, r"must be in \(0, 1\], got 0"),
        ({"text": "a"}, "a file or a text, got both"),
        ({"window": (30.0, 30.05)}, "--window must be two times"),
        ({"at_seconds": 99.0}, r"--at must be in \[0, 30.00\]"),
        ({"window": (8.0, 3.0)}, "--window must be two times"),
    ],
)
@pytest.mark.usefixtures("users_checks")
def test_bad_arguments_say_what_was_wanted(index: Index, films: Path, arguments: dict, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        index.search(films / "film-00.mp4", **arguments)


@pytest.mark.usefixtures("users_checks")
def test_options_that_have_no_effect_are_refused(index: Index, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(SearchError, match="choose a part of a video or a sound, got an image"):
        index.search(tmp_path / "black.png", at_seconds=0.0)
    with pytest.raises(SearchError, match="choose a part of a file, got a text"):
        index.search(text="a", by="video")


def test_a_broken_or_missing_query_is_named(index: Index, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no film" * 100)
    with pytest.raises(MediaError, match=r"broken\.mp4"):
        index.search(tmp_path / "broken.mp4")
    with pytest.raises(MediaError, match="no such file"):
        index.search(tmp_path / "nothing.mp4")


def test_another_encoder_is_refused(built: Built, films: Path) -> None:
    with pytest.raises(SearchError, match=r"must have weights \w+, those of the index, got \w+ of SceneEncoder"):
        Index.open(built[0], encoder=SceneEncoder(scale=2.0)).search(films / "film-00.mp4")
    with pytest.raises(SearchError, match="say where it is with --encoder"):
        Index.open(built[0]).search(films / "film-00.mp4")


def test_no_index_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="make one with cmacc embed"):
        Index.open(tmp_path / "nothing")
    (tmp_path / "description.json").write_text("{}")
    with pytest.raises(SearchError, match=r"description.json is damaged"):
        Index.open(tmp_path)
    (tmp_path / "description.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(SearchError, match="another version of cmacc"):
        Index.open(tmp_path)


def test_a_large_index_answers_as_exact_search_does(
    films: Path, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of exact search set to 100 rows: the approximate index of LanceDB, its segments and its calibration."""
    from cmacc.search import embed_files

    monkeypatch.setattr(writer_module, "EXACT_ROWS", 100)
    result = embed_files(SceneEncoder(), films, tmp_path / "large.index")
    near = result.description.approximate
    assert near is not None
    assert near.recall_at_10 >= 0.95
    large, exact = (
        Index.open(tmp_path / "large.index", encoder=SceneEncoder()),
        Index.open(built[0], encoder=SceneEncoder()),
    )
    assert large.search(films / "film-09.mp4", at_seconds=12.5, false_alarm_rate=0.15).moments, "four searches"
    ask = {"at_seconds": 12.5, "into": "video", "by": "audio", "top": 1, "false_alarm_rate": RATE}
    (ours,), (theirs,) = (one.search(films / "film-09.mp4", **ask).moments for one in (large, exact))
    assert (ours.path, ours.start_seconds, ours.end_seconds) == (
        theirs.path,
        pytest.approx(theirs.start_seconds, abs=0.2),
        pytest.approx(theirs.end_seconds, abs=0.2),
    )
    assert ours.score == pytest.approx(theirs.score, abs=1e-6)
    # Nothing is gained or lost by growing further: new rows are found, too.
    assert embed_files(SceneEncoder(), films, tmp_path / "large.index").kept == FILMS
