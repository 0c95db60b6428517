"""Text sides: the text encoders of models that were trained to compare text with pictures or sounds.

`cmacc.encoders.towers.hf` opens the picture or sound side of such a model, and removes the text side. Here it is the
other way round, so that each side can be used, moved and freed alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cmacc.encoders.modality import Modality
from cmacc.encoders.towers.hf import load_model, model_folder, model_type, quiet, read_part, require_plain, weight_files
from cmacc.encoders.towers.tower import TowerError
from cmacc.encoders.towers.weights import from_extra

_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class _How:
    """How a kind of model encodes text.

    Attributes
    ----------
    encode
        Calls the network with the tokenizer's output.
    parts
        Names of the parts that it needs.
    owner
        The module with these parts; empty for the whole model.
    pads_fully
        Whether texts are padded to the longest that the model takes, as it was trained. Whether it also attends to the
        padding, the folder's tokenizer tells: then it gives no mask.
    """

    encode: Callable[[Any, Mapping[str, Tensor]], Tensor]
    parts: tuple[str, ...]
    owner: str = ""
    pads_fully: bool = False


def _features(network: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    features: Tensor = network.get_text_features(**tokens).pooler_output
    return features


def _pe_features(head: str, network: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    states = network.text_model(**tokens, output_hidden_states=True).hidden_states[-1]
    features: Tensor = network.get_submodule(head)(states[:, 0])
    return features


def _pe_video(network: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    return _pe_features("text_video_head", network, tokens)


def _pe_audio(network: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    return _pe_features("text_audio_head", network, tokens)


_SIGLIP = _How(_features, ("text_model",), pads_fully=True)
_HOW: dict[Modality, dict[str, _How]] = {
    "video": {
        "clip": _How(_features, ("text_model", "text_projection")),
        "siglip": _SIGLIP,
        "siglip2": _SIGLIP,
        "pe_video": _How(_pe_video, ("text_model", "text_video_head")),
        "pe_audio_video": _How(_pe_video, ("text_model", "text_video_head"), owner="video_model"),
    },
    "audio": {
        "clap": _How(_features, ("text_model", "text_projection")),
        "pe_audio": _How(_pe_audio, ("text_model", "text_audio_head")),
        "pe_audio_video": _How(_pe_audio, ("text_model", "text_audio_head"), owner="audio_model"),
    },
}


class TextTower(nn.Module):
    """A frozen text encoder, in the space of the features of a tower of video or audio.

    Parameters
    ----------
    name
        Name of the tower, for messages.
    network
        The network.
    encode
        Function of the network and the tokenizer's output that returns ``(B, feature_size)``.
    tokenizer
        The model's own tokenizer.
    longest
        Number of tokens that the model takes.
    pads_fully
        Whether all texts are padded to ``longest``.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        encode: Callable[[Any, Mapping[str, Tensor]], Tensor],
        tokenizer: Any,
        longest: int,
        *,
        pads_fully: bool,
    ) -> None:
        super().__init__()
        self._name = name
        self._encode = encode
        self._tokenizer = tokenizer
        self.network = network
        self.longest = longest
        self.pads_fully = pads_fully

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "texts features"]:
        """L2-normalised embeddings of texts, on the network's device. Compare them with normalised features.

        Raises
        ------
        TowerError
            There is no text, or one has more tokens than the model takes. It is not cut without a word.
        """
        if not texts:
            raise TowerError(f"tower {self._name}: texts must be at least one, got none")
        device = next(self.network.parameters()).device
        rows = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = list(texts[start : start + _TEXTS_AT_ONCE])
            lengths = [len(ids) for ids in self._tokenizer(part)["input_ids"]]
            if max(lengths) > self.longest:
                worst = lengths.index(max(lengths))
                raise TowerError(
                    f"tower {self._name}: a text must have at most {self.longest} tokens, got {lengths[worst]} in "
                    f"{part[worst][:40]!r}"
                )
            tokens = self._tokenizer(
                part,
                padding="max_length" if self.pads_fully else True,
                max_length=self.longest if self.pads_fully else None,
                return_tensors="pt",
            )
            named = {key: value.to(device) for key, value in tokens.items() if key in ("input_ids", "attention_mask")}
            rows.append(functional.normalize(self._encode(self.network, named).float(), dim=1))
        return torch.cat(rows)


