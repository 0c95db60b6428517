"""``hf:FOLDER_OR_ID``: models of transformers, from a folder or from the local cache of the hub.

How a model is called stands in two small tables, by the ``model_type`` of its config. Parts that a tower does not need,
such as the text encoder of CLIP, are removed after loading: they would cost memory, and parameters without a gradient
stop DistributedDataParallel.

Models with a spectrogram at their front get it from the library's own feature extractor: NumPy on the CPU, without
gradient. All else is computed on the device.
"""

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmacc.encoders.modality import Modality
from cmacc.encoders.towers.tower import FramePoolingName, Tower, TowerError, TowerInput, VideoTower
from cmacc.encoders.towers.weights import from_extra

_CONFIGS = ("config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_DOWNLOADED = ("*.json", "*.txt", "*.model", "*.safetensors")
_HOP_SECONDS = 0.01  # of the spectrogram in `ASTFeatureExtractor`


@dataclass(frozen=True)
class _How:
    """How a kind of model becomes a tower.

    Attributes
    ----------
    encode
        Calls the network; for audio, the feature extractor is its first argument.
    feature_size
        Setting with the size of the features, as a path in the config.
    project
        Of audio: calls what projects the output of ``encode`` into the space of the model's texts, if it has one.
    part
        The module to take; empty for the whole model.
    unused
        Paths of parts that ``encode`` does not need, where the model has them.
    frame_count
        Setting with the number of frames; empty if any number will do.
    takes_clips
        Whether it takes whole clips, not images.
    """

    encode: Callable[..., Tensor]
    feature_size: str
    project: Callable[..., Tensor] | None = None
    part: str = ""
    unused: tuple[str, ...] = ()
    frame_count: str = ""
    takes_clips: bool = False


def _video_mae(network: nn.Module, clips: Tensor) -> Tensor:
    tokens: Tensor = network(pixel_values=clips.transpose(1, 2)).last_hidden_state
    return tokens.mean(dim=1)


def _v_jepa(network: nn.Module, clips: Tensor) -> Tensor:
    tokens: Tensor = network(pixel_values_videos=clips.transpose(1, 2), skip_predictor=True).last_hidden_state
    return tokens.mean(dim=1)


def _pe_video(network: Any, clips: Tensor) -> Tensor:
    pooled = network.video_encoder(pixel_values_videos=clips.transpose(1, 2).contiguous()).pooler_output
    features: Tensor = network.video_head(pooled)
    return features


def _image_features(network: Any, images: Tensor) -> Tensor:
    features: Tensor = network.get_image_features(pixel_values=images).pooler_output
    return features


def _siglip2(network: Any, images: Tensor) -> Tensor:
    """SigLIP 2 (NaFlex) takes patches, ``(B, N, p * p * 3)``, and how many there are along each axis."""
    size = network.config.vision_config.patch_size
    rows, columns = images.shape[2] // size, images.shape[3] // size
    patches = images.unflatten(2, (rows, size)).unflatten(4, (columns, size)).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(len(images), rows * columns, -1)
    features: Tensor = network.get_image_features(
        pixel_values=patches,
        pixel_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.int32),
        spatial_shapes=torch.tensor([[rows, columns]], device=images.device).expand(len(images), 2),
    ).pooler_output
    return features


def _pooled(network: nn.Module, images: Tensor) -> Tensor:
    features: Tensor | None = getattr(network(pixel_values=images), "pooler_output", None)
    if features is None:
        raise TowerError(f"tower of {type(network).__name__}: must be a model with a pooled output, got one without")
    return features.flatten(1)


def _spectrogram(extractor: Any, waveforms: Tensor, key: str, longest_seconds: float) -> Tensor:
    seconds = waveforms.shape[1] / extractor.sampling_rate
    if seconds > longest_seconds:  # the extractors would cut the rest off without a word, one of them at a random place
        raise TowerError(
            f"tower of {type(extractor).__name__}: takes at most {longest_seconds:g} s of audio, got {seconds:g} s"
        )
    arrays = waveforms.detach().cpu().float().numpy()
    extracted = extractor(list(arrays), sampling_rate=extractor.sampling_rate, return_tensors="pt")[key]
    return torch.as_tensor(extracted, dtype=torch.float32, device=waveforms.device)


def _ast(extractor: Any, network: nn.Module, waveforms: Tensor) -> Tensor:
    spectrograms = _spectrogram(extractor, waveforms, "input_values", extractor.max_length * _HOP_SECONDS)
    features: Tensor = network(input_values=spectrograms).pooler_output
    return features


