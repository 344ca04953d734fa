"""A measured figure beside the one it should reach."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure and what it should be: at least `least`, or at most `most`; neither: only told."""

    label: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.value is None or (self.least is None and self.most is None):
            return None
        return self.value >= self.least if self.least is not None else self.value <= self.most

    def line(self) -> str:
        wanted = "" if self.least is None else f"at least {self.least:g}"
        wanted = wanted if self.most is None else f"at most {self.most:g}"
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        verdict = {True: "met", False: "MISSED", None: ""}[self.is_met]
        return f"{self.label:44}{value:>14}  {wanted:16}{verdict}".rstrip()

    def as_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "value": rounded(self.value), "is_met": self.is_met}


def rounded(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")
