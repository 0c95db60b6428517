"""The protocol `finetune`: train the whole network on a split's training files, and test it with many views.

The recipe is fixed (`FinetuneSettings`, version 1) and the same for every encoder and data set. There is no search, no
selection on the test files, and the network of the last step is tested. The recipe is our choice within common
practice. Published numbers use other schedules, which are often longer and tuned, and are comparable only as far as
these agree:

* Fine-tuning the whole network with a new linear layer: AVID-CMA (Morgado et al., CVPR 2021) and XDC (Alwassel et al.,
  NeurIPS 2020), among many. AVID-CMA's published UCF101 configuration has Adam at 1e-4, dropout 0.5 before the linear
  layer, random crops, colour changes of 0.4, and 16 epochs with 10 windows per file; here there is one per file.
* Warm-up (Goyal et al., 2017), then a cosine to zero (Loshchilov and Hutter, ICLR 2017); label smoothing of 0.1
  (Szegedy et al., CVPR 2016).
* 10 windows x 3 crops, scores averaged: SlowFast (Feichtenhofer et al., ICCV 2019). Its crops are squares along a frame
  whose shorter side has the size of the crop. The same holds here for frames of 4:3 (such as those of UCF101). The
  margins of wider frames, and the top and bottom of narrower ones, are in no crop.

Trade-offs: an encoder takes uint8 pixels and waveforms, not normalised tensors, so that augmented pixels are rounded
back to 0..255 (an error below half a grey level) and spectrograms cannot be masked. In return, every `ClipEncoder` that
is an `nn.Module` can be fine-tuned, with its own normalisation.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cmacc.clips import (
    AugmentConfig,
    ClipBatch,
    ClipSpec,
    Manifest,
    TrainingPlan,
    View,
    augment_video,
    augment_waveforms,
    draw_view,
    evaluation_loader,
    evaluation_requests,
    seeds,
    to_video,
    training_loader,
)
from cmacc.clips.progress import Progress, silent
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders.towers import Tower, VideoTower
from cmacc.pretraining import OptimConfig, autocast_dtype, learning_rate
from cmacc.pretraining.clip_encoder import ClipEncoder, Modality
from cmacc.pretraining.features import spec_for
from cmacc.pretraining.randomness import seeded_generators

# Purposes in addition to those of `cmacc.clips.seeds`: weights of the new layer, and dropout of a step.
_HEAD, _DROPOUT = 100, 101


class FinetuneError(ValueError):
    """Fine-tuning cannot start or continue; the message states the requirement and the actual value."""


@dataclass(frozen=True)
class FinetuneSettings:
    """The recipe, version 1. Use the defaults for comparisons, and other values for tests and studies.

    Parameters
    ----------
    epochs
        Number of visits to every training file, with one random window each.
    batch_size
        Clips per step, at most the number of files. The remainder of an epoch that does not fill a batch is dropped.
    head_learning_rate, learning_rate
        Peak learning rates of AdamW, at the end of the warm-up: of the new, randomly initialised linear layer, and of
        the encoder.
    warmup_share
        Share of the steps with linear warm-up, in [0, 1); then the rates decay to zero along a half cosine.
    weight_decay
        Weight decay of matrices and kernels; norms and biases have none.
    dropout
        Dropout of the features before the linear layer, in [0, 1).
    label_smoothing
        Share of the target that is spread over all classes, in [0, 1).
    augment
        Augmentation of training views. Its masks must be zero, since there is no spectrogram to mask.

    Raises
    ------
    FinetuneError
        A value is out of its range.
    """

    epochs: int = 20
    batch_size: int = 32
    head_learning_rate: float = 1e-3
    learning_rate: float = 3e-4
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    dropout: float = 0.5
    label_smoothing: float = 0.1
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(grey_probability=0.0, time_mask=0.0, frequency_mask=0.0)
    )

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("weight_decay", 0)):
            value = getattr(self, name)
            _require(least <= value < math.inf, f"FinetuneSettings: {name}", f"at least {least} and finite", value)
        for name in ("head_learning_rate", "learning_rate"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"FinetuneSettings: {name}", "positive and finite", value)
        for name in ("warmup_share", "dropout", "label_smoothing"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"FinetuneSettings: {name}", "in [0, 1)", value)
        for name in ("time_mask", "frequency_mask"):
            value = getattr(self.augment, name)
            _require(value == 0, f"FinetuneSettings: augment.{name}", "0 (encoders take waveforms)", value)
        _require(
            self.augment.stretch == 1,
            "FinetuneSettings: augment.stretch",
            "1 (encoders take waveforms)",
            self.augment.stretch,
        )
        _require(
            self.augment.window == 1,
            "FinetuneSettings: augment.window",
            "1 (clips are as in the test)",
            self.augment.window,
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune and test one network.

    Parameters
    ----------
    settings
        The recipe; the defaults are version 1.
    windows
        Number of evenly spread windows of a test file. If it is no longer than a window, they coincide and are encoded
        once.
    crops
        Number of crops of each window, evenly spread from left to right over a frame 4/3 as wide as the encoder's; 1
        uses the encoder's frame size. Not used for audio.
    seed
        Seed of the new layer's weights, order of files, windows, augmentation and dropout; at least 0.
    workers
        Number of decoding processes; 0 decodes in the main process.

    Raises
    ------
    FinetuneError
        A number is out of its range.
    """

    settings: FinetuneSettings = field(default_factory=FinetuneSettings)
    windows: int = 10
    crops: int = 3
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("crops", 1), ("seed", 0), ("workers", 0)):
            value = getattr(self, name)
            _require(value >= least, f"FinetuneConfig: {name}", f"at least {least}", value)


