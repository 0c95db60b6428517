"""The model card of an export, in the form that the Hugging Face hub reads."""

from typing import Any

from cmacc.encoders import AudioVisualEncoder
from cmacc.pretraining import PretrainConfig


def model_card(config: PretrainConfig, pair: AudioVisualEncoder, plain: dict[str, Any], results: str) -> str:
    """Text of an export's ``README.md``: the contents of its ``config.json`` (``plain``) for people and for the hub.

    Parameters
    ----------
    config, pair
        Config and encoders of the run.
    plain
        Contents of ``config.json``.
    results
        A Markdown table; empty if nothing was measured.
    """
    clip, encoder, dictionary = config.data.clip, config.encoder, config.dictionary
    terms = config.objective.terms.weights()
    negatives = ["the other clips of the batch"] if config.objective.in_batch else []
    if dictionary.selector != "none":
        negatives.append(
            f"a dictionary of {dictionary.size} keys per modality, filled by the selector `{dictionary.selector}` from "
            f"a pool of {dictionary.pool_size}"
        )
    frames = f"{clip.frame_count}, {clip.frame_height}, {clip.frame_width}, 3"
    data = plain["pretraining"]["data"]
    return _CARD.format(
        tags="".join(f"- {tag}\n" for tag in (*_TAGS, *(["onnx"] if plain["onnx"] else []))),
        video=encoder.video,
        audio=encoder.audio,
        video_size=pair.video.feature_size,
        audio_size=pair.audio.feature_size,
        size=encoder.embedding_size,
        clip=clip,
        frames=frames,
        how=_how(config),
        colour=" (converted to grey inside: trained without colour)" if plain["is_grey"] else "",
        differences="; inside, what changes from frame to frame" if encoder.video_input == "differences" else "",
        onnx=_CARD_ONNX.format(frames=frames, clip=clip, **plain["onnx"]) if plain["onnx"] else "",
        step=plain["step"],
        steps=config.optim.steps,
        batch_size=config.optim.batch_size,
        negatives=f"- Negatives: {' and '.join(negatives)}\n" if "cross_modal" in terms else "",
        seed=config.seed,
        data=f"the manifest with fingerprint `{data}`" if data else "a manifest with unknown fingerprint",
        results=results.strip() or "No results were measured before the export.",
    )


def _how(config: PretrainConfig) -> str:
    """How the encoders were trained, and what their outputs are for."""
    terms, modalities = config.objective.terms.weights(), config.objective.trained_modalities
    if terms.keys() == {"cross_modal"}:
        return _CROSS_MODAL
    named = f"trained on unlabelled files by {' and '.join(f'`{name}`' for name in terms)}.\n"
    if config.objective.aligns:
        return named + _OUTPUTS + " in a common space of video and\naudio."
    if len(modalities) == 2:
        return named + _OUTPUTS + ", of video or of\naudio, not in a common space."
    other = "audio" if modalities[0] == "video" else "video"
    return named + _ONE_MODALITY.format(modality=modalities[0], other=other)


_CROSS_MODAL = """\
trained on unlabelled video to match the two halves of a
clip, with cross-modal active contrastive coding ([CM-ACC](https://arxiv.org/abs/2009.09805), Ma et al., ICLR 2021).
Each returns a `feature`, for probes and fine-tuning, and an L2-normalised `embedding` in a common space of video and
audio."""

_OUTPUTS = "Each returns a `feature`, for probes and fine-tuning, and an L2-normalised `embedding`"

_ONE_MODALITY = (
    """\
**Only the {modality} encoder was trained**: the {other} encoder has its first weights, and the embeddings of the two
have nothing in common. """
    + _OUTPUTS
    + "."
)

_TAGS = ("audio-visual", "contrastive-learning", "self-supervised-learning", "feature-extraction", "video", "audio")

_CARD = """\
---
library_name: cmacc
pipeline_tag: feature-extraction
# license: to be chosen by the owner of the weights and of the videos
tags:
{tags}---

# Video and audio encoders of cmacc

A video encoder (`{video}`) and an audio encoder (`{audio}`), {how}

| | video | audio |
|---|---|---|
| input | `frames`, uint8 RGB 0..255{colour}{differences} | `waveforms`, float32 mono in [-1, 1] |
| shape | `(B, {frames})` | `(B, {clip.sample_count})` |
| a clip is | {clip.frame_count} frames, {clip.frame_rate_hz:g} per second | {clip.audio_seconds:g} s at \
{clip.sample_rate_hz} Hz |
| `feature` | `(B, {video_size})` | `(B, {audio_size})` |
| `embedding` | `(B, {size})` | `(B, {size})` |

Video and audio of a clip have the same centre. All further preprocessing is part of the encoders.

## Use

With the Python package `cmacc`:

```python
from pathlib import Path

import torch
from cmacc.transfer import CmaccEncoder
from cmacc.transfer.export import read_export

export = read_export(Path("."))  # this folder, or the result of huggingface_hub.snapshot_download
encoder = CmaccEncoder(export.pair, export.clip, export.is_grey)
with torch.inference_mode():
    video_feature = encoder.embed_video(torch.zeros(2, {frames}, dtype=torch.uint8))
    audio_feature = encoder.embed_audio(torch.zeros(2, {clip.sample_count}))
    similarity = encoder.match_video(video_feature) @ encoder.match_audio(audio_feature).T
```
{onnx}
## Training

- Steps: {step} of {steps}, with batches of {batch_size} clips
{negatives}- Seed: {seed}
- Data: {data}

All settings are in `config.json`. The data is not part of this folder.

## Results

{results}
"""

_CARD_ONNX = """
With onnxruntime only, for batches of any size:

```python
import numpy as np
import onnxruntime

video, audio = (onnxruntime.InferenceSession(name) for name in ("video.onnx", "audio.onnx"))
video_feature, video_embedding = video.run(None, {{"frames": np.zeros((2, {frames}), np.uint8)}})
audio_feature, audio_embedding = audio.run(None, {{"waveforms": np.zeros((2, {clip.sample_count}), np.float32)}})
```

On random inputs, the results differ from torch by at most {differences[video]:.1e} (video) and
{differences[audio]:.1e} (audio), relative to the largest feature. A difference above {tolerance:g} is refused.
"""
