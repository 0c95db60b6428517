"""Fusion: each method against a loop over items and modalities; padding, missing modalities, products to be learnt."""

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmacc.heads.fusion import FusionConfig, FusionError, FusionHead, FusionMethod
from cmacc.heads.fusion_parts import LowRankJoin, outer_product
from cmacc.heads.sequences import SequenceData

METHODS: tuple[FusionMethod, ...] = get_args(FusionMethod)
WIDTHS = {"text": 3, "audio": 2, "video": 1}
SMALL = FusionConfig(width=4, hidden=16, rank=2, layers=2, heads=2, dropout=0.0)
Rows = dict[str, Tensor]


def batch(seed: int, count: int = 5, steps: int = 4, widths: dict[str, int] | None = None) -> Rows:
    """Random sequences of random lengths, at least 1; a third of the modalities is absent, never all of an item."""
    widths = widths or WIDTHS
    generator = torch.Generator().manual_seed(seed)
    rows: Rows = {}
    for name, width in widths.items():
        rows[name] = torch.randn(count, steps, width, generator=generator, dtype=torch.float64)
        rows[f"{name}_length"] = torch.randint(1, steps + 1, (count,), generator=generator)
    present = torch.rand(count, len(widths), generator=generator) < 2 / 3
    present[torch.arange(count), torch.randint(len(widths), (count,), generator=generator)] = True
    assert not present.all()
    rows["present"] = present
    rows["targets"] = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return rows


def head_of(method: FusionMethod, widths: dict[str, int] | None = None, **settings: Any) -> FusionHead:
    torch.manual_seed(0)
    return FusionHead(method, widths or WIDTHS, 2, **({"config": SMALL} | settings)).double().eval()


def outputs(head: FusionHead, rows: Rows) -> Tensor:
    return head.predict(rows, 0.0)["outputs"]


def alone(rows: Rows, item: int, name: str) -> Tensor | None:
    """The valid steps of one item, or None if it lacks the modality."""
    if not rows["present"][item, list(WIDTHS).index(name)]:
        return None
    return rows[name][item, : int(rows[f"{name}_length"][item])]


def states_of(head: FusionHead, rows: Rows, item: int) -> list[Tensor | None]:
    states: list[Tensor | None] = []
    for name, encoder in zip(WIDTHS, head.fusion.encoders, strict=True):
        steps = alone(rows, item, name)
        states.append(None if steps is None else encoder.lstm(steps)[1][0][0])
    return states


def early(head: FusionHead, rows: Rows, item: int) -> Tensor:
    sequences = [alone(rows, item, name) for name in WIDTHS]
    longest = max(len(steps) for steps in sequences if steps is not None)
    joined = torch.zeros(longest, sum(WIDTHS.values()), dtype=torch.float64)
    start = 0
    for width, steps in zip(WIDTHS.values(), sequences, strict=True):
        if steps is not None:
            joined[: len(steps), start : start + width] = steps
        start += width
    return head.fusion.output(head.fusion.encoder.lstm(joined)[1][0][0])


def late(head: FusionHead, rows: Rows, item: int) -> Tensor:
    pairs = zip(head.fusion.join.predictors, states_of(head, rows, item), strict=True)
    each = [predictor(state) for predictor, state in pairs if state is not None]
    return sum(each[1:], each[0]) / len(each)


def with_ones(head: FusionHead, rows: Rows, item: int) -> list[Tensor]:
    zeros = torch.zeros(SMALL.width, dtype=torch.float64)
    states = [zeros if state is None else state for state in states_of(head, rows, item)]
    return [torch.cat([torch.ones(1, dtype=torch.float64), state]) for state in states]


