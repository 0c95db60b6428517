"""Video and audio representations from unlabelled video, by cross-modal active contrastive coding (CM-ACC)."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmacc.transfer import PretrainedEncoder


def load(name: Path | str, *, revision: str | None = None) -> "PretrainedEncoder":
    """The trained encoders of a run or export, an `AudioVisualEncoder` on the CPU and in evaluation mode.

    Call it as ``encoder(video=..., audio=...)`` with the results of `cmacc.clips.to_video` and `cmacc.clips.LogMel`.

    Parameters
    ----------
    name
        A run or export folder; or ``user/name``, an export on the Hugging Face hub, which is downloaded if it is not in
        the hub's cache (extra ``export``).
    revision
        Branch, tag or commit on the hub; by default, its main branch.

    Raises
    ------
    ValueError
        There is neither a run with a checkpoint nor an export, or it is damaged, or it needs newer packages, or the hub
        cannot be asked.
    """
    # Imported here so that `from cmacc.negatives import ActiveDictionary` imports nothing else.
    from cmacc.transfer import PretrainedEncoder

    return PretrainedEncoder.from_pretrained(name, revision=revision)
