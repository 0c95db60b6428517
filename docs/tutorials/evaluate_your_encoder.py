# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Evaluate your own encoder
#
# Any object with `embed_video` or `embed_audio` can be measured by the field's protocols: linear
# probe, nearest neighbours, SVM, with confidence intervals. The results are a card, and cards that
# were made in the same way can be compared.
#
# The data are rendered clips, so that this runs anywhere. The last part says how to use UCF101 and
# ESC-50. A terse version is [03_own_encoder.py](../../examples/03_own_encoder.py).

# %%
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cmacc.clips import ClipSpec, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.transfer import EvaluateOptions, compared, evaluate, results_table

CLIPS = 120
OUT = Path(tempfile.mkdtemp(prefix="cmacc-tutorial-"))

# %% [markdown]
# ## The data
#
# Clips of four classes, which differ in what moves, how it moves and how it sounds. `scan` makes a
# manifest: one row per file, with its folder's name as label.

# %%
world = WorldConfig(clip_count=CLIPS, class_count=4, nuisance=0.1, frame_size=32, duration_seconds=2.0)
write_world(world, OUT / "videos", workers=1)
manifest = scan(list_folders([OUT / "videos"])).manifest
manifest.write(OUT / "videos.parquet")
print(f"{len(manifest)} clips of {len({record.label for record in manifest.records})} classes")

# %% [markdown]
# ## The encoder
#
# It states the size of its clips (`spec`), what it encodes (`modalities`) and where (`device`). The
# clips that it gets have exactly that size. Put your own network in the place of these two sums. If
# it is a `torch.nn.Module`, it can be fine-tuned too, and its features are cached.


# %%
class MotionAndLoudness:
    """Video: how much each part of the picture changes. Audio: the level in intervals of 1/20 s."""

    modalities = ("video", "audio")
    spec = ClipSpec(
        frame_count=8, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=2.0, sample_rate_hz=16_000
    )
    device = torch.device("cpu")

    def embed_video(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) in 0..255 -> (B, 7 * 16)."""
        change = frames.float().mean(dim=4).diff(dim=1).abs()
        return change.unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean(dim=(3, 5)).flatten(1)

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        """(B, samples) in [-1, 1] -> (B, 40)."""
        return waveforms.unflatten(1, (40, -1)).square().mean(dim=2).add(1e-6).log()


# %% [markdown]
# ## Measure
#
# Task `labelled` takes any manifest with labels. With four folds, every clip is held out once. One
# window per clip is enough here, because a clip is no longer than a window.

# %%
options = EvaluateOptions(folds=4, windows=1, workers=0, cache=OUT / "cache")
card = evaluate(
    MotionAndLoudness(),
    ["labelled"],
    OUT / "videos.parquet",
    OUT / "cards" / "own",
    protocols=["linear", "knn", "svm"],
    options=options,
)
print(results_table(card))

# %% [markdown]
# A value stands with its 95 % interval, a bootstrap over the held-out clips. It says how far another
# choice of clips might move the value, and nothing about another seed of your training.
#
# The folder `cards/own` now has `card.json` and `card.md`, with the data's fingerprint, versions and
# hardware.
#
# ## Compare
#
# `statistics` is the baseline for audio: plain log-mel statistics. Measured in the same way on the
# same files, the two cards can be compared. Cards that differ in data, splits, windows or protocol
# are refused.

# %%
baseline = evaluate(
    "statistics",
    ["labelled"],
    OUT / "videos.parquet",
    OUT / "cards" / "statistics",
    protocols=["linear", "knn", "svm"],
    options=options,
)
print(compared([card, baseline], ["own", "statistics"]))

# %% [markdown]
# In a shell, for encoders that have a name:
#
# ```
# cmacc evaluate statistics --task labelled --folds 4 --data videos.parquet --out cards/statistics
# cmacc evaluate --compare cards/*/card.json
# ```
#
# ## UCF101, HMDB51 and ESC-50
#
# The calls are the same, with the name of the data set as the task and its folder as the data. The
# official splits are used, and an incomplete folder is refused (`allow_partial=True` measures what
# is there, and the card says so).
#
# ```python
# ucf = EvaluateOptions(lists=Path("ucfTrainTestlist"), workers=4)
# evaluate(my_encoder, ["ucf101"], Path("UCF-101"), Path("cards/mine"), options=ucf)
# evaluate(my_encoder, ["esc50"], Path("ESC-50"), Path("cards/mine"), options=EvaluateOptions(workers=4))
# ```
#
# `cmacc evaluate --compare` then adds published numbers, each with its source and with what differs
# from it. More in [evaluating encoders](../transfer.md).
