"""params.json of a Hugging Face LLaMA: what Meta's own code needs of config.json, and nothing it cannot compute.

Pure: no files are opened here. Sources of Meta's numbers: params.json of its releases (7B to 65B; Llama 2 70B; Code
Llama 34B; Llama 3 8B, 70B and 405B; Llama 3.2 1B and 3B).
"""

from collections.abc import Mapping
from typing import Any

from alpaca.errors import InputError
from alpaca.formats.meta.layout import ModelShape, ffn_width
from alpaca.formats.meta.releases import Release, RopeScaling, find_release
from alpaca.formats.rope import read_rope

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


def shape_of_config(config: Mapping[str, Any], *, num_rows: int) -> ModelShape:
    """The sizes in config.json, with `num_rows` as the vocabulary. Raises InputError for what Meta's code has not."""
    _check_model(config)
    width, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    kv_heads = _whole(config, "num_key_value_heads", heads)
    head_width = _whole(config, "head_dim", width // heads)
    if head_width * heads != width or heads % kv_heads or head_width % 2:
        raise InputError(
            f"config.json: {heads} heads ({kv_heads} for keys and values) of {head_width} do not make the hidden_size "
            f"{width}; Meta's layout has no other kind"
        )
    return ModelShape(
        width=width,
        num_layers=_whole(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_width=_whole(config, "intermediate_size"),
        vocab_size=num_rows,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(read_rope(config).get("rope_theta", 10000.0)),
    )


def make_params(
    config: Mapping[str, Any], shape: ModelShape, *, has_tiktoken: bool, known_vocab: bool
) -> dict[str, object]:
    """params.json. known_vocab: whether the tokenizer has as many tokens as there are rows, as LLaMA 1's -1 says.

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
    if shape.rope_theta != 10000.0 or has_tiktoken:
        params["rope_theta"] = shape.rope_theta
    return params | _scaled_rope(config, params, has_tiktoken=has_tiktoken)


def release_of(config: Mapping[str, Any], params: Mapping[str, object], *, has_tiktoken: bool) -> Release:
    """What the converter will take the checkpoint for."""
    return find_release(
        params, requested=None, has_tiktoken=has_tiktoken, is_tied=bool(config.get("tie_word_embeddings"))
    )


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


def usual_shards(shape: ModelShape) -> int:
    """How many files Meta cut a model of this size into; 1 where it has none."""
    return _META_SHARDS.get((shape.width, shape.num_layers), 1)


def _check_model(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "llama":
        raise InputError(f"config.json: expected the model_type llama, found {config.get('model_type')!r}")
    if config.get("quantization_config"):
        raise InputError("config.json has a quantization_config; give the model unquantized")
    unknown = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if config.get("hidden_act", "silu") != "silu":
        unknown.append(f"hidden_act {config['hidden_act']}")
    if unknown:
        raise InputError(f"config.json has {', '.join(unknown)}, which Meta's LLaMA has not")


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: expected a whole number above 0 for {name!r}, found {value!r}")
    return value


def _scaled_rope(config: Mapping[str, Any], params: Mapping[str, object], *, has_tiktoken: bool) -> dict[str, object]:
    """What params.json says of Llama 3.1's rope: that it is used, and numbers where the release has others."""
    rope = read_rope(config)
    if rope["rope_type"] not in _ROPE_TYPES:
        known = ", ".join(_ROPE_TYPES)
        raise InputError(f"config.json: Meta's code has the rope types {known}; found {rope['rope_type']!r}")
    if rope["rope_type"] == "default":
        return {}
    found = {name: rope.get(name, value) for name, value in RopeScaling(factor=0.0).config().items()}
    added: dict[str, object] = {"use_scaled_rope": True}
    numbers = {"rope_scaling_factor": float(found["factor"]), "rope_high_freq_factor": float(found["high_freq_factor"])}
    usual = release_of(config, {**params, **added}, has_tiktoken=has_tiktoken).rope_scaling
    if usual is None or usual.config() != found:
        added |= numbers
    made = release_of(config, {**params, **added}, has_tiktoken=has_tiktoken).rope_scaling
    if made is None or made.config() != found:
        raise InputError(f"config.json: Meta's code cannot have the rope scaling {found}; nearest is {made}")
    return added
