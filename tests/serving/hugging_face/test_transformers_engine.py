"""The engine gives what transformers' generate gives, per request, cancellable, and survives failures."""

import shutil
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, OPTConfig

from alpaca.errors import EngineClosed, InputError, MissingInput
from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import (
    FinishedEvent,
    GenerationCancelledError,
    TokenEvent,
    complete_texts,
    stream_text,
)
from alpaca.serving.hugging_face.engine import TransformersEngine, load_transformers_engine
from alpaca.serving.request import Request
from alpaca.serving.settings import ServerSettings
from alpaca.text.loading import load_tokenizer

DEFAULTS = dict(
    prompt_ids=(1, 300, 310, 320), n=1, max_new_tokens=20, min_new_tokens=0, temperature=0.0, top_p=1.0, top_k=0,
    min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=3, num_beams=1,
)  # fmt: skip
SMALL = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=256),
    "bloom": BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
}


def request(**changes) -> Request:
    return Request(**{**DEFAULTS, **changes})


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return load_tokenizer(llama_folder)


@pytest.fixture(scope="module", params=CONFIGS)
def engine(request, tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far enough from uniform that greedy has no ties
    engine = TransformersEngine(model, tokenizer, max_context=256)
    yield engine
    engine.close()


def tokens(generation) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(generation.request.n)]
    for event in generation.events():
        if isinstance(event, TokenEvent):
            rows[event.completion].append(event.token_id)
    return rows


def generate(engine, **options) -> list[int]:
    prompt = torch.tensor([DEFAULTS["prompt_ids"]])
    out = engine._model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, eos_token_id=2,
        pad_token_id=0, **options,
    )  # fmt: skip
    return [token_id for token_id in out[0, prompt.shape[1] :].tolist() if token_id != 2]


def test_greedy_is_generates(engine):
    assert tokens(engine.submit(request())) == [generate(engine)]


def test_greedy_with_repetition_penalty_is_generates(engine):
    assert tokens(engine.submit(request(repetition_penalty=1.8))) == [generate(engine, repetition_penalty=1.8)]


@pytest.mark.fast_rows(1)
def test_beam_search_is_generates(engine):
    assert tokens(engine.submit(request(num_beams=3))) == [generate(engine, num_beams=3)]
    assert len(tokens(engine.submit(request(num_beams=3, n=2)))) == 2


def test_long_prompts_read_in_pieces_give_the_same(engine, monkeypatch):
    whole = tokens(engine.submit(request(prompt_ids=tuple(range(3, 103)))))
    monkeypatch.setattr("alpaca.serving.hugging_face.decoding.PREFILL_TOKENS", 7)
    assert tokens(engine.submit(request(prompt_ids=tuple(range(3, 103))))) == whole


@pytest.mark.fast_rows(1)
def test_seed_repeats_and_completions_differ(engine):
    def sample(**changes) -> list[list[int]]:
        return tokens(engine.submit(request(temperature=5.0, **changes)))

    first = sample(n=3)
    assert sample(n=3) == first
    assert sample(seed=4, n=3) != first
    assert first[0] != first[1] != first[2]
    assert sample(n=1)[0][:1] == first[0][:1]  # the stream depends on (seed, completion), not on n


@pytest.mark.fast_rows(1)
def test_rows_that_end_early_do_not_disturb_the_others(engine):
    full = tokens(engine.submit(request(temperature=1.0, n=4)))
    generation = engine.submit(request(temperature=1.0, n=4))
    rows: list[list[int]] = [[] for _ in range(4)]
    generation.stop(1)  # as if a stop string had been met in its first token
    for event in generation.events():
        if isinstance(event, TokenEvent):
            rows[event.completion].append(event.token_id)
    assert rows[1] == []
    for i in (0, 2, 3):
        assert rows[i] == full[i]


