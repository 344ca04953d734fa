"""The batching engine gives each request what naive decoding gives it alone, whatever happens around it."""

import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from alpaca.errors import EngineClosed, InputError, NumbersOverflow, PromptTooLong
from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import (
    FinishedEvent,
    Generation,
    GenerationCancelledError,
    TokenEvent,
    complete_texts,
    is_device_lost,
    stream_text,
)
from alpaca.serving.hugging_face.shared_weights import as_transformers
from alpaca.serving.kernels.linear_base import PlainLinear
from alpaca.serving.llama.cache import BlockPool
from alpaca.serving.llama.engine import LlamaEngine
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.runner import Runner
from alpaca.serving.llama.sampling import SamplingState, commit_tokens, sample_tokens
from alpaca.serving.llama.scheduler import Scheduler
from alpaca.serving.loading import load_engine
from alpaca.serving.request import Request
from alpaca.serving.settings import ServerSettings
from alpaca.text.tokenizer import Tokenizer
from tests.samples import sampled
from tests.serving.llama.test_llama import KINDS, load, save_model
from tests.serving.llama.test_llama import logits as packed_logits

SIZE = 4
CONTEXT = 120
MODES = ["in step", "ahead", "graphs"]
DEFAULTS = dict(
    prompt_ids=(1, 100, 110, 20), n=1, max_new_tokens=12, min_new_tokens=0, temperature=0.0, top_p=1.0, top_k=0,
    min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=3, num_beams=1,
)  # fmt: skip


