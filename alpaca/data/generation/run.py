"""One run of instruction generation: requests completions ahead of need, judges and keeps them, ends in time."""

import queue
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from alpaca.data.example import Example
from alpaca.data.generation.journal import Journal
from alpaca.data.generation.prompts import (
    NUM_TASKS,
    STOP,
    Candidate,
    find_fault,
    make_prompt,
    parse_completion,
    strip_repeated_label,
)
from alpaca.data.generation.requests import Budget, BudgetSpent, Patience, Requester, Stopped, utc_now
from alpaca.data.generation.services import Client, Completion
from alpaca.data.generation.similarity import InstructionPool, Similarity
from alpaca.errors import ServiceFailed

MAX_SIMILARITY = 0.7  # ROUGE-L F; the original's
TOO_SIMILAR = "too similar"
_BACKLOG = 4  # batches that may wait for an answer to an earlier prompt
_GRACE_S = 5.0  # for answers under way when a signal comes
_WRITE_EVERY_S, _LOG_EVERY_S = 300.0, 30.0


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to generate; the flags of the command."""

    output_dir: Path
    num_instructions_to_generate: int
    model_name: str
    seed_tasks_path: Path
    num_prompt_instructions: int
    request_batch_size: int
    temperature: float
    top_p: float
    num_cpus: int | None
    endpoint: str | None
    api: str
    max_tokens: int
    seed: int
    max_requests: int | None
    max_tokens_total: int | None
    price_in: float | None
    price_out: float | None
    timeout_s: float
    max_attempts: int
    max_fruitless: int
    original_filters: bool
    dry_run: bool


# The run --------------------------------------------------------------------------------------------------------


class SignalReceived(Exception):
    """SIGINT or SIGTERM came."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


Ending = ServiceFailed | BudgetSpent | SignalReceived | None


