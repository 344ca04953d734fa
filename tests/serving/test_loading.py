"""A folder becomes the engine it should be, says what it became, and refuses in one sentence what it cannot serve."""

import json
import logging
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from alpaca.errors import (
    AlpacaError,
    EngineClosed,
    InputError,
    MissingInput,
    NotEnoughSpace,
    PromptTooLong,
    UnsupportedModel,
)
from alpaca.serving import loading
from alpaca.serving.engine import Engine
from alpaca.serving.housekeeping import Phases
from alpaca.serving.hugging_face import engine as transformers_engine
from alpaca.serving.hugging_face.engine import TransformersEngine
from alpaca.serving.kernels.cpu_linear import cpu_multiplies
from alpaca.serving.kernels.native import library as native
from alpaca.serving.llama.engine import LlamaEngine
from alpaca.serving.llama.planning import BLOCK_SIZE, max_running, working_bytes
from alpaca.serving.loading import load_engine
from alpaca.serving.request import PredictionInputs, Request, make_request
from alpaca.serving.served_model import ServedModel
from alpaca.serving.settings import ServerSettings
from alpaca.text.eos import read_eos_ids
from alpaca.text.loading import load_tokenizer
from tests.serving.llama.families import save as save_family
from tests.serving.llama.test_llama import logits
from tests.serving.llama.test_llama_engine import DEFAULTS, tokens

PROMPT = (1, 300, 310, 320)


def request(**changes) -> Request:
    return Request(**{**DEFAULTS, "prompt_ids": PROMPT, "max_new_tokens": 20, **changes})


@pytest.fixture
def load(llama_folder) -> Iterator[Callable[..., Engine]]:
    """`load_engine` with settings as keywords; what it gave is closed at the end."""
    engines: list[Engine] = []

    def load(folder: Path = llama_folder, *, phases: Phases | None = None, **settings) -> Engine:
        engines.append(load_engine(folder, ServerSettings(**settings), phases))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.fixture
def copy(llama_folder, tmp_path) -> Path:
    """The LLaMA folder, to be changed."""
    return shutil.copytree(llama_folder, tmp_path / "copy")


@pytest.fixture
def without_sentencepiece(copy) -> Path:
    """A LLaMA folder that lost its tokenizer.model: its tokenizer.json counts, and so do its configs' ids."""
    (copy / "tokenizer.model").unlink()
    return copy


@pytest.fixture(scope="module")
def opt_folder(llama_folder, tmp_path_factory) -> Path:
    """A tiny OPT with the LLaMA folder's tokenizer.json."""
    folder = tmp_path_factory.mktemp("opt") / "opt"
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(llama_folder / name, folder)
    return folder


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Which engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "expected"), [("auto", LlamaEngine), ("llama", LlamaEngine), ("transformers", TransformersEngine)]
)
def test_a_llama_is_served_by_the_engine_named(load, engine, expected):
    found = load(engine=engine)
    assert type(found) is expected
    assert found.is_healthy()
    assert found.max_context == 2048


def test_both_engines_answer_alike(load):
    asked = request(min_new_tokens=20)
    assert tokens(load(engine="llama").submit(asked)) == tokens(load(engine="transformers").submit(asked))


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2, strong caps", "gemma3", "mixtral"])
@pytest.mark.fast_rows(1)
def test_other_families_are_served_by_the_llama_engine_and_answer_alike(load, llama_folder, tmp_path, name):
    save_family(tmp_path, name, torch.float32, vocab_size=400)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(llama_folder / file, tmp_path)
    asked = request(min_new_tokens=20)
    engine = load(tmp_path, dtype="float32")
    assert type(engine) is LlamaEngine
    found = tokens(engine.submit(asked))
    assert found == tokens(load(tmp_path, engine="transformers", dtype="float32").submit(asked))


def test_an_opt_goes_to_transformers_and_the_log_says_why(load, opt_folder, caplog):
    caplog.set_level(logging.INFO)
    engine = load(opt_folder)
    assert type(engine) is TransformersEngine
    assert f"served by transformers: {opt_folder}: its model_type is 'opt', not llama or mistral" in caplog.text
    assert len(tokens(engine.submit(request(min_new_tokens=20)))[0]) == 20


