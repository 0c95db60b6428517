"""Closed-form gradient embeddings against autograd through the real encoders."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.encoders.pair import Encoder, Encoding
from cmacc.negatives import Factors, Keys, gradient_factors

TEMPERATURE = 0.1


@pytest.fixture(scope="module", params=list(product(("video", "audio"), ("linear", "mlp"))), ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Encoder, Encoding, Tensor]:
    """A real encoder in float64, what it says of five candidates, and seven queries."""
    modality, head = request.param
    config = EncoderConfig(head=head, hidden_size=12, embedding_size=6, mel_bins=8)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder: Encoder = getattr(AudioVisualEncoder(config).double().eval(), modality)
        shape = (5, 3, 4, 16, 16) if modality == "video" else (5, 8, 20)
        encoding = encoder(torch.randn(shape, dtype=torch.float64))
        return encoder, encoding, normalize(torch.randn(7, 6, dtype=torch.float64), dim=1)


def test_last_layer_is_the_gradient_at_the_real_last_layer(case: tuple[Encoder, Encoding, Tensor]) -> None:
    encoder, encoding, queries = case
    factors = gradient_factors(_keys(encoding), queries, TEMPERATURE, "last_layer")
    explicit = torch.einsum("na,nb->nab", factors.left, factors.right)
    expected = _autograd(encoding, queries, encoder.last.weight)
    for i in range(5):
        assert expected[i].norm() > 1e-3
        assert (explicit[i] - expected[i]).norm() <= 1e-10 * expected[i].norm()


def test_norms_and_distances_of_the_factors_are_those_of_the_gradients(case: tuple[Encoder, Encoding, Tensor]) -> None:
    encoder, encoding, queries = case
    factors = gradient_factors(_keys(encoding), queries, TEMPERATURE)
    gradients = _autograd(encoding, queries, encoder.last.weight).flatten(1).numpy()
    norms = factors.squared_norms()
    np.testing.assert_allclose(norms.numpy(), (gradients**2).sum(1), rtol=1e-10)
    products = (factors.left @ factors.left.T) * (factors.right @ factors.right.T)
    distances = norms[:, None] + norms[None] - 2 * products
    for i, j in product(range(5), repeat=2):
        expected = ((gradients[i] - gradients[j]) ** 2).sum()
        assert distances[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12 * norms.max().item())


def test_key_is_the_gradient_at_the_key(case: tuple[Encoder, Encoding, Tensor]) -> None:
    _, encoding, queries = case
    factors = gradient_factors(_keys(encoding), queries, TEMPERATURE, "key")
    expected = _autograd(encoding, queries, encoding.embedding).sum(1)  # the other candidates' rows are zero
    torch.testing.assert_close(factors.left, expected, rtol=1e-10, atol=1e-14)
    assert factors.right.tolist() == [[1.0]] * 5


def test_feature_is_the_penultimate_feature(case: tuple[Encoder, Encoding, Tensor]) -> None:
    encoder, encoding, queries = case
    seen: list[Tensor] = []
    hook = encoder.last.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    encoder.last(encoding.penultimate)
    hook.remove()
    factors = gradient_factors(_keys(encoding), queries, TEMPERATURE, "feature")
    assert torch.equal(factors.left * factors.right, seen[0].detach())


def test_confident_candidates_keep_their_digits_in_single_precision() -> None:
    """P_y is 1 to the last digit of float32; the gradient, about 1e-8, must still be right and not 0."""
    queries = torch.eye(4)
    embedding = normalize(torch.tensor([[1.0, 0.02, 0.0, 0.0], [1.0, 0.0, 0.04, 0.0]]), dim=1)
    keys = Keys.from_embedding(embedding, torch.arange(2), 0)
    exact = embedding.double().requires_grad_()
    cross_entropy(exact @ queries.double().T / 0.05, torch.zeros(2, dtype=torch.int64), reduction="sum").backward()
    assert exact.grad is not None
    actual = gradient_factors(keys, queries, 0.05, "key").left.double()
    torch.testing.assert_close(actual, exact.grad, rtol=1e-4, atol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    keys = Keys.from_embedding(normalize(torch.randn(9, 16), dim=1), torch.arange(9), 0, penultimate=torch.randn(9, 5))
    queries = normalize(torch.randn(4, 16), dim=1)
    expected = gradient_factors(keys, queries, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradient_factors(keys, queries, 0.07)
    assert torch.equal(actual.left, expected.left)


def test_squared_norms_of_given_factors() -> None:
    factors = Factors(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[2.0], [0.0]]))
    assert factors.squared_norms().tolist() == [100.0, 0.0]


@pytest.mark.usefixtures("users_checks")
def test_errors() -> None:
    bare = Keys.from_embedding(torch.eye(3), torch.arange(3), 0)
    full = dataclasses.replace(bare, penultimate=torch.ones(3, 2))
    with pytest.raises(ValueError, match="gradient must be one of last_layer, key, feature, got 'first_layer'"):
        gradient_factors(full, torch.eye(3), 0.1, "first_layer")  # type: ignore[arg-type]
    for gradient in ("last_layer", "feature"):
        with pytest.raises(ValueError, match=f"gradient '{gradient}' needs keys with their penultimate features"):
            gradient_factors(bare, torch.eye(3), 0.1, gradient)  # type: ignore[arg-type]
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
            gradient_factors(full, torch.eye(3), temperature)
    with pytest.raises(ValueError, match="queries must be at least one"):
        gradient_factors(full, torch.empty(0, 3), 0.1)


def _keys(encoding: Encoding) -> Keys:
    return Keys.from_embedding(
        encoding.embedding.detach(),
        torch.arange(len(encoding.embedding)),
        0,
        length=encoding.length.detach(),
        penultimate=encoding.penultimate.detach(),
    )


def _autograd(encoding: Encoding, queries: Tensor, at: Tensor) -> Tensor:
    """The gradient at ``at`` of each candidate's cross entropy with its own pseudo-label, one after the other."""
    gradients = []
    for key in encoding.embedding:
        logits = queries @ key / TEMPERATURE
        loss = cross_entropy(logits[None], logits.argmax()[None])
        gradients.append(torch.autograd.grad(loss, at, retain_graph=True)[0])
    return torch.stack(gradients)
