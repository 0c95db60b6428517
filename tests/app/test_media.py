"""What the routes of media answer, and what they refuse."""

import io
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
import pytest
from fastapi import FastAPI
from matplotlib.image import imread
from starlette.testclient import TestClient

from cmacc.app.library import Library
from cmacc.app.media import Kept, media_routes
from cmacc.app.opened import Opened
from cmacc.app.playable import look_at
from cmacc.clips import list_folders, pack, probe, scan
from cmacc.clips.catalog.manifest import Manifest
from cmacc.search import Index

from ..clips.films import moving_picture, write_film
from ..search.test_localise import RedIsLoud, write_red_film
from .conftest import World


@pytest.fixture
def client(opened: Opened) -> TestClient:
    return client_of(opened)


def client_of(opened: Opened) -> TestClient:
    app = FastAPI()
    app.include_router(media_routes(opened))
    return TestClient(app)


def address(opened: Opened, path: Path, rest: str = "") -> str:
    return f"/media/{opened.library.id_of(path)}{rest}"


def test_the_file_itself_with_ranges(world: World, opened: Opened, client: TestClient) -> None:
    content = world.film(1).read_bytes()
    whole = client.get(address(opened, world.film(1)))
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["accept-ranges"] == "bytes"
    some = client.get(address(opened, world.film(1)), headers={"Range": "bytes=100-199"})
    assert (some.status_code, some.content) == (206, content[100:200])
    assert client.get(address(opened, world.film(1)), headers={"Range": "bytes=99999999-"}).status_code == 416


def test_only_what_browsers_decode_is_sent_as_it_is(world: World, tmp_path: Path) -> None:
    """The content counts, not the name."""
    assert look_at(world.film(0)).media_type == "video/mp4"
    assert look_at(world.films / "other" / "sound.m4a").media_type == "audio/mp4"
    assert look_at(world.films / "other" / "old film.avi").media_type is None
    renamed = tmp_path / "renamed.mp4"
    renamed.write_bytes((world.films / "other" / "old film.avi").read_bytes())
    assert look_at(renamed).media_type is None
    for name, codec, pixels, expected in (
        ("a.webm", "libvpx", "yuv420p", "video/webm"),
        ("b.mp4", "mpeg4", "yuv420p", None),
        ("c.mp4", "libx264", "yuv444p", None),
        ("d.mkv", "libx264", "yuv420p", None),
    ):
        with av.open(str(tmp_path / name), "w") as file:
            stream = file.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            for pixel in moving_picture(0.5, size=(48, 64)):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixel, format="rgb24")))
            file.mux(stream.encode(None))
        assert look_at(tmp_path / name).media_type == expected, name


def test_other_files_are_refused_whole_and_converted_in_parts(world: World, opened: Opened, client: TestClient) -> None:
    old = world.films / "other" / "old film.avi"
    refused = client.get(address(opened, old))
    assert refused.status_code == 415
    assert "ask for a part" in refused.text
    part = client.get(address(opened, old, "/part?start=1&end=3"))
    assert part.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(part.content)) as file:
        assert {stream.codec_context.name for stream in file.streams} == {"h264", "aac"}
        assert file.duration / av.time_base == pytest.approx(2.0, abs=0.15)
    some = client.get(address(opened, old, "/part?start=1&end=3"), headers={"Range": "bytes=10-19"})
    assert (some.status_code, some.content) == (206, part.content[10:20])
    assert some.headers["content-range"] == f"bytes 10-19/{len(part.content)}"
    last = client.get(address(opened, old, "/part?start=1&end=3"), headers={"Range": "bytes=-7"})
    assert last.content == part.content[-7:]
    beyond = client.get(address(opened, old, "/part?start=1&end=3"), headers={"Range": f"bytes={len(part.content)}-"})
    assert beyond.status_code == 416


def test_a_part_is_at_most_a_minute(tmp_path: Path) -> None:
    write_film(tmp_path / "long.mp4", np.zeros((700, 16, 16, 3), np.uint8), None)
    opened = Opened("long", Library([tmp_path]), None, None)
    part = client_of(opened).get(address(opened, tmp_path / "long.mp4", "/part?start=2&end=100000"))
    (tmp_path / "part.mp4").write_bytes(part.content)
    assert probe(tmp_path / "part.mp4").duration_seconds == pytest.approx(60.0, abs=0.2)


