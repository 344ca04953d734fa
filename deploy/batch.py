"""Answers a file of predictions, one JSON object of inputs a line, with a server's whole batch in use.

Each line of the output is {"inputs", "status", "output", "metrics"}, with "error" where the prediction failed, in the
input's order. A run that was stopped goes on behind the last line that was written whole.
"""

import json
import sys
import time
import urllib.error
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from alpaca.errors import InputError, MissingInput

Inputs = dict[str, Any]
Prediction = dict[str, Any]
_AHEAD = 4  # times as many requests as run at once are begun before the first of them is written
_PROGRESS_S = 10.0


def answer_file(
    source: Path, target: Path, asking: AbstractContextManager[Callable[[Inputs], Prediction]], *, concurrency: int
) -> tuple[int, int]:
    """Answer the lines of `source` that `target` does not answer yet; (all lines, those whose prediction failed).

    asking: gives what asks a server; many threads call it at once. It is entered once both files are known to be right,
    as a model takes long to load. What is raised there ends the run, and what was written stays.
    Raises InputError, MissingInput.
    """
    records = read_inputs(source)
    done = resume(target, records, source)
    num_failed = sum(line["status"] != "succeeded" for line in done)
    with open(target, "a", encoding="utf-8") as file, asking as predict:
        progress = _Progress(len(done), len(records))
        for inputs, prediction in answer_all(records[len(done) :], predict, concurrency=concurrency):
            line = {"inputs": inputs, "status": prediction["status"], "output": prediction.get("output")}
            line["metrics"] = prediction.get("metrics") or {}
            if line["status"] != "succeeded":
                line["error"], num_failed = prediction.get("error"), num_failed + 1
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            progress.advance(line["metrics"].get("output_tokens", 0))
    progress.write()
    return len(records), num_failed


def read_inputs(source: Path) -> list[Inputs]:
    """The objects of a file, one a line. Raises InputError, which names the line, and MissingInput."""
    if not source.is_file():
        raise MissingInput(f"no file {source}: --input names one with a JSON object of inputs a line")
    lines = enumerate(_lines(source.read_bytes(), source), start=1)
    return [_read_object(line, f"{source}, line {number}") for number, line in lines if line.strip()]


def _lines(content: bytes, where: Path) -> list[str]:
    """The lines of a file in UTF-8. (str.splitlines also cuts at characters that may stand inside a JSON text.)"""
    try:
        return content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: expected UTF-8; {error}") from None


def _read_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: expected a JSON object; {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object; found {line[:60]}")
    return record


def resume(target: Path, records: Sequence[Inputs], source: Path) -> list[dict[str, Any]]:
    """The answers that are there already. A last line that was not written whole is cut off.

    Raises InputError, and leaves the file alone, where its lines do not answer those of the source.
    """
    if not target.exists():
        return []
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    numbered = enumerate(_lines(whole, target)[:-1], start=1)
    lines = [_read_object(line, f"{target}, line {number}") for number, line in numbered]
    for number, line in enumerate(lines, start=1):
        if number > len(records) or line.get("inputs") != records[number - 1]:
            raise InputError(
                f"{target}, line {number} answers other inputs than those of {source}: name another --output, "
                "or remove it"
            )
    with open(target, "r+b") as file:
        file.truncate(len(whole))
    return lines


def answer_all(
    records: Sequence[Inputs], predict: Callable[[Inputs], Prediction], *, concurrency: int
) -> Iterator[tuple[Inputs, Prediction]]:
    """Each record with its prediction, in order, while `concurrency` of them are asked for at once."""
    pool = ThreadPoolExecutor(concurrency)
    begun: deque[tuple[Inputs, Future[Prediction]]] = deque()
    try:
        for inputs in records:
            begun.append((inputs, pool.submit(predict, inputs)))
            while len(begun) >= _AHEAD * concurrency or (begun and begun[0][1].done()):
                yield _taken(begun)
        while begun:
            yield _taken(begun)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever stops the server ends those that run


def _taken(begun: "deque[tuple[Inputs, Future[Prediction]]]") -> tuple[Inputs, Prediction]:
    inputs, future = begun.popleft()
    return inputs, future.result()


def refusal(error: urllib.error.HTTPError) -> Prediction:
    """The prediction that inputs stand for which the server does not take (422). Raises any other error again."""
    if error.code != 422:
        raise error
    return {"status": "failed", "error": error.read().decode(errors="replace")}


class _Progress:
    """Says now and then on stderr how far it is."""

    def __init__(self, num_done: int, num_all: int) -> None:
        self._num_done, self._num_all, self._num_tokens = num_done, num_all, 0
        self._start = self._said = time.monotonic()

    def advance(self, num_tokens: int) -> None:
        self._num_done += 1
        self._num_tokens += num_tokens
        if time.monotonic() - self._said >= _PROGRESS_S:
            self.write()

    def write(self) -> None:
        self._said = time.monotonic()
        rate = self._num_tokens / max(self._said - self._start, 1e-9)
        print(f"{self._num_done:,} of {self._num_all:,} answered, {rate:,.1f} tokens/s", file=sys.stderr, flush=True)
