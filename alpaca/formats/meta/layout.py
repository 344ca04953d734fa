"""The shape of a LLaMA checkpoint in Meta's layout: its tensors' names and shapes, and what params.json says of them.

Pure: no files are opened here. Legend: D width, H heads, K key/value heads, F feed-forward width, V vocabulary.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from alpaca.errors import InputError

Shape = tuple[int, ...]
# Meta's name -> (Hugging Face's name, axis on which shards are split; None: every shard holds a copy).
LAYER_TENSORS: dict[str, tuple[str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
# The embedding's axis is Meta's for LLaMA 1 and 2; `embedding_axis` reads the true one from the shapes.
OUTER_TENSORS: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_ROTARY_FREQUENCIES = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A LLaMA model's sizes. Source: params.json where it says so, else the tensors.

    ties_embeddings: the embedding is the head, which has no tensor of its own.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_width: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    ties_embeddings: bool = False

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one tensor of the whole model comes from and goes to."""

    meta_name: str
    hf_name: str
    shape: Shape
    split_axis: int | None
    num_rotary_heads: int | None  # heads whose rows are reordered; None for all but wq and wk
    num_kv_heads: int | None = None  # of wk and wv: more shards than these hold copies


def is_rotary_frequencies(name: str) -> bool:
    """Whether a tensor is the stored rotary table, which the model computes anew in float32."""
    return _ROTARY_FREQUENCIES.fullmatch(name) is not None


