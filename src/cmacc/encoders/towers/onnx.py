"""``onnx:FILE``: a graph, run by onnxruntime on the CPU. It cannot be trained.

What it takes is read from its one input:

- uint8 ``(M, T, H, W, 3)``, frames, or float32 ``(M, S)``, waveforms: the graphs that ``cmacc export`` writes, and any
  other with its preprocessing inside;
- float32 ``(M, 3, T, H, W)``, clips, or ``(M, 3, H, W)``, images, whose metadata states ``mean`` and ``std`` of pixels
  in [0, 1] as JSON lists of three numbers.

Fixed axes are the sizes of its clips. ``frame_rate_hz`` and ``sample_rate_hz`` come from the ``config.json`` that
``cmacc export`` writes beside its graphs, else from the metadata of those names. The feature is the only output, or the
one called ``feature`` or else ``embedding``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmacc.encoders.modality import Modality
from cmacc.encoders.towers.tower import FramePoolingName, Tower, TowerError, TowerInput, VideoTower
from cmacc.encoders.towers.weights import from_extra

_OUTPUTS = ("feature", "embedding")


class OnnxGraph(nn.Module):
    """An ONNX graph as a module: the bytes of its file as a buffer, the session made at first use.

    As a buffer, the graph goes where weights go: into checkpoints, hashes and copies.

    Parameters
    ----------
    name
        Name of the tower, for messages.
    model
        The bytes of the file.
    output
        Name of the output to return.
    """

    model: Tensor

    def __init__(self, name: str, model: bytes, output: str) -> None:
        super().__init__()
        self._name = name
        self._session: Any = None
        self.output = output
        self.register_buffer("model", torch.frombuffer(bytearray(model), dtype=torch.uint8))

    def forward(self, inputs: Tensor) -> Tensor:
        """The output, on the device of the inputs, without gradient.

        Raises
        ------
        TowerError
            onnxruntime is not installed, or the graph does not take these inputs.
        """
        if self._session is None:
            self._session = _session(self._name, self.model.cpu().numpy().tobytes())
        [slot] = self._session.get_inputs()
        try:
            [output] = self._session.run([self.output], {slot.name: inputs.detach().cpu().numpy()})
        except Exception as error:  # onnxruntime's own kinds, one for each of its states
            raise TowerError(
                f"tower {self._name}: must take shape {tuple(slot.shape)}, got {tuple(inputs.shape)} ({error})"
            ) from error
        return torch.from_numpy(output).to(inputs.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}  # a session can neither be copied nor pickled

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._session = None  # of the bytes before
        super()._load_from_state_dict(*args, **kwargs)


@dataclass(frozen=True)
class _Signature:
    """Input and feature of a graph: axes are sizes, or None where they may vary."""

    dtype: str
    axes: tuple[int | None, ...]
    output: str
    feature_size: int
    metadata: dict[str, str]


def onnx_tower(name: str, modality: Modality, *, frame_pooling: FramePoolingName = "mean") -> Tower:
    """A graph as a tower.

    Parameters
    ----------
    name
        ``onnx:FILE``.
    modality
        What it encodes.
    frame_pooling
        How graphs of images pool their frames; others must have ``mean``.

    Raises
    ------
    TowerError
        onnxruntime is not installed, the file is missing or damaged, or its graph is none of those above.
    """
    file = Path(name.removeprefix("onnx:"))
    try:
        model = file.read_bytes()
    except OSError as error:
        raise TowerError(f"tower {name}: cannot be read ({error})") from error
    signature = _signature(name, _session(name, model))
    network = OnnxGraph(name, model, signature.output)
    rates = _exported_rates(file) or signature.metadata
    frame_rate_hz, sample_rate_hz = (_rate(name, rates, key) for key in ("frame_rate_hz", "sample_rate_hz"))
    axes, size = signature.axes, signature.feature_size
    is_float = signature.dtype == "tensor(float)"
    if modality == "audio":
        if not is_float or len(axes) != 2:
            raise _unfit(name, modality, signature)
        if axes[1] is not None and sample_rate_hz is None:
            raise TowerError(f"tower {name}: takes {axes[1]} samples, so its metadata must state sample_rate_hz")
        seconds = axes[1] / sample_rate_hz if axes[1] is not None and sample_rate_hz is not None else None
        takes = TowerInput(
            audio_seconds=seconds, sample_rate_hz=int(sample_rate_hz) if sample_rate_hz is not None else None
        )
        return Tower(name, network, _waveforms, takes, size, can_train=False)
    if signature.dtype == "tensor(uint8)" and len(axes) == 5 and axes[4] == 3:
        takes = TowerInput(axes[1], frame_rate_hz, axes[2], axes[3])
        return VideoTower(name, network, _frames, takes, size, can_train=False)
    if not is_float or len(axes) not in (4, 5) or axes[1] != 3:
        raise _unfit(name, modality, signature)
    count = axes[2] if len(axes) == 5 else None
    return VideoTower(
        name,
        network,
        _pixels,
        TowerInput(count, frame_rate_hz, axes[-2], axes[-1]),
        size,
        mean=_three(name, signature.metadata, "mean"),
        deviation=_three(name, signature.metadata, "std"),
        frame_pooling=frame_pooling if len(axes) == 4 else None,
        can_train=False,
    )


def onnx_files(name: str) -> list[Path]:
    """The file, and the config of the export beside it."""
    file = Path(name.removeprefix("onnx:"))
    return [file, file.with_name("config.json")] if _exported_rates(file) is not None else [file]


def _waveforms(network: nn.Module, waveforms: Tensor) -> Tensor:
    features: Tensor = network(waveforms.float())
    return features


def _frames(network: nn.Module, video: Tensor) -> Tensor:
    frames = (video.permute(0, 2, 3, 4, 1) * 255).round().clamp(0, 255).to(torch.uint8)
    features: Tensor = network(frames)
    return features


def _pixels(network: nn.Module, inputs: Tensor) -> Tensor:
    features: Tensor = network(inputs.float().contiguous())
    return features


def _session(name: str, model: bytes) -> Any:
    onnxruntime = from_extra(name, "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its idle threads spin, and take the cores from torch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors: warnings are about its own optimisations
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds, one for each of its states
        raise TowerError(
            f"tower {name}: must be an ONNX graph with its weights inside the file (external_data=False), got {error}"
        ) from error


def _signature(name: str, session: Any) -> _Signature:
    inputs, outputs = session.get_inputs(), {output.name: output for output in session.get_outputs()}
    if len(inputs) != 1:
        raise TowerError(f"tower {name}: must have one input, got {', '.join(slot.name for slot in inputs)}")
    names = [output for output in _OUTPUTS if output in outputs] or list(outputs)
    if len(names) > 1 and names[0] not in _OUTPUTS:
        raise TowerError(f"tower {name}: must have one output, or one called feature, got {', '.join(names)}")
    shape = outputs[names[0]].shape
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise TowerError(f"tower {name}: {names[0]} must have shape (M, f) with f fixed, got {tuple(shape)}")
    axes = tuple(axis if isinstance(axis, int) else None for axis in inputs[0].shape)
    return _Signature(inputs[0].type, axes, names[0], shape[1], session.get_modelmeta().custom_metadata_map)


def _exported_rates(file: Path) -> dict[str, Any] | None:
    """Settings of the clips in the ``config.json`` of ``cmacc export`` beside the graph; None if there is none."""
    try:
        told = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    clip = told.get("clip") if isinstance(told, dict) and told.get("library") == "cmacc" else None
    return clip if isinstance(clip, dict) else None


def _rate(name: str, rates: dict[str, Any], key: str) -> float | None:
    if key not in rates:
        return None
    try:
        rate = float(rates[key])
    except (TypeError, ValueError):
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise TowerError(f"tower {name}: its metadata's {key} must be a positive number, got {rates[key]!r}")
    return rate


def _three(name: str, metadata: dict[str, str], key: str) -> list[float]:
    try:
        values = [float(value) for value in json.loads(metadata[key])]
    except (KeyError, TypeError, ValueError):
        values = []
    if len(values) != 3:
        raise TowerError(
            f"tower {name}: takes float pixels, so its metadata must state {key} of pixels in [0, 1] as a JSON list of "
            f"three numbers, got {metadata.get(key)!r}"
        )
    return values


def _unfit(name: str, modality: Modality, signature: _Signature) -> TowerError:
    wanted = {
        "video": "uint8 (M, T, H, W, 3), float (M, 3, T, H, W) or float (M, 3, H, W)",
        "audio": "float waveforms (M, S)",
    }[modality]
    shape = ", ".join("*" if axis is None else str(axis) for axis in signature.axes)
    return TowerError(
        f"tower {name}: as an encoder of {modality} it must take {wanted}, got {signature.dtype} ({shape})"
    )
