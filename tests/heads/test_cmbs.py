"""CMBS: gates, scores and losses against loops in float64, hand checks of the released forms, and planted problems.

Attention, streams and fusion have their own loops in ``test_event_attention.py``; here they are used as they are.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cmacc.heads.cmbs import Cmbs, CmbsConfig, EventScores, WeakCmbs, WeakCmbsConfig, supervised_loss
from cmacc.heads.segment_accuracy import EventError, event_auroc, segment_accuracy

from .small import CLASSES, LABELS, STREAMS, Rows, random_rows


def supervised(**settings: Any) -> Cmbs:
    return Cmbs(5, 4, CLASSES, CmbsConfig(streams=STREAMS, **settings)).double().eval()


def weak(**settings: Any) -> WeakCmbs:
    return WeakCmbs(5, 4, CLASSES, WeakCmbsConfig(streams=STREAMS, **settings)).double().eval()


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def naive_top(scores: list[Tensor], count: int) -> Tensor:
    """Class by class, the mean of the highest."""
    classes = range(len(scores[0]))
    return torch.stack([torch.stack(sorted((s[k] for s in scores), reverse=True)[:count]).mean() for k in classes])


def naive_supervised(head: Cmbs, rows: Rows) -> tuple[Tensor, list[dict[str, Any]]]:
    """The loss, and each video's scores."""
    alpha, gamma, best = head.config.alpha, head.config.gamma, head.config.best_seconds
    places = head.places(rows["video"])
    streams = head.core.streams(head.attention(places, rows["audio"]), rows["audio"])
    found, event_loss, gate_loss, class_loss, stream_loss, with_event = [], 0.0, 0.0, 0.0, 0.0, 0
    for b, labels in enumerate(rows["labels"]):
        times = range(len(labels))
        gates = {"a": sigma(streams.audio_gate[b]), "v": sigma(streams.video_gate[b])}
        v = [streams.video[b, t] + alpha * gates["a"][t] * streams.video[b, t] for t in times]
        a = [streams.audio[b, t] + alpha * gates["v"][t] * streams.audio[b, t] for t in times]
        av = naive_top([head.core.video_classes(x) for x in v], best)
        av = (av + naive_top([head.core.audio_classes(x) for x in a], best)) / 2
        fused = head.core.fusion(torch.stack(v)[None], torch.stack(a)[None])[0]
        event = [head.core.event(fused[t])[0] for t in times]
        highest = torch.stack([fused[:, d].max() for d in range(fused.shape[1])])
        classes = head.core.classes(highest) + gamma * av
        both = [gates["a"][t] * gates["v"][t] for t in times]
        found.append({"event": event, "classes": classes, "gates": both})
        for t in times:
            y = labels[t] != CLASSES
            event_loss = event_loss - (sigma(event[t]) if y else 1 - sigma(event[t])).log()
            shown = sigma(both[t]) if head.config.released else both[t]
            gate_loss = gate_loss - (shown if y else 1 - shown).log()
        named = [int(label) for label in labels if label != CLASSES]
        if named:
            with_event += 1
            class_loss = class_loss - (classes[named[0]] - classes.exp().sum().log())
            stream_loss = stream_loss - (av[named[0]] - av.exp().sum().log())
    seconds = rows["labels"].numel()
    return (event_loss + gate_loss) / seconds + (class_loss + stream_loss) / with_event, found


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("best", [2, 4])
def test_supervised_is_the_naive_one(released: bool, best: int) -> None:
    head, rows = supervised(released=released, best_seconds=best), random_rows()
    expected, found = naive_supervised(head, rows)
    torch.testing.assert_close(head.loss(rows, 0.0), expected)
    predicted = head.predict(rows, 0.0)
    for b, video in enumerate(found):
        for t, event in enumerate(video["event"]):
            assert float(predicted["event"][b, t]) == pytest.approx(float(sigma(event.detach())))
            assert float(predicted["gates"][b, t]) == pytest.approx(float(video["gates"][t].detach()))
            wanted = int(video["classes"].argmax()) if event > 0 else CLASSES
            assert int(predicted["classes"][b, t]) == wanted


