"""CrossCLR (Zolfaghari et al., 2021, arXiv:2109.14910): contrast across and within modalities, without influential
negatives.

Of sample i and the direction x -> y, with inter-modal logits a_ij = x_i.y_j / tau and intra-modal ones u_ij =
x_i.x_j / tau, where j runs over the other samples of the batch that are not influential:

    l_i = -a_ii + log(e^a_ii + sum_j e^a_ij + lambda sum_j e^u_ij),      loss of x -> y = sum_i w_i l_i / sum_i w_i

The connectivity C_i of a sample is the mean cosine of its *input* feature to those of recent samples: how typical it
is. A typical sample is likely to be a false negative. It is influential if C_i is above the gamma quantile of the
batch, and its proximity weight is w_i = e^(C_i / kappa). Each modality has its own connectivity: it decides which y_j
and which x_j are negatives, and that of x gives the weights.

Only the loss is in the released code. Connectivity, pruning and weights follow the paper's description, and how they
are computed, with the default of kappa, is our own.

The input feature must not change while the encoder learns, or the queue would hold features of another kind. Where the
backbone is trained, it is a coarse description of the input itself (`describe_input`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cmacc.negatives import KeyQueue, Keys
from cmacc.objectives.objective import BatchViews, Drawn, ObjectiveInputs, ObjectiveResult

CrossCLRForm = Literal["sound", "released"]
"""Which loss; see `CrossCLRConfig`."""
_DIRECTIONS = (("video", "audio"), ("audio", "video"))
# Of the descriptions: times, rows and columns of pictures; bands and times of sounds.
_VIDEO_CELLS, _AUDIO_CELLS = (2, 4, 4), (16, 8)
_DESCRIPTION_SIZES = {"video": 3 * math.prod(_VIDEO_CELLS), "audio": math.prod(_AUDIO_CELLS)}
# A description without contrast (a black clip, silence) is rounding noise. Pixels and log-mels vary by about 1.
_NO_CONTRAST = 1e-3


@dataclass(frozen=True)
class CrossCLRConfig:
    """Settings of `CrossCLR`, with the paper's symbols.

    Parameters
    ----------
    temperature
        tau > 0.
    intra_weight
        lambda >= 0: weight of the intra-modal negatives; 0: none.
    gamma
        Quantile in (0, 1]: samples whose connectivity is above it are no negatives; 1: all are.
    kappa
        kappa > 0 of the proximity weights: the smaller, the more a batch's most typical samples count. None: equal
        weights. A kappa far below the spread of the connectivities gives one sample of a batch all the weight; the
        metric ``effective_share`` shows it.
    queue_size
        Number of recent samples that connectivity is measured to, at least the batch size.
    form
        ``sound``, as above; or ``released``, the loss of the released code, for published comparisons. There, lambda
        multiplies the logit (e^(lambda u_ij)), and each denominator also holds e^0 = 1 for the sample itself.

    Raises
    ------
    ValueError
        A setting is out of its range.
    """

    temperature: float = 0.03
    intra_weight: float = 0.8
    gamma: float = 0.9
    kappa: float | None = 0.2
    queue_size: int = 3000
    form: CrossCLRForm = "sound"

    def __post_init__(self) -> None:
        for name, is_valid, wanted in (
            ("temperature", 0 < self.temperature < math.inf, "positive"),
            ("intra_weight", 0 <= self.intra_weight < math.inf, "at least 0 and finite"),
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
            ("kappa", self.kappa is None or self.kappa > 0, "positive or null"),
            ("queue_size", self.queue_size >= 1, "at least 1"),
            ("form", self.form in get_args(CrossCLRForm), f"one of {', '.join(get_args(CrossCLRForm))}"),
        ):
            if not is_valid:
                raise ValueError(f"objective.crossclr.{name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def uses_connectivity(self) -> bool:
        """Whether samples are pruned or weighted."""
        return self.gamma < 1 or self.kappa is not None


@dataclass(frozen=True)
class _Standing:
    """What connectivity says of the samples of a batch, in one modality; the weights sum to one."""

    influential: Bool[Tensor, " batch"]
    weights: Float[Tensor, " batch"]


class CrossCLR(nn.Module):
    """Inter- and intra-modal contrast, without influential negatives and with proximity weights.

    The loss is the mean of both directions. All state, the queues of input features, is in persistent buffers. In
    evaluation mode nothing is pushed. A step that is skipped, because something is not finite, still pushes its finite
    features.

    Parameters
    ----------
    config
        The settings.
    feature_sizes
        Sizes of the backbones' features, by modality, for modalities whose backbone is frozen: their input feature is
        then ``queries[modality].feature``. That of the others is `describe_input`.

    Raises
    ------
    ValueError
        ``feature_sizes`` names an unknown modality.

    Notes
    -----
    Metrics: ``loss``; of each direction, ``video_to_audio`` and ``audio_to_video``, ``loss`` and ``top1``, the share of
    queries whose positive scores above every other sample of the batch in the other modality; ``pruned``, the share of
    influential samples; ``effective_share``, 1 / (M sum_i w_i^2) with weights that sum to one: the share of the batch
    that weighted means rest on, as low as 1 / M if one sample has all the weight. The last two are means over the
    modalities. Losses and top-1 are NaN if the batch has one sample only.

    Until a queue holds as many samples as the batch, nothing is pruned and the weights are equal.
    """

    needs_keys = False
    needs_feature_maps = False

    def __init__(self, config: CrossCLRConfig, feature_sizes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        feature_sizes = feature_sizes or {}
        if not feature_sizes.keys() <= _DESCRIPTION_SIZES.keys():
            raise ValueError(f"CrossCLR: feature_sizes must be of video and audio, got {', '.join(feature_sizes)}")
        self.config = config
        self._described = [modality for modality in _DESCRIPTION_SIZES if modality not in feature_sizes]
        sizes = (_DESCRIPTION_SIZES | dict(feature_sizes)) if config.uses_connectivity else {}
        self.queues = nn.ModuleDict({modality: KeyQueue(config.queue_size, size) for modality, size in sizes.items()})

    def draw(self, batch: BatchViews) -> Drawn:
        """The descriptions of the inputs without augmentation, where they are needed."""
        described = self._described if self.config.uses_connectivity else []
        return Drawn(given={modality: describe_input(modality, batch.plain(modality)) for modality in described})

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveResult:
        """The mean of both directions. The batch's input features enter the queues after that.

        Raises
        ------
        ValueError
            The queues are too small for the batch.
        """
        embeddings = {modality: inputs.queries[modality].embedding for modality in _DESCRIPTION_SIZES}
        # At least float32, also under autocast: half precision has three digits, and 1 / tau amplifies the error.
        dtype = torch.promote_types(embeddings["video"].dtype, torch.float32)
        with torch.autocast(embeddings["video"].device.type, enabled=False):
            embeddings = {modality: rows.to(dtype) for modality, rows in embeddings.items()}
            features = self._input_features(inputs)
            standings = {
                modality: self._standing(modality, features.get(modality), inputs.sample_ids, dtype)
                for modality in _DESCRIPTION_SIZES
            }
            same = inputs.sample_ids[:, None] == inputs.sample_ids[None]
            losses: list[Tensor] = []
            metrics: dict[str, Tensor] = {}
            for query, key in _DIRECTIONS:
                inter = embeddings[query] @ embeddings[key].T / self.config.temperature
                intra = embeddings[query] @ embeddings[query].T / self.config.temperature
                each = self._loss_of_each(
                    inter, intra, same | standings[key].influential, same | standings[query].influential
                )
                losses.append(standings[query].weights @ each)
                metrics |= {f"{query}_to_{key}/loss": losses[-1].detach(), f"{query}_to_{key}/top1": _top1(inter, same)}
            loss = torch.stack(losses).mean()
            metrics["loss"] = loss.detach()
            # NaN without negatives: a loss of 0 and a top-1 of 1 would look like the best possible ones.
            metrics = {name: torch.where(same.all(), torch.nan, value) for name, value in metrics.items()}
            self._push(features, inputs.sample_ids)
        influential = torch.stack([standing.influential for standing in standings.values()])
        weights = torch.stack([standing.weights for standing in standings.values()])
        metrics["pruned"] = influential.to(dtype).mean()
        metrics["effective_share"] = (1 / (len(same) * weights.square().sum(1))).mean()
        return ObjectiveResult(loss, metrics)

    def _loss_of_each(
        self,
        inter: Float[Tensor, "batch batch"],
        intra: Float[Tensor, "batch batch"],
        no_inter: Bool[Tensor, "batch batch"],
        no_intra: Bool[Tensor, "batch batch"],
    ) -> Float[Tensor, " batch"]:
        """The loss of each sample; the masks say which logits are no negatives, the diagonals among them."""
        positive = inter.diagonal()
        logits = [positive[:, None], inter.masked_fill(no_inter, -torch.inf)]
        weight = self.config.intra_weight
        if self.config.form == "released":
            own = torch.eye(len(intra), dtype=torch.bool, device=intra.device)
            logits.append((weight * intra).masked_fill(no_intra, -torch.inf).masked_fill(own, 0.0))
        elif weight > 0:
            logits.append((intra + math.log(weight)).masked_fill(no_intra, -torch.inf))
        return torch.cat(logits, dim=1).logsumexp(1) - positive

    @torch.no_grad()
    def _input_features(self, inputs: ObjectiveInputs) -> dict[str, Float[Tensor, "batch features"]]:
        """Input features of length one by modality; empty if connectivity is not used."""
        features: dict[str, Tensor] = {}
        for modality in self.queues:
            described = modality in self._described
            rows = inputs.given[modality] if described else inputs.queries[modality].feature
            features[modality] = functional.normalize(rows.to(self._queue(modality).embedding), dim=1)
        return features

    @torch.no_grad()
    def _standing(
        self,
        modality: str,
        features: Float[Tensor, "batch features"] | None,
        sample_ids: Int[Tensor, " batch"],
        dtype: torch.dtype,
    ) -> _Standing:
        count = len(sample_ids)
        nobody = torch.zeros(count, dtype=torch.bool, device=sample_ids.device)
        equal = torch.full((count,), 1 / count, dtype=dtype, device=sample_ids.device)
        if features is None:
            return _Standing(nobody, equal)
        queue = self._queue(modality)
        if queue.capacity < count:
            raise ValueError(
                f"objective.crossclr.queue_size must be at least the batch size ({count}), got {queue.capacity}"
            )
        recent, _ = queue.held()
        if len(recent) < count:
            return _Standing(nobody, equal)
        connectivity = _connectivity(features, sample_ids, recent)
        influential = connectivity > connectivity.quantile(self.config.gamma)
        kappa = self.config.kappa
        return _Standing(influential, equal if kappa is None else (connectivity / kappa).softmax(0).to(dtype))

    @torch.no_grad()
    def _push(self, features: Mapping[str, Float[Tensor, "batch features"]], sample_ids: Int[Tensor, " batch"]) -> None:
        if not self.training:
            return
        for modality, rows in features.items():
            # A backbone's overflow only costs this step. In the queue, it would make NaN of all steps to come.
            finite = rows.isfinite().all(1)
            # The number of the step is not known here, and nobody asks for it.
            self._queue(modality).push(Keys.from_embedding(rows[finite], sample_ids[finite], step=-1))

    def _queue(self, modality: str) -> KeyQueue:
        queue = self.queues[modality]
        assert isinstance(queue, KeyQueue)
        return queue


@torch.no_grad()
def describe_input(modality: str, inputs: Float[Tensor, "batch *axes"]) -> Float[Tensor, "batch features"]:
    """A coarse description of each input, which needs no training: its averages over a grid, minus their mean.

    Without the mean, which is the picture's brightness or the sound's level, the cosine of two descriptions is the
    correlation of two layouts: where a picture is bright, and when and at what pitch a sound is loud. With it, the
    cosine would say little but that both are bright, or both quiet. The mean *over samples* is not subtracted: it is
    what connectivity measures the cosine to, and without it connectivity would be noise around zero.

    Parameters
    ----------
    modality
        ``video`` or ``audio``.
    inputs
        Video ``(M, 3, T, H, W)``, or log-mel spectrograms ``(M, mels, time)``.

    Returns
    -------
    Tensor
        ``(M, 96)`` for video (2 times, 4 x 4 places, 3 colours), ``(M, 128)`` for audio (16 bands, 8 times). Zeros for
        an input without any contrast, which is then as near to one sample as to another.

    Raises
    ------
    ValueError
        The inputs have another number of axes, as waveforms do.
    """
    axes = {"video": 5, "audio": 3}[modality]
    if inputs.ndim != axes:
        raise ValueError(
            f"CrossCLR: {modality} inputs must have {axes} axes to be described, got {tuple(inputs.shape)}; give the "
            "size of the backbone's feature instead"
        )
    if modality == "video":
        cells = functional.adaptive_avg_pool3d(inputs.float(), _VIDEO_CELLS).flatten(1)
    else:
        cells = functional.adaptive_avg_pool2d(inputs.float(), _AUDIO_CELLS).flatten(1)
    cells = cells - cells.mean(1, keepdim=True)
    return torch.where(cells.norm(dim=1, keepdim=True) < _NO_CONTRAST, 0.0, cells)


def _connectivity(
    features: Float[Tensor, "batch features"], sample_ids: Int[Tensor, " batch"], recent: Keys
) -> Float[Tensor, " batch"]:
    """Mean cosine of each sample to the recent ones, without its own earlier visits."""
    others = sample_ids[:, None] != recent.sample_ids
    cosines = (features @ recent.embedding.T) * others
    return cosines.sum(1) / others.sum(1).clamp_min(1)


def _top1(scores: Float[Tensor, "batch batch"], same: Bool[Tensor, "batch batch"]) -> Float[Tensor, ""]:
    scores = scores.detach()
    return (scores.diagonal()[:, None] > scores.masked_fill(same, -torch.inf)).all(1).to(scores.dtype).mean()
