"""The momentum copy against a loop over numbers, after real training steps."""

import pytest
import torch
from torch import Tensor, nn

from cmacc.encoders import AudioVisualEncoder, EncoderConfig, momentum_copy, update_momentum


def test_parameters_and_buffers_follow_the_naive_average_through_training() -> None:
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=8, hidden_size=8, embedding_size=4))
    twin = momentum_copy(pair)
    expected = {name: value.double().numpy().copy() for name, value in pair.state_dict().items()}
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    for step in range(3):
        momentum = 0.5 + 0.2 * step
        video, audio = pair(torch.randn(3, 3, 4, 16, 16), 2 + 3 * torch.randn(3, 8, 20))
        optimizer.zero_grad()
        (-(video.embedding * audio.embedding).sum()).backward()
        optimizer.step()
        update_momentum(pair, twin, momentum)
        for name, value in pair.state_dict().items():
            if name.endswith("num_batches_tracked"):
                expected[name][...] = step + 1
            else:
                expected[name] = momentum * expected[name] + (1 - momentum) * value.double().numpy()
    moved = 0
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value.double(), torch.from_numpy(expected[name]), rtol=1e-5, atol=1e-7)
        moved += int(not torch.equal(value, pair.state_dict()[name]))
        assert name.endswith("num_batches_tracked") == (not value.is_floating_point())
    buffers = dict(twin.named_buffers())
    assert (buffers["audio.backbone.normalise.running_mean"] - 2).abs().max() < 2  # on its way from 0 to 2
    assert buffers["audio.backbone.normalise.running_mean"].abs().min() > 0.05
    assert moved > 30


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_the_range(momentum: float) -> None:
    """0 is a copy and 1 leaves the averages alone, both to the bit."""
    online, twin = _trained(), momentum_copy(_trained())
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    update_momentum(online, twin, momentum)
    for name, value in twin.state_dict().items():
        source = online.state_dict() if momentum == 0 or name.endswith("num_batches_tracked") else before
        assert torch.equal(value, source[name]), name


def test_the_copy_is_apart_without_gradient_and_in_evaluation_mode() -> None:
    online = _trained()
    twin = momentum_copy(online)
    assert online.training
    assert all(parameter.requires_grad for parameter in online.parameters())
    assert not any(module.training for module in twin.modules())
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_a_key_does_not_depend_on_the_rest_of_its_batch() -> None:
    pair = AudioVisualEncoder(EncoderConfig(mel_bins=8, embedding_size=16))
    pair(torch.randn(4, 3, 4, 16, 16), torch.randn(4, 8, 20))
    twin = momentum_copy(pair)
    video, spectrograms = torch.randn(4, 3, 4, 16, 16), torch.randn(4, 8, 20)

    def change(network: nn.Module) -> float:
        """Of the first clip's embeddings when the other clips are other ones."""
        with torch.no_grad():
            one = network(video, spectrograms)
            two = network(
                torch.cat([video[:1], 3 * video[1:] + 1]), torch.cat([spectrograms[:1], spectrograms[1:] - 5])
            )
        return max((a.embedding[0] - b.embedding[0]).norm().item() for a, b in zip(one, two, strict=True))

    assert change(twin) < 1e-5
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
    twin = momentum_copy(online)
    nn.init.ones_(online.a.weight)
    online.hidden += 8
    update_momentum(online, twin, 0.75)
    assert {name: value.flatten().tolist() for name, value in twin.named_parameters()} == {"a.weight": [0.25] * 4}
    assert dict(twin.named_buffers())["hidden"].tolist() == [2.0]


def test_errors_come_before_any_change() -> None:
    online, twin = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = [parameter.clone() for parameter in twin.parameters()]
    with pytest.raises(ValueError, match=r"1\.weight must have equal shapes, got \(2, 2\) and \(3, 2\)"):
        update_momentum(online, twin, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, twin.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"the modules must be alike, but differ in 0\.bias, 0\.weight"):
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
