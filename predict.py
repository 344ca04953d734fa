"""The Cog predictor: inputs -> request -> engine -> text. No model code here.

`run` is a coroutine that returns a generator: of the forms Cog 0.23 knows, this one alone streams each piece at once,
runs many predictions side by side, and can be cancelled.
"""

import asyncio
import contextvars
import logging
import os
import sys
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Iterator  # noqa: UP035  the name as Cog's documentation has it

from cog import BaseRunner, CancelationException, Input, concurrent, streaming

from alpaca import cpu_threads

cpu_threads.set_defaults()  # before anything below imports torch

from alpaca.errors import AlpacaError
from alpaca.files.places import open_weights
from alpaca.processes import end_with_parent, process_age_s
from alpaca.serving.housekeeping import Phases, PredictionFolders

if TYPE_CHECKING:
    from alpaca.serving.detokenize import CompletionText
    from alpaca.serving.engine import Generation
    from alpaca.serving.request import PredictionInputs


class Predictor(BaseRunner):
    """Answers instructions with a LLaMA, or another causal language model of transformers."""

    def setup(self, weights: str | None = None) -> None:
        """Load the model: the folder or archive COG_WEIGHTS names, else alpaca_out."""
        phases = Phases(before_s=process_age_s())
        end_with_parent()
        from alpaca.serving.engine import Engine
        from alpaca.serving.loading import load_engine
        from alpaca.serving.settings import ServerSettings

        phases.end("start and imports")
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        settings = ServerSettings.from_environment(os.environ)
        self.engine: Engine = load_engine(open_weights(str(weights) if weights else None), settings, phases)
        self.folders = PredictionFolders()
        self.folders.keep_swept()
        logging.info("ready: %s", phases)

    def healthcheck(self) -> bool:
        """Whether the engine can still answer."""
        return self.engine.is_healthy()

    @concurrent(max=64)
    @streaming
    async def run(
        self,
        prompt: str = Input(default="", description="The instruction, or the whole text where prompt_template is {prompt}; give this or messages"),
        input: str = Input(default="", description="Context for the instruction; not empty selects the template with an input"),
        prompt_template: str = Input(default="auto", description="auto: what the model was trained with; alpaca, or a text that holds {prompt} and optionally {input}; {prompt} alone sends the text as it is"),
        messages: list[dict] = Input(default=[], description="A conversation in place of a prompt: objects with a role (system, user, assistant) and a content, for the model's own chat template"),
        n: int = Input(default=1, ge=1, le=5, description="Number of completions"),
        max_new_tokens: int = Input(default=256, ge=0, description="Most tokens to generate, cut to the context that is left; 0 goes with echo alone"),
        min_new_tokens: int = Input(default=0, ge=0, description="The answer does not end before this many tokens"),
        total_tokens: int | None = Input(default=None, ge=1, description="Most tokens of prompt and answer together; when given, the smaller limit of the two holds"),
        temperature: float = Input(default=0.75, ge=0, le=5, description="Randomness of the sampling; 0 always takes the most likely token"),
        top_p: float = Input(default=1.0, ge=0.01, le=1, description="Sample from the most likely tokens that together reach this probability"),
        top_k: int = Input(default=0, ge=0, description="Sample from this many most likely tokens; 0 is off"),
        min_p: float = Input(default=0.0, ge=0, le=1, description="Leave out tokens less likely than this share of the most likely one; 0 is off"),
        repetition_penalty: float = Input(default=1.0, ge=0.01, le=5, description="Above 1, tokens that occurred before, in the prompt too, become less likely"),
        presence_penalty: float = Input(default=0.0, ge=-2, le=2, description="Taken from the score of each token that was generated before"),
        frequency_penalty: float = Input(default=0.0, ge=-2, le=2, description="Taken from a token's score once for each time it was generated"),
        stop: list[str] = Input(default=[], description="Texts that end the answer; they are not part of it"),
        seed: int | None = Input(default=None, ge=0, description="Repeats a random answer; drawn and reported in the metrics when absent"),
        num_beams: int = Input(default=1, ge=1, le=8, description="Above 1: beam search, without sampling"),
        stream: bool = Input(default=False, description="Send the pieces of one completion as they come; needs n = 1 and num_beams = 1"),
        details: bool = Input(default=False, description="Each item of the output is a JSON document: the text, why it ended, counts and the seed"),
        logprobs: int | None = Input(default=None, ge=0, le=20, description="Log-probability of each token, and of this many most likely ones in its place; needs details"),
        echo: bool = Input(default=False, description="Log-probabilities of the prompt's tokens; needs details"),
        json_schema: dict | None = Input(default=None, description="The answer is JSON that this JSON schema allows"),
        regex: str = Input(default="", description="The answer is a text that this regular expression matches as a whole"),
        grammar: str = Input(default="", description="The answer follows this grammar, in llguidance's form of Lark's; give one of the three at most"),
        replicate_weights: str | None = Input(default=None, description="Name of an adapter that the server was started with; none is the base model without any; absent is the server's default"),
        max_length: int | None = Input(default=None, deprecated=True, description="No input of this model and not used: give max_new_tokens, or total_tokens for prompt and answer together"),
        max_tokens: int | None = Input(default=None, deprecated=True, description="No input of this model and not used: give max_new_tokens"),
    ) -> Iterator[str]:  # fmt: skip
        """Completions, one item each; or with `stream` the pieces of one."""
        values = {name: value for name, value in locals().items() if name != "self"}
        call = _Call(_slot_future())
        return _in_context(self._answer(values, call))

    def _answer(self, values: dict[str, object], call: "_Call") -> Generator[str, None, None]:
        try:
            with self.folders.running():
                yield from self._generate(values, call)
        except AlpacaError as error:
            print(f"refused: {error}")
            raise
        except CancelationException:
            raise
        except Exception:
            traceback.print_exc(file=sys.stdout)  # the runtime reports the message alone
            raise

    def _generate(self, values: dict[str, object], call: "_Call") -> Generator[str, None, None]:
        from alpaca.serving.detokenize import CompletionText
        from alpaca.serving.engine import GenerationCancelledError
        from alpaca.serving.request import PredictionInputs, describe_unused, make_request

        inputs = PredictionInputs.from_mapping(values)
        for text in describe_unused(inputs):
            print(f"warning: {text}")
        request = make_request(
            inputs, self.engine.tokenizer, max_context=self.engine.max_context, adapters=self.engine.adapters
        )
        texts = [
            CompletionText(
                self.engine.tokenizer,
                request.prompt_ids,
                stop=inputs.stop,
                strip_leading=request.strips_leading,
            )
            for _ in range(request.n)
        ]
        generation = self.engine.submit(request)
        call.when_cancelled(generation.cancel)
        try:
            yield from self._items(inputs, generation, texts)
        except GenerationCancelledError:
            self._record(generation)  # what was computed until then is paid for, too
            raise CancelationException from None
        finally:
            generation.cancel()  # no effect once it has ended; stops it when the runtime drops this generator
        metrics = self._record(generation)
        line = "{output_tokens} tokens after {prompt_tokens}, {tokens_per_second:.1f} tokens/s, seed {seed}"
        print(line.format(**metrics) + (f", adapter {request.adapter}" if request.adapter else ""))

    def _items(
        self, inputs: "PredictionInputs", generation: "Generation", texts: list["CompletionText"]
    ) -> Iterator[str]:
        """The items of the output: texts or documents, of whole completions or of the pieces of one."""
        from alpaca.serving.details import complete_details, stream_details
        from alpaca.serving.engine import complete_texts, stream_text

        if inputs.details:
            tokenizer = self.engine.tokenizer
            if inputs.stream:
                return stream_details(generation, texts[0], tokenizer)
            return complete_details(generation, texts, tokenizer)
        return stream_text(generation, texts[0]) if inputs.stream else complete_texts(generation, texts)

    def _record(self, generation: "Generation") -> dict[str, int | float | str | list[str]]:
        """Give the runtime the prediction's figures; returns them."""
        metrics = generation.metrics()
        for name, value in metrics.items():
            self.record_metric(name, value)
        if generation.request.adapter:
            self.record_metric("adapter", generation.request.adapter)
        return metrics