def test_the_llama_engine_refuses_an_opt(load, opt_folder):
    with pytest.raises(UnsupportedModel, match="its model_type is 'opt', not llama"):
        load(opt_folder, engine="llama")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"is_causal": False}, "its is_causal asks for"), ({"hidden_act": "relu"}, "its activation is 'relu'")],
)
def test_llamas_it_does_not_know_are_transformers(copy, monkeypatch, caplog, change, reason):
    caplog.set_level(logging.INFO)
    change_json(copy / "config.json", **change)
    monkeypatch.setattr(loading, "_load_transformers", lambda *args: "transformers")
    assert loading._choose_engine(ServedModel(base=copy, adapters={}), ServerSettings(), Phases()) == "transformers"
    assert any(re.search(rf"served by transformers: .*{reason}", message) for message in caplog.messages)


# What the log says ------------------------------------------------------------------------------------------------


def test_the_log_names_model_precision_pages_buckets(load, llama_folder, caplog):
    caplog.set_level(logging.INFO)
    phases = Phases()
    engine = load(phases=phases, dtype="float32", quantization="int8", max_context=512, concurrency=4)
    line = next(message for message in caplog.messages if "blocks of" in message)
    num_blocks = 1 + 20 * 512 // BLOCK_SIZE
    kv_gb = num_blocks * BLOCK_SIZE * 2 * 2 * 4 * 8 * 4 / 1e9  # keys and values, 2 layers, 4 heads of 8, 4 bytes
    assert line == (
        f"{llama_folder}: 0.1 M weights, float32 on cpu, quantization int8, "
        f"{engine._runner.model.num_bytes / 1e9:.2f} GB; context 512 tokens, {num_blocks} blocks of 16 tokens "
        f"({kv_gb:.2f} GB), up to 20 sequences a step; no graphs"
    )
    names = ["tokenizer", "weights", "cache", "kernels and graphs", "constraints", "first request"]
    assert re.fullmatch(", ".join(rf"{name} \d+\.\d s" for name in names), str(phases))


def test_phases_of_transformers(load):
    phases = Phases()
    load(engine="transformers", phases=phases)
    names = ["importing transformers", "weights", "constraints", "first request"]
    assert re.fullmatch(", ".join(rf"{name} \d+\.\d s" for name in names), str(phases))


