"""The Predictor's documents as OpenAI's answers: in pieces they say what they say whole."""

import json
from typing import Any

import pytest

from tests.web.openai.fake_server import completion, documents, entry_of, scored
from web.openai.answers import Answer
from web.openai.inputs import Asked, Models, read_chat, read_completion

MODELS = Models(base="m")
PROMPTS = ["one two", "three"]


def chunks(asked: Asked) -> list[dict[str, Any]]:
    answer = Answer(asked)
    found = answer.beginning()
    for prompt, values in enumerate(asked.inputs):
        for document in documents(values):
            found += answer.events_of(prompt, document)
    assert answer.is_complete
    *events, end, rest = (found + answer.ending()).split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def whole(asked: Asked) -> dict[str, Any]:
    answer = Answer(asked)
    for prompt, values in enumerate(asked.inputs):
        for document in documents(values):
            answer.add(prompt, document)
    assert answer.is_complete
    return answer.whole()


def joined(streamed: list[dict[str, Any]]) -> dict[int, tuple[str, list[float], str | None]]:
    """Text, log probabilities and finish_reason of each choice, put together as a client does."""
    found: dict[int, tuple[str, list[float], str | None]] = {}
    for chunk in streamed:
        for choice in chunk["choices"]:
            text, scores, reason = found.get(choice["index"], ("", [], None))
            text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            logprobs = choice["logprobs"] or {}
            scores = scores + logprobs.get("token_logprobs", [e["logprob"] for e in logprobs.get("content", [])])
            found[choice["index"]] = (text, scores, choice["finish_reason"] or reason)
    return found


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"echo": True}, {"max_tokens": 1}]
)
def test_streamed_completions_are_the_whole_ones(n, fields):
    body = {"model": "m", "prompt": PROMPTS, "n": n, **fields}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = chunks(read_completion({**body, **options}, MODELS))
    expected = whole(read_completion(body, MODELS))
    assert {i: (c["text"], (c["logprobs"] or {}).get("token_logprobs", []), c["finish_reason"])
            for i, c in enumerate(expected["choices"])} == joined(streamed)  # fmt: skip
    assert [choice["index"] for choice in expected["choices"]] == list(range(2 * n))
    assert streamed[-1]["usage"] == expected["usage"]
    assert streamed[-1]["choices"] == []
    assert {chunk["usage"] for chunk in streamed[:-1]} == {None}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 1}, {"max_tokens": 1}])
def test_a_streamed_chat_is_the_whole_one(n, fields):
    body = {"model": "m", "messages": [{"role": "user", "content": PROMPTS[0]}], "n": n, **fields}
    streamed = chunks(read_chat({**body, "stream": True}, MODELS))
    expected = whole(read_chat(body, MODELS))
    scores = [[e["logprob"] for e in (c["logprobs"] or {}).get("content", [])] for c in expected["choices"]]
    assert {i: (c["message"]["content"], scores[i], c["finish_reason"])
            for i, c in enumerate(expected["choices"])} == joined(streamed)  # fmt: skip
    assert [chunk["choices"][0]["delta"].get("role") for chunk in streamed[: n + 1]] == ["assistant"] * n + [None]
    assert all("usage" not in chunk for chunk in streamed)


@pytest.mark.parametrize("chat", [False, True])
def test_a_piece_that_is_only_text_is_what_any_other_piece_is(chat):
    """Its text is put between two parts that are made once."""
    text = 'a "quote", \\ and \0 \u2028 \U0001f642 </s>\n'
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    answer = Answer((read_chat if chat else read_completion)({"model": "m", "stream": True, **asked}, MODELS))
    (first, again), last = [answer.events_of(0, {"index": 0, "text": text}) for _ in range(2)], document([], text=text)
    assert first == again
    plain, ended = json.loads(first[6:]), json.loads(answer.events_of(0, last).split(b"\n\n")[0][6:])
    if not chat:  # where the end has a chunk of its own
        ended["choices"][0]["finish_reason"] = None
    assert plain == ended
    assert text in (plain["choices"][0]["delta"]["content"] if chat else plain["choices"][0]["text"])


def test_a_whole_completion():
    found = whole(read_completion({"model": "m", "prompt": "one two", "logprobs": 1, "echo": True}, MODELS))
    assert (found["object"], found["model"], found["id"][:5]) == ("text_completion", "m", "cmpl-")
    assert found["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    (choice,) = found["choices"]
    assert choice["text"] == "one two" + "".join(completion("one two", 0))
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] == {
        "tokens": ["one", " two", " one", " two", " ไ0"],
        "token_logprobs": [-0.5] * 5,
        "top_logprobs": [{" one0": -0.5}, {" two0": -0.5}, {" one0": -0.5}, {" two0": -0.5}, {" ไ00": -0.5}],
        "text_offset": [0, 3, 7, 11, 15],
    }


def document(scores: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    end = {"finish_reason": "stop", "stop": None, "prompt_tokens": 3, "output_tokens": 2, "seed": 1}
    return {"index": 0, "text": "", "logprobs": scores, **end, **values}


def logprobs_of(body: dict[str, Any], scores: list[dict[str, Any]]) -> dict[str, Any]:
    read = read_chat if "messages" in body else read_completion
    answer = Answer(read({"model": "m", **body}, MODELS))
    answer.add(0, document(scores))
    return answer.whole()["choices"][0]["logprobs"]


def test_tokens_that_are_parts_of_characters():
    """By their bytes; the next token's place counts whole characters."""
    parts = [{**entry_of("\ufffd", -1.0), "bytes": [part]} for part in "ไ".encode()]
    scores = [{**part, "top": [part, entry_of("x", -2.0)]} for part in parts] + [scored("y", 0)]
    found = logprobs_of({"prompt": "p", "logprobs": 2}, scores)
    assert found["tokens"] == ["bytes:\\xe0", "bytes:\\xb9", "bytes:\\x84", "y"]
    assert found["text_offset"] == [0, 0, 0, 1]
    assert found["top_logprobs"][0] == {"bytes:\\xe0": -1.0, "x": -2.0}
    chat = logprobs_of({"messages": [{"role": "user", "content": "x"}], "logprobs": True}, scores)
    assert [entry["bytes"] for entry in chat["content"]] == [[0xE0], [0xB9], [0x84], [ord("y")]]


def test_of_tokens_with_one_text_the_likeliest_counts_():
    top = [entry_of("a", -1.0), entry_of("a", -2.0), entry_of("b", -9999.0)]
    found = logprobs_of({"prompt": "p", "logprobs": 3}, [{**entry_of("a", -1.0), "top": top}])
    assert found["top_logprobs"] == [{"a": -1.0, "b": -9999.0}]


def test_the_contexts_end_is_a_length_for_clients():
    answer = Answer(read_completion({"model": "m", "prompt": "p"}, MODELS))
    answer.add(0, document([], finish_reason="context"))
    assert answer.whole()["choices"][0]["finish_reason"] == "length"


def test_without_bos_the_first_token_has_no_log_probability():
    answer = Answer(read_completion({"model": "m", "prompt": " p", "logprobs": 1, "echo": True}, MODELS))
    answer.add(0, document([], prompt_logprobs=[scored(" p", 0, logprob=None), scored("q", 1)]))
    assert answer.whole()["choices"][0]["logprobs"] == {
        "tokens": [" p", "q"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"q0": -0.5}],
        "text_offset": [0, 2],
    }


def test_an_answer_without_tokens_has_lists_without_entries():
    found = logprobs_of({"prompt": "p", "logprobs": 1}, [])
    assert found == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
