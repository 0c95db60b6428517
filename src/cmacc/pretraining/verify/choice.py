"""The lines of the certificate on the choice of negatives: do draws have the probabilities that they must have?"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cmacc.negatives import ActiveDictionary, Keys, kmeans_plusplus
from cmacc.negatives.gradients import GradientName
from cmacc.pretraining.verify.lines import Line, Subject

# Chance that a line fails though all is right. Seeds are fixed: it is about the seeds that were chosen once.
SIGNIFICANCE = 1e-4
_DRAWS = 3000
_LEAST_EXPECTED = 10  # of a cell of the test; rarer outcomes count as one

Outcome = tuple[int, ...]
Floats = NDArray[np.float64]


def drawn_by_k_means(subject: Subject) -> list[Line]:
    """`kmeans_plusplus` on rank-one rows, against the probabilities of every outcome."""
    generator = torch.Generator().manual_seed(0)
    left, right = 3 * torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)
    points = left.to(subject.device), right.to(subject.device)

    def draw(seed: int) -> Outcome:
        return tuple(kmeans_plusplus(points, 3, generator=torch.Generator().manual_seed(seed)).tolist())

    rows = (left.double()[:, :, None] * right.double()[:, None, :]).flatten(1).numpy()
    return [_tested("k-means++ draws by squared distance", draw, exact_chances(rows, 3))]


def drawn_by_the_dictionary(subject: Subject) -> list[Line]:
    """`ActiveDictionary.select` against probabilities from gradients by autograd, multiplied out.

    Some keys of the pool may not be chosen: of samples in the batch or in the dictionary, and older ones of a sample.
    """
    settings = subject.config.dictionary
    initial_centers = settings.initial_centers if settings.selector == "active" else "none"
    temperature = subject.config.objective.temperature
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    queries = normalize(normal(4, 3), dim=1)
    last_layer = normal(3, 2)
    penultimate = normal(12, 2)
    projected = penultimate @ last_layer.T
    sample_ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 6, 7, 8, 6, 20])
    keys = Keys.from_embedding(
        normalize(projected, dim=1), sample_ids, 0, length=projected.norm(dim=1), penultimate=penultimate
    )
    held, query_ids = [3, 8, 4], torch.tensor([20, 21, 22, 23])
    dictionary = ActiveDictionary(
        3,
        4,
        12,
        penultimate_size=2,
        temperature=temperature,
        gradient=settings.gradient,
        initial_centers=initial_centers,
    )
    dictionary.push(keys)
    dictionary.dictionary.push(keys[torch.tensor(held)])
    dictionary.to(subject.device)
    filled = deepcopy(dictionary.state_dict())

    def draw(seed: int) -> Outcome:
        dictionary.load_state_dict(filled)
        count = dictionary.select(
            queries.to(subject.device), 2, torch.Generator().manual_seed(seed), query_ids=query_ids.to(subject.device)
        )
        # Samples to rows: a sample that is in the pool twice can only be its newer row.
        newest = {sample: row for row, sample in enumerate(sample_ids.tolist())}
        return tuple(newest[sample] for sample in dictionary.negatives().sample_ids[-count:].tolist())

    rows = gradients(last_layer.double(), penultimate.double(), queries.double(), temperature, settings.gradient)
    # Of three keys held, in a dictionary of four, two stay beside two new ones.
    centres = rows[held[1:]] if initial_centers == "dictionary" else rows[:0]
    chances = exact_chances(rows, 2, barred=[*held[1:], 0, 7, 11], centres=centres)
    return [_tested("dictionary draws by squared distance", draw, chances)]


def gradients(
    last_layer: Tensor, penultimate: Tensor, queries: Tensor, temperature: float, gradient: GradientName
) -> Floats:
    """Gradient of every key's pseudo-label loss, by autograd: the row in which the choice measures distances."""
    rows = []
    for feature in penultimate:
        if gradient == "feature":
            rows.append(feature)
            continue
        weight = last_layer.clone().requires_grad_()
        key = normalize(weight @ feature, dim=0)
        scores = queries @ key / temperature
        loss = cross_entropy(scores[None], scores.argmax()[None])
        (row,) = torch.autograd.grad(loss, key if gradient == "key" else weight)
        rows.append(row.flatten())
    return torch.stack(rows).numpy()


def exact_chances(
    rows: Floats, count: int, *, barred: Collection[int] = (), centres: Floats | None = None
) -> dict[Outcome, float]:
    """The probability of every sequence of picks: the first uniform without centres, then by squared distance."""
    free = [row for row in range(len(rows)) if row not in barred]
    chances = {}
    for picks in itertools.permutations(free, count):
        chance = 1.0
        for place, row in enumerate(picks):
            chance *= _weights(rows, free, picks[:place], centres)[row]
        chances[picks] = chance
    return chances


def _weights(rows: Floats, free: Sequence[int], picks: Outcome, centres: Floats | None) -> Floats:
    near = rows[list(picks)] if centres is None else np.concatenate([centres, rows[list(picks)]])
    weights = np.zeros(len(rows))
    for row in set(free) - set(picks):
        weights[row] = np.square(near - rows[row]).sum(1).min() if len(near) else 1.0
    shares: Floats = weights / weights.sum()
    return shares


def _tested(name: str, draw: Callable[[int], Outcome], chances: dict[Outcome, float]) -> Line:
    """Pearson's chi-square statistic of the draws of many seeds, against its quantile."""
    compares = f"chi-square of {_DRAWS:,} draws, against exact probabilities; significance {SIGNIFICANCE:g}"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a dozen rows: more would wait for each other
    try:
        counts = Counter(draw(seed) for seed in range(_DRAWS))
    finally:
        torch.set_num_threads(threads)
    if impossible := counts.keys() - chances.keys():
        return Line(name, compares, None, None, False, f"drew {min(impossible)}, which is impossible")
    common = [outcome for outcome, chance in chances.items() if _DRAWS * chance >= _LEAST_EXPECTED]
    expected = [_DRAWS * chances[outcome] for outcome in common]
    found = [counts[outcome] for outcome in common]
    if len(common) < len(chances):
        expected.append(_DRAWS - sum(expected))
        found.append(_DRAWS - sum(found))
    statistic = float(sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True) if e > 0))
    limit = float(chi2.isf(SIGNIFICANCE, len(expected) - 1))
    return Line(name, compares, statistic, limit, statistic <= limit)
