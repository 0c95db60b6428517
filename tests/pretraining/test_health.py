import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.clips import Manifest
from cmacc.encoders import EncoderConfig, Modality
from cmacc.negatives import Keys
from cmacc.objectives import ObjectiveInputs, ObjectiveResult
from cmacc.pretraining import OptimConfig, PretrainConfig, Trainer
from cmacc.pretraining.clip_stream import ClipStream
from cmacc.pretraining.health import CollapseAlarm, dictionary_health, embedding_health
from cmacc.pretraining.table import TableProblem


def test_against_a_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(20, 6, generator=generator), dim=1)
    ids = torch.randint(0, 12, (20,), generator=generator)
    labels_by_id = torch.randint(-1, 3, (12,), generator=generator)
    query_labels = torch.tensor([0, -1, 2, 1])
    steps = torch.arange(20)
    health = dictionary_health(
        Keys(keys, torch.ones(20), torch.empty(20, 0), ids, steps, steps), query_labels, labels_by_id, step=30
    )

    cosines = [float(keys[i] @ keys[j]) for i in range(20) for j in range(20) if i != j]
    shares = np.linalg.svd(keys.double().numpy(), compute_uv=False)
    shares /= shares.sum()
    pairs = [(q, int(labels_by_id[i])) for q in query_labels.tolist() for i in ids.tolist()]
    known = [(q, n) for q, n in pairs if q >= 0 and n >= 0]
    assert health["pairwise_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert health["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert health["key_age"] == pytest.approx(30 - 9.5)
    assert health["distinct_samples"] == len(set(ids.tolist())) / 20
    assert health["false_negative_share"] == pytest.approx(np.mean([q == n for q, n in known]))
    assert health["distinct_labels"] == len({n for _, n in pairs if n >= 0})


def test_orthogonal_keys_have_full_rank_and_equal_keys_rank_one() -> None:
    def health(keys: torch.Tensor) -> dict[str, float]:
        count = len(keys)
        held = Keys.from_embedding(keys, torch.arange(count), 0)
        return dictionary_health(held, torch.tensor([-1]), torch.full((count,), -1), step=0)

    assert health(torch.eye(5))["effective_rank"] == pytest.approx(5, rel=1e-5)
    assert health(torch.eye(5)[:1].repeat(5, 1))["effective_rank"] == pytest.approx(1, rel=1e-4)
    assert "false_negative_share" not in health(torch.eye(5))
    assert health(torch.eye(5)[:1]) == {}


# Embeddings of a batch


def test_embedding_health_against_numpy_and_of_known_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    sphere = normalize(torch.randn(4000, 32, generator=generator), dim=1)
    point = normalize(torch.ones(50, 32) + 1e-3 * torch.randn(50, 32, generator=generator), dim=1)
    health = embedding_health({"video": sphere, "audio": point})
    assert health["video/embedding_std"] == pytest.approx(1, abs=0.02)
    assert health["video/effective_rank"] == pytest.approx(32, abs=0.1)
    assert health["audio/embedding_std"] < 0.002
    assert health["audio/effective_rank"] < 1.3
    shares = np.linalg.svd(point.double().numpy(), compute_uv=False)
    shares /= shares.sum()
    assert health["audio/effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert health["audio/embedding_std"] == pytest.approx(np.std(point.numpy(), 0, ddof=1).mean() * 32**0.5, rel=1e-4)
    two_poles = embedding_health({"video": torch.eye(4)[:1] * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])})
    assert two_poles["video/effective_rank"] == pytest.approx(1, rel=1e-4)
    assert embedding_health({"video": torch.zeros(3, 4)})["video/effective_rank"] == 1  # a head that gives nothing
    assert embedding_health({"video": sphere[:1], "audio": torch.full((3, 4), float("nan"))}) == {}


class Attraction:
    """Pulls all embeddings to one point."""

    needs_keys = False
    needs_feature_maps = False

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        loss = -(inputs.queries["video"].embedding[:, 0].mean() + inputs.queries["audio"].embedding[:, 0].mean())
        return ObjectiveResult(loss, {"loss": loss.detach()})


