"""Train a head: one loop for all of them.

1. The order of an epoch's items depends on the seed and the epoch alone.
2. A step: the head's loss on a batch, the gradient's norm bounded, Adam.
3. After each epoch, the head is scored on the validation items. The weights of the best epoch are kept; in a tie, those
   of the earlier one. Test items play no part: many published figures of these tasks are of the best *test* epoch, and
   are higher for it.
4. With a folder, all state is written there after each epoch, so that a run that was stopped goes on exactly.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmacc.clips.progress import Progress, silent
from cmacc.clips.seeds import seeded_rng
from cmacc.clips.storage import written_aside
from cmacc.heads.head import Head, HeadError, Items, Rows
from cmacc.pretraining.randomness import seeded_generators

Score = Callable[[dict[str, Tensor], Rows], float]
"""Takes the predictions for the validation items and their rows; higher is better."""

# Purposes of randomness beside those of `cmacc.clips.seeds` and of fine-tuning.
_WEIGHTS, _ORDER, _DROPOUT = 110, 111, 112


@dataclass(frozen=True)
class FitConfig:
    """How to train a head.

    Parameters
    ----------
    epochs
        Number of visits to every training item.
    batch_size
        Items per step; the last batch of an epoch may be smaller.
    learning_rate, weight_decay
        Of Adam.
    milestones, decay
        Epochs, from 1, after which the learning rate is multiplied by ``decay``.
    max_gradient_norm
        Bound of the gradient's norm; None: none.
    patience
        Epochs without a better validation score after which training ends; None: it does not.
    seed
        Seed of weights, order and dropout.

    Raises
    ------
    HeadError
        A value is out of its range.
    """

    epochs: int = 50
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    decay: float = 0.5
    max_gradient_norm: float | None = None
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("weight_decay", 0)):
            _require(least <= getattr(self, name) < math.inf, name, f"at least {least}", getattr(self, name))
        for name in ("learning_rate", "decay", "max_gradient_norm", "patience"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, "positive and finite", value)
        _require(all(epoch >= 1 for epoch in self.milestones), "milestones", "at least 1", self.milestones)


@dataclass(frozen=True)
class Fitted:
    """How the training went. The head has the weights of the best epoch.

    Attributes
    ----------
    best_epoch
        The epoch whose weights the head has, from 1.
    progress
        That epoch's share of all epochs before it, for `Head.predict`.
    scores
        Validation score after each epoch; empty without validation items.
    losses
        Mean training loss of each epoch.
    """

    best_epoch: int
    progress: float
    scores: tuple[float, ...]
    losses: tuple[float, ...]


def seeded_head(build: Callable[[], Head], seed: int) -> Head:
    """A head whose first weights depend on the seed alone."""
    with seeded_generators(torch.device("cpu"), _WEIGHTS, seed):
        return build()


def fit(
    head: Head,
    items: Items,
    train: Sequence[int],
    validation: Sequence[int],
    score: Score,
    config: FitConfig | None = None,
    *,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Fitted:
    """Train a head in place.

    The result depends only on the arguments (on a GPU, up to the order of summation), not on how often training was
    interrupted. The global generators of torch are not changed.

    Parameters
    ----------
    head
        The head, on its device.
    items
        Where the rows come from.
    train, validation
        Numbers of the items to train on, and of those to choose the epoch by. Without the latter, the last epoch is
        kept.
    score
        Score of the validation items.
    config
        Settings.
    folder
        Where the state is kept. If it holds one of the same settings, training goes on from there.
    progress
        Called with ("epoch", epochs done, all epochs).

    Raises
    ------
    HeadError
        There are no training items, an item is trained on and validated, the loss is not finite, or ``folder`` holds
        the state of another run.
    """
    config = config or FitConfig()
    _require(len(train) > 0, "training items", "at least 1", 0)
    _require(not set(train) & set(validation), "validation items", "none that are trained on", "some")
    device = next(head.parameters()).device
    optimizer = torch.optim.Adam(head.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    run = _Run(head, optimizer, {n: t.clone() for n, t in head.state_dict().items()}, [], [])
    if folder is not None and (folder / "state.safetensors").exists():
        _load(run, folder, _facts(head, config, train, validation))
    per_epoch = math.ceil(len(train) / config.batch_size)
    while run.epochs < config.epochs and not _ended(run.scores, config.patience):
        epoch = run.epochs
        head.train()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * config.decay ** sum(epoch >= m for m in config.milestones)
        order = seeded_rng(_ORDER, config.seed, epoch).permutation(len(train))
        total = 0.0
        for number in range(per_epoch):
            part = order[number * config.batch_size : (number + 1) * config.batch_size]
            rows = _on(device, items.rows([train[place] for place in part]))
            with seeded_generators(device, _DROPOUT, config.seed, epoch * per_epoch + number):
                loss = head.loss(rows, epoch / config.epochs)
            _require(math.isfinite(loss.item()), f"the loss in epoch {epoch + 1}", "finite", loss.item())
            optimizer.zero_grad()
            loss.backward()
            if config.max_gradient_norm is not None:
                torch.nn.utils.clip_grad_norm_(head.parameters(), config.max_gradient_norm)
            optimizer.step()
            total += loss.item() * len(part)
        run.losses.append(total / len(train))
        if validation:
            share = epoch / config.epochs
            found = score(predictions(head, items, validation, share, config.batch_size), items.rows(validation))
            run.scores.append(found)
        if not validation or _best(run.scores) == epoch:
            run.best = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        if folder is not None:
            _save(run, folder, _facts(head, config, train, validation))
        progress("epoch", epoch + 1, config.epochs)
    best = _best(run.scores) if validation else run.epochs - 1
    head.load_state_dict(run.best)
    head.eval()
    return Fitted(best + 1, best / config.epochs, tuple(run.scores), tuple(run.losses))


@torch.no_grad()
def predictions(
    head: Head, items: Items, ids: Sequence[int], progress: float, batch_size: int = 64
) -> dict[str, Tensor]:
    """A head's predictions for some items, on the CPU, one row per item; the head is left in evaluation mode."""
    _require(len(ids) > 0, "items to predict", "at least 1", 0)
    head.eval()
    device = next(head.parameters()).device
    found = [
        head.predict(_on(device, items.rows(ids[start : start + batch_size])), progress)
        for start in range(0, len(ids), batch_size)
    ]
    return {name: torch.cat([part[name].cpu() for part in found]) for name in found[0]}


