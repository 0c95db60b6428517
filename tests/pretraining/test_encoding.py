"""Gradient caching against one pass over the whole batch, in one process; `test_ranks` has several."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmacc.clips import ClipSpec, seeds
from cmacc.encoders import Encoder, EncoderConfig, EncoderPair, Encoding, Modality
from cmacc.pretraining import DataConfig, DictionaryConfig, OptimConfig, PretrainConfig, Processes, Trainer, refresh
from cmacc.pretraining.checkpoint import load_checkpoint, save_checkpoint
from cmacc.pretraining.encoding import encode_keys, encode_queries
from cmacc.pretraining.learner import Learner
from cmacc.pretraining.random_clips import RandomClips
from cmacc.pretraining.randomness import seeded_generators
from cmacc.pretraining.table import TableProblem

CPU = torch.device("cpu")
# The name of a tower, so that dropout is seeded; the encoders of these tests are their own.
WITH_DROPOUT = PretrainConfig(
    encoder=EncoderConfig(video="python:none:none", audio="python:none:none"),
    optim=OptimConfig(batch_size=6, chunk_size=4),
)
CLIPS = PretrainConfig(
    data=DataConfig(clip=ClipSpec(frame_count=4, frame_height=16, frame_width=16, audio_seconds=0.5)),
    encoder=EncoderConfig(embedding_size=16, hidden_size=24, mel_bins=16),
    dictionary=DictionaryConfig(selector="active", size=16, pool_size=16),
    optim=OptimConfig(batch_size=8, steps=100),
)


class NoViews:
    """Inputs are given directly."""

    def of(self, batch: Any, visit: int) -> dict[Modality, Tensor]:
        raise NotImplementedError

    def kept(self, batch: Any, visit: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def again(self, modality: Modality, kept: Any) -> Tensor:
        raise NotImplementedError


def dropping_pair() -> EncoderPair:
    def one() -> Encoder:
        backbone = nn.Sequential(nn.Linear(5, 12), nn.Dropout(0.5), nn.Linear(12, 7))
        return Encoder(backbone, 7, "mlp", 9, 4).double()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EncoderPair(one(), one())


def learner_of(config: PretrainConfig) -> Learner:
    return Learner.build(dropping_pair(), NoViews(), config, CPU, None)


def test_chunks_draw_the_same_dropout_twice_and_give_the_gradient_of_one_graph() -> None:
    learner = learner_of(WITH_DROPOUT)
    generator = torch.Generator().manual_seed(1)
    inputs: dict[Modality, Tensor] = {
        "video": torch.randn(6, 5, dtype=torch.float64, generator=generator),
        "audio": torch.randn(6, 5, dtype=torch.float64, generator=generator),
    }

    def loss_of(queries: dict[Modality, Any]) -> Tensor:
        scores = queries["video"].embedding @ queries["audio"].embedding.T / 0.1
        return nn.functional.cross_entropy(scores, torch.arange(6)) + queries["audio"].feature.square().mean()

    passed = encode_queries(learner, inputs, {}, step=3)
    loss = loss_of(passed.queries)
    passed.backward(loss)
    found = [p.grad for p in learner.encoder.parameters()]

    # All chunks in one graph, each with the dropout that it must have drawn.
    pair = dropping_pair()
    queries: dict[Modality, Any] = {}
    for number, modality in enumerate(inputs):
        encoder: Encoder = getattr(pair, modality)
        chunks = []
        for start in (0, 4):
            order = ("video", "audio").index(modality)
            with seeded_generators(CPU, seeds.DROPOUT, learner.config.seed, 3, start, order):
                chunks.append(encoder.backbone(inputs[modality][start : start + 4]))
        assert number == order
        queries[modality] = encoder.project(torch.cat(chunks))
    wanted = loss_of(queries)
    wanted.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for own, other in zip(found, pair.parameters(), strict=True):
        torch.testing.assert_close(own, other.grad, rtol=1e-9, atol=1e-12)
    # Other masks give another loss, so that this could fail.
    assert loss_of(encode_queries(learner, inputs, {}, step=4).queries).item() != pytest.approx(loss.item(), rel=1e-3)


def test_chunks_hold_a_fraction_of_the_activations() -> None:
    held = {}
    for chunk_size in (None, 2):
        config = dataclasses.replace(CLIPS, optim=dataclasses.replace(CLIPS.optim, chunk_size=chunk_size))
        table = RandomClips(24, config, CPU)
        learner = Learner.build(table.encoder(config), table.views(config), config, CPU, None)
        inputs = learner.views.of(table.batch(torch.arange(8)), 0)
        most = now = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal most, now
            now += tensor.nbytes
            most = max(most, now)
            return tensor

        def unpack(tensor: Tensor) -> Tensor:
            nonlocal now
            now -= tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            passed = encode_queries(learner, inputs, {}, 0)
            passed.backward(passed.queries["video"].embedding.sum() + passed.queries["audio"].embedding.sum())
        held[chunk_size] = most
    assert held[2] < 0.5 * held[None]


def test_keys_in_chunks_are_those_of_one_pass() -> None:
    table = RandomClips(24, CLIPS, CPU, torch.float64)
    keys = {}
    for chunk_size in (None, 3):
        config = dataclasses.replace(CLIPS, optim=dataclasses.replace(CLIPS.optim, chunk_size=chunk_size))
        learner = Learner.build(table.encoder(config), table.views(config), config, CPU, None)
        keys[chunk_size] = encode_keys(learner, learner.views.of(table.batch(torch.arange(8)), 0))
    for modality, whole in keys[None].items():
        for field in ("embedding", "length", "penultimate", "feature"):
            torch.testing.assert_close(getattr(keys[3][modality], field), getattr(whole, field), rtol=1e-12, atol=1e-12)


def test_half_precision_scales_the_loss_and_resumes_with_its_scale(tmp_path: Path) -> None:
    config = dataclasses.replace(CLIPS, precision="fp16")

    def trainer(config: PretrainConfig) -> Trainer:
        return Trainer(TableProblem(RandomClips(40, config, CPU), config, CPU), config)

    # The first scale is too large for these encoders: such steps are skipped, and it is halved.
    first = trainer(config)
    skipped = [done.metrics.get("skipped", 0.0) for done in first.steps(8)]
    assert skipped[0] == 1
    assert skipped[-1] == 0
    assert first.learner.scaler.get_scale() == 2.0**16 / 2 ** sum(skipped)
    save_checkpoint(first.learner, tmp_path, 8, 0)
    second = trainer(config)
    load_checkpoint(second.learner, tmp_path / "checkpoints" / "step-00000008")
    assert second.learner.scaler.get_scale() == first.learner.scaler.get_scale()

    scaled, exact = trainer(config), trainer(CLIPS)
    scaled.learner.scaler.load_state_dict(scaled.learner.scaler.state_dict() | {"scale": 64.0})
    losses = [next(iter(each.steps(1))).metrics for each in (scaled, exact)]
    for name in ("loss", "gradient_norm"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=0.02)
        assert losses[0][name] != losses[1][name]


def test_a_key_that_is_encoded_again_and_not_finite_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would spoil every loss for as long as it is in the dictionary."""
    plain, spoilt = refresh._encode, 0

    def encode(learner: Learner, modality: Modality, handles: Tensor) -> Encoding:
        nonlocal spoilt
        encoding = plain(learner, modality, handles)
        encoding.penultimate[0, 0] = torch.inf
        spoilt += 1
        return encoding

    monkeypatch.setattr(refresh, "_encode", encode)
    config = dataclasses.replace(CLIPS, max_skipped_steps=0)
    trainer = Trainer(TableProblem(RandomClips(40, config, CPU), config, CPU), config)
    assert len(list(trainer.steps(6))) == 6
    assert spoilt > 0
    for dictionary in trainer.learner.dictionaries.values():
        assert all(bool(value.isfinite().all()) for value in dictionary.negatives().fields())


def test_processes_alone_exchange_nothing() -> None:
    alone, rows = Processes(), torch.arange(3.0, requires_grad=True)
    assert alone.gather(rows) is rows
    assert alone.objects("a") == ["a"]
    assert not alone.any(False)
    assert torch.equal(alone.each(torch.tensor(2)), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"optim.batch_size must be a multiple of the 4 processes, got 6"):
        Processes(rank=1, count=4).part(6)
    assert Processes(rank=1, count=4).part(8) == slice(2, 4)