def watched(trainer: Trainer, alarms: dict[int, CollapseAlarm], steps: int) -> None:
    """Steps, after each of which every alarm checks the first embeddings of the batch, as many as it is for."""
    embeddings: dict[Modality, Tensor] = {}
    hook = trainer.learner.encoder.register_forward_hook(
        lambda _, __, encodings: embeddings.update({m: e.embedding for m, e in encodings.items()})
    )
    first = trainer.next_step
    for done in trainer.steps(first + steps):
        for count, alarm in alarms.items():
            alarm.check(embedding_health({m: rows[:count] for m, rows in embeddings.items()}), done.step)
    hook.remove()
    assert trainer.next_step == first + steps


@pytest.mark.usefixtures("users_checks")
def test_the_alarm_is_silent_while_encoders_learn_and_tells_once_of_a_collapse_and_of_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For a batch of 32, and for 8 of its samples."""
    optim = OptimConfig(batch_size=32, steps=2000, warmup_steps=20, learning_rate=0.03)
    config = PretrainConfig(encoder=EncoderConfig(embedding_size=64), optim=optim, precision="fp32")
    dataset = VectorDataset(VectorWorld(samples=1024, held_out=16, classes=10), 0, torch.device("cpu"))
    trainer = Trainer(TableProblem(dataset, config, torch.device("cpu")), config)
    contrast = trainer.learner.objective
    alarms = {count: CollapseAlarm(count) for count in (8, 32)}
    with caplog.at_level(logging.WARNING, "cmacc"):
        watched(trainer, alarms, 60)
        assert caplog.messages == []
        trainer.learner.objective = Attraction()
        watched(trainer, alarms, 200)
        assert [alarm.collapsed for alarm in alarms.values()] == [{"video", "audio"}] * 2
        collapses = list(caplog.messages)
        trainer.learner.objective = contrast
        watched(trainer, alarms, 60)
    assert [alarm.collapsed for alarm in alarms.values()] == [set()] * 2
    ends = caplog.messages[len(collapses) :]
    for modality in ("video", "audio"):
        assert sum(f"the {modality} embeddings have collapsed: embedding_std 0." in told for told in collapses) == 2
        assert sum(f"the {modality} embeddings have recovered: embedding_std 0." in told for told in ends) == 2
    assert len(collapses) == len(ends) == 4


def test_the_alarm_is_silent_on_untrained_encoders_of_clips(
    small_config: PretrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    optim = dataclasses.replace(small_config.optim, steps=6)
    for norm, head in (("group", "mlp"), ("batch", "linear")):
        encoder = dataclasses.replace(small_config.encoder, norm=norm, head=head)  # type: ignore[arg-type]
        config = dataclasses.replace(small_config, optim=optim, encoder=encoder)
        stream = ClipStream(Manifest.read(config.data.manifest), config, torch.device("cpu"))
        watched(Trainer(stream, config), {8: CollapseAlarm(8)}, 6)
    assert "collapsed" not in caplog.text


@pytest.mark.parametrize("name", ["embedding_std", "effective_rank"])
def test_limits_of_the_alarm(name: str) -> None:
    healthy = {"audio/embedding_std": 1.0, "audio/effective_rank": 40.0}
    limits = {8: {"embedding_std": 0.1, "effective_rank": 2.0}, 128: {"embedding_std": 0.1, "effective_rank": 4.0}}
    for possible_rank, limit_of in limits.items():
        alarm, limit = CollapseAlarm(possible_rank), limit_of[name]
        for share, collapsed in ((1.01, False), (0.99, True), (1.45, True), (1.55, False), (1.01, False)):
            alarm.check(healthy | {f"audio/{name}": share * limit}, 0)
            assert alarm.collapsed == ({"audio"} if collapsed else set())
        alarm.check({"loss": 1.0}, 0)  # nothing was measured
        assert alarm.collapsed == set()
