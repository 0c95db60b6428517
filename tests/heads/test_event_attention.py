"""Attention and streams against loops over batch, time and places in float64, written from the equations."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cmacc.heads.event_attention import (
    SpatialChannelAttention,
    StreamConfig,
    labels_of,
    video_and_audio,
)
from cmacc.heads.event_streams import CrossDecoder, Fusion, GatedStreams, top_mean
from cmacc.heads.segment_accuracy import EventError

Array = NDArray[np.float64]
SMALL = StreamConfig(
    attention_width=6,
    attention_hidden=5,
    key_width=3,
    model_width=4,
    encoder_feedforward=7,
    decoder_feedforward=5,
    heads=2,
    fusion_heads=2,
)
AUDIO = 3
BETA = 0.4


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def numpy(tensor: Tensor) -> Array:
    return tensor.detach().numpy()


def linear(layer: Any, x: Array) -> Array:
    return numpy(layer.weight) @ x + numpy(layer.bias)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigma(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def norm(layer: Any, x: Array) -> Array:
    z = (x - x.mean()) / np.sqrt(x.var() + layer.eps)
    return numpy(layer.weight) * z + numpy(layer.bias)


def multihead(layer: nn.MultiheadAttention, query: Array, memory: list[Array]) -> Array:
    """One query against the items of a memory, head by head, scaled."""
    width, heads = layer.embed_dim, layer.num_heads
    weight, bias = numpy(layer.in_proj_weight), numpy(layer.in_proj_bias)
    q = weight[:width] @ query + bias[:width]
    keys = [weight[width : 2 * width] @ item + bias[width : 2 * width] for item in memory]
    values = [weight[2 * width :] @ item + bias[2 * width :] for item in memory]
    size = width // heads
    parts = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = softmax(np.array([q[part] @ key[part] / math.sqrt(size) for key in keys]))
        parts.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
    return linear(layer.out_proj, np.concatenate(parts))


def naive_attention(module: SpatialChannelAttention, places: Array, audio: Array) -> Array:
    """One segment's places (n, width) and sound (width,)."""
    inner = module.among_places.attention
    y = []
    for place in places:
        energies = np.array([linear(inner.query, place) @ linear(inner.key, other) for other in places])
        weights = softmax(energies)  # without 1 / sqrt(d)
        value = sum(w * linear(inner.value, other) for w, other in zip(weights, places, strict=True))
        y.append(norm(module.among_places.norm, place + value))

    def weighed(block: Any, items: list[Array], guide: Array) -> Array:
        hidden = [relu(linear(block.place, item)) * relu(linear(block.guide, guide)) for item in items]
        weights = softmax(np.array([np.tanh(linear(block.score, h))[0] for h in hidden]))
        return np.asarray(sum(w * item for w, item in zip(weights, items, strict=True)))

    p = weighed(module.own_weights, y, np.mean(y, axis=0))
    agreement = np.mean(
        [relu(linear(module.channel_audio, audio)) * relu(linear(module.channel_place, item)) for item in y], axis=0
    )
    bottleneck, widen = module.channel_gate[0], module.channel_gate[2]
    c = sigma(linear(widen, relu(linear(bottleneck, agreement))))
    f = weighed(module.audio_weights, [place * (1 + c) for place in places], audio)
    return f + BETA * sigma(p) * f


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention_is_the_naive_one(count: int, batch: int) -> None:
    module = SpatialChannelAttention(AUDIO, BETA, SMALL).double().eval()
    places, audio = random(batch, 3, count, 6), random(batch, 3, AUDIO)
    result = module(places, audio)
    for b in range(batch):
        for t in range(3):
            expected = naive_attention(module, numpy(places)[b, t], numpy(audio)[b, t])
            np.testing.assert_allclose(numpy(result)[b, t], expected, atol=1e-12)


def test_with_one_place_it_is_that_place_with_gates() -> None:
    module = SpatialChannelAttention(AUDIO, 0.0, SMALL).double().eval()
    place, audio = random(2, 3, 1, 6), random(2, 3, AUDIO)
    ratio = module(place, audio) / place[:, :, 0]
    assert ((ratio > 1) & (ratio < 2)).all()  # 1 + channel gate


def test_places_have_no_order_and_equal_ones_are_one() -> None:
    module = SpatialChannelAttention(AUDIO, BETA, SMALL).double().eval()
    places, audio = random(2, 3, 4, 6), random(2, 3, AUDIO)
    torch.testing.assert_close(module(places[:, :, [2, 0, 3, 1]], audio), module(places, audio))
    torch.testing.assert_close(module(places[:, :, :1].expand(-1, -1, 4, -1), audio), module(places[:, :, :1], audio))


def naive_decoder(module: CrossDecoder, own: Array, other: Array) -> list[Array]:
    projected = [linear(module.project, x) for x in own]
    memory = [*other, *projected]
    first, last = module.feedforward[0], module.feedforward[3]
    out = []
    for x in projected:
        x = norm(module.attention_norm, x + multihead(module.attention, x, memory))
        out.append(norm(module.feedforward_norm, x + linear(last, relu(linear(first, x)))))
    return out


def naive_encoder(module: Any, items: Array) -> list[Array]:
    x = [linear(module[0], item) for item in items]
    for layer in module[1].layers:
        x = [norm(layer.norm1, item + multihead(layer.self_attn, item, x)) for item in x]
        x = [norm(layer.norm2, item + linear(layer.linear2, relu(linear(layer.linear1, item)))) for item in x]
    return x


