"""From the fields of the page to an answer: filters, queries from the index, and what cannot be searched with."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from cmacc.app.listing import IndexFiles
from cmacc.app.opened import AppError, Opened, open_target
from cmacc.app.queries import Asked, AskError, Picked, Uploaded, Words, ask, where_of
from cmacc.clips import MediaError
from cmacc.pretraining import PretrainConfig, start_run
from cmacc.search import Index, SearchError, WindowTable

from ..clips.films import write_film
from ..search.made import make_index
from ..search.scenes import write_scenes
from .conftest import World

NAMES = (
    "a.mp4",
    "A_b.mp4",
    "a%b.mp4",
    "it's.mp4",
    "50%_off'.mp4",
    'say "a".mp4',
    "back\\slash.mp4",
    "Ärger ß.mp4",
    "z.mp4",
)
LABELS = ("dog", "O'Hara", "50%", 'the "x"', None)


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of films with names and labels that mean something in SQL."""
    rng = np.random.default_rng(0)
    films = {name: {"video": rng.standard_normal((2, 8))} for name in NAMES}
    labels = dict(zip(NAMES, itertools.cycle(LABELS), strict=False))
    return make_index(tmp_path_factory.mktemp("odd") / "odd.index", films, labels=labels)


@pytest.mark.parametrize(
    "text", ["", "a", "A", "%", "_", "'", "''", '"', "\\", "b.MP4", "ärger", "ẞ", "x' OR '1'='1", ")"]
)
@pytest.mark.parametrize("labels", [(), ("dog",), ("O'Hara", "50%"), ('the "x"',), ("none') OR (true",)])
def test_filters_are_what_they_say(odd_names: Path, text: str, labels: tuple[str, ...]) -> None:
    table = WindowTable(odd_names)
    rows = table.columns("path", "label").to_pylist()
    expected = {
        row["path"] for row in rows if text.lower() in row["path"].lower() and (not labels or row["label"] in labels)
    }
    found = table.columns("path", where=where_of(labels, text)).column("path").to_pylist()
    assert set(found) == expected


def test_files_are_listed_by_a_part_of_their_name(odd_names: Path) -> None:
    files = IndexFiles(WindowTable(odd_names))
    assert files.labels() == sorted(label for label in LABELS if label is not None)
    for text in ("", "a", "%", "_", "'", "\\", "(", "none"):
        expected = sorted(name for name in NAMES if text.lower() in name.lower())
        found, count = files.matching(text, 3)
        assert count == len(expected)
        assert [file.path for file in found] == expected[:3]


def test_a_part_of_an_upload_finds_its_place(world: World, opened: Opened) -> None:
    assert opened.index is not None
    asked = Asked(Uploaded(world.film(1)), 4.5, 7.5, by="audio", into="video", top=3, nearest=True)
    first = ask(opened.index, asked).answer.moments[0]
    assert Path(first.path) == world.film(1)
    assert (first.start_seconds, first.end_seconds) == pytest.approx((4.0, 8.0), abs=0.6)


@pytest.mark.parametrize("by", [None, "video", "audio"])
def test_a_file_of_the_index_is_searched_for_as_if_it_were_uploaded(
    world: World, opened: Opened, by: str | None
) -> None:
    assert opened.index is not None
    picked = Asked(Picked("odd/film-3.mp4"), 4.0, 8.0, by=by, nearest=True)  # type: ignore[arg-type]
    uploaded = Asked(Uploaded(world.film(3)), 4.0, 8.0, by=by, nearest=True)  # type: ignore[arg-type]
    found, expected = (ask(opened.index, asked).answer for asked in (picked, uploaded))
    assert found.best_score == pytest.approx(expected.best_score, abs=2e-3)  # vectors are kept in float16
    assert found.moments[0].path == expected.moments[0].path == str(world.film(3))
    assert found.moments[0].start_seconds == pytest.approx(expected.moments[0].start_seconds, abs=0.1)


def test_a_file_of_the_index_needs_no_file(odd_names: Path) -> None:
    found = ask(Index.open(odd_names), Asked(Picked("it's.mp4"), 0.0, 2.0, nearest=True, name_contains="'")).answer
    assert Path(found.moments[0].path).name == "it's.mp4"
    assert found.best_score == pytest.approx(1.0, abs=1e-3)
    assert all("'" in moment.path for moment in found.moments)


def test_words_find_their_scene(world: World, opened: Opened) -> None:
    assert opened.index is not None
    words = "scene " + "".join(map(str, world.scenes[4]))
    first = ask(opened.index, Asked(Words(words), into="video", nearest=True)).answer.moments[0]
    assert Path(first.path) == world.film(1)
    assert first.start_seconds == pytest.approx(4.0, abs=0.6)


