"""CrossCLR against a naive loop with queue, pruning and weights, and against hand checks of both forms."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.objectives import CrossModalContrast, ObjectiveInputs
from cmacc.objectives.crossclr import CrossCLR, CrossCLRConfig, CrossCLRForm, describe_input
from cmacc.objectives.objective import DrawingObjective

from .stand_ins import Embedded, Views

SIZE = 5
ALONE = {"gamma": 1.0, "kappa": None}  # neither pruning nor weights
Rows = dict[str, Tensor]


def unit(generator: torch.Generator, count: int) -> Tensor:
    return normalize(torch.randn(count, SIZE, generator=generator, dtype=torch.float64), dim=1)


def embeddings(seed: int, count: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return {name: unit(generator, count).requires_grad_() for name in ("video", "audio")}


def described(seed: int, count: int) -> Rows:
    """Input features with a common part, as real ones have."""
    generator = torch.Generator().manual_seed(1000 + seed)
    sizes = {"video": 96, "audio": 128}
    return {
        name: torch.randn(count, size, generator=generator, dtype=torch.float64) + 0.5 for name, size in sizes.items()
    }


def told(rows: Rows, ids: Tensor, given: Rows | None = None, features: Rows | None = None) -> ObjectiveInputs:
    queries = {name: Embedded(part, (features or rows)[name]) for name, part in rows.items()}
    return ObjectiveInputs(queries, {}, {}, ids, given=given or {})


def naive(rows: Rows, ids: list[int], config: CrossCLRConfig, history: list[tuple[Rows, list[int]]]) -> Rows:
    """The loss sample by sample; ``history`` holds input features and ids of all steps, this one's last."""
    count, tau, weight = len(ids), config.temperature, config.intra_weight
    influential, proximity = {}, {}
    for name in rows:
        recent = [(features[name][j], own[j]) for features, own in history[:-1] for j in range(len(own))]
        recent = recent[-config.queue_size :]
        influential[name], proximity[name] = [False] * count, [1.0] * count
        if history and len(recent) >= count:
            of_batch = history[-1][0][name]
            connectivity = []
            for i in range(count):
                others = [row for row, own in recent if own != ids[i]]
                cosines = [float(of_batch[i] @ row / (of_batch[i].norm() * row.norm())) for row in others]
                connectivity.append(sum(cosines) / len(cosines))
            limit = float(np.quantile(connectivity, config.gamma))
            influential[name] = [value > limit for value in connectivity]
            if config.kappa is not None:
                proximity[name] = [math.exp(value / config.kappa) for value in connectivity]
    totals, pruned = {}, []
    for x, y in (("video", "audio"), ("audio", "video")):
        total = torch.zeros(())
        for i in range(count):
            positive = rows[x][i] @ rows[y][i] / tau
            denominator = positive.exp()
            if config.form == "released":
                denominator = denominator + 1
            for j in range(count):
                if ids[j] == ids[i]:
                    continue
                if not influential[y][j]:
                    denominator = denominator + (rows[x][i] @ rows[y][j] / tau).exp()
                if not influential[x][j]:
                    inner = rows[x][i] @ rows[x][j] / tau
                    denominator = denominator + (
                        (weight * inner).exp() if config.form == "released" else weight * inner.exp()
                    )
            total = total + proximity[x][i] * (denominator.log() - positive)
        totals[f"{x}_to_{y}/loss"] = total / sum(proximity[x])
        pruned += influential[x]
    return {
        "loss": (totals["video_to_audio/loss"] + totals["audio_to_video/loss"]) / 2,
        "pruned": torch.tensor(pruned).double().mean(),
    } | totals


