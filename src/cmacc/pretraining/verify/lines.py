"""The lines of the certificate that train in one process (see `verify`)."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from cmacc.clips import ClipBatch
from cmacc.encoders import MODALITIES, CompilerError, compile_backbones, require_compiler
from cmacc.encoders.norm import InputNorm
from cmacc.pretraining.checkpoint import save_checkpoint
from cmacc.pretraining.config import PrecisionName, PretrainConfig
from cmacc.pretraining.learner import untrained_encoder
from cmacc.pretraining.random_clips import RandomClips
from cmacc.pretraining.run import resume
from cmacc.pretraining.table import TableProblem
from cmacc.pretraining.trainer import Trainer

# Of sums in float64 in another order: rounding, and what Adam makes of it (see `verify.cut`).
ROUNDING = 1e-9
STEPS = 6  # epochs have four: the last two are of active batches
_STOP, _STEPS_TO_RESUME = 5, 8  # within the same epoch
_CHUNK_SIZE = 3
_FP16_SCALE = 2.0**4
# Found: 2e-6, and 1e-3 where rounding brought the input of one ReLU to the other side of zero.
_COMPILED_TOLERANCE = 1e-2
# Ten times and twice the largest of 24 measured: tiny and r3d_18, with group and batch norm, several seeds. A wrong
# gradient is at more than 0.5.
_BF16_SCORE = 0.1  # of a score before it is divided by the temperature
_BF16_TURN = 0.25
_LEAST_SHARE = 1e-3  # the gradient of a tensor, of the largest one, below which it is rounding alone

Trace = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """A line of the certificate.

    Attributes
    ----------
    name
        What must hold.
    compares
        What was compared.
    difference, tolerance
        The largest difference found, and allowed; None if nothing was measured.
    passed
        Whether it holds; None if the line was skipped.
    note
        Why it was skipped or failed.
    seconds
        Time that it took. Lines that were measured together have equal shares of it.
    """

    name: str
    compares: str
    difference: float | None
    tolerance: float | None
    passed: bool | None
    note: str = ""
    seconds: float = 0.0

    @classmethod
    def skipped(cls, name: str, reason: str) -> "Line":
        """A line that cannot be measured here."""
        return cls(name, "", None, None, None, reason)

    @property
    def result(self) -> str:
        """``ok``, ``FAILED``, or ``skipped: `` and the reason."""
        if self.passed is None:
            return f"skipped: {self.note}"
        if self.passed:
            return "ok"
        return f"FAILED: {self.note}" if self.note else "FAILED"


@dataclass(frozen=True)
class Subject:
    """What is verified: settings (those of `verify.cut`), the device, and the largest number of processes."""

    config: PretrainConfig
    device: torch.device
    processes: int

    @cached_property
    def scenarios(self) -> dict[str, PretrainConfig]:
        """Settings of the runs that are compared."""
        alone = replace(self.config.dictionary, selector="none", initial_centers="none", warmup_steps=0)
        plain = replace(self.config, dictionary=alone, objective=replace(self.config.objective, in_batch=True))
        return {
            "no dictionary": plain,
            "dictionary": self.config,
            "active batches": replace(plain, batches=replace(self.config.batches, selector="active")),
        }

    def depends_on_parts(self, whole: type[nn.Module]) -> str | None:
        """Why results depend on how a batch is cut into parts; None if they do not.

        ``whole`` is the batch norm that sees the whole batch all the same.
        """
        encoder = untrained_encoder(self.config).train()
        for backbone in (encoder.video.backbone, encoder.audio.backbone):
            for module in backbone.modules():
                if not module.training:  # a frozen part
                    continue
                if isinstance(module, _BatchNorm) and not isinstance(module, whole):
                    return f"batch norm in the backbones (encoder.norm {self.config.encoder.norm}) is over a part"
                if isinstance(module, _DropoutNd) and module.p > 0:
                    return "dropout in the backbones is drawn for a part"
        return None


class ClipsThatDiffer(RandomClips):
    """Noise of another colour and another pitch in each clip.

    Clips of plain noise have almost equal features. The norm in the head would scale rounding up to the size of their
    differences.
    """

    def batch(self, sample_ids: Int[Tensor, " batch"]) -> ClipBatch:
        """The clips of these samples."""
        noise = super().batch(sample_ids)
        colours, pitches = [], []
        for sample_id in sample_ids.tolist():
            generator = torch.Generator().manual_seed(sample_id)
            colours.append(torch.rand(3, generator=generator))
            pitches.append(100 * 20 ** torch.rand((), generator=generator))
        frames = (noise.frames * torch.stack(colours)[:, None, None, None]).byte()
        angles = torch.stack(pitches)[:, None] * torch.arange(noise.waveforms.shape[1]) * (math.tau / 16000)
        return replace(noise, frames=frames, waveforms=0.1 * noise.waveforms + 0.3 * angles.sin())


def trainer_of(config: PretrainConfig, device: torch.device, dtype: torch.dtype = torch.float64) -> Trainer:
    """A trainer on noise, a few more clips than the dictionary needs."""
    size = config.optim.batch_size
    clips = ClipsThatDiffer(4 * size + size // 2, config, device, dtype)
    if dtype == torch.float64:
        config = replace(config, precision="fp32")  # autocast would round to bf16
    return Trainer(TableProblem(clips, config, device), config, device)


def trace(trainer: Trainer, last_step: int = STEPS) -> Trace:
    """Train up to ``last_step``, and return what must not depend on how it was computed.

    Floating-point tensors are the losses, gradient norms, and weights of both encoders; the others are samples: the
    batches, what is in the dictionaries after each step, and the order of active batches.

    Raises
    ------
    RuntimeError
        There was nothing to compare: no loss, no choice, or no active batch.
    """
    learner, numbers = trainer.learner, []
    samples: dict[str, list[Tensor]] = {"batches": [], **{f"{m} dictionary": [] for m in learner.dictionaries}}
    for done in trainer.steps(last_step):
        if "loss" in done.metrics:  # there may be nothing to contrast with at first
            numbers.append((done.metrics["loss"], done.metrics["gradient_norm"]))
        samples["batches"].append(learner.processes.gather(done.batch.sample_ids))
        for modality, dictionary in learner.dictionaries.items():
            samples[f"{modality} dictionary"].append(dictionary.negatives().sample_ids)
    found = {name: torch.cat(ids).cpu() for name, ids in samples.items()}
    if learner.memory is not None:
        if int(learner.memory.epoch) < 1:
            raise RuntimeError("no active batch within the steps")
        found["order of batches"] = learner.memory.order.clone()
    if not numbers or any(len(ids) == 0 for ids in found.values()):
        raise RuntimeError("no loss or no choice within the steps")
    found["losses"], found["gradient norms"] = torch.tensor(numbers, dtype=torch.float64).T.contiguous()
    for name, module in (("encoders", learner.encoder), ("key encoders", learner.key_encoder)):
        weights = [value.detach().flatten() for value in module.state_dict().values() if value.is_floating_point()]
        found[name] = torch.cat(weights).cpu()
    return found


def compare(name: str, compares: str, found: Trace, wanted: Trace, tolerance: float) -> Line:
    """A line of two traces: numbers within the tolerance, relative to the largest one of a tensor; samples equal."""
    others = [key for key in wanted.keys() | found.keys() if not _same_kind(found.get(key), wanted.get(key))]
    numbers = [key for key in wanted if wanted[key].is_floating_point() and key not in others]
    differences = {key: relative_difference(found[key], wanted[key]) for key in numbers}
    largest = _largest(differences.values())
    notes = [f"other {key}" for key in sorted(others)]
    notes += [f"{key} differ by {value:.1e}" for key, value in differences.items() if not value <= tolerance]
    return Line(name, compares, largest, tolerance, not notes, ", ".join(notes))


def _largest(differences: Collection[float]) -> float | None:
    """The largest of them, or NaN if there is one; None if there are none."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max()) if differences else None


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number that was wanted."""
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    return difference / largest if largest else difference


def _same_kind(found: Tensor | None, wanted: Tensor | None) -> bool:
    """Whether both are numbers that can be compared, or equal samples."""
    if found is None or wanted is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return wanted.is_floating_point() or torch.equal(found, wanted)


def interrupted(subject: Subject, scenario: str) -> list[Line]:
    """Stop after a checkpoint and go on with a new trainer, as a run that is resumed: the same as without."""
    config, device = subject.scenarios[scenario], subject.device
    went_on = trainer_of(config, device, torch.float32)
    scaler = went_on.learner.scaler
    # With fp16, from the usual scale, it would take more steps than there are to the first one that is finite.
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {"scale": _FP16_SCALE})
    trace(went_on, _STOP)
    gpus = [device] if device.type == "cuda" else []
    with TemporaryDirectory(prefix="cmacc-verify-") as folder, torch.random.fork_rng(gpus):
        save_checkpoint(went_on.learner, Path(folder), _STOP, 0)
        torch.rand(7)  # a new process has another random state
        resumed = trainer_of(config, device, torch.float32)
        resume(resumed, Path(folder), None)
        found = trace(resumed, _STEPS_TO_RESUME)
    return [
        compare(
            f"interrupted = uninterrupted, {scenario}",
            f"losses, gradient norms, weights, samples after a stop at step {_STOP}",
            found,
            trace(went_on, _STEPS_TO_RESUME),
            # Equal bits on a CPU.
            0.0 if device.type == "cpu" else 1e-3,
        )
    ]


def chunks(subject: Subject) -> list[Line]:
    """Gradient caching against the whole batch at once."""
    name = "gradient caching = one big batch"
    if (reason := subject.depends_on_parts(InputNorm)) is not None:
        return [Line.skipped(name, reason)]
    config = subject.config
    in_chunks = replace(config, optim=replace(config.optim, chunk_size=_CHUNK_SIZE))
    wanted, found = (trace(trainer_of(one, subject.device)) for one in (config, in_chunks))
    return [
        compare(
            name,
            f"losses, gradient norms, weights, samples in chunks of {_CHUNK_SIZE}, float64",
            found,
            wanted,
            ROUNDING,
        )
    ]


def compiled(subject: Subject) -> list[Line]:
    """Compiled backbones against eager ones."""
    name = "compiled = eager"
    try:
        require_compiler(subject.device)
    except CompilerError as error:
        return [Line.skipped(name, str(error))]
    eager, by_compiler = (_first_trainer(subject, "fp32") for _ in range(2))
    compile_backbones(by_compiler.learner.encoder)
    found, wanted = (
        {"features": torch.cat(features), "gradients": torch.cat([part.flatten() for part in gradients.values()])}
        for features, gradients in map(_backbones, (by_compiler, eager))
    )
    return [compare(name, "features and gradients of the backbones, float32", found, wanted, _COMPILED_TOLERANCE)]


def bf16_is_near(subject: Subject) -> list[Line]:
    """bf16 autocast against float32: the loss of a step, and the gradients of the backbones."""
    near, exact = (_first_trainer(subject, precision) for precision in ("bf16", "fp32"))
    gradients = [_backbones(trainer)[1] for trainer in (near, exact)]
    lines = []
    if gradients[1]:
        largest = max(float(gradient.norm()) for gradient in gradients[1].values())
        turned = {
            name: 1 - float(torch.cosine_similarity(gradients[0][name].flatten(), gradient.flatten(), dim=0))
            for name, gradient in gradients[1].items()
            if float(gradient.norm()) > _LEAST_SHARE * largest
        }
        most = _largest(turned.values())
        wrong = ", ".join(name for name, value in turned.items() if not value <= _BF16_TURN)
        compares = "1 - cosine of the gradient, for every tensor of the backbones"
        lines.append(Line("bf16 near fp32, gradients", compares, most, _BF16_TURN, not wrong, wrong))
    else:
        lines.append(Line.skipped("bf16 near fp32, gradients", "the backbones are frozen"))
    losses = [next(trainer.steps(1)).metrics.get("loss", math.nan) for trainer in (near, exact)]
    difference, tolerance = abs(losses[0] - losses[1]), _BF16_SCORE / subject.config.objective.temperature
    return [
        *lines,
        Line("bf16 near fp32, loss", "loss of a step", difference, tolerance, difference <= tolerance),
    ]


def _first_trainer(subject: Subject, precision: PrecisionName) -> Trainer:
    config = replace(subject.scenarios["no dictionary"], precision=precision)
    return trainer_of(config, subject.device, torch.float32)


def _backbones(trainer: Trainer) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Features of the first batch, and the gradients of the backbones' weights for a fixed gradient at the features.

    Not for that of the loss: it comes through the batch norm in the head, over the few samples of the batch. While the
    encoders are untrained, that norm turns rounding of single features into half of the gradient.
    """
    learner = trainer.learner
    inputs = learner.views.of(next(iter(trainer.problem.batches(0, 1))).to(learner.device), 0)
    features: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for modality in MODALITIES:
        backbone = getattr(learner.encoder, modality).backbone
        with learner.autocast():
            feature = backbone(inputs[modality]).float()
        features.append(feature.detach().flatten())
        trained = {f"{modality}.{name}": p for name, p in backbone.named_parameters() if p.requires_grad}
        if trained:
            weights = torch.randn(feature.shape, generator=torch.Generator().manual_seed(0)).to(feature)
            found = torch.autograd.grad((feature * weights).sum(), list(trained.values()))
            gradients |= dict(zip(trained, found, strict=True))
    return features, gradients
