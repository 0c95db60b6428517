"""The published features of AVE, left in their files, with the labels of `cmacc.heads.ave`.

The heads take tensors, so that features of any encoder need none of this.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmacc.heads.ave import SECONDS, AveData
from cmacc.heads.ave_hdf5 import AveError, FeatureFile


@dataclass(frozen=True, eq=False)
class AveFeatures:
    """Features of all rows, left in their files, with the labels.

    Attributes
    ----------
    video
        Shape (rows, 10, 7, 7, 512) in the published file, or (rows, 10, places, width) or (rows, 10, width).
    audio
        Shape (rows, 10, 128) in the published file, or (rows, 10, width).
    labels
        Shape (rows, 10): as in `AveData`.
    """

    video: FeatureFile
    audio: FeatureFile
    labels: NDArray[np.int64]

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> dict[str, Tensor]:
        """The given rows for a head: ``video`` (rows, 10, places, width), ``audio`` (rows, 10, width), ``labels``.

        In float32, and in memory: with the published features, 1.0 MB a row (`bytes_of`). A video feature without
        places has one place.

        Raises
        ------
        AveError
            A row does not exist, or has a number that is not finite.
        """
        video = torch.from_numpy(self.video.read(rows))
        count, seconds = video.shape[:2]
        return {
            "video": video.reshape(count, seconds, math.prod(video.shape[2:-1]), video.shape[-1]),
            "audio": torch.from_numpy(self.audio.read(rows)),
            "labels": torch.from_numpy(self.labels[np.asarray(rows, np.int64)]),
        }

    def bytes_of(self, rows: int) -> int:
        """Memory that `read` needs for so many rows."""
        return self.video.bytes_of(rows) + self.audio.bytes_of(rows) + 8 * rows * SECONDS


def read_ave_features(root: Path, data: AveData) -> AveFeatures:
    """``visual_feature.h5`` and ``audio_feature.h5`` of a folder; only their shapes are read now.

    Raises
    ------
    AveError
        A file cannot be read, has another number of rows or seconds than the annotations, or the annotations have the
        published number of rows in another order than these files.
    """
    if data.facts.official and not data.facts.published_order:
        # The shapes would fit, and every video would get the labels of another one.
        raise AveError(
            f"AVE annotations of {data.root}: the .h5 features need the rows in the order of the published repository, "
            "got another order; take Annotations.txt from github.com/YapengTian/AVE-ECCV18"
        )
    return _features(root / "visual_feature.h5", root / "audio_feature.h5", data.labels)


def read_background_features(root: Path, data: AveData) -> AveFeatures:
    """``visual_feature_noisy.h5`` and ``audio_feature_noisy.h5``: videos (178 as published) without any event.

    Weak training needs them. Without them no training video has the class background, and a head learns that none is.

    Raises
    ------
    AveError
        A file cannot be read, or the two have different numbers of rows.
    """
    video, audio = root / "visual_feature_noisy.h5", root / "audio_feature_noisy.h5"
    return _features(video, audio, np.full((FeatureFile(video).shape[0], SECONDS), data.background, np.int64))


def _features(video_path: Path, audio_path: Path, labels: NDArray[np.int64]) -> AveFeatures:
    video, audio = FeatureFile(video_path), FeatureFile(audio_path)
    for file, axes in ((video, (3, 4, 5)), (audio, (3,))):
        if file.shape[:2] != labels.shape or len(file.shape) not in axes:
            raise AveError(
                f"AVE features {file.path}: must have {axes[0]} to {axes[-1]} axes and begin with {labels.shape}, one "
                f"row of {SECONDS} seconds per line of the annotations, got shape {file.shape}"
            )
    return AveFeatures(video, audio, labels)