def test_without_gate_strength_it_is_the_plain_head() -> None:
    head, rows = supervised(alpha=0.0), random_rows()
    streams = head.core.streams(head.attention(head.places(rows["video"]), rows["audio"]), rows["audio"])
    fused = head.core.fusion(streams.video, streams.audio)
    scores = head(rows)
    torch.testing.assert_close(scores.event, head.core.event(fused).squeeze(-1))
    for gate in (head.core.streams.video_gate, head.core.streams.audio_gate):
        torch.nn.init.constant_(gate.bias, 5.0)
    changed = head(rows)
    torch.testing.assert_close(changed.event, scores.event)
    torch.testing.assert_close(changed.classes, scores.classes)
    assert not torch.allclose(changed.video_gate, scores.video_gate)


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_gate_strengthens_the_other_stream(kind: str) -> None:
    head, rows = supervised(alpha=0.7), random_rows()
    core = head.core
    inputs: list[tuple[Tensor, Tensor]] = []
    core.fusion.register_forward_pre_hook(lambda _, given: inputs.append(given))
    for bias in (-50.0, 50.0):
        for name, gate in (("video", core.streams.video_gate), ("audio", core.streams.audio_gate)):
            torch.nn.init.zeros_(gate.weight)
            torch.nn.init.constant_(gate.bias, bias if name == kind else -50.0)
        head(rows)
    closed, opened = inputs
    own, other = (0, 1) if kind == "video" else (1, 0)
    torch.testing.assert_close(opened[own], closed[own])
    torch.testing.assert_close(opened[other], 1.7 * closed[other])


def scores_of(video_gate: Tensor, audio_gate: Tensor) -> EventScores:
    batch, times = video_gate.shape
    scores = torch.zeros(batch, CLASSES, dtype=torch.float64)
    return EventScores(torch.zeros(batch, times, dtype=torch.float64), scores, scores, video_gate, audio_gate)


@pytest.mark.parametrize(("label", "least"), [(0, 0.3133), (CLASSES, 0.6931)])
def test_the_released_gate_loss_cannot_fall_further_but_the_sound_one_can(label: int, least: float) -> None:
    labels = torch.full((1, 2), label)
    best = torch.full((1, 2), 40.0 if label == 0 else -40.0, dtype=torch.float64)
    without_gates = math.log(2) + (2 * math.log(CLASSES) if label == 0 else 0)
    for released, expected in ((True, least), (False, 0.0)):
        loss = supervised_loss(scores_of(best, best), labels, CLASSES, released=released)
        assert float(loss) - without_gates == pytest.approx(expected, abs=1e-4)


def test_saturated_gates_keep_a_gradient() -> None:
    gate = torch.full((1, 2), 50.0, requires_grad=True)
    scores = scores_of(gate, gate)
    loss = supervised_loss(scores, torch.full((1, 2), CLASSES), CLASSES, released=False)
    (gradient,) = torch.autograd.grad(loss, gate)
    assert loss.isfinite()
    assert (gradient > 0.1).all()


def test_a_batch_without_any_event_has_a_finite_loss() -> None:
    head, rows = supervised(), random_rows(torch.full((2, 4), CLASSES))
    loss = head.loss(rows, 0.0)
    scores = head(rows)
    expected = (
        functional.softplus(scores.event).mean()
        - (1 - scores.video_gate.sigmoid() * scores.audio_gate.sigmoid()).log().mean()
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("released", [False, True])
def test_gradients_of_the_supervised_loss(released: bool) -> None:
    parts = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(3, 5), (3, 3), (3, 3), (3, 5), (3, 5)]
    ]

    def loss(*tensors: Tensor) -> Tensor:
        return supervised_loss(EventScores(*tensors), LABELS, CLASSES, released=released)

    assert torch.autograd.gradcheck(loss, parts)


