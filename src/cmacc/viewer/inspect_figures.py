"""Figures of one selection: gradient norms, ages, similarity within the group, and a map of the pool."""

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cmacc.viewer.figures import Points, heat_map, overlaid_histogram, points_panel
from cmacc.viewer.page import Figure
from cmacc.viewer.replay import Selection
from cmacc.viewer.selection import SelectionFacts, mean_cosine
from cmacc.viewer.similarity import plane

_MAP_KEYS = 500  # of the pool and of the dictionary, each; t-SNE takes a few seconds for this many

_POOL = ("muted", "eligible keys of the pool", "square")
_CHOSEN = ("c1", "chosen", "line")
_RANDOM = ("c2", "random draw", "line")


def panels_of(selection: Selection, facts: SelectionFacts) -> list[Figure]:
    """Gradients, ages and similarity of a selection with at least one chosen key."""
    return [_gradients(selection, facts), _ages(selection), *_likeness(selection, facts)]


def _gradients(selection: Selection, facts: SelectionFacts) -> Figure:
    rows = (selection.eligible.nonzero().flatten(), selection.chosen, facts.drawn)
    groups = [(facts.gradient_norms[part].tolist(), c) for part, c in zip(rows, ("muted", "c1", "c2"), strict=True)]
    caption = (
        "Norms of the keys' gradients. Large ones belong to keys whose query is uncertain. A choice of hard keys is "
        "to the right of the grey area; a random one follows it."
    )
    return Figure("Gradient norm", overlaid_histogram(groups, "norm"), caption, (_POOL, _CHOSEN, _RANDOM))


def _ages(selection: Selection) -> Figure:
    def ages(steps: Int[Tensor, " keys"]) -> list[float]:
        return (selection.step - steps).double().tolist()

    pool = selection.pool.steps
    groups = [(ages(pool[selection.eligible]), "muted"), (ages(pool[selection.chosen]), "c1")]
    legend = [_POOL, _CHOSEN]
    if len(selection.before) > 0:
        groups.append((ages(selection.before.steps), "c3"))
        legend.append(("c3", "dictionary before", "line"))
    caption = (
        "Number of steps since the keys were encoded. Keys that wait in the pool and then in the dictionary are older "
        "than those of a plain queue, and the encoders have changed since."
    )
    return Figure("Age of the keys", overlaid_histogram(groups, "steps"), caption, legend)


def _likeness(selection: Selection, facts: SelectionFacts) -> list[Figure]:
    if len(selection.chosen) < 2:
        return []
    shown: list[tuple[str, NDArray[np.float64], NDArray[np.int64], float]] = []
    for what, rows in (("the chosen", selection.chosen), ("the random draw", facts.drawn)):
        ordered = rows[facts.pseudo_labels[rows].argsort(stable=True)]
        keys = selection.pool.embedding[ordered]
        cosine = (keys @ keys.T).double().numpy()
        shown.append((what, cosine, facts.pseudo_labels[ordered].numpy(), mean_cosine(keys)))
    # The diagonal is always 1, and must not set the scale for the rest.
    off = ~np.eye(len(selection.chosen), dtype=bool)
    limit = max(0.05, *(float(np.abs(cosine[off]).max()) for _, cosine, _, _ in shown))
    legend = [("c2", "similar", "square"), ("c1", "opposite", "square")]
    panels = []
    for what, cosine, groups, mean in shown:
        caption = (
            f"Cosine similarity of all pairs of keys: mean {mean:.3f}; full colour is {limit:.2f} or more. The bars at "
            "the edges change their shade between the keys of different queries. Blocks along the diagonal are "
            "redundant keys."
        )
        panels.append(Figure(f"Similarity among {what}", heat_map(cosine, limit, groups), caption, legend))
    return panels


def map_of_pool(selection: Selection, facts: SelectionFacts) -> Figure:
    """A 2-D map of the pool, with the chosen keys, a random draw and the dictionary."""
    pool, held = selection.pool, selection.staying
    marked = torch.zeros(len(pool), dtype=torch.bool)
    marked[selection.chosen] = True
    marked[facts.drawn] = True
    backdrop = _spaced(selection.eligible.logical_and(~marked).nonzero().flatten())
    kept = _spaced(torch.arange(len(held)))
    parts = [
        pool.embedding[backdrop],
        held.embedding[kept],
        pool.embedding[facts.drawn],
        pool.embedding[selection.chosen],
    ]
    places, method = plane(torch.cat(parts).numpy())
    styles = (("muted", "o", 12.0), ("c3", "s", 15.0), ("c2", "D", 26.0), ("c1", "^", 34.0))
    ends = np.cumsum([len(part) for part in parts])
    layers = [
        Points(rows, *style) for rows, style in zip(np.split(places, ends[:-1]), styles, strict=True) if len(rows)
    ]
    legend = [
        ("muted", "eligible keys of the pool", "dot"),
        ("c3", "keys that stay in the dictionary", "square"),
        ("c2", "random draw", "square"),
        ("c1", "chosen", "triangle"),
    ]
    near = facts.measures["key_coverage"]
    caption = (
        f"{method} of the keys, up to {_MAP_KEYS} of each kind. Close points are similar; the distance between groups "
        "means little. A diverse choice has triangles in every part of the grey area. Measured on the embeddings, the "
        f"mean distance (1 − cosine) of an eligible key is {near.chosen:.3f} to the nearest chosen key, and "
        f"{near.random:.3f} to the nearest of a random draw. A key that was both chosen and drawn is a triangle."
    )
    return Figure("Map of the pool", points_panel(layers), caption, legend)


def _spaced(rows: Int[Tensor, " rows"]) -> Int[Tensor, " some"]:
    if len(rows) <= _MAP_KEYS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, _MAP_KEYS).round().long()]
