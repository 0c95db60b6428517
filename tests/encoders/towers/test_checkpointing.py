"""Towers that compute activations again, by their libraries, against the same towers without."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmacc.encoders import AudioVisualEncoder, EncoderConfig, activations_kept, checkpoint_activations, set_trained
from cmacc.encoders.towers import Tower, TowerError, open_tower

Folder = Callable[[str], Path]


def saved_bytes(tower: Tower, inputs: Tensor) -> int:
    """A training pass whose gradients stay; returns the bytes that autograd keeps for it."""
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        features = tower(inputs)
    features.square().sum().backward()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("name", "modality"),
    [("timm:test_vit", "video"), ("videomae", "video"), ("clip", "video"), ("ast", "audio"), ("wav2vec2", "audio")],
)
@pytest.mark.filterwarnings("error")  # none of a name that a library will drop
def test_towers_compute_the_same_gradients_with_less_memory(hf_folder: Folder, name: str, modality: Any) -> None:
    plain = open_tower(name if ":" in name else f"hf:{hf_folder(name)}", modality)
    again = copy.deepcopy(plain)
    again.checkpoint_activations()
    side = plain.takes.frame_height
    inputs = torch.randn(2, 3, plain.takes.frame_count or 2, side, side) if side else torch.rand(2, 8000) - 0.5
    needed = saved_bytes(plain, inputs)
    assert saved_bytes(again, inputs) < needed
    for (key, expected), got in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-6, rtol=1e-5, msg=key)
    with activations_kept(again):
        assert saved_bytes(again, inputs) == needed


@pytest.mark.parametrize(
    ("name", "modality", "reason"),
    [
        (
            "torchvision:resnet18",
            "video",
            r"torchvision:resnet18: train\.checkpoint_activations must be false; .*timm:",
        ),
        ("timm:test_resnet", "video", "batch norms would count the same batch twice"),
        ("timm:vgg11", "video", "timm's model does not support it"),
        ("clap", "audio", r"must be false; .*timm: and most of hf:"),
    ],
)
def test_towers_that_cannot_say_so(hf_folder: Folder, name: str, modality: Any, reason: str) -> None:
    if name == "timm:vgg11":
        with torch.device("meta"):  # it has 129 million weights, none of which matter here
            tower = open_tower(name, modality)
    else:
        tower = open_tower(name if ":" in name else f"hf:{hf_folder(name)}", modality)
    with pytest.raises(TowerError, match=reason):
        tower.checkpoint_activations()


def test_a_frozen_tower_has_nothing_to_compute_again() -> None:
    pair = AudioVisualEncoder(EncoderConfig(video="timm:test_resnet", hidden_size=8, embedding_size=4))
    set_trained(pair, "video", "head", 1)
    checkpoint_activations(pair)
    assert pair.audio.backbone.recompute
    assert not any(getattr(module, "grad_checkpointing", False) for module in pair.video.modules())
