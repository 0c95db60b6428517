"""Any clip encoder as a model of MTEB, for its benchmarks of video and audio (MVEB, MAEB): the extra ``mteb``.

1. MTEB hands over the rows of a task as a `datasets.Dataset` with columns of encoded files. They are decoded here as in
   `cmacc.transfer.embed`, so that the clips are the same, and neither torchcodec nor torchaudio need be installed.
2. Every row becomes ``windows`` clips, spread evenly over its file.
3. Where MTEB trains a classifier on the rows, they are features from before the projection head, and a row with video
   and audio has both, one after the other. In all other tasks, rows are compared: they are unit vectors in the common
   space of video and audio, and a row with both is the direction of their mean.

``python -m cmacc.standing.mteb ENCODER`` runs a benchmark or single tasks.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from cmacc.clips import Clip, ClipSpec, MediaError
from cmacc.clips.media.container import Medium
from cmacc.clips.media.decoding import OpenFile, read_info
from cmacc.clips.windows import spread_starts
from cmacc.encoders import trusting_code
from cmacc.pretraining.features import match, spec_for
from cmacc.transfer import ClipEncoder, CmaccEncoder, EncoderError, MatchingEncoder, Modality, open_encoder
from cmacc.transfer.card import UNKNOWN_WEIGHTS
from cmacc.transfer.open import opened_object

if TYPE_CHECKING:
    from mteb.models import ModelMeta

# MTEB's types of tasks that train a classifier on the rows. Pair and zero-shot classification compare rows instead.
_PROBES = (
    "AudioClassification",
    "AudioMultilabelClassification",
    "VideoClassification",
    "VideoMultilabelClassification",
)
_CITATION = """@inproceedings{ma2021active,
  title = {Active Contrastive Learning of Audio-Visual Video Representations},
  author = {Ma, Shuang and Zeng, Zhaoyang and McDuff, Daniel and Song, Yale},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
}"""
_BAD_INPUT = 2


class CmaccMTEB:
    """A model for `mteb.evaluate`.

    Parameters
    ----------
    encoder
        The encoder, in evaluation mode. If it encodes both modalities, it must be a `MatchingEncoder`.
    name
        ``organization/model``, as on the leaderboard.
    revision
        Version of the weights. MTEB stores results under the name and the revision. Default: the hash of the weights.
    windows
        Number of windows per file. MTEB stores the results of any number but 1 as an experiment.

    Attributes
    ----------
    mteb_model_meta
        MTEB's description of the model. What is not known here is None, such as the licence of the weights; complete
        it with ``model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"license": ...})``.

    Raises
    ------
    EncoderError
        The encoder is in training mode or incomplete, it has both modalities but no common space, or an argument has a
        wrong value.
    ImportError
        MTEB is not installed.
    """

    mteb_model_meta: "ModelMeta"

    def __init__(self, encoder: ClipEncoder, name: str, revision: str | None = None, *, windows: int = 1) -> None:
        facts = opened_object(encoder).facts
        if revision is None and facts.weights == UNKNOWN_WEIGHTS:
            raise EncoderError(f"encoder {facts.name}: is no torch.nn.Module, so its revision must be given, got None")
        if len(encoder.modalities) > 1 and not isinstance(encoder, MatchingEncoder):
            raise EncoderError(
                f"encoder {facts.name}: must have match_video and match_audio, since it encodes both modalities; "
                "without a common space, wrap it once for each modality"
            )
        if name.count("/") != 1:
            raise EncoderError(f"name: must be organization/model, got {name!r}")
        if windows < 1:
            raise EncoderError(f"windows: must be at least 1, got {windows}")
        self.encoder = encoder
        self.windows = windows
        self.mteb_model_meta = _meta(encoder, name, revision or facts.weights, windows, self._width())

    def fits(self, task: Any) -> bool:
        """Whether the encoder has all modalities of a task (`mteb.AbsTask`): those with text do not fit.

        MTEB refuses a whole benchmark if one task does not fit.
        """
        return set(task.metadata.modalities) <= set(self.encoder.modalities)

    @torch.inference_mode()
    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Embeddings of the rows of a task.

        Parameters
        ----------
        inputs
            MTEB's loader. Its data set, batch size and number of worker processes are used; its batches would be
            decoded with torchcodec.
        task_metadata
            MTEB's description of the task; its type decides between features and the common space.
        hf_split, hf_subset, prompt_type, **kwargs
            Of no consequence; MTEB passes them to every model.
        show_progress_bar
            Whether to show how many batches are done.

        Returns
        -------
        ``(n, f)`` features in classification, otherwise ``(n, d)`` unit vectors.

        Raises
        ------
        EncoderError
            No column can be encoded, or the encoder returns values that are not finite.
        MediaError
            The files of a row are missing or damaged. MTEB needs every row, so none is skipped.
        """
        from tqdm import tqdm

        dataset: Any = inputs.dataset
        columns = [m for m in get_args(Modality) if m in self.encoder.modalities and m in dataset.column_names]
        if not columns:
            raise EncoderError(
                f"task {task_metadata.name}: must have a column of {', '.join(self.encoder.modalities)}, which the "
                f"encoder encodes, got {', '.join(dataset.column_names)}; CmaccMTEB.fits chooses tasks"
            )
        is_probe = task_metadata.type in _PROBES
        files = _Files(dataset, columns, spec_for(self.encoder.spec, columns), self.windows, task_metadata.name)
        loader = DataLoader(files, batch_size=inputs.batch_size, num_workers=inputs.num_workers, collate_fn=list)
        embedded: dict[Modality, dict[int, Tensor]] = {modality: {} for modality in columns}
        count = 0
        for batch in tqdm(loader, desc=task_metadata.name, disable=not show_progress_bar):
            for row in batch:
                if isinstance(row, MediaError):
                    raise row
            for modality in columns:
                present = {count + place: row[modality] for place, row in enumerate(batch) if modality in row}
                if present:
                    embedded[modality] |= zip(
                        present, self._embed(modality, list(present.values()), is_probe), strict=True
                    )
            count += len(batch)
        sides = []
        for rows in filter(None, embedded.values()):
            zeros = torch.zeros_like(next(iter(rows.values())))  # for rows without this modality
            sides.append(torch.stack([rows.get(place, zeros) for place in range(count)]))
        joined = torch.cat(sides, dim=1) if is_probe else normalize(torch.stack(sides).sum(0), dim=1)
        return joined.numpy()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of all pairs, ``(n1, n2)``."""
        from mteb.similarity_functions import cos_sim

        return torch.as_tensor(cos_sim(embeddings1, embeddings2))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of pairs of the same place, ``(n,)``."""
        from mteb.similarity_functions import pairwise_cos_sim

        return torch.as_tensor(pairwise_cos_sim(embeddings1, embeddings2))

    def _embed(self, modality: Modality, files: Sequence[Tensor], is_probe: bool) -> Float[Tensor, "files width"]:
        """One row for each file, the mean over its windows, on the CPU."""
        encoder = self.encoder
        embed = encoder.embed_video if modality == "video" else encoder.embed_audio
        # As many windows at a time as files in a batch: the batch size limits the memory for any number of windows.
        windows = torch.cat(list(files)).split(len(files))
        features = torch.cat([embed(part.to(encoder.device)) for part in windows])
        if not features.isfinite().all():
            raise EncoderError(
                f"encoder {type(encoder).__name__}: features of {modality} must be finite, got NaN or inf"
            )
        if not is_probe and isinstance(encoder, MatchingEncoder):
            features = match(encoder, modality, features)
        rows = torch.stack([part.mean(0) for part in features.float().cpu().split([len(file) for file in files])])
        return rows if is_probe else normalize(rows, dim=1)

    @torch.inference_mode()
    def _width(self) -> int:
        """Number of columns of rows that are compared."""
        spec, modality = self.encoder.spec, self.encoder.modalities[0]
        if modality == "video":
            clip = torch.zeros(1, spec.frame_count, spec.frame_height, spec.frame_width, 3, dtype=torch.uint8)
        else:
            clip = torch.zeros(1, spec.sample_count)
        return self._embed(modality, [clip], is_probe=False).shape[1]


