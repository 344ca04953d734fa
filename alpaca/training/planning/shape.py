"""The sizes of a model by its config.json alone: a LLaMA or one built like it, an OPT or a BLOOM. No weight is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.reading import read_json


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model. linears: (rows, columns) of a layer's matrices by name; the rest as counts."""

    family: str
    width: int
    ffn_width: int
    num_layers: int
    num_heads: int
    query_width: int
    kv_width: int
    vocab_size: int
    linears: Mapping[str, tuple[int, int]]
    num_layer_vectors: int  # parameters of a layer that are no matrices
    num_outside: int  # parameters outside the layers, the head's among them
    eager_attention: bool = False  # keeps the scores

    @property
    def num_linear(self) -> int:
        """Parameters in the layers' matrices: those that are quantized."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def num_parameters(self) -> int:
        return self.num_linear + self.num_layers * self.num_layer_vectors + self.num_outside

    @property
    def num_head(self) -> int:
        return self.vocab_size * self.width

    def num_adapter(self, *, rank: int, targets: tuple[str, ...], dora: bool) -> int:
        """Parameters of LoRA's two matrices, rank x columns and rows x rank, on each target; DoRA's magnitudes."""
        sizes = [size for name, size in self.linears.items() if name in targets]
        return self.num_layers * sum(rank * (rows + columns) + rows * dora for rows, columns in sizes)


def read_shape(folder: Path, *, num_tokens: int = 0) -> Shape:
    """The sizes config.json names, the vocabulary grown to `num_tokens`. Raises InputError for an unknown kind."""
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in _READERS:
        raise InputError(
            f"{folder / 'config.json'}: no plan for model_type {kind!r}; the sizes of {', '.join(_READERS)} are known"
        )
    try:
        return _READERS[kind](config, max(num_tokens, config["vocab_size"]))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"{folder / 'config.json'}: no plan for model_type {kind!r}: {type(error).__name__} {error}; expected the "
            "sizes that transformers writes"
        ) from error


def _llama_shape(config: dict, vocab: int) -> Shape:
    width, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    query, kv = heads * head_width, (config.get("num_key_value_heads") or heads) * head_width
    biases = (query + 2 * kv + width) * bool(config.get("attention_bias"))
    biases += (2 * ffn + width) * bool(config.get("mlp_bias"))
    kind = config["model_type"]
    if kind == "qwen2":
        biases = query + 2 * kv
    if kind == "qwen3":  # norms of each head's query and key
        biases += 2 * head_width
    linears = {
        "q_proj": (query, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, query),
        "gate_proj": (ffn, width), "up_proj": (ffn, width), "down_proj": (width, ffn),
    }  # fmt: skip
    if kind == "phi3":
        linears = {
            "qkv_proj": (query + 2 * kv, width), "o_proj": (width, query), "gate_up_proj": (2 * ffn, width),
            "down_proj": (width, ffn),
        }  # fmt: skip
    return Shape(
        family="llama", width=width, ffn_width=ffn, num_layers=config["num_hidden_layers"], num_heads=heads,
        query_width=query, kv_width=kv, vocab_size=vocab, num_layer_vectors=2 * width + biases,
        linears=linears,
        num_outside=vocab * width * (1 if config.get("tie_word_embeddings") else 2) + width,
    )  # fmt: skip


def _opt_shape(config: dict, vocab: int) -> Shape:
    width, ffn = config["hidden_size"], config["ffn_dim"]
    embedded = config.get("word_embed_proj_dim", width)
    outside = vocab * embedded + (config["max_position_embeddings"] + 2) * width
    outside += 2 * width * embedded if embedded != width else 0
    outside += 2 * width if config.get("do_layer_norm_before", True) else 0
    square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width))
    return Shape(
        family="opt", width=width, ffn_width=ffn, num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], query_width=width, kv_width=width, vocab_size=vocab,
        linears={**square, "fc1": (ffn, width), "fc2": (width, ffn)},
        num_layer_vectors=4 * width + ffn + width + 4 * width, num_outside=outside,
    )  # fmt: skip


def _bloom_shape(config: dict, vocab: int) -> Shape:
    width = config.get("hidden_size") or config["n_embed"]
    return Shape(
        family="bloom", width=width, ffn_width=4 * width,
        num_layers=config.get("n_layer") or config["num_hidden_layers"],
        num_heads=config.get("n_head") or config["num_attention_heads"], query_width=width, kv_width=width,
        vocab_size=vocab, eager_attention=True,
        linears={
            "query_key_value": (3 * width, width), "dense": (width, width),
            "dense_h_to_4h": (4 * width, width), "dense_4h_to_h": (width, 4 * width),
        },
        num_layer_vectors=3 * width + width + 4 * width + width + 4 * width, num_outside=vocab * width + 4 * width,
    )  # fmt: skip


# Others that have an intermediate_size are something else: experts, tied tables, another feed-forward layer.
_READERS: dict[str, Callable[[dict, int], Shape]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _llama_shape),
    "opt": _opt_shape,
    "bloom": _bloom_shape,
}