def test_tokens_come_one_by_one(engine):
    generation = engine.submit(request(max_new_tokens=100, min_new_tokens=100))
    events = generation.events()
    next(events)
    assert generation.metrics()["output_tokens"] < 90
    assert len(list(events)) == 100  # 99 tokens and the end


def test_cancel_ends_within_a_token_and_frees_the_engine(engine):
    generation = engine.submit(request(max_new_tokens=250, min_new_tokens=250))
    events = generation.events()
    next(events)
    generation.cancel()
    with pytest.raises(GenerationCancelledError):
        list(events)
    seen = generation.metrics()["output_tokens"]
    assert len(tokens(engine.submit(request(max_new_tokens=3, min_new_tokens=3)))[0]) == 3
    assert generation.metrics()["output_tokens"] <= seen + 1
    assert seen < 250


def test_beam_search_is_cancelled_too(engine):
    generation = engine.submit(request(num_beams=4, max_new_tokens=240, min_new_tokens=240))
    threading.Timer(0.05, generation.cancel).start()
    start = time.monotonic()
    with pytest.raises(GenerationCancelledError):
        list(generation.events())
    tokens(engine.submit(request(max_new_tokens=1)))
    assert time.monotonic() - start < 5


@pytest.mark.fast_rows(1)
def test_cancelled_in_the_queue_is_never_run(engine):
    first = engine.submit(request(max_new_tokens=100, min_new_tokens=100))
    second = engine.submit(request())
    second.cancel()
    with pytest.raises(GenerationCancelledError):
        list(second.events())
    assert len(tokens(first)[0]) == 100
    assert second.metrics()["output_tokens"] == 0


@pytest.mark.fast_rows(1)
def test_requests_are_served_in_order_from_many_threads(engine):
    expected = tokens(engine.submit(request()))
    results: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: results.append(tokens(engine.submit(request())))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 8


def test_a_failing_request_fails_alone(engine, caplog):
    broken = engine.submit(request(prompt_ids=(1, 10**6)))
    with pytest.raises(IndexError):
        list(broken.events())
    assert engine.is_healthy()
    assert tokens(engine.submit(request())) == [generate(engine)]


def test_a_lost_device_fails_every_request_at_once(tokenizer, caplog):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    engine = TransformersEngine(model, tokenizer, max_context=64)

    def lose(*args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    model.forward = lose
    with pytest.raises(RuntimeError, match="device-side assert"):
        list(engine.submit(request()).events())
    deadline = time.monotonic() + 5
    while engine.is_healthy() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.is_healthy()
    with pytest.raises(EngineClosed, match="takes no requests: CUDA error"):
        engine.submit(request())


def test_close_fails_what_is_running_and_waiting(tokenizer):
    engine = TransformersEngine(AutoModelForCausalLM.from_config(CONFIGS["llama"]), tokenizer, max_context=2048)
    running, waiting = (engine.submit(request(max_new_tokens=2000, min_new_tokens=2000)) for _ in range(2))
    next(running.events())
    engine.close()
    for generation in (running, waiting):
        with pytest.raises(EngineClosed, match="shut down"):
            list(generation.events())
    assert not engine.is_healthy()


@pytest.mark.fast_rows(1)
def test_text_streamed_is_text_whole(engine, tokenizer):
    def texts(n: int) -> list[CompletionText]:
        return [CompletionText(tokenizer, DEFAULTS["prompt_ids"], stop=["e"]) for _ in range(n)]

    sampled = request(temperature=1.0, max_new_tokens=60)
    whole = list(complete_texts(engine.submit(sampled), texts(1)))
    assert "".join(stream_text(engine.submit(sampled), texts(1)[0])) == whole[0]
    assert "e" not in whole[0]
    three = list(complete_texts(engine.submit(request(temperature=1.0, n=3)), texts(3)))
    assert len(three) == 3


def test_padded_vocabulary_rows_are_never_chosen(llama_folder, tokenizer):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "vocab_size": 448}, intermediate_size=64))
    engine = TransformersEngine(model, tokenizer, max_context=128)
    chosen = tokens(engine.submit(request(temperature=5.0, n=5, max_new_tokens=60)))
    assert max(token_id for row in chosen for token_id in row) < 400
    engine.close()


