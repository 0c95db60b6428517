"""The numbers of a selection against loops over single keys, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cmacc.negatives import GradientName, Keys
from cmacc.viewer.replay import Selection
from cmacc.viewer.selection import (
    Measure,
    hard_negatives,
    mean_cosine,
    near_duplicates,
    repeated_samples,
    selection_facts,
)

TAU = 0.2
LABELS = torch.tensor([0, 1, 2, -1, 1, 0, 2, 2, -1, 1] * 4)


def random_keys(count: int, first_id: int, generator: torch.Generator) -> Keys:
    return Keys.from_embedding(
        normalize(torch.randn(count, 6, generator=generator), dim=1),
        torch.arange(first_id, first_id + count),
        3,
        length=torch.rand(count, generator=generator) + 0.5,
        penultimate=torch.randn(count, 5, generator=generator),
    )


@pytest.fixture
def selection() -> Selection:
    generator = torch.Generator().manual_seed(0)
    pool = random_keys(20, 0, generator)
    pool.steps.copy_(torch.arange(20) // 4)
    eligible = torch.ones(20, dtype=torch.bool)
    eligible[[1, 6]] = False
    queries, positives = normalize(torch.randn(2, 4, 6, generator=generator), dim=2)
    return Selection(
        modality="audio",
        step=7,
        pool=pool,
        eligible=eligible,
        chosen=torch.tensor([17, 3, 8, 0]),
        before=random_keys(6, 20, generator),
        staying=random_keys(5, 24, generator),
        queries=queries,
        query_modality="video",
        contrasted=queries,
        positives=positives,
        query_ids=torch.tensor([24, 31, 32, 33]),
    )


def gradient_rows(selection: Selection, gradient: GradientName) -> Tensor:
    """Gradient embeddings by automatic differentiation of the pseudo-label's cross entropy, a row a key."""
    rows = []
    queries = selection.queries.double()
    for i in range(len(selection.pool)):
        key = selection.pool.embedding[i].double()
        penultimate = selection.pool.penultimate[i].double()
        # Any weight that maps the penultimate feature to the key's own output has the same gradient.
        output = key * selection.pool.length[i].double()
        weight = torch.outer(output, penultimate) / penultimate.square().sum()
        weight.requires_grad_(gradient == "last_layer")
        projected = weight @ penultimate
        n = projected / projected.norm() if gradient == "last_layer" else key.requires_grad_()
        logits = queries @ n / TAU
        (-logits.log_softmax(0)[logits.argmax()]).backward()
        rows.append((weight.grad if gradient == "last_layer" else key.grad).flatten())  # type: ignore[union-attr]
    return torch.stack(rows)


