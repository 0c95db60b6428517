"""Which parts of an encoder are trained: all of it, the head alone, the last parts of the backbone, or LoRA adapters.

1. ``all``: every weight.
2. ``head``: the projection head. The backbone stays in evaluation mode, so its features never change and can be kept.
3. ``last:N``: the head and the last N parts of the backbone (`parts`).
4. ``lora``: the head and low-rank adapters in the backbone's linear layers (Hu et al., 2022), by the library peft.
   Adapters start at zero, so training starts from the backbone as it is. `release` adds them to the weights.

What is frozen also stays in evaluation mode. In training mode its batch norms would still follow the training data.
"""

import hashlib
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cmacc.encoders.modality import Modality
from cmacc.encoders.pair import AudioVisualEncoder, Encoder
from cmacc.encoders.towers import TowerError

_LAST = re.compile(r"last:([1-9][0-9]*)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_train_mode(mode: str) -> None:
    """Check the name of a mode.

    Raises
    ------
    ValueError
        It is not ``all``, ``head``, ``lora`` or ``last:N``.

    Examples
    --------
    >>> check_train_mode("last:2")
    """
    if mode not in ("all", "head", "lora") and not _LAST.fullmatch(mode):
        raise ValueError(f"must be all, head, lora or last:N with N of at least 1, got {mode}")


def set_trained(pair: AudioVisualEncoder, modality: Modality, mode: str, lora_rank: int) -> None:
    """Freeze what ``mode`` does not train in one encoder of the pair, in place.

    Raises
    ------
    TowerError
        The backbone cannot be trained, has fewer than N parts or no layer for LoRA, or peft is not installed.
    """
    check_train_mode(mode)
    encoder: Encoder = getattr(pair, modality)
    network, name = encoder.network, f"encoder.{modality}={getattr(pair.config, modality)}"
    if not getattr(encoder.backbone, "can_train", True) and mode != "head":
        raise TowerError(f"{name}: train.{modality} must be head, because this tower is frozen, got {mode}")
    if mode == "all":
        return
    network.requires_grad_(False)
    frozen, digest = list(network.modules()), None
    if mode == "head":
        digest = weights_digest(encoder.backbone)
    elif mode == "lora":
        _add_lora(network, lora_rank, name)
    else:
        count, found = int(mode.removeprefix("last:")), parts(network)
        if count > len(found):
            raise TowerError(f"{name}: train.{modality} must be at most last:{len(found)}, its parts, got {mode}")
        trained = [module for part in found[len(found) - count :] for module in part]
        for module in trained:
            module.requires_grad_(True)
        # Not only the other parts: what has no weights, such as a dropout before the first block, is in none of them.
        inner = {id(module) for part in trained for module in part.modules()}
        frozen = [module for module in frozen if id(module) not in inner]
    encoder.mark_frozen(frozen, digest)


def weights_digest(backbone: nn.Module) -> str:
    """SHA-256 of all that the features depend on: weights, buffers and a tower's settings; sixteen hex digits."""
    digest = hashlib.sha256(getattr(backbone, "settings", "").encode())
    # Buffers that are not saved, too, such as the mean and deviation of pixels.
    hash_tensors(digest, {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())})
    return digest.hexdigest()[:16]


def hash_tensors(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and values of tensors to a hash, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous()
        digest.update(values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")


def parts(network: nn.Module) -> list[list[nn.Module]]:
    """The parts of a network, in order: its children, with lists of blocks taken apart.

    Each part is a list of modules: norms, and other modules with vectors for weights, belong to the part before them.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(4, 2, 8)
    >>> blocks = nn.TransformerEncoder(layer, num_layers=3, norm=nn.LayerNorm(4), enable_nested_tensor=False)
    >>> len(parts(nn.Sequential(nn.Linear(3, 4), blocks)))
    4
    """
    found: list[list[nn.Module]] = []
    for module in _blocks(network):
        if found and all(parameter.ndim <= 1 for parameter in module.parameters()):
            found[-1].append(module)
        else:
            found.append([module])
    return found


def _blocks(network: nn.Module) -> list[nn.Module]:
    children = _children(network)
    found: list[nn.Module] = []
    for child in children:
        is_wrapped = len(children) == 1 and bool(_children(child))
        if _is_list(child):
            found += _entries(child)
        elif is_wrapped or any(_is_list(module) for module in child.modules()):
            found += _blocks(child)
        else:
            found.append(child)
    return found


def _entries(blocks: nn.Module) -> list[nn.Module]:
    """The blocks of a list, or of the lists in it. Lists deeper inside belong to their block."""
    return [block for entry in _children(blocks) for block in (_entries(entry) if _is_list(entry) else [entry])]


def _is_list(module: nn.Module) -> bool:
    """Whether it is a list of blocks: of modules that have layers themselves, unlike convolutions and norms."""
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    return is_list and sum(bool(_children(entry)) for entry in module.children()) >= 2


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _add_lora(network: nn.Module, rank: int, name: str) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise TowerError(f"{name}: LoRA needs the extra `towers`: pip install 'cmacc[towers]' ({error})") from error
    # torch's attention reads the weight of its output layer without calling the layer, and would not see an adapter.
    bypassed = {id(module.out_proj) for module in network.modules() if isinstance(module, nn.MultiheadAttention)}
    named = [(path, module) for path, module in network.named_modules() if id(module) not in bypassed]
    places = [path for path, module in named if isinstance(module, nn.Linear)]
    places = places or [path for path, module in named if isinstance(module, _CONVOLUTIONS) and module.groups == 1]
    if not places:
        raise TowerError(f"{name}: LoRA needs linear layers or convolutions, got none in {type(network).__name__}")
    # As one pattern: of a list, peft takes the names as endings, and would also find layers that are not in it.
    pattern = "|".join(map(re.escape, places))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=pattern), network)


def release(pair: AudioVisualEncoder) -> None:
    """Undo `set_trained` after training: adapters are merged, and everything can be trained again."""
    _merge_lora(pair)
    pair.requires_grad_(True)
    for encoder in (pair.video, pair.audio):
        encoder.mark_frozen([])


def _merge_lora(pair: nn.Module) -> None:
    """Add all adapters to the weights and remove them: the same function, with the networks' own parameter names."""
    for path, module in list(pair.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            merge: Callable[[], None] = module.merge
            merge()
            parent, _, last = path.rpartition(".")
            base_layer: Callable[[], nn.Module] = module.get_base_layer
            setattr(pair.get_submodule(parent), last, base_layer())
    for module in pair.modules():
        if hasattr(module, "peft_config"):  # left by peft; its text, and with it hashes, differ between processes
            del module.peft_config
