"""A folder of films of many kinds, an index of it, and the page of that index."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cmacc.app.library import Library
from cmacc.app.opened import Opened
from cmacc.search import Index, embed_files

from ..search.scenes import SceneEncoder, random_scenes, write_scenes

FILMS, SCENES, SECONDS = 6, 3, 4.0


@dataclass(frozen=True)
class World:
    """Films ``films/{even,odd}/film-N.mp4`` of three scenes of four seconds, and three files of other kinds."""

    films: Path
    index: Path
    scenes: list[list[int]]

    def film(self, number: int) -> Path:
        return self.films / ("odd" if number % 2 else "even") / f"film-{number}.mp4"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("app")
    films = folder / "films"
    scenes = random_scenes(FILMS * SCENES + 12)
    made = World(films, folder / "films.index", scenes)
    for number in range(FILMS):
        own = scenes[number * SCENES : (number + 1) * SCENES]
        write_scenes(made.film(number), [(bits, SECONDS) for bits in own])
    others = scenes[FILMS * SCENES :]
    write_scenes(films / "other" / "old film.avi", [(bits, SECONDS) for bits in others[:2]])
    write_scenes(films / "other" / "sound.m4a", [(bits, SECONDS) for bits in others[2:4]], has_picture=False)
    write_scenes(films / "other" / "silent.mp4", [(bits, SECONDS) for bits in others[4:6]], has_sound=False)
    embed_files(SceneEncoder(), films, made.index)
    return made


@pytest.fixture
def opened(world: World) -> Opened:
    return Opened("films.index", Library([world.films]), Index.open(world.index, encoder=SceneEncoder()), None)


@pytest.fixture
def moved_films(world: World, tmp_path: Path) -> Iterator[Path]:
    """A copy of the films that a test may change."""
    yield Path(shutil.copytree(world.films, tmp_path / "films"))