def test_a_line_now_and_then_says_what_runs(load, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("alpaca.serving.llama.engine._LOG_INTERVAL_S", 0.02)
    engine = load(concurrency=1, max_context=512)  # five sequences at once
    full = [engine.submit(request(n=5, max_new_tokens=120, min_new_tokens=120, temperature=1.0)) for _ in range(2)]
    for generation in full:
        tokens(generation)
    pattern = r"engine: running (\d+), waiting (\d+), blocks used (\d+) of 160, (\d+\.\d) tokens/s"
    lines = [re.fullmatch(pattern, message) for message in caplog.messages if message.startswith("engine:")]
    assert lines
    assert all(lines)
    busy = [tuple(float(value) for value in line.groups()) for line in lines]
    assert any(running == 5 and waiting == 5 for running, waiting, _, _ in busy)
    assert all(rate > 0 for *_, rate in busy)
    assert all(running <= used <= 160 for running, _, used, _ in busy)  # a block each at least


def test_the_first_request_was_a_real_one_and_left_the_preamble(load):
    engine = load()
    asked = make_request(PredictionInputs(prompt="Something else"), engine.tokenizer, max_context=2048)
    generation = engine.submit(asked)
    tokens(generation)
    preamble = make_request(PredictionInputs(prompt="Zz"), engine.tokenizer, max_context=2048)
    shared = next(i for i, (a, b) in enumerate(zip(asked.prompt_ids, preamble.prompt_ids, strict=False)) if a != b)
    assert generation.metrics()["cached_tokens"] == shared // BLOCK_SIZE * BLOCK_SIZE > 0


def test_a_first_request_that_fails_fails_the_start(load, monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr("alpaca.serving.llama.runner.Runner.launch", fail)
    with pytest.raises(RuntimeError, match="no kernel for this device"):
        load()


# Precision, quantization, context ---------------------------------------------------------------------------------


def model_logits(engine: LlamaEngine) -> torch.Tensor:
    prompts = [list(range(1, 100)), [1, 399, 5, 77]]
    return torch.cat([rows.flatten().float() for rows in logits(engine._runner.model, prompts, chunk=30, size=16)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "least"), [("int8", 0.99), ("nf4", 0.8)])
def test_quantized_models_answer_much_as_the_whole_one(load, dtype, quantization, least):
    whole = load(engine="llama", dtype=dtype)
    small = load(engine="llama", dtype=dtype, quantization=quantization)
    a, b = model_logits(whole), model_logits(small)
    assert least < torch.corrcoef(torch.stack([a, b]))[0, 1] < 0.999999
    assert small._runner.model.num_bytes < whole._runner.model.num_bytes
    assert len(tokens(small.submit(request(min_new_tokens=20)))[0]) == 20


def is_only_held(dtype: str) -> bool:
    return dtype != "float32" and not cpu_multiplies(getattr(torch, dtype)) and native.load() is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cpu_without_units_for_a_dtype_holds_weights_in_it(load, llama_folder, tmp_path, caplog, dtype):
    """And answers as a model in float32 whose weights were rounded to it."""
    if not is_only_held(dtype):
        pytest.skip(f"this CPU has units for {dtype}, or no C++ kernels")
    with caplog.at_level(logging.INFO):
        engine = load(dtype=dtype)
    assert f"this CPU has no units for {dtype}: weights are held so, and multiplied in float32" in caplog.messages
    assert f"float32 of {dtype} weights on cpu" in caplog.text
    shutil.copytree(llama_folder, tmp_path / "rounded")
    rounded = {
        name: tensor.to(getattr(torch, dtype)).float()
        for name, tensor in load_file(llama_folder / "model.safetensors").items()
    }
    save_file(rounded, tmp_path / "rounded" / "model.safetensors")
    expected = load_engine(tmp_path / "rounded", ServerSettings(dtype="float32"))
    try:
        assert torch.equal(model_logits(engine), model_logits(expected))
        assert engine._runner.model.num_bytes < 0.8 * expected._runner.model.num_bytes
    finally:
        expected.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_has_the_precision_asked_for(load, dtype):
    engine = load(dtype=dtype)
    computed = "float32" if is_only_held(dtype) else dtype
    assert str(engine._runner.model.dtype) == f"torch.{computed}"
    assert {str(keys.dtype) for keys in engine._runner.cache.keys} == {f"torch.{computed}"}
    assert torch.corrcoef(torch.stack([model_logits(load()), model_logits(engine)]))[0, 1] > 0.999
    assert load()._runner.model.dtype == torch.float32  # a CPU's default


def test_context_is_the_settings_or_cut_to_the_models(load, caplog):
    assert load(max_context=100).max_context == 100
    assert "ALPACA_MAX_CONTEXT" not in caplog.text
    assert load(max_context=10**6).max_context == 2048
    assert "ALPACA_MAX_CONTEXT 1000000 is cut to the model's context of 2048 tokens" in caplog.messages


@pytest.mark.parametrize("max_context", [8, 17, 40, 201])
def test_a_tiny_context_still_starts_and_answers_to_its_end(load, max_context):
    engine = load(max_context=max_context)
    asked = request(max_new_tokens=max_context - 4, min_new_tokens=max_context)
    roomy = load()
    assert tokens(engine.submit(asked)) == tokens(roomy.submit(asked))
    with pytest.raises(PromptTooLong, match=rf"need {max_context + 1} tokens; this server has room for {max_context}"):
        engine.submit(request(max_new_tokens=max_context - 3))


def test_a_context_without_room_for_an_answer_names_the_setting(load):
    with pytest.raises(InputError, match="ALPACA_MAX_CONTEXT"):
        load(max_context=2)


# EOS ----------------------------------------------------------------------------------------------------------------


def test_eos_of_the_generation_config_ends_answers(load, without_sentencepiece):
    (answer,) = tokens(load(without_sentencepiece).submit(request(min_new_tokens=20)))
    also_ends = answer[4]
    change_json(without_sentencepiece / "generation_config.json", eos_token_id=[2, also_ends])
    engine = load(without_sentencepiece)
    assert engine._runner.eos_ids == {2, also_ends}
    assert tokens(engine.submit(request())) == [answer[: answer.index(also_ends)]]
    # And not before it may:
    longer = tokens(engine.submit(request(min_new_tokens=12)))[0]
    assert len(longer) >= 12
    assert also_ends not in longer


def test_where_eos_is_looked_for(llama_folder, without_sentencepiece):
    tokenizer = load_tokenizer(without_sentencepiece)
    assert read_eos_ids(without_sentencepiece, tokenizer, vocab_size=400) == {2}
    change_json(without_sentencepiece / "config.json", eos_token_id=7)
    change_json(without_sentencepiece / "generation_config.json", eos_token_id=[8, 9])
    assert read_eos_ids(without_sentencepiece, tokenizer, vocab_size=400) == {2, 7, 8, 9}
    change_json(without_sentencepiece / "config.json", eos_token_id=None)
    (without_sentencepiece / "generation_config.json").unlink()
    assert read_eos_ids(without_sentencepiece, tokenizer, vocab_size=400) == {2}
    # LLaMA's early conversions name wrong ids; where tokenizer.model is there it knows better.
    shutil.copy(llama_folder / "tokenizer.model", without_sentencepiece)
    change_json(without_sentencepiece / "config.json", eos_token_id=0)
    assert read_eos_ids(without_sentencepiece, load_tokenizer(without_sentencepiece), vocab_size=400) == {2}


# What cannot be served --------------------------------------------------------------------------------------------


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def remove_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def name_missing_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_key(folder: Path, name: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values[name]
    (folder / "config.json").write_text(json.dumps(values))


def remove_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("tokenizer*"), folder / "special_tokens_map.json"]:
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], type[AlpacaError], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        MissingInput, r"copy holds no model: no config\.json; found: generation_config\.json, model\.safetensors",
    ),
    "half a config": (
        lambda folder: cut(folder / "config.json", 100), InputError, r"copy/config\.json is not valid JSON: ",
    ),
    "a config without a size": (
        lambda folder: remove_key(folder, "hidden_size"), InputError, r"copy/config\.json: 'hidden_size' is missing",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        MissingInput, r"no model\*\.safetensors or pytorch_model\*\.bin in .*copy; found: config\.json",
    ),
    "cut weights": (
        lambda folder: cut(folder / "model.safetensors", 50_000),
        InputError, r"copy/model\.safetensors is damaged or not a safetensors file: ",
    ),
    "empty weights": (
        lambda folder: cut(folder / "model.safetensors", 0),
        InputError, r"copy/model\.safetensors is damaged or not a safetensors file: ",
    ),
    "a missing shard": (
        name_missing_shards,
        MissingInput, r"index\.json names files that are not there: model-1\.safetensors, model-2\.safetensors",
    ),
    "a missing tensor": (
        remove_tensor, InputError, r"copy lacks weights of its model: model\.layers\.1\.mlp\.up_proj\.weight; copy it",
    ),
    "another model's config": (
        lambda folder: change_json(folder / "config.json", intermediate_size=160),
        InputError, r"mlp\.gate_proj\.weight is \[176, 64\], config\.json makes it \[160, 64\]; they are not of one",
    ),
    "no tokenizer": (remove_tokenizer, MissingInput, r"no usable tokenizer in .*copy"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused_in_a_sentence(load, copy, damage):
    change, error, message = DAMAGES[damage]
    change(copy)
    with pytest.raises(error, match=message) as refused:
        load(copy)
    assert "Traceback" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_rope_without_its_numbers_is_refused_in_a_sentence(load, copy):
    change_json(copy / "config.json", rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0})
    with pytest.raises(InputError, match="factor"):
        load(copy)


