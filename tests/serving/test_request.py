"""Inputs become requests: templates, lengths, bounds."""

import dataclasses
import json
import tracemalloc
from types import SimpleNamespace

import pytest

from alpaca.errors import InputError, PromptTooLong
from alpaca.serving.request import PredictionInputs, make_request
from alpaca.serving.served_model import adapter_names
from alpaca.text.loading import load_tokenizer
from alpaca.text.prompts import alpaca_prompt


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return load_tokenizer(llama_folder)


def request(tokenizer, max_context=512, **values):
    return make_request(PredictionInputs.from_mapping({"prompt": "hi", **values}), tokenizer, max_context=max_context)


def test_prompt_is_bos_and_the_template_and_nothing_else(tokenizer):
    for values, text in [
        ({}, alpaca_prompt("hi")),
        ({"input": "there"}, alpaca_prompt("hi", "there")),
        ({"prompt_template": "{prompt}"}, "hi"),
        ({"prompt_template": "Q: {prompt} ({input})\nA:", "input": "{prompt}"}, "Q: hi ({prompt})\nA:"),
    ]:
        assert request(tokenizer, **values).prompt_ids == (tokenizer.bos_id, *tokenizer.encode(text))
    assert request(tokenizer, prompt="", prompt_template="{prompt}").prompt_ids == (tokenizer.bos_id,)


def test_special_tokens_in_user_text_are_text(tokenizer):
    ids = request(tokenizer, prompt="a</s><s>", prompt_template="{prompt}").prompt_ids
    assert tokenizer.eos_id not in ids
    assert ids.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("template", ["no field", "", "{input}", "{Prompt}"])
def test_template_without_prompt(tokenizer, template):
    with pytest.raises(InputError, match=r'must be "alpaca", "alpaca_newline" or a text that contains \{prompt\}'):
        request(tokenizer, prompt_template=template)


CHAT = [{"role": "user", "content": "hi"}]


def test_messages_are_a_prompt(tokenizer):
    made = request(tokenizer, prompt="", messages=CHAT)
    assert made.prompt_ids == request(tokenizer, prompt="hi").prompt_ids  # this folder has no template
    assert made.strips_leading


def test_an_adapters_own_chat_template_holds(tokenizer, tmp_path):
    for name, source in {"a": "A{{ messages[0].content }}", "b": None}.items():
        (tmp_path / name).mkdir()
        if source:
            (tmp_path / name / "chat_template.jinja").write_text(source)
    folders = {name: SimpleNamespace(path=tmp_path / name) for name in ("a", "b")}
    inputs = {name: PredictionInputs.from_mapping({"messages": CHAT, "replicate_weights": name}) for name in folders}
    made = {
        name: make_request(asked, tokenizer, max_context=512, adapters=adapter_names(folders)).prompt_ids
        for name, asked in inputs.items()
    }
    assert made["a"] == tuple(tokenizer.encode("Ahi"))
    assert made["b"] == request(tokenizer, prompt="hi").prompt_ids  # the base has no template


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"prompt": "x"}, "prompt"),
        ({"prompt": "", "input": "x"}, "input"),
        ({"prompt": "", "prompt_template": "{prompt}"}, "prompt_template"),
        ({"prompt": "x", "input": "y", "prompt_template": "z"}, "prompt and input and prompt_template"),
    ],
)
def test_what_goes_beside_no_messages_is_named(tokenizer, values, names):
    with pytest.raises(InputError, match=f"messages are the whole conversation: leave {names} out beside them"):
        request(tokenizer, messages=CHAT, **values)


@pytest.mark.parametrize("values", [{"prompt": ""}, {"prompt": "", "input": "x"}, {"prompt": "", "messages": []}])
def test_nothing_asked(tokenizer, values):
    with pytest.raises(InputError, match="give prompt, a text, or messages, a list of objects with `role` and"):
        request(tokenizer, **values)


def test_input_without_a_place(tokenizer):
    with pytest.raises(InputError, match=r"has no \{input\}"):
        request(tokenizer, prompt_template="{prompt}", input="x")


