"""Model FLOPs against counts by hand, and a measured peak."""

import copy

import pytest
import torch
from torch import nn

from cmacc.encoders import (
    AudioVisualEncoder,
    Encoder,
    EncoderConfig,
    EncoderPair,
    checkpoint_activations,
    momentum_copy,
    set_trained,
)
from cmacc.pretraining.utilisation import Utilisation, model_flops_per_clip, peak_flops_per_second


def linear_pair() -> EncoderPair:
    return EncoderPair(*(Encoder(nn.Linear(10, 20), 20, "linear", 1, 5) for _ in range(2)))


def test_flops_are_those_counted_by_hand() -> None:
    pair = linear_pair()
    inputs = {"video": torch.randn(2, 10), "audio": torch.randn(2, 10)}
    backbone, last = 2 * 10 * 20, 2 * 20 * 5  # of one clip and modality, forward
    # Backward: gradients of both layers' weights, and of the last layer's input; none of the clip.
    assert model_flops_per_clip(pair, inputs) == 2 * (2 * backbone + 3 * last)
    assert model_flops_per_clip(pair, inputs, momentum_copy(pair)) == 2 * (3 * backbone + 4 * last)
    for encoder in (pair.video, pair.audio):
        encoder.backbone.requires_grad_(False)
    assert model_flops_per_clip(pair, inputs) == 2 * (backbone + 3 * last)  # the norm before the last layer is trained


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_counting_changes_nothing_and_recomputation_is_not_counted(norm: str) -> None:
    pair = AudioVisualEncoder(EncoderConfig(norm=norm, mel_bins=16, hidden_size=8, embedding_size=4))
    set_trained(pair, "audio", "last:2", 1)
    inputs = {"video": torch.randn(2, 3, 4, 16, 16), "audio": torch.randn(2, 16, 40)}
    before, state = copy.deepcopy(pair.state_dict()), torch.get_rng_state()
    modes = [module.training for module in pair.modules()]
    flops = model_flops_per_clip(pair, inputs, momentum_copy(pair))
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in pair.modules()] == modes
    assert len(set(modes)) == 2
    checkpoint_activations(pair)
    assert model_flops_per_clip(pair, inputs, momentum_copy(pair)) == flops
    assert pair.video.backbone.recompute
    four = {modality: torch.cat([values, values]) for modality, values in inputs.items()}
    assert model_flops_per_clip(pair, four, momentum_copy(pair)) == flops


def test_the_peak_is_measured_on_this_device() -> None:
    state = torch.get_rng_state()
    peak = peak_flops_per_second(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < peak < 1e15
    inputs = {"video": torch.randn(2, 10), "audio": torch.randn(2, 10)}
    utilisation = Utilisation.measured(linear_pair(), inputs, None, torch.device("cpu"), None, processes=2)
    assert utilisation.flops_per_clip == model_flops_per_clip(linear_pair(), inputs)
    assert utilisation.peak_flops_per_second == pytest.approx(peak, rel=0.9)
    expected = 1000 * utilisation.flops_per_clip / 2 / utilisation.peak_flops_per_second
    assert utilisation.row(1000.0) == {"flop_utilisation": pytest.approx(expected)}
