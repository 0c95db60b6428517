"""Draws docs/selection.png: which of a pool's gradient embeddings each selector takes, in two dimensions.

``python docs/draw_selection.py``. The pool is made up: most candidates are sure of their query and lie near the origin,
the unsure ones lie in groups of very different sizes, one for each kind of doubt.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from cmacc.negatives import kmeans_plusplus

PICKS = 16
GROUPS = (160, 60, 25, 12, 6, 4, 3, 2)


def pool() -> tuple[Tensor, Tensor]:
    """Gradients ``(n, 2)`` and their groups; -1 for those near the origin."""
    generator = torch.Generator().manual_seed(3)
    parts, groups = [0.12 * torch.randn(400, 2, generator=generator)], [torch.full((400,), -1)]
    for number, size in enumerate(GROUPS):
        angle = torch.tensor(2.4 * number)
        centre = (1.0 + 0.12 * (number % 4)) * torch.stack([angle.cos(), angle.sin()])
        parts.append(centre + 0.05 * torch.randn(size, 2, generator=generator))
        groups.append(torch.full((size,), number))
    return torch.cat(parts), torch.cat(groups)


def main() -> None:
    gradients, groups = pool()
    generator = torch.Generator().manual_seed(0)
    chosen = {
        "random": torch.randperm(len(gradients), generator=generator)[:PICKS],
        "hardest": gradients.norm(dim=1).topk(PICKS).indices,
        "active (k-means++)": kmeans_plusplus(gradients, PICKS, generator=generator),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.1), sharex=True, sharey=True)
    for axis, (name, picks) in zip(axes, chosen.items(), strict=True):
        axis.scatter(*gradients.T, s=9, color="#c3c9d1", linewidths=0)
        axis.scatter(*gradients[picks].T, s=46, facecolor="#d2691e", edgecolor="white", linewidths=0.8)
        found = len(set(groups[picks].tolist()) - {-1})
        axis.set_title(f"{name}\n{found} of {len(GROUPS)} groups", fontsize=11)
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_color("#dfe1e4")
    axes[0].annotate("sure: short gradients", (0, 0.47), ha="center", fontsize=9, color="#666c75")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("selection.png"), dpi=110)


if __name__ == "__main__":
    main()
