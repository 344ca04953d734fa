"""Runs of instruction generation: what is kept, what is lost when it is killed (nothing), and how it ends."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alpaca.data.example import Example
from alpaca.data.generate_instruction import describe_dry_run, main, parse_flags
from alpaca.data.generation.journal import JOURNAL, PROVENANCE, REGEN, Journal
from alpaca.data.generation.prompts import SEED_TASKS, find_fault, read_seed_tasks
from alpaca.data.generation.run import Ending, Generation
from alpaca.data.generation.services import Completion, RequestFailed
from alpaca.data.generation.similarity import InstructionPool
from alpaca.data.records import read_examples
from alpaca.errors import InputError, OutputExists, ServiceFailed
from tests.conftest import ROOT
from tests.data.generation.completion_service import Service, error_reply, running_service, write_tasks

TASKS = read_seed_tasks(SEED_TASKS)


@pytest.fixture
def service() -> Iterator[Service]:
    with running_service() as service:
        yield service


class FakeClient:
    """Answers at once, each prompt always the same; `delay` and `fail` are told the number of the prompt."""

    endpoint, is_chat = "http://here/v1", False

    def __init__(
        self, *, text: Any = write_tasks, fail: Any = lambda number: None, delay: Any = lambda number: 0
    ) -> None:
        self.text, self.fail, self.delay = text, fail, delay
        self.prompts: list[str] = []

    def complete(self, prompt: str, *, max_tokens: int, number: int) -> Completion:
        self.prompts.append(prompt)
        time.sleep(self.delay(number))
        if failure := self.fail(number):
            raise failure
        return Completion(
            text=self.text(prompt), finish_reason="stop", prompt_tokens=200, output_tokens=300, model="fake-1"
        )


def run(folder: Path, client: Any, *flags: object) -> tuple[Ending, Journal]:
    """A run in this process, as `main` does it."""
    config = parse_flags(["--output_dir", str(folder), "--model_name", "fake", *map(str, flags)])
    folder.mkdir(exist_ok=True)
    with Journal(folder) as journal:
        ending = Generation(config, TASKS, client, journal).run()
        journal.write_data()
    return ending, journal


def check_data(folder: Path, num_records: int) -> list[Example]:
    """The data are `num_records` distinct, fit records, each no nearer than allowed to all before it."""
    records = json.loads((folder / REGEN).read_text("utf-8"))
    assert all({*record} == {"instruction", "input", "output"} for record in records)
    examples = read_examples(folder / REGEN)
    assert len(examples) == len({example.instruction for example in examples}) == num_records
    pool = InstructionPool(task.instruction for task in TASKS)
    provenance = json.loads((folder / PROVENANCE).read_text("utf-8"))
    assert len(provenance) == num_records
    for example, origin in zip(examples, provenance, strict=True):
        assert not find_fault(example)
        found, similarity = pool.judge(example.instruction, threshold=0.7)
        assert found is None
        assert origin["avg_similarity_score"] == similarity.mean
        assert [*origin["most_similar_instructions"].values()] == [score for _, score in similarity.nearest]
        assert {"model", "endpoint", "date", "prompt"} <= {*origin}
        pool.add(example.instruction)
    return examples


# One run --------------------------------------------------------------------------------------------------------


def test_a_run_brings_exactly_the_number_asked_for(tmp_path: Path):
    ending, journal = run(tmp_path, FakeClient(), "--num_instructions_to_generate", 40)
    assert ending is None
    examples = check_data(tmp_path, 40)
    # The service's blocks: of 4 to 19, those whose number 6 divides hold a banned word, those of 7 a wrong label.
    written = [found for prompt in range(5) for found in expected_instructions(prompt)]
    assert [example.instruction for example in examples] == written[:40]
    assert {*journal.state.rejected} == {"not for a text model", "malformed"}


def expected_instructions(number: int) -> list[str]:
    from alpaca.data.generation.prompts import make_prompt

    prompt = make_prompt(TASKS, number=number, num_prompt_instructions=3, seed=42)
    blocks = ("4. Instruction:" + write_tasks(prompt)).split("###\n")
    fit = [block for block, place in zip(blocks, range(4, 20), strict=True) if place % 6 and place % 7]
    return [re.search(r"Instruction: (.*)", block)[1] for block in fit]


def test_the_data_do_not_depend_on_which_answer_comes_first(tmp_path: Path):
    rng = random.Random(5)
    slow = FakeClient(delay=lambda number: rng.choice([0, 0.02, 0.05]))
    run(tmp_path / "slow", slow, "--num_instructions_to_generate", 60)
    run(tmp_path / "one", FakeClient(), "--num_instructions_to_generate", 60, "--request_batch_size", 1)
    assert (tmp_path / "slow" / REGEN).read_bytes() == (tmp_path / "one" / REGEN).read_bytes()


def test_a_longer_run_goes_on_within_the_answer_it_stopped_in(tmp_path: Path):
    client = FakeClient()
    for number in (5, 13, 13, 60):
        assert run(tmp_path / "steps", client, "--num_instructions_to_generate", number)[0] is None
        check_data(tmp_path / "steps", number)
    assert len(client.prompts) == len(set(client.prompts)), "nothing is paid for twice"
    run(tmp_path / "once", FakeClient(), "--num_instructions_to_generate", 60)
    assert (tmp_path / "steps" / REGEN).read_bytes() == (tmp_path / "once" / REGEN).read_bytes()


def test_rejections_are_counted_once_however_often_the_run_was_stopped(tmp_path: Path):
    for number in range(1, 61):
        run(tmp_path / "steps", FakeClient(), "--num_instructions_to_generate", number, "--request_batch_size", 1)
    _, once = run(tmp_path / "once", FakeClient(), "--num_instructions_to_generate", 60, "--request_batch_size", 1)
    with Journal(tmp_path / "steps") as steps:
        assert steps.state.rejected == once.state.rejected
        assert [found.task for found in steps.state.accepted] == [found.task for found in once.state.accepted]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.fast_rows(1)
def test_a_journal_cut_anywhere_is_continued_to_the_same_data(tmp_path: Path, seed: int):
    flags = ("--num_instructions_to_generate", 30, "--request_batch_size", 1)
    run(tmp_path / "whole", FakeClient(), *flags)
    whole = (tmp_path / "whole" / JOURNAL).read_bytes()
    rng = random.Random(seed)
    folder = tmp_path / "cut"
    folder.mkdir()
    for length in [0, 1, *(rng.randrange(len(whole)) for _ in range(8)), len(whole) - 1]:
        (folder / JOURNAL).write_bytes(whole[:length])
        (folder / REGEN).unlink(missing_ok=True)
        run(folder, FakeClient(), *flags)
        assert (folder / REGEN).read_bytes() == (tmp_path / "whole" / REGEN).read_bytes()
        with Journal(folder) as journal:
            assert len(journal.state.accepted) == 30, "what was cut off is not in the way of what follows"


def test_a_damaged_journal_names_the_line(tmp_path: Path):
    run(tmp_path, FakeClient(), "--num_instructions_to_generate", 5)
    lines = (tmp_path / JOURNAL).read_bytes().split(b"\n")
    (tmp_path / JOURNAL).write_bytes(b"\n".join([lines[0], b'{"kind": "rec', *lines[2:]]))
    with pytest.raises(InputError, match=r"generated.jsonl, line 2: expected a line that this command wrote"):
        run(tmp_path, FakeClient())


def test_a_regen_json_of_the_original_program_is_continued(tmp_path: Path):
    run(tmp_path / "first", FakeClient(), "--num_instructions_to_generate", 20)
    old = json.loads((tmp_path / "first" / REGEN).read_text())
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / REGEN).write_text(json.dumps([{**record, "avg_similarity_score": 0.1} for record in old]))
    _, journal = run(tmp_path / "second", FakeClient(), "--num_instructions_to_generate", 30)
    records = json.loads((tmp_path / "second" / REGEN).read_text())
    assert records[:20] == old
    assert len({record["instruction"] for record in records}) == len(records) == 30
    assert journal.state.rejected["too similar"] == 20, "the first prompts are asked anew and bring the same"


def test_original_filters_accept_what_the_original_accepts(tmp_path: Path):
    empty = FakeClient(text=lambda prompt: re.sub(r"About \w+\.", "", write_tasks(prompt)))
    ending, journal = run(tmp_path / "a", empty, "--num_instructions_to_generate", 5, "--max_requests", 2)
    assert "--max_requests 2 is reached" in str(ending)
    assert journal.state.rejected["empty output"] == 2 * len(expected_instructions(0)) == 22
    assert run(tmp_path / "b", empty, "--num_instructions_to_generate", 5, "--original_filters")[0] is None


# How a run ends -------------------------------------------------------------------------------------------------


def test_a_bound_on_requests_ends_a_run_with_what_there_is(tmp_path: Path):
    client = FakeClient()
    ending, _ = run(tmp_path, client, "--num_instructions_to_generate", 1000, "--max_requests", 3)
    assert str(ending) == "--max_requests 3 is reached"
    assert len(client.prompts) == 3
    check_data(tmp_path, len(expected_instructions(0)) * 3)


def test_a_bound_on_tokens_holds_over_runs(tmp_path: Path):
    flags = ("--num_instructions_to_generate", 1000, "--max_tokens", 400, "--max_tokens_total", 4000)
    for _ in range(2):
        ending, journal = run(tmp_path, FakeClient(), *flags)
        assert "--max_tokens_total 4,000 leaves no room" in str(ending)
    assert 2500 <= journal.state.prompt_tokens + journal.state.output_tokens <= 4000


def test_a_failure_keeps_what_came_before_and_after(tmp_path: Path):
    client = FakeClient(
        fail=lambda number: RequestFailed("no such model", is_permanent=True) if number == 2 else None,
        delay=lambda number: 0.2 if number == 2 else 0,
    )
    ending, journal = run(tmp_path, client, "--num_instructions_to_generate", 1000)
    assert isinstance(ending, ServiceFailed)
    assert str(ending) == "no such model"
    assert {0, 1, 3} <= journal.state.answered
    assert 2 not in journal.state.answered
    check_data(tmp_path, len(journal.state.answered) * len(expected_instructions(0)))
    ending, journal = run(tmp_path, FakeClient(), "--num_instructions_to_generate", len(journal.state.accepted) + 1)
    assert ending is None
    assert 2 in journal.state.answered


def test_a_model_that_brings_nothing_is_given_up(tmp_path: Path):
    ending, _ = run(tmp_path, FakeClient(text=lambda prompt: "### nonsense" * 5), "--max_fruitless", 7)
    assert isinstance(ending, ServiceFailed)
    assert re.search(r"7 completions in a row brought no new task \(rejected so far: malformed \d+\)", str(ending))
    assert not (tmp_path / REGEN).exists()


def test_a_second_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from alpaca.files.locks import locked

    flags = ["--output_dir", str(tmp_path), "--endpoint", "http://127.0.0.1:9/predictions"]
    monkeypatch.setattr(sys, "argv", ["generate", *flags])
    with locked(tmp_path / JOURNAL), pytest.raises(OutputExists, match="another process is writing"):
        main()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_instructions_to_generate", "0"], "--num_instructions_to_generate 0: expected 1 or more"),
        (["--top_p", "1.5"], "--top_p 1.5: expected a share from 0 to 1"),
        (["--temperature", "nan"], "--temperature nan: expected 0 or more"),
        ([], "--model_name is missing"),
    ],
)
def test_bad_flags_are_named(flags: list[str], message: str):
    with pytest.raises(InputError, match=message):
        parse_flags(flags)


def test_dry_run_shows_the_prompt_and_the_cost_and_needs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "generate", "generate_instruction_following_data", "--output_dir", str(tmp_path / "out"), "--dry_run",
        "--num_instructions_to_generate", "800", "--price_in", "10", "--price_out", "20",
    ])  # fmt: skip
    monkeypatch.setitem(sys.modules, "openai", None)
    main()
    shown = capsys.readouterr().out
    assert shown.startswith("Write a varied list of 20 tasks.")
    assert "100 requests, if half of the 16 tasks that each is asked for are accepted" in shown
    tokens_in, tokens_out = (
        int(number.replace(",", "")) for number in re.search(r"([\d,]+) of prompts and ([\d,]+)", shown).groups()
    )
    assert f"at the prices given {(tokens_in * 10 + tokens_out * 20) / 1e6:.2f}" in shown
    assert not (tmp_path / "out").exists()
    config = parse_flags(["--dry_run"])
    assert describe_dry_run(config, TASKS) == describe_dry_run(config, TASKS)
    assert "pass --price_in and --price_out" in describe_dry_run(config, TASKS)


# The command, as a process --------------------------------------------------------------------------------------


def start(service: Service, folder: Path, *flags: object, key: str = "sk-test-of-a-run") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alpaca.data.generate_instruction", "generate_instruction_following_data"]
    values = ["--output_dir", folder, "--model_name", "some-model", *flags]
    environment = {**os.environ, "OPENAI_API_KEY": key, "OPENAI_BASE_URL": f"{service.url}/v1"}
    return subprocess.Popen(
        [*command, *map(str, values)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def lines_in(folder: Path) -> int:
    path = folder / JOURNAL
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], folder: Path, number: int) -> None:
    while lines_in(folder) < number:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def faults(number: int, body: dict[str, Any]) -> Any:
    """One request in three goes wrong, each time in another way."""
    replies = [
        error_reply(429, {"Retry-After": "0.05"}), error_reply(500), (200, {"X-Claim-Length": "900"}, b'{"choi'),
        (200, {}, b"{}"), (200, {"X-Wait": "3"}, b""), (200, {"Content-Type": "text/html"}, b"<html>"),
    ]  # fmt: skip
    return replies[number // 3 % len(replies)] if number % 3 == 1 else (200, {"X-Wait": "0.05"}, None)


def slow_faults(service: Service) -> None:
    """Faults, and good answers that take a moment, so that a kill meets requests under way."""

    def fault(number: int, body: dict[str, Any]) -> Any:
        status, headers, content = faults(number, body)
        return (status, headers, content) if content is not None else (
            (reply := service.answer("/v1/chat/completions", body))[0], headers, reply[2]
        )  # fmt: skip

    service.fault = fault


def run_with_kills(service: Service, folder: Path, *, num_tasks: int, kill_at: list[int]) -> str:
    """The last run's output; the runs before it are killed once the journal has so many lines."""
    pytest.importorskip("openai", reason="the optional package: pip install openai")
    slow_faults(service)
    service.text = lambda prompt: write_tasks(prompt)[: -40 if len(prompt) % 5 == 0 else None]  # some are cut short
    flags = ("--num_instructions_to_generate", num_tasks, "--timeout_s", 1)
    kept: list[str] = []
    for number in kill_at:
        process = start(service, folder, *flags)
        wait_for_lines(process, folder, number)
        process.kill()
        process.communicate()
        on_disk = accepted_on_disk(folder)
        assert on_disk[: len(kept)] == kept
        kept = on_disk
    process = start(service, folder, *flags)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert [example.instruction for example in read_examples(folder / REGEN)][: len(kept)] == kept
    return output


