"""The exception tree. Everything here is a mistake a user can mend, and says how.

    AlpacaError
    ├── InputError(ValueError)             a bad argument, file or record
    │   ├── PromptTooLong                  does not fit the model's context
    │   ├── BadExamples                    training data that cannot be read
    │   └── UnsupportedModel               a kind of model that this part of the program does not know
    ├── MissingInput(FileNotFoundError)    something that should be there is not
    ├── OutputExists(FileExistsError)      would overwrite; a flag allows it
    ├── NotEnoughSpace(OSError)            disk or memory, both sizes named
    ├── MissingPackage(ImportError)        an optional package; the command that installs it
    ├── NumbersOverflow(ArithmeticError)   a precision too narrow for the model
    ├── ServiceFailed(ConnectionError)     a service asked over the network refuses, fails or is of no use
    └── EngineClosed(RuntimeError)         the serving engine cannot take or finish requests

Whatever is not an `AlpacaError` is a bug and keeps its traceback.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class AlpacaError(Exception):
    """Base of all errors whose message is written for the person at the keyboard."""


class InputError(AlpacaError, ValueError):
    """A value, file or record is not what was expected."""


class PromptTooLong(InputError):
    """The prompt leaves no room for an answer."""


class BadExamples(InputError):
    """A file or data set holds no examples that can be read. Its message may quote what is in it."""


class UnsupportedModel(InputError):
    """A kind of model that this part of the program does not know; another part may."""


class MissingInput(AlpacaError, FileNotFoundError):
    """A file or folder that should exist does not."""


class OutputExists(AlpacaError, FileExistsError):
    """The output is already there and may not be overwritten."""


class NotEnoughSpace(AlpacaError, OSError):
    """The disk or the memory is too small for what was asked."""


class MissingPackage(AlpacaError, ImportError):
    """An optional package is needed for what was asked."""


class NumbersOverflow(AlpacaError, ArithmeticError):
    """The model computes what is no number: its weights are damaged, or the precision is too narrow."""


class ServiceFailed(AlpacaError, ConnectionError):
    """A service that was asked over the network refuses, fails, or answers nothing of use."""


class EngineClosed(AlpacaError, RuntimeError):
    """The engine is shut down or has lost its device."""


class Terminated(BaseException):
    """A signal asked this program to end. Raised in the main thread, so that what it has begun is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a user's mistake ends it with one message and status 1, no traceback.

    SIGTERM and SIGHUP, which end a cancelled job, end it as an error does: files that are half written are removed. A
    `main` that sets handlers of its own keeps them.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)
    try:
        main()
    except AlpacaError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the command can be run again")
    except Terminated as ended:
        print(f"ended by {ended}; the command can be run again", file=sys.stderr)
        sys.exit(128 + ended.number)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Have SIGTERM wait for the end of the block: for cleaning up, which must not stop half-way."""
    global _num_undisturbed, _postponed
    if threading.current_thread() is not threading.main_thread():  # where no signal is handled
        yield
        return
    _num_undisturbed += 1
    try:
        yield
    finally:
        _num_undisturbed -= 1
        if _postponed is not None and not _num_undisturbed:
            number, _postponed = _postponed, None
            raise Terminated(number)


_num_undisturbed = 0  # blocks that the main thread is in
_postponed: int | None = None  # the signal that came meanwhile


def _terminate(number: int, frame: FrameType | None) -> None:
    global _postponed
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    if _num_undisturbed:
        _postponed = number
    else:
        raise Terminated(number)
