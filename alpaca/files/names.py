"""Names, paths and values that a user or a client chose: whether a file may have them, and how a message shows them."""

_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 3_000  # Linux takes 4,096 of a path, which includes the folder's own
_SHOWN_CHARACTERS = 80


def is_valid_path(text: str) -> bool:
    """Whether a file may have this path: no part of it is too long, and it has no control characters or surrogates."""
    if not text.isprintable():
        return False
    parts = [part.encode() for part in text.split("/")]
    return sum(map(len, parts)) <= _MOST_PATH_BYTES and max(map(len, parts)) <= _MOST_NAME_BYTES


def quote_name(name: str) -> str:
    """A name in quotes for a message, cut to 80 characters."""
    cut = f"… of {len(name):,} characters" if len(name) > _SHOWN_CHARACTERS else ""
    return f"{name[:_SHOWN_CHARACTERS]!r}{cut}"


def quote_value(value: object) -> str:
    """Any value for a message; texts as `quote_name` has them, and numbers of thousands of digits cut as well."""
    if isinstance(value, str):
        return quote_name(value)
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARACTERS:
        return f"a number of over {_SHOWN_CHARACTERS} digits"
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
