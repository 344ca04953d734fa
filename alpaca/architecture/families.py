"""The kinds of models that are known, by model_type of config.json: one row a family, with what differs.

A family's functions give names and shapes of a layer's tensors and of those outside the layers. They take
a `description.ModelDescription` and read its sizes alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from alpaca.architecture.tensors import LAYER, LAYER_PREFIX, OUTER, Shape

Shapes = dict[str, Shape]
USUAL_TARGETS = ("q_proj", "v_proj")  # of LoRA, as alpaca-lora has it


class Sizes(Protocol):
    """What a family's functions read of a `description.ModelDescription`, which says what each value is."""

    width: int
    head_width: int
    ffn_width: int
    vocab_size: int
    max_context: int
    embedding_width: int
    has_final_norm: bool
    ties_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def query_width(self) -> int: ...

    @property
    def kv_width(self) -> int: ...

    @property
    def family(self) -> "Family": ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between kinds of models.

    block: how a decoder layer computes ("llama", "opt" or "bloom").
    keys: config.json's names of the sizes; of several the first that is there counts.
    input_groups: a layer's matrices by what they read: those of one group read the same input.
    reads_stream: of these, the ones that read the normalized residual stream; the others read products.
    adapter_targets: the matrices that LoRA changes where nothing else is asked for.
    ties_by_default: whether head and embedding are one matrix where config.json does not say.
    biased_attention: whether query, key and value always have biases.
    keeps_scores: whether attention materializes its scores, having no fused kernel.
    one_naming: whether all checkpoints of the family name their tensors alike, so that the names can be checked.
    """

    block: str
    layer: Callable[[Sizes], Shapes]
    outer: Callable[[Sizes], Shapes]
    prefix: str
    keys: Mapping[str, tuple[str, ...]]
    input_groups: tuple[tuple[str, ...], ...]
    reads_stream: tuple[str, ...]
    adapter_targets: tuple[str, ...] = USUAL_TARGETS
    ties_by_default: bool = False
    biased_attention: bool = False
    keeps_scores: bool = False
    one_naming: bool = True


def _matrix(shapes: Shapes, name: str, rows: int, columns: int, *, bias: bool) -> None:
    shapes[f"{name}.weight"] = (rows, columns)
    if bias:
        shapes[f"{name}.bias"] = (rows,)


def _llama_layer(model: Sizes) -> Shapes:
    width, ffn, query, kv = model.width, model.ffn_width, model.query_width, model.kv_width
    names = {role: name.hf for role, name in LAYER.items()}
    shapes: Shapes = {f"{names[role]}.weight": (width,) for role in ("attention_norm", "ffn_norm")}
    for role, rows in (("query", query), ("key", kv), ("value", kv)):
        _matrix(shapes, names[role], rows, width, bias=model.attention_bias or model.family.biased_attention)
    _matrix(shapes, names["attention_out"], width, query, bias=model.attention_bias)
    for role, rows, columns in (("gate", ffn, width), ("up", ffn, width), ("down", width, ffn)):
        _matrix(shapes, names[role], rows, columns, bias=model.mlp_bias)
    return shapes


def _llama_outer(model: Sizes) -> Shapes:
    table = (model.vocab_size, model.width)
    shapes: Shapes = {f"{OUTER['embedding'].hf}.weight": table, f"{OUTER['norm'].hf}.weight": (model.width,)}
    if not model.ties_embeddings:
        shapes[f"{OUTER['head'].hf}.weight"] = table
    return shapes


def _qwen3_layer(model: Sizes) -> Shapes:
    """LLaMA's, with norms of each head's query and key."""
    norms = dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (model.head_width,))
    return {**_llama_layer(model), **norms}


def _phi3_layer(model: Sizes) -> Shapes:
    """LLaMA's, with query, key and value in one matrix, and gate and up in another."""
    width, names = model.width, {role: name.hf for role, name in LAYER.items()}
    return {
        f"{names['attention_norm']}.weight": (width,),
        f"{names['ffn_norm']}.weight": (width,),
        "self_attn.qkv_proj.weight": (model.query_width + 2 * model.kv_width, width),
        f"{names['attention_out']}.weight": (width, model.query_width),
        "mlp.gate_up_proj.weight": (2 * model.ffn_width, width),
        f"{names['down']}.weight": (width, model.ffn_width),
    }


