"""The kinds of models that are known, by model_type of config.json: one row a family, with what differs.

A family's functions give names and shapes of a layer's tensors and of those outside the layers. They take
a `description.ModelDescription` and read its sizes alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from alpaca.architecture.patterns import (
    Turn,
    WindowRule,
    all_but_each,
    every_second,
    from_a_layer_on,
    listed_turns,
    unturned_if_switched,
    windowed_turns,
)
from alpaca.architecture.rope import THETA_OF, RopeRule
from alpaca.architecture.tensors import FUSED, LAYER, LAYER_PREFIX, OUTER, Shape

Shapes = dict[str, Shape]
USUAL_TARGETS = ("q_proj", "v_proj")  # of LoRA, as alpaca-lora has it
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


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
    num_experts: int
    expert_width: int

    @property
    def query_width(self) -> int: ...

    @property
    def kv_width(self) -> int: ...

    @property
    def family(self) -> "Family": ...


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """How a family with experts names them in a layer: the router, the list of experts, and each one's matrices.

    normalizes: config.json's key that says whether the chosen experts' shares are made to sum to one, and its default;
    without a key they always are.
    """

    router: str
    experts: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    normalizes: tuple[str, bool] | None = None

    def of(self, expert: int) -> tuple[str, str, str]:
        """The modules of one expert in its layer: gate, up and down."""
        return tuple(f"{self.experts}.{expert}.{name}" for name in (self.gate, self.up, self.down))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between kinds of models.

    block: how a decoder layer computes ("llama", "opt" or "bloom").
    keys: config.json's names of the sizes; of several the first that is there counts.
    input_groups: a layer's matrices by what they read: those of one group read the same input.
    reads_stream: of these, the ones that read the normalized residual stream; the others read products.
    adapter_targets: the matrices that LoRA changes where nothing else is asked for.
    ties_by_default: whether head and embedding are one matrix where config.json does not say.
    defaults: what transformers takes for a size that config.json lacks, where that is not what LLaMA has.
    biases: for `attention_bias` and `mlp_bias` the key that asks for them and its default; {} where none does.
    biased_attention: whether query, key and value always have biases.
    keeps_scores: whether attention materializes its scores, having no fused kernel.
    one_naming: whether all checkpoints of the family name their tensors alike, so that the names can be checked.

    What a layer of the block "llama" computes:
    norms: the layer's norms by what they follow or precede: "input_norm", "ffn_norm" (before attention and
    feed-forward), "attention_post_norm", "ffn_post_norm" (after them, before the sum).
    fused: the matrices of the engine's layers, by the names of `tensors.FUSED`.
    head_norms: norms of query and key, "each" head by itself or the "whole" projection; "": none.
    norm_offset: what is added to a norm's weights.    scales_wide: whether norms scale before they round.
    activation: config.json's key of the gate's activation, and its default.
    windows, turns, rope: `patterns` and `rope` have the rules.
    numbers: fields of `ModelDescription` by config.json's key and default; null is 0, which is off.
    experts: names of the experts that stand for the feed-forward, of which a router chooses some for each token.
    embeds_by_root: whether embeddings are multiplied by the square root of their width.
    only: keys that must have one of these values, or be missing: with others the family computes something else.
    """

    block: str
    layer: Callable[[Sizes], Shapes]
    outer: Callable[[Sizes], Shapes]
    prefix: str
    keys: Mapping[str, tuple[str, ...]]
    input_groups: tuple[tuple[str, ...], ...]
    reads_stream: tuple[str, ...]
    defaults: Mapping[str, float] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    adapter_targets: tuple[str, ...] = USUAL_TARGETS
    ties_by_default: bool = False
    biased_attention: bool = False
    keeps_scores: bool = False
    one_naming: bool = True
    norms: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_norms: str = ""
    norm_offset: float = 0.0
    scales_wide: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    windows: WindowRule | None = None
    turns: Turn | None = None
    rope: RopeRule = field(default_factory=RopeRule)
    numbers: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    experts: ExpertNames | None = None
    embeds_by_root: bool = False
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


