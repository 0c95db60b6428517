"""The loss of crops against a loop in plain Python, where crops begin, and its special cases."""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.objectives import Encoded, ObjectiveInputs
from cmacc.objectives.objective import DrawingObjective
from cmacc.objectives.stica import STiCA, STiCAConfig, random_crop

from .stand_ins import Embedded, Views

CHANNELS, SIZE = 3, 5
Rows = NDArray[np.float64]


@dataclass
class Projection:
    """A pooling that sees where things are in a crop, and a head; it counts its calls."""

    weight: Tensor = field(
        default_factory=lambda: torch.randn(
            2 * CHANNELS, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )
    )
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, modality: str, crop: Tensor) -> Encoded:
        assert modality == "video"
        self.shapes.append(tuple(crop.shape[2:]))
        return Embedded(self.embedding(crop), feature_map=crop)

    def embedding(self, crop: Tensor) -> Tensor:
        pooled = torch.cat([crop.mean((2, 3, 4)), crop.square().mean((2, 3, 4))], dim=1)
        return normalize(pooled @ self.weight, dim=1)


def maps_of(count: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(count, CHANNELS, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def inputs_of(
    first: Tensor, second: Tensor, project: Projection, seed: int = 0, ids: Tensor | None = None
) -> ObjectiveInputs:
    count = len(first)
    generator = torch.Generator().manual_seed(4)
    audio = normalize(torch.randn(count, SIZE, generator=generator, dtype=torch.float64), dim=1)
    return ObjectiveInputs(
        queries={
            "video": Embedded(project.embedding(first), feature_map=first),
            "audio": Embedded(audio, feature_map=torch.zeros(count, 1)),
        },
        keys={},
        negatives={},
        sample_ids=torch.arange(count) if ids is None else ids,
        more={"view": Embedded(project.embedding(second), feature_map=second)},
        project=project,
        rng=np.random.default_rng(seed),
    )


def contrast(queries: Rows, keys: Rows, temperature: float, decoupled: bool, ids: list[int]) -> float:
    losses = []
    for i, query in enumerate(queries):
        scores = [float(query @ key) / temperature for key in keys]
        others = [score for j, score in enumerate(scores) if ids[j] != ids[i]]
        denominator = others if decoupled and others else [*([] if decoupled else others), scores[i]]
        losses.append(math.log(sum(math.exp(score) for score in denominator)) - scores[i])
    return sum(losses) / len(losses)


def naive(
    config: STiCAConfig,
    told: ObjectiveInputs,
    project: Projection,
    seed: int,
    keys: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float]:
    """Loss and crops' loss. ``keys``: the maps of large crops where they are keys of small ones."""
    rng, ids = np.random.default_rng(seed), told.sample_ids.tolist()

    def symmetric(x: Rows, y: Rows, temperature: float) -> float:
        both = contrast(x, y, temperature, config.decoupled, ids), contrast(y, x, temperature, config.decoupled, ids)
        return sum(both) / 2

    def box(shape: tuple[int, ...], shares: tuple[float, float, float]) -> tuple[slice, ...]:
        lengths = [max(1, round(share * size)) for share, size in zip(shares, shape, strict=True)]
        starts = [int(rng.integers(0, size - length + 1)) for length, size in zip(lengths, shape, strict=True)]
        return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))

    def rows(feature_map: Tensor, place: tuple[slice, ...]) -> Rows:
        crop = feature_map[(slice(None), slice(None), *place)].detach()
        return project.embedding(crop).numpy()

    views = [told.queries["video"], told.more["view"]]
    maps = [view.feature_map for view in views]
    assert maps[0] is not None
    assert maps[1] is not None
    whole = [view.embedding.detach().numpy() for view in views]
    sound = told.queries["audio"].embedding.numpy()
    across = sum(symmetric(view, sound, config.temperature) for view in whole) / 2
    terms = []
    for kind in ("space", "time"):
        boxes: dict[str, list[list[tuple[slice, ...]]]] = {}
        for size, count in (("large", config.large_crops), ("small", config.small_crops)):
            share = getattr(config, f"{kind}_{size}")
            shares = (1.0, share, share) if kind == "space" else (share, 1.0, 1.0)
            boxes[size] = [[box(tuple(one.shape[2:]), shares) for _ in range(count)] for one in maps if one is not None]
        for i in range(config.large_crops):
            pair = [rows(maps[v], boxes["large"][v][i]) for v in (0, 1)]  # type: ignore[arg-type]
            terms.append(symmetric(pair[0], pair[1], config.crop_temperature))
            for (small, large), j in itertools.product(((0, 1), (1, 0)), range(config.small_crops)):
                queries = rows(maps[small], boxes["small"][small][j])  # type: ignore[arg-type]
                of_keys = rows((keys or maps)[large], boxes["large"][large][i])  # type: ignore[arg-type]
                terms.append(contrast(queries, of_keys, config.crop_temperature, config.decoupled, ids))
    if not terms:
        return across, math.nan
    crops = sum(terms) / len(terms)
    return (1 - config.alpha) * across + config.alpha * crops, crops


