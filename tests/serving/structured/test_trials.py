"""No constraint makes a server wait, swell or fall: each is tried in a process that may be ended."""

import random
import signal
import string
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from alpaca.errors import InputError
from alpaca.serving.structured import trial, trials
from alpaca.serving.structured.compiling import Compiler
from alpaca.serving.structured.constraints import Constraint, read_constraint
from alpaca.serving.structured.trials import Trials
from alpaca.serving.structured.vocabulary import Vocabulary
from tests.serving.structured.letters import EOS, Letters

MOST_S = 0.05
TRIES = 6  # another program may take the processor at the wrong moment, but not each time


@pytest.fixture
def tried() -> Iterator[Trials]:
    trials = Trials(Vocabulary.of(Letters(120), 120, [EOS]))
    yield trials
    trials.close()


def processes(tried: Trials) -> list[psutil.Process]:
    return [psutil.Process(one.process.pid) for one in tried._all if one.process.pid is not None]


def test_what_takes_too_long_ends_the_process_and_the_next_gets_another(tried):
    tried.require(Constraint(kind="regex", text="a"))
    (first,) = processes(tried)
    begun = time.monotonic()
    with pytest.raises(InputError, match="json_schema takes more than 1 s of processor time to read: make it simpler"):
        tried.require(Constraint(kind="json_schema", text='{"type":"integer","multipleOf":999979}'))
    assert time.monotonic() - begun < 20
    assert not first.is_running()
    tried.require(Constraint(kind="regex", text="a"))


def test_a_process_that_something_else_ended_is_replaced(tried):
    tried.require(Constraint(kind="regex", text="a"))
    (process,) = processes(tried)
    process.suspend()
    timer = threading.Timer(0.1, process.kill)
    timer.start()
    tried.require(Constraint(kind="regex", text="b"))
    timer.join()
    assert [one.pid for one in processes(tried)] != [process.pid]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
@pytest.mark.fast_rows(1)
def test_a_constraint_that_ends_each_process_is_refused(monkeypatch, number):
    monkeypatch.setenv("ALPACA_TEST_SIGNAL", str(int(number)))
    monkeypatch.setattr(trials, "_MODULE", "tests.serving.structured.dying_trial")
    tried = Trials(Vocabulary.of(Letters(120), 120, [EOS]))
    with pytest.raises(InputError, match="regex needs too much memory"):
        tried.require(Constraint(kind="regex", text="b"))
    tried.close()


def test_two_are_tried_side_by_side_and_no_more_are_started(tried):
    tried.require(Constraint(kind="regex", text="a"))
    assert len(processes(tried)) == 1
    heavy = Constraint(kind="json_schema", text='{"type":"integer","multipleOf":999979}')

    def fail() -> None:
        with pytest.raises(InputError):
            tried.require(heavy)

    thread = threading.Thread(target=fail)
    thread.start()
    time.sleep(0.05)
    tried.require(Constraint(kind="regex", text="b"))
    assert thread.is_alive()
    thread.join()
    assert len(tried._all) == trials._NUM_PROCESSES == 2


def test_memory_is_bounded(tried, monkeypatch):
    """The kernel's bound, not the library's: the process cannot get more."""
    tried.require(Constraint(kind="regex", text="a"))
    (process,) = processes(tried)
    assert process.rlimit(psutil.RLIMIT_AS) == (trial.MOST_BYTES, trial.MOST_BYTES)


def test_the_stack_is_half_of_the_one_that_the_server_reads_on(monkeypatch):
    """Cog's runtime calls the Predictor in threads of 2 MiB: what recursion overflows must be the trial."""
    monkeypatch.setattr(trials, "_MODULE", "tests.serving.structured.stack_teller")
    tried = Trials(Vocabulary.of(Letters(120), 120, [EOS]))
    with pytest.raises(InputError, match=f"a stack of {1 << 20} bytes"):
        tried.require(Constraint(kind="regex", text="a"))
    tried.close()


def test_the_processes_end_with_the_compiler():
    compiler = Compiler(Letters(120), 120, [EOS])
    compiler.start(Constraint(kind="regex", text="a"), 1)
    (process,) = processes(compiler._prepared[2])
    compiler.close()
    assert not process.is_running()


# Hostile ones ---------------------------------------------------------------------------------------------------------


