"""The server's inputs, read from its OpenAPI document: what the page shows for each, and what it sends.

No input is known here by name, so that one the server gains later appears by itself.
"""

import dataclasses
import json
import math
from typing import Any

from alpaca.errors import InputError

OMITTED = object()  # what `Knob.sent` gives for a field to be left out: the server refuses null
_KINDS = ("integer", "number", "string", "boolean")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """One input. `kind` is integer, number, string, boolean, strings (a list of them) or json (anything else)."""

    name: str
    kind: str
    description: str = ""
    default: Any = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    required: bool = False
    secret: bool = False

    @property
    def hint(self) -> str:
        """What it does, its bounds and its default, as the server says them."""
        parts = [self.description, self._bounds(), self._default_text()]
        parts += ["One a line; \\n is a line break."] if self.kind == "strings" else []
        return " ".join(part if part.endswith((".", ")")) else f"{part}." for part in parts if part)

    @property
    def slides(self) -> bool:
        """Whether a slider fits: both ends are known, close enough to aim at, and there is a default to stand on."""
        if self.kind not in ("integer", "number") or None in (self.minimum, self.maximum, self.default):
            return False
        return self.kind == "number" or self.maximum - self.minimum <= 1000

    @property
    def step(self) -> float:
        """Of the slider: 1, or a hundredth of the span's power of ten."""
        if self.kind == "integer":
            return 1
        return 10.0 ** (math.floor(math.log10(self.maximum - self.minimum)) - 2) if self.maximum > self.minimum else 1.0

    @property
    def shown(self) -> Any:
        """The default as the field shows it."""
        if self.kind == "strings":
            return "\n".join(_escaped(text) for text in self.default or [])
        if self.kind == "json":
            return "" if self.default is None else json.dumps(self.default, ensure_ascii=False)
        return self.default

    def sent(self, shown: Any) -> Any:
        """The value to send for what the field shows; OMITTED, which is the server's default, for an emptied field.

        Raises InputError naming the knob.
        """
        if self.kind == "strings":
            lines = (shown or "").replace("\r\n", "\n").split("\n")
            return [_unescaped(line) for line in lines if line.strip()]
        if self.kind == "boolean" or self.choices:
            return OMITTED if shown is None or shown == "" else shown
        if self.kind == "string":
            return shown or ("" if self.required else OMITTED)
        if shown is None or (isinstance(shown, str) and not shown.strip()):
            return OMITTED
        return self._json(shown) if self.kind == "json" else self._number(shown)

    def _number(self, shown: Any) -> float:
        try:
            value = float(shown)
        except (TypeError, ValueError):
            raise InputError(f"{self.name} must be a number; found {shown!r}") from None
        if not math.isfinite(value) or (self.kind == "integer" and value != int(value)):
            raise InputError(f"{self.name} must be a {'whole' if self.kind == 'integer' else 'finite'} number")
        low, high = self.minimum, self.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise InputError(f"{self.name} must be {self._bounds()}; found {_plain(value)}")
        return int(value) if self.kind == "integer" else value

    def _json(self, shown: Any) -> Any:
        try:
            return json.loads(shown)
        except ValueError as error:
            raise InputError(f"{self.name} must be JSON: {error}") from None

    def _bounds(self) -> str:
        low, high = self.minimum, self.maximum
        if low is not None and high is not None:
            return f"{_plain(low)} to {_plain(high)}"
        if low is not None:
            return f"{_plain(low)} or more"
        return f"at most {_plain(high)}" if high is not None else ""

    def _default_text(self) -> str:
        if self.default is None:
            return "" if self.required else "Empty: left to the server."
        if self.default in ("", []):
            return ""
        text = _plain(self.default) if self.kind in ("integer", "number") else json.dumps(self.default)
        return f"Default {text}"


def read_knobs(document: dict[str, Any], *, of: str = "Input") -> list[Knob]:
    """The predictor's inputs in their order, or a training's ("TrainingInput"). Raises InputError without any."""
    schemas = document.get("components", {}).get("schemas", {})
    found = schemas.get(of, {}).get("properties")
    if not found:
        raise InputError("the server describes no inputs; was it started with script/serve, without --train?")
    required = schemas[of].get("required", [])
    entries = sorted(found.items(), key=lambda item: item[1].get("x-order", len(found)))
    resolved = [(name, _resolve(entry, schemas)) for name, entry in entries]
    return [_knob(name, entry, name in required) for name, entry in resolved if not entry.get("deprecated")]


def _resolve(entry: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """An entry with what it refers to put in: Cog's own generator keeps choices in a schema beside."""
    references = [part["$ref"] for part in entry.get("allOf", []) if "$ref" in part]
    for reference in references:
        entry = {**schemas.get(reference.rsplit("/", 1)[-1], {}), **entry}
    return entry


def _knob(name: str, entry: dict[str, Any], required: bool) -> Knob:
    kind = entry["type"] if entry.get("type") in _KINDS else "json"
    if entry.get("type") == "array" and entry.get("items", {}).get("type") == "string":
        kind = "strings"
    return Knob(
        name=name,
        kind=kind,
        description=entry.get("description", ""),
        default=entry.get("default"),
        minimum=entry.get("minimum"),
        maximum=entry.get("maximum"),
        choices=tuple(entry.get("enum", ())),
        required=required,
        secret=entry.get("format") == "password" or bool(entry.get("x-cog-secret")),
    )


def _plain(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else str(int(value) if value == int(value) else value)


def _escaped(text: str) -> str:
    for letter, character in reversed(_ESCAPES.items()):
        text = text.replace(character, f"\\{letter}")
    return text


def _unescaped(line: str) -> str:
    """A line with its escapes as characters; a backslash before any other letter stays as it is."""
    made, rest = [], iter(line)
    for character in rest:
        following = next(rest, "") if character == "\\" else ""
        made.append(_ESCAPES.get(following, character + following) if following else character)
    return "".join(made)
