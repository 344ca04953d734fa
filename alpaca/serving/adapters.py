"""The adapters of a server: which folders they are, the base model under them, and the LLaMA engine's stacks of them.

They are never merged into the weights, a single one neither: a merge in bfloat16 is off by up to 5e-2 in the logits, is
out of the question for quantized weights, and what it would save is small (bench.adapters).
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.adapters import AdapterFolder, LowRank, is_adapter, open_adapter, unsupported_kind
from alpaca.archives import open_weights
from alpaca.errors import InputError, MissingInput
from alpaca.hf_files import find_fingerprint
from alpaca.merging import read_base_fingerprint, read_base_record
from alpaca.prompts import format_prompt
from alpaca.serving.linear import Linear
from alpaca.serving.llama import PROJECTIONS, Adapters, LlamaConfig, LlamaModel
from alpaca.serving.low_rank import LowRankStack
from alpaca.serving.request import AdapterNames
from alpaca.serving.settings import DEFAULT_ADAPTER, ServerSettings, parse_adapters
from alpaca.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

MOST_RANK = 256  # published ones have 4 to 128; all adapters of a server take as much room as the largest
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_LAYER_NAMES = tuple(f".{name}" for names in PROJECTIONS.values() for name in names)
_SEVEN = ", ".join(name.rpartition(".")[2] for name in _LAYER_NAMES)
_IDENTITY_ROWS = 512  # of DoRA's base weights at a time


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server was given: a base model, and adapters by the names that requests use."""

    base: Path
    adapters: dict[str, AdapterFolder]


def names_of(adapters: Mapping[str, AdapterFolder]) -> AdapterNames:
    """What requests may ask for."""
    return AdapterNames(named=tuple(adapters), default=DEFAULT_ADAPTER if DEFAULT_ADAPTER in adapters else None)


def open_served(folder: Path, settings: ServerSettings) -> Served:
    """The base model and the adapters: `folder` is the one or the other, the settings name more.

    Raises InputError, MissingInput.
    """
    adapters: dict[str, AdapterFolder] = {}
    base = folder
    if is_adapter(folder):
        adapters[DEFAULT_ADAPTER] = open_adapter(folder)
        base = _find_base(adapters[DEFAULT_ADAPTER], settings)
    elif settings.base_model:
        logger.warning("ALPACA_BASE_MODEL is not used: %s is no adapter but a whole model", folder)
    for name, place in parse_adapters(settings.adapters or "").items():
        found = open_weights(place, named=f"ALPACA_ADAPTERS: {name}")
        if not is_adapter(found):
            raise InputError(f"ALPACA_ADAPTERS: {name}={place} is no adapter: it has no adapter_config.json")
        adapters[name] = open_adapter(found)
    return Served(base=base, adapters=adapters)


def _find_base(adapter: AdapterFolder, settings: ServerSettings) -> Path:
    """The model folder under an adapter: the setting's, else the one its config names, from the working directory."""
    if settings.base_model:
        base = open_weights(settings.base_model, named="ALPACA_BASE_MODEL")
    else:
        base = Path(adapter.base_name)
        if not adapter.base_name or not base.is_dir():
            looked = f"no folder {base.absolute()}" if adapter.base_name else "no base_model_name_or_path"
            raise MissingInput(
                f"{adapter.path} is an adapter, and its base model {adapter.base_name!r} is not here ({looked}). Set "
                "ALPACA_BASE_MODEL (--base_model) to the folder of that model, such as weights/llama-7b"
            )
    if is_adapter(base):
        raise InputError(f"{base} is an adapter itself; the base model of {adapter.path} must be a whole model")
    if not (base / "config.json").is_file():
        raise MissingInput(f"{base}, the base model of {adapter.path}, holds no config.json")
    return base


def check_tokenizers(adapters: Mapping[str, AdapterFolder], tokenizer: Tokenizer) -> None:
    """Where an adapter brings a tokenizer it must be the base's, which all are served with; a [PAD] more is none less.

    Raises InputError.
    """
    text = format_prompt("Name three alpacas.", "", "alpaca")
    for name, adapter in adapters.items():
        if not any((adapter.path / file).is_file() for file in _TOKENIZER_FILES):
            continue
        own = load_tokenizer(adapter.path)
        if own.base_size != tokenizer.base_size or own.encode(text) != tokenizer.encode(text):
            raise InputError(
                f"adapter {name}: the tokenizer in {adapter.path} ({own.base_size} tokens) is not the base model's "
                f"({tokenizer.base_size} tokens), and adapters add no rows to its embedding: this is another model's "
                "adapter, or another base is needed (ALPACA_BASE_MODEL)"
            )


def describe_other_bases(served: Served, settings: ServerSettings) -> Iterator[str]:
    """Where an adapter meets another base than it was trained on, as train.py recorded it beside the adapter.

    For warnings: a base of other tensors may be the same in another dtype, and a rounded one what was wanted.
    """
    own = None
    for name, adapter in served.adapters.items():
        quantization, _ = read_base_record(adapter.path)
        if quantization not in (None, settings.quantization):
            yield (
                f"adapter {name} was trained on its base with quantization {quantization}, and is served on one with "
                f"{settings.quantization}, which is another model: set ALPACA_QUANTIZATION={quantization} to serve "
                "what was trained"
            )
        trained_on = read_base_fingerprint(adapter.path)
        if trained_on:
            own = own or find_fingerprint(served.base)
        if trained_on and own and own != trained_on:
            yield (
                f"adapter {name} was trained on a base of other tensors (fingerprint {trained_on[:16]}) than "
                f"{served.base} ({own[:16]}): fine for the same model in another dtype; else set ALPACA_BASE_MODEL to "
                f"the folder of its own base, {adapter.base_name or 'which it does not name'}"
            )


