"""Both directions added, what is logged where nothing was contrasted, and objectives added with weights."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from cmacc.objectives import BidirectionalContrast, Objective, ObjectiveInputs, ObjectiveResult, WeightedObjectives

from .stand_ins import Embedded

TEMPERATURE = 0.2


@dataclass(frozen=True)
class Held:
    embedding: Tensor
    sample_ids: Tensor


def embedded(generator: torch.Generator, count: int = 5) -> Embedded:
    rows = normalize(torch.randn(count, 8, generator=generator, dtype=torch.float64), dim=1)
    return Embedded(rows.requires_grad_())


def inputs(negatives: bool) -> ObjectiveInputs:
    generator = torch.Generator().manual_seed(1)
    held = {
        name: Held(embedded(generator, 7).embedding.detach(), torch.arange(100, 107)) for name in ("video", "audio")
    }
    return ObjectiveInputs(
        {name: embedded(generator) for name in ("video", "audio")},
        {name: embedded(generator) for name in ("video", "audio")},
        held if negatives else {},
        torch.arange(5),
    )


def naive(queries: Tensor, keys: Tensor, dictionary: Tensor) -> Tensor:
    """Cross entropy of each query's own key among all keys and the dictionary."""
    return cross_entropy(queries @ torch.cat([keys, dictionary]).T / TEMPERATURE, torch.arange(len(queries)))


def test_each_query_meets_the_keys_and_the_dictionary_of_the_other_modality() -> None:
    told = inputs(negatives=True)
    result = BidirectionalContrast(TEMPERATURE, batch_keys="momentum")(told)
    wanted = {
        f"{query}_to_{key}/loss": naive(
            told.queries[query].embedding, told.keys[key].embedding, told.negatives[key].embedding
        )
        for query, key in (("video", "audio"), ("audio", "video"))
    }
    assert result.loss.item() == pytest.approx(sum(value.item() for value in wanted.values()), rel=1e-12)
    assert {name: result.metrics[name].item() for name in wanted} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}, rel=1e-12
    )
    assert result.metrics["loss"].item() == result.loss.item()


def test_the_estimate_of_mutual_information_is_of_the_cross_entropy_whatever_is_minimised() -> None:
    told = inputs(negatives=True)
    plain, decoupled = (BidirectionalContrast(TEMPERATURE, decoupled=d)(told) for d in (False, True))
    assert decoupled.loss.item() < plain.loss.item()
    for name in plain.metrics:
        if name.endswith(("mutual_information", "batch_loss", "top1", "ceiling")):
            assert decoupled.metrics[name].item() == plain.metrics[name].item()


@pytest.mark.parametrize("batch_keys", ["online", "momentum"])
def test_without_any_negative_nothing_is_reported(batch_keys: str) -> None:
    """A loss of 0 and a top-1 of 1 would be the best of all, and were logged at the first step of such runs."""
    objective = BidirectionalContrast(TEMPERATURE, in_batch=False, batch_keys=batch_keys)  # type: ignore[arg-type]
    alone, contrasted = objective(inputs(negatives=False)), objective(inputs(negatives=True))
    assert alone.loss.item() == 0
    figures = {name for name in alone.metrics if name.rpartition("/")[2] in ("loss", "top1", "mutual_information")}
    assert len(figures) == 7
    assert all(alone.metrics[name].isnan() for name in figures)
    assert all(contrasted.metrics[name].isfinite() for name in figures)


class Length(nn.Module):
    """An objective with a weight of its own, that looks at feature maps."""

    needs_keys = False
    needs_feature_maps = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, told: ObjectiveInputs) -> ObjectiveResult:
        loss = self.scale * told.queries["video"].feature.sum()
        return ObjectiveResult(loss, {"loss": loss.detach()})


def test_objectives_add_with_their_weights_and_ask_for_what_any_of_them_needs() -> None:
    told, contrast, length = inputs(negatives=True), BidirectionalContrast(TEMPERATURE), Length()
    both = WeightedObjectives({"contrast": (1.0, contrast), "length": (0.25, length)})
    result = both(told)
    wanted = contrast(told).loss.item() + 0.25 * length(told).loss.item()
    assert result.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert result.metrics["loss"].item() == result.loss.item()
    assert result.metrics["contrast/video_to_audio/loss"] == contrast(told).metrics["video_to_audio/loss"]
    assert (both.needs_keys, both.needs_feature_maps) == (True, True)
    assert isinstance(both, Objective)
    assert list(both.parameters()) == [length.scale]
    with pytest.raises(ValueError, match="WeightedObjectives: terms must be at least one, got none"):
        WeightedObjectives({})
