"""The optimizer that --optim names: its groups of parameters, and the bytes of its moments."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from alpaca.errors import MissingPackage
from alpaca.training.configuration.settings import OptimizerSettings
from alpaca.training.model.optimizers.by_chance import StochasticAdamW

logger = logging.getLogger(__name__)
_FEWEST_QUANTIZED = 4096  # elements of a tensor whose moments bitsandbytes keeps in 8 bits
_BLOCK = 256  # of them share a scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trained tensor, and what optimizers ask of it.

    in_table: a row is a token's or a position's.    in_layers: not in a table, nor in the head.    is_b: LoRA's B.
    """

    name: str
    shape: tuple[int, ...]
    parameter: nn.Parameter | None = None
    in_table: bool = False
    in_layers: bool = True

    @property
    def is_b(self) -> bool:
        return ".lora_B." in self.name

    @property
    def is_hidden_matrix(self) -> bool:
        return self.in_layers and len(self.shape) == 2


def list_trained(model: nn.Module) -> list[Trained]:
    """The trained parameters of a model, in its order."""
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside = tables | ({id(parameter) for parameter in head.parameters()} if head is not None else set())
    return [
        Trained(
            name=name,
            shape=tuple(parameter.shape),
            parameter=parameter,
            in_table=id(parameter) in tables,
            in_layers=id(parameter) not in outside and "trainable_tokens" not in name,
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def import_optimizer(name: str) -> None:
    """Import what an optimizer is in, before a run's memory is measured. Raises MissingPackage."""
    if name == "adafactor":
        import transformers.optimization  # noqa: F401
    if name not in ("adamw_8bit", "paged_adamw_8bit"):
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            f"--optim {name} is bitsandbytes', which cannot be imported ({error}): pip install bitsandbytes, or use "
            "--optim adamw_torch"
        ) from error


def make_optimizer(
    model: nn.Module, settings: OptimizerSettings, *, by_chance: bool, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of a run. by_chance: bfloat16 weights and moments, whose written values are rounded by chance."""
    groups = group_parameters(
        model,
        weight_decay=settings.weight_decay,
        optimizer=settings.name,
        rate=settings.learning_rate,
        ratio=settings.b_ratio,
    )
    values = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.epsilon}
    if by_chance:
        logger.info("numerics fast: weights, gradients and moments are bfloat16, updates rounded by chance")
        return StochasticAdamW(groups, **values, seed=settings.seed)
    if settings.name in ("adamw_8bit", "paged_adamw_8bit"):
        from alpaca.training.model.optimizers.eight_bit import EightBitAdamW

        return EightBitAdamW(groups, is_paged=_pages(model, settings.name), **values)
    if settings.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False)
    if settings.name == "muon":
        from alpaca.training.model.optimizers.muon import MuonWithAdamW

        return MuonWithAdamW(groups, **values)
    return torch.optim.AdamW(groups, **values, fused=fused or None)


def _pages(model: nn.Module, optimizer: str) -> bool:
    """Whether moments are paged: where there is a GPU whose memory they could leave."""
    if optimizer != "paged_adamw_8bit":
        return False
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if not on_gpu:
        logger.warning("--optim paged_adamw_8bit: there is no GPU to page from, so this is adamw_8bit")
    return on_gpu


def group_parameters(
    model: nn.Module,
    *,
    weight_decay: float,
    optimizer: str = "adamw_torch",
    rate: float = 0.0,
    ratio: float | None = None,
) -> list[dict[str, object]]:
    """The optimizer's parameter groups: weight decay holds for matrices, not for biases and norms.

    ratio: LoRA+'s: B matrices and vectors learn at `rate` times it (arXiv 2402.12354, and PEFT for the vectors).
    """
    groups: dict[tuple[object, ...], dict[str, object]] = {  # always there, empty or not: checkpoints count them
        (True, False, ()): {"params": [], "weight_decay": weight_decay},
        (False, False, ()): {"params": [], "weight_decay": 0.0},
    }
    for trained in list_trained(model):
        is_matrix = len(trained.shape) >= 2
        is_faster = ratio is not None and (trained.is_b or not is_matrix)
        own = _own_values(trained, optimizer)
        key = (is_matrix, is_faster, tuple(own))
        if key not in groups:
            groups[key] = {"params": [], "weight_decay": weight_decay if is_matrix else 0.0, **own}
        if is_faster:
            groups[key]["lr"] = rate * ratio
        groups[key]["params"].append(trained.parameter)
    return list(groups.values())


def _own_values(trained: Trained, optimizer: str) -> dict[str, object]:
    """What an optimizer's groups say besides."""
    if optimizer == "muon" and trained.is_hidden_matrix:
        return {"use_muon": True}
    if optimizer.endswith("8bit") and trained.in_table:
        return {"whole_moments": True}
    return {}


def moment_bytes(tensors: Iterable[Trained], optimizer: str, *, itemsize: int = 4) -> int:
    """Bytes of an optimizer's moments of some tensors. itemsize: of an element of AdamW's."""
    return sum(_bytes_of_one(trained, optimizer, itemsize) for trained in tensors)


def _bytes_of_one(trained: Trained, optimizer: str, itemsize: int) -> int:
    size = math.prod(trained.shape)
    if optimizer == "adafactor" and len(trained.shape) >= 2:
        return 4 * _factored(trained.shape)
    if optimizer == "adafactor" or (optimizer == "muon" and trained.is_hidden_matrix):
        return 4 * size
    if optimizer.endswith("8bit") and not trained.in_table and size >= _FEWEST_QUANTIZED:
        return 2 * (size + 4 * -(-size // _BLOCK))
    return 2 * itemsize * size


def _factored(shape: Sequence[int]) -> int:
    """Numbers that Adafactor keeps of a tensor's squares: means of its rows and of its columns."""
    return math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))