class _Files(Dataset[dict[Modality, Tensor] | MediaError]):
    """The rows of a task: for each modality that a row has, the clips of its windows; or why there are none."""

    def __init__(self, dataset: Any, columns: Sequence[Modality], spec: ClipSpec, windows: int, task_name: str) -> None:
        from datasets import Audio, Video

        self._dataset = dataset.select_columns(list(columns))
        for modality in columns:
            feature = dataset.features[modality]
            if not isinstance(feature, Audio | Video):
                raise EncoderError(
                    f"task {task_name}: column {modality} must be a datasets.Audio or datasets.Video, got {feature!r}"
                )
            self._dataset = self._dataset.cast_column(modality, type(feature)(decode=False))
        self._spec = spec
        self._windows = windows
        self._task_name = task_name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: int) -> dict[Modality, Tensor] | MediaError:
        media = {}
        for modality, file in self._dataset[place].items():
            if file is not None:
                name = f"task {self._task_name}, row {place}, {modality} {file['path'] or ''}".strip()
                media[modality] = Medium(name, file["bytes"] or Path(file["path"] or ""))
        try:
            if not media:
                raise MediaError(f"task {self._task_name}, row {place}: no file in {', '.join(self._dataset.features)}")
            clips = _clips(media, self._spec, self._windows)
        except MediaError as error:  # raised in the main process: from a worker, it would come as a traceback
            return error
        stacked: dict[Modality, Tensor] = {}
        if "video" in media:
            stacked["video"] = torch.stack([clip.frames for clip in clips])
        if "audio" in media:
            stacked["audio"] = torch.stack([clip.waveform for clip in clips])
        return stacked


