"""Video and audio representations from unlabelled video, by cross-modal active contrastive coding (CM-ACC)."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmacc.encoders import AudioVisualEncoder


def load(path: Path | str) -> "AudioVisualEncoder":
    """The trained encoders of a run or export folder, on the CPU and in evaluation mode.

    Call it as ``encoder(video=..., audio=...)`` with the results of `cmacc.clips.to_video` and `cmacc.clips.LogMel`.

    Raises
    ------
    ValueError
        The folder holds neither a run with a checkpoint nor an export.
    """
    # Imported here so that `from cmacc.negatives import ActiveDictionary` imports nothing else.
    from cmacc.transfer import load_pair

    return load_pair(Path(path))
