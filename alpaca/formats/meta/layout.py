"""The shape of a LLaMA checkpoint in Meta's layout: its tensors' names and shapes, and what params.json says of them.

Pure: no files are opened here. Legend: D width, H heads, K key/value heads, F feed-forward width, V vocabulary.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.rope import Rope
from alpaca.architecture.tensors import LAYER, OUTER, Shape, hf_name, is_rotary_table, meta_name
from alpaca.errors import InputError

_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")


def describe(
    *,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_width: int,
    vocab_size: int,
    norm_eps: float,
    rope_theta: float,
    ties_embeddings: bool = False,
) -> ModelDescription:
    """A LLaMA by what Meta's files say of it: context and rope scaling follow from the release (`releases`)."""
    return ModelDescription(
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=width // num_heads,
        ffn_width=ffn_width,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        rope=Rope(theta=rope_theta),
        ties_embeddings=ties_embeddings,
    )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one tensor of the whole model comes from and goes to."""

    meta_name: str
    hf_name: str
    shape: Shape
    split_axis: int | None
    num_rotary_heads: int | None  # heads whose rows are reordered; None for all but wq and wk
    num_kv_heads: int | None = None  # of wk and wv: more shards than these hold copies


def ffn_width(width: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width as Meta's model.py works it out: 2/3 of 4D, scaled, rounded up."""
    hidden = int(2 * (4 * width) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def placements(shape: ModelDescription, *, embedding_axis: int = 1) -> list[Placement]:
    """Every tensor of the model, in Hugging Face's order: embedding, layers, norm, and the head if it is not tied.

    embedding_axis: the axis on which the embedding is split over shards: 1 in LLaMA 1 and 2, 0 in Llama 3.
    """
    head = [] if shape.ties_embeddings else [_place(shape, "head")]
    layers = [_place(shape, role, layer) for layer in range(shape.num_layers) for role in LAYER]
    embedding = replace(_place(shape, "embedding"), split_axis=embedding_axis)
    return [embedding, *layers, _place(shape, "norm"), *head]


def _place(shape: ModelDescription, role: str, layer: int | None = None) -> Placement:
    names = OUTER[role] if layer is None else LAYER[role]
    shapes = shape.outer_shapes if layer is None else shape.layer_shapes
    heads_of = {"query": shape.num_heads, "key": shape.num_kv_heads}
    return Placement(
        meta_name=meta_name(role, layer),
        hf_name=hf_name(role, layer),
        shape=shapes[f"{names.hf}.weight"],
        split_axis=names.shard_axis,
        num_rotary_heads=heads_of.get(role),
        num_kv_heads=shape.num_kv_heads if role in ("key", "value") else None,
    )


# From params.json and the shards' tensors to a shape ------------------------------------------------------------


def read_shape(params: Mapping[str, object], shards: list[Mapping[str, Shape]]) -> tuple[ModelDescription, int]:
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
    shape = describe(
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


def _check_shards(shape: ModelDescription, embedding_axis: int, shards: list[Mapping[str, Shape]]) -> None:
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


def _check_names(plan: list[Placement], shard: Mapping[str, Shape], shape: ModelDescription) -> None:
    known = {placement.meta_name for placement in plan}
    unknown = [name for name in shard if name not in known and not is_rotary_table(name)]
    too_deep = [name for name in unknown if _LAYER_NAME.fullmatch(name)]
    if too_deep:
        raise InputError(f"params.json says n_layers {shape.num_layers}, but the checkpoint also holds {too_deep[0]!r}")
    if unknown:
        raise InputError(f"the checkpoint holds tensors that LLaMA does not have: {_some(unknown)}")
    for name in shard:
        if is_rotary_table(name) and tuple(shard[name]) != (shape.head_width // 2,):
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
