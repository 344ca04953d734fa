"""What a model is: its sizes and kinds, read from config.json once, every bound checked.

Serving, training, planning and every export read a model through `ModelDescription`. What one of them cannot do with a
model it says by a function `supports(description)` of its own, so that a difference between them is one that is meant.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alpaca.architecture.families import FAMILIES, Family
from alpaca.architecture.patterns import read_patterns
from alpaca.architecture.rope import Rope, read_rope, read_windowed_rope
from alpaca.architecture.tensors import Shape
from alpaca.errors import InputError, UnsupportedModel

# Far beyond any model there is; with them no product of sizes leaves 64 bits by a number that a file merely claims.
_MOST = {
    "width": 1 << 18, "num_layers": 1 << 14, "num_heads": 1 << 14, "num_kv_heads": 1 << 14, "head_width": 1 << 16,
    "ffn_width": 1 << 22, "vocab_size": 1 << 28, "max_context": 1 << 32, "num_experts": 1 << 14,
    "experts_per_token": 1 << 14, "expert_width": 1 << 22,
}  # fmt: skip
_SAME_ACTIVATION = {"swish": "silu"}


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A decoder-only model's sizes and kinds.

    width: of the residual stream.    head_width: of one head's query, key and value.    ties_embeddings: the head is
    the embedding and has no tensor of its own.    quantized_by: the method in quantization_config, "" for whole
    weights.    attention_bias, mlp_bias: whether config.json asks for them, in a family that listens.
    windows: of each layer how many tokens it sees, its own included; 0: all.    turns: of each layer whether its
    heads turn; (): all do.    windowed_rope: the settings of the layers in `windowed`, where they have their own.
    query_scalar, attention_multiplier: what scores are multiplied by, where that is not the head's width's: see
    `attention_scale`.    attention_softcap, logits_softcap: bounds that scores and logits come near; 0: none.
    embedding_multiplier, residual_multiplier, logits_divisor: of the embeddings, of what a layer adds, of logits.
    num_experts, experts_per_token, expert_width: of a feed-forward by experts, their number, how many each token gets,
    and their width; 0: none.    normalizes_experts: whether the shares of those chosen are made to sum to one.
    unusual: keys of config.json that ask for what is not described here.
    embedding_width, has_final_norm: OPT's alone.
    """

    model_type: str = "llama"
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int
    vocab_size: int
    max_context: int = 2048
    norm_eps: float = 1e-6
    activation: str = "silu"
    rope: Rope = field(default_factory=Rope)
    ties_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    quantized_by: str = ""
    windows: tuple[int, ...] = ()
    windowed: tuple[bool, ...] = ()
    turns: tuple[bool, ...] = ()
    windowed_rope: Rope | None = None
    query_scalar: float = 0.0
    attention_multiplier: float = 0.0
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    normalizes_experts: bool = True
    unusual: tuple[str, ...] = ()
    embedding_width: int = 0
    has_final_norm: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "config.json") -> "ModelDescription":
        """Read a config.json in any of transformers' spellings; `source` is what errors call it.

        Raises UnsupportedModel for a model_type that is not in `FAMILIES`, and InputError for a value that is missing,
        of the wrong type (transformers 5 takes no "64" or 64.0 for 64, either), out of bounds or in contradiction.
        """
        return _Reader(config, source).read()

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def with_vocab(self, vocab_size: int) -> "ModelDescription":
        """The same model with `vocab_size` rows in its embedding and head."""
        return dataclasses.replace(self, vocab_size=vocab_size)

    # Sizes that follow

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_width

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.attention_multiplier or (self.query_scalar or self.head_width) ** -0.5

    @property
    def changes_scores(self) -> bool:
        """Whether attention's scores are capped, or the head's logits capped or divided."""
        return bool(self.attention_softcap or self.logits_softcap) or self.logits_divisor != 1.0

    def window(self, layer: int) -> int:
        """How many tokens a layer sees, the query's own included; 0: all."""
        return self.windows[layer] if self.windows else 0

    @property
    def longest_window(self) -> int:
        """The most tokens that any layer sees; 0: some layer sees all."""
        return max(self.windows) if self.windows and all(self.windows) else 0

    def rope_of(self, layer: int) -> Rope | None:
        """How a layer's heads turn; None: they do not."""
        if self.turns and not self.turns[layer]:
            return None
        is_windowed = bool(self.windowed and self.windowed[layer])
        return self.windowed_rope if self.windowed_rope is not None and is_windowed else self.rope

    def kv_elements_per_token(self) -> int:
        """Elements of the keys and values of one token in all layers."""
        return 2 * self.num_layers * self.kv_width

    # Tensors

    @functools.cached_property
    def layer_shapes(self) -> dict[str, Shape]:
        """The tensors of one layer by their names in it."""
        return self.family.layer(self)

    @functools.cached_property
    def outer_shapes(self) -> dict[str, Shape]:
        """The tensors outside the layers by their names."""
        return self.family.outer(self)

    def tensor_shapes(self) -> dict[str, Shape]:
        """All tensors by their names in a Hugging Face folder: embedding, layers, and what follows them."""
        outer = dict(self.outer_shapes)
        first = next(iter(outer))
        shapes = {first: outer.pop(first)}
        for number in range(self.num_layers):
            shapes |= {f"{self.family.prefix}{number}.{name}": shape for name, shape in self.layer_shapes.items()}
        return shapes | outer

    @functools.cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a layer's matrices by the last part of their modules' names, "o_proj" and so on.

        Those of experts are not among them: all experts' have the same names.
        """
        experts = self.family.experts
        apart = (f"{experts.experts}.", f"{experts.router}.") if experts else ()
        matrices = {
            name: shape for name, shape in self.layer_shapes.items() if len(shape) == 2 and not name.startswith(apart)
        }
        return {name.removesuffix(".weight").rpartition(".")[2]: shape for name, shape in matrices.items()}  # type: ignore[misc]

    # Counts

    @property
    def num_linear(self) -> int:
        """Parameters in the layers' matrices: those that quantization makes smaller."""
        return self.num_layers * sum(math.prod(shape) for shape in self.layer_shapes.values() if len(shape) == 2)

    @property
    def num_layer_vectors(self) -> int:
        """Parameters of one layer that are in no matrix: norms and biases."""
        return sum(math.prod(shape) for shape in self.layer_shapes.values() if len(shape) == 1)

    @property
    def num_outside(self) -> int:
        """Parameters outside the layers: embedding, last norm, and the head where it is not tied."""
        return sum(math.prod(shape) for shape in self.outer_shapes.values())

    @property
    def num_parameters(self) -> int:
        return self.num_linear + self.num_layers * self.num_layer_vectors + self.num_outside

    @property
    def num_head(self) -> int:
        """Elements of the head's matrix, tied or not."""
        return self.vocab_size * self.width

    def num_adapter(self, *, rank: int, targets: tuple[str, ...], dora: bool) -> int:
        """Parameters of LoRA's two matrices, rank x columns and rows x rank, on each target; DoRA's magnitudes, too."""
        sizes = [size for name, size in self.linears.items() if name in targets]
        return self.num_layers * sum(rank * (rows + columns) + rows * dora for rows, columns in sizes)