def hostile() -> dict[str, Constraint]:
    deep: dict = {"type": "string"}
    for level in range(30):  # up to the deepest that is taken
        deep = {"anyOf": [deep, {"type": "array", "items": {"type": "null"}, "maxItems": level}]}
    names = [f"p{i}" for i in range(600)]
    schemas: dict[str, dict] = {
        "a large divisor": {"type": "integer", "multipleOf": 99991},
        "many combinations": {
            "allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(14)]
        },
        "many fields": {
            "type": "object",
            "properties": {name: {"type": ["string", "number", "null"]} for name in names},
        },
        "long texts": {"type": "string", "minLength": 9000, "maxLength": 100_000},
        "many items": {"type": "array", "items": {"type": "string"}, "minItems": 100_000, "maxItems": 1_000_000},
        "deep": deep,
        "itself": {"$ref": "#"},
        "many patterns": {"anyOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(200)]},
    }
    regexes = {
        "states": "(a|b)*a(a|b){200}",
        "repetitions": "(((a{1,100}){1,100}){1,100}){1,100}",
        "letters": r"(\p{L}{1,50}[^\p{L}]){1,200}",
        "anything": "(.*x.*y.*z){1,300}",
    }
    grammars = {
        "ambiguous": 'start: x\nx: x x x | "a" | "aa" | x "b" x\n',
        "parentheses": "start: " + "(" * 15_000 + '"a"' + ")" * 15_000,
        "rules": "\n".join([f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(900)] + ["start: r0", 'r900: "b"']),
    }
    found = {name: read_constraint(schema, "", "") for name, schema in schemas.items()}
    found |= {name: read_constraint(None, regex, "") for name, regex in regexes.items()}
    return {**found, **{name: read_constraint(None, "", grammar) for name, grammar in grammars.items()}}


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler(Letters(120), 120, [EOS])
    compiler.start(Constraint(kind="regex", text="a"), 1)
    yield compiler
    compiler.close()


def longest_gap(compiler: Compiler, constraint: Constraint) -> float:
    """The longest that another thread was kept from running while a constraint is read and followed for a while."""
    gaps: list[float] = []
    ends = threading.Event()

    def beat() -> None:
        last = time.perf_counter()
        while not ends.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    matcher = None
    try:
        (matcher,) = compiler.start(constraint, 1)
        chance = random.Random(0)
        letters = [i for i in range(3, 120) if Letters(120).token_bytes(i).decode().isascii()]
        for _ in range(40):
            ids = [i for i in letters if matcher.mask[i // 8] >> (i % 8) & 1]
            if matcher.is_complete or not ids:
                break
            matcher.accept(chance.choice(ids))
            matcher.find_mask()
    except InputError:
        pass
    finally:
        del matcher
        ends.set()
        thread.join()
    return max(gaps)


@pytest.mark.parametrize("name", hostile())
@pytest.mark.fast_rows(4)
def test_a_hostile_constraint_holds_up_no_other_thread(compiler, name):
    begun = time.monotonic()
    gaps = (longest_gap(compiler, hostile()[name]) for _ in range(TRIES))
    assert any(gap < MOST_S for gap in gaps)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_noise_is_an_answer_or_an_error(compiler, seed):
    """Random characters, and damaged constraints that were whole, of each kind."""
    chance = random.Random(seed)
    whole = list(hostile().values())
    for _ in range(60):
        one = chance.choice(whole)
        letters = list(one.text[:2000])
        for _ in range(chance.randint(1, 6)):
            letters[chance.randrange(len(letters))] = chance.choice(string.printable + "é🦙\ud7ff")
        noise = "".join(chance.choice('(){}[]|*+?\\.^$"ab:,/<>%\n ') for _ in range(chance.randint(1, 80)))
        for kind in ("regex", "grammar", "json_schema"):
            text = chance.choice(["".join(letters), noise])
            assert read_or_refuse(compiler, Constraint(kind=kind, text=text)).startswith((kind, "the constraint"))


def read_or_refuse(compiler: Compiler, constraint: Constraint) -> str:
    """What it is refused with, the kind alone where it is not."""
    try:
        compiler.start(constraint, 1)
    except InputError as error:
        return str(error)
    return constraint.kind


def test_the_module_of_the_process_imports_no_model_code():
    """It starts in a fraction of a second, and again for each constraint that ends it."""
    source = Path(trial.__file__).read_text()
    assert "torch" not in source
    assert "numpy" not in source
