"""Rotary position embedding: the settings in a config.json, in every spelling, and the formulas of the scaled kinds.

The spellings are those that transformers 5.17 reads, with the result it computes (checked against it by the tests):
`rope_parameters`, or `rope_theta` beside `rope_scaling`, whose `type` is an older name of `rope_type`. A `rope_scaling`
that is not empty replaces `rope_parameters` as a whole. The base comes from the object that counts, else from a
`rope_theta` beside it, else it is 10,000.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alpaca.errors import InputError

DEFAULT_THETA = 10000.0
DEFAULT_CONTEXT = 2048
_OLD_CONTEXT = "original_max_position_embeddings"
# The kinds whose formulas are known here, and the numbers that each needs beside the base.
NUMBERS_OF = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _OLD_CONTEXT),
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A model's rotary settings.

    kind: "default", "linear", "llama3" or another that transformers knows.    theta: the base of the frequencies.
    numbers: what the kind needs beside it, by transformers' names; empty for kinds that are not known here.
    """

    kind: str = "default"
    theta: float = DEFAULT_THETA
    numbers: Mapping[str, float] = field(default_factory=dict)

    def scale(self, frequencies: Any) -> Any:
        """The model's angles per position, from the unscaled ones: `theta ** (-2 i / head width)` for each pair i.

        frequencies: an array of numpy or torch in any precision; the result is computed in the same.
        Raises InputError for a kind that is not known here.
        """
        if self.kind == "default":
            return frequencies
        if self.kind == "linear":
            return frequencies / self.numbers["factor"]
        if self.kind == "llama3":
            return self._llama3(frequencies)
        raise InputError(f"rope type {self.kind!r} is not one of {', '.join(NUMBERS_OF)}")

    def _llama3(self, frequencies: Any) -> Any:
        """Llama 3.1's: waves longer than the old context / low_freq_factor are slowed, short ones kept, others mixed.

        Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py
        """
        share = self.kept_share(frequencies)
        return (1 - share) * frequencies / self.numbers["factor"] + share * frequencies

    def kept_share(self, frequencies: Any) -> Any:
        """For the kind "llama3": how much of each frequency stays as it is, from 0 (divided by `factor`) to 1."""
        low, high = self.numbers["low_freq_factor"], self.numbers["high_freq_factor"]
        turns = self.numbers[_OLD_CONTEXT] * frequencies / (2 * math.pi)  # in the old context
        return ((turns - low) / (high - low)).clip(0, 1)


def read_rope(config: Mapping[str, Any], *, source: str = "config.json") -> Rope:
    """The rotary settings in a config.json. Raises InputError for settings that transformers cannot compute, either.

    A kind without a formula here is read as far as its name and base, so that a caller can refuse it by name.
    """
    values = _find_settings(config, source)
    kind = values["rope_type"] if "rope_type" in values else values.get("type", "default")
    if not isinstance(kind, str):
        raise InputError(f"{source}: expected the name of a kind of rope for 'rope_type', found {kind!r}")
    theta = values.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    numbers = {name: values.get(name) for name in NUMBERS_OF.get(kind, ())}
    if _OLD_CONTEXT in numbers:
        numbers[_OLD_CONTEXT] = _find_old_context(config, values)
    for name, value in {"rope_theta": theta, **numbers}.items():
        if not _is_number(value) or value <= 0:
            raise InputError(f"{source}: rope type {kind!r} needs a number above 0 for {name!r}; found {value!r}")
    if kind == "llama3" and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise InputError(f"{source}: expected low_freq_factor below high_freq_factor; found {numbers}")
    _refuse_parts_of_heads(config, values, kind, source)
    return Rope(kind=kind, theta=float(theta), numbers=numbers)


def describe_other_theta(config: Mapping[str, Any]) -> str:
    """Which base counts, where a config.json that was read without an error names two that differ; else ""."""
    older, newer = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    if not older or "rope_theta" not in newer:
        return ""
    holds = older.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    if holds == newer["rope_theta"]:
        return ""
    return (
        "rope_scaling replaces rope_parameters as a whole, as transformers 5 has it: the rotary base is "
        f"{holds:g}, not the {newer['rope_theta']:g} in rope_parameters"
    )


def spell_for_all(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose rotary settings every program reads alike; all other keys as they are.

    transformers 4.46 to 4.57 and mlx-lm know `rope_theta` and `rope_scaling` alone: without them they compute with
    a base of 10,000, and say nothing. transformers 5 reads both spellings, and from here the same settings in both.
    A config without any rotary settings, and one that names them by kinds of layers, stay as they are.
    """
    values = _find_settings(config, "config.json")
    by_layers = any(isinstance(value, Mapping) for value in values.values())
    if by_layers or not (values or "rope_theta" in config):
        return dict(config)
    theta = values.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    kind = values["rope_type"] if "rope_type" in values else values.get("type", "default")
    whole = {**values, "rope_type": kind, "rope_theta": theta}
    scaling = None if kind == "default" else {name: value for name, value in whole.items() if name != "rope_theta"}
    return {**config, "rope_theta": theta, "rope_parameters": whole, "rope_scaling": scaling}


def _find_settings(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The object that counts: a `rope_scaling` that is not empty, else `rope_parameters`."""
    given = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected an object for {name!r}, found {values!r}")
    return given["rope_scaling"] or given["rope_parameters"]


def _find_old_context(config: Mapping[str, Any], values: Mapping[str, Any]) -> object:
    """llama3's old context: beside the object, else in it, else the model's own context."""
    if _OLD_CONTEXT in config:
        return config[_OLD_CONTEXT]
    return values.get(_OLD_CONTEXT, config.get("max_position_embeddings", DEFAULT_CONTEXT))


def _refuse_parts_of_heads(config: Mapping[str, Any], values: Mapping[str, Any], kind: str, source: str) -> None:
    """The formulas here turn whole heads. transformers' default kind ignores the setting in most families."""
    part = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind in NUMBERS_OF and kind != "default" and part not in (None, 1):
        raise InputError(
            f"{source}: rope type {kind!r} with a partial_rotary_factor of {part!r} is not known here; expected 1, for "
            "whole heads"
        )


def _is_number(value: object) -> bool:
    """Whether a value is a finite number; a whole number beyond every float is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
