import numpy as np
import pytest
import torch

from cmacc.negatives import Keys
from cmacc.pretraining.health import dictionary_health


def test_against_a_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(20, 6, generator=generator), dim=1)
    ids = torch.randint(0, 12, (20,), generator=generator)
    labels_by_id = torch.randint(-1, 3, (12,), generator=generator)
    query_labels = torch.tensor([0, -1, 2, 1])
    steps = torch.arange(20)
    health = dictionary_health(
        Keys(keys, torch.ones(20), torch.empty(20, 0), ids, steps, steps), query_labels, labels_by_id, step=30
    )

    cosines = [float(keys[i] @ keys[j]) for i in range(20) for j in range(20) if i != j]
    shares = np.linalg.svd(keys.double().numpy(), compute_uv=False)
    shares /= shares.sum()
    pairs = [(q, int(labels_by_id[i])) for q in query_labels.tolist() for i in ids.tolist()]
    known = [(q, n) for q, n in pairs if q >= 0 and n >= 0]
    assert health["pairwise_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert health["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert health["key_age"] == pytest.approx(30 - 9.5)
    assert health["distinct_samples"] == len(set(ids.tolist())) / 20
    assert health["false_negative_share"] == pytest.approx(np.mean([q == n for q, n in known]))
    assert health["distinct_labels"] == len({n for _, n in pairs if n >= 0})


def test_orthogonal_keys_have_full_rank_and_equal_keys_rank_one() -> None:
    def health(keys: torch.Tensor) -> dict[str, float]:
        count = len(keys)
        held = Keys.from_embedding(keys, torch.arange(count), 0)
        return dictionary_health(held, torch.tensor([-1]), torch.full((count,), -1), step=0)

    assert health(torch.eye(5))["effective_rank"] == pytest.approx(5, rel=1e-5)
    assert health(torch.eye(5)[:1].repeat(5, 1))["effective_rank"] == pytest.approx(1, rel=1e-4)
    assert "false_negative_share" not in health(torch.eye(5))
    assert health(torch.eye(5)[:1]) == {}