@pytest.mark.parametrize("gradient", ["last_layer", "key"])
def test_facts_equal_naive_loops(selection: Selection, gradient: GradientName) -> None:
    facts = selection_facts(selection, TAU, gradient, LABELS, torch.Generator().manual_seed(1), draws=7)
    chosen = selection.chosen.tolist()
    eligible = [i for i in range(20) if i not in (1, 6)]
    keys, queries = selection.pool.embedding.double(), selection.queries.double()
    for i in range(20):
        weights = [math.exp(float(keys[i] @ query) / TAU) for query in queries]
        assert facts.pseudo_labels[i] == max(range(4), key=weights.__getitem__)
        assert facts.posteriors[i].item() == pytest.approx(max(weights) / sum(weights), rel=1e-4)

    rows = gradient_rows(selection, gradient)
    assert torch.allclose(facts.gradient_norms.double(), rows.norm(dim=1), rtol=1e-3)
    expected = {
        "gradient_norm": sum(float(rows[i].norm()) for i in chosen) / 4,
        "key_age": sum(7 - i // 4 for i in chosen) / 4,
        "cosine": sum(float(keys[i] @ keys[j]) for i, j in itertools.combinations(chosen, 2)) / 6,
        "key_coverage": sum(min(1 - float(keys[i] @ keys[j]) for j in chosen) for i in eligible) / 18,
        "gradient_coverage": sum(min(float((rows[i] - rows[j]).square().sum()) for j in chosen) for i in eligible) / 18,
        "queries": len({int(facts.pseudo_labels[i]) for i in chosen}),
        "distinct_labels": len({int(LABELS[i]) for i in chosen} - {-1}),
    }
    pairs = [(LABELS[q], LABELS[i]) for q in selection.query_ids for i in chosen]
    known = [(q, k) for q, k in pairs if q >= 0 and k >= 0]
    expected["false_negative_share"] = sum(bool(q == k) for q, k in known) / len(known)
    for name, value in expected.items():
        assert facts.measures[name].chosen == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert facts.measures.keys() == expected.keys()
    assert facts.measures["gradient_norm"].pool == pytest.approx(float(rows[eligible].norm(dim=1).mean()), rel=1e-3)
    assert math.isnan(facts.measures["key_coverage"].pool)


def test_draws_are_of_eligible_keys_and_seeded(selection: Selection) -> None:
    facts = [
        selection_facts(selection, TAU, "key", LABELS, torch.Generator().manual_seed(seed), draws=400)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(facts[0].drawn, facts[1].drawn)
    assert not torch.equal(facts[0].drawn, facts[2].drawn)
    assert len(set(facts[0].drawn.tolist()) - {1, 6}) == 4
    for name in ("gradient_norm", "key_age", "cosine", "false_negative_share"):
        measure = facts[0].measures[name]
        # What a random draw is like on average is known without drawing: it is what the whole is like.
        assert measure.random == pytest.approx(measure.pool, abs=0.15 * (measure.high - measure.low))
        assert measure.low <= measure.random <= measure.high


def test_without_labels_nothing_is_said_of_them(selection: Selection) -> None:
    facts = selection_facts(selection, TAU, "key", torch.full((40,), -1), torch.Generator(), draws=2)
    assert not {"distinct_labels", "false_negative_share"} & facts.measures.keys()


def test_an_empty_choice_is_refused(selection: Selection) -> None:
    empty = Selection(**{**vars(selection), "chosen": torch.zeros(0, dtype=torch.int64)})
    with pytest.raises(ValueError, match="selection must hold at least one chosen key, got none"):
        selection_facts(empty, TAU, "key", LABELS, torch.Generator())


def test_verdict_needs_more_than_nearly_all_draws() -> None:
    assert [Measure(chosen, 1.0, 0.5, 1.5, 1.0).verdict for chosen in (0.4, 0.5, 1.5, 1.6)] == [-1, 0, 0, 1]


def test_rivals_equal_naive_loops(selection: Selection) -> None:
    found, share = hard_negatives(selection)
    keys = selection.dictionary
    assert len(keys) == 9
    leads = {}
    counted = 0
    for q, k in itertools.product(range(4), range(9)):
        if selection.query_ids[q] != keys.sample_ids[k]:
            counted += 1
            query = selection.contrasted[q].double()
            leads[q, k] = float(query @ keys.embedding[k].double() - query @ selection.positives[q].double())
    assert counted == 35  # sample 24 is a query's own
    assert share == pytest.approx(sum(lead > 0 for lead in leads.values()) / 35)
    best = {k: max((leads[q, k], q) for q in range(4) if (q, k) in leads) for k in range(9)}
    expected = sorted(((lead, q, k) for k, (lead, q) in best.items() if lead > 0), reverse=True)
    assert [(r.query, r.key) for r in found] == [(q, k) for _, q, k in expected]
    assert [r.cosine - r.own_cosine for r in found] == pytest.approx([lead for lead, _, _ in expected], abs=1e-5)


def test_duplicates_are_of_different_samples() -> None:
    keys = Keys.from_embedding(
        normalize(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0]]), dim=1),
        torch.tensor([5, 6, 7, 8, 7]),
        0,
    )
    found, count = near_duplicates(keys)
    assert [(pair.first, pair.second) for pair in found] == [(0, 1), (1, 3), (0, 3)]
    assert count == 3
    assert found[0].cosine == pytest.approx(1 / math.sqrt(1.0001))
    assert near_duplicates(keys, most=1) == (found[:1], 3)
    assert near_duplicates(keys, 0.999)[1] == 1
    assert repeated_samples(keys) == 1


def test_mean_cosine_of_one_key_is_unknown() -> None:
    assert math.isnan(mean_cosine(torch.ones(1, 1)))
    assert mean_cosine(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-1 / 3)
