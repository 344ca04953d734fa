"""Rotary position embedding: the settings in a config.json, in every spelling, and the formulas of the scaled kinds.

The spellings are those that transformers 5.17 reads, with the result it computes (checked against it by the tests):
`rope_parameters`, or `rope_theta` beside `rope_scaling`, whose `type` is an older name of `rope_type`. A `rope_scaling`
that is not empty replaces `rope_parameters` as a whole. The base comes from the object that counts, else from a
`rope_theta` beside it, else it is 10,000, or what the family has in its place.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alpaca.errors import InputError

DEFAULT_THETA = 10000.0
THETA_OF = {"smollm3": 2e6, "mixtral": 1e6, "gemma3_text": 1e6}  # the other families' defaults, by model_type
DEFAULT_CONTEXT = 2048
_OLD_CONTEXT = "original_max_position_embeddings"
# The kinds whose formulas are known here, and the numbers that each needs beside the base.
NUMBERS_OF: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _OLD_CONTEXT),
    "dynamic": ("factor",),
    "yarn": ("factor", _OLD_CONTEXT),
    "longrope": (_OLD_CONTEXT,),
}


@dataclass(frozen=True, kw_only=True)
class RopeRule:
    """How a family reads its rotary settings, where that is not LLaMA's way.

    theta: the base where config.json names none.    turns_parts: whether partial_rotary_factor counts, so that the
    first so many of a head's numbers turn alone.    old_context: what stands for a missing
    original_max_position_embeddings; 0: the model's own context.    renames: older names of kinds.
    per_layer: whether windowed layers have settings of their own, in Gemma 3's spelling.
    """

    theta: float = DEFAULT_THETA
    turns_parts: bool = False
    old_context: int = 0
    renames: Mapping[str, str] = field(default_factory=dict)
    per_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A model's rotary settings.

    kind: "default", "linear", "llama3" or another that transformers knows.    theta: the base of the frequencies.
    numbers: what the kind needs beside it, by transformers' names; empty for kinds that are not known here.
    part: how much of a head turns, from its beginning.    table_factor: what cosines and sines are multiplied by.
    short_factors, long_factors: longrope's divisors of the frequencies, for sequences within the old context and
    longer ones.
    """

    kind: str = "default"
    theta: float = DEFAULT_THETA
    numbers: Mapping[str, float] = field(default_factory=dict)
    part: float = 1.0
    table_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def width(self, head_width: int) -> int:
        """How many numbers of a head turn."""
        return int(head_width * self.part)

    @property
    def long_from(self) -> int:
        """The shortest length, in tokens, of a sequence that longrope turns otherwise; 0: all lengths are alike."""
        return int(self.numbers[_OLD_CONTEXT]) + 1 if self.kind == "longrope" else 0

    def scale(self, frequencies: Any, *, is_long: bool = False) -> Any:
        """The model's angles per position, from the unscaled ones: `theta ** (-2 i / turned width)` for each pair i.

        frequencies: an array of numpy or torch in any precision; the result is computed in the same.
        is_long: whether the sequence is of `long_from` tokens or more. The kind "dynamic" scales beyond the model's
        context alone, which no sequence here exceeds.
        Raises InputError for a kind that is not known here.
        """
        if self.kind in ("default", "dynamic"):
            return frequencies
        if self.kind == "linear":
            return frequencies / self.numbers["factor"]
        if self.kind == "llama3":
            return self._llama3(frequencies)
        if self.kind == "yarn":
            return self._yarn(frequencies)
        if self.kind == "longrope":
            return _divide_each(frequencies, self.long_factors if is_long else self.short_factors)
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

    def _yarn(self, frequencies: Any) -> Any:
        """YaRN's (arXiv 2309.00071): pairs up to one number are kept, from another on slowed, between them mixed.

        The two numbers are those of the pairs that turn `beta_fast` and `beta_slow` times in the old context.
        """
        width = 2 * len(frequencies)
        low, high = (self._pair_that_turns(self.numbers[name], width) for name in ("beta_fast", "beta_slow"))
        if self.numbers["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 * (low == high)
        numbers = frequencies * 0 + 1
        slowed = ((numbers.cumsum(0) - 1 - low) / (high - low)).clip(0, 1)
        return frequencies / self.numbers["factor"] * slowed + frequencies * (1 - slowed)

    def _pair_that_turns(self, times: float, width: int) -> float:
        waves = self.numbers[_OLD_CONTEXT] / (times * 2 * math.pi)
        return width * math.log(waves) / (2 * math.log(self.theta))


def _divide_each(frequencies: Any, divisors: tuple[float, ...]) -> Any:
    ones = frequencies * 0 + 1
    for index, divisor in enumerate(divisors):
        ones[index] = divisor
    return frequencies / ones


def read_rope(config: Mapping[str, Any], *, source: str = "config.json", rule: RopeRule | None = None) -> Rope:
    """The rotary settings in a config.json. Raises InputError for settings that transformers cannot compute, either.

    A kind without a formula here is read as far as its name and base, so that a caller can refuse it by name.
    """
    rule = rule or RopeRule()
    if rule.per_layer:  # there an old context beside the objects is not looked at
        beside = {name: value for name, value in config.items() if name != _OLD_CONTEXT}
        return _read_rope_of(beside, _find_layered_settings(config, source), rule, source)
    return _read_rope_of(config, _find_settings(config, source), rule, source)


def read_windowed_rope(config: Mapping[str, Any], *, source: str = "config.json") -> Rope:
    """The rotary settings of the layers that see a window, in Gemma 3's spelling: `rope_local_base_freq`, or an object
    of their own in `rope_parameters`."""
    found = _layered_objects(config, source)["sliding_attention"]
    values = {"rope_theta": config.get("rope_local_base_freq", DEFAULT_THETA), **found}
    return _read_rope_of({**config, "rope_theta": values["rope_theta"]}, values, RopeRule(), source)


def _read_rope_of(config: Mapping[str, Any], values: Mapping[str, Any], rule: RopeRule, source: str) -> Rope:
    kind = values["rope_type"] if "rope_type" in values else values.get("type", "default")
    if not isinstance(kind, str):
        raise InputError(f"{source}: expected the name of a kind of rope for 'rope_type', found {kind!r}")
    kind = rule.renames.get(kind, kind)
    theta = values.get("rope_theta", config.get("rope_theta", rule.theta))
    numbers = {name: values.get(name) for name in NUMBERS_OF.get(kind, ())}
    if _OLD_CONTEXT in numbers:
        numbers[_OLD_CONTEXT] = _find_old_context(config, values, rule)
    if kind == "yarn" and "factor" in values and values["factor"] is None:
        numbers["factor"] = _ratio(config, numbers[_OLD_CONTEXT])
    for name, value in {"rope_theta": theta, **numbers}.items():
        if not _is_number(value) or value <= 0:
            raise InputError(f"{source}: rope type {kind!r} needs a number above 0 for {name!r}; found {value!r}")
    if kind == "llama3" and not numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        raise InputError(f"{source}: expected low_freq_factor below high_freq_factor; found {numbers}")
    part = _find_part(config, values, kind, rule, source)
    return Rope(
        kind=kind, theta=float(theta), part=part, **_more_of(kind, config, values, numbers, rule=rule, source=source)
    )


def _more_of(
    kind: str,
    config: Mapping[str, Any],
    values: Mapping[str, Any],
    numbers: Mapping[str, Any],
    *,
    rule: RopeRule,
    source: str,
) -> dict[str, Any]:
    """What else `Rope` holds: the kind's numbers, and what only some kinds have."""
    if kind == "yarn":
        options = {name: values.get(name) or usual for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        # transformers looks for `truncate` beside the objects of the layers' kinds, not in them.
        truncates = True if rule.per_layer else values.get("truncate", True)
        factor = _yarn_table_factor(values, numbers["factor"])
        _require_numbers({**options, "attention_factor": factor}, kind, source)
        return {"numbers": {**numbers, **options, "truncate": bool(truncates)}, "table_factor": float(factor)}
    if kind == "longrope":
        lists = {name: _find_list(values, name, source) for name in ("short_factor", "long_factor")}
        factor = _longrope_table_factor(config, values, numbers[_OLD_CONTEXT])
        _require_numbers({"attention_factor": factor}, kind, source)
        return {
            "numbers": numbers, "short_factors": lists["short_factor"], "long_factors": lists["long_factor"],
            "table_factor": float(factor),
        }  # fmt: skip
    return {"numbers": numbers}


def _require_numbers(numbers: Mapping[str, Any], kind: str, source: str) -> None:
    for name, value in numbers.items():
        if not _is_number(value) or value <= 0:
            raise InputError(f"{source}: rope type {kind!r} needs a number above 0 for {name!r}; found {value!r}")


def _find_list(values: Mapping[str, Any], name: str, source: str) -> tuple[float, ...]:
    found = values.get(name)
    if not isinstance(found, list) or not found or not all(_is_number(value) and value > 0 for value in found):
        raise InputError(f"{source}: rope type 'longrope' needs a list of numbers above 0 for {name!r}")
    return tuple(map(float, found))


def _yarn_table_factor(values: Mapping[str, Any], factor: float) -> Any:
    given = values.get("attention_factor")
    if given is not None:
        return given
    scales = [values.get("mscale"), values.get("mscale_all_dim")]
    if all(_is_number(scale) and scale for scale in scales):
        above, below = (_yarn_magnitude(factor, scale) for scale in scales)
        return above / below
    return _yarn_magnitude(factor, 1.0)


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope_table_factor(config: Mapping[str, Any], values: Mapping[str, Any], old_context: float) -> Any:
    given = values.get("attention_factor")
    if given is not None:
        return given
    factor = values.get("factor")
    factor = _ratio(config, old_context) if factor is None else factor
    if not _is_number(factor) or old_context <= 1:
        return None
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old_context))


