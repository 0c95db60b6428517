"""The engine: the losses that it always gave, its clock, and how a run that diverges ends."""

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch

from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.encoders import EncoderConfig
from cmacc.objectives import ObjectiveInputs, ObjectiveResult
from cmacc.pretraining import (
    DictionaryConfig,
    DivergenceError,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    Trainer,
    last_checkpoint,
    untrained_encoder,
)
from cmacc.pretraining.checkpoint import load_checkpoint, save_checkpoint
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.table import TableProblem

from .golden import GOLDEN, LATER_TOLERANCE, RELATIVE_TOLERANCE, losses, machine

CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    encoder=EncoderConfig(head="linear", embedding_size=16),
    dictionary=DictionaryConfig(selector="active", size=16, pool_size=24, refresh="none"),
    optim=OptimConfig(batch_size=8, steps=8),
)


def trainer(config: PretrainConfig = CONFIG) -> Trainer:
    dataset = VectorDataset(VectorWorld(classes=6, samples=64, held_out=16), 0, CPU)
    return Trainer(TableProblem(dataset, config, CPU), config)


def spoil(learner_encoder: torch.nn.Module) -> None:
    """What a step that exploded leaves."""
    with torch.no_grad():
        next(learner_encoder.parameters()).fill_(math.inf)


@pytest.mark.usefixtures("users_checks")  # for speed
def test_the_losses_of_ten_steps_are_the_golden_ones() -> None:
    golden = json.loads(GOLDEN.read_text())
    found = losses()
    assert found.keys() == golden["losses"].keys()
    if machine() == golden["machine"]:
        assert found == golden["losses"]
    for name, values in golden["losses"].items():
        assert found[name][:3] == pytest.approx(values[:3], rel=RELATIVE_TOLERANCE), name
        assert found[name][3:] == pytest.approx(values[3:], rel=LATER_TOLERANCE), name


def test_a_step_ends_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock's `seconds` waits for a GPU; only after that a step's time is taken, or it is that of the hand-over."""
    plain = PhaseClock.seconds

    def waits(self: PhaseClock) -> dict[str, float]:
        time.sleep(0.2)
        return plain(self)

    monkeypatch.setattr(PhaseClock, "seconds", waits)
    (done,) = trainer().steps(1)
    assert done.seconds >= 0.2
    assert done.metrics["seconds/step"] == done.seconds


def test_what_the_caller_does_between_steps_is_not_counted() -> None:
    asked = time.perf_counter()
    for done in trainer().steps(3):
        assert done.seconds <= time.perf_counter() - asked
        time.sleep(0.3)
        asked = time.perf_counter()


@pytest.mark.parametrize("selector", ["active", "newest", "none"])
def test_a_diverging_run_says_so_and_not_that_points_must_be_finite(selector: str) -> None:
    config = dataclasses.replace(
        CONFIG,
        dictionary=dataclasses.replace(CONFIG.dictionary, selector=selector),  # type: ignore[arg-type]
        max_skipped_steps=1,
    )
    diverging = trainer(config)
    for _ in diverging.steps(5):
        pass
    spoil(diverging.learner.encoder)
    message = r"step 6: .*, for 2 steps in a row .* in the embeddings of samples [\d, ]+; start again with a lower"
    with pytest.raises(DivergenceError, match=message):
        list(diverging.steps())


def test_a_step_that_exploded_is_not_saved_and_the_checkpoint_before_it_stays(tmp_path: Path) -> None:
    diverging = trainer()
    for _ in diverging.steps(4):
        pass
    good = save_checkpoint(diverging.learner, tmp_path, 4, 0)
    for _ in diverging.steps(5):
        pass
    spoil(diverging.learner.encoder)
    with pytest.raises(DivergenceError, match=r"step 4: a weight is not finite"):
        save_checkpoint(diverging.learner, tmp_path, 5, 0)
    assert last_checkpoint(tmp_path) == good
    assert load_checkpoint(trainer().learner, good).step == 4


def test_a_dictionary_alone_has_nothing_to_report_until_it_has_filled() -> None:
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(in_batch=False, batch_keys="momentum"))
    first, second = trainer(config).steps(2)
    assert not {"loss", "video_to_audio/loss", "video_to_audio/top1"} & first.metrics.keys()
    assert {"loss", "video_to_audio/loss", "video_to_audio/top1"} <= second.metrics.keys()


class Attraction:
    """An objective of one's own: pairs should be alike."""

    needs_keys = False
    needs_feature_maps = False

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        video, audio = (inputs.queries[name].embedding for name in ("video", "audio"))
        loss = 1 - (video * audio).sum(1).mean()
        return ObjectiveResult(loss, {"loss": loss.detach()})


def test_an_objective_of_ones_own_is_trained_for() -> None:
    config = dataclasses.replace(
        CONFIG,
        dictionary=DictionaryConfig(selector="none"),
        optim=OptimConfig(batch_size=8, steps=60, learning_rate=0.01),
    )
    dataset = VectorDataset(VectorWorld(classes=6, samples=64, held_out=16), 0, CPU)
    own = Trainer(TableProblem(dataset, config, CPU), config, objective=Attraction())
    values = [done.metrics["loss"] for done in own.steps()]
    assert values[-1] < 0.5 * values[0]


def test_building_a_learner_leaves_every_generator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed would also reseed the GPUs of the program that calls us."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeds every GPU"))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("reseeds every generator"))
    before = torch.get_rng_state()
    trainer()
    first, again = untrained_encoder(CONFIG), untrained_encoder(CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
