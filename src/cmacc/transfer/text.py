"""Text in the space of an encoder's features: queries in words, and prompts made of the names of classes."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cmacc.pretraining.clip_encoder import ClipEncoder, EncoderError, Modality, TextEncoder

DEFAULT_PROMPTS: dict[Modality, tuple[str, ...]] = {"video": ("a video of {}.",), "audio": ("the sound of {}.",)}
"""Templates that names of classes are put into, by modality."""
WITH_TEXT = "hf: towers of CLIP, SigLIP, SigLIP 2, CLAP and PE-AV have one, exports do not"


def text_modalities(encoder: ClipEncoder) -> tuple[Modality, ...]:
    """Modalities whose features text can be compared with; empty if there are none."""
    return encoder.text_modalities if isinstance(encoder, TextEncoder) else ()


@torch.no_grad()
def encode_text(encoder: ClipEncoder, texts: Sequence[str], modality: Modality) -> Float[Tensor, "texts features"]:
    """Embeddings of texts in the space of an encoder's features.

    Parameters
    ----------
    encoder
        From `open_encoder`, or your own `TextEncoder`.
    texts
        At least one.
    modality
        Whose features the texts are compared with: those of `embed_video` or `embed_audio`, by cosine.

    Returns
    -------
    L2-normalised rows, on the encoder's device.

    Raises
    ------
    EncoderError
        The encoder has no text side for that modality, or returns another shape or values that are not finite.
    TowerError
        The text side cannot be opened, or a text is too long for it.

    Examples
    --------
    ```python
    encoder = open_encoder("hf:openai/clip-vit-base-patch32").encoder
    similarity = normalize(encoder.embed_video(frames)) @ encode_text(encoder, ["a dog barks"], "video").T
    ```
    """
    if not isinstance(encoder, TextEncoder) or modality not in encoder.text_modalities:
        raise EncoderError(
            f"encoder {type(encoder).__name__}: must have a text side in the space of its {modality} features, got "
            f"none; {WITH_TEXT}"
        )
    rows = encoder.encode_text(texts, modality)
    if rows.ndim != 2 or len(rows) != len(texts) or not rows.isfinite().all():
        raise EncoderError(
            f"encoder {type(encoder).__name__}: encode_text must give a finite row for each of {len(texts)} texts, got "
            f"shape {tuple(rows.shape)}"
        )
    return functional.normalize(rows.float(), dim=1)


def class_prompt(template: str, label: str) -> str:
    """A template with the name of a class in the place of ``{}``, as words.

    Examples
    --------
    >>> class_prompt("a video of {}.", "pouring_water"), class_prompt("a video of {}.", "ApplyEyeMakeup")
    ('a video of pouring water.', 'a video of Apply Eye Makeup.')
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label.replace("_", " "))
    return template.replace("{}", words)


def class_texts(
    encoder: ClipEncoder, modality: Modality, labels: Sequence[str], templates: Sequence[str]
) -> NDArray[np.float32]:
    """``(templates, classes, features)``: the embedding of every class in every template.

    Raises
    ------
    EncoderError, TowerError
        As in `encode_text`.
    """
    prompts = [class_prompt(template, label) for template in templates for label in labels]
    rows = encode_text(encoder, prompts, modality).cpu().numpy()
    return np.asarray(rows.reshape(len(templates), len(labels), -1), np.float32)
