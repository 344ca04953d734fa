"""Decoder layers: found in a model, recomputed in the backward pass, compiled."""

import contextlib
import functools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alpaca.errors import InputError, MissingPackage

logger = logging.getLogger(__name__)


def find_layer_class(model: nn.Module) -> str:
    """The decoder layers' class: the one that transformers names, else the class in the longest list of modules."""
    counts = Counter(type(module).__name__ for module in model.modules())
    named = [name for name in getattr(model, "_no_split_modules", None) or () if name in counts]
    if named:
        return max(named, key=counts.__getitem__)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return type(max(lists, key=len)[0]).__name__ if lists else type(model).__name__


def check_layer_class(asked: str | None, layer_class: str) -> None:
    """Warn if `--fsdp_transformer_layer_cls_to_wrap` names another class than the model's own, which is used anyway."""
    if asked and asked != layer_class:
        logger.warning(
            "--fsdp_transformer_layer_cls_to_wrap %s: the layers of this model are %s; they are used",
            asked,
            layer_class,
        )


def checkpoint_layers(layers: Sequence[nn.Module], number: int) -> None:
    """Have the first `number` layers keep only their inputs and be recomputed in the backward pass, with equal dropout.

    The first layers are chosen because their backward passes come last, when the other layers' activations are freed.
    Checkpoints are not reentrant, so that layers whose inputs need no gradient (after frozen embeddings) learn, too.
    Raises InputError for layers that transformers cannot recompute.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in layers[:number]:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise InputError(
                f"--gradient_checkpointing: transformers cannot recompute a {type(layer).__name__}; pass False, and "
                "lower --per_device_train_batch_size if memory is short"
            )
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


# Compiling ----------------------------------------------------------------------------------------------------


def require_compiler() -> None:
    """Raise MissingPackage where there is no compiler for what torch.compile writes, on a GPU as on a CPU."""
    names = [os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "clang"]
    if not any(shutil.which(name) for name in names):
        raise MissingPackage(
            f"--compile_layers needs a C compiler, and none of {', '.join(names)} is on the PATH; install one "
            "(apt-get install g++), or leave --compile_layers out"
        )


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer's forward for any length; all layers share one set of graphs.

    Only the forward is compiled, so that hooks (FSDP's) and recomputation stay around it. Dropout draws the same
    numbers as without compiling.
    """
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, options={"fallback_random": True})
        layer.is_compiled = True


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which layers run uncompiled: passes that are not training would each be compiled for a few calls."""
    if any(getattr(module, "is_compiled", False) for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
