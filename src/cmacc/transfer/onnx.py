"""Export encoders as ONNX graphs from uint8 frames or float32 waveforms, checked against torch.

The preprocessing (normalised pixels, log-mel) is inside the graph, so that nobody has to reimplement it in another
language and get it slightly wrong. The required packages are heavy and few users need them: the extra ``export``.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmacc.pretraining.clip_encoder import Modality
from cmacc.pretraining.cmacc_encoder import CmaccEncoder

INPUT_NAMES: dict[Modality, str] = {"video": "frames", "audio": "waveforms"}
OUTPUT_NAMES = ("feature", "embedding")
# Float32 sums in another order differ by about 1e-7. A wrong graph differs by 1e-2 and more.
TOLERANCE = 1e-4
_CHECKED_BATCH_SIZES = (1, 3)


class ExportError(ValueError):
    """An export that cannot be written, or is damaged; the message names the file, and the tensor or setting."""


def from_extra(name: str) -> Any:
    """Import a module of the extra ``export``.

    Raises
    ------
    ExportError
        The module is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"{name} needs the extra `export`: pip install 'cmacc[export]' ({error})") from error


class EncoderGraph(nn.Module):
    """One modality of an encoder, from input to ``(feature, embedding)``.

    Parameters
    ----------
    encoder
        The encoder, in evaluation mode, on the CPU.
    modality
        The modality.
    """

    def __init__(self, encoder: CmaccEncoder, modality: Modality) -> None:
        super().__init__()
        self.encoder = encoder
        self.modality = modality
        self.eval()

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Frames ``(B, T, height, width, 3)`` uint8, or waveforms ``(B, S)`` float32."""
        if self.modality == "video":
            feature = self.encoder.embed_video(inputs)
            return feature, self.encoder.match_video(feature)
        feature = self.encoder.embed_audio(inputs)
        return feature, self.encoder.match_audio(feature)

    def random_inputs(self, batch_size: int, seed: int = 0) -> Tensor:
        """Noise, each clip a tenth as strong as the one before: the logarithm of quiet audio reveals more errors."""
        generator = torch.Generator().manual_seed(seed)
        clip = self.encoder.spec
        strengths = 0.1 ** torch.arange(batch_size)
        if self.modality == "video":
            shape = (batch_size, clip.frame_count, clip.frame_height, clip.frame_width, 3)
            return (torch.rand(shape, generator=generator) * 256 * strengths.view(-1, 1, 1, 1, 1)).to(torch.uint8)
        return (torch.rand(batch_size, clip.sample_count, generator=generator) * 2 - 1) * strengths[:, None]


def write_graph(graph: EncoderGraph, path: Path) -> float:
    """Write an ONNX file and compare it with torch, on random inputs of several batch sizes.

    Parameters
    ----------
    graph
        The encoder of one modality.
    path
        File to write.

    Returns
    -------
    float
        The largest `largest_difference`; at most `TOLERANCE`.

    Raises
    ------
    ExportError
        The extra ``export`` is not installed, the encoder cannot be converted (a tower that is a graph already, or has
        NumPy at its front), or the graph differs from torch. The file may exist then.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        from_extra(name)
    # The exporter warns about its own internals. Whether the graph is correct is measured below.
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                graph,
                (graph.random_inputs(2),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT_NAMES[graph.modality]],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            name = getattr(graph.encoder.pair.config, graph.modality)
            raise ExportError(
                f"{path.name}: encoder.{graph.modality}={name} cannot be converted to ONNX; export it without --onnx"
            ) from error
    _name_outputs(program)
    model = program.model_proto
    _forget_source_lines(model)
    path.write_bytes(model.SerializeToString())
    difference = max(largest_difference(graph, path, graph.random_inputs(size, size)) for size in _CHECKED_BATCH_SIZES)
    if not difference <= TOLERANCE:  # also where it is NaN
        raise ExportError(f"{path.name}: must differ from torch by at most {TOLERANCE:g}, got {difference:.3g}")
    return difference


def largest_difference(graph: EncoderGraph, path: Path, inputs: Tensor) -> float:
    """The largest difference between the results of onnxruntime and torch.

    Returns
    -------
    float
        Largest absolute difference of features and embeddings; each relative to its largest value if that is above one.

    Raises
    ------
    ExportError
        The extra ``export`` is not installed.
    """
    onnxruntime = from_extra("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = session.run(list(OUTPUT_NAMES), {INPUT_NAMES[graph.modality]: inputs.numpy()})
    with torch.no_grad():
        wanted = graph(inputs)
    differences = [
        (torch.from_numpy(got) - want).abs().max() / want.abs().max().clamp_min(1)
        for got, want in zip(results, wanted, strict=True)
    ]
    return float(torch.stack(differences).max())


def _name_outputs(program: Any) -> None:
    # Not by the exporter's `output_names`: it names CLIP's lookup of positions `embedding`, too.
    graph = program.model.graph
    for value in (*graph.initializers.values(), *(value for node in graph for value in node.outputs)):
        if value.name in OUTPUT_NAMES:
            value.name += "_inside"
    for value, name in zip(graph.outputs, OUTPUT_NAMES, strict=True):
        value.name = name


def _forget_source_lines(model: Any) -> None:
    # The exporter records the source line of every operation, with its path on this machine.
    for graph in (model.graph, *model.functions):
        for part in (*graph.node, *graph.value_info):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
