"""What the Predictor refuses, told to a client in the names that it used."""

import re
from collections.abc import Mapping
from typing import Any

from alpaca.files.names import quote_name
from web.client import plain_error
from web.openai.refusals import Refusal

_CLIENTS_MISTAKES = re.compile(r"\b(InputError|PromptTooLong|UnsupportedModel): ")
_SUBJECT = re.compile(r"(\w+)((?:\[\d+\])?)")
_CLIENTS_NAMES = {
    "max_new_tokens": "max_tokens",
    "replicate_weights": "model",
    "prompt_template": "prompt",
    "json_schema": "response_format",
}
_NAMES_IN_CHATS = _CLIENTS_NAMES | {"logprobs": "top_logprobs"}


def names_of(body: Mapping[str, Any]) -> Mapping[str, str]:
    """The client's names for the Predictor's inputs, where they differ."""
    if "messages" not in body:
        return _CLIENTS_NAMES
    if "max_completion_tokens" in body:
        return _NAMES_IN_CHATS | {"max_new_tokens": "max_completion_tokens"}
    return _NAMES_IN_CHATS


def of_failure(error: str, inputs: Mapping[str, Any], names: Mapping[str, str]) -> Refusal:
    """A failed prediction, by the class of its error, whose name the runtime puts before the message.

    A message about an input begins with its name, perhaps with a place in it: `messages[0]: ...`.
    """
    found = _CLIENTS_MISTAKES.search(error)
    if not found:
        return Refusal(500, plain_error(error))
    if found[1] == "PromptTooLong":
        param = "messages" if "messages" in inputs else "prompt"
        return Refusal(400, plain_error(error), param=param, code="context_length_exceeded")
    message = error[found.end() :]
    subject = _SUBJECT.match(message)
    if not subject or subject[1] not in inputs:
        return Refusal(400, plain_error(error))
    param = names.get(subject[1], subject[1]) + subject[2]
    return Refusal(400, param + message[subject.end() :], param=param)


def of_detail(entry: Mapping[str, Any], names: Mapping[str, str]) -> Refusal:
    """An input that the Predictor's schema refuses."""
    name = str((entry.get("loc") or ["an input"])[-1])
    name = names.get(name, name)
    message = re.sub(r"\b(\d+)\.0\b", r"\1", str(entry.get("msg")))
    return Refusal(400, f"{quote_name(name)[1:-1]}: {message}", param=name)
