"""Builds constraints before the server does. It runs as a process of its own, which the kernel holds to its bounds.

What a client sends as a schema, an expression or a grammar is a program for whoever reads it. The library has bounds of
its own; that they suffice for everything is not proven, and a stack or a memory that overflows ends a process. So each
constraint is tried here first: beyond the bounds this process ends, and `trials` starts another one.
"""

import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from alpaca.errors import InputError
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.grammars import build, make_tokenizer
from alpaca.serving.structured.vocabulary import Vocabulary
from alpaca.subprocesses.wire import read_message, write_message

MOST_SECONDS = 1.0  # of processor time, for one constraint
MOST_BYTES = 1 << 30  # of address space, the interpreter's and the vocabulary's included
# Chains of definitions or rules are followed by recursion. The server reads in threads of 2 MiB (Cog's runtime makes
# them), of which a part is taken already: what is read within half of it here is safe there.
MOST_STACK_BYTES = 1 << 20


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Take a vocabulary, then try one constraint after the other until there are no more."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of the terminal's processes; the server decides
    message = read_message(requests)
    if message is None:
        return
    tokenizer = make_tokenizer(Vocabulary.from_message(message))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    threading.stack_size(MOST_STACK_BYTES)
    while (request := read_message(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        constraint = Constraint(**request)
        reply = on_own_stack(lambda constraint=constraint: _try(constraint, tokenizer))
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_message(replies, reply)


def on_own_stack(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a new thread, whose stack `threading.stack_size` bounds."""
    returned: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: returned.append(work()))
    thread.start()
    thread.join()
    return returned.pop()  # what `work` raised is in the log, and nothing here: that ends the process


def _try(constraint: Constraint, tokenizer: Any) -> dict[str, Any]:
    try:
        build(constraint, tokenizer)
    except InputError as error:
        return {"refused": str(error)}
    return {}


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
