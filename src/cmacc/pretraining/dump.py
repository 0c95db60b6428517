"""What is kept of a step whose loss or gradients are not finite, to find out why.

``non-finite/step-00000041-rank-0/`` in the run folder holds

* ``state.json``: the reason, the samples, and which inputs and gradients are not finite;
* ``inputs.safetensors``: the inputs of the encoders, as augmented, by modality. To load them::

      inputs = safetensors.torch.load_file("runs/mine/non-finite/step-00000041-rank-0/inputs.safetensors")
      encoder(**inputs)
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cmacc.clips.storage import fsync_path, fsync_tree
from cmacc.encoders import Modality

DUMPS_FOLDER = "non-finite"
_MOST_NAMES = 100


@torch.no_grad()
def write_dump(
    run_dir: Path,
    step: int,
    rank: int,
    *,
    reason: str,
    sample_ids: Sequence[int],
    inputs: Mapping[Modality, Tensor],
    model: nn.Module,
    paths: Sequence[str] | None = None,
) -> Path:
    """Write the part of a process of a step that is not finite.

    Parameters
    ----------
    run_dir
        Run folder.
    step, rank
        The step, and the number of this process.
    reason
        What was not finite.
    sample_ids
        Sample ids of the rows of ``inputs``.
    inputs
        Inputs of the encoders on this process, by modality.
    model
        Query encoders, with the gradients of the step, if any.
    paths
        Files of the samples, if known.

    Returns
    -------
    Path
        The folder of the dump. It is complete: it has its name only after everything is on disk.

    Raises
    ------
    OSError
        The dump cannot be written. Nothing of it is left.
    """
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    bad_gradients = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    bad_weights = [name for name, weight in model.state_dict().items() if not bool(weight.isfinite().all())]
    state: dict[str, Any] = {
        "step": step,
        "rank": rank,
        "reason": reason,
        "sample_ids": list(sample_ids),
        "paths": None if paths is None else list(paths),
        "inputs": {modality: _described(rows, sample_ids) for modality, rows in inputs.items()},
        "gradients": {"count": len(gradients), "not_finite": len(bad_gradients), "names": bad_gradients[:_MOST_NAMES]},
        "weights_and_buffers": {"not_finite": len(bad_weights), "names": bad_weights[:_MOST_NAMES]},
    }
    folder = run_dir / DUMPS_FOLDER / f"step-{step:08d}-rank-{rank}"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        (aside / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        save_file(
            {name: rows.detach().cpu().contiguous() for name, rows in inputs.items()}, aside / "inputs.safetensors"
        )
        fsync_tree(aside)
        if folder.exists():  # from before the run was resumed
            shutil.rmtree(folder)
        aside.replace(folder)
        fsync_path(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _described(rows: Tensor, sample_ids: Sequence[int]) -> dict[str, Any]:
    finite = rows.isfinite().flatten(1).all(1).tolist()
    bad = [sample_id for sample_id, is_finite in zip(sample_ids, finite, strict=True) if not is_finite]
    return {"shape": list(rows.shape), "dtype": str(rows.dtype).removeprefix("torch."), "not_finite_samples": bad}