# The LLaMA engine's ---------------------------------------------------------------------------------------------------


def check_for_llama(adapters: Mapping[str, AdapterFolder], config: LlamaConfig) -> None:
    """Raise InputError for an adapter that the LLaMA engine cannot serve on this model, saying what can."""
    shapes = {name: shape for layer in range(config.num_layers) for name, shape in _shapes(config, layer).items()}
    for name, adapter in adapters.items():
        reason = _why_not(adapter)
        if reason:
            raise InputError(
                f"adapter {name} ({adapter.path}): {reason}. The LLaMA engine changes {_SEVEN}; "
                "ALPACA_ENGINE=transformers serves whatever PEFT does"
            )
        for target in adapter.targets:
            low_rank = adapter.low_rank(target)
            _check_shape(f"adapter {name} ({adapter.path}): {target}", low_rank, shapes.get(target), config)


def _why_not(adapter: AdapterFolder) -> str | None:
    others = [target for target in adapter.targets if not target.endswith(_LAYER_NAMES)]
    if others:
        return f"it changes {others[0]}"
    if others := [*adapter.trained_tensors(), *adapter.unknown_tensors()]:
        return f"beside low-rank matrices it holds {min(others)} (modules_to_save, or a bias)"
    if used := unsupported_kind(adapter.config):
        return f"its adapter_config.json asks for {used}, which is more than LoRA on the base"
    return None


def _shapes(config: LlamaConfig, layer: int) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's projections, by their names in a checkpoint."""
    width, q_width, kv_width = (
        config.width,
        config.num_heads * config.head_width,
        config.num_kv_heads * config.head_width,
    )
    outputs = (q_width, kv_width, kv_width, width, config.ffn_width, config.ffn_width, width)
    inputs = (width, width, width, q_width, width, width, config.ffn_width)
    names = [f"model.layers.{layer}.{name}" for names in PROJECTIONS.values() for name in names]
    return dict(zip(names, zip(outputs, inputs, strict=True), strict=True))


def _check_shape(what: str, low_rank: LowRank, shape: tuple[int, int] | None, config: LlamaConfig) -> None:
    rank = low_rank.a.shape[0]
    found = (low_rank.b.shape[0], low_rank.a.shape[1])
    if shape is None:
        raise InputError(
            f"{what} is no layer of this base model, which has {config.num_layers}; is it another model's?"
        )
    if found != shape:
        raise InputError(f"{what} is for weights {list(found)}, the base model's are {list(shape)}: another model's")
    if rank > MOST_RANK:
        raise InputError(f"{what} has rank {rank}; this engine takes up to {MOST_RANK}")


def stacked_bytes(adapters: Mapping[str, AdapterFolder], config: LlamaConfig, dtype: torch.dtype) -> int:
    """What `with_adapters` will take on the device, DoRA's factors included."""
    plans = [plan for layer in range(config.num_layers) for plan in _plan_layer(adapters, config, layer).values()]
    return sum(
        len(adapters) * dtype.itemsize * (
            plan.rank * len(plan.targets) * plan.width + plan.num_outputs * (plan.rank + plan.has_factors)
        )
        for plan in plans
    )  # fmt: skip


def largest_ranks(adapters: Mapping[str, AdapterFolder]) -> int:
    """Ranks a step's row has in one layer at most: three parts of the largest."""
    ranks = [adapter.low_rank(target).a.shape[0] for adapter in adapters.values() for target in adapter.targets]
    return 3 * max(ranks, default=0)


def with_adapters(model: LlamaModel, adapters: Mapping[str, AdapterFolder]) -> LlamaModel:
    """The same model with the adapters' low-rank matrices beside it, on its device and in its dtype.

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
    """What one linear layer's stack will hold. targets, parts: of what any adapter changes, in the layer's order."""

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
        """Each part's rows of B."""
        ends = list(itertools.accumulate(width for _, width in self.parts))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _plan_layer(adapters: Mapping[str, AdapterFolder], config: LlamaConfig, layer: int) -> dict[str, _StackPlan]:
    """By names of PROJECTIONS, those that some adapter changes."""
    shapes = _shapes(config, layer)
    plans: dict[str, _StackPlan] = {}
    for projection, names in PROJECTIONS.items():
        parts: dict[str, tuple[int, int]] = {}
        changes: list[LowRank] = []
        column = 0
        for target in (f"model.layers.{layer}.{name}" for name in names):
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
    """One linear layer's stack; computed in float32 at least, kept in the model's dtype."""
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
        factors = magnitudes / _row_lengths(linear, plan, a, b, dtype=model.dtype)
        factors = factors.nan_to_num(nan=1.0).to(model.dtype)
    return LowRankStack(a.flatten(1, 2).to(model.dtype), b.to(model.dtype), plan.parts, factors)


def _changes(plan: _StackPlan, adapters: Mapping[str, AdapterFolder]) -> Iterator[tuple[int, int, LowRank]]:
    """(adapter, part, change) of all that the stack holds."""
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