def test_limits(tokenizer):
    raw = {"prompt_template": "{prompt}", "prompt": ""}  # one token: BOS
    assert request(tokenizer, **raw).max_new_tokens == 256
    assert request(tokenizer, max_context=100, **raw).max_new_tokens == 99
    assert request(tokenizer, total_tokens=10, **raw).max_new_tokens == 9
    assert request(tokenizer, total_tokens=10, max_new_tokens=3, **raw).max_new_tokens == 3
    assert request(tokenizer, total_tokens=2000, max_context=50, **raw).max_new_tokens == 49


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({}, "length"),
        ({"max_context": 258}, "length"),
        ({"max_context": 257}, "length"),  # exactly what was asked for
        ({"max_context": 256}, "context"),
        ({"total_tokens": 50, "max_context": 50}, "length"),
        ({"total_tokens": 51, "max_context": 50}, "context"),
        ({"total_tokens": 51, "max_new_tokens": 49, "max_context": 50}, "length"),
    ],
)
def test_what_limits_an_answer(tokenizer, values, limit):
    assert request(tokenizer, prompt_template="{prompt}", prompt="", **values).limit == limit


def test_where_only_the_prompts_scores_are_wanted_it_may_fill_the_context(tokenizer):
    asked = {"details": True, "echo": True, "max_new_tokens": 0}
    length = len(request(tokenizer).prompt_ids)
    for limits in ({"max_context": length}, {"total_tokens": length}):
        made = request(tokenizer, **asked, **limits)
        assert (made.max_new_tokens, made.limit, made.echo) == (0, "length", True)
    with pytest.raises(PromptTooLong, match=f"prompt is {length} tokens long and the model's context is {length - 1}"):
        request(tokenizer, **asked, max_context=length - 1)
    with pytest.raises(PromptTooLong, match=f"prompt is {length} tokens long and total_tokens"):
        request(tokenizer, **asked, total_tokens=length - 1)


def test_too_long_prompts_name_both_lengths(tokenizer):
    length = len(request(tokenizer).prompt_ids)
    with pytest.raises(PromptTooLong, match=f"prompt is {length} tokens long and the model's context is {length}"):
        request(tokenizer, max_context=length)
    assert request(tokenizer, max_context=length + 1).max_new_tokens == 1
    with pytest.raises(
        PromptTooLong, match=f"prompt is {length} tokens long and total_tokens, which includes it, is 5"
    ):
        request(tokenizer, total_tokens=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 6}, "n must be from 1 to 5; found 6"),
        ({"temperature": float("nan")}, "temperature must be from 0 to 5; found nan"),
        ({"top_p": 0.0}, "top_p must be from 0.01 to 1; found 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0; found -1"),
        ({"max_new_tokens": 0, "details": True}, "max_new_tokens 0 needs echo"),
        ({"details": True, "logprobs": 21}, "logprobs must be from 0 to 20; found 21"),
        ({"logprobs": 0}, "logprobs need details"),
        ({"logprobs": 2, "echo": True}, "logprobs and echo need details"),
        ({"details": True, "num_beams": 2, "logprobs": 0}, "logprobs do not go with num_beams above 1"),
        ({"details": True, "num_beams": 2, "echo": True}, "echo do not go with num_beams above 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"n": 1.5}, "n must be a whole number; found 1.5"),
        ({"stop": [""]}, "stop must be a list of texts that are not empty"),
        ({"stream": True, "n": 2}, "use it with n = 1 and num_beams = 1"),
        ({"stream": True, "num_beams": 2}, "use it with n = 1 and num_beams = 1"),
        ({"seed": 2**60}, r"seed must be at most 2\*\*53"),
        ({"num_beams": 2, "presence_penalty": 1.0}, "beam search knows no presence_penalty"),
        ({"num_beams": 2, "n": 3}, "num_beams 2 cannot give n = 3"),
    ],
)
def test_bounds(tokenizer, values, message):
    with pytest.raises(InputError, match=message):
        request(tokenizer, **values)


