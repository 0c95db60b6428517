# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Choose negatives in your own training loop
#
# You have a contrastive training loop in PyTorch, and want to choose what a sample is compared
# with. There are two ways, and neither needs a trainer or a config:
#
# - **Active batches**: which samples share a batch. They are each other's negatives.
# - **An active dictionary**: which old keys are negatives besides those of the batch, as in the
#   paper.
#
# Both are tried here on a problem that trains in seconds. At the end stands a comparison with
# random choice. Terse versions to copy from are
# [05_active_batches.py](../../examples/05_active_batches.py) and
# [01_active_dictionary.py](../../examples/01_active_dictionary.py).

# %%
import copy
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cmacc.ablation.vectors import VectorWorld, draw_vectors
from cmacc.negatives import ActiveDictionary, Keys, active_batches, kmeans_plusplus
from cmacc.objectives import CrossModalContrast

SEEDS = 3
EPOCHS = 6
BATCH_SIZE, DIM, TEMPERATURE = 64, 64, 0.1

# %% [markdown]
# ## The data
#
# Pairs of vectors from 200 classes, a few common and many rare. The two vectors of a pair share a
# hidden cause and nothing else. This is the controlled problem of [the evidence](../evidence.md).

# %%
WORLD = VectorWorld(samples=2048, held_out=500)
training, held_out = draw_vectors(WORLD, seed=0)
_, counts = training.labels.unique(return_counts=True)
print(f"{len(training.video)} training pairs of {training.video.shape[1]} and {training.audio.shape[1]} numbers")
print(f"samples of a class: {counts.max()} in the largest, {counts.median()} in the median one")

# %% [markdown]
# ## The seeding: `kmeans_plusplus`
#
# This is the engine of both the paper's selection and active learning. It picks rows that are far
# from each other: each further row with a probability proportional to its squared distance to the
# nearest row picked before. Choose 64 of the 2,048 samples, twenty times, and count the classes:

# %%
generator = torch.Generator().manual_seed(0)
choices = {
    "k-means++": lambda: kmeans_plusplus(training.video, 64, generator=generator),
    "random": lambda: torch.randperm(len(training.video), generator=generator)[:64],
}
for name, choose in choices.items():
    classes = [len(training.labels[choose()].unique()) for _ in range(20)]
    print(f"{name:<10} 64 samples of {np.mean(classes):.1f} classes on average")

# %% [markdown]
# The raw vectors hold much noise, in which all samples are far from each other, so the difference is
# small. What helps is to choose by something that matters for the task: by gradients, for example,
# which samples to label ([02_badge.py](../../examples/02_badge.py)).
#
# ## A plain loop
#
# Two small encoders learn to match the pairs. Nothing is chosen yet. The loss is
# `CrossModalContrast`; your own will do as well.