def request(**changes) -> Request:
    return Request(**{**DEFAULTS, **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[LlamaForCausalLM, LlamaModel]:
    """One model twice in float64: transformers' and ours."""
    folder = tmp_path_factory.mktemp("llama")
    return save_model(folder, num_key_value_heads=2), load(folder)


class CalledEachTime:
    """Stands in for a captured graph where there is no GPU: the same function over the same buffers."""

    def __init__(self, function) -> None:
        self.replay = torch.inference_mode()(function)


def make_engine(
    model: LlamaModel,
    *,
    num_blocks: int = 200,
    mode: str = "in step",
    max_running: int = 8,
    tokenizer: Tokenizer | None = None,
) -> LlamaEngine:
    cache = KeyValueCache(model.config, num_blocks=num_blocks, block_size=SIZE, dtype=model.dtype, device=model.device)
    runner = Runner(
        model, cache, max_running=max_running, max_context=CONTEXT, vocab_size=model.config.vocab_size,
        eos_ids=frozenset([2]),
    )  # fmt: skip
    if mode == "graphs":
        runner.graphs = runner.make_graphs(CalledEachTime)
        runner.graphs.capture()
    return engine_of(runner, launches_ahead=mode != "in step", tokenizer=tokenizer)


def engine_of(runner: Runner, *, launches_ahead: bool, tokenizer: Tokenizer | None = None) -> LlamaEngine:
    num_blocks, size = runner.cache.keys[0].shape[:2]
    max_running = len(runner.last_ids) - 1
    scheduler = Scheduler(
        BlockPool(num_blocks, size), max_running=max_running, max_step_tokens=max_running + 8,
        window=runner.model.config.longest_window,
    )  # fmt: skip
    return LlamaEngine(
        runner, scheduler, tokenizer, max_context=CONTEXT, beams=lambda: None, launches_ahead=launches_ahead
    )


@pytest.fixture(scope="module", params=MODES)
def engine(request, models) -> Iterator[LlamaEngine]:
    engine = make_engine(models[1], mode=request.param)
    yield engine
    engine.close()


def tokens(generation: Generation) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(generation.request.n)]
    for event in generation.events():
        if isinstance(event, TokenEvent):
            rows[event.completion].append(event.token_id)
    return rows


@torch.inference_mode()
def naive(model: LlamaForCausalLM, request: Request, found: list[list[int]] | None = None) -> list[list[int]]:
    """Decode without batch or cache: all tokens again for each one.

    found: answers to compare with. What comes after a token changes none of its logits, so one pass over a found answer
    gives those of all its tokens; each is chosen anew, and from the first that differs on, all is computed again. Not
    for a model that turns otherwise as soon as a sequence is long.
    """
    answers = []
    for completion in range(request.n):
        row = SamplingState(request, completion, eos_ids=[2])
        ids = list(request.prompt_ids)
        guess = [*ids, *found[completion]] if found else []
        guessed = model(torch.tensor([guess]), use_cache=False).logits if found else None
        while len(ids) < len(request.prompt_ids) + request.max_new_tokens:
            if found and ids == guess[: len(ids)]:
                logits = guessed[:, len(ids) - 1]
            else:
                logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
            chosen = sample_tokens(logits, [row])
            commit_tokens([row], chosen)
            ids.append(chosen.item())
            if ids[-1] == 2:
                break
        answers.append([token_id for token_id in ids[len(request.prompt_ids) :] if token_id != 2])
    return answers


def naive_of_all(model: LlamaForCausalLM, asked: list[Request], found: list[list[list[int]]]) -> list[list[list[int]]]:
    """`naive` of each request, to compare with what was found."""
    return [naive(model, one, rows) for one, rows in zip(asked, found, strict=True)]


def random_request(chance: random.Random) -> Request:
    prefix = chance.choice([(), (1, 7, 8, 9, 10, 11, 12, 13, 14), (1, 7, 8, 9, 10, 50)])  # shared by many
    prompt = prefix + tuple(chance.randrange(3, 120) for _ in range(chance.randint(1, 25)))
    options = chance.choice(
        [
            {"temperature": 0.0},
            {"temperature": 0.8},
            {"temperature": 1.2, "top_p": 0.8},
            {"temperature": 1.0, "top_k": 7},
            {"temperature": 0.9, "min_p": 0.05, "top_k": 30},
            {"temperature": 0.0, "repetition_penalty": 1.4},
            {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.3},
            {"temperature": 1.0, "min_new_tokens": 9},
        ]
    )
    n, length, seed = chance.choice([1, 1, 1, 3]), chance.randint(1, 30), chance.randrange(99)
    return request(prompt_ids=prompt, n=n, max_new_tokens=length, seed=seed, **options)


# The equality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [200, 28], ids=["roomy", "preempting"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", sampled([0, 1, 2], 0))
@pytest.mark.fast_rows(1)
def test_any_interleaving_gives_what_naive_decoding_gives_alone(models, num_blocks, mode, seed):
    reference, model = models
    chance = random.Random(f"{seed}:{num_blocks}:{mode}")
    engine = make_engine(
        model, num_blocks=num_blocks, mode=mode, max_running=3 if seed == 0 and num_blocks == 200 else 8
    )
    submitted: list[Generation] = []
    for _ in range(25):
        generation = engine.submit(random_request(chance))
        if chance.random() < 0.2:
            threading.Timer(chance.random() * 0.05, generation.cancel).start()
        else:
            submitted.append(generation)
        time.sleep(chance.random() * 0.01 if num_blocks == 200 else 0)
    for generation in submitted:
        found = tokens(generation)
        assert found == naive(reference, generation.request, found), generation.request
    engine.close()
    pool = engine._scheduler.pool
    assert pool.num_free == pool.capacity
    assert (engine._scheduler.num_preemptions > 0) == (num_blocks == 28)


def test_a_wrong_answer_changes_nothing_of_what_it_is_compared_with(models):
    asked = request(n=2, temperature=1.0, min_new_tokens=12)
    right = naive(models[0], asked)
    wrong = [[*row[:3], (row[3] + 1) % 120, *row[4:]] for row in right]
    for found in (right, wrong, [[], []], [[*row, 9] for row in right]):
        assert naive(models[0], asked, found) == right


def test_the_cache_is_used_and_changes_nothing(engine, models):
    asked = request(prompt_ids=tuple(range(3, 40)), max_new_tokens=5)
    first = engine.submit(asked)
    expected = tokens(first)
    again = engine.submit(asked)
    assert tokens(again) == expected == naive(models[0], asked)
    assert again.metrics()["cached_tokens"] == 36  # the last token's logits are needed
    longer = dataclasses.replace(asked, prompt_ids=(*asked.prompt_ids, 50, 60))
    generation = engine.submit(longer)
    assert tokens(generation) == naive(models[0], longer)
    assert generation.metrics()["cached_tokens"] == 36
    # Answers are remembered like prompts: a conversation goes on where it was.
    follow_up = dataclasses.replace(asked, prompt_ids=(*asked.prompt_ids, *expected[0], 77))
    generation = engine.submit(follow_up)
    assert tokens(generation) == naive(models[0], follow_up)
    assert generation.metrics()["cached_tokens"] == 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prompts_longer_than_a_step(models, dtype, tmp_path):
    engine = make_engine(models[1])
    asked = request(prompt_ids=tuple(3 + i * 7 % 110 for i in range(100)), max_new_tokens=8)
    assert tokens(engine.submit(asked)) == naive(models[0], asked)
    engine.close()


def test_real_model_gives_its_published_text_alone_and_as_one_of_32(tmp_path, real):
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments

    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K", "--output_dir", str(tmp_path)]
    engine = load_engine(convert(parse_arguments(flags)), ServerSettings(engine="llama"))
    expected = (real / "stories260k-greedy.txt").read_text().rstrip("\n")
    asked = request(prompt_ids=(1,), max_new_tokens=256)

    def text(generation: Generation) -> str:
        return next(complete_texts(generation, [CompletionText(engine.tokenizer, (1,))]))

    assert text(engine.submit(asked)) == expected
    others = [request(prompt_ids=(1, 300 + i), temperature=1.0, seed=i, max_new_tokens=256) for i in range(31)]
    generations = [engine.submit(other) for other in others[:16]]
    one_of_32 = engine.submit(asked)
    generations += [engine.submit(other) for other in others[16:]]
    assert text(one_of_32) == expected
    assert len({text(generation) for generation in generations}) > 20
    engine.close()


# Streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.fast_rows(1)
def test_tokens_come_as_they_are_made(engine):
    generation = engine.submit(request(max_new_tokens=100, min_new_tokens=100))
    batches = generation.batches()
    assert len(next(batches)) == 1  # the first token at once
    assert generation.metrics()["output_tokens"] < 90
    assert sum(map(len, batches)) == 100  # 99 tokens and the end


def test_who_wants_the_whole_answer_is_woken_once(engine):
    generation = engine.submit(request(max_new_tokens=50, min_new_tokens=50, reads_along=False))
    assert [len(batch) for batch in generation.batches()] == [51]


def test_cancel_frees_state_row_and_blocks(engine):
    generation = engine.submit(request(max_new_tokens=110, min_new_tokens=110))
    next(generation.batches())
    generation.cancel()
    with pytest.raises(GenerationCancelledError):
        list(generation.batches())
    tokens(engine.submit(request(max_new_tokens=1)))
    assert engine._scheduler.pool.num_used == 0
    assert not engine._scheduler.running


@pytest.mark.fast_rows(1)
def test_a_stopped_completion_ends_and_the_others_go_on(engine, models):
    asked = request(temperature=1.0, n=3, max_new_tokens=20, min_new_tokens=20)
    full = naive(models[0], asked)
    generation = engine.submit(asked)
    rows: list[list[int]] = [[], [], []]
    ends = 0
    for event in generation.events():
        if isinstance(event, FinishedEvent):
            ends += 1
        else:
            rows[event.completion].append(event.token_id)
            if event.completion == 1:
                generation.stop(1)
    assert ends == 3
    assert len(rows[1]) < 20
    assert [rows[0], rows[2]] == [full[0], full[2]]


def test_metrics(engine):
    generation = engine.submit(request(max_new_tokens=5, min_new_tokens=5, n=2, temperature=1.0, reads_along=False))
    list(generation.batches())
    metrics = generation.metrics()
    assert (metrics["prompt_tokens"], metrics["output_tokens"], metrics["seed"]) == (4, 10, 3)
    assert 0 <= metrics["queue_s"] <= metrics["time_to_first_token_s"]
    assert metrics["tokens_per_second"] > 0


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_what_can_never_fit_fails_at_once_naming_the_sizes(engine):
    with pytest.raises(
        PromptTooLong, match=r"prompt \(4 tokens\) and answer \(up to 200\) need 204 tokens; .* for 120"
    ):
        engine.submit(request(max_new_tokens=200))
    with pytest.raises(InputError, match=r"token id 999 is outside of the model's 120 rows"):
        engine.submit(request(prompt_ids=(1, 999)))


def test_a_failing_step_fails_the_requests_concerned_and_no_other(models, caplog):
    reference, model = models
    engine = make_engine(model, mode="ahead")
    launch = engine._runner.launch

    def fail_for_poison(scheduled):
        if any(50 in item.sequence.token_ids[:3] for item in scheduled):
            raise ValueError("poison")
        return launch(scheduled)

    engine._runner.launch = fail_for_poison
    healthy = [request(prompt_ids=(1, 60 + i, 70), max_new_tokens=40, temperature=1.0, seed=i) for i in range(4)]
    generations = [engine.submit(asked) for asked in healthy[:2]]
    poisoned = engine.submit(request(prompt_ids=(1, 50, 51)))
    generations += [engine.submit(asked) for asked in healthy[2:]]
    with pytest.raises(ValueError, match="poison"):
        tokens(poisoned)
    found = [tokens(generation) for generation in generations]
    assert found == naive_of_all(reference, healthy, found)
    assert engine.is_healthy()
    engine.close()
    assert engine._scheduler.pool.num_free == engine._scheduler.pool.capacity


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fails", ["before", "after"])
@pytest.mark.fast_rows(1)
def test_a_step_that_failed_and_is_tried_again_changes_no_answer(models, caplog, mode, fails):
    """Every third step fails, before or after its tokens were chosen; every request is then run alone."""
    reference, model = models
    engine = make_engine(model, mode=mode)
    launch, steps = engine._runner.launch, []

    def fail_now_and_then(scheduled):
        steps.append(len(scheduled))
        is_third = len(scheduled) > 1 and len(steps) % 3 == 0
        if is_third and fails == "before":
            raise ValueError("now and then")
        if is_third:
            start_copy, engine._runner._start_copy = engine._runner._start_copy, None
            try:
                return launch(scheduled)
            finally:
                engine._runner._start_copy = start_copy
        return launch(scheduled)

    engine._runner.launch = fail_now_and_then
    chance = random.Random(5)
    generations = [engine.submit(random_request(chance)) for _ in range(12)]
    found = [tokens(generation) for generation in generations]
    assert found == naive_of_all(reference, [generation.request for generation in generations], found)
    assert "a step of" in caplog.text
    engine.close()


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_no_numbers_fail_their_request_alone(models, mode):
    reference, model = models
    engine = make_engine(model, mode=mode)
    embedding = model.embedding.clone()
    try:
        model.embedding[55] = float("nan")
        sick = engine.submit(request(prompt_ids=(1, 55, 60), temperature=1.0))
        healthy = [request(prompt_ids=(1, 60 + i), temperature=1.0, seed=i, min_new_tokens=12) for i in range(3)]
        generations = [engine.submit(asked) for asked in healthy]
        with pytest.raises(NumbersOverflow, match="not finite"):
            tokens(sick)
        found = [tokens(generation) for generation in generations]
    finally:
        model.embedding.copy_(embedding)
    assert all(55 not in rows[0] for rows in found)
    assert found == naive_of_all(reference, healthy, found)
    engine.close()


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("CUDA driver error: unspecified launch failure", True),
        ("CUDA error: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("index 5 is out of bounds", False),
    ],
)
def test_what_means_that_the_device_is_lost(message, is_lost):
    assert is_device_lost(RuntimeError(message)) == is_lost


