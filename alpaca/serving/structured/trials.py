"""The way to the processes that try constraints: started when first needed, and again when one had to be ended."""

import atexit
import queue
import signal
import subprocess

from alpaca.errors import InputError, ServiceFailed
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.trial import MOST_SECONDS
from alpaca.serving.structured.vocabulary import Vocabulary
from alpaca.subprocesses.bounded import TOOK_TOO_LONG, BoundedProcess, Ended

_MODULE = "alpaca.serving.structured.trial"
_NUM_PROCESSES = 2  # so that one constraint that takes long does not keep all others waiting


class Trials:
    """Tries constraints, for any number of threads; each is tried by one process that has nothing else to do."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # The one that was used last comes first: a second is started only when two constraints come at once.
        self._idle: queue.LifoQueue[_Trial] = queue.LifoQueue()
        self._all = [_Trial(vocabulary) for _ in range(_NUM_PROCESSES)]
        for trial in self._all:
            self._idle.put(trial)
        atexit.register(self.close)

    def require(self, constraint: Constraint) -> None:
        """Return if the constraint can be built within the bounds. Raises InputError."""
        trial = self._idle.get()
        try:
            trial.require(constraint)
        finally:
            self._idle.put(trial)

    def close(self) -> None:
        """End the processes. The next constraint starts another."""
        for trial in self._all:
            trial.process.end()


class _Trial:
    def __init__(self, vocabulary: Vocabulary) -> None:
        # What the library panics about is not shown: a client's text is in it.
        self.process = BoundedProcess(_MODULE, first=vocabulary.to_message(), stderr=subprocess.DEVNULL)

    def require(self, constraint: Constraint) -> None:
        try:
            reply = self.process.ask({"kind": constraint.kind, "text": constraint.text})
        except Ended as ended:
            raise _describe(ended, constraint.kind) from None
        if "refused" in reply:
            raise InputError(reply["refused"])


def _describe(ended: Ended, kind: str) -> Exception:
    if ended.status == TOOK_TOO_LONG:
        return InputError(
            f"{kind} takes more than {MOST_SECONDS:g} s of processor time to read: make it simpler, with fewer "
            "repetitions and alternatives"
        )
    if ended.status in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL):
        return InputError(
            f"{kind} needs too much memory to be read, or its parts name each other in too long a chain: make it "
            "simpler"
        )
    if ended.status is None:
        return ServiceFailed("the process that tries constraints does not answer; try again")
    return ServiceFailed(f"the process that tries constraints ended with status {ended.status}; try again")
