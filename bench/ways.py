"""The ways of generating that bench.serve holds against each other, one class each: work in, a Sample out.

None of them waits for ever: what makes no progress for STUCK_S seconds ends in StuckError.
"""

import contextlib
import dataclasses
import math
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from alpaca.serving.engine import Engine, Generation, GenerationCancelledError, TokenEvent
from alpaca.serving.request import NO_ADAPTERS, AdapterNames, PredictionInputs, Request, make_request
from alpaca.text.tokenizer import Tokenizer
from bench.load import Load, Plan, run_apart
from bench.machine import DEVICE
from bench.random_model import CONTEXT
from bench.rows import Row, Sample

STUCK_S = 120.0
_CLIENTS_TIMEOUT_S = 300
_BLOCK_TOKENS = 256  # of transformers' continuous batching: its own default

T = TypeVar("T")


class StuckError(RuntimeError):
    """What was waited for made no progress; whoever asks again would wait as long."""


class Way(ABC):
    """One way of generating, loaded and ready."""

    @abstractmethod
    def run(self, row: Row, inputs: list[PredictionInputs]) -> Sample:
        """Do a row's work once. Raises StuckError, and whatever the way fails with."""


class GenerateWay(Way):
    """transformers' `generate`: greedy, one prompt after the other; for the way "compiled" with a static cache."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer

    def run(self, row: Row, inputs: list[PredictionInputs]) -> Sample:
        requests = make_requests(inputs, self._tokenizer)
        start = time.perf_counter()
        num_tokens = sum(len(self.generate_ids(request, compiled=row.way == "compiled")) for request in requests)
        return Sample(seconds=time.perf_counter() - start, num_tokens=num_tokens)

    @torch.inference_mode()
    def generate_ids(self, request: Request, *, compiled: bool = False) -> list[int]:
        prompt = torch.tensor([request.prompt_ids], device=self._model.device)
        changes = {"cache_implementation": "static", "compile_config": CompileConfig()} if compiled else {}
        settings = GenerationConfig(max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0, **changes)
        whole = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        return whole[0, prompt.shape[1] :].tolist()


class BatchingWay(Way):
    """transformers' continuous batching, greedy, started and warm before the clock runs."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer

    def run(self, row: Row, inputs: list[PredictionInputs]) -> Sample:
        requests = make_requests(inputs, self._tokenizer)
        settings = GenerationConfig(max_new_tokens=row.new_tokens[1], do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self._model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=_batching_sizes(row), timeout=STUCK_S
        ) as manager:
            _drain_batching(manager, requests[:1], max_new_tokens=2)
            start = time.perf_counter()
            num_tokens = _drain_batching(manager, requests, max_new_tokens=row.new_tokens[1])
            seconds = time.perf_counter() - start
        return Sample(seconds=seconds, num_tokens=num_tokens)


def _batching_sizes(row: Row) -> ContinuousBatchingConfig:
    """Sizes that are left out take all memory there is."""
    blocks_each = math.ceil((row.prompt_tokens[1] + row.new_tokens[1]) / _BLOCK_TOKENS)
    return ContinuousBatchingConfig(
        block_size=_BLOCK_TOKENS,
        num_blocks=max(16, math.ceil(1.1 * row.clients * blocks_each)),
        max_batch_tokens=2048 if DEVICE == "cuda" else 512,
    )


def _drain_batching(manager, requests: list[Request], *, max_new_tokens: int) -> int:
    """Add the requests and wait for all; the number of tokens that came."""
    manager.add_requests([list(request.prompt_ids) for request in requests], max_new_tokens=max_new_tokens)
    num_finished = num_tokens = 0
    deadline = time.monotonic() + STUCK_S
    while num_finished < len(requests):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("continuous batching ended by itself")
            if time.monotonic() > deadline:
                raise StuckError(f"continuous batching finished no request for {STUCK_S:g} s")
        elif result.error is not None:
            raise RuntimeError(f"continuous batching failed: {result.error}")
        elif result.is_finished():
            num_finished += 1
            num_tokens += len(result.generated_tokens)
            deadline = time.monotonic() + STUCK_S
    return num_tokens