class Generation:
    """One run: asks ahead of need, judges answers in the order of their prompts, and keeps each at once.

    That order makes the data depend on the answers alone and not on which came first.
    """

    def __init__(self, config: GenerationConfig, tasks: list[Example], client: Client, journal: Journal) -> None:
        self._config, self._tasks, self._client, self._journal = config, tasks, client, journal
        accepted = [accepted.task.instruction for accepted in journal.state.accepted]
        self._pool = InstructionPool([task.instruction for task in tasks] + accepted)
        self._numbers = journal.state.next_prompts()
        self._order: deque[int] = deque()  # prompts that were asked and not judged
        self._num_fruitless = 0
        self._ending: Ending = None
        num_tokens = journal.state.prompt_tokens + journal.state.output_tokens
        budget = Budget(
            max_requests=config.max_requests, max_tokens_total=config.max_tokens_total, num_tokens=num_tokens
        )
        self._requester = Requester(
            client,
            budget,
            max_tokens=config.max_tokens,
            stop=STOP,
            patience=Patience(max_attempts=config.max_attempts),
            say=say,
        )
        self._workers = _Workers(self._ask, num_threads=config.request_batch_size)

    def run(self) -> Ending:
        """Generate until there are enough tasks. Returns the reason for an early end, else None."""
        with _signals_into(self._workers), _Progress(self._config, self._journal) as progress:
            self._judge_waiting()
            while not self._has_enough():
                self._ask_more()
                if not self._workers.num_under_way:
                    break
                self._take_result(self._workers.next_result())
                self._judge_in_order()
                progress.update()
                if isinstance(self._ending, SignalReceived):
                    self._collect_for(_GRACE_S)
                    break
            self._requester.stop()
            self._judge_waiting()
            progress.update()
        return None if self._has_enough() else self._ending

    def _has_enough(self) -> bool:
        return len(self._journal.state.accepted) >= self._config.num_instructions_to_generate

    def _prompt(self, number: int) -> str:
        config = self._config
        shown = config.num_prompt_instructions
        return make_prompt(self._tasks, number=number, num_prompt_instructions=shown, seed=config.seed)

    def _ask(self, number: int) -> Completion:
        return self._requester.ask(self._prompt(number), number=number)

    # Asking -----------------------------------------------------------------------------------------------------

    def _ask_more(self) -> None:
        """Keep as many requests under way as are allowed and still needed."""
        batch = self._config.request_batch_size
        while (
            self._ending is None
            and self._workers.num_under_way < batch
            and len(self._order) < min(batch * _BACKLOG, self._count_needed())
        ):
            number = self._numbers.take()
            self._order.append(number)
            self._workers.submit(number)

    def _count_needed(self) -> int:
        """The number of prompts that the missing tasks need, by the tasks that a prompt has brought so far."""
        state = self._journal.state
        missing = self._config.num_instructions_to_generate - len(state.accepted)
        per_prompt = NUM_TASKS - 1 - self._config.num_prompt_instructions
        if state.num_done:
            per_prompt = max(1, round(sum("prompt" in a.provenance for a in state.accepted) / state.num_done))
        return -(-missing // max(1, per_prompt))

    def _take_result(self, result: "_Result") -> None:
        match result.value:
            case Completion() as completion:
                self._journal.add_completion(
                    result.number,
                    completion,
                    first_number=self._config.num_prompt_instructions + 1,
                    is_chat=self._client.is_chat,
                    endpoint=self._client.endpoint,
                    date=utc_now(),
                )
            case SignalReceived() as ending:
                self._end(ending)
            case ServiceFailed() | BudgetSpent() as ending:
                self._order.remove(result.number)
                self._end(ending)
            case Stopped():
                self._order.remove(result.number)
            case error:
                raise error

    def _end(self, ending: Ending) -> None:
        """Send no more requests. The first reason for the end is kept, unless a signal comes later."""
        if self._ending is None or isinstance(ending, SignalReceived):
            self._ending = ending
        if not isinstance(ending, BudgetSpent):
            self._requester.stop()

    def _collect_for(self, seconds: float) -> None:
        """Wait this long for the requests under way and keep their answers, which have been paid for."""
        deadline = time.monotonic() + seconds
        while self._workers.num_under_way:
            try:
                result = self._workers.next_result(timeout_s=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if isinstance(result.value, SignalReceived):  # a second one: at once
                return
            self._take_result(result)

    # Judging ----------------------------------------------------------------------------------------------------

    def _judge_in_order(self) -> None:
        while self._order and self._order[0] in self._journal.state.waiting and not self._has_enough():
            self._judge(self._order.popleft())

    def _judge_waiting(self) -> None:
        """Judge all waiting answers: those of a killed run, and at the end those that follow a failed prompt."""
        for number in sorted(self._journal.state.waiting):
            if not self._has_enough():
                self._judge(number)

    def _judge(self, number: int) -> None:
        """Take the good blocks of an answer into the data, as far as they are needed."""
        answer = self._journal.state.waiting[number]
        completion, first_number, num_before = answer.completion, answer.first_number, len(self._journal.state.accepted)
        text = completion.text
        if answer.is_chat:
            text = strip_repeated_label(text, first_number=first_number)
        is_cut = completion.finish_reason in ("length", "unknown")
        rejected: Counter[str] = Counter()
        candidates = parse_completion(text, first_number=first_number, is_cut=is_cut)
        for block, candidate in enumerate(candidates[answer.num_judged :], start=answer.num_judged):
            if self._has_enough():
                return
            if reason := self._accept(candidate, number, block, rejected):
                rejected[reason] += 1
            else:
                rejected = Counter()
        self._journal.add_done(number, rejected=rejected)
        self._count_fruitless(len(self._journal.state.accepted) > num_before)

    def _accept(self, candidate: Candidate, number: int, block: int, rejected: Counter[str]) -> str:
        """Keep a block's task, or say why not. rejected: the blocks since the last that was kept."""
        if candidate.task is None:
            return candidate.rejection
        if fault := find_fault(candidate.task, original_filters=self._config.original_filters):
            return fault
        found, similarity = self._pool.judge(candidate.task.instruction, threshold=MAX_SIMILARITY)
        if found or similarity is None:
            return TOO_SIMILAR
        about = self._describe(similarity)
        self._journal.add_record(number, block, candidate.task, similarity=about, rejected=rejected)
        self._pool.add(candidate.task.instruction)
        return ""

    def _describe(self, similarity: Similarity) -> dict[str, object]:
        """Under the original's names."""
        nearest = {self._pool.texts[index]: score for index, score in similarity.nearest}
        return {"most_similar_instructions": nearest, "avg_similarity_score": similarity.mean}

    def _count_fruitless(self, has_brought: bool) -> None:
        self._num_fruitless = 0 if has_brought else self._num_fruitless + 1
        if self._num_fruitless >= self._config.max_fruitless and self._ending is None:
            counts = list_counts(self._journal.state.rejected)
            self._end(
                ServiceFailed(
                    f"{self._num_fruitless} completions in a row brought no new task (rejected so far: {counts}); "
                    "look at their texts in the journal, then try another model or more seed tasks"
                )
            )


# Threads and signals --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Result:
    """The result of a prompt: a completion, or the error."""

    number: int
    value: Completion | BaseException


class _Workers:
    """Threads that ask; they never hold up the end of the program."""

    def __init__(self, ask: Callable[[int], Completion], *, num_threads: int) -> None:
        self.num_under_way = 0
        self._ask = ask
        self._jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()  # this kind may be filled by a signal handler
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, number: int) -> None:
        self.num_under_way += 1
        self._jobs.put(number)

    def next_result(self, *, timeout_s: float | None = None) -> _Result:
        """Wait for one. Raises queue.Empty."""
        result = self._results.get(timeout=timeout_s)
        if not isinstance(result.value, SignalReceived):
            self.num_under_way -= 1
        return result

    def put_signal(self, number: int) -> None:
        self._results.put(_Result(number=-1, value=SignalReceived(number)))

    def _work(self) -> None:
        while True:
            number = self._jobs.get()
            try:
                value: Completion | BaseException = self._ask(number)
            except BaseException as error:
                value = error
            self._results.put(_Result(number=number, value=value))


@contextmanager
def _signals_into(workers: _Workers) -> Iterator[None]:
    """SIGINT and SIGTERM as results in the queue, so that they meet the run between two steps."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: workers.put_signal(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# What a person sees ---------------------------------------------------------------------------------------------


class _Progress:
    """The bar on a terminal, a line now and then in a log; and regen.json from time to time."""

    def __init__(self, config: GenerationConfig, journal: Journal) -> None:
        self._journal = journal
        num_accepted = len(journal.state.accepted)
        total = config.num_instructions_to_generate
        self._bar = tqdm(total=total, initial=num_accepted, desc="generate", unit=" tasks", disable=None, smoothing=0.1)
        self._total, self._shown = total, num_accepted
        self._started, self._start_count = time.monotonic(), num_accepted
        self._written = self._logged = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self) -> None:
        state, now = self._journal.state, time.monotonic()
        self._bar.set_postfix_str(f"rejected: {list_counts(state.rejected)}", refresh=False)
        self._bar.update(len(state.accepted) - self._shown)
        self._shown = len(state.accepted)
        if self._bar.disable and now - self._logged > _LOG_EVERY_S:
            self._logged = now
            say(self._line(now))
        if now - self._written > _WRITE_EVERY_S:
            self._journal.write_data()
            self._written = time.monotonic()

    def _line(self, now: float) -> str:
        rate = (self._shown - self._start_count) / (now - self._started)
        left = f", about {(self._total - self._shown) / rate / 60:.0f} min left" if rate else ""
        counts = list_counts(self._journal.state.rejected)
        return f"{self._shown:,} of {self._total:,} tasks, {60 * rate:.1f} a minute{left}; rejected: {counts}"


def list_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()) or "none"


def say(line: str) -> None:
    """A line for the log, above the bar."""
    tqdm.write(line, file=sys.stderr)
