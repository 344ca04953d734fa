"""Loads a Hugging Face folder straight into the engine's own layout, without a second copy of the model in memory."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.families import HEAD_NORMS
from alpaca.architecture.inventory import check_tensors
from alpaca.architecture.rope import NUMBERS_OF, Rope
from alpaca.architecture.tensors import hf_name
from alpaca.errors import UnsupportedModel
from alpaca.formats.hf.folder import read_description
from alpaca.formats.hf.pickled import Weights, open_model_weights, read_as_stored
from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight
from alpaca.formats.hf.saved.unpacking import why_unread
from alpaca.serving.kernels.cpu_linear import held_dtype
from alpaca.serving.kernels.experts import Experts
from alpaca.serving.kernels.linear import make_linear
from alpaca.serving.kernels.linear_base import Biased, Linear
from alpaca.serving.llama.network import ACTIVATIONS, LlamaLayer, LlamaModel, rotary_table

_READERS = 4
_MOST_READ_AHEAD = 1 << 30  # bytes in memory that no layer has taken yet
# The families that are computed here. Another of the block "llama" needs an equality with transformers first.
TAKEN = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite",
    "olmo2", "exaone4", "mixtral", "qwen3_moe",
)  # fmt: skip


def supports(config: ModelDescription) -> str | None:
    """Why this engine cannot compute a model; None if it can."""
    if config.model_type not in TAKEN:
        return f"its model_type is {config.model_type!r}, not {', '.join(TAKEN[:-1])} or {TAKEN[-1]}"
    if config.unusual:
        return f"its {config.unusual[0]} asks for what this engine does not compute"
    if config.activation not in ACTIVATIONS:
        return f"its activation is {config.activation!r}; this engine computes {', '.join(ACTIVATIONS)}"
    if reason := why_unread(config.quantized_by):
        return f"it {reason}"
    for rope in filter(None, (config.rope, config.windowed_rope)):
        if rope.kind not in NUMBERS_OF:
            return f"its rope type {rope.kind!r} is not one of {', '.join(NUMBERS_OF)}"
        if rope.width(config.head_width) % 2 or rope.width(config.head_width) == 0:
            return f"its partial_rotary_factor turns {rope.width(config.head_width)} numbers of a head; expected pairs"
        if rope.long_from and config.windowed_rope:
            return "its layers have different ropes, of which one depends on the length"
    return None


def read_llama(folder: Path) -> ModelDescription:
    """Read the description of a folder's model.

    Raises InputError, and UnsupportedModel if this engine cannot compute the model.
    """
    config = read_description(folder, only=TAKEN)
    if reason := supports(config):
        raise UnsupportedModel(f"{folder}: {reason}")
    return read_as_stored(folder, config)


def count_whole(folder: Path, config: ModelDescription) -> int:
    """Elements of the layers' matrices that a folder, saved as int8 or nf4, holds whole."""
    weights = open_model_weights(folder)
    matrices = [spec for spec in weights.specs() if len(spec.shape) == 2 and spec.name.startswith(config.family.prefix)]
    return sum(math.prod(spec.shape) for spec in matrices if not weights.keeps(spec.name))