def _opt_layer(model: Sizes) -> Shapes:
    width, shapes = model.width, {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        _matrix(shapes, f"self_attn.{name}", width, width, bias=True)
    _matrix(shapes, "fc1", model.ffn_width, width, bias=True)
    _matrix(shapes, "fc2", width, model.ffn_width, bias=True)
    norms = [f"{name}.{part}" for name in ("self_attn_layer_norm", "final_layer_norm") for part in ("weight", "bias")]
    return shapes | dict.fromkeys(norms, (width,))


def _opt_outer(model: Sizes) -> Shapes:
    """Small OPTs have an embedding of another width; its positions are two more than the context."""
    width, embedded, prefix = model.width, model.embedding_width, "model.decoder"
    shapes: Shapes = {f"{prefix}.embed_tokens.weight": (model.vocab_size, embedded)}
    shapes[f"{prefix}.embed_positions.weight"] = (model.max_context + 2, width)
    if embedded != width:
        shapes |= {f"{prefix}.project_in.weight": (width, embedded), f"{prefix}.project_out.weight": (embedded, width)}
    if model.has_final_norm:
        shapes |= dict.fromkeys((f"{prefix}.final_layer_norm.{part}" for part in ("weight", "bias")), (width,))
    return shapes


def _bloom_layer(model: Sizes) -> Shapes:
    width, shapes = model.width, {}
    _matrix(shapes, "self_attention.query_key_value", 3 * width, width, bias=True)
    _matrix(shapes, "self_attention.dense", width, width, bias=True)
    _matrix(shapes, "mlp.dense_h_to_4h", 4 * width, width, bias=True)
    _matrix(shapes, "mlp.dense_4h_to_h", width, 4 * width, bias=True)
    norms = [
        f"{name}.{part}" for name in ("input_layernorm", "post_attention_layernorm") for part in ("weight", "bias")
    ]
    return shapes | dict.fromkeys(norms, (width,))


def _bloom_outer(model: Sizes) -> Shapes:
    norms = [f"{name}.{part}" for name in ("word_embeddings_layernorm", "ln_f") for part in ("weight", "bias")]
    return {"word_embeddings.weight": (model.vocab_size, model.width), **dict.fromkeys(norms, (model.width,))}


_LLAMA_KEYS = {
    "width": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "ffn_width": ("intermediate_size",),
}
_OPT_KEYS = {**_LLAMA_KEYS, "ffn_width": ("ffn_dim",)}
_BLOOM_KEYS = {
    "width": ("hidden_size", "n_embed"),
    "num_layers": ("n_layer", "num_hidden_layers"),
    "num_heads": ("n_head", "num_attention_heads"),
}


def _llama_like(**differs: object) -> Family:
    usual = {
        "layer": _llama_layer, "outer": _llama_outer, "prefix": LAYER_PREFIX, "keys": _LLAMA_KEYS,
        "input_groups": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)),
        "reads_stream": ("q_proj", "gate_proj"),
    }  # fmt: skip
    return Family(block="llama", **{**usual, **differs})  # type: ignore[arg-type]


# A model of another type that has an intermediate_size is something else: experts, tied tables, another feed-forward.
FAMILIES: Mapping[str, Family] = {
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "qwen2": _llama_like(biased_attention=True),
    "qwen3": _llama_like(layer=_qwen3_layer),
    "phi3": _llama_like(
        layer=_phi3_layer, input_groups=(("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
        reads_stream=("qkv_proj", "gate_up_proj"),
    ),
    "opt": Family(
        block="opt", layer=_opt_layer, outer=_opt_outer, prefix="model.decoder.layers.", keys=_OPT_KEYS,
        input_groups=(("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
        reads_stream=("q_proj", "fc1"), ties_by_default=True, one_naming=False,
    ),
    "bloom": Family(
        block="bloom", layer=_bloom_layer, outer=_bloom_outer, prefix="h.", keys=_BLOOM_KEYS,
        input_groups=(("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
        reads_stream=("query_key_value", "dense_h_to_4h"), ties_by_default=True,
        keeps_scores=True, one_naming=False, adapter_targets=("query_key_value",),
    ),
}  # fmt: skip
