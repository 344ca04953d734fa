"""Every way of decoding gives what one forward pass over the whole text gives, and the quickest right one is found."""

import dataclasses
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from alpaca.errors import NumbersOverflow, UnsupportedModel
from alpaca.serving.engine import GenerationCancelledError
from alpaca.serving.hugging_face import proof
from alpaca.serving.hugging_face.decoding import MOST_PATIENT, QUICKEST, WAYS, find_border
from alpaca.serving.hugging_face.engine import TransformersEngine
from alpaca.serving.hugging_face.proof import find_way
from alpaca.text.loading import load_tokenizer
from bench.model_types import plain_answers
from bench.tiny_models import randomise, tiny_config, tiny_model
from tests.serving.hugging_face.test_transformers_engine import request, tokens

IDS = range(4, 400)
PROMPT = (1, *range(40, 70))
LLAMA = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return load_tokenizer(llama_folder)


def asked(**changes):
    return request(**{"prompt_ids": PROMPT, "max_new_tokens": 6, **changes})


# What is found ----------------------------------------------------------------------------------------------------

FOUND = {
    "mamba": ("own", True),  # its state is in no cache that the engine could make
    "rwkv": ("own", False),  # and rows of RWKV's mix one token's states
    "openai-gpt": ("none", True),  # keeps nothing
    "jamba": ("cache", True),  # but its prompts may not be cut
    "qwen3_next": ("cache", True),
    "megatron-bert": ("none", True),  # counts positions from 0 again
    "gpt_oss": ("cache", True),
}


@pytest.fixture(scope="module", params=FOUND)
def served(request, tokenizer):
    """A tiny model of a type, and an engine that serves it."""
    model = tiny_model(request.param)
    way = find_way(model, IDS, max_context=64)
    memory, shares = FOUND[request.param]
    assert (way.memory, not way.rows_apart) == (memory, shares)
    assert way.in_pieces == (request.param in ("qwen3_next", "gpt_oss"))
    engine = TransformersEngine(model, tokenizer, max_context=64, way=way)
    yield model, engine
    engine.close()


@pytest.mark.fast_rows(2)
def test_answers_are_those_of_plain_forward_passes(served):
    model, engine = served
    for case in (asked(), asked(n=3, temperature=1.0), asked(n=2, temperature=2.0, prompt_ids=(7,))):
        assert tokens(engine.submit(case)) == plain_answers(model, case, 400)


@pytest.mark.fast_rows(2)
def test_several_at_once_and_one_cancelled(served):
    model, engine = served
    cases = [asked(), asked(max_new_tokens=30, min_new_tokens=30), asked(n=2, temperature=1.0, seed=8)]
    first, cancelled, last = (engine.submit(case) for case in cases)
    cancelled.cancel()
    with pytest.raises(GenerationCancelledError):
        list(cancelled.events())
    assert tokens(first) == plain_answers(model, cases[0], 400)
    assert tokens(last) == plain_answers(model, cases[2], 400)


@pytest.mark.parametrize(
    "way", WAYS, ids=lambda way: f"{way.memory}-{way.in_pieces}-{way.copies_rows}-{way.rows_apart}"
)
@pytest.mark.fast_rows(2)
def test_all_ways_answer_alike_where_the_usual_one_is_right(tokenizer, way, monkeypatch):
    monkeypatch.setattr("alpaca.serving.hugging_face.decoding.PREFILL_TOKENS", 7)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    randomise(model)
    engine = TransformersEngine(model, tokenizer, max_context=128, way=way)
    full = asked(n=4, temperature=1.5, max_new_tokens=12)
    generation = engine.submit(full)
    generation.stop(1)  # so that rows are dropped on the way
    rows = tokens(generation)
    engine.close()
    want = plain_answers(model, full, 400)
    assert rows[1] == []
    assert [rows[0], rows[2], rows[3]] == [want[0], want[2], want[3]]


# What is noticed --------------------------------------------------------------------------------------------------


class ForgetfulLlama(LlamaForCausalLM):
    """Keys and values beyond the first few are forgotten whenever a cache is given."""

    lost_from = 3

    def forward(self, *args, past_key_values=None, **kwargs):
        output = super().forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            for layer in past_key_values.layers:
                layer.values[:, :, self.lost_from :] = 0
        return output


def llama(kind=LlamaForCausalLM) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = kind(LlamaConfig(**LLAMA)).eval()
    randomise(model)
    return model


def test_a_model_as_most_are_is_served_the_quick_way(caplog):
    caplog.set_level(logging.INFO)
    assert find_way(llama(), IDS) == QUICKEST
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "held against plain forward passes over 520 tokens" in caplog.text


def test_a_cache_that_forgets_is_noticed_and_the_log_says_what_it_costs(caplog):
    assert find_way(llama(ForgetfulLlama), IDS, max_context=64).memory == "none"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "this llama model is served in a slower way than others: every token computes the whole text" in warning
    assert "The usual way gives other logits than one forward pass over the whole text, by " in warning


def test_half_precision_tells_rounding_from_a_lost_past():
    for kind, expected in ((LlamaForCausalLM, QUICKEST.memory), (ForgetfulLlama, "none")):
        assert find_way(llama(kind).bfloat16(), IDS, max_context=64).memory == expected


def test_attention_is_computed_plainly_where_the_fused_kind_differs(caplog):
    """transformers' fused attention has another mask for Doge than its plain one."""
    doge = tiny_model("doge")
    assert find_way(doge, IDS, max_context=64) == QUICKEST
    assert doge.config._attn_implementation == "eager"
    assert "this doge model computes attention plainly" in caplog.text
    usual = llama()
    find_way(usual, IDS, max_context=64)
    assert usual.config._attn_implementation == "sdpa"