def test_another_models_tokenizer_is_refused(load, copy, real):
    shutil.copy(real / "llama-tokenizer" / "tokenizer.model", copy)
    (copy / "tokenizer.json").unlink()  # with the right vocabulary it would hold
    with pytest.raises(InputError, match=r"the tokenizer has 32000 tokens, the embedding of .*copy 400 rows"):
        load(copy)


# Memory -------------------------------------------------------------------------------------------------------------


def have_free(monkeypatch, num_bytes: int) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: num_bytes)


def test_too_little_memory_names_the_sizes(load, llama_folder, monkeypatch):
    config, running = loading.read_llama(llama_folder), max_running(ServerSettings())
    have_free(monkeypatch, working_bytes(config, torch.float32, num_tokens=running + 128, num_sampled=running))
    sizes = r"0\.0\d GB are free after the weights, .* a step takes 0\.0\d GB and .* 0\.001 MB a token"
    with pytest.raises(NotEnoughSpace, match=rf"{sizes}: no request fits"):
        load()


def test_a_scarce_cache_cuts_the_context_and_names_it(load, llama_folder, monkeypatch):
    config = loading.read_llama(llama_folder)
    settings = ServerSettings(concurrency=2, memory_fraction=1.0)
    running = max_running(settings)
    working = working_bytes(config, torch.float32, num_tokens=running + 128, num_sampled=running)
    have_free(monkeypatch, working + 4 * 11 * BLOCK_SIZE * config.kv_elements_per_token() * torch.float32.itemsize)
    engine = load(concurrency=2, memory_fraction=1.0)
    assert engine.max_context == 10 * BLOCK_SIZE
    asked = request(max_new_tokens=156, min_new_tokens=156)
    assert len(tokens(engine.submit(asked))[0]) == 156  # all of the cache
    with pytest.raises(PromptTooLong, match=r"answer \(up to 157\) need 161 tokens; this server has room for 160"):
        engine.submit(request(max_new_tokens=157))
    with pytest.raises(PromptTooLong, match=r"the prompt is \d+ tokens long and the model's context is 160"):
        make_request(PredictionInputs(prompt="word " * 100), engine.tokenizer, max_context=engine.max_context)


