"""Activations computed again and compiled backbones, against the same encoders without."""

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn

from cmacc.encoders import (
    AudioVisualEncoder,
    Backbone,
    CompilerError,
    Encoder,
    EncoderConfig,
    EncoderPair,
    TowerError,
    activations_kept,
    checkpoint_activations,
    compile_backbones,
    momentum_copy,
    require_compiler,
    update_momentum,
)

CPU = torch.device("cpu")
SIZES = {"mel_bins": 16, "hidden_size": 8, "embedding_size": 4}


def saved_bytes(pair: EncoderPair, inputs: dict[str, Tensor]) -> int:
    """A training pass whose gradients stay; returns the bytes that autograd keeps for it, weights among them."""
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        encodings = pair(**inputs)
    kept = sum(storages.values())
    sum(e.embedding[:, 0].sum() + e.feature.square().mean() for e in encodings.values()).backward()
    return kept


@pytest.mark.parametrize(
    ("video", "audio", "norm"),
    [
        ("tiny", "tiny", "batch"),
        ("tiny", "tiny", "group"),
        ("tiny", "small", "group"),
        ("r3d_18", "resnet18", "batch"),
        ("r2plus1d_18", "resnet18_1d", "batch"),
    ],
)
def test_activations_computed_again_change_nothing_but_memory(video: str, audio: str, norm: str) -> None:
    plain = AudioVisualEncoder(EncoderConfig(video=video, audio=audio, norm=norm, **SIZES))
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    inputs = {"video": torch.randn(3, 3, 4, 16, 16), "audio": torch.randn(3, 16, 40)}
    assert saved_bytes(again, inputs) < 0.7 * saved_bytes(plain, inputs)
    for (name, expected), got in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad), name
    assert plain.state_dict().keys() == again.state_dict().keys()
    for name, expected in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], expected), name
    assert momentum_copy(again)(**inputs)["video"].embedding.grad_fn is None
    with activations_kept(again):
        assert saved_bytes(again, inputs) == saved_bytes(plain, inputs)
    assert again.video.backbone.recompute


class Dropping(Backbone):
    """A convolution with batch norm and dropout: what must not count twice, and what must draw the same again."""

    def __init__(self, channels: int, convolution: type[nn.Module]) -> None:
        super().__init__()
        self.block = nn.Sequential(convolution(channels, 8, 3), nn.Dropout(0.5), nn.ReLU())

    def body(self, prepared: Tensor) -> Tensor:
        return self.through(self.block, prepared)

    def pool(self, feature_map: Tensor) -> Tensor:
        return feature_map.flatten(2).mean(2)


def small_pair() -> EncoderPair:
    video, audio = Dropping(3, nn.Conv3d), Dropping(16, nn.Conv1d)
    return EncoderPair(Encoder(video, 8, "linear", 8, 4), Encoder(audio, 8, "linear", 8, 4))


def test_dropout_draws_the_same_again() -> None:
    plain = small_pair()
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    inputs = {"video": torch.randn(4, 3, 4, 8, 8), "audio": torch.randn(4, 16, 20)}
    for pair in (plain, again):
        torch.manual_seed(1)
        saved_bytes(pair, inputs)
    for expected, got in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(got.grad, expected.grad)


def test_a_backbone_of_another_kind_is_refused_unless_it_is_frozen() -> None:
    def pair() -> EncoderPair:
        return EncoderPair(*(Encoder(nn.Linear(5, 6), 6, "linear", 8, 4) for _ in range(2)))

    with pytest.raises(TowerError, match=r"checkpoint_activations must be false .* got Linear"):
        checkpoint_activations(pair())
    frozen = pair()
    for encoder in (frozen.video, frozen.audio):
        encoder.mark_frozen([encoder.backbone], "digest")
    checkpoint_activations(frozen)


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.compile's own parts
def test_compiled_backbones_are_the_eager_ones() -> None:
    """In training and evaluation, for another size of the batch, and after weights were loaded."""
    require_compiler(CPU)
    # Both alike, so that they share their compiled forms, each of which takes seconds.
    eager = EncoderPair(*(Encoder(Dropping(3, nn.Conv1d), 8, "linear", 8, 4) for _ in range(2)))
    for encoder in (eager.video, eager.audio):
        encoder.backbone.block[1] = nn.BatchNorm1d(8)
    compiled = copy.deepcopy(eager)
    pairs = [(pair, momentum_copy(pair)) for pair in (eager, compiled)]
    for pair in pairs[1]:
        compile_backbones(pair)
    names = list(eager.state_dict())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for count in (4, 3):
        inputs = {"video": torch.randn(count, 3, 20), "audio": torch.randn(count, 3, 20)}
        compiled.load_state_dict(eager.state_dict())
        for pair, key_encoder in pairs:
            pair.zero_grad()
            saved_bytes(pair, inputs)
            update_momentum(pair, key_encoder, 0.9)
        for expected, got in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4)
        for expected, got in zip(eager.buffers(), compiled.buffers(), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            expected, got = (key_encoder(**inputs) for _, key_encoder in pairs)
            for modality in expected:
                torch.testing.assert_close(got[modality].embedding, expected[modality].embedding, atol=1e-5, rtol=0)
    assert list(compiled.state_dict()) == names
    assert type(compiled.video.backbone) is Dropping
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= graphs + 4  # it did not fall back to eager


def test_a_missing_compiler_is_named_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerError, match=r"C\+\+ compiler, got none called no-such-compiler.*train.compile=false"):
        require_compiler(CPU)
    monkeypatch.setenv("CXX", "sh")
    require_compiler(CPU)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("cmacc.encoders.execution.find_spec", lambda name: object())
    with pytest.raises(CompilerError, match="C compiler, got none called no-such-compiler"):
        require_compiler(torch.device("cuda"))
    monkeypatch.setattr("cmacc.encoders.execution.find_spec", lambda name: None)
    with pytest.raises(CompilerError, match="Triton is not installed"):
        require_compiler(torch.device("cuda"))