def naive_weak(head: WeakCmbs, rows: Rows) -> tuple[Tensor, list[dict[str, Any]]]:
    alpha, gamma = head.config.alpha, head.config.gamma
    streams = head.streams(head.attention(head.places(rows["video"]), rows["audio"]), rows["audio"])
    found, loss = [], torch.zeros((), dtype=torch.float64)
    for b, labels in enumerate(rows["labels"]):
        times = range(len(labels))
        of_video, of_audio = sigma(streams.audio_gate[b]), sigma(streams.video_gate[b])
        if head.config.released:
            of_video, of_audio = of_audio, of_video
        v = [(1 - alpha) * streams.video[b, t] + alpha * of_video[t] * streams.video[b, t] for t in times]
        a = [(1 - alpha) * streams.audio[b, t] + alpha * of_audio[t] * streams.audio[b, t] for t in times]
        fused = head.fusion(torch.stack(v)[None], torch.stack(a)[None])[0]
        each_second = []
        for t in times:
            gates = gamma * sigma(head.video_classes(v[t])) + gamma * sigma(head.audio_classes(a[t]))
            each_second.append(gates * (head.classes.weight @ fused[t]))
        z = naive_top(each_second, head.config.best_seconds)
        mean_gates = [(of_video[t] + of_audio[t]) / 2 for t in times]
        found.append({"z": z, "gates": mean_gates})
        named = [int(label) for label in labels if label != CLASSES]
        kind = named[0] if named else CLASSES
        if head.config.released:
            o = torch.stack([torch.stack([g * z[k] for g in mean_gates]).max() for k in range(CLASSES + 1)])
            o = o.exp() / o.exp().sum()
        else:
            o = z * max(mean_gates)
            highest = max(mean_gates)
            loss = loss - (highest if named else 1 - highest).log()
        terms = [sigma(o[k]).log() if k == kind else (1 - sigma(o[k])).log() for k in range(CLASSES + 1)]
        loss = loss - sum(terms) / (CLASSES + 1)
    return loss / len(rows["labels"]), found


@pytest.mark.parametrize("released", [False, True])
def test_weak_is_the_naive_one(released: bool) -> None:
    head, rows = weak(released=released), random_rows()
    expected, found = naive_weak(head, rows)
    torch.testing.assert_close(head.loss(rows, 0.0), expected)
    predicted = head.predict(rows, 0.0)
    for b, video in enumerate(found):
        for t, gate in enumerate(video["gates"]):
            assert float(predicted["gates"][b, t]) == pytest.approx(float(gate.detach()))
            is_event = sigma(gate) > 0.5 if released else gate > 0.5
            assert int(predicted["classes"][b, t]) == (int(video["z"].argmax()) if is_event else CLASSES)


def test_weak_gates_at_zero_scale_the_streams() -> None:
    head, rows = weak(), random_rows()
    given: list[tuple[Tensor, Tensor]] = []
    head.fusion.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    for gate in (head.streams.video_gate, head.streams.audio_gate):
        torch.nn.init.constant_(gate.bias, -1e3)
    head(rows)
    streams = head.streams(head.attention(head.places(rows["video"]), rows["audio"]), rows["audio"])
    torch.testing.assert_close(given[0][0], 0.8 * streams.video)
    torch.testing.assert_close(given[0][1], 0.8 * streams.audio)


def test_released_weak_loss_hardly_moves_and_its_prediction_has_no_background() -> None:
    """The bounds of 28 classes: 0.6800 for a video surely right, 0.7145 for one surely wrong."""
    head = WeakCmbs(5, 4, 28, WeakCmbsConfig(streams=STREAMS, released=True)).double().eval()
    rows = random_rows(torch.full((2, 5), 4))
    assert (head.predict(rows, 0.0)["classes"] != 28).all()
    torch.nn.init.zeros_(head.classes.weight)
    assert float(head.loss(rows, 0.0).detach()) == pytest.approx(0.7093, abs=1e-4)
    # All class gates open, and a fused content of ones: only one class scores, and by far.
    head.fusion.register_forward_hook(lambda *_: torch.ones(2, 5, 12, dtype=torch.float64))
    for kind, bound in ((4, 0.6800), (5, 0.7145)):
        torch.nn.init.zeros_(head.classes.weight)
        torch.nn.init.constant_(head.classes.weight[kind], 1e3)
        assert float(head.loss(rows, 0.0).detach()) == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize("build", [supervised, weak])
