"""Online evaluation: what the encoders are worth on held-out files while they are trained (``eval_every``).

1. `online_files` draws held-out files, and as many training files if both have labels. The draw depends on the manifest
   alone, so that all evaluations, runs and numbers of processes use the same files.
2. Every process encodes its share: one window in the middle of each file, without augmentation, in evaluation mode.
3. The rows of all processes are gathered, and each process computes the same metrics from them.

An evaluation changes nothing in the run: neither weights, modes nor the state of random generators.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.clips import Manifest, evaluation_loader, evaluation_requests, seeds
from cmacc.clips.progress import Progress, silent
from cmacc.clips.seeds import seeded_rng
from cmacc.encoders import MODALITIES, AudioVisualEncoder, EncoderPair, Modality
from cmacc.pretraining.clip_stream import RunError, excluded_line, note_bad_file, usable_files, why_excluded
from cmacc.pretraining.cmacc_encoder import CmaccEncoder
from cmacc.pretraining.config import PretrainConfig
from cmacc.pretraining.features import embed, encode, match, unit_rows
from cmacc.pretraining.learner import untrained_encoder
from cmacc.pretraining.neighbours import neighbour_classes, pair_ranks
from cmacc.pretraining.randomness import seeded_generators

log = logging.getLogger("cmacc")

# The metric by which the best checkpoint is chosen.
SCORE = "eval/score"
_BATCH_SIZE = 32
_RECALLS = (1, 5)


@dataclass(frozen=True)
class OnlineFiles:
    """Sample ids of the files of an evaluation: ``held_out``, and ``training`` ones, if there are labels to learn."""

    held_out: tuple[int, ...]
    training: tuple[int, ...]


def online_files(manifest: Manifest, config: PretrainConfig) -> OnlineFiles:
    """Draw at most ``eval_files`` held-out files, and as many training files with labels.

    Held out are the files of split ``test``; if those are fewer than two, all files of other splits than
    ``data.split``. Files that would not be trained on either, such as silent ones, are excluded. There are no training
    files unless they are of two classes, one of which a held-out file has too.

    Raises
    ------
    RunError
        Fewer than two usable files are held out; or too few can be trained on (`usable_files`).
    """
    splits = manifest.column("split")
    others = [i for i, split in enumerate(splits) if split not in (None, config.data.split)]
    reasons = {i: why_excluded(manifest.records[i], config) for i in others}
    usable = [i for i in others if reasons[i] is None]
    tests = [i for i in usable if splits[i] == "test"]
    held_out = _drawn(tests if len(tests) >= 2 else usable, config.eval_files)
    if len(held_out) < 2:
        line = excluded_line({i: reason for i, reason in reasons.items() if reason is not None}, len(usable))
        raise RunError(
            f"manifest {config.data.manifest}: at least 2 usable files must be held out from split "
            f"{config.data.split!r} for eval_every={config.eval_every}, got {len(usable)} of {len(manifest)} files"
            + (f" ({line})" if line else "")
            + "; make a manifest with `cmacc scan --test-fraction 0.2`, or set eval_every=0"
        )
    labels = manifest.label_indices()
    training = _drawn([i for i in usable_files(manifest, config)[0] if labels[i] >= 0], config.eval_files)
    classes = {labels[i] for i in training}
    if len(classes) < 2 or classes.isdisjoint(labels[i] for i in held_out):
        training = ()
    return OnlineFiles(held_out, training)


def check_online(manifest: Manifest, config: PretrainConfig) -> None:
    """Check that a run has files for the evaluations that ``eval_every`` asks for.

    Raises
    ------
    RunError
        See `online_files`.
    """
    if config.eval_every:
        online_files(manifest, config)


class OnlineEvaluation:
    """The evaluation of a run.

    Parameters
    ----------
    manifest, config
        The files and the settings of the run.
    device
        Device of the encoders.
    rank, count
        Number of this process and number of processes: each encodes ``files[rank::count]``.
    gather
        Returns the rows of all processes, in the order of the ranks, from the rows of this one. All processes have
        equally many.
    cache
        Folder of kept features, for frozen backbones; None: they are computed at every start.
    progress
        Called while features are computed, with ("embed", files done, files of this process).

    Attributes
    ----------
    files
        Files of the evaluation.
    bad_files
        ``{path: reason}`` of files of this process that did not decode. They are not measured.

    Raises
    ------
    RunError
        Too few files are held out (`online_files`).
    """

    def __init__(
        self,
        manifest: Manifest,
        config: PretrainConfig,
        device: torch.device,
        *,
        rank: int = 0,
        count: int = 1,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
        cache: Path | None = None,
        progress: Progress = silent,
    ) -> None:
        self.files = online_files(manifest, config)
        self.bad_files: dict[str, str] = {}
        self._config, self._device, self._count, self._gather = config, device, count, gather
        ids = np.asarray([*self.files.held_out, *self.files.training], np.int64)
        self._labels = np.asarray(manifest.label_indices(), np.int64)[ids]
        # The rows of this process, in which a sample id is a file's place among them.
        self._share = Manifest.of_table(manifest.table.take(ids[rank::count]))
        self._most_files = -(-len(ids) // count)  # of a process
        # The features of frozen backbones do not change, so their files are only decoded once.
        self._kept = self._kept_features(cache, progress) if config.keeps_features else None

    @torch.no_grad()  # not inference mode: what a tower caches under it could not be used in a later backward pass
    def measured(self, encoder: EncoderPair) -> dict[str, float]:
        """Metrics of the query encoders. All processes must call it, and get the same numbers.

        Parameters
        ----------
        encoder
            Query encoders: of clips, or, with frozen backbones, the heads.

        Returns
        -------
        dict
            ``eval/video_to_audio/R@1``, ``R@5`` and ``eval/audio_to_video/...``: share of held-out files whose own
            audio (video) is the nearest, or among the five nearest. If there are labels, ``eval/video/knn``,
            ``eval/audio/knn`` and ``eval/both/knn``: accuracy of `neighbour_classes` from training files on the
            backbones' features (on the embeddings if the backbones are frozen), of held-out files of the training
            files' classes. ``eval/score``: mean of the kNN accuracies, or of both R@1 without labels; higher is better.
            ``eval/files``: held-out files that decoded. Empty, with a warning, if those are fewer than two, or outputs
            are not finite.
        """
        sizes = [getattr(encoder, m).feature_size for m in MODALITIES] if self._kept is None else []
        sizes += [getattr(encoder, m).last.out_features for m in MODALITIES]
        own = torch.zeros(self._most_files, 1 + sum(sizes), device=self._device)  # the first column: 1 if it decoded
        # Some towers draw from the global generators in evaluation mode too, as wav2vec 2.0 does to skip layers.
        with _evaluation_mode(encoder), seeded_generators(self._device, seeds.EVALUATION):
            for places, outputs in self._clip_outputs(encoder) if self._kept is None else self._kept_outputs(encoder):
                own[places] = torch.cat([torch.ones(len(places), 1, device=self._device), *outputs], dim=1)
        # Process r has the files r, r + count, ...
        rows = self._gather(own).unflatten(0, (self._count, -1)).transpose(0, 1).flatten(0, 1)[: len(self._labels)]
        decoded, *parts = (part.numpy() for part in rows.cpu().split([1, *sizes], dim=1))
        # The features come first; with frozen backbones there are embeddings alone, which take their place.
        features, embeddings = parts[:2], parts[-2:]
        return self._scores(
            decoded[:, 0] == 1,
            dict(zip(MODALITIES, features, strict=True)),
            dict(zip(MODALITIES, embeddings, strict=True)),
        )

    def _clip_outputs(self, encoder: EncoderPair) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Places of files, and their features and embeddings."""
        assert isinstance(encoder, AudioVisualEncoder)
        whole = CmaccEncoder.of_run(self._config, encoder)
        whole.log_mel.to(self._device)
        requests = evaluation_requests(self._share, range(len(self._share)), whole.spec.length_seconds)
        loader = evaluation_loader(
            self._share, requests, whole.spec, batch_size=_BATCH_SIZE, workers=self._config.data.workers
        )
        for batch in loader:
            self._note(batch.failures)
            if len(batch.sample_ids):
                features = {modality: encode(whole, modality, batch) for modality in MODALITIES}
                embeddings = [match(whole, modality, rows) for modality, rows in features.items()]
                yield batch.sample_ids.tolist(), [*features.values(), *embeddings]

    def _kept_features(self, cache: Path | None, progress: Progress) -> tuple[list[int], dict[Modality, Tensor]]:
        """Places of the files of this process that decoded, and the features of their frozen backbones."""
        whole = CmaccEncoder.of_run(self._config, untrained_encoder(self._config)).to(self._device).eval()
        with seeded_generators(self._device, seeds.EVALUATION):
            found = embed(
                whole.backbones,
                self._share,
                range(len(self._share)),
                MODALITIES,
                workers=self._config.data.workers,
                cache=cache,
                progress=progress,
            )
        self._note(found.failures)
        kept = {modality: torch.from_numpy(rows[:, 0]).to(self._device) for modality, rows in found.by_modality.items()}
        return found.sample_ids.tolist(), kept

    def _kept_outputs(self, heads: EncoderPair) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Places of files, and their embeddings."""
        assert self._kept is not None
        places, features = self._kept
        if places:
            encodings = heads(**features)
            yield places, [encodings[modality].embedding for modality in MODALITIES]

    def _note(self, failures: Mapping[int, str]) -> None:
        for place, reason in failures.items():
            note_bad_file(self.bad_files, str(self._share.records[place].path), reason)

    def _scores(
        self,
        decoded: NDArray[np.bool_],
        features: dict[Modality, NDArray[np.float32]],
        embeddings: dict[Modality, NDArray[np.float32]],
    ) -> dict[str, float]:
        """Metrics from the rows of the held-out files, which come first, and of the training files."""
        is_held_out = np.arange(len(decoded)) < len(self.files.held_out)
        held_out, training = np.flatnonzero(decoded & is_held_out), np.flatnonzero(decoded & ~is_held_out)
        finite = all(np.isfinite(rows[decoded]).all() for rows in (*features.values(), *embeddings.values()))
        if len(held_out) < 2 or not finite:
            reason = "outputs of the encoders are not finite" if not finite else "fewer than 2 held-out files decoded"
            log.warning("no online evaluation: %s", reason)
            return {}
        video, audio = (embeddings[modality][held_out] for modality in ("video", "audio"))
        found = {"video_to_audio": pair_ranks(video, audio), "audio_to_video": pair_ranks(audio, video)}
        recalls = {f"eval/{way}/R@{k}": float((ranks <= k).mean()) for way, ranks in found.items() for k in _RECALLS}
        accuracies = self._accuracies(held_out, training, features)
        counted = list(accuracies.values()) or [recalls[f"eval/{way}/R@1"] for way in found]
        return recalls | accuracies | {SCORE: float(np.mean(counted)), "eval/files": len(held_out)}

    def _accuracies(
        self, held_out: NDArray[np.int64], training: NDArray[np.int64], features: dict[Modality, NDArray[np.float32]]
    ) -> dict[str, float]:
        """Accuracies of a vote of neighbours; empty unless two classes are known, and a held-out file is of one."""
        classes = self._labels[training]
        asked = held_out[np.isin(self._labels[held_out], classes)]
        if len(np.unique(classes)) < 2 or len(asked) == 0:
            return {}
        # The cosine of two pairs of unit rows, side by side, is the mean of their cosines.
        both = np.concatenate([unit_rows(rows) for rows in features.values()], axis=1).astype(np.float32)
        by_name: dict[str, NDArray[np.float32]] = {"video": features["video"], "audio": features["audio"], "both": both}
        answers = {name: neighbour_classes(rows[asked], rows[training], classes) for name, rows in by_name.items()}
        return {f"eval/{name}/knn": float((found == self._labels[asked]).mean()) for name, found in answers.items()}


@contextmanager
def _evaluation_mode(encoder: EncoderPair) -> Iterator[None]:
    """Evaluation mode within it; afterwards every module has its own mode again, as parts of a tower may be frozen."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _drawn(sample_ids: Sequence[int], most: int) -> tuple[int, ...]:
    """At most ``most`` of the files, in their order. The run's seed plays no part, so that runs can be compared."""
    order = seeded_rng(seeds.EVALUATION).permutation(len(sample_ids))[:most]
    return tuple(sample_ids[place] for place in sorted(order.tolist()))