@pytest.mark.parametrize(
    ("large", "small", "count", "shape", "decoupled"),
    [
        (1, 1, 4, (4, 7, 7), False),
        (1, 1, 5, (8, 4, 5), True),
        (2, 3, 4, (3, 4, 4), True),
        (3, 0, 2, (1, 3, 1), False),
        (0, 0, 4, (2, 2, 2), True),
        (1, 2, 1, (2, 1, 1), False),
        (1, 1, 1, (1, 1, 1), True),
    ],
)
def test_the_loss_is_that_of_the_naive_loop(
    large: int, small: int, count: int, shape: tuple[int, int, int], decoupled: bool
) -> None:
    config = STiCAConfig(0.3, 0.6, alpha=0.3, large_crops=large, small_crops=small, decoupled=decoupled)
    first, second = maps_of(count, shape)
    project = Projection()
    told = inputs_of(first, second, project, seed=7)
    result = STiCA(config)(told)
    loss, crops = naive(config, told, project, seed=7)
    assert result.loss.item() == pytest.approx(loss, rel=1e-10, abs=1e-12)
    assert len(project.shapes) == 4 * (large + small)
    wanted = {"loss": loss, "crops/loss": crops}
    if count == 1:  # nothing to compare with
        wanted = dict.fromkeys(wanted, math.nan)
    assert {name: result.metrics[name].item() for name in wanted} == pytest.approx(wanted, rel=1e-10, nan_ok=True)
    assert not any(value.requires_grad for value in result.metrics.values())


def test_rows_of_one_sample_are_not_negatives_of_each_other() -> None:
    config, ids, project = STiCAConfig(), torch.tensor([4, 1, 4, 2, 1]), Projection()
    told = inputs_of(*maps_of(5, (4, 4, 4)), project, seed=2, ids=ids)
    assert STiCA(config)(told).loss.item() == pytest.approx(naive(config, told, project, seed=2)[0], rel=1e-10)


@pytest.mark.parametrize("decoupled", [True, False])
def test_crops_as_large_as_the_map_give_the_uncropped_term_exactly(decoupled: bool) -> None:
    config = STiCAConfig(
        space_large=1.0, space_small=1.0, time_large=1.0, time_small=1.0, alpha=1.0, large_crops=2, small_crops=0,
        decoupled=decoupled,
    )  # fmt: skip
    project = Projection()
    told = inputs_of(*maps_of(4, (3, 4, 5)), project)
    objective = STiCA(config)
    one, other, ids = told.queries["video"].embedding, told.more["view"].embedding, told.sample_ids
    uncropped = [objective.crop_contrast(one, other, ids, ids).loss, objective.crop_contrast(other, one, ids, ids).loss]
    assert torch.equal(objective(told).loss, torch.stack(uncropped).mean())
    assert set(project.shapes) == {(3, 4, 5)}
    with_small = STiCA(dataclasses.replace(config, small_crops=2))(told)
    torch.testing.assert_close(with_small.loss, torch.stack(uncropped).mean(), rtol=1e-14, atol=0)


def test_gradients_without_small_crops_are_finite_differences() -> None:
    objective = STiCA(STiCAConfig(small_crops=0, large_crops=2, decoupled=False))
    first, second = (one.requires_grad_() for one in maps_of(3, (2, 2, 3)))

    def loss(one: Tensor, other: Tensor) -> Tensor:
        total: Tensor = objective(inputs_of(one, other, Projection())).loss
        return total

    assert torch.autograd.gradcheck(loss, (first, second), fast_mode=True)


def test_gradients_with_small_crops_are_finite_differences_at_fixed_keys() -> None:
    """Large crops are constants for the small ones: the difference quotient keeps the maps of keys as they are."""
    config, project = STiCAConfig(large_crops=2, small_crops=2, alpha=0.7), Projection()
    maps = [one.requires_grad_() for one in maps_of(3, (3, 3, 3))]
    gradients = torch.autograd.grad(STiCA(config)(inputs_of(maps[0], maps[1], project)).loss, maps)
    fixed = (maps[0].detach().clone(), maps[1].detach().clone())
    generator = torch.Generator().manual_seed(9)
    for number in (0, 1):
        direction = torch.randn(maps[number].shape, generator=generator, dtype=torch.float64)
        quotient = 0.0
        for sign in (1, -1):
            moved = [one.clone() for one in fixed]
            moved[number] += sign * 1e-5 * direction
            quotient += sign * naive(config, inputs_of(moved[0], moved[1], project), project, 0, fixed)[0] / 2e-5
        assert quotient == pytest.approx((gradients[number] * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize(("axis", "shares"), [(2, (0.5, 1.0)), (3, (1.0, 0.5)), (4, (1.0, 0.5))])
def test_crops_begin_anywhere_with_equal_chances_the_last_place_included(
    axis: int, shares: tuple[float, float]
) -> None:
    """Chi-square at 0.1 %. In the released code no crop reaches the end of the map."""
    size, rng = 8, np.random.default_rng(11)
    places = torch.arange(size).view([-1 if i == axis else 1 for i in range(5)]).expand(1, 1, size, size, size)
    starts = [int(random_crop(places.float(), *shares, rng).min()) for _ in range(2000)]
    counts = np.bincount(starts, minlength=5)
    assert len(counts) == 5
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((4, 7, 7), [(4, 6, 6), (4, 4, 4), (3, 7, 7), (2, 7, 7)]),  # the paper's
        ((8, 4, 5), [(8, 3, 4), (8, 2, 3), (6, 4, 5), (4, 4, 5)]),  # of the tiny backbone
        ((1, 1, 1), [(1, 1, 1)] * 4),
    ],
)
def test_sizes_are_whole_places_and_each_view_has_crops_of_its_own(
    shape: tuple[int, int, int], wanted: list[tuple[int, int, int]]
) -> None:
    project = Projection()
    STiCA()(inputs_of(*maps_of(2, shape), project))
    assert project.shapes == [each for size in wanted for each in (size, size)]