def naive_lstm(module: nn.LSTM, items: Array) -> list[Array]:
    halves = []
    for suffix, order in (("", 1), ("_reverse", -1)):
        w, r = (numpy(getattr(module, f"weight_{kind}_l0{suffix}")) for kind in ("ih", "hh"))
        bias = sum(numpy(getattr(module, f"bias_{kind}_l0{suffix}")) for kind in ("ih", "hh"))
        hidden, cell, out = np.zeros(module.hidden_size), np.zeros(module.hidden_size), []
        for item in items[::order]:
            i, f, g, o = np.split(w @ item + r @ hidden + bias, 4)
            cell = sigma(f) * cell + sigma(i) * np.tanh(g)
            hidden = sigma(o) * np.tanh(cell)
            out.append(hidden)
        halves.append(out[::order])
    return [np.concatenate(both) for both in zip(*halves, strict=True)]


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("times", [1, 5])
def test_streams_are_the_naive_ones(recurrent: bool, times: int) -> None:
    module = GatedStreams(6, AUDIO, SMALL, recurrent=recurrent).double().eval()
    video, audio = random(2, times, 6), random(2, times, AUDIO)
    streams = module(video, audio)
    for b in range(2):
        v, a = numpy(video)[b], numpy(audio)[b]
        if recurrent:
            v, a = np.array(naive_lstm(module.video_lstm, v)), np.array(naive_lstm(module.audio_lstm, a))
            assert v.shape[1] == 8  # twice the width of the sound's
            assert a.shape[1] == 4
        encoded_v, encoded_a = naive_encoder(module.video_encoder, v), naive_encoder(module.audio_encoder, a)
        expected = (
            naive_decoder(module.video_decoder, v, np.array(encoded_a)),
            naive_decoder(module.audio_decoder, a, np.array(encoded_v)),
            [linear(module.video_gate, x)[0] for x in encoded_v],
            [linear(module.audio_gate, x)[0] for x in encoded_a],
        )
        for part, wanted in zip(streams, expected, strict=True):
            np.testing.assert_allclose(numpy(part)[b], wanted, atol=1e-12)


def test_fusion_is_the_naive_one_second_after_first() -> None:
    module = Fusion(SMALL).double().eval()
    video, audio = random(2, 3, 4), random(2, 3, 4)
    result = module(video, audio)

    def joined(number: int, own: list[Array], other: list[Array]) -> list[Array]:
        layer: Any = module.attentions[number]
        products = [p * q for p, q in zip(own, other, strict=True)]
        return [norm(module.norms[number], g + multihead(layer, g, [*other, *own])) for g in products]

    for b in range(2):
        v = joined(0, list(numpy(video)[b]), list(numpy(audio)[b]))
        a = joined(1, list(numpy(audio)[b]), v)
        np.testing.assert_allclose(numpy(result)[b], (np.array(v) + np.array(a)) / 2, atol=1e-12)


def test_dropout_is_only_in_training() -> None:
    module = GatedStreams(6, AUDIO, SMALL, recurrent=True).double()
    video, audio = random(1, 2, 6), random(1, 2, AUDIO)
    first = copy.deepcopy(module).eval()(video, audio).video
    torch.testing.assert_close(module.eval()(video, audio).video, first)
    assert not torch.equal(module.train()(video, audio).video, first)


def test_top_mean() -> None:
    constant = torch.full((2, 10, 3), 0.7)
    torch.testing.assert_close(top_mean(constant, 4), torch.full((2, 3), 0.7))
    scores = torch.tensor([[[1.0], [5.0], [2.0], [4.0], [3.0], [0.0]]])
    assert top_mean(scores, 4).item() == 3.5
    assert top_mean(scores[:, :2], 4).item() == 3.0  # fewer seconds than asked for


def test_video_may_have_no_places_or_a_map() -> None:
    audio = torch.zeros(2, 3, 4)
    for shape, places in (((2, 3, 5), 1), ((2, 3, 7, 5), 7), ((2, 3, 7, 7, 5), 49)):
        assert video_and_audio({"video": torch.zeros(shape), "audio": audio}, 5, 4)[0].shape == (2, 3, places, 5)


@pytest.mark.parametrize(
    ("video", "audio"), [((2, 3, 6), (2, 3, 4)), ((2, 3, 5), (2, 4, 4)), ((2, 3, 0, 5), (2, 3, 4)), ((2, 5), (2, 4))]
)
def test_features_that_do_not_fit(video: tuple[int, ...], audio: tuple[int, ...]) -> None:
    with pytest.raises(EventError, match=r"video must be \(batch, time, \[places,\] 5\) and audio"):
        video_and_audio({"video": torch.zeros(video), "audio": torch.zeros(audio)}, 5, 4)


def test_missing_rows() -> None:
    with pytest.raises(EventError, match="rows must hold audio, got video"):
        video_and_audio({"video": torch.zeros(1, 1, 1)}, 1, 1)
    with pytest.raises(EventError, match=r"labels must be \(1, 2\), got none"):
        labels_of({"video": torch.zeros(1, 2, 1)})
    with pytest.raises(EventError, match=r"labels must be \(1, 2\), got \(1, 3\)"):
        labels_of({"video": torch.zeros(1, 2, 1), "labels": torch.zeros(1, 3, dtype=torch.long)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "model_width must be a multiple of 3, got 256"),
        ({"model_width": 3, "heads": 1, "fusion_heads": 1}, "model_width must be a multiple of 2, got 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"key_width": 0}, "key_width must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EventError, match=message):
        StreamConfig(**settings)