@dataclass(frozen=True)
class FinetuneFiles:
    """The training and test files.

    Attributes
    ----------
    manifest
        The files.
    class_of
        ``(len(manifest),)``: class index of every row, -1 without a class.
    train_ids, test_ids
        Disjoint rows of the manifest.
    """

    manifest: Manifest
    class_of: NDArray[np.int64]
    train_ids: Sequence[int]
    test_ids: Sequence[int]


class Classifier(nn.Module):
    """An encoder, dropout, and a new linear layer, from raw clips of one modality to logits.

    Parameters
    ----------
    encoder
        A `ClipEncoder` that is an `nn.Module`; it is not copied.
    modality
        The modality to encode.
    feature_size, class_count
        Input and output size of the linear layer, which runs in float32 even if the encoder is autocast.
    dropout
        Dropout before the linear layer, in training mode only.
    """

    def __init__(
        self, encoder: ClipEncoder, modality: Modality, feature_size: int, class_count: int, dropout: float
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.modality = modality
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(feature_size, class_count)
        self.autocast_dtype = autocast_dtype("auto", encoder.device)

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch classes"]:
        """Logits of frames ``(B, T, H, W, 3)`` uint8 or waveforms ``(B, S)``, the inputs of the encoder."""
        lower = self.autocast_dtype
        with torch.autocast(self.encoder.device.type, lower, enabled=lower is not None):
            features = _embed(self.encoder, self.modality, inputs)
        logits: Tensor = self.linear(self.dropout(features.float()))
        return logits


@dataclass(frozen=True)
class Finetuned:
    """Result of fine-tuning.

    Attributes
    ----------
    scores
        ``(n, classes)`` float32: softmax averaged over the views of a file; rows sum to one.
    sample_ids
        ``(n,)`` int64: the test files that decoded, in the requested order.
    failures
        ``{sample id: reason}`` of training files, which were replaced by others, and of test files, which are skipped.
    epoch_losses
        Mean training loss of every epoch, in nats; with label smoothing, it does not approach zero.
    classifier
        The fine-tuned network, in evaluation mode.
    """

    scores: NDArray[np.float32]
    sample_ids: NDArray[np.int64]
    failures: dict[int, str]
    epoch_losses: tuple[float, ...]
    classifier: Classifier


def finetune(
    encoder: ClipEncoder,
    modality: Modality,
    files: FinetuneFiles,
    config: FinetuneConfig | None = None,
    progress: Progress = silent,
) -> Finetuned:
    """Train a copy of an encoder with a linear layer on top, end to end, and score the test files.

    The result depends only on the arguments (on a GPU, up to the order of summation), and not on the workers. The
    global generators of torch are not changed.

    Parameters
    ----------
    encoder
        An `nn.Module`, differentiable in its parameters. It is not modified: a copy is trained, including all layers.
    modality
        The modality to encode; every file must have it.
    files
        The training and test files.
    config
        Configuration; version 1 of the recipe by default.
    progress
        Called with ("fine-tune", steps done, total steps), then ("test", windows done, total windows).

    Raises
    ------
    FinetuneError
        The encoder cannot be trained or lacks the modality; the files, their classes or a number are invalid; or the
        loss is no longer finite.
    MediaError
        A training file and all its substitutes do not decode.
    """
    config = config or FinetuneConfig()
    require_trainable(encoder, modality)
    class_count = _check_files(files, modality)
    classifier = _new_classifier(encoder, modality, class_count, config.settings.dropout, config.seed)
    losses, train_failures = _train(classifier, files, config, progress)
    scores, scored_ids, test_failures = _score(classifier, files, config, progress)
    return Finetuned(scores, scored_ids, train_failures | test_failures, losses, classifier)


def _new_classifier(
    encoder: ClipEncoder, modality: Modality, class_count: int, dropout: float, seed: int
) -> Classifier:
    """A copy of the encoder with a new linear layer on top, on the encoder's device, with all parameters trainable."""
    encoder = copy.deepcopy(encoder)
    assert isinstance(encoder, nn.Module)
    encoder.requires_grad_(True).eval()
    # A batch of one, with gradients, shows the feature width and whether there is anything to train.
    features = _embed(encoder, modality, _blank(encoder.spec, modality, encoder.device))
    _require(features.ndim == 2, "finetune: features", "of shape (batch, features)", tuple(features.shape))
    _require(
        features.requires_grad,
        f"finetune: embed_{modality}",
        "differentiable in the encoder's parameters",
        "features without a gradient",
    )
    with seeded_generators(encoder.device, _HEAD, seed):
        classifier = Classifier(encoder, modality, features.shape[1], class_count, dropout)
    return classifier.to(encoder.device)


def _train(
    classifier: Classifier, files: FinetuneFiles, config: FinetuneConfig, progress: Progress
) -> tuple[tuple[float, ...], dict[int, str]]:
    """Train to the end of the schedule; return the mean loss of every epoch, and the files that did not decode."""
    device, spec = classifier.encoder.device, classifier.encoder.spec
    settings, train_ids = config.settings, tuple(files.train_ids)
    batch_size = min(settings.batch_size, len(train_ids))
    plan = TrainingPlan(files.manifest, train_ids, spec.length_seconds, batch_size, config.seed)
    steps = plan.steps_per_epoch * settings.epochs
    warmup_steps = min(steps - 1, round(settings.warmup_share * steps))
    schedule = OptimConfig(steps=steps, warmup_steps=warmup_steps, learning_rate=1.0)
    optimizer = _optimizer(classifier, settings)
    classes = torch.from_numpy(files.class_of)
    losses: list[float] = []
    failures: dict[int, str] = {}
    loader = training_loader(
        plan,
        _decoded_spec(spec, classifier.modality),
        first_step=0,
        last_step=steps,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    classifier.train()
    for step, batch in enumerate(loader):
        failures |= batch.failures
        # Use the ids of the batch, not of the plan: a file that did not decode was replaced by another.
        targets = classes[batch.sample_ids].to(device)
        views = [
            draw_view(settings.augment, seeded_rng(seeds.AUGMENTATION, config.seed, plan.visit(step), sample_id))
            for sample_id in batch.sample_ids.tolist()
        ]
        inputs = _augmented(batch.to(device), classifier.modality, views)
        with seeded_generators(device, _DROPOUT, config.seed, step):
            logits = classifier(inputs)
        loss = functional.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
        losses.append(loss.item())
        _require(math.isfinite(losses[-1]), f"finetune: the loss at step {step}", "finite", losses[-1])
        share = learning_rate(schedule, step)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress("fine-tune", step + 1, steps)
    classifier.eval()
    epoch_losses = np.reshape(losses, (settings.epochs, -1)).mean(1)
    return tuple(epoch_losses.tolist()), failures


@torch.inference_mode()
def _score(
    classifier: Classifier, files: FinetuneFiles, config: FinetuneConfig, progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[int, str]]:
    """Softmax averaged over windows and crops, ``(n, classes)``; ids of the n files that decoded; failed files."""
    spec, modality = classifier.encoder.spec, classifier.modality
    manifest, test_ids, batch_size = files.manifest, files.test_ids, config.settings.batch_size
    crops = config.crops if modality == "video" else 1
    wanted = evaluation_requests(manifest, test_ids, spec.length_seconds, config.windows)
    # The windows of a short file coincide, and the average over copies of one view is that view.
    requests = list(dict.fromkeys(wanted))
    loader = evaluation_loader(
        manifest, requests, _decoded_spec(spec, modality, crops), batch_size=batch_size, workers=config.workers
    )
    place_of = {sample_id: place for place, sample_id in enumerate(test_ids)}
    sums = np.zeros((len(test_ids), classifier.linear.out_features))
    counts = np.zeros(len(test_ids))
    failures: dict[int, str] = {}
    done = 0
    for batch in loader:
        failures |= batch.failures
        done = min(done + batch_size, len(requests))
        if len(batch.sample_ids):
            places = [place_of[sample_id] for sample_id in batch.sample_ids.tolist()]
            for view in _views(batch.to(classifier.encoder.device), spec, modality, crops):
                np.add.at(sums, places, classifier(view).softmax(1).double().cpu().numpy())
                np.add.at(counts, places, 1)
        progress("test", done, len(requests))
    # Skip a file if any of its windows fails: an average over fewer windows is not comparable.
    kept = [sample_id for sample_id in test_ids if sample_id not in failures]
    places = [place_of[sample_id] for sample_id in kept]
    scores = np.asarray(sums[places] / counts[places][:, None], np.float32)
    return scores, np.asarray(kept, np.int64), failures


def _embed(encoder: ClipEncoder, modality: Modality, inputs: Tensor) -> Tensor:
    return encoder.embed_video(inputs) if modality == "video" else encoder.embed_audio(inputs)


def _blank(spec: ClipSpec, modality: Modality, device: torch.device) -> Tensor:
    """A batch of one black clip, or of silence."""
    if modality == "video":
        shape = (1, spec.frame_count, spec.frame_height, spec.frame_width, 3)
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    return torch.zeros((1, spec.sample_count), device=device)


def _decoded_spec(spec: ClipSpec, modality: Modality, crops: int = 1) -> ClipSpec:
    """The clips to decode: wider frames for several crops; for audio, one frame instead of all."""
    if modality == "audio":
        return spec_for(spec, [modality])
    return spec if crops == 1 else dataclasses.replace(spec, frame_width=round(spec.frame_width * 4 / 3))


def _views(batch: ClipBatch, spec: ClipSpec, modality: Modality, crops: int) -> Iterator[Tensor]:
    """The classifier's inputs for a batch: its waveforms, or the crops of its frames from left to right."""
    if modality == "audio":
        yield batch.waveforms
        return
    slack = batch.frames.shape[3] - spec.frame_width
    for number in range(crops):
        left = round(slack * number / max(1, crops - 1))
        yield batch.frames[:, :, :, left : left + spec.frame_width].contiguous()


def _augmented(batch: ClipBatch, modality: Modality, views: Sequence[View]) -> Tensor:
    """Augmented views of a batch, in the input format of the encoder."""
    if modality == "video":
        return _to_frames(augment_video(batch.frames, views))
    waveforms = augment_waveforms(batch.waveforms, views)
    # Scale down instead of clipping: encoders expect [-1, 1], and clipping would add harmonics to loud audio.
    return waveforms / waveforms.abs().amax(1, keepdim=True).clamp_min(1.0)


def _to_frames(video: Float[Tensor, "batch 3 time height width"]) -> UInt8[Tensor, "batch time height width 3"]:
    """The inverse of `to_video`, rounded to uint8 pixels."""
    ends = torch.tensor([0, 255], dtype=torch.uint8, device=video.device)
    black, white = to_video(ends.view(2, 1, 1, 1, 1).expand(2, 1, 1, 1, 3)).unbind()
    pixels = (video - black) / (white - black) * 255
    return pixels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def _optimizer(classifier: Classifier, settings: FinetuneSettings) -> torch.optim.AdamW:
    """AdamW with a group for each of (encoder, new layer) x (decay, no decay); ``peak`` is the peak learning rate."""
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        peak = settings.head_learning_rate if name.startswith("linear.") else settings.learning_rate
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        parts.setdefault((peak, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": part, "peak": peak, "weight_decay": decay} for (peak, decay), part in parts.items()]
    )


def require_trainable(encoder: ClipEncoder, modality: Modality) -> None:
    """Raise `FinetuneError` if the encoder has nothing to train for that modality."""
    _require(
        modality in encoder.modalities,
        "finetune: modality",
        f"one that the encoder has ({', '.join(encoder.modalities)})",
        modality,
    )
    if not isinstance(encoder, nn.Module):
        raise FinetuneError(f"finetune: encoder must be an nn.Module, got {type(encoder).__name__}")
    for module in encoder.modules():
        if (
            isinstance(module, Tower)
            and not module.can_train
            and isinstance(module, VideoTower) == (modality == "video")
        ):
            raise FinetuneError(f"finetune: the encoder must be differentiable for {modality}, got a frozen tower")
    if next(encoder.parameters(), None) is None:
        raise FinetuneError(
            f"finetune: encoder must have parameters to train, got {type(encoder).__name__} without any"
        )


def _check_files(files: FinetuneFiles, modality: Modality) -> int:
    """Validate the files and return the number of classes."""
    manifest, class_of, train_ids, test_ids = files.manifest, files.class_of, files.train_ids, files.test_ids
    _require(class_of.shape == (len(manifest),), "finetune: class_of", f"of shape ({len(manifest)},)", class_of.shape)
    if modality == "video":
        medium, has_medium = "a picture", manifest.table.column("width").to_numpy() > 0
    else:
        medium, has_medium = "sound", manifest.table.column("has_audio").to_numpy()
    for name, ids, least in (("train_ids", train_ids, 2), ("test_ids", test_ids, 1)):
        what = f"finetune: {name}"
        _require(len(ids) >= least, what, f"at least {least} files", len(ids))
        _require(len(set(ids)) == len(ids), what, "different files", f"{len(ids) - len(set(ids))} repeated")
        outside = [i for i in ids if not 0 <= i < len(manifest)]
        _require(not outside, what, f"rows of the manifest, in [0, {len(manifest)})", outside[:1])
        unlabelled = [i for i in ids if class_of[i] < 0]
        _require(not unlabelled, what, "files with a class", f"{len(unlabelled)} without, among them {unlabelled[:1]}")
        lacking = [i for i in ids if not has_medium[i]]
        _require(not lacking, what, f"files with {medium}", f"{len(lacking)} without, among them {lacking[:1]}")
    common = set(train_ids) & set(test_ids)
    _require(not common, "finetune: test_ids", "other files than train_ids", f"{len(common)} that are in both")
    classes = {int(class_of[i]) for i in train_ids}
    _require(len(classes) >= 2, "finetune: train_ids", "of at least 2 classes", len(classes))
    unseen = {int(class_of[i]) for i in test_ids} - classes
    _require(not unseen, "finetune: test_ids", "of classes that train_ids have", f"class {min(unseen, default=-1)}")
    return max(classes) + 1


def _require(holds: bool, what: str, wanted: str, got: object) -> None:
    if not holds:
        raise FinetuneError(f"{what} must be {wanted}, got {got}")
