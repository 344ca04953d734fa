"""The server's settings: environment variables, read once. `script/serve` mirrors them as flags."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alpaca.errors import InputError

ENGINES = ("auto", "llama", "transformers")
DTYPES = ("float32", "bfloat16", "float16")
_LEAST_CONTEXT = 8  # tokens: a word and an answer
QUANTIZATIONS = ("none", "int8", "nf4")


def _setting(
    variable: str, default: Any, help: str, choices: tuple[str, ...] | None = None, *, least: int | None = None
) -> Any:
    return field(default=default, metadata={"variable": variable, "help": help, "choices": choices, "least": least})


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """One field per variable; None means: decided from the model and the hardware."""

    weights: str | None = _setting("COG_WEIGHTS", None, "model folder (default: alpaca_out)")
    dtype: str | None = _setting("ALPACA_DTYPE", None, "bfloat16 on a GPU, float32 on a CPU by default", DTYPES)
    quantization: str = _setting("ALPACA_QUANTIZATION", "none", "of the linear layers' weights", QUANTIZATIONS)
    max_context: int | None = _setting(
        "ALPACA_MAX_CONTEXT", None, "tokens of prompt and answer (default: the model's)", least=_LEAST_CONTEXT
    )
    memory_fraction: float = _setting(
        "ALPACA_MEMORY_FRACTION", 0.9, "share of what is free after the weights for the cache"
    )
    engine: str = _setting("ALPACA_ENGINE", "auto", "auto: llama for LLaMA models, else transformers", ENGINES)
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

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "ServerSettings":
        """The settings that are set and not empty. Raises InputError naming the variable."""
        found = {
            item.name: _parse(item, environment[item.metadata["variable"]])
            for item in dataclasses.fields(cls)
            if environment.get(item.metadata["variable"])
        }
        return cls(**found)


def setting_type(item: dataclasses.Field) -> type:
    """int, float or str: what a setting's text is turned into."""
    return next(kind for kind in (int, float, str) if item.type in (kind, kind | None))


def _parse(item: dataclasses.Field, text: str) -> Any:
    try:
        return setting_type(item)(text)
    except ValueError:
        expected = setting_type(item).__name__
        raise InputError(f"{item.metadata['variable']} must be a number ({expected}); found {text!r}") from None
