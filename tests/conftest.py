"""Shared by all tests: shapes are checked at run time, randomness is left as found, real data has one way in."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# CI has two cores and many small tests: one thread a process is faster, and results do not depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

install_import_hook("cmacc", "beartype.beartype")

import hypothesis
import jaxtyping
import pytest
import torch

if TYPE_CHECKING:
    from cmacc.pretraining import PretrainConfig

# On a machine whose cores others use too, any example may take a second.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "real"


@pytest.fixture(autouse=True)
def _same_randomness() -> Iterator[None]:
    """Every test begins from the same global random state and leaves it as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _same_scheduling() -> Iterator[None]:
    """No test leaves the process under real-time scheduling, which would starve the others (see `write_media`)."""
    yield
    assert sys.platform != "linux" or os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture
def users_checks() -> Iterator[None]:
    """Without the shape checks of the tests, which would answer bad input before the checks that users have."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """``../shared/data/real``; skips where it is not there, which in CI is a failure."""
    if not REAL_DATA.is_dir():
        assert "CI" not in os.environ, f"CI must have the real data, but {REAL_DATA} is missing"
        pytest.skip(f"the real data is not on this machine ({REAL_DATA})")
    return REAL_DATA


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 48 clean clips of 4 classes, a quarter of them held out."""
    from cmacc.clips import list_folders, scan
    from cmacc.clips.synthetic import WorldConfig, write_world

    folder = tmp_path_factory.mktemp("small")
    world = WorldConfig(clip_count=48, class_count=4, nuisance=0.0, frame_size=48, duration_seconds=2.0)
    write_world(world, folder / "world", workers=1)
    scan(list_folders([folder / "world"]), test_fraction=0.25).manifest.write(folder / "manifest.parquet")
    return folder / "manifest.parquet"


@pytest.fixture(scope="session")
def small_config(small_world: Path) -> "PretrainConfig":
    """A run of 12 steps on the small world, with the active dictionary, that takes a few seconds."""
    from cmacc.clips import ClipSpec
    from cmacc.encoders import EncoderConfig
    from cmacc.pretraining import DataConfig, DictionaryConfig, OptimConfig, PretrainConfig

    return PretrainConfig(
        data=DataConfig(
            manifest=small_world,
            clip=ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=1.0),
            workers=0,
        ),
        encoder=EncoderConfig(mel_bins=32, hidden_size=32, embedding_size=16),
        dictionary=DictionaryConfig(
            selector="active", size=16, pool_size=24, refresh="none"
        ),  # tests of refreshing ask for it
        optim=OptimConfig(batch_size=8, steps=12, warmup_steps=2),
        precision="fp32",
        save_every=5,
        health_every=4,
    )