@pytest.mark.parametrize(("times", "places"), [(1, 1), (3, 1), (10, 4)])
def test_any_length_places_and_a_batch_of_one(build: Any, times: int, places: int) -> None:
    head, rows = build(), random_rows(torch.zeros(1, times, dtype=torch.long), places)
    assert head.loss(rows, 0.0).isfinite()
    predicted = head.predict(rows, 0.0)
    assert {name: part.shape for name, part in predicted.items()} == dict.fromkeys(
        ("classes", "event", "gates"), torch.Size([1, times])
    )
    flat = rows | {"video": rows["video"][:, :, 0]}
    if places == 1:
        torch.testing.assert_close(head.predict(flat, 0.0), predicted)


def planted(count: int, seed: int, empty: float = 0.0) -> Rows:
    """Three of six seconds, in a ring, are events, of which both modalities tell the class; some videos have none."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (count, 1), generator=generator)
    start = torch.randint(6, (count, 1), generator=generator)
    event = ((torch.arange(6) - start) % 6 < 3) & (torch.rand(count, 1, generator=generator) >= empty)
    labels = torch.where(event, classes, CLASSES)
    directions = 2 * torch.eye(CLASSES + 1)[:, :CLASSES][labels]
    noise = 0.4 * torch.randn(2, count, 6, CLASSES, generator=generator)
    return {"video": directions + noise[0], "audio": directions + noise[1], "labels": labels}


def train(head: Any, rows: Rows, steps: int, rate: float = 0.01) -> Any:
    optimiser = torch.optim.Adam(head.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(len(rows["labels"]), (32,), generator=generator)
        optimiser.zero_grad()
        head.loss({name: part[chosen] for name, part in rows.items()}, step / steps).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimiser.step()
    return head.eval()


def test_supervised_learns_what_is_planted_and_nothing_of_shuffled_labels() -> None:
    rows, test = planted(200, 0), planted(200, 1)
    event = test["labels"] != CLASSES
    head = train(Cmbs(3, 3, CLASSES, CmbsConfig(streams=STREAMS)), rows, 30)
    predicted = head.predict(test, 1.0)
    assert segment_accuracy(predicted["classes"], test["labels"]) > 0.9
    assert event_auroc(predicted["gates"], event) > 0.95
    assert event_auroc(predicted["event"], event) > 0.95

    shuffled = rows | {"labels": rows["labels"][torch.randperm(200)]}
    predicted = train(Cmbs(3, 3, CLASSES, CmbsConfig(streams=STREAMS)), shuffled, 30).predict(test, 1.0)
    assert segment_accuracy(predicted["classes"], test["labels"]) < 0.55  # always background: 0.5


def test_weak_learns_which_class_and_whether_there_is_an_event() -> None:
    """What the labels of videos tell. Whether the gates find the seconds depends on the seed, so small a problem."""
    rows, test = planted(200, 0, empty=0.4), planted(200, 1, empty=0.4)
    head = train(WeakCmbs(3, 3, CLASSES, WeakCmbsConfig(streams=STREAMS)), rows, 60)
    has_event = (test["labels"] != CLASSES).any(1)
    scores, gates = (part.detach() for part in head(test))
    assert (scores.argmax(1)[has_event] == test["labels"].amin(1)[has_event]).double().mean() > 0.95
    assert event_auroc(gates.amax(1, keepdim=True), has_event[:, None]) > 0.95
    # Hence background is left to videos without an event; the released rule never has it.
    predicted = head.predict(test, 1.0)["classes"]
    assert (predicted[~has_event] == CLASSES).double().mean() > 0.8
    assert (predicted[has_event] == CLASSES).double().mean() < 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CmbsConfig(alpha=-0.1), "CMBS: alpha must be at least 0 and finite, got -0.1"),
        (lambda: CmbsConfig(best_seconds=0), "CMBS: best_seconds must be at least 1, got 0"),
        (lambda: WeakCmbsConfig(alpha=1.5), r"weak CMBS: alpha must be in \[0, 1\], got 1.5"),
        (lambda: WeakCmbsConfig(gamma=math.inf), "weak CMBS: gamma must be at least 0 and finite, got inf"),
        (lambda: Cmbs(5, 0, 3), "CMBS: audio_width must be at least 1, got 0"),
        (lambda: WeakCmbs(5, 4, 0), "weak CMBS: classes must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(build: Any, message: str) -> None:
    with pytest.raises(EventError, match=message):
        build()
