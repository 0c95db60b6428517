"""Pooling by a transformer against its equations, and that encoders without it are what they were."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.encoders.pooling import TransformerPool
from cmacc.pretraining.features import weights_hash

SMALL = {"mel_bins": 16, "hidden_size": 24, "embedding_size": 10}


def naive(pool: TransformerPool, feature_map: Tensor) -> Tensor:
    """Row by row, head by head, from the weights alone."""
    features = []
    for sample in feature_map:
        tokens = torch.stack([sample[:, t].flatten(1).mean(1) for t in range(sample.shape[1])])
        for layer in pool.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            of_queries, of_keys, of_values = (
                tokens @ weight.T + bias
                for weight, bias in zip(
                    layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3), strict=True
                )
            )
            heads = []
            for q, k, v in zip(*(each.chunk(4, dim=1) for each in (of_queries, of_keys, of_values)), strict=True):
                heads.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v)
            out = layer.self_attn.out_proj
            attended = tokens + torch.cat(heads, 1) @ out.weight.T + out.bias
            attended = layer_norm(attended, attended.shape[1:], layer.norm1.weight, layer.norm1.bias, 1e-5)
            inner = gelu(attended @ layer.linear1.weight.T + layer.linear1.bias)
            tokens = attended + inner @ layer.linear2.weight.T + layer.linear2.bias
            tokens = layer_norm(tokens, tokens.shape[1:], layer.norm2.weight, layer.norm2.bias, 1e-5)
        features.append(tokens.mean(0))
    return torch.stack(features)


def randomised(channels: int) -> TransformerPool:
    """With weights as after training: at the start, attention hardly depends on its inputs."""
    pool = TransformerPool(channels).double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.5)
    return pool


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 3])
def test_it_is_two_post_norm_layers_over_the_times_for_any_number_of_samples_and_times(
    count: int, times: int, training: bool
) -> None:
    pool = randomised(8).train(training)
    feature_map = torch.randn(count, 8, times, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(pool(feature_map), naive(pool, feature_map), rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # torch then takes another path in evaluation
        torch.testing.assert_close(pool(feature_map), naive(pool, feature_map), rtol=1e-10, atol=1e-12)


def test_samples_do_not_mix_and_neither_order_in_time_nor_places_matter() -> None:
    pool, feature_map = randomised(8), torch.randn(3, 8, 5, 2, 3, dtype=torch.float64)
    whole = pool(feature_map)
    torch.testing.assert_close(whole[1:2], pool(feature_map[1:2]))
    torch.testing.assert_close(whole, pool(feature_map[:, :, torch.tensor([3, 0, 4, 1, 2])]))
    torch.testing.assert_close(whole, pool(feature_map.flip(3, 4)))
    longer = feature_map.clone()
    longer[:, :, 4] += 1  # every frame counts, the last one too
    assert ((pool(longer) - whole).norm(dim=1) > 1e-3).all()


def test_gradients_are_finite_differences() -> None:
    pool = randomised(4)
    assert torch.autograd.gradcheck(pool, torch.randn(2, 4, 3, 1, 2, dtype=torch.float64, requires_grad=True))


def test_weights_start_small_and_differ_between_layers() -> None:
    first, second = TransformerPool(192).layers
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        if one.ndim == 2:
            assert abs(one.detach().std().item() - 0.02) < 0.001, name
            assert not torch.equal(one, other), name
        else:
            assert set(one.tolist()) == {1.0 if "norm" in name and "weight" in name else 0.0}, name


def test_an_encoder_with_it_trains_and_pools_its_own_map() -> None:
    pair = AudioVisualEncoder(EncoderConfig(video_pooling="transformer", **SMALL))  # type: ignore[arg-type]
    assert pair.video.feature_size == 192
    video = torch.randn(2, 3, 8, 32, 32)
    told = pair(video, torch.randn(2, 16, 40), feature_maps_of=("video",))["video"]
    assert told.feature.shape == (2, 192)
    assert torch.equal(told.feature, pair.video.backbone.pooling(told.feature_map))  # type: ignore[operator]
    (told.embedding @ torch.randn(10)).sum().backward()
    assert all(parameter.grad is not None for parameter in pair.video.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert pair(video=video)["video"].embedding.isfinite().all()


def test_without_it_neither_weights_nor_hashes_in_cards_change() -> None:
    """`weights_hash` covers the config's text and public attributes; test_trainer.py holds a whole run's numbers."""
    own = AudioVisualEncoder(EncoderConfig(**SMALL))  # type: ignore[arg-type]
    assert own.video.feature_size == 1536
    assert [name for name in own.state_dict() if "pooling" in name] == []
    assert "video_pooling" not in repr(own.config)
    assert all("pooling" not in vars(module) for module in own.modules())


def test_the_hash_of_weights_tells_poolings_apart() -> None:
    config = EncoderConfig(**SMALL)  # type: ignore[arg-type]
    other = dataclasses.replace(config, video_pooling="transformer")
    assert config != other
    assert weights_hash(AudioVisualEncoder(config)) != weights_hash(AudioVisualEncoder(other))


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^TransformerPool: channels must be a positive multiple of 4, got 6"):
        TransformerPool(6)
    with pytest.raises(
        ValueError, match=r"^EncoderConfig: video_pooling must be one of own, mean, transformer, got 'max'"
    ):
        EncoderConfig(video_pooling="max")  # type: ignore[arg-type]
    message = r"^EncoderConfig: video_pooling must be own with a tower \(timm:test_resnet\), which pools its map itself"
    with pytest.raises(ValueError, match=message):
        EncoderConfig(video="timm:test_resnet", video_pooling="transformer")