def _clap(extractor: Any, network: Any, waveforms: Tensor) -> Tensor:
    spectrograms = _spectrogram(extractor, waveforms, "input_features", float(extractor.max_length_s))
    # The extractor marks one random clip of a batch as longer; its feature would depend on the draw.
    is_longer = torch.zeros(len(waveforms), 1, dtype=torch.bool, device=waveforms.device)
    pooled: Tensor = network.audio_model(input_features=spectrograms, is_longer=is_longer).pooler_output
    return pooled


def _clap_projection(network: Any, pooled: Tensor) -> Tensor:
    return functional.normalize(network.audio_projection(pooled), dim=-1)


def _speech(extractor: Any, network: nn.Module, waveforms: Tensor) -> Tensor:
    if extractor.do_normalize:
        variances, means = torch.var_mean(waveforms, dim=1, correction=0, keepdim=True)
        waveforms = (waveforms - means) / (variances + 1e-7).sqrt()
    states: Tensor = network(input_values=waveforms).last_hidden_state
    return states.mean(dim=1)


def _pe_audio(extractor: Any, network: Any, waveforms: Tensor) -> Tensor:
    missing = -waveforms.shape[1] % extractor.hop_length
    padded = functional.pad(waveforms[:, None], (0, missing), mode="reflect")
    pooled: Tensor = network.audio_encoder(input_values=padded).pooler_output
    return pooled


def _pe_audio_projection(network: Any, pooled: Tensor) -> Tensor:
    features: Tensor = network.audio_head(pooled)
    return features


_PE_VIDEO_UNUSED = ("text_model", "text_video_head", "text_video_logit_scale", "text_video_logit_bias")
_PE_AUDIO_UNUSED = ("text_model", "text_audio_head", "text_audio_logit_scale", "text_audio_logit_bias")
# In fused models, for audio of more than ten seconds.
_CLAP_FUSION = tuple(f"audio_model.audio_encoder.patch_embed.{part}" for part in ("fusion_model", "mel_conv2d"))
_SIGLIP_UNUSED = ("text_model", "logit_scale", "logit_bias")

_VIDEO = {
    "videomae": _How(_video_mae, "hidden_size", frame_count="num_frames", takes_clips=True),
    "vjepa2": _How(_v_jepa, "hidden_size", unused=("predictor",), frame_count="frames_per_clip", takes_clips=True),
    "pe_video": _How(_pe_video, "text_config.hidden_size", unused=_PE_VIDEO_UNUSED, takes_clips=True),
    "pe_audio_video": _How(
        _pe_video, "text_config.hidden_size", part="video_model", unused=_PE_VIDEO_UNUSED, takes_clips=True
    ),
    "clip": _How(_image_features, "projection_dim", unused=("text_model", "text_projection", "logit_scale")),
    "siglip": _How(_image_features, "vision_config.hidden_size", unused=_SIGLIP_UNUSED),
    "siglip2": _How(_siglip2, "vision_config.hidden_size", unused=_SIGLIP_UNUSED),
}
_AUDIO = {
    "audio-spectrogram-transformer": _How(_ast, "hidden_size"),
    "clap": _How(
        _clap,
        "projection_dim",
        _clap_projection,
        unused=("text_model", "text_projection", "logit_scale_a", "logit_scale_t", *_CLAP_FUSION),
    ),
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "data2vec-audio"), _How(_speech, "hidden_size")),
    "pe_audio": _How(_pe_audio, "text_config.hidden_size", _pe_audio_projection, unused=_PE_AUDIO_UNUSED),
    "pe_audio_video": _How(
        _pe_audio, "text_config.hidden_size", _pe_audio_projection, part="audio_model", unused=_PE_AUDIO_UNUSED
    ),
}
# Switch off what speech models do in their own training only: masking in time, and dropping layers at random.
_SPEECH_SETTINGS = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}