def quantization_method(config: Mapping[str, Any], *, source: str = "config.json") -> str:
    """The method of a config.json's quantization_config, by transformers' name; "" for whole weights.

    Folders of bitsandbytes before its config had a name say only `load_in_8bit` or `load_in_4bit`. Raises InputError.
    """
    how = config.get("quantization_config") or {}
    if not isinstance(how, Mapping):
        raise InputError(f"{source}: expected an object for 'quantization_config', found {how!r}")
    is_old = how.get("load_in_8bit") or how.get("load_in_4bit")
    return str(how.get("quant_method") or ("bitsandbytes" if is_old else "an unnamed method")) if how else ""


class _Reader:
    """Reads one config.json; every value it gives is checked."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config, self._source, self._family = config, source, FAMILIES["llama"]

    def read(self) -> ModelDescription:
        kind = self._config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UnsupportedModel(
                f"{self._source}: model_type {kind!r} is not known here; known are {', '.join(FAMILIES)}"
            )
        family = self._family = FAMILIES[kind]
        sizes = {name: self._size(name, *family.keys[name]) for name in ("width", "num_layers", "num_heads")}
        width, heads = sizes["width"], sizes["num_heads"]
        kv_heads = self._size("num_kv_heads", "num_key_value_heads", default=heads)
        head_width = self._size("head_width", "head_dim", default=max(1, width // heads))
        max_context = self._size("max_context", "max_position_embeddings", default=2048, takes_null=False)
        description = ModelDescription(
            model_type=kind,
            **sizes,
            **self._patterns(sizes["num_layers"], max_context),
            **self._experts(),
            **{name: self._number(key, default) for name, (key, default) in family.numbers.items()},
            unusual=tuple(key for key, usual in family.only.items() if self._config.get(key, usual[0]) not in usual),
            num_kv_heads=kv_heads,
            head_width=head_width,
            ffn_width=self._size("ffn_width", *family.keys["ffn_width"]) if "ffn_width" in family.keys else 4 * width,
            vocab_size=self._size("vocab_size", "vocab_size"),
            max_context=max_context,
            norm_eps=self._epsilon("rms_norm_eps", default=family.defaults.get("norm_eps", 1e-6)),
            activation=self._activation(),
            rope=read_rope(self._config, source=self._source, rule=family.rope),
            windowed_rope=read_windowed_rope(self._config, source=self._source) if family.rope.per_layer else None,
            ties_embeddings=self._flag("tie_word_embeddings", default=family.ties_by_default),
            **{name: self._flag(key, default=default) for name, (key, default) in family.biases.items()},
            quantized_by=quantization_method(self._config, source=self._source),
            embedding_width=self._size("width", "word_embed_proj_dim", default=width),
            has_final_norm=self._flag("do_layer_norm_before", default=True)
            and not self._flag("_remove_final_layer_norm"),
        )
        self._check(description)
        return description

    def _check(self, made: ModelDescription) -> None:
        if made.num_heads % made.num_kv_heads:
            self._refuse(
                f"expected num_attention_heads to be a multiple of num_key_value_heads, found {made.num_heads} and "
                f"{made.num_kv_heads}"
            )
        if made.family.block == "llama" and made.head_width % 2:
            self._refuse(f"expected an even head width, for rotary embedding turns pairs; found {made.head_width}")
        for rope in filter(None, (made.rope, made.windowed_rope)):
            num_pairs, found = rope.width(made.head_width) // 2, (rope.short_factors, rope.long_factors)
            if rope.kind == "longrope" and {*map(len, found)} != {num_pairs}:
                self._refuse(
                    f"expected {num_pairs} factors of longrope, one for each pair of a head that turns; found "
                    f"{' and '.join(str(len(factors)) for factors in found)}"
                )
        if (made.model_type == "llama" or self._config.get("head_dim") is None) and made.width % made.num_heads:
            self._refuse(f"hidden_size {made.width} does not divide into num_attention_heads {made.num_heads}")

    def _size(self, name: str, *keys: str, default: int | None = None, takes_null: bool = True) -> int:
        """A whole number above 0 under the first of `keys` that is there; null stands for the default."""
        key = next((key for key in keys if self._config.get(key) is not None), keys[0])
        value = self._config.get(key)
        if key not in self._config:
            default = self._family.defaults.get(name, default)
        if value is None and default is not None and (takes_null or key not in self._config):
            return int(default)
        if key not in self._config:
            self._refuse(f"{key!r} is missing; copy the model's own config.json again")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[name]:
            self._refuse(f"expected a whole number from 1 to {_MOST[name]:,} for {key!r}, found {value!r}")
        return value

    def _epsilon(self, key: str, *, default: float) -> float:
        """A share of one. transformers takes no whole number there, not even 0."""
        value = self._config.get(key, default)
        if not isinstance(value, float) or not 0 <= value < 1:
            self._refuse(f"expected a number from 0.0 up to (not including) 1.0 for {key!r}, found {value!r}")
        return value

    def _flag(self, key: str, *, default: bool = False) -> bool:
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            self._refuse(f"expected true or false for {key!r}, found {value!r}")
        return value

    def _patterns(self, num_layers: int, max_context: int) -> dict[str, tuple]:
        """What differs from layer to layer."""
        family = self._family
        found = read_patterns(
            self._config, family.windows, family.turns, num_layers=num_layers, max_context=max_context,
            source=self._source,
        )  # fmt: skip
        return dataclasses.asdict(found)

    def _experts(self) -> dict[str, int | bool]:
        names = self._family.experts
        if names is None:
            return {}
        sizes = {
            name: self._size(name, *self._family.keys[name])
            for name in ("num_experts", "experts_per_token", "expert_width")
        }
        if sizes["experts_per_token"] > sizes["num_experts"]:
            self._refuse(f"each token gets {sizes['experts_per_token']} experts of {sizes['num_experts']}")
        normalizes = names.normalizes is None or self._flag(names.normalizes[0], default=names.normalizes[1])
        return {**sizes, "normalizes_experts": normalizes}

    def _number(self, key: str, default: float) -> float:
        """A number above 0, or 0 for null."""
        value = self._config.get(key, default)
        if value is None:
            return 0.0
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            self._refuse(f"expected a number above 0 for {key!r}, found {value!r}")
        return float(value)

    def _activation(self) -> str:
        key, default = self._family.activation
        value = self._config.get(key, default)
        if not isinstance(value, str):
            self._refuse(f"expected the name of an activation for {key!r}, found {value!r}")
        return _SAME_ACTIVATION.get(value, value)

    def _refuse(self, what: str) -> None:
        raise InputError(f"{self._source}: {what}")