def test_the_same_generator_gives_the_same_crops() -> None:
    def loss(seed: int) -> float:
        return float(STiCA()(inputs_of(*maps_of(4, (4, 7, 7)), Projection(), seed)).loss)

    assert loss(1) == loss(1) != loss(2)


def test_without_crops_there_is_only_video_against_audio() -> None:
    told = inputs_of(*maps_of(4, (2, 3, 3)), Projection())
    bare = dataclasses.replace(
        told,
        queries={name: dataclasses.replace(one, feature_map=None) for name, one in told.queries.items()},  # type: ignore[type-var]
    )
    none, weightless = STiCA(STiCAConfig(large_crops=0, small_crops=0)), STiCA(STiCAConfig(alpha=0.0))
    assert not none.needs_feature_maps
    assert not weightless.needs_feature_maps
    result = none(bare)
    assert torch.equal(result.loss, weightless(bare).loss)
    metrics = result.metrics
    assert math.isnan(metrics["crops/loss"].item())
    both = (metrics["video_to_audio/loss"] + metrics["audio_to_video/loss"]) / 2
    torch.testing.assert_close(metrics["loss"], both)


def test_the_other_view_is_drawn_with_its_map() -> None:
    objective = STiCA()
    assert isinstance(objective, DrawingObjective)
    assert objective.needs_feature_maps
    drawn = objective.draw(Views({"video": torch.zeros(2, 3, 4, 8, 8)}))
    assert not drawn.given
    (extra,) = drawn.inputs.values()
    assert (extra.modality, extra.with_feature_map) == ("video", True)
    assert torch.equal(extra.tensor, torch.ones(2, 3, 4, 8, 8))


def test_half_precision_is_computed_in_float32() -> None:
    first, second = maps_of(4, (4, 4, 4))
    project = Projection()
    exact = STiCA()(inputs_of(first, second, project)).loss
    project.weight = project.weight.float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = STiCA()(inputs_of(first.float(), second.float(), project)).loss
    assert exact.item() == pytest.approx(rough.item(), abs=0.1)
    assert rough.isfinite()


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0.0, "positive and finite, got 0.0"),
        ("crop_temperature", -1.0, "positive and finite, got -1.0"),
        ("crop_temperature", math.nan, "positive and finite, got nan"),
        ("alpha", 1.5, r"in \[0, 1\], got 1.5"),
        ("space_large", 0.0, r"in \(0, 1\], got 0.0"),
        ("time_large", 1.2, r"in \(0, 1\], got 1.2"),
        ("space_small", 0.9, r"above 0 and at most space_large \(0.857\d*\), got 0.9"),
        ("time_small", 0.0, r"above 0 and at most time_large \(0.75\), got 0.0"),
        ("small_crops", -1, "at least 0, got -1"),
        ("large_crops", -2, "at least 0, got -2"),
    ],
)
def test_bad_settings_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective\.stica\.{name} must be {message}"):
        STiCAConfig(**{name: value})


@pytest.mark.usefixtures("users_checks")
def test_what_cannot_be_cropped_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^objective\.stica\.small_crops must be 0 without large crops, .* got 1"):
        STiCAConfig(large_crops=0)
    told = inputs_of(*maps_of(2, (1, 2, 2)), Projection())
    for feature_map, got in ((None, "none"), (torch.zeros(2, 3, 4), r"\(2, 3, 4\)")):
        video = dataclasses.replace(told.queries["video"], feature_map=feature_map)  # type: ignore[type-var]
        broken = dataclasses.replace(told, queries={**told.queries, "video": video})
        with pytest.raises(
            ValueError, match=rf"^STiCA: the video must have a feature map \(M, C, T, H, W\), got {got}"
        ):
            STiCA()(broken)
