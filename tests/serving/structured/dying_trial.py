"""Stands in for the process that tries constraints: each of them ends it by a signal."""

import os
import signal
import sys

from alpaca.subprocesses.wire import read_message

if __name__ == "__main__":
    read_message(sys.stdin.buffer)  # the vocabulary
    read_message(sys.stdin.buffer)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), int(os.environ["ALPACA_TEST_SIGNAL"]))
