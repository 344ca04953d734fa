"""What was done to records while they were read."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Notes:
    """What was done to records on the way, counted for the log."""

    scalars: int = 0  # answers that were no text, such as 4 or true
    unanswered: int = 0  # conversations whose last turns nobody answers: these are left out
    found_prompts: int = 0  # pairs of whole texts, whose prompt is what they begin with
    several_marks: int = 0  # texts that hold the response mark again, behind which all is learnt
    ignored: Counter[str] = field(default_factory=Counter)  # fields that are not read, and in how many records

    def lines(self) -> list[str]:
        """For a log: a line for each thing that occurs."""
        lines = []
        if self.scalars:
            lines.append(f"{self.scalars:,} answers are numbers or the like; their JSON text is taken")
        if self.unanswered:
            lines.append(f"{self.unanswered:,} conversations end with turns that nobody answers; these are left out")
        if self.found_prompts:
            lines.append(f"{self.found_prompts:,} pairs are whole texts; what both begin with is their prompt")
        if self.several_marks:
            lines.append(
                f"{self.several_marks:,} texts hold the response mark more than once; all behind the first is learnt"
            )
        if self.ignored:
            lines.append("fields that are not read: " + ", ".join(sorted(self.ignored)))
        return lines