def lose_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_weights_that_do_not_fit_are_said_to(load, monkeypatch):
    monkeypatch.setattr(loading, "load_llama", lose_memory)
    with pytest.raises(NotEnoughSpace, match=r"does not suffice for .* none: .* set ALPACA_QUANTIZATION to int8"):
        load()


@pytest.mark.parametrize("step", ["KeyValueCache", "_warm_up", "answer_one_request"])
def test_what_comes_after_the_weights_and_does_not_fit_is_said_to(load, monkeypatch, step):
    monkeypatch.setattr(loading, step, lose_memory)
    with pytest.raises(NotEnoughSpace, match=r"ALPACA_MEMORY_FRACTION|COG_MAX_CONCURRENCY"):
        load()


# Beam search ------------------------------------------------------------------------------------------------------


def generate(folder: Path, **options) -> list[list[int]]:
    """transformers' own generate, each answer up to EOS."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=2, pad_token_id=2, **options
    )
    rows = [ids[len(PROMPT) :] for ids in out.tolist()]
    return [ids[: ids.index(2)] if 2 in ids else ids for ids in rows]


def test_beam_search_is_transformers_and_is_loaded_when_wanted(load, llama_folder, caplog):
    caplog.set_level(logging.INFO)
    engine = load(engine="llama")
    greedy = tokens(engine.submit(request(min_new_tokens=20)))
    assert "beam search" not in caplog.text
    expected = generate(llama_folder, num_beams=3, max_new_tokens=20)
    assert tokens(engine.submit(request(num_beams=3))) == expected
    assert caplog.messages.count("num_beams 3: beam search, by the transformers engine") == 1
    two = generate(llama_folder, num_beams=4, num_return_sequences=2, max_new_tokens=12, min_new_tokens=12)
    assert two[0] != two[1]
    assert tokens(engine.submit(request(num_beams=4, n=2, max_new_tokens=12, min_new_tokens=12))) == two
    assert "a second time" not in caplog.text
    assert tokens(engine.submit(request(min_new_tokens=20))) == greedy != expected


def test_beams_wanted_at_once_load_one_engine_and_end_with_it(load, monkeypatch, llama_folder):
    made: list[Engine] = []
    make = transformers_engine.TransformersEngine
    monkeypatch.setattr(
        transformers_engine, "TransformersEngine", lambda *args, **given: made.append(make(*args, **given)) or made[-1]
    )
    engine = load(engine="llama")
    answers: list[list[list[int]]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(tokens(engine.submit(request(num_beams=2))))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [generate(llama_folder, num_beams=2, max_new_tokens=20)] * 4
    assert len(made) == 1
    engine.close()
    assert not made[0].is_healthy()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_search_by_beams_without_a_second_copy(load, quantization):
    engine = load(engine="llama", quantization=quantization)
    found = tokens(engine.submit(request(num_beams=3, n=2)))
    assert len(found) == 2
    assert found[0] != found[1]


@pytest.mark.slow
def test_beams_of_many_prompts_are_transformers(load, llama_folder):
    """200 prompts and settings. Random weights have near ties, so that in float32 a few may part at even beams."""
    engine, rng, num_equal = load(engine="llama"), random.Random(0), 0
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    for _ in range(200):
        ids = (1, *(rng.randrange(3, 400) for _ in range(rng.randint(1, 40))))
        beams, new = rng.randint(2, 8), rng.randint(1, 24)
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
            num_beams=beams, max_new_tokens=new, eos_token_id=2, pad_token_id=2,
        )[0, len(ids) :].tolist()  # fmt: skip
        expected = out[: out.index(2)] if 2 in out else out
        num_equal += tokens(engine.submit(request(prompt_ids=ids, num_beams=beams, max_new_tokens=new))) == [expected]
    assert num_equal >= 198


def test_a_closed_engine_takes_no_beam_search(load):
    engine = load(engine="llama")
    engine.close()
    with pytest.raises(EngineClosed, match="shut down"):
        engine.submit(request(num_beams=2))