def load_llama(
    weights: Weights,
    config: ModelDescription,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
    num_positions: int,
    ops: ModuleType,
    held: torch.dtype | None = None,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> LlamaModel:
    """The model on `device`, its layers' projections quantized if asked (embedding and head never are).

    held: what weights are rounded to, and matrices held in, while `dtype` is computed in. None: nothing is rounded.
    `progress(n)` hears of each n bytes of the files that were read. Raises InputError unless the folder
    holds exactly the tensors that its config.json calls for.
    """
    require_tensors(weights, config)
    with _ReadAhead(weights, _reading_order(config), pin=device.type == "cuda", progress=progress) as read:
        loader = _Loader(config, read, device=device, dtype=dtype, held=held, quantization=quantization)
        tables = _Tables(config, num_positions, dtype, device)
        stored = read.take(hf_name("embedding"))
        embedding = loader.place_tensor(stored)
        layers = [loader.load_layer(index, tables) for index in range(config.num_layers)]
        norm = loader.place_norm(hf_name("norm"))
        if not config.ties_embeddings:
            head = read.take(hf_name("head"))
        else:  # shared, unless it is held narrower than the embedding
            head = stored if is_held_narrower(stored, held, dtype, device) else embedding
        return LlamaModel(
            config=config,
            embedding=embedding,
            layers=layers,
            norm=norm,
            head=make_linear([head], quantization="none", device=device, dtype=dtype, held=held),
            rotary=tables.of(config.rope),
            ops=ops,
            embedding_multiplier=_embedding_multiplier(config, dtype),
        )


def is_held_narrower(
    stored: torch.Tensor | Int8Weight | Nf4Weight, held: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a CPU holds a whole matrix in another dtype than the one that is computed in."""
    if not isinstance(stored, torch.Tensor) or device.type != "cpu":
        return False
    return (held or held_dtype({stored.dtype}, dtype)) != dtype


class _Loader:
    """Takes tensors in the order of `_reading_order` and makes the engine's layers of them."""

    def __init__(
        self,
        config: ModelDescription,
        read: "_ReadAhead",
        *,
        device: torch.device,
        dtype: torch.dtype,
        held: torch.dtype | None,
        quantization: str,
    ) -> None:
        self._config, self._read, self._quantization = config, read, quantization
        self._device, self._dtype, self._held = device, dtype, held

    def load_layer(self, index: int, tables: "_Tables") -> LlamaLayer:
        config, family = self._config, self._config.family
        prefix = f"{family.prefix}{index}."
        norms = {place: self.place_norm(f"{prefix}{name}.weight") for place, name in family.norms.items()}
        linears = {name: self._project(prefix, modules) for name, modules in family.fused.items()}
        return LlamaLayer(
            **{"input_norm": None, "ffn_norm": None, **norms},
            **linears,
            head_norms=self._load_head_norms(prefix),
            experts=self._load_experts(prefix),
            rotary=tables.of(config.rope_of(index)),
            window=config.window(index),
        )

    def place(self, name: str) -> torch.Tensor:
        return self.place_tensor(self._read.take(name))

    def place_tensor(self, stored: torch.Tensor | Int8Weight | Nf4Weight) -> torch.Tensor:
        """A whole tensor of the model's dtype on its device."""
        if not isinstance(stored, torch.Tensor):  # a router that was saved quantized: here it is whole
            stored = stored.dequantize(self._dtype)
        return stored.to(self._held or stored.dtype).to(device=self._device, dtype=self._dtype)

    def place_norm(self, name: str) -> torch.Tensor:
        """A norm's weights as the engine multiplies by them. Those that scale before they round stay wide."""
        stored, family = self.place(name), self._config.family
        if not family.scales_wide:
            return stored
        return stored.to(torch.promote_types(self._dtype, torch.float32)) + family.norm_offset

    def _project(self, prefix: str, modules: Sequence[str]) -> Linear:
        """The layer of modules of one input, by their names in the model's layer."""
        parts = [self._read.take(f"{prefix}{module}.weight") for module in modules]
        linear = make_linear(
            parts, quantization=self._quantization, device=self._device, dtype=self._dtype, held=self._held
        )
        has_bias = f"{modules[0]}.bias" in self._config.layer_shapes
        return Biased(linear, torch.cat([self.place(f"{prefix}{m}.bias") for m in modules])) if has_bias else linear

    def _load_head_norms(self, prefix: str) -> tuple[tuple[int, torch.Tensor], ...]:
        """Norms of each head are one, with a row for each head of query and key."""
        config = self._config
        if not config.family.head_norms:
            return ()
        query, key = (self.place_norm(f"{prefix}{name}.weight") for name in HEAD_NORMS)
        if config.family.head_norms == "whole":
            return (0, query[None]), (config.query_width, key[None])
        rows = [query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)]
        return ((0, torch.cat(rows).contiguous()),)

    def _load_experts(self, prefix: str) -> Experts | None:
        config, names = self._config, self._config.family.experts
        if names is None:
            return None
        modules = [names.of(expert) for expert in range(config.num_experts)]
        return Experts(
            router=self.place(f"{prefix}{names.router}.weight"),
            gate_up=[self._project(prefix, (gate, up)) for gate, up, _ in modules],
            down=[self._project(prefix, (down,)) for _, _, down in modules],
            per_token=config.experts_per_token,
            normalizes=config.normalizes_experts,
        )


def _embedding_multiplier(config: ModelDescription, dtype: torch.dtype) -> float:
    """Gemma's root is rounded to the model's precision, as transformers has it."""
    if config.family.embeds_by_root:
        return torch.tensor(config.width**0.5).to(dtype).item()
    return config.embedding_multiplier


class _Tables:
    """The rotary tables of a model's layers: one for each kind of rope."""

    def __init__(self, config: ModelDescription, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        ropes = [rope for rope in (config.rope, config.windowed_rope) if rope is not None]
        self._tables = [(rope, rotary_table(config, num_positions, dtype, rope).to(device)) for rope in ropes]

    def of(self, rope: Rope | None) -> torch.Tensor:
        """The table of a rope; without columns for None."""
        if rope is None:
            first = self._tables[0][1]
            return first.new_empty(len(first), 0)
        return next(table for known, table in self._tables if known is rope)


def _reading_order(config: ModelDescription) -> list[str]:
    prefix, family = config.family.prefix, config.family
    order = [f"{name}.weight" for name in family.norms.values()]
    for modules in family.fused.values():
        order += [f"{module}.weight" for module in modules] + [f"{module}.bias" for module in modules]
    order += [f"{name}.weight" for name in HEAD_NORMS]
    if family.experts:
        experts = [family.experts.of(expert) for expert in range(config.num_experts)]
        order += [f"{family.experts.router}.weight"]
        order += [f"{module}.weight" for gate, up, _ in experts for module in (gate, up)]
        order += [f"{down}.weight" for _, _, down in experts]
    within = [name for name in order if name in config.layer_shapes]
    layers = [f"{prefix}{index}.{name}" for index in range(config.num_layers) for name in within]
    return [hf_name("embedding"), *layers, hf_name("norm"), *([] if config.ties_embeddings else [hf_name("head")])]


def require_tensors(weights: Weights, config: ModelDescription) -> None:
    """Raise InputError unless the folder holds exactly the model's tensors."""
    check_tensors(config, {spec.name: spec.shape for spec in weights.specs()}, where=str(weights.path))


class _ReadAhead:
    """Reads tensors in a known order, with some threads, at most `_MOST_READ_AHEAD` bytes before they are taken.

    For a GPU they come in pinned memory, so that their copy to the device is quick.
    """

    def __init__(self, weights: Weights, names: list[str], *, pin: bool, progress: Callable[[int], object]) -> None:
        self._weights, self._pin, self._progress = weights, pin, progress
        self._num_bytes = {spec.name: spec.num_bytes for spec in weights.specs()}
        self._to_read = deque(names)
        self._reading: dict[str, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read-weights")

    def __enter__(self) -> "_ReadAhead":
        self._fill()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, name: str) -> Any:
        """A tensor, or an `Int8Weight` or `Nf4Weight` that was saved so. Each name once, in about the given order."""
        while name not in self._reading:
            self._start_next()
        tensor = self._reading.pop(name).result()
        self._progress(self._num_bytes[name])
        self._fill()
        return tensor

    def _fill(self) -> None:
        while self._to_read and self._ahead() + self._num_bytes[self._to_read[0]] <= _MOST_READ_AHEAD:
            self._start_next()

    def _ahead(self) -> int:
        return sum(self._num_bytes[name] for name in self._reading)

    def _start_next(self) -> None:
        name = self._to_read.popleft()
        self._reading[name] = self._pool.submit(self._read, name)

    def _read(self, name: str) -> torch.Tensor | Int8Weight | Nf4Weight:
        tensor = self._weights.stored(name)
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return tensor.pin_memory() if self._pin else tensor.clone()


def reading_size(config: ModelDescription, weights: Weights) -> int:
    """Bytes that `load_llama` will read."""
    names = set(_reading_order(config))
    return sum(spec.num_bytes for spec in weights.specs() if spec.name in names)
