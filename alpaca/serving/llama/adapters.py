"""The LLaMA engine's adapters: checks them, stacks their matrices for each layer, and computes the memory they take."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.errors import InputError
from alpaca.formats.hf.adapters import MOST_SERVED_RANK, AdapterFolder, LowRank, unsupported_kind
from alpaca.serving.kernels.linear_base import Linear
from alpaca.serving.kernels.low_rank import LowRankStack
from alpaca.serving.llama.network import Adapters, LlamaModel

logger = logging.getLogger(__name__)
_IDENTITY_ROWS = 512  # of DoRA's base weights at a time


def check_for_llama(adapters: Mapping[str, AdapterFolder], config: ModelDescription) -> None:
    """Raise InputError, which names an engine that can, if the LLaMA engine cannot serve an adapter on this model."""
    shapes = {name: shape for layer in range(config.num_layers) for name, shape in _shapes(config, layer).items()}
    for name, adapter in adapters.items():
        reason = _why_not(adapter, config)
        if reason:
            known = ", ".join(module.rpartition(".")[2] for module in _modules(config))
            raise InputError(
                f"adapter {name} ({adapter.path}): {reason}. The LLaMA engine changes {known}; "
                "ALPACA_ENGINE=transformers serves whatever PEFT does"
            )
        for target in adapter.targets:
            low_rank = adapter.low_rank(target)
            _check_shape(f"adapter {name} ({adapter.path}): {target}", low_rank, shapes.get(target), config)


def _modules(config: ModelDescription) -> list[str]:
    """The projections of a layer, by their modules' names in it."""
    return [module for modules in config.family.fused.values() for module in modules]


def _why_not(adapter: AdapterFolder, config: ModelDescription) -> str | None:
    endings = tuple(f".{module}" for module in _modules(config))
    others = [target for target in adapter.targets if not target.endswith(endings)]
    if others:
        return f"it changes {others[0]}"
    if others := [*adapter.trained_tensors(), *adapter.unknown_tensors()]:
        return f"beside low-rank matrices it holds {min(others)} (modules_to_save, or a bias)"
    if rows := adapter.token_rows():
        return f"it has rows of its own for some tokens of {min(rows)} (trainable_token_indices)"
    if used := unsupported_kind(adapter.config):
        return f"its adapter_config.json asks for {used}, which is more than LoRA on the base"
    return None


