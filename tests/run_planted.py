"""Run tests in copies of the tree: `run_planted.py TREE TEST [TREE TEST ...]`, a fork of one process for each pair.

Importing torch and transformers takes longer than most of the tests; it is done once, before the forks. The product is
imported after them, from the tree, so that each fork sees its own. Prints one JSON line a pair: its exit status,
seconds, and what pytest said.
"""

import importlib
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

NUM_AT_ONCE = 2
INTERNAL_ERROR = 3  # as pytest has it
SHARED = (
    "pytest", "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers",
    "transformers.models.llama.modeling_llama", "safetensors.torch", "sentencepiece", "numpy",
)  # fmt: skip
OURS = ("alpaca", "bench", "convert", "deploy", "tests")


def import_shared() -> None:
    """Import other people's packages, none of ours; a fork would not have their threads."""
    for name in SHARED:
        importlib.import_module(name)
    assert threading.active_count() == 1
    assert not [name for name in sys.modules if name.split(".")[0] in OURS]


def start(tree: Path, test: str, log: int) -> int:
    """Fork a process that runs a test in a tree and writes to `log`; its id."""
    child = os.fork()
    if child:
        return child
    status = INTERNAL_ERROR
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = run_test(tree, test)
    except BaseException:
        traceback.print_exc()
    finally:  # the parent's own clean-up is not the fork's
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_test(tree: Path, test: str) -> int:
    """Run a test in a tree, up to the first failure; pytest's exit status."""
    import pytest

    os.chdir(tree)
    sys.path[0] = str(tree)
    return int(pytest.main(["-x", "-p", "no:cacheprovider", "-m", "not slow", "--tb=short", test]))


def report(log: Path, status: int, *, tree: str, seconds: float) -> None:
    """One line: exit status -1 stands for a process that a signal ended."""
    output = log.read_text(errors="replace")
    print(json.dumps({"tree": tree, "status": status, "seconds": round(seconds, 1), "output": output}), flush=True)


def run_all(pairs: list[tuple[str, str]], folder: Path) -> None:
    """Run each pair, so many at once."""
    running: dict[int, tuple[str, float, Path]] = {}
    while pairs or running:
        while pairs and len(running) < NUM_AT_ONCE:
            tree, test = pairs.pop(0)
            log = folder / f"{len(pairs)}.log"
            with open(log, "wb") as file:
                running[start(Path(tree), test, file.fileno())] = (tree, time.monotonic(), log)
        child, wait_status = os.wait()
        tree, since, log = running.pop(child)
        report(log, os.waitstatus_to_exitcode(wait_status), tree=tree, seconds=time.monotonic() - since)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    import_shared()
    with tempfile.TemporaryDirectory() as folder:
        run_all(list(zip(arguments[::2], arguments[1::2], strict=True)), Path(folder))