def test_an_index_too_small_to_tell_shows_the_nearest_and_says_so(world: World, opened: Opened) -> None:
    assert opened.index is not None
    found = ask(opened.index, Asked(Uploaded(world.film(0))))
    assert found.is_nearest
    assert found.by == ("video", "audio")
    assert found.answer.least_rate > 0.01
    nearest = ask(opened.index, Asked(Uploaded(world.film(0)), nearest=True))
    assert found.answer.moments == nearest.answer.moments
    assert len(found.answer.moments) > 5


def test_what_cannot_be_searched_with(world: World, opened: Opened, tmp_path: Path) -> None:
    index = opened.index
    assert index is not None
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "picture.jpg").write_bytes(world.film(0).read_bytes()[:1000])
    write_film(tmp_path / "quiet.m4a", None, np.zeros(32_000, np.float32))
    write_film(tmp_path / "long.mp4", np.zeros((6_100, 16, 16, 3), np.uint8), None)
    write_scenes(tmp_path / "silent.mp4", [(world.scenes[0], 3.0)], has_sound=False)

    def wrong(match: str, query: Uploaded | Picked | Words, *times: float | None, **fields: object) -> None:
        with pytest.raises((AskError, SearchError, MediaError), match=match) as caught:
            ask(index, Asked(query, *times, **fields))  # type: ignore[arg-type]
        if isinstance(caught.value, AskError):
            assert str(tmp_path) not in str(caught.value)

    wrong(r"^empty\.mp4 is empty \(does not decode", Uploaded(tmp_path / "empty.mp4"))
    wrong(r"^text\.wav is no video, sound or picture, or is damaged \(does not", Uploaded(tmp_path / "text.wav"))
    wrong(r"^picture\.jpg is no video, sound or picture, or is damaged", Uploaded(tmp_path / "picture.jpg"))
    wrong(r"^gone\.mp4 is gone", Uploaded(tmp_path / "gone.mp4"))
    wrong(r"must have a picture or a sound that can be heard, got silence", Uploaded(tmp_path / "quiet.m4a"))
    wrong(r"^long\.mp4: must last at most 10 minutes, got 10\.2", Uploaded(tmp_path / "long.mp4"))
    wrong(
        r"must have a sound to search with it, got a file without sound", Uploaded(tmp_path / "silent.mp4"), by="audio"
    )
    wrong(r"“from” must come before “to”, and both lie in its 12\.0 s, got 5 and 3", Uploaded(world.film(0)), 5.0, 3.0)
    wrong(r"both lie in its 12\.0 s, got 20 and 12", Uploaded(world.film(0)), 20.0)
    wrong(r"must be seconds from 0 on, got nan", Uploaded(world.film(0)), float("nan"))
    wrong(r"“from” must come before “to”", Picked("odd/film-1.mp4"), 3.0, 3.0)
    wrong(r"got nothing of it in the index", Picked("nothing.mp4"))
    wrong(r"got no sound of it in the index", Picked("other/silent.mp4"), by="audio")
    wrong(r"Type a few words", Words(""))
    wrong(r"must be 1 to 100, got 0", Words("x"), top=0)
    wrong(r"^No file of the index fits", Picked("odd/film-1.mp4"), name_contains="nowhere")
    wrong(r"“from” must lie in its 12\.0 s, got 500", Picked("odd/film-1.mp4"), 500.0)
    wrong(r"at most 500 characters, got 501", Words("x" * 501))


def test_what_can_be_opened(world: World, small_config: PretrainConfig, tmp_path: Path) -> None:
    opened = open_target(str(world.index))
    assert opened.name == "films.index"
    assert opened.index is not None
    assert opened.run_dir is None
    name = opened.library.id_of(world.film(0))
    assert opened.library.source(name) == world.film(0).resolve()

    run = tmp_path / "run"
    start_run(small_config, run)
    of_run = open_target(str(run))
    assert (of_run.index, of_run.run_dir) == (None, run)
    clip = min((small_config.data.manifest.parent / "world").rglob("*.mp4"))
    assert of_run.library.source(of_run.library.id_of(clip)) == clip.resolve()
    with pytest.raises(MediaError, match="outside of it"):  # beside the clips, and not in their folders
        of_run.library.source(of_run.library.id_of(small_config.data.manifest))

    for address, got in (
        (tmp_path / "none", "nothing there"),
        (tmp_path, "a folder that is neither"),
        (world.film(0), "a file"),
    ):
        with pytest.raises(AppError, match=rf"must be an index .* or a run folder .*, got {got}"):
            open_target(str(address))
    with pytest.raises(AppError, match="--encoder is for an index, got a run folder"):
        open_target(str(run), encoder="other")
    with pytest.raises(AppError, match="no index there"):
        open_target("memory://nothing")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "description.json").write_text("{")
    with pytest.raises(AppError, match=r"description\.json is damaged"):
        open_target(str(tmp_path / "damaged"))
