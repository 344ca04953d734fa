"""The server's settings: environment variables, read once. `script/serve` mirrors them as flags."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alpaca.errors import InputError
from alpaca.formats.precisions import DTYPES, QUANTIZATIONS

BEAM_SEARCHES = ("shared", "copy")
ENGINES = ("auto", "llama", "transformers")
_LEAST_CONTEXT = 8  # tokens: a word and an answer
BARE_BASE = "none"  # in place of an adapter's name: the base model alone
DEFAULT_ADAPTER = "default"  # the one that COG_WEIGHTS is, where it is one
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _setting(
    variable: str, default: Any, help: str, choices: tuple[str, ...] | None = None, *, least: int | None = None
) -> Any:
    return field(default=default, metadata={"variable": variable, "help": help, "choices": choices, "least": least})


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """One field for each environment variable. None leaves the decision to the model and the hardware."""

    weights: str | None = _setting("COG_WEIGHTS", None, "folder of a model or an adapter (default: alpaca_out)")
    base_model: str | None = _setting(
        "ALPACA_BASE_MODEL", None, "model folder under an adapter (default: the one its adapter_config.json names)"
    )
    adapters: str | None = _setting(
        "ALPACA_ADAPTERS", None, "adapters that a request may name: name=folder,name2=folder2"
    )
    dtype: str | None = _setting("ALPACA_DTYPE", None, "bfloat16 on a GPU, float32 on a CPU by default", DTYPES)
    quantization: str = _setting("ALPACA_QUANTIZATION", "none", "of the linear layers' weights", QUANTIZATIONS)
    max_context: int | None = _setting(
        "ALPACA_MAX_CONTEXT", None, "tokens of prompt and answer (default: the model's)", least=_LEAST_CONTEXT
    )
    memory_fraction: float = _setting(
        "ALPACA_MEMORY_FRACTION", 0.9, "share of what is free after the weights for the cache"
    )
    engine: str = _setting("ALPACA_ENGINE", "auto", "auto: llama for LLaMA models, else transformers", ENGINES)
    beam_search: str = _setting(
        "ALPACA_BEAM_SEARCH",
        "shared",
        "shared: where the engine's own weights can do it; copy: else with a second copy of them (CPU)",
        BEAM_SEARCHES,
    )
    concurrency: int = _setting("COG_MAX_CONCURRENCY", 64, "requests in flight", least=1)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, variable = getattr(self, item.name), item.metadata["variable"]
            choices, least = item.metadata["choices"], item.metadata["least"]
            if choices and value is not None and value not in choices:
                raise InputError(f"{variable} must be one of {', '.join(choices)}; found {value!r}")
            if least is not None and value is not None and value < least:
                raise InputError(f"{variable} must be at least {least}; found {value}")
        if not 0 < self.memory_fraction <= 1:
            raise InputError(f"ALPACA_MEMORY_FRACTION must be above 0 and at most 1; found {self.memory_fraction}")
        parse_adapters(self.adapters or "")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "ServerSettings":
        """Read the variables that are set and not empty. Raises InputError, which names the variable."""
        found = {
            item.name: _parse(item, environment[item.metadata["variable"]])
            for item in dataclasses.fields(cls)
            if environment.get(item.metadata["variable"])
        }
        return cls(**found)


def parse_adapters(text: str) -> dict[str, str]:
    """ "name=folder,name2=folder2" as a mapping. Raises InputError."""
    places: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, equals, place = (part.strip() for part in pair.partition("="))
        if not (equals and place):
            raise InputError(f"ALPACA_ADAPTERS must be name=folder,name2=folder2; found {pair!r}")
        if not _ADAPTER_NAME.fullmatch(name) or name in (BARE_BASE, DEFAULT_ADAPTER):
            raise InputError(
                f"ALPACA_ADAPTERS: a name is up to 64 letters, digits, _, - and ., and neither {BARE_BASE} nor "
                f"{DEFAULT_ADAPTER}; found {name!r}"
            )
        if name in places:
            raise InputError(f"ALPACA_ADAPTERS names {name} twice: {places[name]} and {place}")
        places[name] = place
    return places


def setting_type(item: dataclasses.Field) -> type:
    """The type that a setting's text is converted to: int, float or str."""
    return next(kind for kind in (int, float, str) if item.type in (kind, kind | None))


def _parse(item: dataclasses.Field, text: str) -> Any:
    try:
        return setting_type(item)(text)
    except ValueError:
        expected = setting_type(item).__name__
        raise InputError(f"{item.metadata['variable']} must be a number ({expected}); found {text!r}") from None
