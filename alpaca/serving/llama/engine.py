"""The engine for LLaMA models, with continuous batching. One thread owns the device and repeats three stages:

    schedule   which tokens of which sequences            scheduler.py
    run        the network over them, and sample          runner.py
    publish    hand the new tokens on, end what has ended

On a GPU step n + 1 is scheduled and launched while the device still computes step n.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from alpaca.errors import EngineClosed, InputError, NumbersOverflow, PromptTooLong
from alpaca.serving.engine import Engine, Generation, TokenScore, is_device_lost
from alpaca.serving.llama.runner import Runner
from alpaca.serving.llama.sampling import SamplingState, not_finite, require_finite
from alpaca.serving.llama.scheduler import ScheduledSequence, Scheduler, Sequence
from alpaca.serving.llama.step import PendingStep, StepScores
from alpaca.serving.request import NO_ADAPTERS, AdapterNames, Request
from alpaca.serving.structured.compiling import Compiler
from alpaca.serving.structured.masks import MaskFinder
from alpaca.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 10.0
_IDLE_WAIT_S = 1.0
# Waking a reader and sending its piece through Cog costs about 0.1 ms of a core. Between two pieces a reader therefore
# waits for this long times the running sequences, so that handing pieces on takes a small share of the time.
_PIECE_INTERVAL_S = 0.0015


@dataclass(frozen=True)
class RunningCompletion:
    """The completion that a sequence computes: completion number `index` of a generation, and how it is sampled."""

    generation: Generation
    index: int
    sampling: SamplingState


class LlamaEngine(Engine):
    """Answers many requests at once with one LLaMA.

    beams: makes the engine for beam search, when a request first needs it.
    launches_ahead: whether a step is launched before the tokens of the step before it are read.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        max_context: int,
        beams: Callable[[], Engine],
        launches_ahead: bool,
        adapters: AdapterNames = NO_ADAPTERS,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.adapters = adapters
        self._runner = runner
        self._scheduler = scheduler
        self._beams = _LazyEngine(beams)
        self._launches_ahead = launches_ahead
        names = runner.model.adapters.names if runner.model.adapters else ()
        self._adapter_indices = {name: index for index, name in enumerate((None, *names))}
        self._arrivals: SimpleQueue[Generation | None] = SimpleQueue()
        self._sequences: dict[Generation, list[Sequence]] = {}  # of each generation those that have not ended
        self._in_flight: PendingStep | None = None
        self._has_work = False  # whether the last turn found anything to compute
        self._throughput = _ThroughputLog()
        self._compiler = Compiler(tokenizer, runner.vocab_size, runner.eos_ids)
        self._masks: MaskFinder[Sequence] = MaskFinder()
        self._is_closed = False
        self._lost: BaseException | None = None
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="llama-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Generation:
        if request.num_beams > 1:
            self._require_open()
            logger.info("num_beams %d: beam search, by the transformers engine", request.num_beams)
            return self._beams.get().submit(request)
        self._check(request)
        follows = request.constraint is not None and request.max_new_tokens > 0
        generation = Generation(request, self._compiler.start(request.constraint, request.n) if follows else ())
        with self._closing:
            self._require_open()
            self._arrivals.put(generation)
        return generation

    def _require_open(self) -> None:
        if self._is_closed or self._lost is not None:
            raise EngineClosed(f"the engine takes no requests: {self._lost or 'it is shut down'}")

    def prepare(self) -> None:
        self._compiler.prepare()

    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._lost is None and not self._is_closed

    def close(self) -> None:
        with self._closing:
            self._is_closed = True
            self._arrivals.put(None)
        self._thread.join()
        self._beams.close()
        self._masks.close()
        self._compiler.close()

    def _check(self, request: Request) -> None:
        """Refuse a request that could never run. Raises InputError, PromptTooLong."""
        if request.adapter not in self._adapter_indices:
            raise InputError(f"this engine has no adapter {request.adapter!r}")
        num_rows = self._runner.vocab_size if request.echo else self._runner.model.config.vocab_size
        outside = [token_id for token_id in request.prompt_ids if not 0 <= token_id < num_rows]
        if outside:
            raise InputError(f"token id {outside[0]} is outside of the model's {num_rows} rows")
        length = len(request.prompt_ids) + (request.max_new_tokens or -request.only_scores)
        if length > self.max_context or not self._scheduler.fits(_num_positions(request)):
            raise PromptTooLong(
                f"prompt ({len(request.prompt_ids)} tokens) and answer (up to {request.max_new_tokens}) need {length} "
                f"tokens; this server has room for {self.max_context}: shorten them or give the server more memory"
            )

    # The engine's thread

    def _serve(self) -> None:
        try:
            while not self._is_closed and self._lost is None:
                self._step()
        except Exception as error:  # a bug; its readers must not wait for ever
            logger.exception("the engine's thread failed")
            with self._closing:
                self._lost = error
        self._fail_all(EngineClosed(f"the engine stopped: {self._lost or 'it was shut down'}"))

    def _step(self) -> None:
        self._take_arrivals()
        self._drop_cancelled()
        self._collect_masks()
        scheduled = self._scheduler.schedule()
        pending = self._launch(scheduled)
        self._has_work = bool(scheduled) or self._in_flight is not None
        if self._launches_ahead:
            pending, self._in_flight = self._in_flight, pending
        if pending is not None:
            self._publish(pending)
        self._throughput.write_if_due(self._scheduler)

    def _take_arrivals(self) -> None:
        """Queue the requests that were submitted. Wait for one, for a while, when there is nothing else to do."""
        is_idle = not self._sequences and self._in_flight is None
        try:
            while True:
                generation = self._arrivals.get(timeout=_IDLE_WAIT_S) if is_idle else self._arrivals.get_nowait()
                is_idle = False
                if generation is not None:
                    self._enqueue(generation)
        except Empty:
            pass

    def _enqueue(self, generation: Generation) -> None:
        request = generation.request
        sequences = self._sequences[generation] = []
        for index in range(1 if request.only_scores else request.n):
            matcher = generation.matchers[index] if generation.matchers else None
            sampling = SamplingState(request, index, eos_ids=self._runner.eos_ids, matcher=matcher)
            sequence = Sequence(
                request.prompt_ids,
                max_new_tokens=_num_positions(request) - len(request.prompt_ids),
                adapter_index=self._adapter_indices[request.adapter],
                long_from=self._runner.model.config.rope.long_from,
                shares_prompt_with=sequences[0] if sequences else None,
                scores_from=request.scored_from if request.echo and index == 0 else None,
                completion=RunningCompletion(generation, index, sampling),
            )
            sequences.append(sequence)
            self._scheduler.add(sequence)

    def _drop_cancelled(self) -> None:
        for generation in [generation for generation in self._sequences if generation.is_cancelled]:
            self._drop(generation)

    def _drop(self, generation: Generation) -> None:
        for sequence in self._sequences.pop(generation, []):
            self._masks.forget(sequence)
            self._scheduler.finish(sequence)

    def _collect_masks(self) -> None:
        """Let the completions go on whose masks are there."""
        for sequence, error in self._masks.collect(has_work=self._has_work):
            completion: RunningCompletion = sequence.completion
            if error is not None:
                self._fail(completion.generation, error)
            elif completion.sampling.matcher.is_complete:
                completion.generation.finish(completion.index, at_limit=False)
                self._end(sequence, completion.generation)
            else:
                sequence.is_held = False

    # Run

    def _launch(self, scheduled: list[ScheduledSequence]) -> PendingStep | None:
        if not scheduled:
            return None
        for item in scheduled:
            if item.sequence.num_admissions == 1 and item.start == item.sequence.num_cached:
                self._record_start(item.sequence)
        try:
            pending = self._runner.launch(scheduled)
        except Exception as error:
            return self._launch_one_by_one(scheduled, error)
        self._record_launch(scheduled)
        return pending

    def _record_launch(self, scheduled: list[ScheduledSequence]) -> None:
        """Count a step's tokens. What follows a constraint is not scheduled again before its new token is known."""
        self._scheduler.record_launch(scheduled)
        for item in scheduled:
            if item.samples_token and item.sequence.completion.sampling.matcher is not None:
                item.sequence.is_held = True

    def _record_start(self, sequence: Sequence) -> None:
        completion: RunningCompletion = sequence.completion
        if completion.index == 0:
            completion.generation.cached_tokens = sequence.num_cached
            completion.generation.start()

    def _launch_one_by_one(self, scheduled: list[ScheduledSequence], error: Exception) -> None:
        """Run each sequence of a failed step alone, so that only the requests fail that cannot be computed."""
        logger.exception("a step of %d sequences failed", len(scheduled))
        self._handle_device_error(error)
        if self._in_flight is not None:
            self._publish(self._in_flight)  # its tokens come before those of this step
            self._in_flight = None
        for item in scheduled:
            if self._lost is not None or item.sequence.is_finished:
                continue
            try:
                if len(scheduled) == 1:
                    raise error
                pending = self._runner.launch([item])
                self._record_launch([item])
                self._publish(pending)
            except Exception as own_error:
                self._handle_device_error(own_error)
                self._fail(item.sequence.completion.generation, own_error)

    def _handle_device_error(self, error: Exception) -> None:
        """Stop the engine if the device is lost for this process. After any other error, free unused device memory."""
        if is_device_lost(error):
            with self._closing:
                self._lost = error
        elif torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fail(self, generation: Generation, error: Exception) -> None:
        self._drop(generation)
        generation.fail(error)

    def _fail_all(self, error: Exception) -> None:
        for generation in list(self._sequences):
            generation.fail(error)
        while not self._arrivals.empty():
            if (generation := self._arrivals.get()) is not None:
                generation.fail(error)

    # Publish

    def _publish(self, pending: PendingStep) -> None:
        """Wait for a step's tokens and hand them on to their readers."""
        try:
            ids = pending.wait()
        except Exception as error:
            logger.exception("a step failed on the device")
            self._handle_device_error(error)
            for item in pending.scheduled:
                self._fail(item.sequence.completion.generation, error)
            return
        scores = pending.scores.read_rows() if pending.scores else {}
        if pending.scores:
            self._hand_on_prompt_scores(pending.scores)
        self._end_scored(pending.scheduled)
        for row, (item, token_id) in enumerate(zip(pending.sampled, ids, strict=True)):
            if not item.sequence.is_finished:
                self._scheduler.append_token(item.sequence, token_id)
                self._advance(item.sequence, token_id, scores.get(row))
        self._throughput.num_tokens += len(ids)
        interval_s = _PIECE_INTERVAL_S * len(self._scheduler.running)
        for generation in list(self._sequences):
            generation.flush(interval_s=interval_s)

    def _hand_on_prompt_scores(self, scores: StepScores) -> None:
        for item, found in scores.read_prompts():
            generation = item.sequence.completion.generation
            if any(math.isnan(score.logprob) for score in found):
                self._fail(generation, not_finite())
            generation.prompt_scores += found

    def _end_scored(self, scheduled: list[ScheduledSequence]) -> None:
        """End the sequences of which only scores were wanted, once a step has come to their last ones."""
        for item in scheduled:
            generation = item.sequence.completion.generation
            is_last = item.start + item.num_tokens == len(item.sequence) - 1
            if generation.request.only_scores and is_last and not item.sequence.is_finished:
                for index in range(generation.request.n):
                    generation.finish(index, at_limit=True)
                self._end(item.sequence, generation)

    def _advance(self, sequence: Sequence, token_id: int, score: TokenScore | None) -> None:
        """Give a completion its next token, and end it if that was the last."""
        completion: RunningCompletion = sequence.completion
        generation = completion.generation
        try:
            require_finite(token_id)
        except NumbersOverflow as error:
            self._fail(generation, error)
            return
        is_wanted = generation.request.max_new_tokens > 0
        has_ended = is_wanted and (token_id in self._runner.eos_ids or generation.is_stopped(completion.index))
        if is_wanted and not has_ended:
            generation.put_token(completion.index, token_id, score)
            has_ended = self._is_completed_by(sequence, token_id)
        if has_ended or len(sequence.token_ids) - sequence.num_prompt_tokens == sequence.max_new_tokens:
            generation.finish(completion.index, at_limit=not has_ended)
            self._end(sequence, generation)

    def _is_completed_by(self, sequence: Sequence, token_id: int) -> bool:
        """Take a token into account that a constraint may be complete with; else begin to find what may follow."""
        matcher = sequence.completion.sampling.matcher
        if matcher is None:
            return False
        matcher.accept(token_id)
        if matcher.is_complete:
            return True
        if sequence.num_generated < sequence.max_new_tokens:
            self._masks.want(sequence, matcher)
        return False

    def _end(self, sequence: Sequence, generation: Generation) -> None:
        self._scheduler.finish(sequence)
        self._sequences[generation].remove(sequence)
        if not self._sequences[generation]:
            del self._sequences[generation]
            generation.flush()


def _num_positions(request: Request) -> int:
    """Tokens that a sequence of the request may come to: one that nobody gets where no token and no score is wanted."""
    return len(request.prompt_ids) + (0 if request.only_scores else max(request.max_new_tokens, 1))


class _LazyEngine:
    """Holds an engine that is made when it is first needed."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._engine: Engine | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def get(self) -> Engine:
        with self._lock:
            if self._is_closed:
                raise EngineClosed("the engine takes no requests: it is shut down")
            if self._engine is None:
                self._engine = self._make()
            return self._engine

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._engine is not None:
                self._engine.close()


class _ThroughputLog:
    """Writes a line into the log every ten seconds while tokens are generated."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._since = time.monotonic()

    def write_if_due(self, scheduler: Scheduler) -> None:
        now = time.monotonic()
        seconds = now - self._since
        if seconds < _LOG_INTERVAL_S:
            return
        if self.num_tokens:
            logger.info(
                "engine: running %d, waiting %d, blocks used %d of %d, %.1f tokens/s",
                len(scheduler.running), len(scheduler.waiting), scheduler.pool.num_used, scheduler.pool.capacity,
                self.num_tokens / seconds,
            )  # fmt: skip
        self.num_tokens, self._since = 0, now
