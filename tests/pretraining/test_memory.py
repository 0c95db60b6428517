"""The order of an epoch that is made of what samples looked like: kept with the run, the same after a stop."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.clips.loading.plan import epoch_order
from cmacc.encoders import EncoderConfig
from cmacc.pretraining import (
    BatchesConfig,
    ConfigError,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    Trainer,
)
from cmacc.pretraining.checkpoint import load_checkpoint, save_checkpoint
from cmacc.pretraining.table import TableProblem

CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    encoder=EncoderConfig(head="linear", embedding_size=16),
    batches=BatchesConfig(selector="active", group_size=4),
    dictionary=DictionaryConfig(selector="none"),
    objective=ObjectiveConfig(batch_keys="online", decoupled=True),
    optim=OptimConfig(batch_size=8, steps=40),
)
STEPS_PER_EPOCH = 67 // 8


def trainer(config: PretrainConfig = CONFIG) -> Trainer:
    dataset = VectorDataset(VectorWorld(classes=6, samples=67, held_out=16), 0, CPU)
    return Trainer(TableProblem(dataset, config, CPU), config)


def batches_of(run: Trainer, last_step: int) -> list[list[int]]:
    return [done.batch.sample_ids.tolist() for done in run.steps(last_step)]


def test_every_epoch_is_a_permutation_the_first_at_random_the_others_by_the_memory() -> None:
    run = trainer()
    met = batches_of(run, 4 * STEPS_PER_EPOCH)
    for epoch in range(4):
        own = [i for batch in met[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH] for i in batch]
        assert len(set(own)) == len(own) == 64
        assert (own == epoch_order(0, epoch, 67)[:64].tolist()) == (epoch == 0)
    late = dataclasses.replace(CONFIG, batches=dataclasses.replace(CONFIG.batches, start_epoch=2))
    second = batches_of(trainer(late), 2 * STEPS_PER_EPOCH)[STEPS_PER_EPOCH:]
    assert [i for batch in second for i in batch] == epoch_order(0, 1, 67)[:64].tolist()


def test_samples_of_one_group_are_more_alike_than_samples_are() -> None:
    """Of the next epoch's batches, by the memory that it is made of."""
    run = trainer()
    batches_of(run, 2 * STEPS_PER_EPOCH)
    memory = run.learner.memory
    assert memory is not None
    known = memory.known.clone()
    likeness = (memory.video.float() @ memory.audio.float().T + memory.audio.float() @ memory.video.float().T) / 2
    groups = torch.from_numpy(memory.order_of(2).copy()).reshape(-1, 4)
    within = torch.stack([likeness[groups[:, a], groups[:, b]] for a in range(4) for b in range(4) if a != b])
    others = likeness[known][:, known]
    assert within.mean() > others.mean() + 2 * others.std() / 64**0.5


@pytest.mark.parametrize("stop", [3 * STEPS_PER_EPOCH + 3, 3 * STEPS_PER_EPOCH])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_bit_by_bit(tmp_path: Path, stop: int) -> None:
    whole = trainer()
    batches = batches_of(whole, 40)
    first = trainer()
    batches_of(first, stop)
    folder = save_checkpoint(first.learner, tmp_path, stop, 0)
    second = trainer()
    second.next_step = load_checkpoint(second.learner, folder).step
    assert batches_of(second, 40) == batches[stop:]
    for mine, theirs in zip(second.learner.encoder.parameters(), whole.learner.encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("users_checks")
def test_settings_that_cannot_be() -> None:
    for settings, message in (
        ({"selector": "hardest"}, "batches.selector must be random or active, got hardest"),
        ({"group_size": 1}, "batches.group_size must be at least 2, got 1"),
        ({"neighbours": 0}, "batches.neighbours must be at least 1, got 0"),
        ({"skip_nearest": -1}, "batches.skip_nearest must be at least 0, got -1"),
        ({"active_share": 2.0}, r"batches.active_share must be in \[0, 1\], got 2.0"),
        ({"start_epoch": 0}, "batches.start_epoch must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            BatchesConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"batches.group_size must be at most optim.batch_size \(8\), got 9"):
        dataclasses.replace(CONFIG, batches=BatchesConfig(group_size=9))
