r"""Gradient embeddings of candidate keys, as factors that are never multiplied out.

The pseudo-posterior says which query of the batch a candidate key n = z / |z|, z = W p, belongs to:
P_j = softmax_j(n . q_j / tau), with the pseudo-label y = argmax_j P_j (Ma et al., 2021, section 3.2; after BADGE, Ash
et al., 2020). The gradient of the cross entropy CE(P, y) is

* at the key,              s = sum_j (P_j - [j = y]) q_j / tau                    (``key``; the authors' released code)
* at the layer's output,   r = (s - (s . n) n) / |z|                              (back through the L2 norm)
* at the layer's weight W, g = r p^T                                              (``last_layer``)

g has d x p numbers per candidate, but <g_i, g_j> = <r_i, r_j> <p_i, p_j>, so seeding only needs the pair (r, p).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cmacc.negatives.queue import Keys

GradientName = Literal["last_layer", "key", "feature"]
"""What the gradient embeddings are taken with respect to; ``feature``: no gradient, the features themselves."""


@dataclass(frozen=True)
class Factors:
    """n rank-one rows left_i (outer) right_i, ``left (n, a)`` and ``right (n, b)``."""

    left: Float[Tensor, "rows left"]
    right: Float[Tensor, "rows right"]

    def squared_norms(self) -> Float[Tensor, " rows"]:
        """Squared Frobenius norm of every row's outer product."""
        return self.left.square().sum(1) * self.right.square().sum(1)


def gradient_factors(
    keys: Keys, queries: Float[Tensor, "queries dim"], temperature: float, gradient: GradientName = "last_layer"
) -> Factors:
    """Gradient embeddings of candidate keys with respect to their pseudo-labels among the queries.

    Parameters
    ----------
    keys
        n candidates of one modality.
    queries
        ``(M, d)``, L2-normalised queries: of the other modality for cross-modal pseudo-labels, of the candidates'
        modality for within-modal ones.
    temperature
        tau > 0.
    gradient
        ``last_layer``, ``key``, or ``feature``: the penultimate feature instead of a gradient, for diversity only.

    Returns
    -------
    Factors
        ``(r, p)`` for ``last_layer``; ``(s, 1)`` for ``key``; ``(p, 1)`` for ``feature``.

    Raises
    ------
    ValueError
        ``gradient`` is unknown, or needs a penultimate feature that the keys do not have; the temperature is not
        positive; there is no query.
    """
    if gradient not in get_args(GradientName):
        raise ValueError(
            f"gradient_factors: gradient must be one of {', '.join(get_args(GradientName))}, got {gradient!r}"
        )
    if gradient != "key" and keys.penultimate.shape[1] == 0:
        raise ValueError(
            f"gradient_factors: gradient {gradient!r} needs keys with their penultimate features, got none"
        )
    if not temperature > 0:
        raise ValueError(f"gradient_factors: temperature must be positive, got {temperature}")
    if len(queries) == 0:
        raise ValueError("gradient_factors: queries must be at least one, got none")
    ones = keys.embedding.new_ones(len(keys), 1)
    if gradient == "feature":
        return Factors(keys.penultimate, ones)
    at_key = key_gradients(keys.embedding, queries, temperature)
    if gradient == "key":
        return Factors(at_key, ones)
    along = (at_key * keys.embedding).sum(1, keepdim=True)
    return Factors((at_key - along * keys.embedding) / keys.length[:, None], keys.penultimate)


def key_gradients(
    keys: Float[Tensor, "keys dim"], queries: Float[Tensor, "queries dim"], temperature: float
) -> Float[Tensor, "keys dim"]:
    """s_i: gradient of the pseudo-label's cross entropy with respect to each key, ignoring the L2 norm."""
    # Autocast would keep three digits, and the softmax amplifies the error by 1 / tau.
    with torch.autocast(keys.device.type, enabled=False):
        posterior = (keys @ queries.T / temperature).softmax(dim=1)
        label = posterior.argmax(1, keepdim=True)
        # P_y - 1 as minus the sum of the others: P_y of a confident candidate rounds to 1, and the difference to 0,
        # which would lose the order of the confident ones.
        others = posterior.scatter(1, label, 0.0)
        residual = others.scatter(1, label, -others.sum(1, keepdim=True))
        return residual @ queries / temperature
