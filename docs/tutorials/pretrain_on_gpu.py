# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pretrain on a GPU
#
# A notebook for a hosted GPU service. It renders a world of videos, trains on it, evaluates, and
# shows the report. It mounts nothing and needs no account. Without a GPU it trains for less time.
#
# First install cmacc from its repository (put its owner in the place of OWNER):

# %%
# %pip install --quiet "cmacc[search,app] @ git+https://github.com/OWNER/cmacc"

# %%
import html
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from cmacc.clips import AugmentConfig, ClipSpec, Manifest, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.encoders import EncoderConfig
from cmacc.pretraining import (
    DataConfig,
    OptimConfig,
    PretrainConfig,
    autocast_dtype,
    default_device,
    pretrain,
    start_run,
)
from cmacc.search import Index, embed_files
from cmacc.transfer import EvaluateOptions, evaluate, results_table
from cmacc.viewer import write_report

# %% [markdown]
# ## The machine
#
# With `precision="auto"`, the default, training uses bf16 on a machine that has units for it, and
# float32 otherwise.

# %%
device = default_device()
ON_GPU = device.type == "cuda"
name = torch.cuda.get_device_name(device) if ON_GPU else "CPU"
print(f"{name}, precision {autocast_dtype('auto', device) or torch.float32}")

CLIPS = 2000 if ON_GPU else 200
STEPS = 2000 if ON_GPU else 100
SIZE = 64 if ON_GPU else 32  # pixels
OUT = Path(tempfile.mkdtemp(prefix="cmacc-gpu-"))

# %% [markdown]
# ## Data
#
# Rendered clips of eight classes, in which what moves causes what is heard. To use your own videos,
# put their folder in the place of `videos`.

# %%
world = WorldConfig(clip_count=CLIPS, class_count=8, nuisance=0.3, frame_size=SIZE, duration_seconds=2.0)
videos = write_world(world, OUT / "videos", workers=1)
manifest = scan(list_folders([videos]), test_fraction=0.2).manifest
manifest.write(OUT / "videos.parquet")
held_out = Manifest([manifest.records[i] for i in manifest.ids_where(lambda record: record.split == "test")])
print(f"{len(manifest) - len(held_out)} files to train on, {len(held_out)} held out")

# %% [markdown]
# ## Training
#
# If the session ends, run this cell again without `start_run`: `pretrain` goes on from the last
# checkpoint.

# %%
config = PretrainConfig(
    data=DataConfig(
        manifest=OUT / "videos.parquet",
        clip=ClipSpec(
            frame_count=8 if ON_GPU else 6,
            frame_rate_hz=4.0,
            frame_height=SIZE,
            frame_width=SIZE,
            audio_seconds=2.0 if ON_GPU else 1.5,
        ),
        augment=AugmentConfig(min_crop_area=0.8, grey_probability=0.0, gain_db=3.0),
        clips_per_video=2,
        workers=2 if ON_GPU else 0,
        start_method="fork",
    ),
    encoder=EncoderConfig() if ON_GPU else EncoderConfig(mel_bins=40, hidden_size=128, embedding_size=64),
    optim=OptimConfig(batch_size=64 if ON_GPU else 16, steps=STEPS),
    tracker="none",
)
losses: list[float] = []
seconds: list[float] = []


def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
    """Remember the loss and the time of every step, and print ten lines."""
    losses.append(metrics["loss"])
    seconds.append(metrics["seconds/step"])
    if done % max(1, total // 10) == 0:
        print(f"step {done} of {total}: loss {np.mean(losses[-20:]):.2f}, {np.mean(seconds[-20:]):.2f} s per step")


start_run(config, OUT / "run")
pretrain(OUT / "run", on_step=on_step)

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(losses)
axis.set_xlabel("step")
axis.set_ylabel("loss")
figure.savefig(OUT / "loss.png")

# %% [markdown]
# ## Results
#
# Retrieval between the two halves of held-out clips, and linear probes that use the labels of the
# rendered classes. Each is also measured on the same encoders without training.

# %%
options = EvaluateOptions(windows=1, workers=0, cache=OUT / "cache")
card = evaluate(str(OUT / "run"), ["pairs", "labelled"], OUT / "videos.parquet", OUT / "run", options=options)
print(results_table(card))

# %% [markdown]
# ## Search
#
# The held-out clips whose pictures are nearest to the sound of the first one:

# %%
embed_files(str(OUT / "run"), held_out, OUT / "videos.index", root=videos, device=device)
index = Index.open(OUT / "videos.index", device=device)
answer = index.search(held_out.records[0].path, by="audio", into="video", top=5, false_alarm_rate=1.0)
for place, moment in enumerate(answer.moments, start=1):
    print(f"{place}. {Path(moment.path).name}  score {moment.score:.2f}  {moment.label}")

# %% [markdown]
# ## The report
#
# One HTML page without links to a network, shown here and saved in the run's folder.


# %%
class Page:
    """Shows an HTML file inside of a notebook, on services too that do not serve local files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{text}" width="100%" height="800" style="border: 0"></iframe>'


report = write_report(OUT / "run")
print(f"all files are in {OUT}")
Page(report)
