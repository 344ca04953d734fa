"""Rotary position embedding: the settings in a config.json, in every spelling, and the formulas of the scaled kinds.

The spellings are those that transformers 5.17 reads, with the result it computes (checked against it by the tests):
`rope_parameters`, or `rope_theta` beside `rope_scaling`, whose `type` is an older name of `rope_type`. A `rope_scaling`
that is not empty replaces `rope_parameters` as a whole. The base comes from the object that counts, else from a
`rope_theta` beside it, else it is 10,000.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alpaca.errors import InputError

DEFAULT_THETA = 10000.0
# The kinds whose formulas are known here, and the numbers that each needs beside the base.
NUMBERS_OF = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A model's rotary settings.

    kind: "default", "linear", "llama3" or another that transformers knows.    theta: the base of the frequencies.
    numbers: what the kind needs beside it, by transformers' names; empty for kinds that are not known here.
    """

    kind: str = "default"
    theta: float = DEFAULT_THETA
    numbers: Mapping[str, float] = None  # type: ignore[assignment]  # an empty mapping, set below

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", dict(self.numbers or {}))

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
        turns = self.numbers["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
        return ((turns - low) / (high - low)).clip(0, 1)


def read_rope(config: Mapping[str, Any], *, source: str = "config.json") -> Rope:
    """The rotary settings in a config.json. Raises InputError for settings that transformers cannot read, either."""
    given = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected an object for {name!r}, found {values!r}")
    values = given["rope_scaling"] or given["rope_parameters"]
    kind = values.get("rope_type") or values.get("type") or "default"
    theta = values.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    numbers = {name: values.get(name) for name in NUMBERS_OF.get(kind, ())} if isinstance(kind, str) else {}
    for name, value in {"rope_theta": theta, **numbers}.items():
        if not _is_number(value) or value <= 0:
            raise InputError(f"{source}: rope type {kind!r} needs a number above 0 for {name!r}; found {value!r}")
    if kind == "llama3" and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise InputError(f"{source}: expected low_freq_factor below high_freq_factor; found {numbers}")
    return Rope(kind=str(kind), theta=float(theta), numbers=numbers)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
