"""CACE-Net: the contrast against the released form and hand checks, the guidance against loops, the switch."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmacc.heads.cace_net import CaceNet, CaceNetConfig, CoGuidance, segment_contrast
from cmacc.heads.cmbs import Cmbs, CmbsConfig
from cmacc.heads.segment_accuracy import EventError, event_auroc, segment_accuracy

from .small import CLASSES, LABELS, STREAMS, Rows, random_rows

CONFIG = CaceNetConfig(base=CmbsConfig(streams=STREAMS))


def built(**settings: Any) -> CaceNet:
    return CaceNet(5, 4, CLASSES, replace(CONFIG, **settings)).double().eval()


def naive_contrast(rows: Tensor, other_rows: Tensor, event: Tensor, tau: float) -> float:
    """The released form: sums of exponentials, item by item."""
    total, items_seen = 0.0, 0
    for b in range(len(rows)):
        items = [row / row.norm() for row in [*rows[b], *other_rows[b]]]
        times = len(rows[b])
        for i, item in enumerate(items):
            others = [j for j in range(2 * times) if j != i]
            if event[b, i % times]:
                positives = [j for j in others if event[b, j % times]]
                assert len(positives) == 2 * int(event[b].sum()) - 1
            else:
                positives = [j for j in others if j % times == i % times]
            e = {j: math.exp(float(item @ items[j]) / tau) for j in others}
            total += -math.log(sum(e[j] for j in positives) / sum(e.values())) + math.log(len(positives))
            items_seen += 1
    return total / items_seen


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_contrast_is_the_released_form(times: int, tau: float) -> None:
    rows, other_rows = torch.randn(2, 6, times, 5, dtype=torch.float64)
    event = torch.rand(6, times) < 0.5
    event[0], event[1] = False, True
    expected = naive_contrast(rows, other_rows, event, tau)
    assert float(segment_contrast(rows, other_rows, event, tau)) == pytest.approx(expected, abs=1e-12)


def test_contrast_by_hand() -> None:
    same = torch.ones(1, 2, 3)
    both = torch.tensor([[True, True]])
    assert float(segment_contrast(same, same, both, 0.01)) == pytest.approx(1.0986, abs=1e-4)
    for event in (True, False):
        one = segment_contrast(torch.randn(1, 1, 3), torch.randn(1, 1, 3), torch.tensor([[event]]), 0.01)
        assert float(one) == pytest.approx(0, abs=1e-5)


def test_contrast_stays_finite_where_exponentials_overflow() -> None:
    rows = torch.randn(3, 4, 5, requires_grad=True)
    loss = segment_contrast(rows, -rows.detach(), torch.tensor([[True, False, True, False]] * 3), 0.001)
    (gradient,) = torch.autograd.grad(loss, rows)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_gradients_of_the_contrast() -> None:
    rows, other_rows = torch.randn(2, 2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    event = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.autograd.gradcheck(lambda *both: segment_contrast(*both, event, 0.5), (rows, other_rows))


def test_guidance_is_the_naive_one() -> None:
    module = CoGuidance(4, CONFIG).double().eval()
    places, audio = torch.randn(2, 3, 2, 12, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    result = module(places, audio)
    inner, spatial = module.audio_attention, module.among_places
    for b in range(2):
        refined, queries = [], []
        for t in range(3):
            own = inner.attention
            weights = torch.stack([own.query(audio[b, t]) @ own.key(audio[b, s]) for s in range(3)]).exp()
            value = sum(w * own.value(audio[b, s]) for s, w in enumerate(weights / weights.sum()))
            refined.append(inner.norm(audio[b, t] + value))
            seen = []
            for n in range(2):
                own = spatial.attention
                weights = torch.stack([own.query(places[b, t, n]) @ own.key(places[b, t, m]) for m in range(2)]).exp()
                value = sum(w * own.value(places[b, t, m]) for m, w in enumerate(weights / weights.sum()))
                seen.append(spatial.norm(places[b, t, n] + value))
            queries.append(module.guide.query((seen[0] + seen[1]) / 2))
        for t in range(3):
            weights = torch.stack([queries[t] @ module.guide.key(item) for item in refined]).exp()
            guide = sum(w * module.guide.value(item) for w, item in zip(weights / weights.sum(), refined, strict=True))
            torch.testing.assert_close(result[b, t], audio[b, t] * (1 + 0.3 / (1 + torch.exp(-guide))))


def test_without_guidance_and_contrast_it_is_cmbs() -> None:
    head, rows = built(psi=0.0, switch_on=1.0), random_rows()
    base = Cmbs(5, 4, CLASSES, CONFIG.base).double().eval()
    base.load_state_dict({name: part for name, part in head.state_dict().items() if name in base.state_dict()})
    torch.testing.assert_close(head.loss(rows, 0.99), base.loss(rows, 0.0))
    torch.testing.assert_close(head.predict(rows, 0.99), base.predict(rows, 0.0))


def test_the_switch_adds_contrast_and_enhances_only_the_event() -> None:
    head, rows = built(), random_rows()
    fused, before = head(rows, 0.1249)
    _, after = head(rows, 25 / 200)  # epoch 25 of 200
    r = head.contrasted(fused)
    torch.testing.assert_close(after.event, head.core.event(fused + 0.6 * r).squeeze(-1))
    assert not torch.allclose(after.event, before.event)
    for name in ("classes", "streams", "video_gate", "audio_gate"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))
    # In evaluation mode there is no noise: both rows of a segment are equal.
    plain = built(contrast_weight=0.0)
    plain.load_state_dict(head.state_dict())
    contrast = segment_contrast(r, r, LABELS != CLASSES, 0.01)
    torch.testing.assert_close(head.loss(rows, 0.125) - plain.loss(rows, 0.125), contrast)
    torch.testing.assert_close(head.loss(rows, 0.12), plain.loss(rows, 0.12))


def test_noise_is_only_in_training_and_follows_the_seed() -> None:
    head, rows = built(base=CmbsConfig(streams=replace(STREAMS, attention_dropout=0.0))), random_rows()
    quiet = float(head.loss(rows, 0.5).detach())
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(head.train().loss(rows, 0.5).detach()))
    assert losses[0] == losses[1] != losses[2]
    assert quiet not in losses
    assert float(head.eval().loss(rows, 0.5).detach()) == quiet


@pytest.mark.parametrize(("times", "places"), [(1, 1), (3, 1), (10, 4)])
def test_any_length_places_and_a_batch_of_one(times: int, places: int) -> None:
    head, rows = built(), random_rows(torch.zeros(1, times, dtype=torch.long), places)
    assert head.loss(rows, 0.5).isfinite()
    assert {part.shape for part in head.predict(rows, 0.5).values()} == {torch.Size([1, times])}


def planted(count: int, seed: int) -> Rows:
    """Three of six seconds, in a ring, are events, of which both modalities tell the class."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (count, 1), generator=generator)
    event = (torch.arange(6) - torch.randint(6, (count, 1), generator=generator)) % 6 < 3
    labels = torch.where(event, classes, CLASSES)
    directions = 2 * torch.eye(CLASSES + 1)[:, :CLASSES][labels]
    noise = 0.4 * torch.randn(2, count, 6, CLASSES, generator=generator)
    return {"video": directions + noise[0], "audio": directions + noise[1], "labels": labels}


