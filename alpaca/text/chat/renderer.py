"""The way to the process that renders chat templates: started when first needed, and again when it had to be ended."""

import atexit
import contextlib
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpaca.errors import InputError, ServiceFailed
from alpaca.text.chat import wire
from alpaca.text.chat.files import ChatTemplate

_ROOT = Path(__file__).resolve().parents[3]
_SANDBOX = "alpaca.text.chat.sandbox"
_MOST_WAITING_S = 60.0  # of wall-clock time: far more than the process's own limit, on the busiest machine
_MOST_TOGETHER = 16  # texts asked for in one message: each may take the process's whole limit of time
_SHOWN_CHARACTERS = 500


class TemplateFailed(InputError):
    """The template stopped with an error of its own, not one it raises for a client to read."""


class Renderer:
    """Renders one text after another, for any number of threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
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
            with self._lock:
                replies = self._exchange(request)["all"]
            texts += [_checked(template, reply)["text"] for reply in replies]
        return texts

    def read_words(self, template: ChatTemplate) -> frozenset[str]:
        """What `sandbox.read_words` gives. Raises InputError."""
        return frozenset(self._ask(template, {"asked": "words", "source": template.source})["words"])

    def close(self) -> None:
        """End the process, if there is one. The next text starts another."""
        with self._lock:
            self._end()

    def _ask(self, template: ChatTemplate, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            reply = self._exchange(request)
        return _checked(template, reply)

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request and its reply. A process that is gone is replaced first; one that ends at work fails it."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        reply = None
        try:
            wire.write_message(process.stdin, request)
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                reply = wire.read_message(process.stdout) if selector.select(_MOST_WAITING_S) else None
        except OSError:  # it has ended; the line below says how
            pass
        if reply is None:
            raise self._describe_end(process)
        return reply

    def _describe_end(self, process: subprocess.Popen[bytes]) -> Exception:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # its output closes just before it is gone
        status = process.poll()
        self._end()
        if status in (None, -signal.SIGPROF):
            return InputError(
                f"this model's chat template takes more than {wire.MOST_SECONDS:g} s of processor time for the "
                "messages: send fewer or shorter ones"
            )
        return ServiceFailed(f"the process that renders chat templates ended with status {status}; try again")

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _SANDBOX], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self._process

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what it did not read any more
                stream.close()


RENDERER = Renderer()  # one process for the whole server


def _checked(template: ChatTemplate, reply: dict[str, Any]) -> dict[str, Any]:
    """A reply that is an answer. Raises InputError for another."""
    if "refused" in reply:
        raise InputError(f"this model's chat template refuses the messages: {_shorten(reply['refused'])}")
    if "too_long" in reply:
        raise InputError(
            f"this model's chat template makes more than {wire.MOST_CHARACTERS:,} characters of the messages, "
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
