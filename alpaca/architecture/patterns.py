"""What differs from layer to layer: which see a window of the tokens before them, and which turn their heads.

The rules are those of transformers 5.17's config classes, checked against them by the tests.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alpaca.errors import InputError

MOST_WINDOW = 1 << 32
_SLIDING, _FULL = "sliding_attention", "full_attention"
Config = Mapping[str, Any]
# From config.json, the window and the layer's number: whether the layer sees the window.
Choice = Callable[[Config, int | None, int], bool]
# From the same, and whether the layer sees the window: whether its heads turn.
Turn = Callable[[Config, int | None, bool, int], bool]


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """Which layers of a family see a window, and how large it is.

    size: where `sliding_window` is missing; None: no window.    needs_switch: whether `use_sliding_window` must be
    true.    listed: whether `layer_types` decides, where it is there.    chosen: decides where that does not.    reads:
    the keys of whole numbers that `chosen` reads.
    """

    size: int | None = None
    needs_switch: bool = False
    listed: bool = True
    reads: tuple[str, ...] = ()
    chosen: Choice = field(default=lambda config, window, layer: window is not None)


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """Of each layer: the window it sees (0: all tokens before it), and whether its heads turn. (): all as LLaMA's.

    windowed: the layers that are meant to see a window, even one that no sequence fills.
    """

    windows: tuple[int, ...] = ()
    windowed: tuple[bool, ...] = ()
    turns: tuple[bool, ...] = ()


def read_patterns(
    config: Config, windows: WindowRule | None, turns: Turn | None, *, num_layers: int, max_context: int, source: str
) -> Patterns:
    """Raises InputError for a window that is none, and for lists that do not fit the layers.

    A window that no sequence within `max_context` fills is none.
    """
    window = _read_window(config, windows, source) if windows else None
    chosen = _choose(config, windows, window, num_layers, source) if windows else [False] * num_layers
    if any(chosen) and window is None:
        raise InputError(
            f"{source}: some layers have a sliding window, and 'sliding_window' is null; expected its size"
        )
    sizes = [window if window and is_windowed and window < max_context else 0 for is_windowed in chosen]
    try:
        turned = [turns is None or turns(config, window, chosen[layer], layer) for layer in range(num_layers)]
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return Patterns(
        windows=tuple(sizes) if any(sizes) else (),
        windowed=tuple(chosen) if any(chosen) else (),
        turns=() if all(turned) else tuple(turned),
    )


def _choose(config: Config, rule: WindowRule, window: int | None, num_layers: int, source: str) -> list[bool]:
    if rule.listed and config.get("layer_types") is not None:
        return _read_listed(config["layer_types"], num_layers, source)
    for name in rule.reads:
        _check_whole(config, name, source)
    return [rule.chosen(config, window, layer) for layer in range(num_layers)]


def _read_window(config: Config, rule: WindowRule, source: str) -> int | None:
    if rule.needs_switch and not config.get("use_sliding_window", False):
        return None
    window = config.get("sliding_window", rule.size)
    if window is not None and not (type(window) is int and 1 <= window <= MOST_WINDOW):
        raise InputError(f"{source}: expected null or a whole number above 0 for 'sliding_window', found {window!r}")
    return window


def _read_listed(listed: object, num_layers: int, source: str) -> list[bool]:
    if not isinstance(listed, list) or len(listed) != num_layers or not {*listed} <= {_SLIDING, _FULL}:
        raise InputError(
            f"{source}: expected {num_layers} names, {_SLIDING} or {_FULL}, in 'layer_types'; found {str(listed)[:200]}"
        )
    return [name == _SLIDING for name in listed]


def _check_whole(config: Config, name: str, source: str) -> None:
    value = config.get(name, 0)
    if type(value) is not int or value < 0:
        raise InputError(f"{source}: expected a whole number for {name!r}, found {value!r}")


# The families' choices


def from_a_layer_on(config: Config, window: int | None, layer: int) -> bool:
    """Qwen: the layers from max_window_layers on."""
    return window is not None and layer >= config.get("max_window_layers", 28)


def every_second(config: Config, window: int | None, layer: int) -> bool:
    """Gemma 2: the first, the third, and so on."""
    return bool((layer + 1) % 2)


def all_but_each(usual: int) -> Choice:
    """Gemma 3 and EXAONE 4: all but each so many'th, sliding_window_pattern or `usual`."""

    def choose(config: Config, window: int | None, layer: int) -> bool:
        pattern = config.get("sliding_window_pattern", usual)
        return window is not None and (not pattern or bool((layer + 1) % pattern))

    return choose


def listed_turns(config: Config, window: int | None, is_windowed: bool, layer: int) -> bool:
    """SmolLM3: those with a 1 in no_rope_layers, else all but each no_rope_layer_interval'th."""
    listed, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if isinstance(listed, list) and len(listed) > layer:
        return bool(listed[layer])
    if listed is not None or type(interval) is not int or interval < 1:
        raise InputError(
            f"expected a number for each layer in 'no_rope_layers', or a whole number above 0 for "
            f"'no_rope_layer_interval'; found {str(listed)[:200]} and {interval!r}"
        )
    return bool((layer + 1) % interval)


def unturned_if_switched(config: Config, window: int | None, layer: int) -> bool:
    """SmolLM3: its layers without rotation, if use_sliding_window is true."""
    is_asked_for = bool(config.get("use_sliding_window")) and window is not None
    return is_asked_for and not listed_turns(config, window, False, layer)


def windowed_turns(config: Config, window: int | None, is_windowed: bool, layer: int) -> bool:
    """EXAONE 4: where there are windows, the layers that see all turn nothing."""
    return window is None or is_windowed
