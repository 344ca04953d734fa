"""Names that others chose: whether a file may have one, and how one is shown in a message."""

_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 3_000  # Linux takes 4,096 of a path, which includes the folder's own
_SHOWN_CHARACTERS = 80


def is_path(text: str) -> bool:
    """Whether a file may have this path. No file of ours has control characters or lone surrogates in its name."""
    if not text.isprintable():
        return False
    parts = [part.encode() for part in text.split("/")]
    return sum(map(len, parts)) <= _MOST_PATH_BYTES and max(map(len, parts)) <= _MOST_NAME_BYTES


def shown(name: str) -> str:
    cut = f"… of {len(name):,} characters" if len(name) > _SHOWN_CHARACTERS else ""
    return f"{name[:_SHOWN_CHARACTERS]!r}{cut}"
