"""Checkpoints of each format that cmacc has written, in `checkpoints/`, with the losses that followed.

Runs of many weeks are resumed by later versions, which must read them. Whoever changes the format stores one of the new
format, once, and never writes over those of former ones::

    python tests/pretraining/stored_checkpoints.py

Format 3 is from commit 4ae8737, by this script. Format 2 is from commit 126aafc, the last one that wrote it, by the
same rows and settings with the learner of that time. Everything that the state depends on is spelt out here, because
defaults and the worlds of `cmacc.ablation` may change.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from cmacc.encoders import Encoder, EncoderConfig, EncoderPair, Modality
from cmacc.pretraining import DictionaryConfig, ObjectiveConfig, OptimConfig, PretrainConfig, Trainer
from cmacc.pretraining.checkpoint import save_checkpoint
from cmacc.pretraining.table import TableProblem

STORED = Path(__file__).with_name("checkpoints")
SAVED_AT, STEPS = 6, 14
_SAMPLES, _INPUTS, _HIDDEN = 64, 8, 16
CONFIG = PretrainConfig(
    encoder=EncoderConfig(head="linear", embedding_size=16),
    dictionary=DictionaryConfig(selector="active", size=16, pool_size=24, refresh="none"),
    objective=ObjectiveConfig(temperature=0.1, in_batch=True, batch_keys="both", momentum=0.99, decoupled=False),
    optim=OptimConfig(batch_size=8, steps=40, learning_rate=1e-3, warmup_steps=2, weight_decay=0.01),
    precision="fp32",
    seed=5,
)


class _Batch:
    def __init__(self, sample_ids: Tensor) -> None:
        self.sample_ids, self.labels = sample_ids, torch.full_like(sample_ids, -1)

    def to(self, device: torch.device) -> "_Batch":
        return _Batch(self.sample_ids.to(device))


class Rows:
    """Pairs of vectors, and views of them without noise."""

    def __init__(self) -> None:
        rng = np.random.Generator(np.random.Philox(17))
        video = rng.normal(size=(_SAMPLES, _INPUTS))
        audio = np.tanh(video @ rng.normal(size=(_INPUTS, _INPUTS))) + 0.3 * rng.normal(size=video.shape)
        self._rows: dict[Modality, Tensor] = {
            "video": torch.from_numpy(video.astype(np.float32)),
            "audio": torch.from_numpy(audio.astype(np.float32)),
        }
        self.labels = torch.full((_SAMPLES,), -1)

    def encoder(self, config: PretrainConfig) -> EncoderPair:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            return EncoderPair(*(_encoder(config.encoder) for _ in range(2)))

    def views(self, config: PretrainConfig) -> "Rows":
        return self

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> _Batch:
        return _Batch(sample_ids)

    def of(self, batch: Any, visit: int) -> dict[Modality, Tensor]:
        return {name: rows[batch.sample_ids] for name, rows in self._rows.items()}

    def kept(self, batch: Any, visit: int) -> dict[str, Tensor]:
        return {"sample_ids": batch.sample_ids}

    def again(self, modality: Modality, kept: Callable[[str], Tensor]) -> Tensor:
        return self._rows[modality][kept("sample_ids")]


def _encoder(config: EncoderConfig) -> Encoder:
    backbone = nn.Sequential(nn.Linear(_INPUTS, _HIDDEN, bias=False), nn.BatchNorm1d(_HIDDEN), nn.ReLU())
    return Encoder(backbone, _HIDDEN, config.head, config.hidden_size, config.embedding_size)


def trainer(config: PretrainConfig = CONFIG) -> Trainer:
    """A new one; everything in it depends on the settings alone."""
    device = torch.device("cpu")
    return Trainer(TableProblem(Rows(), config, device), config, device)


def losses(learning: Trainer, last_step: int = STEPS) -> list[float]:
    """The losses up to a step."""
    return [done.metrics["loss"] for done in learning.steps(last_step)]


def _store() -> None:
    torch.set_num_threads(1)
    learning = trainer()
    losses(learning, SAVED_AT)
    aside = save_checkpoint(learning.learner, STORED / "new", SAVED_AT, 0)
    folder = STORED / f"format-{json.loads((aside / 'state.json').read_text())['format']}"
    aside.rename(folder)  # fails if there is one of this format
    aside.parent.rmdir()
    aside.parent.parent.rmdir()
    (folder / "continuation.json").write_text(json.dumps(losses(learning), indent=1) + "\n")
    print(f"wrote {folder}")


if __name__ == "__main__":
    _store()