def _shapes(config: ModelDescription, layer: int) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's projections, by their modules' names in a checkpoint."""
    prefix, shapes = f"{config.family.prefix}{layer}.", config.layer_shapes
    return {f"{prefix}{module}": shapes[f"{module}.weight"] for module in _modules(config)}


def _check_shape(what: str, low_rank: LowRank, shape: tuple[int, int] | None, config: ModelDescription) -> None:
    rank = low_rank.a.shape[0]
    found = (low_rank.b.shape[0], low_rank.a.shape[1])
    if shape is None:
        raise InputError(
            f"{what} is no layer of this base model, which has {config.num_layers}; is it another model's?"
        )
    if found != shape:
        raise InputError(f"{what} is for weights {list(found)}, the base model's are {list(shape)}: another model's")
    if rank > MOST_SERVED_RANK:
        raise InputError(f"{what} has rank {rank}; this engine takes up to {MOST_SERVED_RANK}")


def stacked_bytes(adapters: Mapping[str, AdapterFolder], config: ModelDescription, dtype: torch.dtype) -> int:
    """Bytes that `with_adapters` takes on the device, with the factors of DoRA."""
    plans = [plan for layer in range(config.num_layers) for plan in _plan_layer(adapters, config, layer).values()]
    return sum(
        len(adapters) * dtype.itemsize * (
            plan.rank * len(plan.targets) * plan.width + plan.num_outputs * (plan.rank + plan.has_factors)
        )
        for plan in plans
    )  # fmt: skip


def largest_ranks(adapters: Mapping[str, AdapterFolder]) -> int:
    """Most ranks that a row meets in one linear layer, which has up to three parts."""
    ranks = [adapter.low_rank(target).a.shape[0] for adapter in adapters.values() for target in adapter.targets]
    return 3 * max(ranks, default=0)


def with_adapters(model: LlamaModel, adapters: Mapping[str, AdapterFolder]) -> LlamaModel:
    """A copy of the model, which shares its weights, with the adapters' low-rank matrices in its dtype, on its device.

    Raises the InputErrors of `check_for_llama`.
    """
    if not adapters:
        return model
    check_for_llama(adapters, model.config)
    layers = []
    for index, layer in enumerate(model.layers):
        plans = _plan_layer(adapters, model.config, index)
        layers.append({name: _stack(plan, adapters, getattr(layer, name), model) for name, plan in plans.items()})
    return dataclasses.replace(model, adapters=Adapters(names=tuple(adapters), layers=layers))


@dataclass(frozen=True, kw_only=True)
class _StackPlan:
    """What the stack of one linear layer will hold.

    targets, parts: those that some adapter changes, in the layer's order.
    """

    targets: Sequence[str]
    parts: Sequence[tuple[int, int]]
    rank: int
    width: int
    has_factors: bool

    @property
    def num_outputs(self) -> int:
        return sum(width for _, width in self.parts)

    @property
    def outputs(self) -> list[slice]:
        """The rows of B of each part."""
        ends = list(itertools.accumulate(width for _, width in self.parts))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _plan_layer(adapters: Mapping[str, AdapterFolder], config: ModelDescription, layer: int) -> dict[str, _StackPlan]:
    """By names of `tensors.FUSED`, the layers that some adapter changes."""
    shapes = _shapes(config, layer)
    plans: dict[str, _StackPlan] = {}
    for projection, modules in config.family.fused.items():
        parts: dict[str, tuple[int, int]] = {}
        changes: list[LowRank] = []
        column = 0
        for target in (f"{config.family.prefix}{layer}.{module}" for module in modules):
            here = [adapter.low_rank(target) for adapter in adapters.values() if target in adapter.targets]
            if here:
                parts[target] = (column, shapes[target][0])
            changes += here
            column += shapes[target][0]
        if parts:
            plans[projection] = _StackPlan(
                targets=tuple(parts),
                parts=tuple(parts.values()),
                rank=max(change.a.shape[0] for change in changes),
                width=shapes[next(iter(parts))][1],
                has_factors=any(change.magnitude is not None for change in changes),
            )
    return plans


def _stack(plan: _StackPlan, adapters: Mapping[str, AdapterFolder], linear: Linear, model: LlamaModel) -> LowRankStack:
    """The stack of one linear layer, computed in float32 or more and kept in the model's dtype."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    a = torch.zeros(len(adapters), len(plan.targets), plan.rank, plan.width, dtype=dtype)
    b = torch.zeros(len(adapters), plan.num_outputs, plan.rank, dtype=dtype)
    magnitudes = torch.full(b.shape[:2], math.nan, dtype=dtype)  # where an adapter has none
    for k, part, change in _changes(plan, adapters):
        outputs, rank = plan.outputs[part], change.a.shape[0]
        a[k, part, :rank] = change.a
        b[k, outputs, :rank] = change.b.to(dtype) * change.scale
        if change.magnitude is not None:
            magnitudes[k, outputs] = change.magnitude.to(dtype)
    a, b, magnitudes = (tensor.to(model.device) for tensor in (a, b, magnitudes))
    factors = None
    if plan.has_factors:
        factors = magnitudes / _row_lengths(linear.product, plan, a, b, dtype=model.dtype)
        factors = factors.nan_to_num(nan=1.0).to(model.dtype)
    return LowRankStack(a.flatten(1, 2).to(model.dtype), b.to(model.dtype), plan.parts, factors)


def _changes(plan: _StackPlan, adapters: Mapping[str, AdapterFolder]) -> Iterator[tuple[int, int, LowRank]]:
    """Every change that the stack holds, with the numbers of its adapter and its part."""
    for k, adapter in enumerate(adapters.values()):
        for part, target in enumerate(plan.targets):
            if target in adapter.targets:
                yield k, part, adapter.low_rank(target)


@torch.inference_mode()
def _row_lengths(
    linear: Linear, plan: _StackPlan, a: torch.Tensor, b: torch.Tensor, *, dtype: torch.dtype
) -> torch.Tensor:
    """The length of each row of W + s B A, for every adapter: [K, W]; what DoRA divides by (arXiv 2402.09353).

    W is what the layer multiplies by, packed or quantized as it may be: columns of it are its outputs for rows of the
    identity.
    """
    columns = torch.cat([torch.arange(start, start + width) for start, width in plan.parts]).to(a.device)
    squares = torch.zeros(b.shape[:2], dtype=b.dtype, device=b.device)
    for first in range(0, plan.width, _IDENTITY_ROWS):
        inputs = torch.arange(first, min(first + _IDENTITY_ROWS, plan.width), device=a.device)
        rows = torch.nn.functional.one_hot(inputs, plan.width).to(dtype)
        weight = linear(rows).index_select(1, columns).to(b.dtype).T  # [W, inputs]
        for k in range(len(a)):
            for part, outputs in enumerate(plan.outputs):
                changed = weight[outputs] + b[k, outputs] @ a[k, part][:, inputs]
                squares[k, outputs] += changed.square().sum(1)
    return squares.sqrt()