def accepted_on_disk(folder: Path) -> list[str]:
    """The instructions of the whole lines in the journal, read with nothing of ours."""
    lines = [json.loads(line) for line in (folder / JOURNAL).read_bytes().split(b"\n")[:-1]]
    return [line["instruction"] for line in lines if line["kind"] == "record"]


def test_a_killed_run_ends_with_all_records_and_none_twice(service: Service, tmp_path: Path):
    output = run_with_kills(service, tmp_path, num_tasks=30, kill_at=[9])
    check_data(tmp_path, 30)
    assert "30 of 30 tasks" in output
    assert "sk-test" not in output + "".join(
        path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".jsonl")
    )
    config = json.loads((tmp_path / "generation.json").read_text())
    assert config["num_instructions_to_generate"] == 30
    assert config["endpoint"] == f"{service.url}/v1/"


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_200_distinct_records_to_train_on(
    service: Service, tmp_path: Path, llama_folder: Path
):
    run_with_kills(service, tmp_path, num_tasks=200, kill_at=[20, 90, 160])
    check_data(tmp_path, 200)
    with Journal(tmp_path) as journal:
        prompts = len(journal.state.answered)
    asked_again = sum(service.served.values()) - len(service.served)
    assert asked_again <= 3 * 5, "a kill loses at most the answers that were under way"
    assert prompts <= len(service.served)
    flags = {"model_name_or_path": llama_folder, "data_path": tmp_path / REGEN, "output_dir": tmp_path / "out"}
    command = [sys.executable, ROOT / "train.py", *(f"--{name}={value}" for name, value in flags.items())]
    trained = subprocess.run([*command, "--max_steps=2"], cwd=ROOT, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly(service: Service, tmp_path: Path, number: signal.Signals):
    service.fault = lambda index, body: error_reply(429, {"Retry-After": "600"}) if index >= 3 else None
    process = start(
        service, tmp_path, "--num_instructions_to_generate", 1000, "--request_batch_size", 2, "--endpoint",
        f"{service.url}/predictions",
    )  # fmt: skip
    wait_for_lines(process, tmp_path, 3 * (len(expected_instructions(0)) - 1))
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert f"ended early: stopped by {number.name}; the same command goes on" in output
    assert "Traceback" not in output
    assert len(read_examples(tmp_path / REGEN)) >= 3 * (len(expected_instructions(0)) - 1)


@pytest.mark.slow
def test_a_wrong_key_ends_with_one_message(service: Service, tmp_path: Path):
    pytest.importorskip("openai", reason="the optional package: pip install openai")
    service.fault = lambda number, body: error_reply(401, message="Incorrect API key provided: sk-wrong-key")
    process = start(service, tmp_path, key="sk-wrong-key")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert re.search(r"^error: http\S+ answered 401 \(check the API key\)", output, re.MULTILINE)
    assert "Traceback" not in output
    assert "sk-wrong" not in output
