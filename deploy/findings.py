"""The findings of script/check's parts, also of a part that ends early."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from alpaca.errors import AlpacaError

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding of one check: "ok", a "warning", or an "error" that would make the image fail after the push."""

    level: str
    topic: str
    text: str


Findings = Generator[Finding, None, None]


def ok(topic: str, text: str) -> Finding:
    return Finding(level="ok", topic=topic, text=text)


def warning(topic: str, text: str) -> Finding:
    return Finding(level="warning", topic=topic, text=text)


def error(topic: str, text: str) -> Finding:
    return Finding(level="error", topic=topic, text=text)


def collect(topic: str, findings: Generator[Finding, None, Value]) -> Generator[Finding, None, Value | None]:
    """A check's findings and its value. An input that cannot be read is a finding as well, without a value."""
    try:
        return (yield from findings)
    except (AlpacaError, OSError, UnicodeDecodeError) as reason:
        yield error(topic, str(reason))
        return None


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**7 else f"{num_bytes / 1e6:.2f} MB"