def test_pictures_of_a_part(world: World, opened: Opened, client: TestClient) -> None:
    strip = client.get(address(opened, world.film(0), "/frames?start=0&end=8"))
    assert strip.headers["content-type"] == "image/jpeg"
    pixels = imread(io.BytesIO(strip.content), format="jpeg").astype(float)
    assert pixels.shape == (120, 640, 3)
    # Frames at 1, 3, 5 and 7 s: two of the first scene, two of the second. A frame is cropped to the middle.
    middles = [pixels[60, 80 + 160 * number, 0] > 125 for number in range(4)]
    assert middles == [bool(world.scenes[number][4]) for number in (0, 0, 1, 1)]
    sound = client.get(address(opened, world.film(0), "/sound?start=0&end=8"))
    assert sound.headers["content-type"] == "image/png"
    drawn = imread(io.BytesIO(sound.content), format="png")
    assert drawn.shape[:2] == (128, 640)
    assert drawn.std() > 0.05
    silent, deaf = world.films / "other" / "silent.mp4", world.films / "other" / "sound.m4a"
    assert client.get(address(opened, silent, "/sound?start=0&end=2")).text == "the file has no sound\n"
    assert client.get(address(opened, deaf, "/frames?start=0&end=2")).text == "the file has no picture\n"


def test_where_the_sound_is(world: World, opened: Opened, client: TestClient, tmp_path: Path) -> None:
    without = client.get(address(opened, world.film(0), "/heat?start=0&end=4"))
    assert without.status_code == 422
    assert without.text.startswith("the encoder of this index gives no map of the picture")
    write_red_film(tmp_path / "red.mp4", seconds=2.0)
    index = Index.open(world.index)
    index.__dict__["encoder"] = RedIsLoud()
    seeing = Opened("red", Library([tmp_path]), index, None)
    heat = client_of(seeing).get(address(seeing, tmp_path / "red.mp4", "/heat?start=0&end=2"))
    assert heat.headers["content-type"] == "image/png"
    assert imread(io.BytesIO(heat.content), format="png").std() > 0.05


def test_packed_samples_play_in_parts(world: World, tmp_path: Path) -> None:
    pack(scan(list_folders([world.films / "even"])).manifest, tmp_path / "packed")
    record = Manifest.read(tmp_path / "packed" / "index.parquet").records[0]
    opened = Opened("packed", Library([tmp_path / "packed"]), None, None)
    name = opened.library.id_of_row(str(record.path), record.key)
    client = client_of(opened)
    assert client.get(f"/media/{name}").status_code == 415  # the shard holds other samples
    assert client.get(f"/media/{name}/part?start=0&end=1").content[4:8] == b"ftyp"
    assert client.get(f"/media/{name}/frames?start=0&end=1").status_code == 200


@pytest.mark.parametrize(
    "numbers",
    ["", "start=1", "start=a&end=2", "start=2&end=1", "start=1&end=1", "start=-1&end=2", "start=nan&end=2",
     "start=0&end=inf", "start=1e400&end=2", "start=100&end=101"],
)  # fmt: skip
def test_numbers_that_make_no_part(world: World, opened: Opened, client: TestClient, numbers: str) -> None:
    for kind in ("part", "frames", "sound"):
        answer = client.get(address(opened, world.film(0), f"/{kind}?{numbers}"))
        if numbers == "start=100&end=101" and kind != "part":
            continue  # beyond the end the last frame stays
        assert answer.status_code == 422, kind
        assert "Traceback" not in answer.text
        assert str(world.films) not in answer.text


def test_nothing_but_ids(world: World, opened: Opened, client: TestClient) -> None:
    for name in ("0" * 24, "..", "%2e%2e", quote(str(world.film(0)), safe=""), "../media", "x" * 5000):
        answer = client.get(f"/media/{name}")
        assert answer.status_code == 404, name
        assert str(world.films) not in answer.text
    assert client.get("/media/x/part?start=0&end=1").text == "there is no such file on this page\n"
    assert client.get(address(opened, Path("/etc/passwd"))).status_code == 410
    assert client.get(address(opened, world.film(0), "/other?start=0&end=1")).status_code in (404, 422)


def test_files_that_went_or_broke(moved_films: Path) -> None:
    opened = Opened("moved", Library([moved_films]), None, None)
    client = client_of(opened)
    first, second = (moved_films / "even" / f"film-{number}.mp4" for number in (0, 2))
    addresses = [address(opened, path, "/frames?start=0&end=1") for path in (first, second)]
    assert client.get(addresses[0]).status_code == 200
    first.write_bytes(b"not a film")
    second.unlink()
    broken, gone = map(client.get, addresses)
    assert broken.status_code == 422
    assert "film-0.mp4: does not decode" in broken.text  # not the kept picture of the old file
    assert (gone.status_code, gone.text) == (410, "film-2.mp4: there is no such file any more\n")
    assert str(moved_films) not in broken.text + gone.text


def test_kept_answers_are_bounded() -> None:
    kept = Kept(100)
    for number in range(20):
        kept.put((number,), bytes(30))
        assert len(kept) <= 100
    assert kept.get((19,)) == bytes(30)
    assert kept.get((0,)) is None
    kept.get((17,))
    kept.put((20,), bytes(30))
    assert kept.get((17,)) is not None  # used a moment ago
    assert kept.get((18,)) is None
    kept.put((21,), bytes(1000))
    assert kept.get((21,)) is None
    assert len(kept) == 0
