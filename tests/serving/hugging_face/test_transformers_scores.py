"""The transformers engine's scores are the model's own log-softmax, and why an answer ended is said."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca.errors import InputError, NumbersOverflow
from alpaca.serving.hugging_face.decoding import MOST_PATIENT, WAYS
from alpaca.serving.hugging_face.engine import TransformersEngine
from alpaca.text.loading import load_tokenizer
from tests.serving.hugging_face.test_transformers_engine import CONFIGS, request, tokens
from tests.serving.llama.test_scores import check

LONG = tuple(3 + i * 7 % 390 for i in range(200))
OTHER_WAYS = [WAYS[1], WAYS[2], MOST_PATIENT]  # prompts whole; also once for each row; nothing kept


def make_engine(kind: str, tokenizer, **options) -> TransformersEngine:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return TransformersEngine(model, tokenizer, max_context=256, **options)


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return load_tokenizer(llama_folder)


def oracle(engine: TransformersEngine, num_ids: int = 400):
    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        return engine._model(torch.tensor([ids]), use_cache=False).logits[0, :, :num_ids]

    return logits


ASKED = [
    {"logprobs": 3},
    {"logprobs": 0, "temperature": 1.0, "n": 3},
    {"logprobs": 5, "temperature": 0.8, "repetition_penalty": 1.5, "echo": True},
    {"echo": True, "n": 2, "temperature": 1.0},
    {"echo": True, "logprobs": 1, "max_new_tokens": 0, "n": 2},
    {"echo": True, "max_new_tokens": 0, "prompt_ids": (1,)},
    {"temperature": 1.0},
]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.fast_rows(1)
def test_scores_are_the_models(tokenizer, kind):
    engine = make_engine(kind, tokenizer)
    for asked in [*ASKED, {"echo": True, "logprobs": 2, "prompt_ids": LONG}]:
        check(engine.submit(request(**asked)), oracle(engine))
    engine.close()


@pytest.mark.parametrize("way", OTHER_WAYS)
@pytest.mark.fast_rows(1)
def test_in_other_ways_too_and_long_prompts_are_refused_where_they_are_computed_whole(tokenizer, way, monkeypatch):
    engine = make_engine("llama", tokenizer, way=way)
    for asked in ASKED:
        check(engine.submit(request(**asked)), oracle(engine))
    monkeypatch.setattr("alpaca.serving.hugging_face.decoding.PREFILL_TOKENS", 199)
    with pytest.raises(InputError, match=r"computed whole, so echo takes prompts of up to \d+ tokens; found 200"):
        engine.submit(request(prompt_ids=LONG, echo=True))
    tokens(engine.submit(request(prompt_ids=LONG)))
    engine.close()


def test_no_more_of_a_prompts_logits_at_once_than_a_piece(tokenizer, monkeypatch):
    engine = make_engine("llama", tokenizer)
    longest, forward = 0, engine._model.forward

    def watched(*args, **values):
        nonlocal longest
        output = forward(*args, **values)
        longest = max(longest, output.logits.shape[1])
        return output

    engine._model.forward = watched
    generation = engine.submit(request(prompt_ids=LONG, echo=True, max_new_tokens=0))
    tokens(generation)
    engine._model.forward = forward
    assert len(generation.prompt_scores) == 199
    assert longest == 64
    engine.close()


def test_a_prompt_whose_logits_are_no_numbers_is_refused(tokenizer, caplog):
    engine = make_engine("llama", tokenizer)
    with torch.no_grad():
        engine._model.model.embed_tokens.weight[55] = float("nan")
    with pytest.raises(NumbersOverflow, match="not finite"):
        tokens(engine.submit(request(prompt_ids=(1, 55, 60), echo=True, max_new_tokens=0)))
    engine.close()


def test_why_an_answer_ended(tokenizer):
    engine = make_engine("llama", tokenizer)
    seen = set()
    for asked in [{"temperature": 1.5, "seed": seed} for seed in range(8)] + [{"num_beams": 3, "n": 2}]:
        generation = engine.submit(request(max_new_tokens=50, **asked, limit="context"))
        counts = [0] * generation.request.n
        for event in generation.events():
            if hasattr(event, "reason"):
                assert event.reason == ("stop" if counts[event.completion] < 50 else "context")
                seen.add(event.reason)
            else:
                counts[event.completion] += 1
    assert seen == {"stop", "context"}
    engine.close()