def trained(rows: Rows) -> CaceNet:
    head = CaceNet(3, 3, CLASSES, replace(CONFIG, temperature=0.1))
    optimiser = torch.optim.Adam(head.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        chosen = torch.randint(len(rows["labels"]), (32,), generator=generator)
        optimiser.zero_grad()
        head.loss({name: part[chosen] for name, part in rows.items()}, step / 30).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimiser.step()
    return head.eval()


def test_it_learns_what_is_planted_and_nothing_of_shuffled_labels() -> None:
    rows, test = planted(200, 0), planted(200, 1)
    predicted = trained(rows).predict(test, 1.0)
    assert segment_accuracy(predicted["classes"], test["labels"]) > 0.9
    assert event_auroc(predicted["gates"], test["labels"] != CLASSES) > 0.95
    shuffled = rows | {"labels": rows["labels"][torch.randperm(200)]}
    predicted = trained(shuffled).predict(test, 1.0)
    assert segment_accuracy(predicted["classes"], test["labels"]) < 0.55  # always background: 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CaceNetConfig(weak=True), r"weak must be False, .* use CMBS or the linear head\), got True"),
        (lambda: CaceNetConfig(temperature=0.0), "CACE-Net: temperature must be above 0, got 0.0"),
        (lambda: CaceNetConfig(switch_on=1.5), r"CACE-Net: switch_on must be in \[0, 1\], got 1.5"),
        (lambda: CaceNetConfig(psi=-1.0), "CACE-Net: psi must be at least 0 and finite, got -1.0"),
        (lambda: CaceNet(0, 4, 3), "CACE-Net: video_width must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(build: Any, message: str) -> None:
    with pytest.raises(EventError, match=message):
        build()