def test_tokens_after_a_stop_string_are_not_counted(engine):
    """They depend on how quick the reader was."""
    generation = engine.submit(request(max_new_tokens=60, min_new_tokens=60))
    text = CompletionText(Letters(), (1,), stop=["c"])
    assert "".join(stream_text(generation, text)) == "ab"
    assert generation.metrics()["output_tokens"] == 3


class Letters:
    """Stands for a tokenizer: whatever the tokens, they read a, b, c …"""

    special_ids = frozenset([1])
    eos_id = 2
    drops_first_space = True

    def __init__(self) -> None:
        self._letters = itertools.cycle("abcdefgh")

    def special_id(self, text: str) -> int | None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in (1, 2) else next(self._letters).encode()


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), "a bug"])
def test_a_lost_device_fails_every_request_at_once(models, caplog, error):
    engine = make_engine(models[1])
    generations = [engine.submit(request(max_new_tokens=100, min_new_tokens=100)) for _ in range(3)]
    next(generations[0].batches())

    def lose(*args):
        raise error

    if isinstance(error, Exception):
        engine._runner.launch = lose
    else:
        engine._scheduler.schedule = None
    for generation in generations:
        with pytest.raises((RuntimeError, EngineClosed), match=r"illegal memory|engine stopped"):
            list(generation.batches())
    engine._thread.join(timeout=5)
    assert not engine.is_healthy()
    with pytest.raises(EngineClosed, match="takes no requests"):
        engine.submit(request())