def _clips(media: Mapping[Modality, Medium], spec: ClipSpec, windows: int) -> list[Clip]:
    """The windows of a video and its audio in two files, or of one of them; windows that coincide are decoded once."""
    durations = []
    for modality, medium in media.items():  # the video first: its length is that of the file, as in a manifest
        with medium.open() as container:
            info = read_info(medium, container)
        if not (info.width if modality == "video" else info.has_audio):
            raise MediaError(f"{medium.name}: no {modality} in the file")
        durations.append(info.duration_seconds)
    starts = spread_starts(durations[0], spec.length_seconds, windows)
    with ExitStack() as stack:
        opened = [(medium, stack.enter_context(medium.open())) for medium in media.values()]
        return OpenFile(opened).clips(list(dict.fromkeys(starts)), spec)


def _meta(encoder: ClipEncoder, name: str, revision: str, windows: int, width: int) -> "ModelMeta":
    try:
        from mteb.models import ModelMeta
        from mteb.models.model_meta import ScoringFunction
    except ImportError as error:
        raise ImportError(f"cmacc.standing.mteb needs the extra `mteb`: pip install 'cmacc[mteb]' ({error})") from error
    weights = list(encoder.parameters()) if isinstance(encoder, nn.Module) else None
    return ModelMeta(
        loader=None,
        name=name,
        revision=revision,
        release_date=None,
        languages=None,
        n_parameters=None if weights is None else sum(weight.numel() for weight in weights),
        memory_usage_mb=None if weights is None else sum(weight.nbytes for weight in weights) / 2**20,
        max_tokens=None,
        embed_dim=width,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=list(encoder.modalities),
        citation=_CITATION if isinstance(encoder, CmaccEncoder) else None,
        experiment_kwargs=None if windows == 1 else {"windows": windows},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark or tasks of MTEB; the exit code is 0 on success and 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m cmacc.standing.mteb",
        description="Run a benchmark or tasks of MTEB, which loads their data from the Hugging Face Hub.",
        epilog='example: python -m cmacc.standing.mteb runs/first --benchmark "MVEB(video, v1)" --out standing',
    )
    parser.add_argument("encoder", help="run or export folder, random, statistics or torchvision:MODEL[=WEIGHTS]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--benchmark", help='such as "MVEB(v1)"; tasks that need text are skipped')
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="such as ESC50 VGGSoundAVA2VRetrieval")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, which a later call completes")
    parser.add_argument("--name", default="cmacc/unnamed", help="organization/model (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=1, help="windows per file (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="files per batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    parser.add_argument("--trust-code", action="store_true", help="run the code that a python: tower names")
    options = parser.parse_args(arguments)
    try:
        with trusting_code() if options.trust_code else nullcontext():
            _run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT
    return 0


def _run(options: argparse.Namespace) -> None:
    opened = open_encoder(options.encoder, torch.device(options.device))
    model = CmaccMTEB(opened.encoder, options.name, windows=options.windows)
    import mteb  # after the model, whose error names the extra

    try:
        tasks = list(
            mteb.get_benchmark(options.benchmark) if options.benchmark else mteb.get_tasks(tasks=options.tasks)
        )
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    fitting = [task for task in tasks if model.fits(task)]
    others = ", ".join(task.metadata.name for task in tasks if not model.fits(task))
    if not fitting:
        raise EncoderError(
            f"encoder {options.encoder}: must have the modalities of a task, "
            f"got {', '.join(opened.encoder.modalities)} for {others}"
        )
    if others:
        print(f"skipped, since they need more than {', '.join(opened.encoder.modalities)}: {others}", file=sys.stderr)
    results = mteb.evaluate(
        model,
        fitting,
        cache=mteb.ResultCache(options.out),
        encode_kwargs={"batch_size": options.batch_size},
        num_proc=options.workers,
    )
    for result in results.task_results:
        print(f"{result.task_name:<40} {result.get_score():.4f}")


if __name__ == "__main__":
    sys.exit(main())
