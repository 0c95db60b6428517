"""What every process of `test_ranks` runs: ``python ranks.py RANK PROCESSES STORE OUT``.

The same runs in float64, by one process or by several on the same global batches, and what came out of them as JSON.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmacc.clips import ClipSpec
from cmacc.encoders import EncoderConfig
from cmacc.objectives import (
    BidirectionalContrast,
    CrossCLRConfig,
    FaceConfig,
    MaskedAudioConfig,
    ObjectiveInputs,
    ObjectiveResult,
    Terms,
)
from cmacc.pretraining import (
    BatchesConfig,
    DataConfig,
    DictionaryConfig,
    DivergenceError,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    RunError,
    Trainer,
)
from cmacc.pretraining.agreement import check_ranks
from cmacc.pretraining.random_clips import RandomClips
from cmacc.pretraining.table import TableProblem

CPU = torch.device("cpu")
# Four batches an epoch, so that the fifth step is of the second epoch, which has active batches.
SAMPLES, STEPS = 36, 5


def _dictionary(**settings: Any) -> DictionaryConfig:
    return DictionaryConfig(**{"selector": "active", "size": 24, "pool_size": 32} | settings)


_CLIP = ClipSpec(frame_count=4, frame_rate_hz=4.0, frame_height=16, frame_width=16, audio_seconds=1.0)
PLAIN = PretrainConfig(
    data=DataConfig(clip=_CLIP),
    encoder=EncoderConfig(embedding_size=16, hidden_size=24, mel_bins=16),
    # Adam divides a gradient by its own size: at a high rate, a rounding error of a weight that hardly matters grows.
    optim=OptimConfig(batch_size=8, steps=100, learning_rate=1e-4, warmup_steps=0),
)


def _with(**settings: Any) -> PretrainConfig:
    return dataclasses.replace(PLAIN, **settings)


CONFIGS = {
    "no dictionary": PLAIN,
    "active": _with(dictionary=_dictionary()),
    "active, dictionary refreshed": _with(dictionary=_dictionary(refresh="dictionary", refresh_every=2)),
    "random": _with(dictionary=_dictionary(selector="random", refresh="none")),
    "the paper's loss": _with(
        dictionary=_dictionary(refresh="none"),
        objective=ObjectiveConfig(in_batch=False, batch_keys="momentum", decoupled=False),
    ),
    "in chunks": _with(dictionary=_dictionary(), optim=dataclasses.replace(PLAIN.optim, chunk_size=1)),
    "sync": _with(dictionary=_dictionary(), encoder=dataclasses.replace(PLAIN.encoder, norm="sync")),
    "active batches": _with(batches=BatchesConfig(selector="active", group_size=4)),
    "all terms": _with(
        dictionary=_dictionary(refresh="none"),
        objective=ObjectiveConfig(
            terms=Terms(**dict.fromkeys(Terms.names(), 0.5)),
            crossclr=CrossCLRConfig(queue_size=16),
            face=FaceConfig(size=8, frames_per_clip=2, width=4),
            masked_audio=MaskedAudioConfig(block_bands=4, block_frames=8),
        ),
    ),
    "face alone": _with(
        objective=ObjectiveConfig(
            terms=Terms(cross_modal=0.0, face=1.0), face=FaceConfig(size=8, frames_per_clip=2, width=4)
        )
    ),
    "pictures alone": _with(objective=ObjectiveConfig(terms=Terms(cross_modal=0.0, ctp=1.0))),
}
OF_FOUR = ("active, dictionary refreshed", "active batches")
# Results of these depend on the number of processes; they must still be the same on all.
OF_PARTS = {"batch": _with(dictionary=_dictionary(), encoder=dataclasses.replace(PLAIN.encoder, norm="batch"))}


class Scaled(nn.Module):
    """An objective with a weight of its own: the logarithm of a scale, as in CLIP."""

    needs_keys = False
    needs_feature_maps = False

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        scores = inputs.queries["video"].embedding @ inputs.queries["audio"].embedding.T * self.log_scale.exp()
        # Not only the embedding: every output has its way back to the weights of the process that made it.
        spread = inputs.queries["video"].feature.square().mean() + inputs.queries["audio"].penultimate.square().mean()
        loss = nn.functional.cross_entropy(scores, torch.arange(len(scores))) + 0.1 * spread
        return ObjectiveResult(loss, {"loss": loss.detach()})


def trainer_of(config: PretrainConfig, **options: Any) -> Trainer:
    table = RandomClips(SAMPLES, config, CPU, torch.float64)
    return Trainer(TableProblem(table, config, CPU), config, **options)


def outcome(trainer: Trainer, steps: int = STEPS) -> dict[str, Any]:
    """Everything that must not depend on the number of processes."""
    metrics = [done.metrics for done in trainer.steps(steps)]
    learner = trainer.learner
    check_ranks(learner, steps)
    sums = {name: _sum(module) for name, module in (("encoder", learner.encoder), ("keys", learner.key_encoder))}
    return {
        "losses": [row.get("loss", 0.0) for row in metrics],
        "gradient norms": [row["gradient_norm"] for row in metrics],
        "refreshed": [row.get("refreshed_keys", 0.0) for row in metrics],
        **{f"weights, {name}": value for name, value in sums.items()},
        "pools": _pools(trainer),
        "picks": {m: d.negatives().sample_ids.tolist() for m, d in learner.dictionaries.items()},
        "plan": learner.memory.order.tolist() if learner.memory is not None else [],
    }


def _pools(trainer: Trainer) -> dict[str, list[float]]:
    """What a checkpoint would hold of the pools, and this process would get back."""
    learner = trainer.learner
    whole = learner.whole_pools()
    pools: dict[str, list[float]] = {}
    for modality, dictionary in learner.dictionaries.items():
        for name, own in dictionary.pool.state_dict().items():
            full = f"{modality}_dictionary.pool.{name}"
            assert torch.equal(learner.own_part(full, whole.get(full, own)), own)
            pools[full] = whole.get(full, own).double().flatten().tolist()
    return pools


def _sum(module: nn.Module) -> list[float]:
    return [float(value.double().abs().sum()) for value in module.state_dict().values()]


def a_clip_that_is_not_finite() -> dict[str, Any]:
    """One clip of one process is NaN: all skip the step, and go on as before."""
    trainer = trainer_of(CONFIGS["active"])
    plain = trainer.learner.views.of

    def spoilt(batch: Any, visit: int) -> dict[Any, Tensor]:
        views = plain(batch, visit)
        if trainer.next_step == 2:
            views["video"][batch.sample_ids == trainer.problem_ids[-1]] = torch.nan  # type: ignore[attr-defined]
        return views

    trainer.learner.views.of = spoilt  # type: ignore[method-assign]
    order = TableProblem(RandomClips(SAMPLES, CONFIGS["active"], CPU), CONFIGS["active"], CPU)
    trainer.problem_ids = order._order(2)[16:24].tolist()  # type: ignore[attr-defined]
    before = None
    skipped = []
    for done in trainer.steps(STEPS):
        skipped.append(done.metrics.get("skipped", 0.0))
        if done.step == 1:
            before = _sum(trainer.learner.encoder)
        if done.step == 2:
            assert before == _sum(trainer.learner.encoder)
    return {"skipped": skipped, "weights": _sum(trainer.learner.key_encoder), "last": done.metrics["loss"]}


def a_loss_that_is_not_finite_on_one() -> list[float]:
    """A fault of one process, such as of its memory: all skip the step."""

    class OnceSpoilt(BidirectionalContrast):
        steps = 0

        def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
            self.steps += 1
            is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
            result = super().forward(inputs)
            spoilt = torch.nan if is_last and self.steps == 3 else 1.0
            return ObjectiveResult(result.loss * spoilt, result.metrics)

    trainer = trainer_of(PLAIN, objective=OnceSpoilt(in_batch=True, batch_keys="online"))
    skipped = [done.metrics.get("skipped", 0.0) for done in trainer.steps(STEPS)]
    check_ranks(trainer.learner, STEPS)
    return skipped


def a_weight_that_differs() -> str:
    """Of several processes, that of the last one is another."""
    trainer = trainer_of(CONFIGS["active"])
    check_ranks(trainer.learner, 0)
    with torch.no_grad():
        next(trainer.learner.key_encoder.parameters()).add_(float(dist.get_rank() == dist.get_world_size() - 1))
    try:
        check_ranks(trainer.learner, 0)
    except RunError as error:
        return str(error)
    return "all the same"


def too_many_that_are_not_finite() -> str:
    trainer = trainer_of(dataclasses.replace(PLAIN, max_skipped_steps=1))
    with torch.no_grad():
        next(trainer.learner.encoder.parameters()).fill_(torch.inf)
    try:
        list(trainer.steps(STEPS))
    except DivergenceError as error:
        return str(error).partition("the last one")[0]
    return "it went on"


def outcomes(processes: int = 1) -> dict[str, Any]:
    # Four processes on two cores are slow.
    names = [name for name in CONFIGS if processes < 4 or name in OF_FOUR]
    found: dict[str, Any] = {name: outcome(trainer_of(CONFIGS[name])) for name in names}
    if processes == 4:
        return found
    own = trainer_of(PLAIN, objective=Scaled())
    found["an objective with weights"] = outcome(own)
    assert isinstance(own.learner.objective, nn.Module)
    found["an objective with weights"]["weights, objective"] = _sum(own.learner.objective)
    found["not finite"] = a_clip_that_is_not_finite()
    found["not finite on one"] = a_loss_that_is_not_finite_on_one()
    found["never finite"] = too_many_that_are_not_finite()
    return found


def refusals() -> dict[str, str]:
    """What is refused with several processes."""
    said: dict[str, str] = {}
    cases: dict[str, Callable[[], Any]] = {
        "batch": lambda: trainer_of(_with(optim=OptimConfig(batch_size=9))),
        "pool": lambda: trainer_of(_with(dictionary=_dictionary(pool_size=33))),
        "maps": lambda: trainer_of(CONFIGS["in chunks"], objective=_needs_maps()),
    }
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            said[name] = str(error)
    return said


def _needs_maps() -> BidirectionalContrast:
    objective = BidirectionalContrast()
    objective.needs_feature_maps = True
    return objective


def main(rank: int, processes: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    found = outcomes(processes) | {"refusals": refusals(), "a weight that differs": a_weight_that_differs()}
    found |= {f"of parts, {name}": outcome(trainer_of(config)) for name, config in OF_PARTS.items()}
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
