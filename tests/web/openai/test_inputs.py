"""OpenAI's words as the Predictor's inputs, and what is refused by name."""

import dataclasses
import json

import pytest

from alpaca.serving.request import PredictionInputs
from web.openai.inputs import Asked, Models, read_body, read_chat, read_completion
from web.openai.refusals import Refusal

MODELS = Models(base="alpaca", adapters=("poet",))
SAID = [{"role": "user", "content": "hi"}]
SHARED = {"temperature": 1.0, "details": True}
RAW = {"prompt": "hi", "prompt_template": "{prompt}", "max_new_tokens": 16, **SHARED}


def complete(**fields: object) -> Asked:
    return read_completion({"model": "alpaca", "prompt": "hi", **fields}, MODELS)


def chat(**fields: object) -> Asked:
    return read_chat({"model": "alpaca", "messages": SAID, **fields}, MODELS)


def test_a_completion_is_the_raw_text():
    assert complete() == Asked(is_chat=False, model="alpaca", inputs=(RAW,))


def test_a_chat_goes_on_until_the_context_ends():
    expected = {"messages": SAID, "max_new_tokens": 2**31 - 1, **SHARED}
    assert chat() == Asked(is_chat=True, model="alpaca", inputs=(expected,))
    assert chat(max_tokens=5).inputs[0]["max_new_tokens"] == 5
    assert chat(max_tokens=5, max_completion_tokens=6).inputs[0]["max_new_tokens"] == 6


def test_fields_that_are_passed_have_the_predictors_names():
    given = {
        "temperature": 0, "top_p": 0.5, "presence_penalty": 1, "frequency_penalty": -1.5, "n": 3, "seed": 7.0,
        "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "stop": "x",
    }  # fmt: skip
    asked = complete(**given)
    assert asked.inputs == ({**RAW, **given, "seed": 7, "stop": ["x"]},)
    assert asked.inputs[0].keys() <= {field.name for field in dataclasses.fields(PredictionInputs)} | {"details"}
    assert asked.n == 3


def test_what_asks_for_nothing_is_no_input():
    nothing = {"logit_bias": {}, "best_of": 1, "suffix": "", "user": "me", "stop": [], "tools": []}
    assert complete(**nothing).inputs == ({**RAW, "stop": []},)
    body = read_body(json.dumps({"model": "alpaca", "prompt": "hi", "seed": None, "tools": None}).encode())
    assert read_completion(body, MODELS) == complete()


def test_several_prompts_are_several_predictions():
    asked = complete(prompt=["a", "b"], n=2, seed=1)
    assert [values["prompt"] for values in asked.inputs] == ["a", "b"]
    assert all(values["seed"] == 1 and values["n"] == 2 for values in asked.inputs)


def test_an_adapter_is_a_model():
    assert complete(model="poet").inputs[0]["replicate_weights"] == "poet"
    assert "replicate_weights" not in complete().inputs[0]


def test_one_completion_is_streamed_and_several_come_whole():
    assert complete(stream=True).inputs[0]["stream"] is True
    asked = complete(stream=True, n=2)
    assert (asked.streams, "stream" in asked.inputs[0]) == (True, False)


def test_log_probabilities():
    assert complete(logprobs=0).inputs[0]["logprobs"] == 0
    assert chat(logprobs=True).inputs[0]["logprobs"] == 0
    assert chat(logprobs=True, top_logprobs=4).inputs[0]["logprobs"] == 4
    assert "logprobs" not in chat(logprobs=False).inputs[0]


def test_the_prompts_tokens_are_scored_only_where_that_is_seen():
    echoed = complete(echo=True)
    assert (echoed.echoes, "echo" in echoed.inputs[0]) == (("hi",), False)
    assert complete(echo=True, logprobs=1).inputs[0]["echo"] is True
    assert complete(echo=True, max_tokens=0).inputs[0]["echo"] is True


PERSON = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}, PERSON),
        ({"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}, PERSON),
        ({"type": "json_schema", "json_schema": {"name": "p", "strict": None, "description": "d"}}, {}),
    ],
)
def test_a_response_format_is_a_schema(given, schema):
    assert chat(response_format=given).inputs[0]["json_schema"] == schema
    assert complete(response_format=given).inputs[0]["json_schema"] == schema


def test_a_response_format_of_any_text_is_no_input():
    assert "json_schema" not in chat(response_format={"type": "text"}).inputs[0]