@dataclass
class _Run:
    """State of a training."""

    head: Head
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    scores: list[float]
    losses: list[float]

    @property
    def epochs(self) -> int:
        return len(self.losses)


def _best(scores: Sequence[float]) -> int:
    """Place of the best score, the first among equals; one that is not a number is never the best."""
    return max(range(len(scores)), key=lambda place: -math.inf if math.isnan(scores[place]) else scores[place])


def _ended(scores: Sequence[float], patience: int | None) -> bool:
    return patience is not None and len(scores) > 0 and len(scores) - 1 - _best(scores) >= patience


def _on(device: torch.device, rows: Rows) -> Rows:
    return {name: tensor.to(device) for name, tensor in rows.items()}


def _facts(head: Head, config: FitConfig, train: Sequence[int], validation: Sequence[int]) -> dict[str, Any]:
    """What must be the same for a training to go on."""
    return {
        "head": type(head).__name__,
        "weights": {name: list(tensor.shape) for name, tensor in head.state_dict().items()},
        **dataclasses.asdict(config),
        "milestones": list(config.milestones),
        "train": list(map(int, train)),
        "validation": list(map(int, validation)),
    }


def _save(run: _Run, folder: Path, facts: dict[str, Any]) -> None:
    tensors = {f"head.{name}": tensor for name, tensor in run.head.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in run.best.items()}
    for number, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    # In one file, so that weights and scores are always of the same epoch.
    told = {"facts": json.dumps(facts), "scores": json.dumps(run.scores), "losses": json.dumps(run.losses)}
    with written_aside(folder / "state.safetensors") as aside:
        # Copies: tensors that share memory are refused.
        save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, aside, told)


def _load(run: _Run, folder: Path, facts: dict[str, Any]) -> None:
    path = folder / "state.safetensors"
    try:
        with safe_open(path, "pt") as file:
            told = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found, scores, losses = told["facts"], told["scores"], told["losses"]
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise HeadError(f"{path}: must hold the state of a training, got {type(error).__name__}: {error}") from error
    others = [name for name in facts if found.get(name) != facts[name]]
    if others:
        raise HeadError(f"{path}: must be of the same training, got another {', '.join(others)}; choose another folder")
    of: dict[str, dict[str, Tensor]] = {"head": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        room, _, rest = name.partition(".")
        of[room][rest] = tensor
    run.head.load_state_dict(of["head"])
    run.best, run.scores, run.losses = of["best"], scores, losses
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in of["optimizer"].items():
        number, _, rest = name.partition(".")
        state.setdefault(int(number), {})[rest] = tensor
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})


def _require(holds: bool, what: str, wanted: str, got: object) -> None:
    if not holds:
        raise HeadError(f"{what}: must be {wanted}, got {got}")
