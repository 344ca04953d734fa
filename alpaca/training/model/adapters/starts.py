"""Starts of an adapter that are taken from the base: PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775).

Both begin with matrices A0 and B0 that hold the largest part of a weight W [O, I], and train A and B on what is left
of it: W - s B0 A0. PEFT changes the base for that, and its adapter alone then fits no base that anybody has. Here W
stays, and the layer computes W x + s (B A - B0 A0) x, which is the same function with the same gradients. So what is
trained is at any time a plain adapter of twice the rank on the original base, [A; A0] and [B, -B0], and saved as that.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alpaca.errors import InputError

if TYPE_CHECKING:
    from peft.tuners.lora import Linear

_NAMES = ("start_a", "start_b")


def takes_from_base(init: str) -> bool:
    """Whether a value of --lora_init is one of these."""
    return init.startswith(("pissa", "olora"))


def add_starts(model: nn.Module, init: str, device: torch.device) -> None:
    """Give each adapted layer of PEFT's model the start that `init` names, computed on `device`.

    Raises InputError for a rank that a weight does not have, and for layers that are no plain linear ones.
    """
    from peft.tuners.lora import Linear

    from alpaca.training.model.adapters.started_linear import StartedLinear

    for name, layer in _adapted_layers(model).items():
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
            raise InputError(f"--lora_init {init}: {name} is a {type(layer.base_layer).__name__}, not a linear layer")
        rank, most = layer.r["default"], min(layer.base_layer.weight.shape)
        if rank > most:
            raise InputError(f"--lora_init {init}: rank {rank} is more than {name} has, whose weight has {most}")
        a, b = find_start(layer.base_layer.weight.detach().to(device), init, rank, layer.scaling["default"])
        own = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.__class__ = StartedLinear
        for attribute, weight, start in zip(_NAMES, own, (a, b), strict=True):
            start = start.to(weight)
            weight.data.copy_(start)
            setattr(layer, attribute, nn.Parameter(start.clone(), requires_grad=False))


def find_start(weight: Tensor, init: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 [r, I] and B0 [O, r] for a weight [O, I], as PEFT has them: `scale` * B0 @ A0 is taken from it."""
    weight = weight.float()
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        left, values, right = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
        right = right.T
    roots = (values / scale).sqrt()
    return roots[:, None] * right, left * roots


def list_starts(model: nn.Module) -> dict[str, Tensor]:
    """The frozen A0 and B0 of all layers, by their parameters' names; none where a start is another."""
    return {name: start.detach() for name, start in model.named_parameters() if name.endswith(_NAMES)}


def join_starts(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """An adapter's tensors, by PEFT's names in files, with [A; A0] for A and [B, -B0] for B."""
    starts = list_starts(model)
    joined = {name: tensor for name, tensor in tensors.items() if name not in starts}  # PEFT lists all of its layers
    for name, start in starts.items():
        module, _, which = name.rpartition(".start_")
        key = f"{module}.lora_{which.upper()}.weight"
        parts, dim = ([tensors[key], start], 0) if which == "a" else ([tensors[key], -start], 1)
        joined[key] = torch.cat([part.detach() for part in parts], dim=dim)
    return joined


def _adapted_layers(model: nn.Module) -> "dict[str, Linear]":
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
