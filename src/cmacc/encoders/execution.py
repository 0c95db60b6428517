"""How encoders are computed: with activations computed again for less memory, or compiled for less time.

Both leave names, classes and, up to rounding, results as they are, so checkpoints do not know of them.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from cmacc.encoders.backbone import Backbone
from cmacc.encoders.modality import MODALITIES
from cmacc.encoders.pair import Encoder, EncoderPair
from cmacc.encoders.towers import Tower, TowerError

# Where cmacc's backbones, timm's models and the layers of transformers hold whether they compute activations again.
_FLAGS = ("recompute", "grad_checkpointing", "gradient_checkpointing")
_COMPILED_FORMS = 64


class CompilerError(ValueError):
    """This machine cannot compile for a device; the message says what is missing."""


def checkpoint_activations(encoder: EncoderPair) -> None:
    """Have the backward pass compute the activations inside each block of the backbones again, in place.

    Only the inputs of the blocks are kept: less memory, for about one more forward pass. Results are the same, the
    running statistics of batch norm and the random numbers of dropout too. Backbones that are wholly frozen have no
    backward pass and stay as they are.

    Raises
    ------
    TowerError
        A trained backbone cannot do it: a tower that is neither timm's nor transformers', a model without support, or
        one with batch norm in training, whose statistics would count twice.
    """
    for modality in MODALITIES:
        part: Encoder = getattr(encoder, modality)
        if part.frozen_digest is not None:
            continue
        if isinstance(part.backbone, Backbone):
            part.backbone.recompute = True
        elif isinstance(part.backbone, Tower):
            part.backbone.checkpoint_activations()
        else:
            raise TowerError(
                "train.checkpoint_activations must be false for a backbone that is neither a Backbone nor a Tower, got "
                f"{type(part.backbone).__name__}"
            )


@contextmanager
def activations_kept(encoder: nn.Module) -> Iterator[None]:
    """Undo `checkpoint_activations` for a while."""
    flags = [(module, name) for module in encoder.modules() for name in _FLAGS if getattr(module, name, False) is True]
    for module, name in flags:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name in flags:
            setattr(module, name, True)


def require_compiler(device: torch.device) -> None:
    """Check that `compile_backbones` can work for a device.

    Raises
    ------
    CompilerError
        There is no C++ compiler for a CPU, or no Triton or C compiler for a GPU.
    """
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        what, variable = "a C++ compiler", "CXX"
    else:
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), "gcc")
        what, variable = "a C compiler", "CC"
        if find_spec("triton") is None:
            raise CompilerError(f"train.compile must be false for {device.type}, because Triton is not installed")
    if shutil.which(compiler) is None:
        raise CompilerError(
            f"train.compile needs {what}, got none called {compiler}; install one, name it in {variable}, or set "
            "train.compile=false"
        )


def compile_backbones(encoder: EncoderPair) -> None:
    """Compile the backbones by `torch.compile`, in place; the first passes then take up to minutes.

    A copy of the encoders, such as `momentum_copy` makes, is not compiled. So compile the key encoders too, after
    copying.
    """
    # All modules share torch's cache of compiled forms, by default of eight: with and without gradient, in training and
    # in evaluation, for one and for any batch size. Beyond them it would go on without compiling, and not say so.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _COMPILED_FORMS)
    for modality in MODALITIES:
        part: Encoder = getattr(encoder, modality)
        part.backbone.compile()
