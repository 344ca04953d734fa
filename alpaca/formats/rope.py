"""The rotary settings of a config.json, whichever transformers wrote it."""

from collections.abc import Mapping
from typing import Any

from alpaca.errors import InputError


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters of transformers 5, or rope_theta and rope_scaling of before; always with rope_type and theta.

    Raises InputError.
    """
    given = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(values, Mapping) for values in given):
        raise InputError(f"config.json: expected objects for rope_scaling and rope_parameters, found {given}")
    rope = {**given[0], **given[1]}
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope
