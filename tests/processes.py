"""Python processes that begin with torch, transformers and this project imported.

A test needs a process of its own where one is to be killed, or to have a rank among several. Importing would take
longer than most of what such a process does, so a server that has imported forks them. What a user's own start does is
tested by those of the commands' tests that start an interpreter.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.no_garbage", "torch.distributed.tensor", "transformers.models.llama.modeling_llama", "peft",
     "tests.training.worker", "convert.export_hf_checkpoint", "convert.export_state_dict_checkpoint",
     "convert.export_gguf", "convert.convert_llama_weights_to_hf", "convert.weight_diff", "cog"]
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """returncode: the exit status, negative for a signal.    stdout, stderr: what all of the processes wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, *arguments: str, timeout_s: float = 60) -> Finished:
    """Run `python -c code arguments`."""
    return _run([{}], ["-c", code, *arguments], timeout_s=timeout_s)


@dataclass(frozen=True)
class Running:
    """stdout, stderr: files of what the process has written."""

    process: BaseProcess
    stdout: Path
    stderr: Path

    def end_by(self, signal_number: int) -> Finished:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal_number)
        self.process.join(timeout=30)
        assert self.process.exitcode is not None, "not at an end after 30 s"
        return Finished(self.process.exitcode, self.stdout.read_text(), self.stderr.read_text())


@contextlib.contextmanager
def running_code(code: str, *arguments: str) -> Iterator[Running]:
    """A process that is `python -c code arguments`, ended with the block."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "out"), Path(folder, "err")
        for path in outputs:
            path.touch()
        process = _CONTEXT.Process(target=_be_python, args=(["-c", code, *arguments], {}, *outputs))
        process.start()
        try:
            yield Running(process, *outputs)
        finally:
            process.kill()
            process.join()


def end_while_writing(partial: Path, signal_number: int, code: str, *arguments: str) -> Finished:
    """Run `python -c code arguments`, and send it a signal once there is a file `partial`."""
    with running_code(code, *arguments) as running:
        deadline = time.monotonic() + 30
        while not partial.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert partial.exists()
        return running.end_by(signal_number)


def run_command(command: list[str], **environment: str) -> Finished:
    """Run `command`, which is an interpreter and its arguments, with these variables besides."""
    return _run([environment], command[1:], timeout_s=60)


def run_module(module: str, *arguments: str, timeout_s: float = 60) -> Finished:
    """Run `python -m module arguments`."""
    return _run([{}], ["-m", module, *arguments], timeout_s=timeout_s)


def mistake_of(command: list[str]) -> str:
    """What `command` says when it ends with one line and no traceback."""
    finished = run_command(command)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert finished.stderr.count("\n") == 1, finished.stderr
    return finished.stderr


def run_ranks(module: str, *arguments: str, num_processes: int, on_machine: int, timeout_s: float = 180) -> Finished:
    """Run `python -m module arguments` in processes with torchrun's variables; the first failure ends all of them.

    on_machine: how many of them are to think that they share a machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": num_processes}
    ranks = [
        {**shared, "RANK": rank, "LOCAL_RANK": rank % on_machine, "LOCAL_WORLD_SIZE": on_machine}
        for rank in range(num_processes)
    ]
    return _run(ranks, ["-m", module, *arguments], timeout_s=timeout_s)


def _run(environments: Sequence[Mapping[str, object]], command: list[str], *, timeout_s: float) -> Finished:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(len(environments))]
        processes = [
            _CONTEXT.Process(target=_be_python, args=(command, {k: str(v) for k, v in given.items()}, *output))
            for given, output in zip(environments, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        try:
            status = _wait(processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        stdout, stderr = ("".join(path.read_text() for path in paths) for paths in zip(*outputs, strict=True))
        return Finished(status, stdout, stderr)


def _wait(processes: list[BaseProcess], timeout_s: float) -> int:
    end = time.monotonic() + timeout_s
    while True:
        statuses = [process.exitcode for process in processes]
        if failed := [status for status in statuses if status]:
            return failed[0]
        if None not in statuses:
            return 0
        assert time.monotonic() < end, f"not at an end after {timeout_s} s: {statuses}"
        time.sleep(0.01)


def _be_python(command: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Become what `python command` is, with one thread for sums, its output in files."""
    import torch

    gc.freeze()  # what the server has imported stays
    gc.enable()
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    kind, what, *arguments = command
    sys.argv = [what if kind == "-m" else "-c", *arguments]
    if kind == "-m":
        sys.modules.pop(what, None)  # as `python -m` has it: not imported before it is run
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
