"""A folder of films of many kinds, an index of it, and the page of that index."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cmacc.app.library import Library
from cmacc.app.opened import Opened, open_target
from cmacc.clips import Manifest
from cmacc.pretraining import DictionaryConfig, PretrainConfig, pretrain, start_run
from cmacc.search import Index, embed_files

from ..search.scenes import SceneEncoder, random_scenes, write_scenes

FILMS, SCENES, SECONDS = 6, 3, 4.0
EVIL_LABEL = "</script><script>document.title = 'evil'</script> & \"quoted\" 'too'"
EVIL_FILE = "<img src=x onerror=\"document.title = 'evil'\">.mp4"


@dataclass(frozen=True)
class World:
    """Films ``films/{even,odd}/film-N.mp4`` of three scenes of four seconds, and three files of other kinds."""

    films: Path
    index: Path
    scenes: list[list[int]]

    def film(self, number: int) -> Path:
        return self.films / ("odd" if number % 2 else "even") / f"film-{number}.mp4"


def unlike_neighbours(scenes: list[list[int]]) -> list[list[int]]:
    """The same scenes in an order in which each differs much from the one before: borders are then clear."""
    left, ordered = scenes[1:], scenes[:1]
    while left:
        ordered.append(max(left, key=lambda one: sum(a != b for a, b in zip(one, ordered[-1], strict=True))))
        left.remove(ordered[-1])
    return ordered


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("app")
    films = folder / "films"
    scenes = unlike_neighbours(random_scenes(FILMS * SCENES + 12))
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
def moved_films(world: World, tmp_path: Path) -> Path:
    """A copy of the films that a test may change."""
    return Path(shutil.copytree(world.films, tmp_path / "films"))


@pytest.fixture(scope="session")
def trained_run(small_config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with random embeddings of its clips; one has a name and a label that would be markup."""
    folder = tmp_path_factory.mktemp("run")
    records = list(Manifest.read(small_config.data.manifest).records)[:24]
    evil = folder / "films" / EVIL_FILE
    evil.parent.mkdir()
    shutil.copy(records[3].path, evil)
    records[3] = dataclasses.replace(records[3], path=evil, label=EVIL_LABEL)
    Manifest(records).write(folder / "manifest.parquet")
    config = dataclasses.replace(
        small_config,
        data=dataclasses.replace(small_config.data, manifest=folder / "manifest.parquet"),
        dictionary=DictionaryConfig(selector="none"),
        optim=dataclasses.replace(small_config.optim, steps=2, warmup_steps=1),
    )
    run_dir = folder / "first run"
    start_run(config, run_dir)
    assert pretrain(run_dir).finished
    rng = np.random.default_rng(0)
    video, audio = (rng.normal(size=(24, 8)).astype(np.float32) for _ in range(2))
    save_file(
        {
            "video": video / np.linalg.norm(video, axis=1, keepdims=True),
            "audio": audio / np.linalg.norm(audio, axis=1, keepdims=True),
            "sample_ids": np.arange(24)[::-1].copy(),
            "start_seconds": np.linspace(0.1, 0.5, 24),
        },
        run_dir / "embeddings.safetensors",
    )
    return run_dir


@pytest.fixture
def run_dir(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "first run"))


@pytest.fixture
def opened_run(run_dir: Path) -> Opened:
    return open_target(str(run_dir))
