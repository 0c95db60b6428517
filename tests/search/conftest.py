"""A folder of films of scenes, and an index of it."""

from pathlib import Path

import pytest

from cmacc.search import EmbedResult, embed_files

from .scenes import SceneEncoder, random_scenes, write_scenes

# Twelve films of six scenes of five seconds each, all different.
FILMS, SCENES, SECONDS = 12, 6, 5.0


@pytest.fixture(scope="session")
def scenes() -> list[list[int]]:
    return random_scenes(FILMS * SCENES + 20)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory, scenes: list[list[int]]) -> Path:
    """``film-00.mp4`` and so on; nothing may change them."""
    folder = tmp_path_factory.mktemp("scenes") / "films"
    for number in range(FILMS):
        own = scenes[number * SCENES : (number + 1) * SCENES]
        write_scenes(folder / f"film-{number:02}.mp4", [(bits, SECONDS) for bits in own])
    return folder


@pytest.fixture(scope="session")
def built(films: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbedResult]:
    """An index of the films, for reading, and what the run that made it said."""
    index = tmp_path_factory.mktemp("index") / "films.index"
    return index, embed_files(SceneEncoder(), films, index)
