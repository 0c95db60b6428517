"""Losses of ten steps for a handful of settings, so that a change of the engine that shifts them shows.

`golden.json` is written by this script alone::

    python tests/pretraining/golden.py

and its figures change only where a change of the numbers is meant; the commit then says why. Floating-point sums depend
on the processor's vector width and on the version of torch, so the file says on which machine it was written: there the
losses must be equal to the last bit. Elsewhere the first three must be within `RELATIVE_TOLERANCE`, and the later ones
within `LATER_TOLERANCE`: rounding can change a choice of negatives, and with it all that follows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmacc.ablation.vectors import VectorDataset, VectorWorld
from cmacc.clips import ClipBatch, ClipSpec
from cmacc.encoders import AudioVisualEncoder, EncoderConfig
from cmacc.encoders.norm import NormName
from cmacc.pretraining import (
    BatchesConfig,
    DataConfig,
    DictionaryConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    Trainer,
    untrained_encoder,
)
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.table import TableProblem

GOLDEN = Path(__file__).with_name("golden.json")
RELATIVE_TOLERANCE, LATER_TOLERANCE = 2e-3, 0.2
_STEPS = 10


def _config(
    dictionary: DictionaryConfig,
    objective: ObjectiveConfig,
    batches: BatchesConfig | None = None,
    norm: NormName = "batch",
) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(
            clip=ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=1.0)
        ),
        encoder=EncoderConfig(mel_bins=32, hidden_size=32, embedding_size=16, norm=norm),
        batches=batches or BatchesConfig(),
        dictionary=dictionary,
        objective=objective,
        optim=OptimConfig(batch_size=8, steps=_STEPS, warmup_steps=2),
        precision="fp32",
        seed=3,
    )


def _dictionary(selector: Any, refresh: Any = "none", **others: Any) -> DictionaryConfig:
    return DictionaryConfig(selector=selector, size=16, pool_size=24, refresh=refresh, **others)


def _plain(**settings: Any) -> ObjectiveConfig:
    return ObjectiveConfig(decoupled=False, **settings)


CONFIGS = {
    "in-batch, online keys": _config(_dictionary("none"), _plain(batch_keys="online")),
    "queue, both keys": _config(_dictionary("newest"), _plain(batch_keys="both")),
    "active, stale, momentum keys": _config(_dictionary("active"), _plain(batch_keys="momentum")),
    "active, re-encoded, both keys": _config(
        _dictionary("active", "selected"), _plain(batch_keys="both", temperature=0.2)
    ),
    "hardest, momentum keys, dictionary alone": _config(
        _dictionary("hardest", "dictionary", refresh_every=2), _plain(batch_keys="momentum", in_batch=False)
    ),
    "random after a warm-up, online keys": _config(
        _dictionary("random", warmup_steps=3, allow_repeats=True), _plain(batch_keys="online", momentum=0.9)
    ),
    "active by key gradients, initial centers, within modal": _config(
        _dictionary(
            "active", gradient="key", pseudo_labels="within_modal", select_every=2, initial_centers="dictionary"
        ),
        _plain(batch_keys="both"),
    ),
    "in-batch, decoupled, active batches, group norm": _config(
        _dictionary("none"),
        ObjectiveConfig(batch_keys="online", decoupled=True),
        BatchesConfig(selector="active", group_size=4),
        norm="group",
    ),
    "queue, both keys, decoupled, group norm": _config(
        _dictionary("newest"), ObjectiveConfig(batch_keys="both", decoupled=True), norm="group"
    ),
}
_ON_CLIPS = (
    "active, re-encoded, both keys",
    "active, stale, momentum keys",
    "queue, both keys, decoupled, group norm",
)


class _Clips:
    """Noise for pictures and sounds; what is learnt is no matter."""

    in_float32 = True

    def __init__(self, config: PretrainConfig) -> None:
        generator, spec = torch.Generator().manual_seed(11), config.data.clip
        shape = (48, spec.frame_count, spec.frame_height, spec.frame_width, 3)
        self._frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self._waveforms = torch.randn(48, spec.sample_count, generator=generator) * 0.1
        self.labels = self.held_out_labels = torch.full((48,), -1)

    def encoder(self, config: PretrainConfig) -> AudioVisualEncoder:
        return untrained_encoder(config)

    def views(self, config: PretrainConfig) -> ClipViews:
        return ClipViews(config, torch.device("cpu"))

    def batch(self, sample_ids: Tensor) -> ClipBatch:
        return ClipBatch(self._frames[sample_ids], self._waveforms[sample_ids], sample_ids, self.labels[sample_ids], {})

    def measured(self, learner: Any) -> Any:
        raise NotImplementedError


def machine() -> dict[str, str]:
    """What the last bits of a sum depend on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def losses() -> dict[str, list[float]]:
    """The loss of every step, by the name of the settings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return dict(_losses())
    finally:
        torch.set_num_threads(before)


def _losses() -> Iterator[tuple[str, list[float]]]:
    cpu = torch.device("cpu")
    world = VectorDataset(VectorWorld(samples=64, held_out=16, classes=8, input_size=16), 3, cpu)
    for name, config in CONFIGS.items():
        yield f"vectors: {name}", _run(world, config)
    for name in _ON_CLIPS:
        yield f"clips: {name}", _run(_Clips(CONFIGS[name]), CONFIGS[name])


def _run(dataset: Any, config: PretrainConfig) -> list[float]:
    cpu = torch.device("cpu")
    trainer = Trainer(TableProblem(dataset, config, cpu), config, cpu)
    # 0 where nothing was contrasted yet, and the metrics hold no loss.
    return [done.metrics.get("loss", 0.0) for done in trainer.steps()]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"machine": machine(), "losses": losses()}, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
