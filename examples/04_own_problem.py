"""Train on your own data with cmacc's trainer: match left and right halves of handwritten digits.

    python examples/04_own_problem.py

`Trainer` does not depend on clips. A problem provides the batches, the encoder inputs for a batch, and the encoders;
cmacc provides the active dictionary, the loss, key encoders and learning rate schedule. Here, the left half takes the
role of "video" and the right half that of "audio": these are only the names of the two sides.
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
    """Indices and labels of a batch of digits."""

    sample_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to a device."""
        return Batch(self.sample_ids.to(device), self.labels.to(device))


class Halves:
    """Left and right halves (n, 8, 4) of 1,797 digits; views have additive noise, seeded by digit and visit."""

    def __init__(self) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images.astype(np.float32)) / 16
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.images, labels = images[order], torch.from_numpy(digits.target)[order]
        self.labels = labels[:-HELD_OUT]

    def side(self, modality: Modality, ids: Tensor, visits: Tensor | None = None) -> Tensor:
        """Halves of one side, (n, 32), with noise if ``visits`` are given."""
        half = self.images[ids][:, :, :4] if modality == "video" else self.images[ids][:, :, 4:]
        if visits is None:
            return half.flatten(1)
        seeds = zip(ids.tolist(), visits.tolist(), strict=True)
        noise = [np.random.default_rng([i, v, modality == "video"]).normal(0, 0.1, 32) for i, v in seeds]
        return half.flatten(1) + torch.from_numpy(np.stack(noise).astype(np.float32))

    # The three methods of `cmacc.pretraining.Views`, which this class also implements.

    def of(self, batch: Batch, visit: int) -> dict[Modality, Tensor]:
        """Encoder inputs for a batch."""
        kept = self.kept(batch, visit)
        return {"video": self.again("video", kept.__getitem__), "audio": self.again("audio", kept.__getitem__)}

    def kept(self, batch: Batch, visit: int) -> dict[str, Tensor]:
        """Data to recompute the same views, when a key of the pool is re-encoded."""
        return {"sample_ids": batch.sample_ids, "visits": torch.full_like(batch.sample_ids, visit)}

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        """Recompute the views of one side."""
        return self.side(modality, kept("sample_ids"), kept("visits"))

    @property
    def views(self) -> "Halves":
        """The views, as required by `cmacc.pretraining.Problem`."""
        return self

    # The other members of `cmacc.pretraining.Problem`.

    memory = None  # not needed, since batches are random

    def encoder(self) -> EncoderPair:
        """Two multilayer perceptrons with cmacc's projection heads."""
        torch.manual_seed(CONFIG.seed)
        backbones = [nn.Sequential(nn.Linear(32, 128), nn.BatchNorm1d(128), nn.ReLU()) for _ in range(2)]
        return EncoderPair(*(Encoder(b, 128, "mlp", 128, CONFIG.encoder.embedding_size) for b in backbones))

    def visit(self, step: int) -> int:
        """Number of earlier visits of the samples of a step, which is the epoch."""
        return step // (len(self.labels) // CONFIG.optim.batch_size)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Batches in random order, reshuffled every epoch."""
        size, count = CONFIG.optim.batch_size, len(self.labels)
        for step in range(first_step, last_step):
            order = torch.from_numpy(np.random.default_rng(self.visit(step)).permutation(count))
            ids = order[step % (count // size) * size :][:size]
            yield Batch(ids, self.labels[ids])


def recall(problem: Halves, encoder: nn.Module) -> float:
    """R@1: share of held-out left halves whose nearest right half is the matching one."""
    ids = torch.arange(len(problem.labels), len(problem.images))
    encoder.eval()
    with torch.no_grad():
        found = encoder(video=problem.side("video", ids), audio=problem.side("audio", ids))
    encoder.train()
    return float((ranks(found["video"].embedding.numpy(), found["audio"].embedding.numpy()) == 1).mean())


def main() -> tuple[float, float]:
    """Train, and print R@1 before and after training."""
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
