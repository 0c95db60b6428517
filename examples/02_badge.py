"""Select samples to label with BADGE (Ash et al., 2020): ``kmeans_plusplus`` on gradients of the last layer.

The gradient of the loss at the last layer, with the predicted label as target, is the outer product of (probabilities -
one-hot label) and the input feature of the layer. It is long if the classifier is uncertain, and its direction depends
on the kind of uncertainty. k-means++ seeding on the two factors, without computing their product, selects a batch that
is uncertain and diverse: the call marked (1).

The data are scikit-learn's handwritten digits (1,797 images of 8 x 8), subsampled to be imbalanced: nine of ten samples
are zeros, ones or twos, so that a random batch wastes most of its labels. The script prints balanced accuracy on
held-out digits after each round of 20 labels, for BADGE and for random selection; mean and standard deviation over
seeds.

Run it with ``python examples/02_badge.py``; it takes about twenty seconds on one core.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from cmacc.negatives import kmeans_plusplus

ROUNDS, BATCH, CLASSES = 6, 20, 10


def uneven_digits(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to select from, with three common classes; and balanced held-out ones."""
    digits = load_digits()
    pictures, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=generator)
    held_out, rest = order[:600], order[600:]
    common = labels[rest] < 3
    kept = torch.cat([rest[common], rest[~common][: int(common.sum()) // 9]])
    return pictures[kept], labels[kept], pictures[held_out], labels[held_out]


class Classifier(nn.Module):
    """One hidden layer; also returns the input of the last layer, for BADGE."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.last = nn.Linear(64, CLASSES)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the penultimate feature."""
        feature = self.hidden(pictures)
        return self.last(feature), feature


def fit(pictures: Tensor, labels: Tensor, seed: int) -> Classifier:
    """Train a classifier from scratch on the labelled samples."""
    torch.manual_seed(seed)
    classifier = Classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(classifier(pictures)[0], labels).backward()
        optimizer.step()
    return classifier


@torch.no_grad()
def badge(classifier: Classifier, pictures: Tensor, unlabelled: Tensor, generator: torch.Generator) -> Tensor:
    """Select the next batch to label, from gradient embeddings for the predicted labels."""
    scores, feature = classifier(pictures)
    probabilities = scores.softmax(1)
    left = probabilities - one_hot(scores.argmax(1), CLASSES)
    return kmeans_plusplus((left, feature), BATCH, generator=generator, eligible=unlabelled)  # (1)


@torch.no_grad()
def balanced_accuracy(classifier: Classifier, pictures: Tensor, labels: Tensor) -> float:
    """Mean over classes of the accuracy."""
    right = (classifier(pictures)[0].argmax(1) == labels).float()
    return float(torch.stack([right[labels == c].mean() for c in range(CLASSES)]).mean())


def learn(strategy: str, seed: int) -> list[float]:
    """Balanced accuracy after each round; the first batch is random for both strategies."""
    generator = torch.Generator().manual_seed(seed)
    pictures, labels, test_pictures, test_labels = uneven_digits(generator)
    unlabelled = torch.ones(len(labels), dtype=torch.bool)
    batch = torch.randperm(len(labels), generator=generator)[:BATCH]
    accuracies = []
    for _ in range(ROUNDS):
        unlabelled[batch] = False
        classifier = fit(pictures[~unlabelled], labels[~unlabelled], seed)
        accuracies.append(balanced_accuracy(classifier, test_pictures, test_labels))
        if strategy == "badge":
            batch = badge(classifier, pictures, unlabelled, generator)
        else:
            left = unlabelled.nonzero().flatten()
            batch = left[torch.randperm(len(left), generator=generator)[:BATCH]]
    return accuracies


def main(seeds: int = 10) -> dict[str, list[float]]:
    """Run both strategies on the same splits; print mean and standard deviation over seeds."""
    print(f"{'labels':<8}" + "".join(f"{BATCH * (r + 1):>14}" for r in range(ROUNDS)))
    results = {}
    for strategy in ("random", "badge"):
        runs = np.array([learn(strategy, seed) for seed in range(seeds)])
        results[strategy] = runs.mean(0).tolist()
        cells = zip(runs.mean(0), runs.std(0), strict=True)
        print(f"{strategy:<8}" + "".join(f"{f'{mean:.3f} ± {spread:.3f}':>14}" for mean, spread in cells))
    return results


if __name__ == "__main__":
    main()