class TextSides:
    """The text sides of an encoder's towers, each opened at its first use and then kept.

    Not a module: an encoder's own weights, and their hash, are the same with and without its text.

    Parameters
    ----------
    backbones
        Names of the backbones, by modality.
    """

    def __init__(self, backbones: Mapping[Modality, str]) -> None:
        self._backbones = backbones
        self._towers: dict[Modality, TextTower] = {}

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Modalities whose backbone has a text side."""
        return tuple(modality for modality, name in self._backbones.items() if has_text_side(name, modality))

    def encode(self, texts: Sequence[str], modality: Modality, device: torch.device) -> Float[Tensor, "texts features"]:
        """Embeddings of texts, as in `TextTower.encode_text`, in the space of a modality's features.

        Raises
        ------
        TowerError
            As in `open_text_tower` and `TextTower.encode_text`.
        """
        if modality not in self._towers:
            self._towers[modality] = open_text_tower(self._backbones[modality], modality)
        return self._towers[modality].to(device).encode_text(texts)


def has_text_side(name: str, modality: Modality) -> bool:
    """Whether a backbone is a tower with a text side in the space of its features, by its config.json.

    The towers of an export have none: beside their configs, it holds the weights of the picture and sound sides alone.

    Raises
    ------
    TowerError
        It is ``hf:``, and there is no such folder or cached model.
    """
    is_kind = name.startswith("hf:") and model_type(name) in _HOW[modality]
    return is_kind and bool(weight_files(model_folder(name)))


def open_text_tower(name: str, modality: Modality) -> TextTower:
    """Open the text side of a tower: frozen, in evaluation mode, on the CPU, in float32.

    For a moment the whole model is in memory, then the text side alone.

    Parameters
    ----------
    name
        ``hf:FOLDER`` or ``hf:OWNER/NAME``, which must be in the local cache.
    modality
        Whose features the text is compared with.

    Raises
    ------
    TowerError
        The tower has no text side, a library is not installed, or files are missing, damaged or do not fit each other.
    """
    how = _HOW[modality].get(model_type(name)) if name.startswith("hf:") else None
    if how is None:
        raise TowerError(
            f"tower {name}: to compare text with {modality} it must be an hf: model of {', '.join(_HOW[modality])}, "
            f"got {model_type(name) if name.startswith('hf:') else 'another kind of tower'}"
        )
    transformers = from_extra(name, "transformers")
    folder = model_folder(name)
    require_plain(name, folder)
    with quiet(transformers):
        config = read_part(name, transformers.AutoConfig, folder)
        tokenizer = _tokenizer(name, transformers, folder)
        owner = f"{how.owner}." if how.owner else ""
        parts = tuple(f"{owner}{part}." for part in how.parts)
        model = load_model(name, transformers, folder, config, lambda key: key.startswith(parts))
    network = model.get_submodule(how.owner)
    for key, _ in (*network.named_children(), *network.named_parameters(recurse=False)):
        if key not in how.parts:
            delattr(network, key)
    if how.encode in (_pe_video, _pe_audio):
        # The head was trained on states from before ModernBERT's last norm. In transformers 5, `hidden_states[-1]`
        # comes after it.
        network.get_submodule("text_model").final_norm = nn.Identity()
    return TextTower(
        name,
        network.requires_grad_(False).eval(),
        how.encode,
        tokenizer,
        _longest(tokenizer, config),
        pads_fully=how.pads_fully,
    ).eval()


def _tokenizer(name: str, transformers: Any, folder: Path) -> Any:
    """The folder's own; without its files, the library would make one with an empty vocabulary."""
    tokenizer = read_part(name, transformers.AutoTokenizer, folder)
    files = sorted(tokenizer.vocab_files_names.values())
    if not any((folder / file).is_file() for file in files):
        raise TowerError(f"tower {name}: {folder} must hold a tokenizer, one of {', '.join(files)}, got none")
    return tokenizer


def _longest(tokenizer: Any, config: Any) -> int:
    """The longest text in tokens; the tokenizer of some folders does not tell it."""
    text = config.text_config
    positions: int = text.max_position_embeddings
    if config.model_type == "clap":  # as in RoBERTa, positions are counted from after that of padding
        positions -= text.pad_token_id + 1
    return min(positions, int(tokenizer.model_max_length))