def _ratio(config: Mapping[str, Any], old_context: Any) -> Any:
    context = config.get("max_position_embeddings", DEFAULT_CONTEXT)
    return context / old_context if _is_number(old_context) and old_context and _is_number(context) else None


def _usual_theta(config: Mapping[str, Any]) -> float:
    """The base where a config.json names none."""
    return THETA_OF.get(str(config.get("model_type")), DEFAULT_THETA)


def describe_other_theta(config: Mapping[str, Any]) -> str:
    """Which base counts, where a config.json that was read without an error names two that differ; else ""."""
    older, newer = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    if not older or "rope_theta" not in newer:
        return ""
    holds = older.get("rope_theta", config.get("rope_theta", _usual_theta(config)))
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
    by_layers = by_layers or "rope_local_base_freq" in config  # Gemma 3's older spelling of the same
    if by_layers or not (values or "rope_theta" in config):
        return dict(config)
    theta = values.get("rope_theta", config.get("rope_theta", _usual_theta(config)))
    kind = values["rope_type"] if "rope_type" in values else values.get("type", "default")
    whole = {**values, "rope_type": kind, "rope_theta": theta}
    scaling = None if kind == "default" else {name: value for name, value in whole.items() if name != "rope_theta"}
    return {**config, "rope_theta": theta, "rope_parameters": whole, "rope_scaling": scaling}