def _matrix(shapes: Shapes, name: str, rows: int, columns: int, *, bias: bool) -> None:
    shapes[f"{name}.weight"] = (rows, columns)
    if bias:
        shapes[f"{name}.bias"] = (rows,)


def _llama_layer(model: Sizes) -> Shapes:
    """The norms and matrices that the family's row names."""
    width, ffn, query, kv = model.width, model.ffn_width, model.query_width, model.kv_width
    family = model.family
    shapes: Shapes = {f"{name}.weight": (width,) for name in family.norms.values()}
    sizes = {"qkv": (query, kv, kv), "attention_out": (width,), "gate_up": (ffn, ffn), "down": (width,)}
    columns = {"qkv": width, "attention_out": query, "gate_up": width, "down": ffn}
    biased = {
        "qkv": model.attention_bias or family.biased_attention, "attention_out": model.attention_bias,
        "gate_up": model.mlp_bias, "down": model.mlp_bias,
    }  # fmt: skip
    for layer, names in family.fused.items():
        rows = sizes[layer] if len(names) > 1 else (sum(sizes[layer]),)
        for name, num_rows in zip(names, rows, strict=True):
            _matrix(shapes, name, num_rows, columns[layer], bias=biased[layer])
    return shapes | _head_norms(model) | _expert_shapes(model)


def _head_norms(model: Sizes) -> Shapes:
    if not model.family.head_norms:
        return {}
    is_whole = model.family.head_norms == "whole"
    widths = (model.query_width, model.kv_width) if is_whole else (model.head_width, model.head_width)
    return {f"{name}.weight": (width,) for name, width in zip(HEAD_NORMS, widths, strict=True)}


def _expert_shapes(model: Sizes) -> Shapes:
    names, width = model.family.experts, model.width
    if names is None:
        return {}
    shapes: Shapes = {f"{names.router}.weight": (model.num_experts, width)}
    for expert in range(model.num_experts):
        gate, up, down = names.of(expert)
        shapes |= dict.fromkeys((f"{gate}.weight", f"{up}.weight"), (model.expert_width, width))
        shapes[f"{down}.weight"] = (width, model.expert_width)
    return shapes


def _llama_outer(model: Sizes) -> Shapes:
    table = (model.vocab_size, model.width)
    shapes: Shapes = {f"{OUTER['embedding'].hf}.weight": table, f"{OUTER['norm'].hf}.weight": (model.width,)}
    return shapes | _own_head(model, model.width)


def _own_head(model: Sizes, width: int) -> Shapes:
    """The head's matrix, where it is not the embedding."""
    return {} if model.ties_embeddings else {f"{OUTER['head'].hf}.weight": (model.vocab_size, width)}