def test_close_fails_what_is_running_and_waiting(models):
    engine = make_engine(models[1], max_running=1)
    running, waiting = (engine.submit(request(max_new_tokens=110, min_new_tokens=110)) for _ in range(2))
    next(running.batches())
    engine.close()
    for generation in (running, waiting):
        with pytest.raises(EngineClosed, match="shut down"):
            list(generation.batches())
    with pytest.raises(EngineClosed, match="shut down"):
        engine.submit(request())


@pytest.mark.fast_rows(1)
def test_many_threads(engine, models):
    asked = [request(prompt_ids=(1, 5 + i), temperature=1.0, seed=i) for i in range(12)]
    found: list[list[list[int]]] = [[]] * 12
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, tokens(engine.submit(asked[i])))) for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == naive_of_all(models[0], asked, found)


# Beam search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grouped heads", "tied embeddings", "Llama 3.2"])
def test_beam_search_shares_the_weights_where_they_lie_plain(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("alpaca.serving.kernels.linear.make_packed", lambda *weight: None)
    expected = save_model(tmp_path, torch.float32, **KINDS[kind])
    model = load(tmp_path, torch.float32)
    shared = as_transformers(model, tmp_path)
    prompt = torch.tensor([list(range(3, 40))])
    with torch.inference_mode():
        assert torch.equal(shared(prompt).logits, expected(prompt).logits)
    assert shared.model.layers[1].self_attn.k_proj.weight.untyped_storage().data_ptr() == (
        model.layers[1].qkv.weight.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_beam_search_asks_packed_and_quantized_weights_for_their_products(tmp_path, quantization):
    save_model(tmp_path, torch.float32, **KINDS["grouped heads"])
    model = load(tmp_path, torch.float32, quantization)
    if quantization == "none" and isinstance(model.head, PlainLinear):
        pytest.skip("this CPU packs no weights")
    shared = as_transformers(model, tmp_path)
    prompts = [list(range(3, 40)), [7, 8, 9]]
    for prompt, expected in zip(prompts, packed_logits(model, prompts, chunk=64), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(shared(torch.tensor([prompt])).logits[0], expected, rtol=1e-5, atol=1e-5)
    names = {name for name, _ in shared.named_parameters()}
    assert not [name for name in names if "proj" in name or "lm_head" in name], "it holds no matrix of its own"
    held = [module._product for module in shared.modules() if hasattr(module, "_product")]
    assert len(held) == 1 + 7 * len(model.layers)
    assert all(product._output is None for product in held), "nor an output once it is taken"


def test_what_beam_search_cannot_share(tmp_path):
    save_model(tmp_path, torch.float32)
    model = load(tmp_path, torch.float32, "int8")
    assert as_transformers(model, tmp_path, with_adapters=True) is None
