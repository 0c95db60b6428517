"""Two views of one modality: against a naive loop, and what it draws, logs and refuses."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.objectives import ObjectiveInputs
from cmacc.objectives.objective import DrawingObjective
from cmacc.objectives.within_modal import WithinModalConfig, WithinModalContrast

from .stand_ins import Embedded, Views

TEMPERATURE = 0.3


def unit(seed: int, count: int = 5) -> Tensor:
    rows = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(rows, dim=1).requires_grad_()


def told(views: Mapping[str, tuple[Tensor, Tensor]], ids: Tensor) -> ObjectiveInputs:
    first = {modality: Embedded(pair[0]) for modality, pair in views.items()}
    return ObjectiveInputs(first, {}, {}, ids, more={modality: Embedded(pair[1]) for modality, pair in views.items()})


def naive(first: Tensor, second: Tensor, ids: list[int], decoupled: bool) -> tuple[Tensor, float]:
    """Loss and top-1 of one modality, sample by sample."""
    losses, hits = [], []
    for rows, columns in ((first, second), (second, first)):
        for i in range(len(ids)):
            positive = rows[i] @ columns[i] / TEMPERATURE
            others = [rows[i] @ columns[j] / TEMPERATURE for j in range(len(ids)) if ids[j] != ids[i]]
            terms = others if decoupled else [positive, *others]
            losses.append(sum((score.exp() for score in terms), torch.zeros(())).log() - positive)
            hits.append(all(positive.item() > score.item() for score in others))
    return torch.stack(losses).mean(), sum(hits) / len(hits)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [7, 1, 7, 3, 4]], ids=["distinct", "repeated"])
def test_loss_top1_and_gradients_are_those_of_the_naive_loop(decoupled: bool, ids: list[int]) -> None:
    views = {"video": (unit(1), unit(2)), "audio": (unit(3), unit(4))}
    objective = WithinModalContrast(WithinModalConfig(temperature=TEMPERATURE, decoupled=decoupled))
    result = objective(told(views, torch.tensor(ids)))
    wanted = {modality: naive(*pair, ids, decoupled) for modality, pair in views.items()}
    total = wanted["video"][0] + wanted["audio"][0]
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert result.metrics["loss"].item() == result.loss.item()
    for modality, (loss, top1) in wanted.items():
        assert result.metrics[f"{modality}/loss"].item() == pytest.approx(loss.item(), rel=1e-12)
        assert result.metrics[f"{modality}/top1"].item() == pytest.approx(top1)
    assert not any(value.requires_grad for value in result.metrics.values())
    leaves = [view for pair in views.values() for view in pair]
    for actual, expected in zip(
        torch.autograd.grad(result.loss, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_gradients_are_finite_differences() -> None:
    objective, ids = WithinModalContrast(WithinModalConfig(temperature=TEMPERATURE)), torch.tensor([0, 1, 0, 2])

    def loss(first: Tensor, second: Tensor) -> Tensor:
        total: Tensor = objective(told({"audio": (first, second)}, ids)).loss
        return total

    assert torch.autograd.gradcheck(loss, (unit(1, 4), unit(2, 4)))


def test_it_draws_another_view_of_each_modality_that_the_batch_has() -> None:
    """The encodings come back by the same names."""
    views = Views({"video": torch.zeros(2, 3, 1, 2, 2), "audio": torch.ones(2, 4, 5)})
    objective = WithinModalContrast(WithinModalConfig())
    assert isinstance(objective, DrawingObjective)
    drawn = objective.draw(views)
    assert {name: extra.modality for name, extra in drawn.inputs.items()} == {"video": "video", "audio": "audio"}
    assert not drawn.given
    for name, extra in drawn.inputs.items():
        assert torch.equal(extra.tensor, views.inputs[name] + 1)
        assert not extra.with_feature_map
    only_video = Views({"video": views.inputs["video"]})
    assert list(objective.draw(only_video).inputs) == ["video"]
    of_audio = WithinModalContrast(WithinModalConfig(modalities=("audio",)))
    assert list(of_audio.draw(views).inputs) == ["audio"]
    with pytest.raises(ValueError, match=r"objective.within_modal.modalities .* uses \(video\), got \['audio'\]"):
        of_audio.draw(only_video)
    assert not objective.needs_keys
    assert not objective.needs_feature_maps


def test_a_sample_alone_reports_nothing() -> None:
    result = WithinModalContrast(WithinModalConfig())(told({"video": (unit(1, 1), unit(2, 1))}, torch.arange(1)))
    assert result.loss.item() == 0
    assert all(math.isnan(value.item()) for value in result.metrics.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    first, second = unit(1).detach().to(dtype), unit(2).detach().to(dtype)
    objective, ids = WithinModalContrast(WithinModalConfig(temperature=0.01)), torch.arange(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = objective(told({"video": (first, second)}, ids)).loss
    expected = objective(told({"video": (first.double(), second.double())}, ids)).loss
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_views_that_agree_have_a_lower_loss_than_views_of_others() -> None:
    first, ids = unit(1).detach(), torch.arange(5)
    objective = WithinModalContrast(WithinModalConfig())
    equal, shifted = (objective(told({"video": (first, other)}, ids)) for other in (first, first.roll(1, 0)))
    assert (equal.metrics["video/top1"].item(), shifted.metrics["video/top1"].item()) == (1, 0)
    assert equal.loss.item() < 0 < shifted.loss.item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modalities": ()}, r"objective.within_modal.modalities must be video, audio or both, each once, got \[\]"),
        ({"modalities": ("video", "video")}, r"modalities must be .*, got \['video', 'video'\]"),
        ({"modalities": ("text",)}, r"modalities must be .*, got \['text'\]"),
        ({"temperature": 0}, "objective.within_modal.temperature must be positive, got 0"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"temperature": math.nan}, "temperature must be positive, got nan"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, users_checks: None) -> None:
    with pytest.raises(ValueError, match=message):
        WithinModalConfig(**settings)
