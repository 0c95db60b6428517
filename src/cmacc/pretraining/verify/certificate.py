"""The certificate of ``cmacc verify``: short runs on this machine that must give the same numbers.

Each line compares two ways to compute one thing: with and without an interruption, by one process and by several, whole
and in chunks, and so on. It states what was compared, the difference, and how large that may be. A line that cannot be
measured here is skipped, with its reason. A line that raises an error has failed; the others go on.

The training lines run a few steps on clips of noise, with the user's settings except for a few (`cut`). Noise is as
good as any data here, and there is nothing to decode.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from cmacc.clips import ClipSpec
from cmacc.clips.progress import Progress, silent
from cmacc.encoders import EncoderConfig
from cmacc.pretraining.config import DataConfig, DictionaryConfig, PretrainConfig
from cmacc.pretraining.learner import default_device
from cmacc.pretraining.verify.choice import drawn_by_k_means, drawn_by_the_dictionary
from cmacc.pretraining.verify.lines import Line, Subject, bf16_is_near, chunks, compiled, interrupted
from cmacc.pretraining.verify.loader import loader_order
from cmacc.pretraining.verify.ranks import over_processes

_DEFAULTS = PretrainConfig(
    data=DataConfig(
        # Not fewer frames: with a depth of two in the last convolution, torch 2.15 gets the gradient of its weights
        # wrong in bf16 on CPUs with avx512_bf16 (docs/verify.md).
        clip=ClipSpec(frame_count=8, frame_rate_hz=8.0, frame_height=16, frame_width=16, audio_seconds=0.5)
    ),
    encoder=EncoderConfig(embedding_size=16, hidden_size=24, mel_bins=16),
    dictionary=DictionaryConfig(selector="active"),
)
_BATCH_SIZE = 8
# Adam divides a gradient by its own size. At a high rate, rounding errors of weights that hardly matter grow.
_MOST_RATE = 1e-5


def verify(
    config: PretrainConfig | None = None,
    *,
    device: torch.device | None = None,
    processes: int = 2,
    progress: Progress = silent,
) -> list[Line]:
    """Check that training is right on this machine.

    Several processes are started by *spawn*, which imports the main module again: a script that calls this function
    must do so under ``if __name__ == "__main__"``.

    Parameters
    ----------
    config
        Settings of a run, cut as `cut` says. Default: small encoders and clips, with the active dictionary.
    device
        Device to train on. Default: a GPU if there is one, else the CPU. On a GPU, rounding depends on the order of
        sums, so no line promises equal bits there. Processes without a GPU each are compared on the CPU.
    processes
        The largest number of processes; powers of two up to it are compared with one process.
    progress
        Called with ("lines", groups of lines done, groups in total).

    Returns
    -------
    list of Line
        In the order of the table.

    Raises
    ------
    ValueError
        ``processes`` is less than 1, or the objective is not ``cross_modal`` alone.
    """
    subject = subject_of(config, device=device, processes=processes)
    lines: list[Line] = []
    groups = _groups(subject)
    for number, (name, measure) in enumerate(groups):
        progress("lines", number, len(groups))
        began = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # whatever it is, the other lines are worth having
            found = [Line(name, "", None, None, False, _one_line(error))]
        # Lines that are measured together share the time.
        seconds = (time.perf_counter() - began) / len(found)
        lines += [replace(line, seconds=seconds) for line in found]
    progress("lines", len(groups), len(groups))
    return lines


def subject_of(
    config: PretrainConfig | None = None, *, device: torch.device | None = None, processes: int = 2
) -> Subject:
    """What `verify` verifies with these arguments.

    Raises
    ------
    ValueError
        ``processes`` is less than 1, or the objective is not ``cross_modal`` alone.
    """
    if processes < 1:
        raise ValueError(f"verify: processes must be at least 1, got {processes}")
    config = config or _DEFAULTS
    terms = config.objective.terms.weights()
    if terms.keys() != {"cross_modal"}:  # its lines are about dictionaries and chunks
        raise ValueError(f"verify: objective.terms must be cross_modal alone, got {', '.join(terms)}")
    return Subject(cut(config, processes), device or default_device(), processes)


def cut(config: PretrainConfig, processes: int) -> PretrainConfig:
    """The settings that are verified: those of a run, with few and small steps.

    Changed are batch size, dictionary and pool, and what depends on them; the learning rate, at most 1e-5, without
    warm-up; chunks and compilation, which have lines of their own. Without a dictionary, ``active`` is verified.
    Encoders, clips, augmentation, objective, precision, norm and seed stay as they are.
    """
    size = max(_BATCH_SIZE, 2 ** (processes - 1).bit_length())
    given = config.dictionary
    every = min(given.select_every, 2)
    dictionary = replace(
        given,
        selector="active" if given.selector == "none" else given.selector,
        size=3 * size,
        pool_size=4 * size,
        select_every=every,
        refresh_every=min(given.refresh_every, 2),
        warmup_steps=min(given.warmup_steps, 1),
    )
    rate = config.train.backbone_learning_rate
    return replace(
        config,
        dictionary=dictionary,
        batches=replace(
            config.batches, selector="random", group_size=min(config.batches.group_size or 4, size), start_epoch=1
        ),
        train=replace(
            config.train, compile=False, backbone_learning_rate=None if rate is None else min(rate, _MOST_RATE)
        ),
        optim=replace(
            config.optim,
            batch_size=size,
            chunk_size=None,
            steps=100,
            warmup_steps=0,
            learning_rate=min(config.optim.learning_rate, _MOST_RATE),
        ),
    )


def title(subject: Subject) -> str:
    """What was verified, in a line: the device, torch, and the sizes."""
    config, clip = subject.config, subject.config.data.clip
    name = (
        torch.cuda.get_device_name(subject.device) if subject.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    )
    return (
        f"{name}, torch {torch.__version__}; {config.encoder.video} and {config.encoder.audio}, clips of "
        f"{clip.frame_count} x {clip.frame_height} x {clip.frame_width} and {clip.audio_seconds:g} s; "
        f"cut to batches of {config.optim.batch_size}, dictionaries of {config.dictionary.size}, "
        f"pools of {config.dictionary.pool_size}"
    )


def _groups(subject: Subject) -> list[tuple[str, Callable[[], list[Line]]]]:
    """The lines in groups that are measured together, with the name of the line if that raises an error."""
    counts = [2**power for power in range(1, subject.processes.bit_length())]
    return [
        ("interrupted = uninterrupted, dictionary", partial(interrupted, subject, "dictionary")),
        ("interrupted = uninterrupted, active batches", partial(interrupted, subject, "active batches")),
        *((f"{count} processes = 1", partial(over_processes, subject, count)) for count in counts),
        ("gradient caching = one big batch", partial(chunks, subject)),
        ("compiled = eager", partial(compiled, subject)),
        ("bf16 near fp32", partial(bf16_is_near, subject)),
        ("k-means++ seeding", partial(drawn_by_k_means, subject)),
        ("choice of the dictionary", partial(drawn_by_the_dictionary, subject)),
        ("order of the loader", partial(loader_order, subject)),
    ]


def _one_line(error: Exception) -> str:
    # An error of a spawned process carries its whole traceback, with the reason at its end.
    last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    return f"{type(error).__name__}: {last.strip()}" if last else type(error).__name__
