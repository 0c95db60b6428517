"""The three kinds of batch keys: what each loss is made of, on vectors, against the losses by themselves."""

import dataclasses
import math

import pytest
import torch

from cmacc.ablation.problem import VectorProblem
from cmacc.ablation.vectors import VectorWorld
from cmacc.encoders import EncoderConfig
from cmacc.objectives import CrossModalContrast
from cmacc.pretraining import ConfigError, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig
from cmacc.pretraining.clock import PhaseClock
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.step import StepResult, training_step

CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    encoder=EncoderConfig(head="linear", embedding_size=16),
    dictionary=DictionaryConfig(selector="newest", size=24, pool_size=32),
    optim=OptimConfig(batch_size=8, steps=20),
)


def advanced(batch_keys: str, steps: int) -> tuple[VectorProblem, Learner, StepResult]:
    """A learner whose last step was of that kind, and whose earlier ones were of kind ``both``."""
    problem = VectorProblem(VectorWorld(classes=6, samples=256, held_out=32), 0, CPU)
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(batch_keys="both"))
    learner = problem.learner(config)
    for step in range(steps):
        if step == steps - 1:
            objective = ObjectiveConfig(batch_keys=batch_keys)  # type: ignore[arg-type]
            learner.config = dataclasses.replace(config, objective=objective)
        ids = torch.arange(8) + 8 * step
        result = training_step(learner, problem.batch(ids), step, 0, PhaseClock(CPU))
    return problem, learner, result


def test_both_is_the_mean_of_the_batch_alone_and_of_the_momentum_encoders_keys() -> None:
    _, _, both = advanced("both", 6)
    _, _, momentum = advanced("momentum", 6)
    problem, learner, _ = advanced("both", 5)
    batch = problem.batch(torch.arange(8) + 40)
    video, audio = learner.encoder(*learner.views.of(batch, 0))
    contrast = CrossModalContrast(0.1)
    total = 0.0
    for name, queries, keys in (("video_to_audio", video, audio), ("audio_to_video", audio, video)):
        alone = contrast(queries.embedding, keys.embedding, batch.sample_ids, batch.sample_ids)
        with_dictionary, got = getattr(momentum, name), getattr(both, name)
        total += (alone.loss.item() + with_dictionary.loss.item()) / 2
        assert got.loss.item() == with_dictionary.loss.item()
        assert got.ceiling.item() == with_dictionary.ceiling.item() == pytest.approx(math.log(8 + 24))
        assert got.batch_loss.item() == pytest.approx(alone.loss.item(), rel=1e-5)
    assert both.loss.item() == pytest.approx(total, rel=1e-5)


def test_the_metrics_speak_of_one_loss() -> None:
    """The estimate of mutual information is that of the loss with the dictionary, not of a mean of two losses."""
    _, _, both = advanced("both", 6)
    _, _, momentum = advanced("momentum", 6)
    for name in ("mi_v2a", "mi_a2v", "top1_v2a", "mi_ceiling"):
        assert both.metrics()[name] == pytest.approx(momentum.metrics()[name])


def test_without_in_batch_negatives_both_has_nothing_to_contrast() -> None:
    with pytest.raises(ConfigError, match=r"objective.in_batch must be true where .* objective.batch_keys both"):
        dataclasses.replace(CONFIG, objective=ObjectiveConfig(in_batch=False))
    dataclasses.replace(CONFIG, objective=ObjectiveConfig(in_batch=False, batch_keys="momentum"))
