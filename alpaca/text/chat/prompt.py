"""The ids of a conversation: rendered by the model's chat template, with control tokens in contents left text."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from alpaca.errors import InputError
from alpaca.files.names import quote_name
from alpaca.text.chat.files import ChatTemplate
from alpaca.text.chat.messages import Message, check_messages, joined, texts_of
from alpaca.text.chat.provenance import check_roles, mark_own
from alpaca.text.chat.renderer import RENDERER, TemplateFailed
from alpaca.text.fitting import encode_within, refuse_by_characters
from alpaca.text.prompts import alpaca_prompt
from alpaca.text.tokenizer import Tokenizer


def encode_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate | None, most_tokens: int
) -> list[int]:
    """The ids of a conversation, up to where its answer begins; the template alone says whether BOS stands first.

    Without a template one message of a user is the instruction of an Alpaca prompt. Raises InputError, and
    PromptTooLong where there are more than `most_tokens` for certain.
    """
    check_messages(messages)
    refuse_by_characters(tokenizer, sum(len(text) for message in messages for text in texts_of(message)), most_tokens)
    if template is None:
        return [*tokenizer.prefix_ids, *encode_within(tokenizer, _alpaca_text(messages), most_tokens)]

    read_words = partial(RENDERER.read_words, template)
    encoder = tokenizer.marked_encoder
    check_roles(messages, encoder.control_tokens, read_words=read_words)
    now, values = time.time(), tokenizer.named_tokens  # one moment, so that the same messages give the same text

    def render(messages: Sequence[Message]) -> str:
        return RENDERER.render(template, messages, values, now=now)

    messages, text = _render(messages, render)
    if not text:
        raise InputError("this model's chat template makes no text of the messages")
    marked = mark_own(text, messages, render=render, read_words=read_words, encoder=encoder)
    return encode_within(tokenizer, encoder.with_keys(marked), most_tokens, encode=encoder.encode)


def _render(messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> tuple[Sequence[Message], str]:
    """The messages as the template takes them, and the text it makes of them.

    Contents in parts are for templates that know parts. Another one fails, or writes the list as Python has it; for it
    the texts of a content are put together.
    """
    lists = [message["content"] for message in messages if not isinstance(message["content"], str)]
    if not lists:
        return messages, render(messages)
    try:
        text = render(messages)
        if not any(content and str(content) in text for content in lists):
            return messages, text
    except TemplateFailed:
        pass
    whole = [joined(message) for message in messages]
    return whole, render(whole)


def _alpaca_text(messages: Sequence[Message]) -> str:
    roles = [message["role"] for message in messages]
    if roles == ["user"]:
        return alpaca_prompt("".join(texts_of(messages[0])))
    found = "a system message" if "system" in roles else f"{len(roles)} messages, the first by {quote_name(roles[0])}"
    raise InputError(
        "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), and the "
        f"Alpaca prompt has room for one message of a user; found {found}"
    )
