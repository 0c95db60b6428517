"""Replay selections: which keys the dictionaries could choose at a step, and which they chose.

A run does not need to log its negatives. A checkpoint holds encoders, dictionaries and pools before a step, and the
batch, its augmentation and the selector's random numbers are functions of the seed and the step. Encoding that batch
again and calling `select_negatives` reproduces the run's choice: on a CPU exactly (tests check this), in the precision
of training. On another kind of device, or on a GPU with non-deterministic sums, rounding may change single picks.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor

from cmacc.clips import ClipBatch, Manifest, training_loader
from cmacc.encoders import Encoding, Modality
from cmacc.negatives import Candidates, Keys, Selector
from cmacc.pretraining.checkpoint import load_checkpoint
from cmacc.pretraining.checkpoint_files import checkpoint_folders, step_of
from cmacc.pretraining.clip_stream import training_plan, usable_files
from cmacc.pretraining.clip_views import ClipViews
from cmacc.pretraining.config_files import read_config
from cmacc.pretraining.learner import Learner, autocast_dtype, default_device, untrained_encoder
from cmacc.pretraining.step import select_negatives

_OTHER: dict[Modality, Modality] = {"audio": "video", "video": "audio"}


class ReplayError(ValueError):
    """A selection that cannot be replayed; the message says why, and how to proceed."""


@dataclass(frozen=True)
class Selection:
    """The selection of one dictionary at a step. All tensors are on the CPU.

    Attributes
    ----------
    modality
        Modality of the dictionary's keys.
    step
        The step, which follows the checkpoint.
    pool
        N keys, in no particular order.
    eligible
        ``(N,)``: which keys could be chosen.
    chosen
        ``(m,)``: places in ``pool``, in the order of picking.
    before
        The keys of the dictionary before the selection.
    staying
        Those of them that stayed. Together with the chosen keys, they are the dictionary in the loss of this step.
    queries
        ``(M, d)``: the queries of the pseudo-labels.
    query_modality
        Modality of ``queries``.
    contrasted
        ``(M, d)``: the queries whose negatives are the dictionary's keys, those of the other modality. The same as
        ``queries`` unless pseudo-labels are ``within_modal``.
    positives
        ``(M, d)``: the right key of each of ``contrasted``, from the encoder that the loss uses.
    query_ids
        ``(M,)``: sample ids of the batch.
    failures
        ``{sample id: reason}`` of files of the batch that cannot be decoded now and were replaced, as in training. If
        training could decode them, the run's choice was different.
    """

    modality: Modality
    step: int
    pool: Keys
    eligible: Bool[Tensor, " pool"]
    chosen: Int[Tensor, " chosen"]
    before: Keys
    staying: Keys
    queries: Float[Tensor, "batch dim"]
    query_modality: Modality
    contrasted: Float[Tensor, "batch dim"]
    positives: Float[Tensor, "batch dim"]
    query_ids: Int[Tensor, " batch"]
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def dictionary(self) -> Keys:
        """The keys in the loss of this step, the chosen ones last."""
        taken = self.pool[self.chosen]
        return Keys(*(torch.cat(both) for both in zip(self.staying.fields(), taken.fields(), strict=True)))


class SelectionReplay:
    """The selections of a run, replayed from its checkpoints.

    Parameters
    ----------
    run_dir
        Run folder with at least one checkpoint.
    device
        Device to encode on. Default: a GPU if there is one, as in training.

    Raises
    ------
    ReplayError
        The run has no checkpoint at a step with a selection.
    ConfigError, ManifestError, RunError
        The config or the manifest of the run cannot be read.
    """

    def __init__(self, run_dir: Path, device: torch.device | None = None) -> None:
        if not run_dir.is_dir():
            raise ReplayError(f"run folder {run_dir}: must be a folder made by `cmacc pretrain`, got nothing there")
        self.run_dir = run_dir
        self.config = read_config(run_dir / "config.yaml")
        self._folders = {step_of(folder): folder for folder in checkpoint_folders(run_dir)}
        if not self._folders:
            raise ReplayError(
                f"run {run_dir}: must hold a checkpoint in {run_dir / 'checkpoints'}, got none; train it "
                f"first (`cmacc pretrain --resume {run_dir}`)"
            )
        every = self.config.dictionary.select_every
        #: Steps that can be replayed, in order.
        self.steps = [step for step in self._folders if step % every == 0]
        if not self.steps:
            raise ReplayError(
                f"run {run_dir}: must hold a checkpoint at a multiple of dictionary.select_every ({every}), where keys "
                f"are chosen, got {_listed(list(self._folders))}"
            )
        self.device = device or default_device()
        self.manifest = Manifest.read(self.config.data.manifest)
        sample_ids, _ = usable_files(self.manifest, self.config)
        self.plan = training_plan(self.manifest, sample_ids, self.config)

    def default_steps(self, most: int = 4) -> list[int]:
        """The last step that can be replayed, and others evenly spaced before it."""
        count = min(most, len(self.steps))
        return [self.steps[-1 - i * (len(self.steps) - 1) // max(1, count - 1)] for i in range(count)][::-1]

    def check(self, step: int) -> None:
        """Refuse a step that cannot be replayed. Without a dictionary, no step can.

        Raises
        ------
        ReplayError
            There is no checkpoint before that step, it has no selection, or the run was on kept features.
        """
        if self.config.dictionary.selector == "none":
            raise ReplayError(
                f"run {self.run_dir}: dictionary.selector must be active, newest, random or hardest to choose keys, "
                "got none; its only negatives are the other clips of each batch"
            )
        if self.config.keeps_features:
            raise ReplayError(
                f"run {self.run_dir}: train.video and train.audio must not both be head, got a run on kept features, "
                "whose choices cannot be replayed yet"
            )
        if step not in self.steps:
            raise ReplayError(
                f"steps: must be among the checkpoints of run {self.run_dir} at which keys are chosen "
                f"({_listed(self.steps)}), got {step}; a run with --keep_every N keeps every N-th step's"
            )

    def at(self, step: int) -> list[Selection]:
        """Replay a step: the audio dictionary's selection, then the video dictionary's.

        Raises
        ------
        ReplayError
            The step cannot be replayed, or the manifest is no longer that of the run.
        CheckpointError, MediaError
            The checkpoint, or a clip of the batch, cannot be read.
        """
        self.check(step)
        # Keys are refreshed after the choice, so a replay needs no input buffer.
        config = dataclasses.replace(
            self.config, dictionary=dataclasses.replace(self.config.dictionary, refresh="none")
        )
        loader = training_loader(self.plan, config.data.clip, first_step=step, last_step=step + 1, workers=0)
        with torch.random.fork_rng():  # loading a checkpoint sets the global generator's state
            learner = Learner.build(
                untrained_encoder(config), ClipViews(config, self.device), config, self.device,
                autocast_dtype(config.precision, self.device),
            )  # fmt: skip
            load_checkpoint(learner, self._folders[step])
            self._check_manifest(learner.dictionaries["audio"].pool.keys(), step)
            batch = next(iter(loader)).to(self.device)
            inputs = learner.views.of(batch, self.plan.visit(step))
            with torch.no_grad(), learner.autocast():
                queries = learner.encoder(**inputs)
                keys = queries if config.batch_keys == "online" else learner.key_encoder(**inputs)
        return _replayed(learner, queries, keys, batch, step)

    def trained_elsewhere(self, step: int) -> bool:
        """Whether the checkpoint is from a GPU and this replay is not on one, or vice versa."""
        with safe_open(self._folders[step] / "optimizer.safetensors", "pt") as file:
            on_gpu = any(name.startswith("random.cuda") for name in file.keys())  # noqa: SIM118, not a dict
        return on_gpu != (self.device.type == "cuda")

    def start_seconds(self, sample_id: int, step: int) -> float:
        """Start of a sample's clip, within its file, in the batch of a step."""
        return self.plan.windows.request(sample_id, self.plan.visit(step)).start_seconds

    def encoded_at(self, keys: Keys) -> Int[Tensor, " keys"]:
        """The step whose augmented view each key shows: for a re-encoded key, the step of its first encoding."""
        return torch.where(keys.handles >= 0, keys.handles // self.config.optim.batch_size, keys.steps)

    def _check_manifest(self, pool: Keys, step: int) -> None:
        """Compare the pool's newest keys with the plan of the previous batch, of which few files can be replaced."""
        newest = pool.sample_ids[pool.steps == step - 1].cpu()
        planned = torch.from_numpy(self.plan.files(step - 1))
        known = len(newest) == 0 or float(torch.isin(newest, planned).float().mean()) > 0.5
        if not known or (len(pool) > 0 and int(pool.sample_ids.max()) >= len(self.manifest)):
            raise ReplayError(
                f"manifest {self.config.data.manifest}: must be as it was when run {self.run_dir} was trained, got "
                f"other files where step {step - 1} took its batch; restore it, or its files' places in it"
            )


@dataclass
class _Watched:
    """A selector that records its arguments and its result."""

    inner: Selector
    asked: Candidates | None = None
    answer: Int[Tensor, " count"] | None = None

    def select(self, candidates: Candidates, count: int, generator: torch.Generator | None) -> Int[Tensor, " count"]:
        self.asked, self.answer = candidates, self.inner.select(candidates, count, generator)
        return self.answer


def _replayed(
    learner: Learner,
    queries: dict[Modality, Encoding],
    keys: dict[Modality, Encoding],
    batch: ClipBatch,
    step: int,
) -> list[Selection]:
    """Selections of both dictionaries, the audio dictionary's first."""
    dictionaries = {modality: learner.dictionaries[modality] for modality in _OTHER}
    before = {modality: dictionary.negatives() for modality, dictionary in dictionaries.items()}
    watched = {modality: _Watched(dictionary.selector) for modality, dictionary in dictionaries.items()}
    for modality, dictionary in dictionaries.items():
        dictionary.selector = watched[modality]
    select_negatives(learner, queries, batch.sample_ids, step)
    selections = []
    for modality, dictionary in dictionaries.items():
        asked, answer = watched[modality].asked, watched[modality].answer
        dictionary.selector = watched[modality].inner
        own, other = queries[modality].embedding, queries[_OTHER[modality]].embedding
        crosswise = learner.config.dictionary.pseudo_labels == "cross_modal"
        pool = dictionary.pool.held()[0]
        if asked is None or answer is None:  # no key was eligible, and the selector was not called
            nobody = torch.zeros(len(pool), dtype=torch.bool)
            offered = pool, nobody, torch.zeros(0, dtype=torch.int64), before[modality]
        else:
            offered = asked.keys, asked.eligible, answer, asked.staying
        selections.append(
            Selection(
                modality=modality,
                step=step,
                pool=_on_cpu(offered[0]),
                eligible=offered[1].cpu(),
                chosen=offered[2].cpu(),
                before=_on_cpu(before[modality]),
                staying=_on_cpu(offered[3]),
                queries=(other if crosswise else own).float().cpu(),
                query_modality=_OTHER[modality] if crosswise else modality,
                contrasted=other.float().cpu(),
                positives=keys[modality].embedding.float().cpu(),
                query_ids=batch.sample_ids.cpu(),
                failures=batch.failures,
            )
        )
    return selections


def _on_cpu(keys: Keys) -> Keys:
    return Keys(*(value.cpu() for value in keys.fields()))


def _listed(steps: list[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:12])
    return shown if len(steps) <= 12 else f"{shown}, ... {steps[-1]}"
