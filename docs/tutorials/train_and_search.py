# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Train on a folder of videos and search it
#
# From a folder of videos with sound to a search by sound in pictures, and by picture in sounds:
# scan, pretrain, embed, search. No labels are used.
#
# Set `VIDEOS` to a folder of your own, or leave it, and a small folder is rendered: single shapes
# that bounce, spin or swing, each with the sound that its motion makes.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from cmacc.clips import AugmentConfig, ClipSpec, Manifest, decode_clips, list_folders, scan
from cmacc.clips.synthetic import WorldConfig, write_world
from cmacc.encoders import EncoderConfig
from cmacc.pretraining import DataConfig, OptimConfig, PretrainConfig, pretrain, start_run
from cmacc.search import Index, embed_files

VIDEOS = None  # for example "/data/videos"
CLIPS = 200
STEPS = 160
OUT = Path(tempfile.mkdtemp(prefix="cmacc-tutorial-"))

if VIDEOS is None:
    world = WorldConfig(clip_count=CLIPS, class_count=8, nuisance=0.0, frame_size=32, duration_seconds=2.0)
    VIDEOS = write_world(world, OUT / "videos", workers=1)

# %% [markdown]
# ## Scan
#
# Every file is opened once, in a process of its own that may crash without harm. Files without
# sound, silent or black ones and copies are excluded. A fifth of the files is held out: nothing is
# trained on them, so a search among them shows what was learned.
#
# In a shell: `cmacc scan VIDEOS --out videos.parquet --test-fraction 0.2`

# %%
manifest = scan(list_folders([Path(VIDEOS)]), test_fraction=0.2).manifest
manifest.write(OUT / "videos.parquet")
held_out = Manifest([manifest.records[i] for i in manifest.ids_where(lambda record: record.split == "test")])
print(f"{len(manifest) - len(held_out)} files to train on, {len(held_out)} held out")

# %% [markdown]
# ## Pretrain
#
# The settings are small, so that a minute on a CPU is enough: clips of 1.5 s with six frames of
# 32 x 32 pixels. For real videos, leave out `clip`, `encoder` and `augment`; the defaults are
# larger.
#
# In a shell: `cmacc pretrain --data.manifest videos.parquet --out runs/first`

# %%
config = PretrainConfig(
    data=DataConfig(
        manifest=OUT / "videos.parquet",
        clip=ClipSpec(frame_count=6, frame_rate_hz=4.0, frame_height=32, frame_width=32, audio_seconds=1.5),
        augment=AugmentConfig(min_crop_area=0.8, grey_probability=0.0, gain_db=3.0),
        clips_per_video=2,  # two clips each time that a file is opened
        workers=0,
    ),
    encoder=EncoderConfig(mel_bins=40, hidden_size=128, embedding_size=64),
    optim=OptimConfig(batch_size=16, steps=STEPS),
    tracker="none",
)
losses: list[float] = []
start_run(config, OUT / "run")
outcome = pretrain(OUT / "run", on_step=lambda done, total, metrics: losses.append(metrics["loss"]))
print(f"{outcome.step} steps; loss {np.mean(losses[:10]):.2f} at first, {np.mean(losses[-10:]):.2f} at last")

# %% [markdown]
# The loss is decoupled (the positive is not in its denominator), so it may fall below zero.
#
# ## Embed
#
# The index holds one vector per second of picture and one per second of sound, of whole files.
#
# In a shell: `cmacc embed runs/first VIDEOS --out videos.index`

# %%
result = embed_files(str(OUT / "run"), held_out, OUT / "videos.index", root=VIDEOS)
index = Index.open(OUT / "videos.index")
print(f"{result.added} files, {len(index)} windows")

# %% [markdown]
# ## Search
#
# Take the sound of the first held-out file and search for it in pictures. The index holds the file
# itself, so the right answer is known. `false_alarm_rate=1.0` asks for the nearest, however bad.
#
# In a shell: `cmacc search videos.index FILE --by audio --in video --top 5 --false-alarms 1`

# %%
query = held_out.records[0]
answer = index.search(query.path, by="audio", into="video", top=5, false_alarm_rate=1.0)
print(f"pictures nearest to the sound of {query.name}:")
for place, moment in enumerate(answer.moments, start=1):
    is_own = " <- the same file" if Path(moment.path) == Path(query.path).resolve() else ""
    print(f"{place}. {Path(moment.path).name}  score {moment.score:.2f}  {moment.label}{is_own}")

# %% [markdown]
# One query may be luck. Search with every held-out file, both ways, and count at what place its own
# other half comes.


# %%
def place_of_own(path: Path, by: str, into: str) -> int:
    """Place of a file's own other half among all files; 1 is first."""
    found = index.search(path, by=by, into=into, top=len(held_out), false_alarm_rate=1.0).moments
    names = [moment.path for moment in found]
    return names.index(str(path.resolve())) + 1


places = {
    f"{by} into {into}": np.array([place_of_own(Path(record.path), by, into) for record in held_out.records])
    for by, into in (("audio", "video"), ("video", "audio"))
}
count = len(held_out)
print(f"{'search':<18}{'first':>8}{'top 5':>8}{'median place':>14}")
for name, found in places.items():
    print(f"{name:<18}{np.mean(found == 1):>8.1%}{np.mean(found <= 5):>8.1%}{np.median(found):>14.1f}")
print(f"{'chance':<18}{1 / count:>8.1%}{min(1, 5 / count):>8.1%}{(count + 1) / 2:>14.1f}")

# %% [markdown]
# The pictures that were found for the first four sounds (at the left, the picture that belongs to
# the sound):

# %%
figure, axes = plt.subplots(4, 4, figsize=(6, 6), layout="constrained")
for row, record in zip(axes, held_out.records, strict=False):
    found = index.search(record.path, by="audio", into="video", top=3, false_alarm_rate=1.0).moments
    for axis, path in zip(row, [record.path, *(moment.path for moment in found)], strict=False):
        [clip] = decode_clips(path, [0.5], config.data.clip)
        axis.imshow(clip.frames[0].numpy())
for axis in axes.flat:
    axis.axis("off")
for axis, title in zip(axes[0], ("belongs", "first", "second", "third"), strict=True):
    axis.set_title(title)
figure.savefig(OUT / "found.png")

# %% [markdown]
# ## When nothing is there
#
# By default a search answers that nothing was found, unless the best score is higher than that of
# searches for things that are not there. With few files this is strict, and the answer says what a
# small index cannot promise. [Search](../search.md) explains the rate.

# %%
answer = index.search(query.path, by="audio", into="video")
for note in answer.notes:
    print("note:", note)
if answer.moments:
    print(f"found {len(answer.moments)} moments, best score {answer.best_score:.2f}")
else:
    print(f"nothing found: the best score is {answer.best_score:.2f}, and {answer.chance:.0%} of searches for")
    print("something that is not there come as high")

# %% [markdown]
# Next: [more training](../scale.md), [pretrained encoders](../towers.md),
# [an evaluation with labels](evaluate_your_encoder.md).
