"""The three kinds of batch keys: what each loss is made of, on vectors, against the losses by themselves."""

import dataclasses
import math

import pytest
import torch

from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.encoders import EncoderConfig
from cmacc.objectives import BidirectionalContrast, CrossModalContrast
from cmacc.pretraining import ConfigError, DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig, Trainer
from cmacc.pretraining.table import TableProblem

CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    encoder=EncoderConfig(head="linear", embedding_size=16),
    dictionary=DictionaryConfig(selector="newest", size=24, pool_size=32, refresh="none"),
    objective=ObjectiveConfig(decoupled=False),
    optim=OptimConfig(batch_size=8, steps=20),
)


def advanced(batch_keys: str, steps: int) -> tuple[VectorDataset, Trainer, dict[str, float]]:
    """A trainer whose last step was of that kind, and whose earlier ones were of kind ``both``."""
    dataset = VectorDataset(VectorWorld(classes=6, samples=256, held_out=32), 0, CPU)
    trainer = Trainer(TableProblem(dataset, CONFIG, CPU), CONFIG)
    metrics: dict[str, float] = {}
    for done in trainer.steps(steps):
        metrics = done.metrics
        if done.step == steps - 2:
            trainer.learner.objective = BidirectionalContrast(0.1, True, batch_keys)  # type: ignore[arg-type]
    return dataset, trainer, metrics


def test_both_is_the_mean_of_the_batch_alone_and_of_the_key_encoders_keys() -> None:
    _, _, both = advanced("both", 6)
    _, _, momentum = advanced("momentum", 6)
    _, trainer, _ = advanced("both", 5)
    (batch,) = trainer.problem.batches(5, 6)
    encodings = trainer.learner.encoder(**trainer.learner.views.of(batch, 0))
    contrast = CrossModalContrast(0.1)
    total = 0.0
    for query, key in (("video", "audio"), ("audio", "video")):
        alone = contrast(encodings[query].embedding, encodings[key].embedding, batch.sample_ids, batch.sample_ids)
        with_dictionary, got = momentum[f"{query}_to_{key}/loss"], both[f"{query}_to_{key}/loss"]
        total += (alone.loss.item() + with_dictionary) / 2
        assert got == with_dictionary
        assert both[f"{query}_to_{key}/batch_loss"] == pytest.approx(alone.loss.item(), rel=1e-5)
    assert both["mutual_information_ceiling"] == pytest.approx(math.log(8 + 24))
    assert both["loss"] == pytest.approx(total, rel=1e-5)


def test_the_metrics_speak_of_one_loss() -> None:
    """The estimate of mutual information is that of the loss with the dictionary, not of a mean of two losses."""
    _, _, both = advanced("both", 6)
    _, _, momentum = advanced("momentum", 6)
    names = [f"{way}/{name}" for way in ("video_to_audio", "audio_to_video") for name in ("mutual_information", "top1")]
    for name in (*names, "mutual_information_ceiling"):
        assert both[name] == pytest.approx(momentum[name])


def test_without_in_batch_negatives_both_has_nothing_to_contrast() -> None:
    with pytest.raises(ConfigError, match=r"objective.in_batch must be true where .* objective.batch_keys both"):
        dataclasses.replace(CONFIG, objective=ObjectiveConfig(in_batch=False))
    dataclasses.replace(CONFIG, objective=ObjectiveConfig(in_batch=False, batch_keys="momentum"))
