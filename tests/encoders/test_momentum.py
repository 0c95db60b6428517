"""The momentum copy against a loop over numbers, after real training steps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cmacc.encoders import AudioVisualEncoder, EncoderConfig, momentum_copy, unwrapped, update_momentum


def test_parameters_and_buffers_follow_the_naive_average_through_training() -> None:
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=8, hidden_size=8, embedding_size=4))
    key_encoder = momentum_copy(pair)
    expected = {name: value.double().numpy().copy() for name, value in pair.state_dict().items()}
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    for step in range(3):
        momentum = 0.5 + 0.2 * step
        video, audio = pair(torch.randn(3, 3, 4, 16, 16), 2 + 3 * torch.randn(3, 8, 20)).values()
        optimizer.zero_grad()
        (-(video.embedding * audio.embedding).sum()).backward()
        optimizer.step()
        update_momentum(pair, key_encoder, momentum)
        for name, value in pair.state_dict().items():
            if name.endswith("num_batches_tracked"):
                expected[name][...] = step + 1
            else:
                expected[name] = momentum * expected[name] + (1 - momentum) * value.double().numpy()
    moved = 0
    for name, value in key_encoder.state_dict().items():
        torch.testing.assert_close(value.double(), torch.from_numpy(expected[name]), rtol=1e-5, atol=1e-7)
        moved += int(not torch.equal(value, pair.state_dict()[name]))
        assert name.endswith("num_batches_tracked") == (not value.is_floating_point())
    buffers = dict(key_encoder.named_buffers())
    assert (buffers["audio.backbone.normalise.running_mean"] - 2).abs().max() < 2  # on its way from 0 to 2
    assert buffers["audio.backbone.normalise.running_mean"].abs().min() > 0.05
    assert moved > 30


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_the_range(momentum: float) -> None:
    """0 is a copy and 1 leaves the averages alone, both to the bit."""
    online, key_encoder = _trained(), momentum_copy(_trained())
    before = {name: value.clone() for name, value in key_encoder.state_dict().items()}
    update_momentum(online, key_encoder, momentum)
    for name, value in key_encoder.state_dict().items():
        source = online.state_dict() if momentum == 0 or name.endswith("num_batches_tracked") else before
        assert torch.equal(value, source[name]), name


def test_the_copy_is_apart_without_gradient_and_in_evaluation_mode() -> None:
    online = _trained()
    key_encoder = momentum_copy(online)
    assert online.training
    assert all(parameter.requires_grad for parameter in online.parameters())
    assert not any(module.training for module in key_encoder.modules())
    assert not any(parameter.requires_grad for parameter in key_encoder.parameters())
    before = {name: value.clone() for name, value in key_encoder.state_dict().items()}
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in key_encoder.state_dict().items())


def test_a_key_does_not_depend_on_the_rest_of_its_batch() -> None:
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=8, embedding_size=16))
    pair(torch.randn(4, 3, 4, 16, 16), torch.randn(4, 8, 20))
    key_encoder = momentum_copy(pair)
    video, spectrograms = torch.randn(4, 3, 4, 16, 16), torch.randn(4, 8, 20)

    def change(network: nn.Module) -> float:
        """Of the first clip's embeddings when the other clips are other ones."""
        with torch.no_grad():
            one = network(video, spectrograms)
            two = network(
                torch.cat([video[:1], 3 * video[1:] + 1]), torch.cat([spectrograms[:1], spectrograms[1:] - 5])
            )
        return max((one[name].embedding[0] - two[name].embedding[0]).norm().item() for name in one)

    assert change(key_encoder) < 1e-5
    assert change(pair) > 1e-2  # in training mode batch norm gives the batch away


def test_what_is_shared_is_averaged_once_and_buffers_outside_the_state_dict_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("hidden", torch.zeros(1), persistent=False)

    online = Tied()
    nn.init.zeros_(online.a.weight)
    key_encoder = momentum_copy(online)
    nn.init.ones_(online.a.weight)
    online.hidden += 8
    update_momentum(online, key_encoder, 0.75)
    assert {name: value.flatten().tolist() for name, value in key_encoder.named_parameters()} == {
        "a.weight": [0.25] * 4
    }
    assert dict(key_encoder.named_buffers())["hidden"].tolist() == [2.0]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_a_wrapped_encoder_is_followed_as_a_bare_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """DistributedDataParallel and torch.compile put another name before every parameter."""
    bare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    key_encoder, expected = momentum_copy(bare), momentum_copy(bare)
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter += 1
    update_momentum(bare, expected, 0.75)
    update_momentum(wrap(bare), key_encoder, 0.75)
    assert unwrapped(wrap(bare)) is bare
    for name, value in expected.state_dict().items():
        assert torch.equal(key_encoder.state_dict()[name], value)


def test_errors_come_before_any_change() -> None:
    online, key_encoder = (
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)),
    )
    before = [parameter.clone() for parameter in key_encoder.parameters()]
    with pytest.raises(ValueError, match=r"1\.weight must have equal shapes, got \(2, 2\) and \(3, 2\)"):
        update_momentum(online, key_encoder, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, key_encoder.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"the modules must match, but differ in 0\.bias, 0\.weight"):
        update_momentum(online[1:], online, 0.5)
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"^update_momentum: momentum must be in \[0, 1\], got {momentum}"):
            update_momentum(online, online, momentum)


def _trained() -> nn.Module:
    """A batch norm whose statistics have moved, with other weights at every call."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    inputs: Tensor = 1 + 2 * torch.randn(8, 3)
    for _ in range(int(torch.randint(1, 4, ()))):
        network(inputs)
    return network