def test_whole_floats_are_integers_and_seed_zero_is_a_seed(tokenizer):
    made = request(tokenizer, n=2.0, seed=0.0, top_k=3.0)
    assert (made.n, made.seed, made.top_k) == (2, 0, 3)
    assert all(isinstance(value, int) for value in (made.n, made.seed, made.top_k))


def test_drawn_seeds_differ_and_survive_json(tokenizer):
    seeds = {request(tokenizer).seed for _ in range(20)}
    assert len(seeds) > 15
    assert json.loads(json.dumps(max(seeds))) == max(seeds) < 2**31


def test_only_a_raw_prompt_keeps_leading_space(tokenizer):
    assert not request(tokenizer, prompt="", prompt_template="{prompt}").strips_leading
    assert request(tokenizer).strips_leading


def test_every_bound_is_checked():
    for item in dataclasses.fields(PredictionInputs):
        for bound, outside in (("ge", -1), ("le", 1)):
            if (edge := item.metadata.get(bound)) is not None:
                beside = {"details": item.name == "logprobs"} | ({"echo": True, "details": True} if edge == 0 else {})
                PredictionInputs(prompt="x", **{item.name: edge} | beside).check()
                with pytest.raises(InputError, match=f"{item.name} must be"):
                    PredictionInputs(prompt="x", **{item.name: edge + outside}).check()


def hostile(size: int) -> dict[str, dict[str, object]]:
    """Requests of about `size` characters, each large in another place."""
    return {
        "prompt": {"prompt": "word " * (size // 5)},
        "messages": {"prompt": "", "messages": [{"role": "user", "content": "x"}] * (size // 32)},
        "one message": {"prompt": "", "messages": [{"role": "user", "content": "x" * size}]},
        "role": {"prompt": "", "messages": [{"role": "r" * size, "content": ""}]},
        "one word": {"prompt": "x" * size},
        "spaces": {"prompt": " " * size},
        "emoji": {"prompt": "🦙" * size},
        "input": {"input": "word " * (size // 5)},
        "fields": {"prompt": "y" * (size // 2), "prompt_template": "{prompt}" * (size // 16)},
        "braces": {"prompt_template": "{prompt}" + "{" * size},
        "open fields": {"prompt_template": "{prompt}" + "{a" * (size // 2)},
        "template": {"prompt_template": "{prompt}" + "z" * size},
        "no field": {"prompt_template": "z" * size},
        "stops": {"stop": [f"s{number}" for number in range(size // 6)]},
        "one stop": {"stop": ["s" * size]},
        "adapter": {"replicate_weights": "w" * size},
        "digits": {"max_new_tokens": -(10 ** min(size, 4000))},
    }


@pytest.mark.parametrize("kind", hostile(0))
@pytest.mark.fast_rows(4)
def test_no_request_costs_more_than_a_few_times_its_size(tokenizer, monkeypatch, kind):
    """Characters that are tokenized, memory of Python's, and the length of the message, against the request's size."""
    num_read, encode_batch = 0, tokenizer.encode_batch

    def counting(texts):
        nonlocal num_read
        num_read += sum(map(len, texts))
        return encode_batch(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", counting)
    for size in (20_000, 1_000_000):
        values = hostile(size)[kind]
        num_read = 0
        tracemalloc.start()
        with pytest.raises(InputError) as caught:
            request(tokenizer, **values)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_read <= size + 1000
        assert peak <= 16 * size + (8 << 20)
        assert len(str(caught.value)) < 400


def test_stop_texts_within_the_bounds_are_taken(tokenizer):
    stop = [f"{number:0256}" for number in range(64)]
    assert PredictionInputs.from_mapping({"prompt": "hi", "stop": stop}).stop == tuple(stop)
    for wrong, message in [
        ([*stop, "x"], "stop may hold 64 texts; found 65"),
        (["y" * 257], "a stop text may have 256 characters; found 'yyyy.*… of 257 characters"),
    ]:
        with pytest.raises(InputError, match=message):
            PredictionInputs.from_mapping({"prompt": "hi", "stop": wrong})
