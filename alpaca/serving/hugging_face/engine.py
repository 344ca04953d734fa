"""The engine for any causal model of transformers (OPT, BLOOM, Mamba …): one request at a time, in order.

The completions of one request run as one batch, in the way of decoding that was found right for the model at start.
Beam search is transformers' own.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from alpaca.architecture.inventory import check_layers
from alpaca.errors import EngineClosed, InputError, MissingInput, NotEnoughSpace
from alpaca.files.reading import list_folder
from alpaca.formats.hf.adapters import AdapterFolder
from alpaca.formats.hf.folder import require_all_weights
from alpaca.formats.hf.loading import load_causal_lm
from alpaca.formats.hf.quantization import allow_any_width_on_cpu
from alpaca.serving.engine import Engine, Generation, TokenScore, is_device_lost
from alpaca.serving.hugging_face.decoding import PREFILL_TOKENS, QUICKEST, Decoder, Way, can_score, read_logits
from alpaca.serving.hugging_face.fitness import check_config, choose_context, count_rows, naming_the_folder
from alpaca.serving.hugging_face.proof import find_way
from alpaca.serving.llama.sampling import SamplingState, commit_tokens, not_finite, require_finite, sample_tokens
from alpaca.serving.request import Request
from alpaca.serving.scoring import score_tokens
from alpaca.serving.served_model import adapter_names, check_tokenizers
from alpaca.serving.settings import ServerSettings
from alpaca.serving.structured.compiling import Compiler
from alpaca.text.eos import read_eos_ids
from alpaca.text.loading import load_tokenizer
from alpaca.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class TransformersEngine(Engine):
    """Runs requests one after the other on a transformers model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        max_context: int,
        eos_ids: frozenset[int] | None = None,
        adapters: Mapping[str, AdapterFolder] = MappingProxyType({}),
        way: Way = QUICKEST,
    ) -> None:
        """Takes the model over and wraps the layers that adapters change. Raises InputError if one does not fit.

        way: how the model may be decoded (`proof.find_way`).
        """
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.adapters = adapter_names(adapters)
        self._use_adapter = _make_switch(model, adapters)
        self._model, self.way = model.eval(), way
        self._eos_ids = eos_ids or frozenset([tokenizer.eos_id])
        self._compiler = Compiler(
            tokenizer, max([tokenizer.size, *(token_id + 1 for token_id in self._eos_ids)]), self._eos_ids
        )
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._lost: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="transformers-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Generation:
        if request.adapter is not None and request.adapter not in self.adapters.named:
            raise InputError(f"this engine has no adapter {request.adapter!r}")
        if request.echo and not can_score(self._model, self.way, len(request.prompt_ids)):
            raise InputError(
                f"this model's prompts are computed whole, so echo takes prompts of up to {PREFILL_TOKENS} tokens; "
                f"found {len(request.prompt_ids)}"
            )
        follows = request.constraint is not None and request.max_new_tokens > 0
        generation = Generation(request, self._compiler.start(request.constraint, request.n) if follows else ())
        with self._changed:
            if self._closed or self._lost is not None:
                raise EngineClosed(f"the engine takes no requests: {self._lost or 'it is shut down'}")
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    def prepare(self) -> None:
        self._compiler.prepare()

    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._lost is None and not self._closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._compiler.close()

    # The engine's thread

    def _serve(self) -> None:
        while (generation := self._next()) is not None:
            if generation.is_cancelled:
                continue
            generation.start()
            try:
                self._run(generation)
                if self._closed:
                    generation.fail(EngineClosed("the engine was shut down"))
            except Exception as error:
                logger.exception("a request failed in the engine")
                generation.fail(error)
                self._check_device(error)
        while self._waiting:
            self._waiting.popleft().fail(EngineClosed(f"the engine stopped: {self._lost or 'it was shut down'}"))

    def _next(self) -> Generation | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed or self._lost is not None)
            return None if self._closed or self._lost is not None else self._waiting.popleft()

    def _check_device(self, error: Exception) -> None:
        """Stop the engine after a CUDA error that leaves the device unusable. Running out of memory does not."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        elif is_device_lost(error):
            with self._changed:
                self._lost = error

    @torch.inference_mode()
    def _run(self, generation: Generation) -> None:
        self._use_adapter(generation.request.adapter)
        if generation.request.num_beams > 1:
            self._beam_search(generation)
            return
        request = generation.request
        prompt = torch.tensor([request.prompt_ids], device=self._model.device)
        if request.echo:
            self._score_prompt(generation, prompt)
            del generation.prompt_scores[: request.scored_from]
        if not request.max_new_tokens:
            for completion in range(request.n):
                generation.finish(completion, at_limit=True)
            generation.flush()
            return
        decoder = self.way.make(self._model)
        logits = decoder.begin(prompt, request.n, lambda: generation.is_cancelled)
        if logits is not None:
            self._decode(generation, decoder, logits)

    def _score_prompt(self, generation: Generation, prompt: torch.Tensor) -> None:
        """Score a prompt [1, T] in a pass of its own, before the one that its answer goes on from."""
        following, num_top = prompt[0, 1:], generation.request.logprobs or 0
        read = prompt[:, :-1] if generation.request.only_scores else prompt  # no logits of the last one are wanted
        for piece in read_logits(self._model, self.way, read):
            if generation.is_cancelled or not len(following):
                return
            rows = torch.arange(min(len(piece), len(following)), device=piece.device)
            logits = piece[:, : self._count_ids(piece)]
            targets, num_tops = following[: len(rows)], [num_top] * len(rows)
            scores = score_tokens(rows, targets, logits.__getitem__, num_top=num_tops).read()
            if any(math.isnan(score.logprob) for score in scores):
                raise not_finite()
            generation.prompt_scores += scores
            following = following[len(rows) :]

    def _count_ids(self, logits: torch.Tensor) -> int:
        """How many of the logits [.., V] are of tokens that can be sampled.

        An embedding may be padded beyond the tokenizer, and a config may name EOS ids that the tokenizer has not.
        """
        return min(logits.shape[-1], max([self.tokenizer.size, *(token_id + 1 for token_id in self._eos_ids)]))

    def _decode(self, generation: Generation, decoder: Decoder, logits: torch.Tensor) -> None:
        """Generate token after token for the completions still running, as one batch."""
        request = generation.request
        vocab_size = self._count_ids(logits)
        matchers = generation.matchers or [None] * request.n
        states = [SamplingState(request, i, eos_ids=self._eos_ids, matcher=matchers[i]) for i in range(request.n)]
        running = list(range(request.n))
        for num_generated in range(1, request.max_new_tokens + 1):
            rows = [states[i] for i in running]
            logits = logits[:, :vocab_size]
            ids = sample_tokens(logits if request.logprobs is None else logits.clone(), rows)
            commit_tokens(rows, ids)
            chosen = ids.tolist()
            for token_id in chosen:
                require_finite(token_id)
            scores = _score(logits, ids, request)
            is_last = num_generated == request.max_new_tokens
            kept = [
                row
                for row in range(len(running))
                if self._publish(generation, running[row], chosen[row], scores[row], is_last)
            ]
            generation.flush()
            if generation.is_cancelled or self._closed or not kept:
                return
            if len(kept) < len(running):
                decoder.keep(kept)
                running, chosen = [running[row] for row in kept], [chosen[row] for row in kept]
            for matcher in generation.matchers and [generation.matchers[i] for i in running]:
                matcher.find_mask()
            logits = decoder.step(torch.tensor(chosen, device=logits.device))

    def _publish(
        self, generation: Generation, completion: int, token_id: int, score: TokenScore | None, is_last: bool
    ) -> bool:
        """Hand on one token. Returns whether its completion goes on."""
        has_ended = token_id in self._eos_ids or generation.is_stopped(completion)
        if not has_ended:
            generation.put_token(completion, token_id, score)
            if generation.matchers:
                generation.matchers[completion].accept(token_id)
                has_ended = generation.matchers[completion].is_complete
        if has_ended or is_last:
            generation.finish(completion, at_limit=not has_ended)
        return not (has_ended or is_last)

    def _beam_search(self, generation: Generation) -> None:
        request = generation.request
        prompt = torch.tensor([request.prompt_ids], device=self._model.device)
        sequences = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=_beam_config(request, sorted(self._eos_ids)),
            use_cache=self.way.copies_rows,  # beams are rows that are copied and dropped
            stopping_criteria=StoppingCriteriaList([_StopWhenCancelled(generation)]),
        )
        for completion, sequence in enumerate(sequences[:, prompt.shape[1] :].tolist()):
            ends = [at for at, token_id in enumerate(sequence) if token_id in self._eos_ids]
            for token_id in sequence[: ends[0] if ends else None]:
                generation.put_token(completion, token_id)
            generation.finish(completion, at_limit=not ends)
        generation.flush()


def _score(logits: torch.Tensor, ids: torch.Tensor, request: Request) -> list[TokenScore | None]:
    """The scores of new tokens [R] by the model's logits [R, V]; None for each where the request wants none."""
    if request.logprobs is None:
        return [None] * len(ids)
    rows = torch.arange(len(ids), device=logits.device)
    return score_tokens(rows, ids, logits.__getitem__, num_top=[request.logprobs] * len(ids)).read()


