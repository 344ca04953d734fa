"""Which files of the project go into the image, and in which of its layers: `.dockerignore` read as Docker reads it.

Source of the rules: https://docs.docker.com/build/concepts/context/#dockerignore-files; of the layers: Cog 0.23.1,
where `--separate-weights` gives files above 10 MB that are no code a layer of their own.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alpaca.errors import InputError

SEPARATE_BYTES = 10_000_000
_ALWAYS_OUT = (".cog", ".dockerignore")
_NEVER_SEPARATE = (
    ".py", ".ipynb", ".whl", ".log", ".txt", ".md", ".yaml", ".yml", ".toml", ".sh",
    ".jpg", ".jpeg", ".png", ".gif", ".mp3", ".mp4", ".wav", ".avi", ".mov",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A file of the image. path: from the project's folder.    is_separate: it gets a layer of its own."""

    path: PurePosixPath
    num_bytes: int
    is_separate: bool


class IgnoreRules:
    """The patterns of a .dockerignore: the last that matches a path, or a folder above it, decides.

    Raises InputError for one that Docker cannot read, for then it builds nothing.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        stripped = [line.strip() for line in lines]
        patterns = [line for line in stripped if line and not line.startswith("#")]
        self._rules = [(_expression(line.removeprefix("!").strip()), line.startswith("!")) for line in patterns]
        self.has_exceptions = any(is_exception for _, is_exception in self._rules)

    def ignores(self, path: PurePosixPath) -> bool:
        names = [str(path), *(str(parent) for parent in path.parents if parent.name)]
        ignored = False
        for expression, is_exception in self._rules:
            if any(expression.fullmatch(name) for name in names):
                ignored = not is_exception
        return ignored


# Go's filepath.Match: in brackets at least one character or range, whose ends are not -, ] or [ unless escaped.
_PATTERN = re.compile(r"(\\.|\[\^?((\\.|[^\\\]-])(-(\\.|[^\\\]-]))?)+\]|[^\\\[])+", re.DOTALL)


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression: ** is any number of folders, * and ? stay inside one name."""
    try:
        if _PATTERN.fullmatch(pattern):
            return _as_expression(pattern)
    except re.error:  # of a range that runs backwards
        pass
    raise InputError(
        f".dockerignore: Docker cannot read the pattern {pattern!r} and would build nothing: expected names with *, ?, "
        "** and closed brackets such as [a-z]; a backslash makes the next character a plain one"
    )


def _as_expression(pattern: str) -> re.Pattern[str]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    text = ""
    for number, part in enumerate(parts):
        is_last = number + 1 == len(parts)
        if part == "**":
            text += ".*" if is_last else "(?:[^/]+/)*"
        else:
            text += _name_expression(part) + ("" if is_last else "/")
    return re.compile(text)


def _name_expression(part: str) -> str:
    pieces = re.findall(r"\\.|\[[^\]]*\]|\*+|\?|[^\\\[*?]+|.", part)
    return "".join(_piece_expression(piece) for piece in pieces)


def _piece_expression(piece: str) -> str:
    if piece.startswith("*"):
        return "[^/]*"
    if piece == "?":
        return "[^/]"
    if piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
        return piece
    return re.escape(piece[1:] if piece.startswith("\\") and len(piece) > 1 else piece)


def list_image_files(root: Path) -> list[ImageFile]:
    """Every file that `COPY . /src` would take, largest first."""
    file = root / ".dockerignore"
    rules = IgnoreRules(file.read_text(encoding="utf-8").splitlines() if file.is_file() else [])
    files = []
    for folder, names in _walk(root, rules):
        holds_code = any(name.endswith(".py") for name in names)
        for name in names:
            path, num_bytes = folder / name, (root / folder / name).lstat().st_size
            large = num_bytes > SEPARATE_BYTES and not name.lower().endswith(_NEVER_SEPARATE)
            files.append(ImageFile(path=path, num_bytes=num_bytes, is_separate=large and not holds_code))
    return sorted(files, key=lambda file: (-file.num_bytes, str(file.path)))


def _walk(root: Path, rules: IgnoreRules) -> Iterator[tuple[PurePosixPath, list[str]]]:
    for place, folders, names in os.walk(root):
        folder = PurePosixPath(Path(place).relative_to(root).as_posix())
        # An exception may bring back what lies in an ignored folder: only without any is the folder left out unseen.
        folders[:] = sorted(
            name
            for name in folders
            if name not in _ALWAYS_OUT and (rules.has_exceptions or not rules.ignores(folder / name))
        )
        kept = [name for name in sorted(names) if name not in _ALWAYS_OUT and not rules.ignores(folder / name)]
        if kept:
            yield folder, kept
