"""Train on data of one's own with cmacc's engine: which left half of a handwritten digit belongs to which right half?

    python examples/04_own_problem.py

`Trainer` knows nothing of clips. It asks a problem for batches, for what the two encoders are to be given of a batch,
and for the encoders; the active dictionary, the loss, key encoders and learning rate are cmacc's. The left half stands
for "video" here and the right half for "audio": the names are those of the two sides, whatever they hold.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cmacc.encoders import Encoder, EncoderPair, Modality
from cmacc.pretraining import DictionaryConfig, OptimConfig, PretrainConfig, Trainer
from cmacc.transfer import ranks

CONFIG = PretrainConfig(
    dictionary=DictionaryConfig(selector="active", size=128, pool_size=512),
    optim=OptimConfig(batch_size=32, steps=400, learning_rate=3e-3),
)
HELD_OUT = 300


@dataclass(frozen=True)
class Batch:
    """Which digits."""

    sample_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(self.sample_ids.to(device), self.labels.to(device))


class Halves:
    """Left and right halves (n, 8, 4) of 1,797 digits; a view adds noise that is seeded by digit and visit."""

    def __init__(self) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.float32)) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images, labels = images[order], torch.from_numpy(digits.target)[order]
        self.labels = labels[:-HELD_OUT]

    def side(self, modality: Modality, ids: Tensor, visits: Tensor | None = None) -> Tensor:
        """(n, 32): the half of that side, with noise where visits are given."""
        half = self.images[ids][:, :, :4] if modality == "video" else self.images[ids][:, :, 4:]
        if visits is None:
            return half.flatten(1)
        seeds = zip(ids.tolist(), visits.tolist(), strict=True)
        noise = [np.random.default_rng([i, v, modality == "video"]).normal(0, 0.1, 32) for i, v in seeds]
        return half.flatten(1) + torch.from_numpy(np.stack(noise).astype(np.float32))

    # The three verbs of `cmacc.pretraining.Views`; this problem is its own.

    def of(self, batch: Batch, visit: int) -> dict[Modality, Tensor]:
        """What the encoders are given of a batch."""
        kept = self.kept(batch, visit)
        return {"video": self.again("video", kept.__getitem__), "audio": self.again("audio", kept.__getitem__)}

    def kept(self, batch: Batch, visit: int) -> dict[str, Tensor]:
        """What makes the same views again, when a key of the pool is re-encoded."""
        return {"sample_ids": batch.sample_ids, "visits": torch.full_like(batch.sample_ids, visit)}

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        """One side's views."""
        return self.side(modality, kept("sample_ids"), kept("visits"))

    @property
    def views(self) -> "Halves":
        """As `cmacc.pretraining.Problem` calls them."""
        return self

    # The rest of `cmacc.pretraining.Problem`.

    memory = None  # nothing to put batches together by: they are random

    def encoder(self) -> EncoderPair:
        """Two perceptrons with cmacc's heads."""
        torch.manual_seed(CONFIG.seed)
        backbones = [nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU()) for _ in range(2)]
        return EncoderPair(*(Encoder(b, 128, "mlp", 128, CONFIG.encoder.embedding_size) for b in backbones))

    def visit(self, step: int) -> int:
        """The epoch."""
        return step // (len(self.labels) // CONFIG.optim.batch_size)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Every epoch in an order of its own."""
        size, count = CONFIG.optim.batch_size, len(self.labels)
        for step in range(first_step, last_step):
            order = torch.from_numpy(np.random.default_rng(self.visit(step)).permutation(count))
            ids = order[step % (count // size) * size :][:size]
            yield Batch(ids, self.labels[ids])


def recall(problem: Halves, encoder: nn.Module) -> float:
    """Share of held-out left halves whose own right half is nearest."""
    ids = torch.arange(len(problem.labels), len(problem.images))
    encoder.eval()
    with torch.no_grad():
        found = encoder(video=problem.side("video", ids), audio=problem.side("audio", ids))
    encoder.train()
    return float((ranks(found["video"].embedding.numpy(), found["audio"].embedding.numpy()) == 1).mean())


def main() -> tuple[float, float]:
    """Train, and print how often the right half is found before and after."""
    problem = Halves()
    trainer = Trainer(problem, CONFIG)
    before = recall(problem, trainer.learner.encoder)
    for done in trainer.steps():
        if done.step % 50 == 0:
            print(f"step {done.step:3}: loss {done.metrics['loss']:.3f}")
    after = recall(problem, trainer.learner.encoder)
    print(
        f"R@1 among {HELD_OUT} held-out digits: {before:.3f} untrained, {after:.3f} trained, {1 / HELD_OUT:.3f} chance"
    )
    return before, after


if __name__ == "__main__":
    main()