def hf_tower(
    name: str, modality: Modality, *, frame_pooling: FramePoolingName = "mean", with_weights: bool = True
) -> Tower:
    """A model of transformers.

    Parameters
    ----------
    name
        ``hf:FOLDER`` or ``hf:OWNER/NAME``, which must be in the local cache.
    modality
        What it encodes.
    frame_pooling
        How image models pool their frames; others must have ``mean``.
    with_weights
        Whether to read the weights; the configs are read in either case.

    Raises
    ------
    TowerError
        A library is not installed, there is no such folder or cached model, its kind is not supported for that
        modality, or its files are missing, damaged, or do not fit each other.
    """
    transformers = from_extra(name, "transformers")
    folder = model_folder(name)
    require_plain(name, folder)
    with quiet(transformers):
        config = read_part(name, transformers.AutoConfig, folder)
        how = _how(name, transformers, config, modality)
        if modality == "audio":
            extractor = read_part(name, transformers.AutoFeatureExtractor, folder)
            takes = TowerInput(sample_rate_hz=extractor.sampling_rate)
        else:
            processor = _image_processor(name, transformers, folder)
            count = _setting(name, config, how.frame_count) if how.frame_count else None
            height, width = _frame_size(name, config, processor)
            takes = TowerInput(frame_count=count, frame_height=height, frame_width=width)
        network = _network(name, transformers, folder, config, how, with_weights)
    feature_size = _setting(name, config, how.feature_size)
    if modality == "audio":
        # Not its `repr`: the order of the settings, and the folder, are none of them.
        settings = json.dumps(extractor.to_dict(), sort_keys=True, default=str)
        encode = partial(how.encode, extractor)
        return Tower(name, network, encode, takes, feature_size, project=how.project, settings=settings)
    mean, deviation = _normalisation(processor)
    return VideoTower(
        name,
        network,
        how.encode,
        takes,
        feature_size,
        mean=mean,
        deviation=deviation,
        frame_pooling=None if how.takes_clips else frame_pooling,
    )


def hf_files(name: str) -> list[Path]:
    """Configs and weights of the model; a `TowerError` if it is neither a folder nor cached."""
    folder = model_folder(name)
    return [*(folder / config for config in _CONFIGS if (folder / config).is_file()), *weight_files(folder)]


def download(name: str) -> None:
    """Fetch a model into the local cache, without its code; does nothing for a folder.

    Raises
    ------
    TowerError
        huggingface_hub is not installed, or the hub has no such model or does not answer.
    """
    model = name.removeprefix("hf:")
    if Path(model).is_dir():
        return
    hub = from_extra(name, "huggingface_hub")
    try:
        hub.snapshot_download(model, allow_patterns=list(_DOWNLOADED))
    except Exception as error:  # of the hub, of the connection, of the disk
        raise TowerError(f"tower {name}: cannot be downloaded ({_first_line(error)})") from error


