"""Renders chat templates as transformers does. It runs as a process of its own, which the kernel holds to its bounds.

A template is a program and comes with the model; what it loops over and builds comes from clients. So the process has a
limit of memory, and of processor time for each text: beyond that it ends, and `renderer` starts another one.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alpaca.subprocesses.wire import read_message, write_message
from alpaca.text.chat.bounds import MOST_BYTES, MOST_CHARACTERS, MOST_SECONDS


class TemplateRefusal(jinja2.TemplateError):
    """What a template says by `raise_exception`."""


class TextTooLong(Exception):
    """A template writes more than MOST_CHARACTERS."""


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which mark an answer for training. Here their content alone counts.

    The content is a block called, not statements put in its place, since a variable set in it is not seen after it.
    """

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_give_back"), [], [], content).set_lineno(line)

    def _give_back(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, str],
    *,
    now: float,
    adds_prompt: bool = True,
) -> str:
    """The text that `apply_chat_template(messages, add_generation_prompt=adds_prompt, tokenize=False)` gives (5.17).

    values: the special tokens, such as bos_token.   now: seconds since 1970. Raises what Jinja2 and the template raise,
    and TextTooLong.
    """

    def strftime_now(format: str) -> str:
        return datetime.datetime.fromtimestamp(now).strftime(format)

    pieces: list[str] = []
    room = MOST_CHARACTERS
    template = _compile(source)
    known = {"tools": None, "documents": None, "add_generation_prompt": adds_prompt, "strftime_now": strftime_now}
    for piece in template.generate(messages=messages, **known, **values):
        room -= len(piece)
        if room < 0:
            raise TextTooLong
        pieces.append(piece)
    return "".join(pieces)


def read_words(source: str) -> set[str]:
    """The texts in a template's expressions: what it compares contents with, cuts them at, and so on."""
    constants = _environment().parse(source).find_all(nodes.Const)
    return {constant.value for constant in constants if isinstance(constant.value, str)}


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; Jinja2's own filter would escape what HTML gives a meaning."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise TemplateRefusal(message)


# The process ---------------------------------------------------------------------------------------------------------


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more. Nothing stops a text that takes too long but the end of the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of the terminal's processes; the server decides
    while (request := read_message(requests)) is not None:
        if "prefixes" in request:
            prefixes = ({"messages": request["messages"][:n], "adds_prompt": adds} for n, adds in request["prefixes"])
            reply = {"all": [_answer_in_time({**request, **prefix}) for prefix in prefixes]}
        else:
            reply = _answer_in_time(request)
        write_message(replies, reply)


def _answer_in_time(request: Mapping[str, Any]) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    reply = _answer(request)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return reply


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if request["asked"] == "words":
            return {"words": sorted(read_words(request["source"]))}
        given = {name: request[name] for name in ("now", "adds_prompt")}
        return {"text": render(request["source"], request["messages"], request["values"], **given)}
    except TemplateRefusal as error:
        return {"refused": str(error.message)}
    except (TextTooLong, MemoryError):
        return {"too_long": True}
    except jinja2.TemplateSyntaxError as error:
        return {"broken": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # a template is a program, and its mistakes are of any kind
        return {"failed": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
