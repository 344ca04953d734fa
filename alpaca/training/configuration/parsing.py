"""Flags whose values are small languages: sharding, memory sizes, layers to recompute, names of layers."""

import dataclasses
from dataclasses import dataclass

from alpaca.errors import InputError
from alpaca.files.reading import parse_size

AUTO = "auto"
_MOST_DIGITS = 10  # of a number of layers; a longer one is no number of layers
_WORDS = {
    **dict.fromkeys(("true", "yes", "y", "t", "on"), True),
    **dict.fromkeys(("false", "no", "n", "f", "off", "none"), False),
}
_LEAST_PLAIN_BYTES = 10**6  # a memory size without a unit must be at least this; a smaller one has lost its unit


def parse_memory_limit(text: str) -> int:
    """Bytes of `--memory_limit`. Raises InputError."""
    return parse_memory("memory_limit", text)


def target_names(text: str) -> list[str]:
    """The names in `--lora_target_modules`, separated by commas or spaces."""
    return text.replace(",", " ").split()


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What the words of `--fsdp` ask for. hybrid: over the processes of one machine, with a copy on each machine."""

    reshard_after_forward: bool = True
    hybrid: bool = False
    offload: bool = False


_SHARDINGS = {
    "full_shard": Sharding(),
    "shard_grad_op": Sharding(reshard_after_forward=False),
    "hybrid_shard": Sharding(hybrid=True),
    "hybrid_shard_zero2": Sharding(hybrid=True, reshard_after_forward=False),
}


def parse_fsdp(text: str) -> Sharding:
    """The words of `--fsdp`; empty, True and False mean full sharding where there are several processes."""
    words = [word for word in text.replace(",", " ").split() if word.lower() not in ("true", "false", "auto_wrap")]
    unknown = [word for word in words if word not in (*_SHARDINGS, "offload")]
    kinds = [word for word in words if word in _SHARDINGS]
    if unknown or len(kinds) > 1:
        raise InputError(
            f"--fsdp: expected one of {', '.join(_SHARDINGS)}, with auto_wrap and offload added or not; found {text!r}"
        )
    return dataclasses.replace(_SHARDINGS[kinds[0] if kinds else "full_shard"], offload="offload" in words)


def parse_memory(name: str, text: str) -> int:
    """Bytes of a flag such as `--memory_limit 80GB`. Raises InputError, for a number without its unit too."""
    try:
        size = parse_size(text)
    except InputError as error:
        raise InputError(f"--{name}: {error}") from error
    except OverflowError as error:  # hundreds of digits
        raise InputError(f'--{name}: expected a size such as "80GB", found one of {len(text)} characters') from error
    if size < _LEAST_PLAIN_BYTES and not text.strip()[-1].isalpha():
        raise InputError(
            f"--{name}: expected a size with its unit, found {text!r}, which is {size:,} bytes; write "
            f'"{text.strip()}GB" if gigabytes are meant'
        )
    return size


def parse_checkpointing(value: bool | int | str) -> bool | int | str:
    """`--gradient_checkpointing` as True, False, a number of layers or "auto". Raises InputError.

    A digit is a number of layers: 1 is one layer, unlike True.
    """
    text = str(value).strip().lower()
    if text in _WORDS:
        return _WORDS[text]
    if text == AUTO or (text.isdecimal() and len(text) < _MOST_DIGITS):
        return AUTO if text == AUTO else int(text)
    found = text if len(text) < 40 else f"{text[:20]}… ({len(text)} characters)"
    raise InputError(f"--gradient_checkpointing: expected auto, True, False or a number of layers, found {found!r}")


def count_checkpointed(asked: bool | int | str, num_layers: int) -> int | None:
    """The layers that are recomputed, of `num_layers`; None for "auto": the plan chooses. Raises InputError."""
    asked = parse_checkpointing(asked)
    if isinstance(asked, bool):
        return num_layers if asked else 0
    if asked == AUTO:
        return None
    if asked > num_layers:
        raise InputError(
            f"--gradient_checkpointing {asked}: the model has {num_layers} decoder layers; give a number up to that, "
            "True for all of them, or auto"
        )
    return asked
