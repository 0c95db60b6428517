"""The two modalities of a clip."""

from typing import Literal, get_args

Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
