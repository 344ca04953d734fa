"""The project's pages as the tests read them: their blocks of code, commands, headings and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

_NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "weights/README.md", "unconverted-weights/README.md")
PAGES = [*(ROOT / name for name in _NAMES), *sorted((ROOT / "docs").glob("*.md"))]
NOTES = ROOT / "bench" / "NOTES.md"  # a log of what was learned; only its links are held
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BEGINNINGS = ("python ", ".venv/bin/", "torchrun ", "script/", "cog ", "docker ", "pip ", "curl ", "train.py ")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and the nearest heading above it."""

    place: str
    language: str
    text: str
    heading: str

    def __str__(self) -> str:
        return self.place  # what a test about it is called


def read_blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        place = f"{page.relative_to(ROOT)}:{before.count(chr(10)) + 1}"
        heading = (re.findall(r"^#+ (.+)$", _without_code(before), re.MULTILINE) or [""])[-1]
        indent = len(fence[1])
        code = "".join(line[indent:] for line in fence[3].splitlines(keepends=True))
        found.append(Block(place, fence[2], code, heading))
    return found


def all_blocks(*languages: str) -> list[Block]:
    """Every page's blocks of these languages; without a language those of any."""
    blocks = [block for page in PAGES for block in read_blocks(page)]
    return [block for block in blocks if not languages or block.language in languages]


def split_commands(text: str) -> Iterator[list[str]]:
    """A shell block's commands, each as its words; a command goes on over \\ and over an open quotation mark."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # no closing quotation
            pending += "\n"
            continue
        pending = ""
        if words:
            yield words
    assert not pending, f"a quotation that does not end: {pending}"


def fenced_commands() -> Iterator[tuple[str, list[str]]]:
    """(place, words) of each command in the shell blocks."""
    for block in all_blocks("sh"):
        for words in split_commands(block.text):
            yield block.place, words


def inline_commands() -> Iterator[tuple[str, list[str]]]:
    """(place, words) of each command in running text and tables that has arguments; one with … is only a beginning."""
    for page in PAGES:
        for span in _SPAN.findall(_without_code(page.read_text())):
            if span.startswith("convert."):
                span = f"python -m {span}"  # the table of converters has `python -m …` as its head
            if span.startswith(_BEGINNINGS) and "…" not in span and " " in span:
                yield str(page.relative_to(ROOT)), shlex.split(span)


def inline_flags() -> Iterator[tuple[str, str]]:
    """(place, flag) of each --flag that stands by itself in running text and tables."""
    for page in PAGES:
        for span in _SPAN.findall(_without_code(page.read_text())):
            if span.startswith("--"):
                yield from ((str(page.relative_to(ROOT)), flag) for flag in re.findall(r"(?<!\S)--[\w-]+", span))


def named_files() -> Iterator[tuple[str, str]]:
    """(place, path) of each script and test file that running text names."""
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"\bscript/[a-z_]+(?:\.py)?|\btests/[\w/]+\.py", text):
            yield str(page.relative_to(ROOT)), name


def read_links(page: Path) -> list[str]:
    return _LINK.findall(_without_code(page.read_text()))


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page may say, by GitHub's rule: small letters, no punctuation, - for a blank."""
    headings = re.findall(r"^#+ (.+)$", _without_code(page.read_text()), re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]
    return {f"{name}-{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)}


def _without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?(?:^\1```$|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