class EngineWay(Way):
    """This project's engine without Cog: all requests at once or staggered, or with one client one after the other.

    One thread reads: any more would only take its turns.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, row: Row, inputs: list[PredictionInputs]) -> Sample:
        requests = make_requests(inputs, self._engine.tokenizer, self._engine.adapters)
        groups = [requests] if row.clients > 1 else [[request] for request in requests]
        start = time.perf_counter()
        generations = [generation for group in groups for generation in self._finish(group, stagger_s=row.stagger_s)]
        seconds = time.perf_counter() - start
        metrics = [generation.metrics() for generation in generations]
        return Sample(
            seconds=seconds,
            num_tokens=sum(int(values["output_tokens"]) for values in metrics),
            first_token_s=[values["time_to_first_token_s"] for values in metrics],
            cached_tokens=sum(int(values["cached_tokens"]) for values in metrics),
        )

    def _finish(self, requests: list[Request], *, stagger_s: float) -> list[Generation]:
        """All answers; the n-th request is submitted `n * stagger_s` after the first, whatever the others do."""
        start, generations = time.perf_counter(), []
        for number, request in enumerate(requests):
            time.sleep(max(0.0, start + number * stagger_s - time.perf_counter()))
            generations.append(self._engine.submit(request))
        with cancelled_when_stuck(generations):
            for generation in generations:
                for _ in generation.events():
                    pass
        return generations

    def generate_ids(self, request: Request) -> list[int]:
        generation = self._engine.submit(request)
        with cancelled_when_stuck([generation]):
            return [event.token_id for event in generation.events() if isinstance(event, TokenEvent)]


@contextlib.contextmanager
def cancelled_when_stuck(generations: list[Generation]) -> Iterator[None]:
    """Raise StuckError in a block that reads generations of which none gets a token for STUCK_S.

    Cancelling wakes a reader whatever the engine's thread does, and costs the reading thread nothing meanwhile.
    """
    has_ended = threading.Event()
    threading.Thread(target=_cancel_when_stuck, name="watch-engine", args=(generations, has_ended), daemon=True).start()
    try:
        yield
    except GenerationCancelledError:
        raise StuckError(f"the engine made no token for {STUCK_S:g} s") from None
    finally:
        has_ended.set()


def _cancel_when_stuck(generations: list[Generation], has_ended: threading.Event) -> None:
    before = 0
    while not has_ended.wait(STUCK_S):
        now = sum(int(generation.metrics()["output_tokens"]) for generation in generations)
        if now == before:
            for generation in generations:
                generation.cancel()
            return
        before = now


class ServerWay(Way):
    """The same engine behind the real server, over HTTP; the clients have a process of their own (bench.load).

    A client sees its first token when it comes; without a stream the server's word is taken.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def run(self, row: Row, inputs: list[PredictionInputs]) -> Sample:
        asked = [
            {name: value for name, value in dataclasses.asdict(values).items() if value is not None and name != "stop"}
            for values in inputs
        ]
        plan = Plan(inputs=asked, clients=row.clients, stream=row.way == "stream", stagger_s=row.stagger_s)
        load = self._run_clients(plan)
        return Sample(
            seconds=load.seconds,
            num_tokens=load.num_tokens,
            first_token_s=[reply.first_output_s or reply.metrics["time_to_first_token_s"] for reply in load.replies],
            cached_tokens=sum(int(reply.metrics["cached_tokens"]) for reply in load.replies),
            num_retries=sum(reply.num_retries for reply in load.replies),
        )

    def _run_clients(self, plan: Plan) -> Load:
        try:
            return run_apart(self._url, plan, timeout_s=_CLIENTS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise StuckError(f"the server did not answer all within {_CLIENTS_TIMEOUT_S} s") from None


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map={"": DEVICE}, local_files_only=True
    ).eval()


def make_requests(
    inputs: list[PredictionInputs], tokenizer: Tokenizer, adapters: AdapterNames = NO_ADAPTERS
) -> list[Request]:
    return [make_request(values, tokenizer, max_context=CONTEXT, adapters=adapters) for values in inputs]


def call_within(limit_s: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; StuckError after `limit_s`, its thread being left to itself."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(limit_s)
    except FutureTimeoutError:
        raise StuckError(f"the engine was not done after {limit_s:g} s") from None
