"""Whose control tokens are those in a rendered conversation: the template's, or written in a client's contents?

A template may trim contents, cut them, join them, or show them as JSON, so where they are is not known beforehand. It
is found by rendering a second time, with characters of the contents exchanged, one for one, for characters that nobody
else uses. If the result is the first text once they are changed back, then each of them stands where a content's
character stands in it, and a control token without any of them is the template's own.

1. All characters that occur in the control tokens are exchanged: then no content has a part in what is found.
2. Where a template looks into contents (it cuts off what comes before `</think>`), the text comes out another one. Then
   the words that stand in its own expressions stay as they are, unless they have to do with a control token.
3. Where a template changes contents in yet another way (upper case), all control tokens are the template's if no
   content has one or the beginning or the end of one, in whatever case. Otherwise the messages are refused.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence

from alpaca.errors import InputError
from alpaca.files.names import quote_name
from alpaca.text.chat.messages import Message, texts_of, with_texts
from alpaca.text.markers import MarkedEncoder, MarkedText, private_characters

STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "model", "ipython")


def mark_own(
    text: str,
    messages: Sequence[Message],
    *,
    render: Callable[[Sequence[Message]], str],
    read_words: Callable[[], Collection[str]],
    encoder: MarkedEncoder,
) -> MarkedText:
    """Mark the control tokens that are the template's own in `text`, which is what it made of the messages.

    render: what the template makes of other messages.   read_words: see `sandbox.read_words`. Raises InputError.
    """
    written = encoder.find(text)
    if not written:
        return MarkedText(text, ())
    tokens = sorted({text[start:end] for start, end in written})
    exchange = _make_exchange(tokens, text, messages)
    for kept in (lambda: None, lambda: words_to_keep(read_words(), tokens)):
        words = kept()
        disguised = _try(render, _changed(messages, lambda content, words=words: _exchange(content, exchange, words)))
        if disguised is not None and _undo(disguised, exchange) == text:
            return MarkedText(text, encoder.find(disguised))
    _refuse_suspicious(messages, tokens)
    return MarkedText(text, written)


def check_roles(
    messages: Sequence[Message], control_tokens: Iterable[str], *, read_words: Callable[[], Collection[str]]
) -> None:
    """Raise InputError for a role that could complete a control token: templates write some as `<|` + role + `|>`.

    The roles that everybody knows, and those that the template asks for by name, are meant to.
    """
    folded = [token.casefold() for token in control_tokens]
    for role in sorted({message["role"] for message in messages} - set(STANDARD_ROLES)):
        if any(role.casefold() in token for token in folded) and role not in read_words():
            raise InputError(
                f"messages: the role {quote_name(role)} is part of a control token of this model; roles are "
                f"{', '.join(STANDARD_ROLES[:4])}, or other names"
            )


def _make_exchange(tokens: Sequence[str], text: str, messages: Sequence[Message]) -> dict[int, str]:
    """For each character of the tokens, white space aside, one that occurs neither in the text nor in the contents."""
    characters = sorted({character for token in tokens for character in token if not character.isspace()})
    used = set(text).union(*(content for message in messages for content in texts_of(message)))
    exchange = dict(zip(map(ord, characters), private_characters(used), strict=False))
    if len(exchange) < len(characters):
        raise InputError("the contents of messages use all characters that Unicode leaves to private use")
    return exchange


def _changed(messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
    return [with_texts(message, [change(content) for content in texts_of(message)]) for message in messages]


def _undo(text: str, exchange: dict[int, str]) -> str:
    return text.translate({ord(new): old for old, new in exchange.items()})


def words_to_keep(words: Collection[str], tokens: Collection[str]) -> re.Pattern[str] | None:
    """The template's words of more than one letter that hold no token and are no part of one, the longest first."""
    harmless = [
        word for word in words if len(word) > 1 and not any(word in token or _has_part(word, token) for token in tokens)
    ]
    return re.compile("|".join(map(re.escape, sorted(harmless, key=len, reverse=True)))) if harmless else None


def _try(render: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> str | None:
    """What a template makes of disguised contents; None where they are not what it expects."""
    try:
        return render(messages)
    except InputError:
        return None


def _exchange(content: str, exchange: dict[int, str], kept: re.Pattern[str] | None) -> str:
    if kept is None:
        return content.translate(exchange)
    made, done = [], 0
    for match in kept.finditer(content):
        made += [content[done : match.start()].translate(exchange), match[0]]
        done = match.end()
    return "".join([*made, content[done:].translate(exchange)])


def _refuse_suspicious(messages: Sequence[Message], tokens: Sequence[str]) -> None:
    for number, message in enumerate(messages):
        for content in texts_of(message):
            for token in tokens:
                if _has_part(content.casefold(), token.casefold()):
                    raise InputError(
                        f"messages[{number}]: the content holds {quote_name(token)}, or a part of it at an end, which "
                        "is a control token of this model, and its chat template changes contents in a way that hides "
                        "which is whose: leave it out"
                    )


def _has_part(content: str, token: str) -> bool:
    """Whether a token, or a part of one that something beside it could complete, stands in a content."""
    bare = content.strip()
    if token in content or (bare in token and bare and not bare.isalnum()):
        return True
    return any(bare.endswith(token[:cut]) or bare.startswith(token[cut:]) for cut in range(1, len(token)))