def test_metrics(engine):
    generation = engine.submit(request(max_new_tokens=5, min_new_tokens=5, n=2, temperature=1.0))
    events = list(generation.events())
    assert sum(isinstance(event, FinishedEvent) for event in events) == 2
    metrics = generation.metrics()
    assert (metrics["prompt_tokens"], metrics["output_tokens"], metrics["seed"]) == (4, 10, 3)
    assert metrics["cached_tokens"] == 0
    assert 0 <= metrics["queue_s"] <= metrics["time_to_first_token_s"]
    assert metrics["tokens_per_second"] > 0


# Loading ----------------------------------------------------------------------------------------------------------


def test_real_model_gives_its_published_text(tmp_path, real):
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments

    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K", "--output_dir", str(tmp_path)]
    engine = load_transformers_engine(convert(parse_arguments(flags)), ServerSettings())
    generation = engine.submit(request(prompt_ids=(1,), max_new_tokens=256))
    text = next(complete_texts(generation, [CompletionText(engine.tokenizer, (1,))]))
    assert text == (real / "stories260k-greedy.txt").read_text().rstrip("\n")
    engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_and_context_are_the_settings(llama_folder, dtype):
    engine = load_transformers_engine(llama_folder, ServerSettings(dtype=dtype, max_context=100))
    assert str(engine._model.dtype) == f"torch.{dtype}"
    assert engine.max_context == 100
    engine.close()
    longer = load_transformers_engine(llama_folder, ServerSettings(max_context=10**6))
    assert longer.max_context == 2048
    longer.close()


# (That int8 is loaded, proven and answers as transformers' does is seen by test_peft_adapters; on a CPU it is slow.)
@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, on a CPU
@pytest.mark.parametrize("quantization", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_quantized_models_answer_much_as_the_whole_one(llama_folder, quantization):
    pytest.importorskip("bitsandbytes")
    whole = load_transformers_engine(llama_folder, ServerSettings())
    small = load_transformers_engine(llama_folder, ServerSettings(quantization=quantization))
    ids = torch.tensor([list(range(1, 100))])
    with torch.inference_mode():
        a, b = (engine._model(ids).logits.flatten().float() for engine in (whole, small))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > (0.99 if quantization == "int8" else 0.8)
    assert not torch.equal(a, b)
    assert len(tokens(small.submit(request(min_new_tokens=20)))[0]) == 20
    whole.close()
    small.close()


def test_a_model_that_lacks_weights_is_not_served_with_random_ones(tmp_path, llama_folder):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama_folder, tmp_path / "w")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks weights of its model: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_transformers_engine(folder, ServerSettings())


def test_another_models_tokenizer_is_refused(tmp_path, llama_folder, real):
    folder = shutil.copytree(llama_folder, tmp_path / "w")
    shutil.copy(real / "llama-tokenizer" / "tokenizer.model", folder)
    (folder / "tokenizer.json").unlink()  # with the right vocabulary it would hold
    with pytest.raises(InputError, match=r"the tokenizer has 32000 tokens, the embedding of .* 400 rows"):
        load_transformers_engine(folder, ServerSettings())


def test_damaged_weights_are_named(tmp_path, llama_folder):
    folder = shutil.copytree(llama_folder, tmp_path / "w")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"w/model\.safetensors is damaged or not a safetensors file"):
        load_transformers_engine(folder, ServerSettings())


def test_folders_that_cannot_be_loaded(tmp_path, llama_folder):
    with pytest.raises(MissingInput, match=r"holds no model: no config\.json; found: nothing"):
        load_transformers_engine(tmp_path, ServerSettings())
    for file in llama_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load_transformers_engine(tmp_path, ServerSettings())