def tensor(head: FusionHead, rows: Rows, item: int) -> Tensor:
    first, second, third = with_ones(head, rows, item)
    product = torch.stack([a * b * c for a in first for b in second for c in third])
    layers = [layer for layer in head.fusion.join.layers if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        product = (layer.weight @ product + layer.bias).clamp_min(0)
    return layers[-1].weight @ product + layers[-1].bias


def low_rank(head: FusionHead, rows: Rows, item: int) -> Tensor:
    parts, join = with_ones(head, rows, item), head.fusion.join
    result = join.bias.clone()
    for output in range(2):
        for rank in range(SMALL.rank):
            product = torch.ones((), dtype=torch.float64)
            for part, factor in zip(parts, join.factors, strict=True):
                product = product * (part @ factor[rank, :, output])
            result[output] = result[output] + product
    return result


def gated(head: FusionHead, rows: Rows, item: int) -> Tensor:
    states, join, size = states_of(head, rows, item), head.fusion.join, SMALL.width
    together = torch.cat([torch.zeros(size, dtype=torch.float64) if state is None else state for state in states])
    fused = torch.zeros(size, dtype=torch.float64)
    for unit in range(size):
        shown = [number for number, state in enumerate(states) if state is not None]
        weights = [join.gates.weight[number * size + unit] @ together for number in shown]
        weights = [w + join.gates.bias[number * size + unit] for w, number in zip(weights, shown, strict=True)]
        total = sum(math.exp(weight) for weight in weights)
        for weight, number in zip(weights, shown, strict=True):
            state, transform = states[number], join.transforms[number]
            value = (transform.weight[unit] @ state + transform.bias[unit]).tanh()
            fused[unit] += math.exp(weight) / total * value
    return join.output(fused)


def normalised(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    deviation = (x.var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return (x - x.mean(dim=-1, keepdim=True)) / deviation * norm.weight + norm.bias


def transformed(transformer: Any, x: Tensor, source: Tensor | None, *, to_itself: bool = False) -> Tensor:
    """Of one item, valid steps only; ``source`` None: nothing to attend to."""
    for layer in transformer.layers:
        attention, size = layer.attention, x.shape[1]
        keys = x if to_itself else source
        if keys is not None:
            q, k, v = attention.in_proj_weight.split(size)
            bq, bk, bv = attention.in_proj_bias.split(size)
            queries = normalised(layer.attention_norm, x) @ q.T + bq
            keys = normalised(layer.attention_norm, keys)
            values, keys = keys @ v.T + bv, keys @ k.T + bk
            part = size // SMALL.heads
            seen = torch.zeros_like(x)
            for start in range(0, size, part):
                of_head = slice(start, start + part)
                for i in range(len(x)):
                    weights = torch.stack([queries[i, of_head] @ key[of_head] for key in keys]) / math.sqrt(part)
                    seen[i, of_head] = weights.softmax(0) @ values[:, of_head]
            x = x + attention.out_proj(seen)
        x = x + layer.outer(layer.inner(normalised(layer.inner_norm, x)).clamp_min(0))
    return normalised(transformer.norm, x)


def cross_modal(head: FusionHead, rows: Rows, item: int) -> Tensor:
    fusion, size = head.fusion, SMALL.width
    inputs: list[Tensor | None] = []
    for name, project in zip(WIDTHS, fusion.project, strict=True):
        steps = alone(rows, item, name)
        if steps is None:
            inputs.append(None)
            continue
        codes = torch.zeros(len(steps), size, dtype=torch.float64)
        for step in range(len(steps)):
            for wave in range(2):
                angle = step / 10_000.0**wave  # at width 4: two waves, of length 2 pi and 10,000 times that
                codes[step, wave], codes[step, 2 + wave] = math.sin(angle), math.cos(angle)
        inputs.append(steps @ project.weight.T * math.sqrt(size) + codes)
    described = []
    for target, own in enumerate(inputs):
        if own is None:
            described.append(torch.zeros(size * 2, dtype=torch.float64))
            continue
        others = [source for number, source in enumerate(inputs) if number != target]
        seen = [transformed(pair, own, s) for pair, s in zip(fusion.cross[target], others, strict=True)]
        described.append(transformed(fusion.own[target], torch.cat(seen, 1), None, to_itself=True)[-1])
    x = torch.cat(described)
    return fusion.output(x + fusion.outer(fusion.inner(x).clamp_min(0)))


NAIVE: dict[FusionMethod, Callable[[FusionHead, Rows, int], Tensor]] = {
    "early": early, "late": late, "tensor": tensor, "low_rank": low_rank, "gated": gated, "cross_modal": cross_modal,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_against_a_loop_over_items_and_modalities(method: FusionMethod) -> None:
    head, rows = head_of(method), batch(0)
    expected = torch.stack([NAIVE[method](head, rows, item) for item in range(5)])
    # Step codes are made in float32.
    tolerance = 1e-6 if method == "cross_modal" else 1e-12
    torch.testing.assert_close(outputs(head, rows), expected, rtol=0, atol=tolerance)
    assert expected.std(dim=0).min() > 1e-4  # the items differ


def test_the_outer_product_against_einsum_and_three_loops() -> None:
    states = torch.randn(2, 3, 4, dtype=torch.float64)
    a, b, c = torch.cat([torch.ones(2, 3, 1, dtype=torch.float64), states], dim=2).unbind(1)
    product = outer_product(states)
    torch.testing.assert_close(product, torch.einsum("bi,bj,bk->bijk", a, b, c).flatten(1))
    for i in range(5):
        for j in range(5):
            for k in range(5):
                torch.testing.assert_close(product[:, (i * 5 + j) * 5 + k], a[:, i] * b[:, j] * c[:, k])


def test_low_rank_of_full_rank_is_any_linear_map_of_the_tensor() -> None:
    size, count = 3, 2
    weights = torch.randn(size + 1, size + 1, size + 1, count, dtype=torch.float64)
    join = LowRankJoin(3, size, (size + 1) ** 2, count).double()
    with torch.no_grad():
        join.factors.zero_()
        for i in range(size + 1):
            for j in range(size + 1):
                rank = i * (size + 1) + j
                join.factors[0, rank, i] = 1
                join.factors[1, rank, j] = 1
                join.factors[2, rank] = weights[i, j]
    states = torch.randn(6, 3, size, dtype=torch.float64)
    expected = outer_product(states) @ weights.reshape(-1, count)
    torch.testing.assert_close(join(states, torch.ones(6, 3, dtype=torch.bool)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_neither_padding_nor_what_is_absent_matters(method: FusionMethod) -> None:
    head, rows = head_of(method), batch(1)
    before = outputs(head, rows)
    changed = dict(rows)
    for place, name in enumerate(WIDTHS):
        ends = rows[f"{name}_length"] * rows["present"][:, place]
        padding = torch.arange(4) >= ends[:, None]
        assert padding.any()
        changed[name] = rows[name].masked_fill(padding[:, :, None], torch.nan)
        # Of an absent modality, the length does not matter either.
        changed[f"{name}_length"] = torch.where(rows["present"][:, place], rows[f"{name}_length"], 0)
    torch.testing.assert_close(outputs(head, changed), before, rtol=0, atol=0)
    # The last valid step does.
    length = rows["text_length"][rows["present"][:, 0]][0]
    rows["text"][torch.nonzero(rows["present"][:, 0])[0], length - 1] += 1
    assert (outputs(head, rows) - before).abs().max() > 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_longer_padding_changes_nothing(method: FusionMethod) -> None:
    head, rows = head_of(method), batch(2)
    longer = rows | {name: nn.functional.pad(rows[name], (0, 0, 0, 3), value=7.0) for name in WIDTHS}
    torch.testing.assert_close(outputs(head, longer), outputs(head, rows))


@pytest.mark.parametrize("method", METHODS)
def test_every_item_is_on_its_own(method: FusionMethod) -> None:
    head, rows = head_of(method), batch(3)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = {name: values[order] for name, values in rows.items()}
    torch.testing.assert_close(outputs(head, permuted), outputs(head, rows)[order])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "early"])
def test_modalities_of_different_lengths(method: FusionMethod) -> None:
    audio = torch.randn(5, 9, 2, dtype=torch.float64)
    rows = batch(4) | {"audio": audio, "audio_length": torch.tensor([9, 1, 5, 7, 2])}
    assert outputs(head_of(method), rows).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: FusionMethod) -> None:
    widths = {"text": 2, "audio": 1}
    config = FusionConfig(width=2, hidden=3, rank=2, layers=1, heads=1, dropout=0.0)
    head, rows = head_of(method, widths, config=config), batch(5, 3, 2, widths)

    def of_features(text: Tensor, audio: Tensor) -> Tensor:
        return head.loss(rows | {"text": text, "audio": audio}, 0.0)

    assert torch.autograd.gradcheck(of_features, (rows["text"].requires_grad_(), rows["audio"].requires_grad_()))


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_used_and_no_gradient_is_nan(method: FusionMethod) -> None:
    head, rows = head_of(method).train(), batch(6, count=16)
    head.loss(rows, 0.0).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_modalities(method: FusionMethod, count: int) -> None:
    widths = {f"m{i}": i + 1 for i in range(count)}
    if method == "cross_modal" and count == 1:
        with pytest.raises(FusionError, match="cross_modal: must have at least 2 modalities, got m0"):
            head_of(method, widths)
        return
    rows = batch(7, widths={**widths, "other": 1})
    rows["present"] = torch.ones(5, count, dtype=torch.bool)
    assert outputs(head_of(method, widths), rows).shape == (5, 2)


def test_dropout_is_of_training_only() -> None:
    for method in METHODS:
        head, rows = head_of(method, config=FusionConfig(width=4, heads=2, dropout=0.5)), batch(8)
        torch.testing.assert_close(outputs(head, rows), outputs(head, rows), rtol=0, atol=0)
        head.train()
        assert not torch.equal(head.loss(rows, 0.0), head.loss(rows, 0.0))


def test_the_losses_of_the_tasks() -> None:
    rows = batch(9)
    each = outputs(head_of("late"), rows)
    regression = head_of("late").loss(rows, 0.0)
    torch.testing.assert_close(regression, (each - rows["targets"]).abs().sum() / 10)
    classes = torch.tensor([0, 1, 1, 0, 1])
    loss = head_of("late", task="classification").loss(rows | {"targets": classes}, 0.0)
    expected = -sum(math.log(each[i].softmax(0)[c]) for i, c in enumerate(classes)) / 5
    assert loss.item() == pytest.approx(expected)
    labels = (rows["targets"] > 0).double()
    loss = head_of("late", task="multilabel").loss(rows | {"targets": labels}, 0.0)
    p = each.sigmoid()
    torch.testing.assert_close(loss, -(labels * p.log() + (1 - labels) * (1 - p).log()).sum() / 10)


def planted(seed: int, count: int, target: Callable[[Tensor], Tensor]) -> Rows:
    """Of every modality, the first feature holds one number in [-1, 1] with noise; the target is made of both."""
    generator = torch.Generator().manual_seed(seed)
    held = 2 * torch.rand(count, 2, generator=generator) - 1
    rows: Rows = {"present": torch.ones(count, 2, dtype=torch.bool), "targets": target(held)[:, None]}
    for place, name in enumerate(("text", "audio")):
        rows[name] = 0.1 * torch.randn(count, 3, 2, generator=generator)
        rows[name][:, :, 0] += held[:, place, None]
        rows[f"{name}_length"] = torch.randint(1, 4, (count,), generator=generator)
    return rows


def product(held: Tensor) -> Tensor:
    return held.prod(1)


def trained(method: FusionMethod, rows: Rows, steps: int = 60) -> FusionHead:
    torch.manual_seed(0)
    config = FusionConfig(width=8, hidden=16, rank=4, layers=1, heads=2, dropout=0.0)
    head = FusionHead(method, {"text": 2, "audio": 2}, 1, config=config)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for step in range(steps):
        optimizer.zero_grad()
        head.loss(rows, step / steps).backward()
        optimizer.step()
    return head.eval()


def relative_error(head: FusionHead, rows: Rows) -> float:
    """Mean absolute error, against that of the best constant."""
    targets = rows["targets"]
    return float((outputs(head, rows) - targets).abs().mean() / (targets - targets.median()).abs().mean())


@pytest.mark.parametrize("method", METHODS)
def test_all_but_the_additive_method_learn_a_product(method: FusionMethod) -> None:
    error = relative_error(trained(method, planted(0, 192, product)), planted(1, 500, product))
    assert error > 0.95 if method == "late" else error < 0.7


@pytest.mark.parametrize("method", METHODS)
def test_with_shuffled_targets_nothing_is_learnt(method: FusionMethod) -> None:
    rows = planted(0, 192, product)
    rows["targets"] = rows["targets"][torch.randperm(192)]
    assert relative_error(trained(method, rows, steps=25), planted(1, 500, product)) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_without_a_modality_it_is_worse_but_works(method: FusionMethod) -> None:
    def total(held: Tensor) -> Tensor:
        return held.sum(1)

    head, rows = trained(method, planted(0, 128, total), steps=30), planted(1, 500, total)
    error = relative_error(head, rows)
    rows["present"][:, 1] = False
    alone_of = outputs(head, rows)
    assert error < 0.5
    assert relative_error(head, rows) > error + 0.2
    # One of two independent numbers of equal variance correlates with their sum by 0.71.
    assert torch.corrcoef(torch.cat([alone_of, rows["targets"]], 1).T)[0, 1] > 0.55


def test_with_one_modality_the_others_are_not_seen() -> None:
    # An item that lacks all but the text has the same prediction as one whose others are anything.
    for method in METHODS:
        head, rows = head_of(method), batch(10)
        rows["present"] = torch.tensor([[True, False, False]]).expand(5, 3).clone()
        before = outputs(head, rows)
        rows["audio"], rows["video"] = torch.randn_like(rows["audio"]), torch.randn_like(rows["video"])
        torch.testing.assert_close(outputs(head, rows), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"present": torch.tensor([[True, True, True]] * 4 + [[False] * 3])}, "row 4 of the batch has none"),
        ({"present": torch.ones(5, 2, dtype=torch.bool)}, r"booleans of shape \(B, 3\), got torch.bool \(5, 2\)"),
        ({"present": torch.ones(5, 3)}, "booleans of shape .* got torch.float32"),
        ({"audio": None}, "rows must hold text, .* got no audio$"),
        ({"audio_length": None}, "got no audio_length"),
        ({"audio": torch.zeros(5, 4, 3)}, r"audio: must have shape \(5, T, 2\), T at least 1, got \(5, 4, 3\)"),
        ({"audio": torch.zeros(5, 0, 2)}, r"audio: must have shape \(5, T, 2\), T at least 1, got \(5, 0, 2\)"),
        ({"text_length": torch.ones(5)}, r"text_length: must be integers of shape \(5,\), got torch.float32"),
        ({"text_length": torch.tensor([1, 2, 5, 1, 1])}, r"text_length: must be in \[0, 4\], .* got 5 in row 2"),
        (
            {"text_length": torch.tensor([1, 2, 0, 1, 1]), "present": torch.ones(5, 3, dtype=torch.bool)},
            "at least 1 where the modality is present, got 0 in row 2",
        ),
        ({"targets": None}, r"targets of regression must be floats of shape \(5, 2\), got none"),
        ({"targets": torch.zeros(5)}, r"must be floats of shape \(5, 2\), got torch.float32 \(5,\)"),
        ({"targets": torch.zeros(5, 2, dtype=torch.int64)}, "must be floats of shape .* got torch.int64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    rows = {name: values for name, values in (batch(11) | change).items() if values is not None}
    with pytest.raises(FusionError, match=message):
        head_of("gated").loss(rows, 0.0)


def test_the_rows_of_a_set_of_sequences_fit_a_head() -> None:
    data = SequenceData(
        features={"text": np.ones((3, 4, 3), np.float32), "audio": np.ones((3, 4, 2), np.float32)},
        lengths={"text": np.array([4, 0, 1]), "audio": np.array([2, 3, 0])},
        targets=np.ones((3, 1), np.float32),
        splits={"train": np.arange(3)},
    )
    for method in METHODS:
        head = FusionHead(method, data.widths, 1)
        assert head.loss(data.rows(), 0.0).isfinite()


def test_early_fusion_needs_aligned_sequences() -> None:
    with pytest.raises(FusionError, match=r"early: sequences must be aligned, .* got 4 and 9 steps; the other methods"):
        outputs(head_of("early"), batch(4) | {"audio": torch.zeros(5, 9, 2, dtype=torch.float64)})


def test_class_numbers_must_be_integers() -> None:
    with pytest.raises(FusionError, match=r"classification must be class numbers of shape \(5,\)"):
        head_of("late", task="classification").loss(batch(12), 0.0)


@pytest.mark.usefixtures("users_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("middle", WIDTHS, 1), "method must be one of early, .* got middle"),
        (("late", WIDTHS, 1, "ranking"), "task must be one of regression, .* got ranking"),
        (("late", {}, 1), "widths must be of at least one modality"),
        (("late", {"text": 0}, 1), "widths must be .* all at least 1, got {'text': 0}"),
        (("late", WIDTHS, 1, "classification"), "outputs of classification must be at least 2, got 1"),
        (("tensor", WIDTHS | {"touch": 1, "smell": 1}, 1), "at most 1,048,576, got 1,419,857 for width 16 and 5"),
        (("cross_modal", WIDTHS, 1, "regression", FusionConfig(width=6)), "multiple of heads, got 6 and 4 heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        FusionHead(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"width": 0}, "fusion.width must be at least 1, got 0"), ({"dropout": 1.0}, r"must be in \[0, 1\), got 1.0")],
)
def test_a_config_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        FusionConfig(**settings)