# Cancellation and context, which Cog 0.23 does not handle for a coroutine that returns a generator -------------


class _Call:
    """Passes a prediction's cancellation to the engine: Cog cancels the future of the slot that runs the prediction."""

    def __init__(self, future: Future | None) -> None:
        self._cancelled = False
        self._action: Callable[[], None] = lambda: None
        if future is not None:
            future.cancel = self._cancel

    def when_cancelled(self, action: Callable[[], None]) -> None:
        """Call `action` when the prediction is cancelled, at once if it was already."""
        self._action = action
        if self._cancelled:
            action()

    def _cancel(self) -> bool:
        self._cancelled = True
        self._action()
        return True


_said_no_hook = False


def _slot_future() -> Future | None:
    """The future on which the runtime calls `cancel` for this prediction. If there is none: None, and a warning, once.

    asyncio.run_coroutine_threadsafe chains the running task to that future by a callback, whose closure holds it.
    """
    for callback, _ in getattr(asyncio.current_task(), "_callbacks", None) or ():
        for cell in getattr(callback, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Future):
                return cell.cell_contents
    global _said_no_hook
    if not _said_no_hook:
        _said_no_hook = True
        logging.getLogger(__name__).warning(
            "this Cog version gives no hook for cancellation: predictions run to their end"
        )
    return None


def _in_context(pieces: Generator[str, None, None]) -> Generator[str, None, None]:
    """Run a generator in the prediction's context, so that what it prints and records belongs to this prediction."""
    context, end = contextvars.copy_context(), object()

    def iterate() -> Generator[str, None, None]:
        try:
            while (piece := context.run(next, pieces, end)) is not end:
                yield piece
        finally:
            context.run(pieces.close)

    return iterate()