@pytest.mark.parametrize(
    ("given", "message", "param"),
    [
        ({"type": "xml"}, "types text, json_object and json_schema; found 'xml'", "response_format.type"),
        ("json", "types text, json_object and json_schema; found 'json'", "response_format.type"),
        ({}, "types text, json_object and json_schema; found {}", "response_format.type"),
        ({"type": "json_schema"}, "must be an object with a name and a schema", "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "with a name", "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "p", "schema": []}},
            "schema must be an object",
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "p", "strict": 1}},
            "strict must be true or false",
            "response_format.json_schema.strict",
        ),
    ],
)
def test_mistakes_in_a_response_format(given, message, param):
    with pytest.raises(Refusal, match=message) as refused:
        chat(response_format=given)
    assert refused.value.param == param


def test_messages_keep_role_and_content():
    parts = [{"type": "text", "text": "a"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": []},
    ]
    assert chat(messages=messages).inputs[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "b"},
    ]


@pytest.mark.parametrize(
    "name",
    ["tools", "tool_choice", "functions", "audio", "logit_bias", "suffix", "best_of", "store"],
)
def test_what_cannot_be_honoured_is_refused_by_name(name):
    with pytest.raises(Refusal, match=f"this server has no {name}: leave it out") as refused:
        chat(**{name: 2})
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"prompt": [1, 2]}, "prompt: this server takes texts, no token ids", "prompt"),
        ({"prompt": [[1, 2]]}, "prompt: this server takes texts, no token ids", "prompt"),
        ({"prompt": ["a", 1]}, "prompt must be a text, or a list of texts", "prompt"),
        ({"prompt": []}, "prompt must be a text, or a list of texts", "prompt"),
        ({"prompt": ["a"] * 513}, "prompt may hold 512 texts; found 513", "prompt"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number; found 1.5", "max_tokens"),
        ({"max_tokens": True}, "max_tokens must be a whole number; found True", "max_tokens"),
        ({"temperature": "hot"}, "temperature must be a number; found 'hot'", "temperature"),
        ({"temperature": float("inf")}, "temperature must be a number; found inf", "temperature"),
        ({"stream": 1}, "stream must be true or false; found 1", "stream"),
        ({"stop": [1]}, "stop must be a text, or a list of texts", "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options goes with stream alone", "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options has include_usage", "stream_options"),
        ({"colour": "red"}, "unknown field 'colour'", "colour"),
        ({"messages": SAID}, "unknown field 'messages'", "messages"),
        ({"model": "gpt"}, "no model 'gpt' here; there is alpaca, poet", "model"),
        ({"model": ["alpaca"]}, r"no model \['alpaca'\] here", "model"),
    ],
)
def test_mistakes_in_a_completion(fields, message, param):
    with pytest.raises(Refusal, match=message) as refused:
        complete(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("messages", "message", "param"),
    [
        ([], "messages must be a list", "messages"),
        ("hi", "messages must be a list", "messages"),
        (["hi"], r"messages\[0\] must be an object", "messages[0]"),
        ([{"role": "user"}], r"messages\[0\] must have a role and a content", "messages[0]"),
        ([*SAID, {"role": "tool", "content": "x"}], "this server has no tools", "messages[1].role"),
        ([{**SAID[0], "name": "me"}], r"messages\[0\] has 'name'", "messages[0].name"),
        ([{**SAID[0], "tool_calls": [1]}], r"messages\[0\] has 'tool_calls'", "messages[0].tool_calls"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            "parts of type text; found 'image_url'",
            "messages[0].content[1].type",
        ),
    ],
)
def test_mistakes_in_messages(messages, message, param):
    with pytest.raises(Refusal, match=message) as refused:
        chat(messages=messages)
    assert refused.value.param == param


def test_top_logprobs_needs_logprobs():
    with pytest.raises(Refusal, match="top_logprobs needs logprobs to be true"):
        chat(top_logprobs=2)


def test_a_model_must_be_named():
    with pytest.raises(Refusal, match="model is missing"):
        read_completion({"prompt": "hi"}, MODELS)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[" * 100_000, b'{"seed": NaN}', b'{"seed": 1' + b"0" * 5000 + b"}"]
)
def test_what_is_no_json(content):
    with pytest.raises(Refusal, match="the request's body is no JSON"):
        read_body(content)


def test_what_is_no_object():
    with pytest.raises(Refusal, match="expected the request's body to be a JSON object"):
        read_body(b"[]")