@pytest.mark.parametrize(
    ("form", "wanted"), [("released", math.log((math.e + 3) / math.e)), ("sound", math.log((math.e + 1.8) / math.e))]
)
def test_hand_checks(form: CrossCLRForm, wanted: float) -> None:
    """Of NEIGHBOURS.md, section 1: 0.7437 and 0.5081."""
    assert round(wanted, 4) in (0.7437, 0.5081)
    rows = {"video": torch.eye(2, dtype=torch.float64), "audio": torch.eye(2, dtype=torch.float64)}
    objective = CrossCLR(CrossCLRConfig(temperature=1.0, intra_weight=0.8, form=form, **ALONE))  # type: ignore[arg-type]
    result = objective(told(rows, torch.arange(2)))
    assert result.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert result.metrics["video_to_audio/top1"].item() == 1
    # One sample alone: ln(1 + e^-a) in the released form, whose e^0 stays, and 0 in the sound one.
    alone = objective(told({name: part[:1] for name, part in rows.items()}, torch.arange(1)))
    assert alone.loss.item() == pytest.approx(math.log1p(math.exp(-1)) if form == "released" else 0, abs=1e-15)
    assert all(alone.metrics[name].isnan() for name in alone.metrics if name.endswith(("loss", "top1")))


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [4, 1, 4, 3, 1, 4]], ids=["distinct", "repeated"])
def test_without_its_additions_it_is_infonce(ids: list[int]) -> None:
    rows, own = embeddings(1, 6), torch.tensor(ids)
    config = CrossCLRConfig(temperature=0.2, intra_weight=0.0, **ALONE)  # type: ignore[arg-type]
    result = CrossCLR(config)(told(rows, own))
    contrast = CrossModalContrast(0.2)
    directions = {
        "video_to_audio": contrast(rows["video"], rows["audio"], own, own),
        "audio_to_video": contrast(rows["audio"], rows["video"], own, own),
    }
    wanted = torch.stack([direction.loss for direction in directions.values()]).mean()
    assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for name, direction in directions.items():
        assert result.metrics[f"{name}/loss"].item() == pytest.approx(direction.loss.item(), rel=1e-12)
        assert result.metrics[f"{name}/top1"].item() == direction.top1.item()
    for actual, expected in zip(
        torch.autograd.grad(result.loss, list(rows.values())),
        torch.autograd.grad(wanted, list(rows.values())),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", ["sound", "released"])
@pytest.mark.parametrize("kappa", [None, 0.02])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_loss_and_gradients_are_those_of_the_naive_loop(form: CrossCLRForm, kappa: float | None, gamma: float) -> None:
    """Over steps: an empty queue, one shorter than the batch, a full one, and one that has dropped its oldest.

    Some samples stand twice in a batch, and come again while their earlier features are in the queue.
    """
    config = CrossCLRConfig(temperature=0.3, intra_weight=0.7, gamma=gamma, kappa=kappa, queue_size=11, form=form)
    objective = CrossCLR(config).double()
    history: list[tuple[Rows, list[int]]] = []
    pruned = []
    for step, ids in enumerate([[0, 1, 2], [3, 4, 5, 3], [6, 0, 8, 4, 6], [1, 9, 10, 11, 4], [12, 0, 13, 14, 15]]):
        rows, given = embeddings(step, len(ids)), described(step, len(ids))
        history.append((given, ids))
        result = objective(told(rows, torch.tensor(ids), given if config.uses_connectivity else None))
        wanted = naive(rows, ids, config, history)
        for name in ("loss", "pruned", "video_to_audio/loss", "audio_to_video/loss"):
            assert result.metrics[name].item() == pytest.approx(wanted[name].item(), rel=1e-10), (step, name)
        assert result.loss.item() == result.metrics["loss"].item()
        for actual, expected in zip(
            torch.autograd.grad(result.loss, list(rows.values())),
            torch.autograd.grad(wanted["loss"], list(rows.values())),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)
        pruned.append(result.metrics["pruned"].item())
        assert (result.metrics["effective_share"].item() < 0.999) == (kappa is not None and step >= 2)
    # With three keys, a batch of four is not pruned yet.
    assert [value > 0 for value in pruned] == [gamma < 1 and step >= 2 for step in range(5)]


@pytest.mark.parametrize("form", ["sound", "released"])
def test_gradients_are_finite_differences(form: CrossCLRForm) -> None:
    config = CrossCLRConfig(temperature=0.3, gamma=0.7, kappa=0.1, queue_size=8, form=form)
    objective, ids, given = CrossCLR(config).double(), torch.tensor([0, 1, 0, 2]), described(2, 4)
    for step in range(2):
        objective(told(embeddings(step, 4), torch.arange(4) + 4 * step, described(step, 4)))
    objective.eval()  # the queue stays as it is

    def loss(video: Tensor, audio: Tensor) -> Tensor:
        result = objective(told({"video": video, "audio": audio}, ids, given))
        assert result.metrics["pruned"] > 0
        total: Tensor = result.loss
        return total

    assert torch.autograd.gradcheck(loss, tuple(embeddings(3, 4).values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["sound", "released"])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, form: CrossCLRForm) -> None:
    """Logits reach 1 / 0.03 = 33, and e^-33 is zero in half precision: a softmax before the logarithm gave -inf."""
    rows = {name: part.detach().to(dtype) for name, part in embeddings(1, 6).items()}
    rows["audio"] = -rows["video"]
    ids, config = torch.arange(6), CrossCLRConfig(form=form)
    with torch.autocast("cpu", dtype=dtype):
        leaves = {name: part.clone().requires_grad_() for name, part in rows.items()}
        actual = CrossCLR(config)(told(leaves, ids, {name: part.to(dtype) for name, part in described(1, 6).items()}))
    wanted = CrossCLR(config)(told({name: part.double() for name, part in rows.items()}, ids, described(1, 6)))
    assert actual.loss.dtype == torch.float32
    assert actual.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert actual.loss.item() > 33
    assert all(part.isfinite().all() for part in torch.autograd.grad(actual.loss, list(leaves.values())))


def test_a_resumed_objective_goes_on_bit_by_bit() -> None:
    config = CrossCLRConfig(gamma=0.6, kappa=0.05, queue_size=13)
    before = CrossCLR(config)
    for step in range(4):
        before(told(embeddings(step, 5), torch.arange(5) + 5 * step, described(step, 5)))
    resumed, new = CrossCLR(config), CrossCLR(config)
    resumed.load_state_dict(copy.deepcopy(before.state_dict()))
    for step in range(4, 7):
        step_told = told(embeddings(step, 5), torch.arange(5) + 5 * step, described(step, 5))
        losses = [objective(step_told).loss.item() for objective in (before, resumed, new)]
        assert losses[0] == losses[1]
        assert losses[0] != losses[2]


def test_two_rows_of_a_sample_are_no_negatives_of_each_other() -> None:
    """The released code would push the two copies apart, in both sums."""
    rows = embeddings(1, 3)
    doubled = {name: part.detach()[[0, 1, 2, 0, 1, 2]] for name, part in rows.items()}
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    config = CrossCLRConfig(temperature=0.2, intra_weight=1e-30, **ALONE)  # type: ignore[arg-type]
    apart, together = (CrossCLR(config)(told(doubled, own)) for own in (torch.arange(6), ids))
    assert together.loss.item() < apart.loss.item()
    assert apart.metrics["video_to_audio/top1"].item() == 0  # the copy scores as high as the positive
    # All rows of one sample: there is nothing to contrast.
    one = CrossCLR(config)(told(doubled, torch.zeros(6, dtype=torch.int64)))
    assert one.loss.item() == 0
    assert one.metrics["loss"].isnan()


def test_pruning_a_batch_of_two_leaves_one_sample_without_negatives() -> None:
    """Its loss is then 0, with a finite gradient."""
    objective = CrossCLR(CrossCLRConfig(gamma=0.5, queue_size=4)).double()
    for step in range(2):
        rows = embeddings(step, 2)
        result = objective(told(rows, torch.arange(2) + 2 * step, described(step, 2)))
    assert result.metrics["pruned"].item() == 0.5
    assert 0 < result.loss.item() < math.inf
    assert all(part.isfinite().all() for part in torch.autograd.grad(result.loss, list(rows.values())))


def test_a_typical_sample_is_no_negative_and_has_the_largest_weight() -> None:
    """Four samples of one kind have filled the queue. In a batch, one is of that kind and three are of others."""
    kinds = torch.eye(4, 96, dtype=torch.float64)
    given = {"video": kinds, "audio": torch.nn.functional.pad(kinds, (0, 32))}
    objective = CrossCLR(CrossCLRConfig(gamma=0.75, kappa=0.1, queue_size=4)).double()
    objective(told(embeddings(0, 4), torch.arange(4), {name: part[:1].expand(4, -1) for name, part in given.items()}))
    objective.eval()
    # Connectivity (1, 0, 0, 0).
    rows = embeddings(1, 4)
    result = objective(told(rows, torch.arange(4, 8), given))
    assert result.metrics["pruned"].item() == 0.25
    weights = torch.tensor([math.exp(10), 1, 1, 1], dtype=torch.float64)
    wanted = weights.sum() ** 2 / (4 * (weights**2).sum())
    assert result.metrics["effective_share"].item() == pytest.approx(wanted.item())


def test_features_of_frozen_backbones_are_used_where_they_are() -> None:
    config = CrossCLRConfig(gamma=0.6, queue_size=8)
    objective = CrossCLR(config, {"video": 5})
    views = Views({"video": torch.randn(2, 3, 4, 8, 8), "audio": torch.randn(2, 20, 30)})
    assert isinstance(objective, DrawingObjective)
    drawn = objective.draw(views)
    assert not drawn.inputs
    assert list(drawn.given) == ["audio"]
    assert drawn.given["audio"].shape == (2, 128)
    features = {"video": torch.randn(4, 5, requires_grad=True), "audio": torch.randn(4, 7)}
    objective(told(embeddings(1, 4), torch.arange(4), {"audio": described(1, 4)["audio"]}, features))
    recent, _ = objective._queue("video").held()
    torch.testing.assert_close(recent.embedding, normalize(features["video"].detach(), dim=1))
    assert recent.sample_ids.tolist() == [0, 1, 2, 3]
    assert objective._queue("audio").embedding.shape == (8, 128)


def test_without_pruning_and_weights_nothing_is_drawn_or_kept() -> None:
    objective = CrossCLR(CrossCLRConfig(**ALONE))  # type: ignore[arg-type]
    assert not objective.draw(Views({})).given
    assert not objective.state_dict()


def test_features_that_are_not_finite_do_not_enter_the_queue() -> None:
    objective, given = CrossCLR(CrossCLRConfig(queue_size=8)), described(1, 4)
    given["video"][2] = math.nan
    objective(told(embeddings(1, 4), torch.arange(4), given))
    assert objective._queue("video").held()[0].sample_ids.tolist() == [0, 1, 3]


def test_descriptions_are_averages_over_a_grid_without_their_mean() -> None:
    video, audio = torch.randn(2, 3, 6, 9, 12), torch.randn(2, 32, 24)
    wanted = video.double().reshape(2, 3, 2, 3, 9, 12)[..., :9, :].mean(3)
    rows = [(math.floor(9 * k / 4), math.ceil(9 * (k + 1) / 4)) for k in range(4)]
    cells = torch.stack([wanted[..., start:stop, :].mean(-2) for start, stop in rows], dim=-2)
    cells = cells.reshape(2, 3, 2, 4, 4, 3).mean(-1).flatten(1)
    described_video = describe_input("video", video)
    torch.testing.assert_close(described_video.double(), cells - cells.mean(1, keepdim=True), rtol=1e-5, atol=1e-6)
    bands = audio.double().reshape(2, 16, 2, 8, 3).mean((2, 4)).flatten(1)
    torch.testing.assert_close(
        describe_input("audio", audio.half()).double(), bands - bands.mean(1, keepdim=True), rtol=1e-2, atol=1e-3
    )
    # Neither brightness nor level counts, and without contrast there is nothing to compare.
    torch.testing.assert_close(describe_input("video", video + 1), described_video, rtol=1e-4, atol=1e-5)
    assert not describe_input("audio", torch.full((1, 80, 101), math.log(1e-6))).any()
    assert describe_input("video", video[:, :, :1, :1, :1]).shape == (2, 96)


def test_what_does_not_fit_is_refused(users_checks: None) -> None:
    with pytest.raises(ValueError, match=r"CrossCLR: audio inputs must have 3 axes to be described, got \(2, 16000\)"):
        describe_input("audio", torch.zeros(2, 16000))
    with pytest.raises(ValueError, match="CrossCLR: feature_sizes must be of video and audio, got text"):
        CrossCLR(CrossCLRConfig(), {"text": 3})
    small = CrossCLR(CrossCLRConfig(queue_size=3))
    with pytest.raises(ValueError, match=r"objective.crossclr.queue_size must be at least the batch size \(4\), got 3"):
        small(told(embeddings(1, 4), torch.arange(4), described(1, 4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "objective.crossclr.temperature must be positive, got -1"),
        ({"intra_weight": -0.1}, "objective.crossclr.intra_weight must be at least 0 and finite, got -0.1"),
        ({"gamma": 0}, "objective.crossclr.gamma must be above 0 and at most 1, got 0"),
        ({"gamma": 1.5}, "objective.crossclr.gamma must be above 0 and at most 1, got 1.5"),
        ({"kappa": 0.0}, "objective.crossclr.kappa must be positive or null, got 0.0"),
        ({"queue_size": 0}, "objective.crossclr.queue_size must be at least 1, got 0"),
        ({"form": "other"}, "objective.crossclr.form must be one of sound, released, got 'other'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, users_checks: None) -> None:
    with pytest.raises(ValueError, match=message):
        CrossCLRConfig(**settings)