def _make_switch(model: PreTrainedModel, adapters: Mapping[str, AdapterFolder]) -> Callable[[str | None], None]:
    """A function that makes the model compute with the adapter of a name, or with none."""
    if not adapters:
        return lambda name: None
    from alpaca.serving.hugging_face.peft_adapters import PeftAdapters  # importing PEFT takes a second or two

    return PeftAdapters(model, adapters).use


class _StopWhenCancelled(StoppingCriteria):
    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._generation.is_cancelled, device=input_ids.device)


def _beam_config(request: Request, eos_ids: list[int]) -> GenerationConfig:
    return GenerationConfig(
        num_beams=request.num_beams,
        num_return_sequences=request.n,
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        repetition_penalty=request.repetition_penalty,
        eos_token_id=eos_ids,
        pad_token_id=eos_ids[0],
    )


# Loading ------------------------------------------------------------------------------------------------------


def load_transformers_engine(
    folder: Path, settings: ServerSettings, adapters: Mapping[str, AdapterFolder] = MappingProxyType({})
) -> TransformersEngine:
    """Load a model folder and its adapters onto the GPU, or onto the CPU if there is none.

    Raises the errors of `alpaca.errors`.
    """
    if not (folder / "config.json").is_file():
        raise MissingInput(f"{folder} holds no model: no config.json; found: {list_folder(folder)}")
    start = time.monotonic()
    check_config(folder)
    tokenizer = load_tokenizer(folder)
    check_tokenizers(adapters, tokenizer)
    with naming_the_folder(folder):
        model = _load_model(folder, settings)
    num_rows = count_rows(model, folder)
    tokenizer.require_rows(num_rows, folder)
    if model.device.type == "cuda":
        _bound_gpu_memory(settings.memory_fraction)
    max_context = choose_context(model, settings)
    logger.info(
        "loaded %s in %.1f s: %.1f M parameters, %s on %s, quantization %s, context %d tokens",
        folder, time.monotonic() - start, model.num_parameters() / 1e6, str(model.dtype).removeprefix("torch."),
        model.device, settings.quantization, max_context,
    )  # fmt: skip
    eos_ids = read_eos_ids(folder, tokenizer, vocab_size=num_rows)
    model.eval()
    shown = [token_id for token_id in range(min(tokenizer.size, num_rows)) if token_id not in tokenizer.special_ids]
    way = find_way(model, shown, prefix=tokenizer.prefix_ids, max_context=max_context)
    return TransformersEngine(model, tokenizer, max_context=max_context, eos_ids=eos_ids, adapters=adapters, way=way)


def _load_model(folder: Path, settings: ServerSettings) -> PreTrainedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    try:
        model, found = load_causal_lm(
            folder, dtype=dtype, quantization=settings.quantization, device_map={"": device}, unpacks=False
        )
    except torch.OutOfMemoryError as error:
        raise NotEnoughSpace(
            f"{folder} does not fit the GPU as {dtype}: set ALPACA_QUANTIZATION to int8 or nf4 ({error})"
        ) from error
    require_all_weights(folder, found["missing_keys"])
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if num_layers is not None:  # BLT's parts have a number each
        check_layers(num_layers, found["unexpected_keys"], where=str(folder))
    if settings.quantization == "nf4" and device.type == "cpu":
        allow_any_width_on_cpu(model)
    return model


def _bound_gpu_memory(fraction: float) -> None:
    """Limit the allocator to the memory that the weights took, and `fraction` of what is free after them."""
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + fraction * free) / total)