def model_folder(name: str) -> Path:
    """The folder of ``hf:FOLDER``, or of a model in the local cache; a `TowerError` if there is neither."""
    model = name.removeprefix("hf:")
    if model and Path(model).is_dir():
        return Path(model)
    hub = from_extra(name, "huggingface_hub")
    try:
        return Path(hub.snapshot_download(model, local_files_only=True))
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError) as error:
        raise TowerError(
            f"tower {name}: must be a folder, or a model of the hub in the local cache, got neither; "
            "--download fetches a model of the hub"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors with their index, or where there are none, the pickles."""
    for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def model_type(name: str) -> str:
    """The kind of a model as its config.json tells it; a `TowerError` if that cannot be read."""
    told = _told(name, model_folder(name) / "config.json")
    return str(told.get("model_type")) if isinstance(told, dict) else ""


def hf_modality(name: str) -> Modality:
    """What a model encodes; PE-AV, which encodes both: ``video``."""
    kind = model_type(name)
    return "audio" if kind in _AUDIO and kind not in _VIDEO else "video"


def _told(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TowerError(f"tower {name}: {path} cannot be read ({error})") from error


def require_plain(name: str, folder: Path) -> None:
    """Refuse a config that would have libraries fetch something by a name in it: kernels (code), or another model."""
    path = folder / "config.json"
    rest = [_told(name, path)]
    while rest:
        part = rest.pop()
        rest += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        for key, value in part.items() if isinstance(part, dict) else ():
            fetches = ("attn_implementation" in key and "/" in str(value)) or (
                key == "architecture" and ":" in str(value)
            )
            if fetches:
                raise TowerError(f"tower {name}: {key} in {path} must not name something to fetch, got {value!r}")


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the library's remarks and progress bars on loading: what is missing, `load_model` says itself."""
    logging = transformers.utils.logging
    before, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(io.StringIO()):  # PE-AV prints an error about one of its own docstrings
            yield
    finally:
        logging.set_verbosity(before)
        if has_bars:
            logging.enable_progress_bar()


def read_part(name: str, auto: Any, folder: Path) -> Any:
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds of errors for a damaged or missing file
        raise TowerError(f"tower {name}: {folder} has no {auto.__name__} ({_first_line(error)})") from error


def _image_processor(name: str, transformers: Any, folder: Path) -> Any:
    """The folder's processor of videos if it has one, else of images."""
    if (folder / "video_preprocessor_config.json").is_file():
        return read_part(name, transformers.AutoVideoProcessor, folder)
    return read_part(name, transformers.AutoImageProcessor, folder)


def _how(name: str, transformers: Any, config: Any, modality: Modality) -> _How:
    table = _VIDEO if modality == "video" else _AUDIO
    how = table.get(config.model_type)
    if how is not None:
        return how
    if modality == "video" and _is_image_model(transformers, config):
        return _How(_pooled, "hidden_sizes" if hasattr(config, "hidden_sizes") else "hidden_size")
    others = " and image models with a pooled output" if modality == "video" else ""
    raise TowerError(
        f"tower {name}: as an encoder of {modality} it must be one of {', '.join(table)}{others}, "
        f"got {config.model_type}"
    )


def _is_image_model(transformers: Any, config: Any) -> bool:
    videos = transformers.models.auto.modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES
    classes = transformers.MODEL_MAPPING
    if type(config) not in classes or config.model_type in videos:
        return False
    model = classes[type(config)]
    return not isinstance(model, tuple) and model.main_input_name == "pixel_values"


def _network(name: str, transformers: Any, folder: Path, config: Any, how: _How, with_weights: bool) -> nn.Module:
    if how.encode is _speech:
        config.update(_SPEECH_SETTINGS)
    if not with_weights:
        model = transformers.AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
    else:
        part = f"{how.part}." if how.part else ""
        unused = tuple(part + path for path in how.unused)
        model = load_model(
            name, transformers, folder, config, lambda key: key.startswith(part) and not key.startswith(unused)
        )
    network: nn.Module = getattr(model, how.part) if how.part else model
    for path in how.unused:
        owner, _, part = path.rpartition(".")
        module = network.get_submodule(owner)
        if hasattr(module, part):
            delattr(module, part)
    for module in network.modules():
        if isinstance(module, transformers.PreTrainedModel):
            # Where the folder lies: a tower, and so its hash, is the same elsewhere.
            module.name_or_path = module.config.name_or_path = ""
        if isinstance(getattr(module, "mask_token", None), nn.Parameter):  # for pretraining with masked patches alone
            module.register_parameter("mask_token", None)
    return network.train()


def load_model(name: str, transformers: Any, folder: Path, config: Any, is_needed: Callable[[str], bool]) -> nn.Module:
    """The whole model in float32; a `TowerError` if a weight that ``is_needed``, by its name, is not in the files."""
    files = weight_files(folder)
    if not files:
        raise TowerError(f"tower {name}: {folder} must hold weights, model.safetensors, got none")
    try:
        model: nn.Module
        model, found = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=".safetensors" in files[0].name,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            dtype=torch.float32,
        )
    except Exception as error:  # the library raises many kinds of errors for a damaged or missing file
        raise TowerError(f"tower {name}: the weights cannot be read ({_first_line(error)})") from error
    # The library would fill in random weights, and only log it.
    missing = [key for key in sorted(found["missing_keys"]) if is_needed(key)]
    if missing:
        raise TowerError(f"tower {name}: the weights lack {missing[0]}")
    if found["mismatched_keys"]:
        key, got, wanted = min(found["mismatched_keys"])
        raise TowerError(f"tower {name}: {key} must have shape {tuple(wanted)}, got {tuple(got)}")
    return model


def _setting(name: str, config: Any, path: str) -> int:
    """The setting at a path in the config; of a list, the last."""
    value = config
    for step in path.split("."):
        value = getattr(value, step, None)
    value = value[-1] if isinstance(value, list | tuple) and value else value
    if not isinstance(value, int):
        raise TowerError(f"tower {name}: its config must tell {path}, got {value!r}")
    return value


def _frame_size(name: str, config: Any, processor: Any) -> tuple[int, int]:
    """Height and width that the processor makes of every image."""
    if config.model_type == "siglip2":  # its processor keeps the shape of each image, within a number of patches
        side = math.isqrt(processor.max_num_patches) * processor.patch_size
        return side, side
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else None
    size = crop or processor.size
    height, width = (size.get(side) or size.get("shortest_edge") for side in ("height", "width"))
    if not height or not width:
        raise TowerError(f"tower {name}: its processor must make images of one size, got size {dict(size)}")
    return height, width


def _normalisation(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels in [0, 1]; the library's own are of pixels in 0..255 times its factor."""
    white = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if not processor.do_normalize:
        return [0.0] * 3, [1 / white] * 3
    return [value / white for value in processor.image_mean], [value / white for value in processor.image_std]


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
