"""The state of a generation run on disk: a journal of JSON lines, each appended and fsynced at once.

A line is one of
    completion   what the service answered to prompt `prompt`, before anything is made of it: it has been paid for
    record       an accepted task: the block it came from, the task, how similar it is to what was there before it
    done         every block of the completion has been judged
    imported     a record of a regen.json that was there before the journal
and `rejected` counts the blocks that were turned down since the line before of the same prompt. The state of a run
follows from the lines alone, so that a killed one goes on with nothing lost and nothing twice.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from alpaca.data.example import Example
from alpaca.data.generation.services import Completion
from alpaca.data.records import read_examples
from alpaca.errors import InputError
from alpaca.files.atomic import fsync, write_json, write_text

JOURNAL = "generated.jsonl"
REGEN = "regen.json"
PROVENANCE = "regen_provenance.json"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A completion in the journal. num_judged: the number of its blocks that have been judged."""

    completion: Completion
    first_number: int
    is_chat: bool
    num_judged: int = 0


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A record of the data and where it comes from."""

    task: Example
    provenance: dict[str, Any]


@dataclass(kw_only=True)
class JournalState:
    """The state that the journal's lines add up to. waiting: by prompt, the answers that are not fully judged yet."""

    accepted: list[Accepted] = field(default_factory=list)
    waiting: dict[int, Answer] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    rejected: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_done: int = 0
    origins: dict[int, dict[str, Any]] = field(default_factory=dict)  # model, endpoint, date and prompt of an answer

    def apply(self, line: dict[str, Any]) -> None:
        """Take in one line of the journal."""
        self.rejected.update(line.get("rejected", {}))
        match line["kind"]:
            case "completion":
                self._apply_completion(line)
            case "record":
                self._apply_record(line)
            case "done":
                del self.waiting[line["prompt"]]
                self.num_done += 1
            case "imported":
                self.accepted.append(Accepted(task=_task(line), provenance={"imported_from": line["from"]}))
            case kind:
                raise KeyError(f"kind {kind!r}")

    def _apply_completion(self, line: dict[str, Any]) -> None:
        number, completion = line["prompt"], Completion(**line["completion"])
        self.answered.add(number)
        self.waiting[number] = Answer(completion=completion, first_number=line["first_number"], is_chat=line["is_chat"])
        self.origins[number] = {
            "model": completion.model, "endpoint": line["endpoint"], "date": line["date"], "prompt": number
        }  # fmt: skip
        self.prompt_tokens += completion.prompt_tokens
        self.output_tokens += completion.output_tokens

    def _apply_record(self, line: dict[str, Any]) -> None:
        number, answer = line["prompt"], self.waiting[line["prompt"]]
        self.waiting[number] = Answer(
            completion=answer.completion,
            first_number=answer.first_number,
            is_chat=answer.is_chat,
            num_judged=line["block"] + 1,
        )
        self.accepted.append(Accepted(task=_task(line), provenance={**self.origins[number], **line["similarity"]}))

    def next_prompts(self) -> "PromptNumbers":
        return PromptNumbers(set(self.answered))


class PromptNumbers:
    """The numbers of prompts that no answer is there for, rising."""

    def __init__(self, answered: set[int]) -> None:
        self._answered, self._next = answered, 0

    def take(self) -> int:
        """The next one, given out once."""
        number = self.peek()
        self._next = number + 1
        return number

    def peek(self) -> int:
        while self._next in self._answered:
            self._next += 1
        return self._next


def _task(line: dict[str, Any]) -> Example:
    return Example(line["instruction"], line["output"], line["input"])


class Journal:
    """The journal of an output folder, read on opening; `state` follows every line written. A context manager.

    A last line that a killed run left half is cut off. A regen.json without a journal, as the original program leaves
    it, is taken into a new one. Raises InputError for a damaged journal. The caller keeps other writers away.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._folder, self.state = folder / JOURNAL, folder, JournalState()
        if not self.path.exists():
            write_text(self.path, _import_regen(folder))
            fsync(folder)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  __exit__ closes it
        try:
            self._replay()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add_completion(
        self, number: int, completion: Completion, *, first_number: int, is_chat: bool, endpoint: str, date: str
    ) -> None:
        """Write an answer down before it is judged."""
        self._append({
            "kind": "completion", "prompt": number, "first_number": first_number, "is_chat": is_chat,
            "endpoint": endpoint, "date": date, "completion": vars(completion),
        })  # fmt: skip

    def add_record(
        self, number: int, block: int, task: Example, *, similarity: dict[str, Any], rejected: Counter[str]
    ) -> None:
        """Keep an accepted task; `block` counts from 0 in its completion."""
        self._append({
            "kind": "record", "prompt": number, "block": block, **_fields(task), "similarity": similarity,
            "rejected": dict(rejected),
        })  # fmt: skip

    def add_done(self, number: int, *, rejected: Counter[str]) -> None:
        """All blocks of an answer are judged."""
        self._append({"kind": "done", "prompt": number, "rejected": dict(rejected)})

    def write_data(self) -> None:
        """Write regen.json and, beside it, a list in the same order that says where each record comes from."""
        if not self.state.accepted:
            return
        write_json(self._folder / PROVENANCE, [accepted.provenance for accepted in self.state.accepted])
        write_json(self._folder / REGEN, [_fields(accepted.task) for accepted in self.state.accepted])

    def _append(self, line: dict[str, Any]) -> None:
        data = memoryview(f"{json.dumps(line)}\n".encode())
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())
        self.state.apply(line)

    def _replay(self) -> None:
        content = self.path.read_bytes()
        whole, newline, torn = content.rpartition(b"\n")
        if torn:
            self._file.truncate(len(whole) + len(newline))
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                self.state.apply(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{self.path}, line {number}: expected a line that this command wrote, found {line[:80]!r} "
                    f"({type(error).__name__}: {error}); move the file away, or mend it from a backup"
                ) from error


def _import_regen(folder: Path) -> str:
    """The first lines of a journal: the records of a regen.json that is there already."""
    path = folder / REGEN
    if not path.exists() or path.read_text("utf-8-sig").strip() == "[]":
        return ""
    lines = [{"kind": "imported", "from": REGEN, **_fields(example)} for example in read_examples(path)]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def _fields(task: Example) -> dict[str, str]:
    return {"instruction": task.instruction, "input": task.input, "output": task.output}
