"""Which of Meta's releases a checkpoint is: the context and rope scaling that params.json does not say follow from it.

Pure: no files are opened here. Sources: params.json of the releases, https://github.com/meta-llama/llama-models
(models/sku_list.py, models/llama3/model.py), and the configs Meta published beside them on Hugging Face.

| release | context | how it is known |
|---|---|---|
| LLaMA 1 | 2,048 | none of the below |
| LLaMA 2 | 4,096 | its published sizes with norm_eps 1e-5 (7B, 13B) or grouped key/value heads (70B) |
| Code Llama | 16,384 | SentencePiece with a rope_theta above 10,000 |
| Llama 3 | 8,192 | a tiktoken tokenizer |
| Llama 3.1, 3.3 | 131,072 | use_scaled_rope; scaled by 8 |
| Llama 3.2 1B, 3B | 131,072 | use_scaled_rope and one matrix as embedding and head; scaled by 32 |
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from alpaca.architecture.description import ModelDescription
from alpaca.errors import InputError
from alpaca.formats.meta.layout import number

CONTEXTS = {"1": 2048, "2": 4096, "code": 16384, "3": 8192, "3.1": 131072, "3.2": 131072}
VERSIONS = (*CONTEXTS, "Guard-3")  # as transformers' script names them, and "code"
_SPELLINGS = (  # versions that one checkpoint may be called by: they differ in what is not in the files
    {"1", "2", "code"},
    {"3.1", "3.2"},
)
_ROPE_FACTORS = {"3.1": 8.0, "3.2": 32.0}
_LLAMA_2_SIZES = {(4096, 32), (5120, 40)}  # dim, n_layers; LLaMA 1 has them, too, with norm_eps 1e-6
PUBLISHED_SIZES = {  # dim, n_layers
    "1B": (2048, 16), "3B": (3072, 28), "7B": (4096, 32), "8B": (4096, 32), "13B": (5120, 40), "30B": (6656, 60),
    "33B": (6656, 60), "34B": (8192, 48), "65B": (8192, 80), "70B": (8192, 80), "405B": (16384, 126),
}  # fmt: skip
_SIZE_IN_NAME = re.compile(r"(?<![0-9.])([0-9]+)b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies, under transformers' names."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def config(self) -> dict[str, object]:
        """The numbers under the names that config.json has for them, without rope_theta."""
        return {"rope_type": "llama3", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Release:
    """A release of Meta's. version: one of CONTEXTS; context: in tokens."""

    version: str
    context: int
    rope_scaling: RopeScaling | None

    @property
    def name(self) -> str:
        return "Code Llama" if self.version == "code" else f"Llama {self.version}"


def find_release(params: Mapping[str, object], *, requested: str | None, has_tiktoken: bool, is_tied: bool) -> Release:
    """The release of a checkpoint; `requested` (--llama_version) decides where the files leave it open.

    Raises InputError when `requested` contradicts the files.
    """
    found = _found_version(params, has_tiktoken, is_tied)
    if requested == "Guard-3" and found in ("3", "3.1"):  # its params.json lacks use_scaled_rope
        version = "3.1"
    elif requested in (None, found) or (found == "code" and requested in ("1", "2")):  # theirs has no name for it
        version = found
    elif any({requested, found} <= group for group in _SPELLINGS):
        version = requested
    else:
        kind = "tiktoken" if has_tiktoken else "SentencePiece"
        raise InputError(
            f"--llama_version {requested}, but by params.json (use_scaled_rope {params.get('use_scaled_rope', False)}, "
            f"rope_theta {params.get('rope_theta', 10000.0)}) and its {kind} tokenizer this is {found}; "
            "leave the flag out"
        )
    return Release(version=version, context=CONTEXTS[version], rope_scaling=_rope_scaling(params, version))


def scales_rope(params: Mapping[str, object]) -> bool:
    """Whether params.json asks for Llama 3.1's rope. Raises InputError for anything but true or false."""
    value = params.get("use_scaled_rope", False)
    if not isinstance(value, bool | None):
        raise InputError(f"params.json: expected true or false for 'use_scaled_rope', found {value!r}")
    return bool(value)


def check_size(name: str, shape: ModelDescription) -> None:
    """Raise InputError when a name such as 13B is a published size and the model another of them."""
    sizes = [f"{digits}B" for digits in _SIZE_IN_NAME.findall(name)]
    found = (shape.width, shape.num_layers)
    known = sorted((size for size, sizes in PUBLISHED_SIZES.items() if sizes == found), key=lambda size: int(size[:-1]))
    if known and sizes and sizes[-1] in PUBLISHED_SIZES and sizes[-1] not in known:
        raise InputError(
            f"{name} names the {sizes[-1]} model, but params.json has dim {found[0]} and n_layers {found[1]}, "
            f"which is {' or '.join(known)}"
        )


def _found_version(params: Mapping[str, object], has_tiktoken: bool, is_tied: bool) -> str:
    if scales_rope(params):
        return "3.2" if is_tied else "3.1"
    if has_tiktoken:
        return "3"
    if number(params, "rope_theta", 10000.0) > 10000.0:
        return "code"
    return "2" if _is_llama_2(params) else "1"


def _is_llama_2(params: Mapping[str, object]) -> bool:
    size = (params.get("dim"), params.get("n_layers"))
    if size == PUBLISHED_SIZES["70B"]:  # LLaMA 1's 65B, too, but that has no groups
        return params.get("n_kv_heads") not in (None, params.get("n_heads"))
    return size in _LLAMA_2_SIZES and params.get("norm_eps") == 1e-5


def _rope_scaling(params: Mapping[str, object], version: str) -> RopeScaling | None:
    """By the release, or by the numbers that newer code of Meta's reads from params.json."""
    if version not in _ROPE_FACTORS:
        return None
    factor = number(params, "rope_scaling_factor", _ROPE_FACTORS[version])
    return RopeScaling(factor=factor, high_freq_factor=number(params, "rope_high_freq_factor", 4.0))