def test_large_models_are_tried_with_few_tokens(monkeypatch):
    model = llama()
    monkeypatch.setattr(model, "num_parameters", lambda: 7_000_000_000)
    seen = []
    monkeypatch.setattr(proof, "_find_difference", lambda model, way, texts: seen.append(texts[0].prompt.shape))
    assert find_way(model, IDS, prefix=[1]) == QUICKEST
    assert seen == [(1, 24)]


def test_an_encoder_is_computed_whole_each_time(tokenizer):
    config = tiny_config("bert")
    config.is_decoder = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    way = find_way(model, IDS, max_context=64)
    assert way.memory == "none"
    engine = TransformersEngine(model, tokenizer, max_context=64, way=way)
    case = asked(n=2, temperature=1.0)
    assert tokens(engine.submit(case)) == plain_answers(model, case, 400)
    engine.close()


# What is refused --------------------------------------------------------------------------------------------------


class NeedsPictures(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        raise ValueError("You must specify pixel_values")


class Random(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        logits = super().forward(*args, **kwargs).logits
        return CausalLMOutputWithPast(logits=logits + torch.randn_like(logits))


class OutOfMemory(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (NeedsPictures, UnsupportedModel, "type llama cannot be served: .* picture, .*You must specify pixel_values"),
        (Random, UnsupportedModel, "the same forward pass gives other logits each time"),
        (OutOfMemory, torch.OutOfMemoryError, "CUDA out of memory"),
    ],
)
def test_models_that_cannot_be_served_say_why(kind, error, message):
    with pytest.raises(error, match=message):
        find_way(llama(kind), IDS, max_context=64)


def test_weights_that_give_no_numbers_are_named():
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NumbersOverflow, match="computes what is no number"):
        find_way(model, IDS, max_context=64)


@pytest.mark.parametrize("name", ["xlnet", "xlm"])
def test_types_that_fill_in_added_tokens_are_refused_by_name(name):
    with pytest.raises(UnsupportedModel, match=f"of type {name} cannot be served: it does not go on with a text"):
        find_way(tiny_model(name), IDS, max_context=64)


# Rotary factors that depend on the length -------------------------------------------------------------------------


def long_phi(**rope) -> Phi3ForCausalLM:
    spec = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 40,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], **rope,
    }  # fmt: skip
    config = Phi3Config(
        **LLAMA, max_position_embeddings=200, original_max_position_embeddings=40, rope_parameters=spec, pad_token_id=0
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("num_tokens", [20, 31, 40, 41, 90])
@pytest.mark.fast_rows(1)
def test_longrope_turns_by_the_texts_whole_length(tokenizer, monkeypatch, num_tokens):
    """Prompts on both sides of the old context of 40 tokens, and answers that cross it, where all is computed again."""
    monkeypatch.setattr("alpaca.serving.hugging_face.decoding.PREFILL_TOKENS", 16)
    model = long_phi()
    assert find_border(model.config) == 40
    engine = TransformersEngine(model, tokenizer, max_context=200, way=QUICKEST)
    prompt = tuple(range(50, 50 + num_tokens))
    for case in (
        asked(prompt_ids=prompt, max_new_tokens=16, min_new_tokens=16),
        asked(prompt_ids=prompt, max_new_tokens=16, n=2, temperature=1.0),
    ):
        assert tokens(engine.submit(case)) == plain_answers(model, case, 400)
    engine.close()


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def dynamic_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, max_position_embeddings=64, rope_parameters=DYNAMIC)).eval()
    randomise(model)
    return model


def test_dynamic_factors_are_those_of_the_request_alone(tokenizer, monkeypatch):
    """As `generate` has them in a model that answered nothing before: of the prompt, then of each new token."""
    monkeypatch.setattr("alpaca.serving.hugging_face.decoding.PREFILL_TOKENS", 16)
    engine = TransformersEngine(dynamic_llama(), tokenizer, max_context=200, way=QUICKEST)
    for num_tokens in (150, 90, 30, 60):
        prompt = torch.arange(50, 50 + num_tokens)[None]
        want = dynamic_llama().generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=10, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        case = asked(prompt_ids=tuple(prompt[0].tolist()), max_new_tokens=10, min_new_tokens=10)
        assert tokens(engine.submit(case)) == [want[0, num_tokens:].tolist()]
    engine.close()


def test_the_border_is_found_in_every_spelling():
    assert find_border(LlamaConfig(**LLAMA)) is None
    assert find_border(dynamic_llama().config) == 64
    assert find_border(long_phi().config) == 40


@pytest.mark.parametrize("name", ["mamba", "openai-gpt", "rwkv", "gpt_oss"])
@pytest.mark.fast_rows(1)
def test_beams_are_those_of_plain_forward_passes(tokenizer, name):
    model = tiny_model(name)
    engine = TransformersEngine(model, tokenizer, max_context=64, way=find_way(model, IDS, max_context=64))
    prompt = torch.tensor([PROMPT])
    want = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=3, max_new_tokens=6, eos_token_id=2,
        pad_token_id=0, use_cache=False,
    )  # fmt: skip
    found = [token_id for token_id in want[0, prompt.shape[1] :].tolist() if token_id != 2]
    assert tokens(engine.submit(asked(num_beams=3))) == [found]
    engine.close()


def test_patience_is_last():
    assert WAYS[0] == QUICKEST
    assert WAYS[-1] == MOST_PATIENT
    assert [way.cost == "" for way in WAYS] == [True] + [False] * (len(WAYS) - 1)
    assert len({dataclasses.replace(way, cost="") for way in WAYS}) == len(WAYS)