# %%
def new_encoder() -> nn.Module:
    """A small multilayer perceptron."""
    return nn.Sequential(
        nn.Linear(WORLD.input_size, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.BatchNorm1d(128), nn.Linear(128, DIM, bias=False),
    )  # fmt: skip


def embed(encoders: nn.ModuleList, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The embeddings of both sides, of unit length."""
    video, audio = (normalize(encoder(side), dim=1) for encoder, side in zip(encoders, pair, strict=True))
    return video, audio


def noisy(pair: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """A batch, with new noise at every visit: the augmentation."""
    first, second = (side[rows] + WORLD.noise * torch.randn(len(rows), WORLD.input_size) for side in pair)
    return first, second


@torch.no_grad()
def recall_at_1(encoders: nn.ModuleList, pair: tuple[Tensor, Tensor]) -> float:
    """Share of held-out samples whose nearest partner is their own; chance is 0.002."""
    video, audio = embed(encoders.eval(), pair)
    return float(((video @ audio.T).argmax(1) == torch.arange(len(video))).float().mean())


# %% [markdown]
# ## Active batches
#
# Two additions to the loop: remember the embeddings of every sample at its last visit (1), and ask
# for the batches of the next epoch (2). As long as nothing is known, `active_batches` gives random
# batches, so the first epoch is the same for both.


# %%
def train_with_batches(active: bool, seed: int) -> float:
    """Train with random or active batches; return R@1 on held-out pairs."""
    torch.manual_seed(seed)
    training, held_out = draw_vectors(WORLD, seed)
    pair = training.video, training.audio
    encoders = nn.ModuleList([new_encoder(), new_encoder()])
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=4e-3)
    contrast = CrossModalContrast(TEMPERATURE, decoupled=True)
    memory = torch.zeros(2, WORLD.samples, DIM)
    known = torch.zeros(WORLD.samples, dtype=torch.bool)
    for epoch in range(EPOCHS):
        rng = np.random.default_rng([seed, epoch])
        for rows in active_batches(memory[0], memory[1], BATCH_SIZE, rng, known=known & active):  # (2)
            video, audio = embed(encoders, noisy(pair, rows))
            loss = contrast(video, audio, rows, rows).loss + contrast(audio, video, rows, rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory[:, rows] = torch.stack([video, audio]).detach()  # (1)
            known[rows] = True
    return recall_at_1(encoders, (held_out.video, held_out.audio))


# %% [markdown]
# In a loop with a `DataLoader`, pass the rows of `active_batches` as its `batch_sampler`, epoch by
# epoch. The neighbour search is exact and quadratic: about a second for 8,192 samples.
#
# ## An active dictionary
#
# Four additions. A momentum copy of each encoder makes the keys, as in MoCo. (1) Each side has a
# dictionary for its keys. (2) The queries of one side select among the pooled keys of the other.
# (3) The selected keys are negatives besides those of the batch. (4) The batch's keys enter the
# pool, for later steps.
#
# `selector="newest"` is MoCo's queue, with everything else equal. `gradient="key"` needs nothing
# but the keys; the paper's `last_layer` also needs the input of the encoder's last layer.


# %%
def train_with_dictionary(selector: str, seed: int) -> float:
    """Train with a dictionary; return R@1 on held-out pairs."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = draw_vectors(WORLD, seed)
    pair = training.video, training.audio
    encoders = nn.ModuleList([new_encoder(), new_encoder()])
    twins = copy.deepcopy(encoders).requires_grad_(False)
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=4e-3)
    contrast = CrossModalContrast(TEMPERATURE, decoupled=True)
    dictionaries = [  # (1)
        ActiveDictionary(
            DIM, dictionary_size=128, pool_size=512, gradient="key", temperature=TEMPERATURE, selector=selector
        )
        for _ in pair
    ]
    for step in range(EPOCHS * WORLD.samples // BATCH_SIZE):
        rows = torch.randint(WORLD.samples, (BATCH_SIZE,), generator=generator).unique()
        views = noisy(pair, rows)
        queries, keys = embed(encoders, views), embed(twins, views)
        loss = torch.zeros(())
        for own, other in ((0, 1), (1, 0)):
            dictionaries[other].select(queries[own], 16, generator, query_ids=rows)  # (2)
            held = dictionaries[other].negatives()
            direction = contrast(  # (3)
                queries[own], keys[other], rows, rows, negatives=held.embedding, negative_ids=held.sample_ids
            )
            loss = loss + direction.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(twins.parameters(), encoders.parameters(), strict=True):
                old.lerp_(new, 0.05)
        for dictionary, pushed in zip(dictionaries, keys, strict=True):
            dictionary.push(Keys.from_embedding(pushed, rows, step))  # (4)
    return recall_at_1(encoders, (held_out.video, held_out.audio))


# %% [markdown]
# ## Does choosing help?
#
# Every variant gets the same number of steps and the same seeds. Each seed has data of its own.

# %%
variants = {
    "random batches": lambda seed: train_with_batches(False, seed),
    "active batches": lambda seed: train_with_batches(True, seed),
    "queue (newest keys)": lambda seed: train_with_dictionary("newest", seed),
    "active dictionary": lambda seed: train_with_dictionary("active", seed),
}
results, seconds = {}, {}
for name, train in variants.items():
    started = time.process_time()
    results[name] = [train(seed) for seed in range(SEEDS)]
    seconds[name] = (time.process_time() - started) / SEEDS
print(f"{'R@1 of 500 held-out pairs':<27}{'mean':>7}{'least':>7}{'most':>7}{'CPU s':>7}")
for name, found in results.items():
    print(f"{name:<27}{np.mean(found):>7.3f}{min(found):>7.3f}{max(found):>7.3f}{seconds[name]:>7.1f}")

# %% [markdown]
# Read it with care:
#
# - Compare within the pairs: random with active batches, queue with active dictionary. The two
#   halves differ in more than the choice: with a dictionary, the positives and the keys of the batch
#   come from the momentum encoder too.
# - These are equal steps. At equal time, a dictionary would get fewer of them.
# - A few seeds of one problem decide nothing. [The evidence](../evidence.md) has twelve settings with
#   intervals. In short: active batches help on many problems in memory, most with large batches, and
#   do harm with few classes that lie close together. Which old keys a dictionary holds hardly
#   matters. On rendered clips, neither had a measurable effect.
#
# To compare choices on your own data, seed by seed, there is `cmacc ablate`.
