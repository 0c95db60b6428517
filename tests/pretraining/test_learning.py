"""Does the whole chain learn what there is to learn, and nothing where there is nothing?"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cmacc.ablation.run import run_cell
from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.clips import AugmentConfig, ClipSpec, Manifest, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.encoders import EncoderConfig
from cmacc.pretraining import (
    DataConfig,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    pretrain,
    start_run,
)
from cmacc.transfer import embed, open_encoder, ranks


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("learning")
    world = WorldConfig(clip_count=240, class_count=8, nuisance=0.0, frame_size=32, duration_seconds=2.0)
    write_world(world, folder / "world", workers=1)
    scan(list_folders([folder / "world"]), test_fraction=0.25).manifest.write(folder / "manifest.parquet")
    return PretrainConfig(
        data=DataConfig(
            manifest=folder / "manifest.parquet",
            clip=ClipSpec(frame_count=6, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=1.5),
            augment=AugmentConfig(min_crop_area=0.8, grey_probability=0.0, gain_db=3.0),
            clips_per_video=2,  # opening and decoding files would be most of this test's time
            workers=0,
        ),
        encoder=EncoderConfig(mel_bins=40, hidden_size=128, embedding_size=64),
        dictionary=DictionaryConfig(selector="active", size=32, pool_size=128, refresh="none"),
        optim=OptimConfig(batch_size=16, steps=110, warmup_steps=20),
        save_every=110,
    )


def mean_rank_in_standard_errors(run_dir: Path, config: PretrainConfig) -> tuple[float, int]:
    """How far the mean rank of a held-out clip's sound lies from chance, and among how many clips.

    Under chance a rank is uniform on 1..n: mean (n + 1) / 2, variance (n^2 - 1) / 12. Both directions are pooled as if
    they were one, so the standard error is that of n independent ranks.
    """
    manifest = Manifest.read(config.data.manifest)
    held_out = manifest.ids_where(lambda record: record.split == "test")
    matched = embed(open_encoder(str(run_dir)).encoder, manifest, held_out, ["video", "audio"]).matched_by_file()
    video, audio = matched["video"], matched["audio"]
    count = len(video)
    both_ways = np.concatenate([ranks(video, audio), ranks(audio, video)])
    error = np.sqrt((count**2 - 1) / 12 / count)
    return float((both_ways.mean() - (count + 1) / 2) / error), count


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")  # for speed: other tests of the loop have the shape checks
@pytest.mark.parametrize("shuffled", [False, True])
def test_retrieval_is_far_above_chance_and_at_chance_when_pairs_are_shuffled(
    config: PretrainConfig, tmp_path: Path, shuffled: bool
) -> None:
    data = dataclasses.replace(config.data, shuffle_pairs=shuffled)
    start_run(dataclasses.replace(config, data=data), tmp_path)
    pretrain(tmp_path)
    errors, count = mean_rank_in_standard_errors(tmp_path, config)
    assert count == 60
    if shuffled:
        assert abs(errors) < 4  # p < 1e-4 under chance
    else:
        assert errors < -6


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
def test_the_default_beats_the_plain_queue_on_near_classes() -> None:
    """Sign test over five worlds of 40 classes that lie near each other, at equal steps: five of five, p = 1/32.

    The queue costs about twice the time of these steps, and is not even given the less.
    """
    world = VectorWorld(samples=512, held_out=512, classes=40, spread=0.4, zipf_exponent=0.0)
    default = PretrainConfig(
        encoder=EncoderConfig(head="linear", embedding_size=64), optim=OptimConfig(batch_size=16, steps=180)
    )
    queue = dataclasses.replace(
        default,
        dictionary=DictionaryConfig(selector="newest", size=256, pool_size=256),
        objective=ObjectiveConfig(decoupled=False),
    )
    for seed in range(5):
        dataset = VectorDataset(world, seed, torch.device("cpu"))
        found = [
            run_cell(dataset, dataclasses.replace(config, seed=seed), points=1)[-1].metrics["R@10"]
            for config in (default, queue)
        ]
        assert found[0] > found[1], seed
