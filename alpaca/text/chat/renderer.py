"""The way to the process that renders chat templates: started when first needed, and again when it had to be ended."""

import atexit
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.errors import InputError, ServiceFailed
from alpaca.subprocesses.bounded import TOOK_TOO_LONG, BoundedProcess, Ended
from alpaca.text.chat.bounds import MOST_CHARACTERS, MOST_SECONDS
from alpaca.text.chat.files import ChatTemplate

_SANDBOX = "alpaca.text.chat.sandbox"
_MOST_TOGETHER = 16  # texts asked for in one message: each may take the process's whole limit of time
_SHOWN_CHARACTERS = 500


class TemplateFailed(InputError):
    """The template stopped with an error of its own, not one it raises for a client to read."""


class Renderer:
    """Renders one text after another, for any number of threads."""

    def __init__(self) -> None:
        self._process = BoundedProcess(_SANDBOX)
        self._lock = threading.Lock()
        atexit.register(self.close)

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        values: Mapping[str, str],
        *,
        now: float,
        adds_prompt: bool = True,
    ) -> str:
        """What `sandbox.render` gives. Raises InputError, with the template's own words where it refuses."""
        request = {
            "source": template.source, "messages": list(messages), "values": dict(values), "now": now,
            "adds_prompt": adds_prompt,
        }  # fmt: skip
        return self._ask(template, {"asked": "text", **request})["text"]

    def render_prefixes(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        values: Mapping[str, str],
        prefixes: Sequence[tuple[int, bool]],
        *,
        now: float,
    ) -> list[str]:
        """What `render` gives for the first n messages, for each (n, adds_prompt), by one message to the process."""
        texts = []
        for start in range(0, len(prefixes), _MOST_TOGETHER):
            request = {
                "asked": "text", "source": template.source, "messages": list(messages), "values": dict(values),
                "now": now, "prefixes": prefixes[start : start + _MOST_TOGETHER],
            }  # fmt: skip
            texts += [_checked(template, reply)["text"] for reply in self._exchange(request)["all"]]
        return texts

    def read_words(self, template: ChatTemplate) -> frozenset[str]:
        """What `sandbox.read_words` gives. Raises InputError."""
        return frozenset(self._ask(template, {"asked": "words", "source": template.source})["words"])

    def close(self) -> None:
        """End the process, if there is one. The next text starts another."""
        with self._lock:
            self._process.end()

    def _ask(self, template: ChatTemplate, request: Mapping[str, Any]) -> dict[str, Any]:
        return _checked(template, self._exchange(request))

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            try:
                return self._process.ask(request)
            except Ended as ended:
                raise _describe(ended) from None


RENDERER = Renderer()  # one process for the whole server


def _describe(ended: Ended) -> Exception:
    if ended.status == TOOK_TOO_LONG:
        return InputError(
            f"this model's chat template takes more than {MOST_SECONDS:g} s of processor time for the messages: send "
            "fewer or shorter ones"
        )
    if ended.status is None:
        return ServiceFailed("the process that renders chat templates does not answer; try again")
    return ServiceFailed(f"the process that renders chat templates ended with status {ended.status}; try again")


def _checked(template: ChatTemplate, reply: dict[str, Any]) -> dict[str, Any]:
    """A reply that is an answer. Raises InputError for another."""
    if "refused" in reply:
        raise InputError(f"this model's chat template refuses the messages: {_shorten(reply['refused'])}")
    if "too_long" in reply:
        raise InputError(
            f"this model's chat template makes more than {MOST_CHARACTERS:,} characters of the messages, "
            "or needs too much memory for it: send fewer or shorter ones"
        )
    if "broken" in reply:
        raise InputError(
            f"{template.file} is no chat template that can be read ({_shorten(reply['broken'])}): take it from the "
            "model's repository again, or use prompt with prompt_template"
        )
    if "failed" in reply:
        raise TemplateFailed(f"this model's chat template fails on the messages: {_shorten(reply['failed'])}")
    return reply


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
