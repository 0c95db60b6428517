"""The two modalities of a clip."""

from typing import Literal, get_args

Modality = Literal["video", "audio"]
"""Name of a modality."""
MODALITIES: tuple[Modality, ...] = get_args(Modality)
"""All modalities, in the order in which they are listed."""