def ffn_width(width: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width as Meta's model.py works it out: 2/3 of 4D, scaled, rounded up."""
    hidden = int(2 * (4 * width) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def placements(shape: ModelShape, *, embedding_axis: int = 1) -> list[Placement]:
    """Every tensor of the model, in Hugging Face's order: embedding, layers, norm, and the head if it is not tied."""
    shapes = _whole_shapes(shape)
    rotary = {"attention.wq.weight": shape.num_heads, "attention.wk.weight": shape.num_kv_heads}
    kv_heads = dict.fromkeys(("attention.wk.weight", "attention.wv.weight"), shape.num_kv_heads)

    def place(meta_name: str, kind: str, hf_name: str, axis: int | None) -> Placement:
        return Placement(
            meta_name=meta_name, hf_name=hf_name, shape=shapes[kind], split_axis=axis,
            num_rotary_heads=rotary.get(kind), num_kv_heads=kv_heads.get(kind),
        )  # fmt: skip

    outer = {kind: place(kind, kind, *target) for kind, target in OUTER_TENSORS.items()}
    embedding = place("tok_embeddings.weight", "tok_embeddings.weight", "model.embed_tokens.weight", embedding_axis)
    layers = [
        place(f"layers.{layer}.{kind}", kind, f"model.layers.{layer}.{hf_name}", axis)
        for layer in range(shape.num_layers)
        for kind, (hf_name, axis) in LAYER_TENSORS.items()
    ]
    head = [] if shape.ties_embeddings else [outer["output.weight"]]
    return [embedding, *layers, outer["norm.weight"], *head]


def _whole_shapes(shape: ModelShape) -> dict[str, Shape]:
    width, kv_width = shape.width, shape.num_kv_heads * shape.head_width
    return {
        "attention.wq.weight": (width, width),
        "attention.wk.weight": (kv_width, width),
        "attention.wv.weight": (kv_width, width),
        "attention.wo.weight": (width, width),
        "feed_forward.w1.weight": (shape.ffn_width, width),
        "feed_forward.w2.weight": (width, shape.ffn_width),
        "feed_forward.w3.weight": (shape.ffn_width, width),
        "attention_norm.weight": (width,),
        "ffn_norm.weight": (width,),
        "tok_embeddings.weight": (shape.vocab_size, width),
        "norm.weight": (width,),
        "output.weight": (shape.vocab_size, width),
    }


# From params.json and the shards' tensors to a shape ------------------------------------------------------------


def read_shape(params: Mapping[str, object], shards: list[Mapping[str, Shape]]) -> tuple[ModelShape, int]:
    """The model's shape and the axis on which its embedding is split, from params.json and each shard's shapes.

    A checkpoint with Llama 3.1's rope and without a head has tied embeddings (Llama 3.2); any other must have one.
    Raises InputError when they contradict each other: a tensor missing, unknown, or of another shape than params.json
    makes it (both shapes are named).
    """
    _refuse_other_models(params)
    first, num_shards = shards[0], len(shards)
    width = positive(params, "dim")
    num_heads = positive(params, "n_heads")
    num_kv_heads = positive(params, "n_kv_heads", default=num_heads)
    if width % num_heads or (width // num_heads) % 2 or num_heads % num_kv_heads:
        raise InputError(
            f"params.json: dim {width} must be an even multiple of n_heads {num_heads}, "
            f"and n_heads a multiple of n_kv_heads {num_kv_heads}"
        )
    axis = _embedding_axis(first, width, num_shards)
    shape = ModelShape(
        width=width,
        num_layers=positive(params, "n_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffn_width=_read_ffn_width(params, width, first, num_shards),
        vocab_size=_read_vocab_size(params, first, axis, num_shards),
        norm_eps=number(params, "norm_eps", 1e-5),
        rope_theta=number(params, "rope_theta", 10000.0),
        ties_embeddings=bool(params.get("use_scaled_rope")) and not any("output.weight" in shard for shard in shards),
    )
    _check_shards(shape, axis, shards)
    return shape, axis


def _refuse_other_models(params: Mapping[str, object]) -> None:
    for key in ("quantization_args", "lora_args"):
        if params.get(key):
            raise InputError(f"params.json has {key}: a quantized checkpoint; take the release in bfloat16")
    if any(key.startswith("vision_") and params[key] not in (None, -1) for key in params):
        raise InputError("params.json describes a model that sees images (Llama 3.2 11B, 90B): only text is converted")


def positive(params: Mapping[str, object], key: str, default: int | None = None) -> int:
    """A whole number of params.json above 0. Raises InputError."""
    value = params.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value <= 0:
        raise InputError(f"params.json: expected a positive number for {key!r}, found {value!r}")
    return value


def number(params: Mapping[str, object], key: str, default: float | None) -> float | None:
    """A number of params.json above 0. Raises InputError."""
    value = params.get(key)
    value = default if value is None else value
    if value is not None and (not isinstance(value, int | float) or not value > 0):
        raise InputError(f"params.json: expected a positive number for {key!r}, found {value!r}")
    return None if value is None else float(value)


def _embedding_axis(first: Mapping[str, Shape], width: int, num_shards: int) -> int:
    """The axis whose parts are whole on the other. Each shard's rows or columns are then held against the head's."""
    found = _shape_of(first, "tok_embeddings.weight")
    if len(found) != 2 or found[1] not in (width, width // num_shards):
        raise InputError(
            f"'tok_embeddings.weight' is {found} in each of {num_shards} shards; with dim {width} in params.json it "
            f"should have {width} columns (Llama 3) or {width // num_shards} (before)"
            + missing_shards_hint((width // num_shards,), found[1:], num_shards)
        )
    return 0 if num_shards > 1 and found[1] == width else 1


def _read_ffn_width(params: Mapping[str, object], width: int, first: Mapping[str, Shape], num_shards: int) -> int:
    """From the tensors; where params.json gives the formula's inputs they must agree."""
    found = _shape_of(first, "layers.0.feed_forward.w1.weight")[0] * num_shards
    if "multiple_of" not in params:
        return found
    multiplier = number(params, "ffn_dim_multiplier", None)
    expected = ffn_width(width, positive(params, "multiple_of"), multiplier)
    if expected != found:
        raise InputError(
            _contradiction("layers.0.feed_forward.w1.weight", (expected, width), (found, width), num_shards)
            + " (from dim, multiple_of and ffn_dim_multiplier)"
        )
    return found


def _read_vocab_size(params: Mapping[str, object], first: Mapping[str, Shape], axis: int, num_shards: int) -> int:
    """From the embedding; LLaMA 1 says -1, any other number must agree."""
    rows, columns = _shape_of(first, "tok_embeddings.weight")
    found = rows * num_shards if axis == 0 else rows
    said = params.get("vocab_size", -1)
    if isinstance(said, int) and said > 0 and said != found:
        raise InputError(_contradiction("tok_embeddings.weight", (said, columns), (found, columns), 1))
    return found


def _shape_of(shard: Mapping[str, Shape], name: str) -> Shape:
    if name not in shard:
        raise InputError(f"the checkpoint has no tensor {name!r}; found: {_some(shard)}")
    return tuple(shard[name])


def _check_shards(shape: ModelShape, embedding_axis: int, shards: list[Mapping[str, Shape]]) -> None:
    plan = placements(shape, embedding_axis=embedding_axis)
    for number, shard in enumerate(shards):
        for placement in plan:
            _check_tensor(placement, shard, number, len(shards))
        _check_names(plan, shard, shape)


def _check_tensor(placement: Placement, shard: Mapping[str, Shape], number: int, num_shards: int) -> None:
    expected = shard_shape(placement, num_shards)
    if placement.meta_name not in shard:
        raise InputError(f"shard {number} has no tensor {placement.meta_name!r}, which params.json calls for")
    if tuple(shard[placement.meta_name]) != expected:
        raise InputError(
            f"shard {number}: " + _contradiction(placement.meta_name, expected, shard[placement.meta_name], num_shards)
        )


def _check_names(plan: list[Placement], shard: Mapping[str, Shape], shape: ModelShape) -> None:
    known = {placement.meta_name for placement in plan}
    unknown = [name for name in shard if name not in known and not is_rotary_frequencies(name)]
    too_deep = [name for name in unknown if _LAYER_NAME.fullmatch(name)]
    if too_deep:
        raise InputError(f"params.json says n_layers {shape.num_layers}, but the checkpoint also holds {too_deep[0]!r}")
    if unknown:
        raise InputError(f"the checkpoint holds tensors that LLaMA does not have: {_some(unknown)}")
    for name in shard:
        if is_rotary_frequencies(name) and tuple(shard[name]) != (shape.head_width // 2,):
            raise InputError(_contradiction(name, (shape.head_width // 2,), shard[name], 1) + " (from dim and n_heads)")


def shard_shape(placement: Placement, num_shards: int) -> Shape:
    """The shape one of `num_shards` shards holds. Raises InputError when the tensor does not divide."""
    axis, heads = placement.split_axis, placement.num_kv_heads
    if axis is None:
        return placement.shape
    if heads is not None and num_shards > heads and num_shards % heads == 0:
        return (placement.shape[0] // heads, *placement.shape[1:])
    if (heads or placement.shape[axis]) % num_shards:
        raise InputError(
            f"{placement.meta_name!r} {placement.shape} cannot be split over {num_shards} shards on axis {axis}"
        )
    return tuple(size // num_shards if i == axis else size for i, size in enumerate(placement.shape))


def _contradiction(name: str, expected: Shape, found: Iterable[int], num_shards: int) -> str:
    found = tuple(found)
    text = f"params.json makes {name!r} {expected}, the tensor is {found}"
    if num_shards > 1:
        text += f" in each of {num_shards} shards"
    if ".wk." in name or ".wv." in name:  # wq was checked before and is right
        return text + "; does n_kv_heads in params.json say how many key/value heads there are?"
    return text + missing_shards_hint(expected, found, num_shards)


def missing_shards_hint(expected: Shape, found: Shape, num_shards: int) -> str:
    """A guess at the cause: tensors a whole factor too small mean that shards are missing."""
    factors = {large / small for large, small in zip(expected, found, strict=False) if small and large != small}
    if len(expected) == len(found) and len(factors) == 1 and (factor := factors.pop()) in (2, 4, 8, 16):
        return f"; is this {num_shards} of {num_shards * int(factor)} shards? Put all consolidated.*.pth there"
    return ""


def _some(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(repr(name) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