def _find_settings(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The object that counts: a `rope_scaling` that is not empty, else `rope_parameters`."""
    given = _objects(config, source)
    return given["rope_scaling"] or given["rope_parameters"]


def _find_layered_settings(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Of the layers that see all: `rope_scaling` adds to their object instead of replacing it."""
    found = _layered_objects(config, source)["full_attention"]
    return {**found, **_objects(config, source)["rope_scaling"]}


def _layered_objects(config: Mapping[str, Any], source: str) -> dict[str, Mapping[str, Any]]:
    given = _objects(config, source)["rope_parameters"]
    found = {name: given.get(name) or {} for name in ("full_attention", "sliding_attention")}
    for name, values in found.items():
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected an object for {name!r} in 'rope_parameters', found {values!r}")
    return found


def _objects(config: Mapping[str, Any], source: str) -> dict[str, Mapping[str, Any]]:
    given = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, values in given.items():
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected an object for {name!r}, found {values!r}")
    return given


def _find_old_context(config: Mapping[str, Any], values: Mapping[str, Any], rule: RopeRule) -> object:
    """The context before scaling: beside the object, else in it, else the model's own context."""
    if _OLD_CONTEXT in config:
        return config[_OLD_CONTEXT]
    if rule.old_context:  # a default of the family counts before what the object says
        return rule.old_context
    return values.get(_OLD_CONTEXT, config.get("max_position_embeddings", DEFAULT_CONTEXT))


def _find_part(config: Mapping[str, Any], values: Mapping[str, Any], kind: str, rule: RopeRule, source: str) -> float:
    """How much of a head turns. Where a family turns whole heads, transformers' default kind ignores the setting."""
    part = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rule.turns_parts:
        part = 1.0 if part is None else part
        if not _is_number(part) or not 0 < part <= 1:
            raise InputError(
                f"{source}: expected a number above 0, 1 at most, for 'partial_rotary_factor'; found {part!r}"
            )
        return float(part)
    if kind in NUMBERS_OF and kind != "default" and part not in (None, 1):
        raise InputError(
            f"{source}: rope type {kind!r} with a partial_rotary_factor of {part!r} is not known here; expected 1, for "
            "whole heads"
        )
    return 1.0


def _is_number(value: object) -> bool:
    """Whether a value is a finite number; a whole number beyond every float is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
