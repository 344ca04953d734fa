"""From a Hugging Face folder straight into the engine's own layout: no second copy of the model at any time."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType

import torch

from alpaca.errors import InputError
from alpaca.formats.hf.folder import WeightsFolder, require_all_weights
from alpaca.serving.kernels.linear import Linear, make_linear
from alpaca.serving.llama.config import LlamaConfig
from alpaca.serving.llama.network import LlamaLayer, LlamaModel, rotary_table

_READERS = 4
_MOST_READ_AHEAD = 1 << 30  # bytes in memory that no layer has taken yet
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def load_llama(
    weights: WeightsFolder,
    config: LlamaConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
    num_positions: int,
    ops: ModuleType,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> LlamaModel:
    """The model on `device`, its layers' projections quantized if asked (embedding and head never are).

    `progress(n)` hears of each n bytes of the files that were read. Raises InputError for tensors that are missing or
    of another shape than the config says.
    """
    check_tensors(weights, config)
    with _ReadAhead(weights, _reading_order(config), pin=device.type == "cuda", progress=progress) as read:

        def place(name: str) -> torch.Tensor:
            return read.take(name).to(device=device, dtype=dtype)

        def project(*names: str) -> Linear:
            return make_linear(
                [read.take(name) for name in names], quantization=quantization, device=device, dtype=dtype
            )

        embedding = place(_EMBEDDING)
        layers = [_load_layer(f"model.layers.{index}.", place, project) for index in range(config.num_layers)]
        norm = place(_NORM)
        head = embedding if config.ties_embeddings else read.take(_HEAD)
        return LlamaModel(
            config=config,
            embedding=embedding,
            layers=layers,
            norm=norm,
            head=make_linear([head], quantization="none", device=device, dtype=dtype),
            rotary=rotary_table(config, num_positions, dtype).to(device),
            ops=ops,
        )


def _load_layer(prefix: str, place: Callable[[str], torch.Tensor], project: Callable[..., Linear]) -> LlamaLayer:
    q, k, v, out, gate, up, down = (f"{prefix}{name}.weight" for name in (*_ATTENTION, *_FEED_FORWARD))
    input_norm, ffn_norm = (f"{prefix}{name}.weight" for name in _NORMS)
    return LlamaLayer(
        qkv=project(q, k, v),
        attention_out=project(out),
        gate_up=project(gate, up),
        down=project(down),
        input_norm=place(input_norm),
        ffn_norm=place(ffn_norm),
    )


def _reading_order(config: LlamaConfig) -> list[str]:
    layers = [
        f"model.layers.{index}.{name}.weight"
        for index in range(config.num_layers)
        for name in (*_ATTENTION, *_FEED_FORWARD, *_NORMS)
    ]
    return [_EMBEDDING, *layers, _NORM, *([] if config.ties_embeddings else [_HEAD])]


def check_tensors(weights: WeightsFolder, config: LlamaConfig) -> None:
    """Raise InputError unless the folder has every tensor of the model, in the shape the config says."""
    shapes = {spec.name: spec.shape for spec in weights.specs()}
    expected = _expected_shapes(config)
    require_all_weights(weights.path, expected.keys() - shapes.keys())
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(
                f"{weights.path}: {name} is {list(shapes[name])}, config.json makes it {list(shape)}; "
                "they are not of one model"
            )


def _expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    width, q_width, kv_width = (
        config.width,
        config.num_heads * config.head_width,
        config.num_kv_heads * config.head_width,
    )
    per_layer = {
        **dict(
            zip(_ATTENTION, [(q_width, width), (kv_width, width), (kv_width, width), (width, q_width)], strict=True)
        ),
        **dict(zip(_FEED_FORWARD, [(config.ffn_width, width)] * 2 + [(width, config.ffn_width)], strict=True)),
        **dict.fromkeys(_NORMS, (width,)),
    }
    table = (config.vocab_size, width)
    outer = {_EMBEDDING: table, _HEAD: table, _NORM: (width,)}

    def shape_of(name: str) -> tuple[int, ...]:
        return outer[name] if name in outer else per_layer[name.split(".", 3)[3].removesuffix(".weight")]

    return {name: shape_of(name) for name in _reading_order(config)}


class _ReadAhead:
    """Reads tensors in a known order, some threads and at most `_MOST_READ_AHEAD` bytes ahead of who takes them.

    For a GPU they come in pinned memory, so that their copy to the device is quick.
    """

    def __init__(
        self, weights: WeightsFolder, names: list[str], *, pin: bool, progress: Callable[[int], object]
    ) -> None:
        self._weights, self._pin, self._progress = weights, pin, progress
        self._num_bytes = {spec.name: spec.num_bytes for spec in weights.specs()}
        self._to_read = deque(names)
        self._reading: dict[str, Future[torch.Tensor]] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read-weights")

    def __enter__(self) -> "_ReadAhead":
        self._fill()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, name: str) -> torch.Tensor:
        """A tensor as it is in its file, in memory. Each name once, in about the given order."""
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

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._weights.tensor(name)
        return tensor.pin_memory() if self._pin else tensor.clone()


def reading_size(config: LlamaConfig, weights: WeightsFolder) -> int:
    """Bytes that `load_llama` will read."""
    names = set(_reading_order(config))
    return sum(spec.num_bytes for spec in weights.specs() if spec.name in names)
