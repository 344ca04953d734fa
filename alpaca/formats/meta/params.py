"""params.json of a Hugging Face LLaMA: what Meta's own code needs of config.json, and nothing it cannot compute.

Pure: no files are opened here. Sources of Meta's numbers: params.json of its releases (7B to 65B; Llama 2 70B; Code
Llama 34B; Llama 3 8B, 70B and 405B; Llama 3.2 1B and 3B).
"""

from collections.abc import Mapping

from alpaca.architecture.description import ModelDescription
from alpaca.errors import InputError
from alpaca.formats.hf.saved.unpacking import why_unread
from alpaca.formats.meta.layout import describe, ffn_width
from alpaca.formats.meta.releases import Release, RopeScaling, find_release

_ROPE_TYPES = ("default", "llama3")
# dim, feed-forward width -> multiple_of, ffn_dim_multiplier
_META_FFN: dict[tuple[int, int], tuple[int, float | None]] = {
    (8192, 28672): (4096, 1.3),
    (4096, 14336): (1024, 1.3),
    (16384, 53248): (4096, 1.2),
    (2048, 8192): (256, 1.5),
    (3072, 8192): (256, 1.0),
}
# dim, n_layers -> consolidated.*.pth
_META_SHARDS = {(5120, 40): 2, (6656, 60): 4, (8192, 48): 4, (8192, 80): 8, (16384, 126): 8}


def supports(model: ModelDescription) -> str | None:
    """Why Meta's code cannot compute a model, or None where it can."""
    if model.model_type != "llama":
        return f"its model_type is {model.model_type!r}, not llama"
    if reason := why_unread(model.quantized_by):
        return f"it {reason}"
    unknown = [*model.unusual, *(name for name in ("attention_bias", "mlp_bias") if getattr(model, name))]
    if model.activation != "silu":
        unknown.append(f"hidden_act {model.activation}")
    if unknown:
        return f"it has {', '.join(unknown)}, which Meta's LLaMA has not"
    if model.query_width != model.width:
        return (
            f"its {model.num_heads} heads ({model.num_kv_heads} for keys and values) of {model.head_width} do not make "
            f"the hidden_size {model.width}; Meta's layout has no other kind"
        )
    if model.rope.kind not in _ROPE_TYPES:
        return f"its rope type {model.rope.kind!r} is not one of Meta's code: {', '.join(_ROPE_TYPES)}"
    return None


def meta_shape(model: ModelDescription, *, num_rows: int) -> ModelDescription:
    """The model as Meta's files can say it, with `num_rows` as the vocabulary; its head has a tensor of its own."""
    return describe(
        width=model.width,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        ffn_width=model.ffn_width,
        vocab_size=num_rows,
        norm_eps=model.norm_eps,
        rope_theta=model.rope.theta,
    )


def make_params(
    model: ModelDescription, shape: ModelDescription, *, has_tiktoken: bool, known_vocab: bool
) -> dict[str, object]:
    """params.json of `model`, whose files are written in `shape` (made by `meta_shape`).

    known_vocab: whether the tokenizer has as many tokens as there are rows, which LLaMA 1's -1 stands for.

    Raises InputError for rotary settings that Meta's code does not have.
    """
    multiple_of, multiplier = find_ffn_numbers(shape.width, shape.ffn_width)
    params: dict[str, object] = {"dim": shape.width, "n_layers": shape.num_layers, "n_heads": shape.num_heads}
    if shape.num_kv_heads != shape.num_heads:
        params["n_kv_heads"] = shape.num_kv_heads
    params |= {"vocab_size": -1 if known_vocab and not has_tiktoken else shape.vocab_size, "multiple_of": multiple_of}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params["norm_eps"] = shape.norm_eps
    if shape.rope.theta != 10000.0 or has_tiktoken:
        params["rope_theta"] = shape.rope.theta
    return params | _scaled_rope(model, params, has_tiktoken=has_tiktoken)


def release_of(model: ModelDescription, params: Mapping[str, object], *, has_tiktoken: bool) -> Release:
    """What the converter will take the checkpoint for."""
    return find_release(params, requested=None, has_tiktoken=has_tiktoken, is_tied=model.ties_embeddings)


def find_ffn_numbers(width: int, ffn: int) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier from which Meta's formula makes the feed-forward width: Meta's where known."""
    if (width, ffn) in _META_FFN:
        return _META_FFN[width, ffn]
    multiples = [256, *(2**power for power in range(13, -1, -1))]
    for multiple_of in multiples:
        if ffn_width(width, multiple_of, None) == ffn:
            return multiple_of, None
    ratio = ffn / int(8 * width / 3)
    for multiple_of in multiples:
        for digits in range(1, 5):
            if (number := round(ratio, digits)) > 0 and ffn_width(width, multiple_of, number) == ffn:
                return multiple_of, number
    return 1, (ffn + 0.5) / int(8 * width / 3)


def usual_shards(shape: ModelDescription) -> int:
    """How many files Meta cut a model of this size into; 1 where it has none."""
    return _META_SHARDS.get((shape.width, shape.num_layers), 1)


def _scaled_rope(model: ModelDescription, params: Mapping[str, object], *, has_tiktoken: bool) -> dict[str, object]:
    """What params.json says of Llama 3.1's rope: that it is used, and its numbers where the release has others."""
    if model.rope.kind == "default":
        return {}
    found = RopeScaling(**model.rope.numbers)
    added: dict[str, object] = {"use_scaled_rope": True}
    usual = release_of(model, {**params, **added}, has_tiktoken=has_tiktoken).rope_scaling
    if usual != found:
        added |= {
            "rope_scaling_factor": float(found.factor),
            "rope_high_freq_factor": float(found.high_freq_factor),
        }
    made = release_of(model, {**params, **added}, has_tiktoken=has_tiktoken).rope_scaling
    if made != found:
        raise InputError(f"config.json: Meta's code cannot have the rope scaling {found}; nearest is {made}")
    return added
