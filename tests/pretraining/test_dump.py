import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cmacc.encoders import Modality
from cmacc.pretraining import dump
from cmacc.pretraining.dump import write_dump


def no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def test_a_dump_says_what_is_not_finite_and_keeps_the_inputs(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(70)), nn.BatchNorm1d(2))
    for number, weight in enumerate(model.parameters()):
        weight.grad = torch.full_like(weight, float("nan") if number >= 20 else 1.0)
    model[70].running_mean.fill_(float("inf"))
    model[0].bias.grad = None  # it took no part in the step
    video = torch.randn(3, 2, 4).transpose(1, 2)
    audio = torch.randn(3, 5, dtype=torch.bfloat16)
    audio[1, 2] = float("inf")
    folder = write_dump(
        tmp_path, 41, 1, reason="a gradient", sample_ids=[7, 8, 9], paths=["a", "b", "c"],
        inputs={"video": video, "audio": audio}, model=model,
    )  # fmt: skip
    assert folder == tmp_path / "non-finite" / "step-00000041-rank-1"
    assert sorted(path.name for path in folder.iterdir()) == ["inputs.safetensors", "state.json"]
    kept = load_file(folder / "inputs.safetensors")
    assert torch.equal(kept["video"], video)
    assert torch.equal(kept["audio"], audio)
    state = json.loads((folder / "state.json").read_text(), parse_constant=no_constant)
    assert {key: state[key] for key in ("step", "rank", "reason", "sample_ids", "paths")} == {
        "step": 41, "rank": 1, "reason": "a gradient", "sample_ids": [7, 8, 9], "paths": ["a", "b", "c"],
    }  # fmt: skip
    assert state["inputs"] == {
        "video": {"shape": [3, 4, 2], "dtype": "float32", "not_finite_samples": []},
        "audio": {"shape": [3, 5], "dtype": "bfloat16", "not_finite_samples": [8]},
    }
    gradients = state["gradients"]
    assert (gradients["count"], gradients["not_finite"], len(gradients["names"])) == (141, 122, 100)
    assert gradients["names"][:2] == ["10.weight", "10.bias"]
    assert state["weights_and_buffers"] == {"not_finite": 1, "names": ["70.running_mean"]}


def test_a_dump_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(reason: str = "the loss") -> Path:
        inputs: dict[Modality, Tensor] = {"video": torch.zeros(1, 2)}
        return write_dump(tmp_path, 0, 0, reason=reason, sample_ids=[3], inputs=inputs, model=nn.Linear(1, 1))

    def found() -> str:
        state: dict[str, str] = json.loads((folder / "state.json").read_text())
        return state["reason"]

    folder = written()
    assert found() == "the loss"

    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dump, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        written("a gradient")
    assert [path.name for path in (tmp_path / "non-finite").iterdir()] == [folder.name]
    assert found() == "the loss"  # the older one
    monkeypatch.undo()
    assert written("an embedding") == folder
    assert found() == "an embedding"
