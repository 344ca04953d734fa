"""Loads a Hugging Face folder straight into the engine's own layout, without a second copy of the model in memory."""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.inventory import check_tensors
from alpaca.architecture.rope import NUMBERS_OF
from alpaca.architecture.tensors import FUSED, LAYER, hf_name
from alpaca.errors import UnsupportedModel
from alpaca.formats.hf.folder import read_description
from alpaca.formats.hf.pickled import Weights, open_model_weights, read_as_stored
from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight
from alpaca.formats.hf.saved.unpacking import why_unread
from alpaca.serving.kernels.linear import Linear, make_linear
from alpaca.serving.llama.network import LlamaLayer, LlamaModel, rotary_table

_READERS = 4
_MOST_READ_AHEAD = 1 << 30  # bytes in memory that no layer has taken yet
_LAYER_ORDER = tuple(LAYER)  # the order in which a layer's tensors are read


def supports(config: ModelDescription) -> str | None:
    """Why this engine cannot compute a model; None if it can."""
    if config.model_type != "llama":
        return f"its model_type is {config.model_type!r}, not llama"
    if biased := [name for name in ("attention_bias", "mlp_bias") if getattr(config, name)]:
        return f"it has {biased[0]}, which this engine does not compute"
    if config.activation != "silu":
        return f"its hidden_act is {config.activation!r}; this engine computes silu"
    if reason := why_unread(config.quantized_by):
        return f"it {reason}"
    if config.rope.kind not in NUMBERS_OF:
        return f"its rope type {config.rope.kind!r} is not one of {', '.join(NUMBERS_OF)}"
    return None


def read_llama(folder: Path) -> ModelDescription:
    """Read the description of a folder's model.

    Raises InputError, and UnsupportedModel if this engine cannot compute the model.
    """
    config = read_description(folder, only="llama")
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
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> LlamaModel:
    """The model on `device`, its layers' projections quantized if asked (embedding and head never are).

    `progress(n)` hears of each n bytes of the files that were read. Raises InputError unless the folder
    holds exactly the tensors that its config.json calls for.
    """
    require_tensors(weights, config)
    with _ReadAhead(weights, _reading_order(config), pin=device.type == "cuda", progress=progress) as read:

        def place(name: str) -> torch.Tensor:
            return read.take(name).to(device=device, dtype=dtype)

        def project(*names: str) -> Linear:
            return make_linear(
                [read.take(name) for name in names], quantization=quantization, device=device, dtype=dtype
            )

        embedding = place(hf_name("embedding"))
        layers = [_load_layer(index, place, project) for index in range(config.num_layers)]
        norm = place(hf_name("norm"))
        head = embedding if config.ties_embeddings else read.take(hf_name("head"))
        return LlamaModel(
            config=config,
            embedding=embedding,
            layers=layers,
            norm=norm,
            head=make_linear([head], quantization="none", device=device, dtype=dtype),
            rotary=rotary_table(config, num_positions, dtype).to(device),
            ops=ops,
        )


def _load_layer(index: int, place: Callable[[str], torch.Tensor], project: Callable[..., Linear]) -> LlamaLayer:
    linears = {name: project(*(hf_name(role, index) for role in roles)) for name, roles in FUSED.items()}
    return LlamaLayer(
        **linears,
        input_norm=place(hf_name("attention_norm", index)),
        ffn_norm=place(hf_name("ffn_norm", index)),
    )


def _reading_order(config: ModelDescription) -> list[str]:
    layers = [hf_name(role, index) for index in range(config.num_layers) for role in _LAYER_ORDER]
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
