"""Use actively selected negatives in your own training loop: two imports, no trainer, no config.

The data are vectors. There are 20 latent classes, Zipf-distributed as in real collections (a few common, many rare).
Each sample has its own latent vector, and two fixed random networks map it to two "modalities". Two small encoders
learn to align the two views of a sample; each has a momentum copy that computes the keys, as in MoCo. The parts of the
loop that the dictionary requires are marked (1) to (4).

The script prints the loss and R@1 on held-out pairs, before and after training, with the actively selected dictionary
and with ``selector="newest"``, MoCo's queue. These are results of one seed of a toy problem: they show that both learn,
not which one is better.

Run it with ``python examples/01_active_dictionary.py``; it takes about fifteen seconds on one core.
Step by step: docs/tutorials/choosing_in_your_loop.py.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cmacc.negatives import ActiveDictionary, Keys
from cmacc.objectives import CrossModalContrast

CLASSES, LATENT, INPUT, HIDDEN, DIM = 20, 8, 32, 128, 32


def make_pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``(count, INPUT)`` for each modality: two views of the same latents, with independent noise."""
    world = torch.Generator().manual_seed(1)  # training and held-out pairs share classes and mixing
    centres = 2 * torch.randn(CLASSES, LATENT, generator=world)
    mixers = [
        (torch.randn(LATENT, 64, generator=world), torch.randn(64, INPUT, generator=world) / 8) for _ in ("a", "b")
    ]
    zipf = 1 / torch.arange(1, CLASSES + 1, dtype=torch.float32)
    classes = torch.multinomial(zipf, count, replacement=True, generator=generator)
    latents = centres[classes] + torch.randn(count, LATENT, generator=generator)
    a, b = ((latents @ mix).tanh() @ out + 0.1 * torch.randn(count, INPUT, generator=generator) for mix, out in mixers)
    return a, b


class Encoder(nn.Module):
    """A small MLP. For the active dictionary, it also returns the input of its last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(INPUT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.last = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised embedding, its norm before normalisation, and the penultimate feature."""
        penultimate = self.hidden(inputs)
        projected = self.last(penultimate)
        return normalize(projected, dim=1), projected.norm(dim=1), penultimate


@torch.no_grad()
def recall_at_1(encoders: nn.ModuleList, pairs: tuple[Tensor, Tensor]) -> float:
    """Share of held-out ``a`` whose nearest ``b`` is the matching one; chance is one over their number."""
    a, b = (encoder(view)[0] for encoder, view in zip(encoders, pairs, strict=True))
    return float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())


def train(selector: str, steps: int, batch: int = 32, temperature: float = 0.1, seed: int = 0) -> dict[str, float]:
    """Train with one selector; return loss (mean of 20 steps) and held-out R@1, before and after training."""
    torch.manual_seed(seed)  # for the initial weights
    generator = torch.Generator().manual_seed(seed)  # for everything else
    samples, held_out = make_pairs(4096, generator), make_pairs(500, generator)
    encoders = nn.ModuleList([Encoder(), Encoder()])
    twins = copy.deepcopy(encoders).requires_grad_(False)
    optimizer = torch.optim.Adam(encoders.parameters(), lr=1e-3)
    contrast = CrossModalContrast(temperature)
    # (1) One dictionary of negatives for the keys of each modality.
    dictionaries = [
        ActiveDictionary(DIM, 256, 1024, penultimate_size=HIDDEN, temperature=temperature, selector=selector)
        for _ in encoders
    ]
    before, losses = recall_at_1(encoders, held_out), []
    for step in range(steps):
        ids = torch.randperm(len(samples[0]), generator=generator)[:batch]
        views = [view[ids] for view in samples]
        queries = [encoder(view)[0] for encoder, view in zip(encoders, views, strict=True)]
        keys = [
            Keys.from_embedding(embedding, ids, step, length=length, penultimate=penultimate)
            for embedding, length, penultimate in (twin(view) for twin, view in zip(twins, views, strict=True))
        ]
        loss = torch.zeros(())
        for own, other in ((0, 1), (1, 0)):
            # (2) The queries of one modality select among the pooled keys of the other.
            dictionaries[other].select(queries[own], batch, generator, query_ids=ids)
            negatives = dictionaries[other].negatives()
            # (3) The selected keys are negatives in addition to those of the batch. A sample is never its own negative.
            loss = (
                loss
                + contrast(
                    queries[own],
                    keys[other].embedding,
                    ids,
                    ids,
                    negatives=negatives.embedding,
                    negative_ids=negatives.sample_ids,
                ).loss
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(twins.parameters(), encoders.parameters(), strict=True):
                old.lerp_(new, 0.01)
        for dictionary, pushed in zip(dictionaries, keys, strict=True):
            dictionary.push(pushed)  # (4) Add the keys of the batch to the pool, for later steps.
        losses.append(loss.item())
    return {
        "loss_before": sum(losses[:20]) / len(losses[:20]),
        "loss_after": sum(losses[-20:]) / len(losses[-20:]),
        "recall_before": before,
        "recall_after": recall_at_1(encoders, held_out),
    }


def main(steps: int = 400) -> dict[str, dict[str, float]]:
    """Train with both selectors and print the results."""
    print(f"{'selector':<10}{'loss':>16}{'R@1 of 500':>20}")
    results = {}
    for selector in ("newest", "active"):
        r = results[selector] = train(selector, steps)
        loss = f"{r['loss_before']:.2f} -> {r['loss_after']:.2f}"
        print(f"{selector:<10}{loss:>16}{r['recall_before']:>11.3f} -> {r['recall_after']:.3f}")
    return results


if __name__ == "__main__":
    main()