def _opt_layer(model: Sizes) -> Shapes:
    width, shapes = model.width, {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        _matrix(shapes, f"self_attn.{name}", width, width, bias=model.attention_bias)
    _matrix(shapes, "fc1", model.ffn_width, width, bias=model.mlp_bias)
    _matrix(shapes, "fc2", width, model.ffn_width, bias=model.mlp_bias)
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
    return shapes | _own_head(model, embedded)


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
    table = {"word_embeddings.weight": (model.vocab_size, model.width)}
    return {**table, **dict.fromkeys(norms, (model.width,)), **_own_head(model, model.width)}


_LLAMA_KEYS = {
    "width": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "ffn_width": ("intermediate_size",),
}
_BIASES = {name: (name, False) for name in ("attention_bias", "mlp_bias")}
_OPT_KEYS = {**_LLAMA_KEYS, "ffn_width": ("ffn_dim",)}
_BLOOM_KEYS = {
    "width": ("n_embed", "hidden_size"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
}


_NORMS_BEFORE = {"input_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_AFTER = {"attention_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
_NORMS_AROUND = {"input_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_NORMS_AFTER}
_FUSED = {layer: tuple(LAYER[role].hf for role in roles) for layer, roles in FUSED.items()}
_EXPERT_KEYS = {"num_experts": ("num_local_experts", "num_experts"), "experts_per_token": ("num_experts_per_tok",)}
_ROUTED = {
    "fused": {name: _FUSED[name] for name in ("qkv", "attention_out")},
    "input_groups": (("q_proj", "k_proj", "v_proj"), ("o_proj",)), "reads_stream": ("q_proj",),
}  # fmt: skip
_ATTENTION_BIAS = {"attention_bias": _BIASES["attention_bias"]}
_CAUSAL = {"is_causal": (True,)}
_GEMMA = {
    "norm_offset": 1.0, "scales_wide": True, "embeds_by_root": True, "ties_by_default": True, "biases": _ATTENTION_BIAS,
    "only": {**_CAUSAL, "use_bidirectional_attention": (None, False)},
}  # fmt: skip
_GEMMA_SCALE = {"query_scalar": ("query_pre_attn_scalar", 256.0), "logits_softcap": ("final_logit_softcapping", 0.0)}
_PATTERN = ("sliding_window_pattern",)
_TANH_GELU = "gelu_pytorch_tanh"


def _llama_like(**differs: object) -> Family:
    usual = {
        "layer": _llama_layer, "outer": _llama_outer, "prefix": LAYER_PREFIX, "keys": _LLAMA_KEYS,
        "input_groups": (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)),
        "reads_stream": ("q_proj", "gate_proj"), "norms": _NORMS_BEFORE, "fused": _FUSED, "only": _CAUSAL,
    }  # fmt: skip
    return Family(block="llama", **{**usual, **differs})  # type: ignore[arg-type]


# A model of another type that has an intermediate_size is something else: experts, tied tables, another feed-forward.
FAMILIES: Mapping[str, Family] = {
    "llama": _llama_like(biases=_BIASES),
    "mistral": _llama_like(
        defaults={"num_kv_heads": 8, "max_context": 131072}, windows=WindowRule(size=4096, listed=False),
    ),
    "ministral": _llama_like(defaults={"num_kv_heads": 8, "max_context": 131072}, windows=WindowRule(size=4096)),
    "qwen2": _llama_like(
        biased_attention=True, defaults={"num_kv_heads": 32, "max_context": 32768},
        windows=WindowRule(size=4096, needs_switch=True, chosen=from_a_layer_on, reads=("max_window_layers",)),
    ),
    "qwen3": _llama_like(
        head_norms="each", biases=_ATTENTION_BIAS,
        defaults={"num_kv_heads": 32, "max_context": 32768, "head_width": 128},
        windows=WindowRule(size=4096, needs_switch=True, chosen=from_a_layer_on, reads=("max_window_layers",)),
    ),
    "phi3": _llama_like(
        defaults={"max_context": 4096, "norm_eps": 1e-5}, windows=WindowRule(listed=False),
        fused={**_FUSED, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)},
        input_groups=(("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
        reads_stream=("qkv_proj", "gate_up_proj"), adapter_targets=("qkv_proj",),
        rope=RopeRule(turns_parts=True, old_context=4096, renames={"su": "longrope", "yarn": "longrope"}),
    ),
    "gemma": _llama_like(
        **_GEMMA, activation=("hidden_act", _TANH_GELU),
        defaults={"num_kv_heads": 16, "max_context": 8192, "head_width": 256},
    ),
    "gemma2": _llama_like(
        **_GEMMA, activation=("hidden_activation", _TANH_GELU), norms=_NORMS_AROUND,
        defaults={"num_kv_heads": 4, "max_context": 8192, "head_width": 256},
        windows=WindowRule(size=4096, chosen=every_second),
        numbers={
            "query_scalar": ("query_pre_attn_scalar", 256.0), "attention_softcap": ("attn_logit_softcapping", 50.0),
            "logits_softcap": ("final_logit_softcapping", 30.0),
        },
    ),
    "gemma3_text": _llama_like(  # its attn_logit_softcapping is read by nobody
        **_GEMMA, activation=("hidden_activation", _TANH_GELU), norms=_NORMS_AROUND, head_norms="each",
        defaults={"num_kv_heads": 4, "max_context": 131072, "head_width": 256},
        windows=WindowRule(size=4096, chosen=all_but_each(6), reads=_PATTERN),
        rope=RopeRule(theta=THETA_OF["gemma3_text"], per_layer=True),
        numbers=_GEMMA_SCALE,
    ),
    "smollm3": _llama_like(
        biases=_BIASES, ties_by_default=True, defaults={"num_kv_heads": 4, "max_context": 32768},
        windows=WindowRule(chosen=unturned_if_switched), turns=listed_turns, rope=RopeRule(theta=THETA_OF["smollm3"]),
    ),
    "granite": _llama_like(
        biases=_BIASES,
        numbers={
            "attention_multiplier": ("attention_multiplier", 1.0), "logits_divisor": ("logits_scaling", 1.0),
            "embedding_multiplier": ("embedding_multiplier", 1.0),
            "residual_multiplier": ("residual_multiplier", 1.0),
        },
    ),
    "olmo2": _llama_like(
        biases=_ATTENTION_BIAS, head_norms="whole", norms=_NORMS_AFTER, scales_wide=True, defaults={"norm_eps": 1e-5},
    ),
    "exaone4": _llama_like(
        head_norms="each", norms=_NORMS_AFTER, defaults={"num_kv_heads": 32, "norm_eps": 1e-5},
        windows=WindowRule(size=4096, chosen=all_but_each(4), reads=_PATTERN), turns=windowed_turns,
    ),
    "mixtral": _llama_like(
        **_ROUTED, defaults={"num_kv_heads": 8, "max_context": 131072, "norm_eps": 1e-5, "num_experts": 8,
                             "experts_per_token": 2},
        windows=WindowRule(listed=False), rope=RopeRule(theta=THETA_OF["mixtral"]),
        keys={**_LLAMA_KEYS, **_EXPERT_KEYS, "expert_width": ("intermediate_size",)},
        experts=ExpertNames(
            router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate="w1", up="w3", down="w2",
        ),
    ),
    "qwen3_moe": _llama_like(
        **_ROUTED, head_norms="each", biases=_ATTENTION_BIAS,
        defaults={"num_kv_heads": 4, "max_context": 32768, "num_experts": 128, "experts_per_token": 8,
                  "expert_width": 768},
        windows=WindowRule(size=4096, needs_switch=True, listed=False),
        keys={**_LLAMA_KEYS, **_EXPERT_KEYS, "expert_width": ("moe_intermediate_size",)},
        experts=ExpertNames(
            router="mlp.gate", experts="mlp.experts", normalizes=("norm_topk_prob", False),
        ),
        only={**_CAUSAL, "decoder_sparse_step": (1,), "mlp_only_layers": (None, [])},
    ),
    "opt": Family(
        block="opt", layer=_opt_layer, outer=_opt_outer, prefix="model.decoder.layers.", keys=_OPT_KEYS,
        input_groups=(("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
        reads_stream=("q_proj", "fc1"), ties_by_default=True, one_naming=False,
        biases=dict.fromkeys(_BIASES, ("enable_bias", True)),
    ),
    "bloom": Family(
        block="bloom", layer=_bloom_layer, outer=_bloom_outer, prefix="h.", keys=_BLOOM_KEYS,
        input_groups=(("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
        reads_stream=("query_key_value", "dense_h_to_4h"), ties_by_default=True,
        keeps_scores=True, one_naming=False, adapter_targets=("query_key_value",),
    ),
}  # fmt: skip
