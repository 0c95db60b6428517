"""Use active batch selection in your own training loop: one function, no trainer, no dictionary.

The data are those of the controlled problem in docs/evidence-details.md: pairs of vectors from 200 classes that share a
latent cause. Two small encoders learn to match them. The samples of a batch are each other's negatives. From the second
epoch on, `active_batches` groups samples that were hard to distinguish at their last visit. The loop only has to store
both embeddings of every sample, marked (1), and to request the batches of the next epoch, marked (2).

The script prints R@1 on held-out pairs, with random and with active batches: mean, minimum and maximum over five seeds,
each with its own data.

Run it with ``python examples/05_active_batches.py``; it takes less than a minute on one core. Whether active batches
help depends on the data: see the table in docs/evidence-details.md. Step by step:
docs/tutorials/choosing_in_your_loop.py.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from cmacc.ablation.vectors import VectorWorld, draw_vectors
from cmacc.negatives import active_batches
from cmacc.objectives import CrossModalContrast

WORLD = VectorWorld(samples=2048, held_out=500)
HIDDEN, DIM = 128, 64


def encoder() -> nn.Module:
    """A small multilayer perceptron; the last batch norm centres the input of the last layer."""
    return nn.Sequential(
        nn.Linear(WORLD.input_size, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, DIM, bias=False),
    )  # fmt: skip


def train(active: bool, seed: int, epochs: int, batch_size: int = 64) -> float:
    """Train, and return R@1 on the held-out pairs."""
    torch.manual_seed(seed)
    training, held_out = draw_vectors(WORLD, seed)
    sides = training.video, training.audio
    encoders = encoder(), encoder()
    optimizer = torch.optim.AdamW([p for e in encoders for p in e.parameters()], lr=4e-3)
    contrast = CrossModalContrast(temperature=0.1, decoupled=True)

    memory = torch.zeros(2, WORLD.samples, DIM)  # (1) embeddings of every sample at its last visit
    known = torch.zeros(WORLD.samples, dtype=torch.bool)
    for epoch in range(epochs):
        # (2) the batches of the epoch; random if no embeddings are known
        batches = active_batches(
            memory[0],
            memory[1],
            batch_size,
            np.random.default_rng([seed, epoch]),
            known=known & active,
        )
        for rows in batches:
            noise = WORLD.noise * torch.randn(2, len(rows), WORLD.input_size)
            first, second = (
                normalize(net(side[rows] + own), dim=1) for net, side, own in zip(encoders, sides, noise, strict=True)
            )
            loss = contrast(first, second, rows, rows).loss + contrast(second, first, rows, rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory[:, rows] = torch.stack([first, second]).detach()  # (1)
            known[rows] = True
    with torch.no_grad():
        for net in encoders:
            net.eval()
        first, second = encoders[0](held_out.video), encoders[1](held_out.audio)
        found = (normalize(first, dim=1) @ normalize(second, dim=1).T).argmax(1)
        return float((found == torch.arange(len(found))).float().mean())


def main(seeds: int = 5, epochs: int = 15) -> dict[str, list[float]]:
    """Train with random and active batches, and print a table."""
    results: dict[str, list[float]] = {}
    print(f"{'batches':<8}  recall@1 of {WORLD.held_out}   least   greatest")
    for name in ("random", "active"):
        results[name] = found = [train(name == "active", seed, epochs) for seed in range(seeds)]
        print(f"{name:<8}  {np.mean(found):<17.3f}  {min(found):.3f}   {max(found):.3f}")
    return results


if __name__ == "__main__":
    main()
