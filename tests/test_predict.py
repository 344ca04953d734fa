"""The Predictor behind the real Cog server, over HTTP: what clients see."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from alpaca.data import generate_instruction
from alpaca.data.generation.journal import REGEN, Journal
from alpaca.errors import InputError, NotEnoughSpace
from alpaca.memory import free_memory
from alpaca.serving.engine import Generation
from alpaca.serving.housekeeping import PredictionFolders
from alpaca.serving.llama.planning import BLOCK_SIZE, max_running, working_bytes
from alpaca.serving.llama.weights import read_llama
from alpaca.serving.loading import load_engine
from alpaca.serving.request import PredictionInputs
from alpaca.serving.settings import ServerSettings
from alpaca.text.loading import load_tokenizer
from deploy import local_predict
from deploy.local_server import LocalServer, ServerFailedError, running_server
from tests.conftest import ROOT
from tests.serving.llama.test_llama_engine import request

RAW = {"prompt": "", "prompt_template": "{prompt}"}
LONG = {**RAW, "max_new_tokens": 200, "min_new_tokens": 200, "seed": 1, "stream": True}


CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role not in ('user', 'assistant') %}{{ raise_exception('no ' + message.role + ' here') }}{% endif %}
{{- message.role }}: {{ message.content | trim }}
{% endfor %}assistant:"""


@pytest.fixture(scope="module")
def folder(llama_folder, tmp_path_factory) -> Path:
    """The model with a chat template, which a prompt has no use for."""
    folder = shutil.copytree(llama_folder, tmp_path_factory.mktemp("model") / "chat")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[LocalServer]:
    with running_server(["--weights", str(folder), "--concurrency", "16"], on_failure=print) as server:
        yield server


class ScarceServer:
    """A server whose cache has room for a request that runs or for one that waits, never for both."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server
        self.room = (int(re.search(r"(\d+) blocks of 16 tokens", server.log_text())[1]) - 1) * BLOCK_SIZE
        self.context = min(self.room, 2048)
        waiting = self.context - 100
        running = max(200, self.room - waiting + 64)
        assert self.context - running > 500, "time enough to cancel"
        # BOS, the space put in front, and a token a letter: neither "x" nor "y" is part of a longer piece.
        self.running = {
            **RAW, "prompt": "x" * (running - 2), "max_new_tokens": 2048, "min_new_tokens": 2048, "stream": True,
            "temperature": 0,
        }  # fmt: skip
        self.waiting = {**RAW, "prompt": "y" * (waiting - 2), "max_new_tokens": 1}


@pytest.fixture(scope="module")
def scarce(llama_folder) -> Iterator[ScarceServer]:
    settings, config = ServerSettings(concurrency=4), read_llama(llama_folder)
    rows = max_running(settings)
    wanted = working_bytes(config, torch.float32, num_tokens=rows + 128, num_sampled=rows)
    wanted += (
        4 * 73 * BLOCK_SIZE * config.kv_elements_per_token() * torch.float32.itemsize
    )  # of which the cache gets a quarter
    fraction = wanted / free_memory(torch.device("cpu"))
    flags = ["--weights", str(llama_folder), "--concurrency", "4", "--memory_fraction", str(fraction)]
    with running_server(flags, on_failure=print) as server:
        yield ScarceServer(server)


def sse_events(url: str, input: dict, *, stop_after: int | None = None) -> list[tuple[float, str, dict]]:
    """(monotonic time, event, data) of a streamed prediction; hangs up after `stop_after` outputs."""
    headers = {"Accept": "text/event-stream"}
    while True:
        with httpx.stream("POST", f"{url}/predictions", json={"input": input}, headers=headers, timeout=60) as reply:
            if reply.status_code != 409:  # a slot is freed just after its last reply
                return list(read_events(reply, stop_after))
        time.sleep(0.01)


def read_events(reply: httpx.Response, stop_after: int | None = None) -> Iterator[tuple[float, str, dict]]:
    assert reply.status_code == 200, reply.read()
    name, outputs = "", 0
    for line in reply.iter_lines():
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            yield time.monotonic(), name, json.loads(line.removeprefix("data:"))
            outputs += name == "output"
            if outputs == stop_after:
                return


def chunks(events: list[tuple[float, str, dict]]) -> list[str]:
    return [data["chunk"] for _, name, data in events if name == "output"]


def in_threads(count: int, function: Callable[[int], object]) -> list:
    """function(0), function(1), … at once; what they gave, in order."""
    found: dict[int, object] = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, function(i))) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(count)]


def test_published_text_over_http(tmp_path, real):
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments

    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K", "--output_dir", str(tmp_path)]
    folder = convert(parse_arguments(flags))
    expected = (real / "stories260k-greedy.txt").read_text().rstrip("\n")
    with running_server(["--weights", str(folder)], on_failure=print) as server:
        prediction = server.predict({**RAW, "temperature": 0, "max_new_tokens": 256})
        assert prediction["output"] == [expected]
        events = sse_events(server.url, {**RAW, "temperature": 0, "max_new_tokens": 256, "stream": True})
        assert "".join(chunks(events)) == expected


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_structured_answers_over_http(server):
    asked = {"prompt": "Who?", "n": 3, "seed": 1, "temperature": 1.0, "max_new_tokens": 200}
    both = [{**asked, "json_schema": SCHEMA}, {**asked, "regex": "[a-c]{3}-(x|yz){2,3}"}, asked]
    alone = [server.predict(inputs) for inputs in both]
    for person in map(json.loads, alone[0]["output"]):
        assert (set(person), len(person["name"]) <= 9, 0 <= person["age"] <= 99) == ({"name", "age"}, True, True)
    assert alone[0]["metrics"]["finish_reason"] == ["stop"] * 3
    assert all(re.fullmatch("[a-c]{3}-(x|yz){2,3}", text) for text in alone[1]["output"])
    together = in_threads(6, lambda i: server.predict(both[i % 3])["output"])
    assert together == [prediction["output"] for prediction in alone] * 2
    streamed = {**asked, "n": 1, "grammar": 'start: "yes" | "no"', "stream": True}
    events = sse_events(server.url, streamed)
    assert "".join(chunks(events)) in ("yes", "no")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex do not go together"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 4}}, "json_schema: Unsatisfiable schema"),
        ({"json_schema": {"properties": {"a": {"not": {}}}}}, "json_schema at #/properties/a: Unimplemented keys"),
        ({"regex": "a(b"}, "regex, character 2: unclosed group"),
        ({"grammar": "start: x"}, "grammar, line 1, column 8: unknown name"),
        ({"regex": "a", "num_beams": 2}, "beam search follows no regex"),
    ],
)
def test_constraints_that_cannot_be_followed(server, inputs, message):
    prediction = server.predict({"prompt": "Who?", **inputs})
    assert (prediction["status"], message in prediction["error"]) == ("failed", True), prediction["error"]


def test_the_largest_and_deepest_schemas_over_http(server):
    deep: dict = {"type": "string"}
    for _ in range(100):
        deep = {"items": deep}
    for schema, message in [(deep, "nested 64 deep"), ({"enum": ["x" * 2_000_000]}, "65,536 characters")]:
        prediction = server.predict({"prompt": "Who?", "json_schema": schema})
        assert message in prediction["error"]
    for text in ('{"items":' * 5000 + "{}" + "}" * 5000, '{"enum": ["' + "x" * 10_000_000 + '"]}'):
        body = '{"input": {"prompt": "Who?", "json_schema": ' + text + "}}"
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(f"{server.url}/predictions", content=body, headers=headers, timeout=60)
        assert 400 <= reply.status_code < 500, reply.text
    assert server.predict({"prompt": "Who?", "max_new_tokens": 2})["status"] == "succeeded"


def test_a_conversation_over_http(server, monkeypatch, capsys):
    said = [("user", " Name </s> one. "), ("assistant", "Alpaca"), ("user", "<s>More?")]
    messages = [{"role": role, "content": content} for role, content in said]
    options = {"temperature": 0, "max_new_tokens": 20, "min_new_tokens": 20}
    asked = {**options, "messages": messages}
    text = "user: Name </s> one.\nassistant: Alpaca\nuser: <s>More?\nassistant:"
    by_prompt = server.predict({**RAW, **options, "prompt": text})  # where control tokens are text
    whole = server.predict(asked)
    assert whole["status"] == "succeeded", whole
    assert [item.lstrip() for item in by_prompt["output"]] == whole["output"]
    assert whole["metrics"]["prompt_tokens"] == by_prompt["metrics"]["prompt_tokens"]
    assert "".join(chunks(sse_events(server.url, {**asked, "stream": True}))) == whole["output"][0]
    in_turn = [server.predict({**asked, "n": 2})["output"], server.predict({**asked, "num_beams": 2})["status"]]
    assert in_turn == [whole["output"] * 2, "succeeded"]
    for wrong, message in [
        ({**asked, "prompt": "x"}, "messages are the whole conversation: leave prompt out beside them"),
        ({"messages": [{"role": "system", "content": "x"}]}, "template refuses the messages: no system here"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "part of type 'image'"),
        ({}, "give prompt, a text, or messages"),
    ]:
        prediction = server.predict(wrong)
        assert (prediction["status"], message in prediction["error"]) == ("failed", True), prediction
    for wrong in ("x", ["x"], {"role": "user"}):
        assert httpx.post(f"{server.url}/predictions", json={"input": {"messages": wrong}}).status_code == 422
    monkeypatch.setattr(local_predict, "running_server", lambda flags: contextlib.nullcontext(server))
    monkeypatch.setattr(local_predict, "stop_children_on_sigterm", lambda: None)
    given = [f"messages={json.dumps(messages)}", *(f"{name}={value}" for name, value in options.items())]
    monkeypatch.setattr(sys, "argv", ["script/predict", *(part for pair in given for part in ("-i", pair))])
    local_predict.main()
    assert json.loads(capsys.readouterr().out) == whole["output"]


def test_one_item_per_completion_and_metrics(server):
    prediction = server.predict({"prompt": "hi", "n": 3, "max_new_tokens": 8, "seed": 0})
    assert prediction["status"] == "succeeded"
    assert len(prediction["output"]) == 3
    metrics = prediction["metrics"]
    assert metrics["seed"] == 0
    assert metrics["prompt_tokens"] > 20
    assert 0 < metrics["output_tokens"] <= 24
    assert {"cached_tokens", "queue_s", "time_to_first_token_s", "tokens_per_second"} <= metrics.keys()


def test_seed_repeats_an_answer_and_is_drawn_when_absent(server):
    asked = {"prompt": "hi", "max_new_tokens": 12}
    first = server.predict(asked)
    again = server.predict({**asked, "seed": first["metrics"]["seed"]})
    other = server.predict(asked)
    assert again["output"] == first["output"]
    assert other["metrics"]["seed"] != first["metrics"]["seed"]


def test_pieces_are_the_whole_answer(server):
    asked = {**RAW, "max_new_tokens": 60, "seed": 5}
    whole = server.predict(asked)["output"]
    pieces = server.predict({**asked, "stream": True})["output"]
    assert len(whole) == 1
    assert len(pieces) > 5
    assert "".join(pieces) == whole[0]
    half = whole[0][len(whole[0]) // 2 :][:4]
    assert server.predict({**asked, "stop": [half]})["output"] == [whole[0][: whole[0].index(half)]]


def test_first_event_comes_before_half_of_the_time(server):
    start = time.monotonic()
    events = sse_events(server.url, LONG)
    arrivals = [at - start for at, name, _ in events if name == "output"]
    assert len(arrivals) > 50
    assert arrivals[0] < arrivals[-1] / 2
    assert len(set(arrivals)) > 50  # and the others as they come
    assert events[-1][1] == "completed"
    assert events[-1][2]["status"] == "succeeded"
    assert events[-1][2]["output"] == chunks(events)


def test_sixteen_streams_run_at_once_and_each_gets_its_own_answer(server):
    """Greedy: float32 leaves a sampled token to chance where batches differ; tests/serving has it exact in float64."""
    long = {
        **LONG,
        "temperature": 0,
        "max_new_tokens": 800,
        "min_new_tokens": 800,
    }  # they meet on a busy machine, too
    asked = [{**long, "prompt": f"{i} alpacas"} for i in range(16)]
    begun = {"max_new_tokens": 40, "min_new_tokens": 40}
    alone = ["".join(server.predict({**one, **begun})["output"]).rstrip("\ufffd") for one in asked]
    events = in_threads(16, lambda i: sse_events(server.url, asked[i]))
    firsts = [next(at for at, name, _ in one if name == "output") for one in events]
    ends = [next(at for at, name, _ in one if name == "completed") for one in events]
    assert max(firsts) < min(ends)
    assert ["".join(chunks(one))[: len(text)] for one, text in zip(events, alone, strict=True)] == alone
    assert len(set(alone)) == 16
    assert {one[-1][2]["metrics"]["output_tokens"] for one in events} == {800}


def test_mixed_loads_get_what_they_get_alone(server):
    base = {"temperature": 0, "max_new_tokens": 30}
    kinds = [
        {**base, "prompt": "Name three colours"},
        {**base, "prompt": "Name", "input": "three colours", "n": 3},
        {**base, "prompt": "What is the capital of Peru?", "stream": True},
        {**RAW, **base, "stop": ["e"], "min_new_tokens": 20},
        {**base, "prompt": "word " * 3000},
        {**base, "prompt": "x", "stream": True, "n": 2},
        {**base, "prompt": "penalised", "repetition_penalty": 1.3},
        {**base, "prompt": "short", "total_tokens": 150},
    ]

    def outcome(asked: dict) -> tuple[str, str]:
        prediction = server.predict(asked)
        return prediction["status"], "".join(prediction.get("output") or [])

    alone = [outcome(asked) for asked in kinds]
    assert [status for status, _ in alone] == ["succeeded"] * 4 + ["failed"] * 2 + ["succeeded"] * 2
    for _ in range(3):
        assert in_threads(16, lambda i: outcome(kinds[i % 8])) == alone * 2


def test_the_second_time_a_prompt_is_found_in_the_cache(server):
    asked = {**RAW, "prompt": "A llama, a vicuña and a guanaco walk up a mountain. " * 3, "max_new_tokens": 3}
    first, second = (server.predict(asked)["metrics"] for _ in range(2))
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == (second["prompt_tokens"] - 1) // BLOCK_SIZE * BLOCK_SIZE > 0
    # The template's preamble was left there by the first request of setup.
    assert server.predict({"prompt": "never asked before", "max_new_tokens": 1})["metrics"]["cached_tokens"] >= 16


def test_beam_search_says_which_engine_it_is(server, llama_folder):
    from transformers import LlamaForCausalLM

    asked = {**RAW, "prompt": "The capital of", "num_beams": 3, "n": 2, "max_new_tokens": 8, "min_new_tokens": 8}
    prediction = server.predict(asked)
    assert prediction["status"] == "succeeded"
    assert "num_beams 3: beam search, by the transformers engine" in prediction["logs"]
    tokenizer = load_tokenizer(llama_folder)
    prompt = torch.tensor([[1, *tokenizer.encode("The capital of")]])
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    rows = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, num_beams=3, num_return_sequences=2,
        max_new_tokens=8, min_new_tokens=8, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    start = len(tokenizer.decode(prompt[0].tolist()))
    assert prediction["output"] == [tokenizer.decode(row)[start:] for row in rows.tolist()]
    assert server.predict({**asked, "n": 4})["status"] == "failed"


# Details -------------------------------------------------------------------------------------------------------------


ASKED = {**RAW, "prompt": "The capital of Peru is Lima. " * 8, "max_new_tokens": 12, "min_new_tokens": 12, "seed": 4}
SCORED = {**ASKED, "details": True, "logprobs": 2, "echo": True}


@pytest.fixture(scope="module")
def plain(server) -> dict:
    """Three answers as texts."""
    return server.predict({**ASKED, "n": 3})


@pytest.fixture(scope="module")
def prompt_ids(llama_folder) -> list[int]:
    tokenizer = load_tokenizer(llama_folder)
    return [*tokenizer.prefix_ids, *tokenizer.encode(ASKED["prompt"])]


@pytest.fixture(scope="module")
def expected(llama_folder) -> Callable[[list[int]], torch.Tensor]:
    """The log-probabilities of all ids but the first, by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)

    @torch.inference_mode()
    def score(ids: list[int]) -> torch.Tensor:
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    return score


def documents_of(prediction: dict) -> list[dict]:
    return [json.loads(item) for item in prediction["output"]]


def test_documents_are_the_plain_answers(server, plain, prompt_ids):
    documents = documents_of(server.predict({**ASKED, "n": 3, "details": True}))
    counts = {"prompt_tokens": len(prompt_ids), "output_tokens": 12, "seed": 4}
    assert documents == [
        {"index": index, "text": text, "finish_reason": "length", "stop": None, **counts}
        for index, text in enumerate(plain["output"])
    ]
    beams = documents_of(server.predict({**ASKED, "details": True, "num_beams": 2, "n": 2}))
    assert [document["index"] for document in beams] == [0, 1]


def test_log_probabilities_are_those_of_transformers(server, plain, prompt_ids, expected):
    whole = server.predict({**SCORED, "n": 3})
    assert whole["metrics"]["cached_tokens"] == 0  # though another answer to this prompt has left them there
    for text, document in zip(plain["output"], documents_of(whole), strict=True):
        assert document["text"] == text
        entries = document["prompt_logprobs"] + document["logprobs"]
        ids = [entry["id"] for entry in entries]
        assert (ids[: len(prompt_ids)], len(ids)) == (prompt_ids, len(prompt_ids) + 12)
        assert (entries[0]["logprob"], entries[0]["top"]) == (None, [])
        found = torch.tensor([entry["logprob"] for entry in entries[1:]])
        torch.testing.assert_close(found, expected(ids), rtol=0, atol=1e-3)
        assert {len(entry["top"]) for entry in entries[1:]} == {2}


def test_a_stream_of_documents_is_the_whole_one(server):
    (whole,) = documents_of(server.predict(SCORED))
    pieces = [json.loads(chunk) for chunk in chunks(sse_events(server.url, {**SCORED, "stream": True}))]
    assert len(pieces) > 2
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    listed = [entry["id"] for piece in pieces for entry in piece["logprobs"]]
    assert listed == [entry["id"] for entry in whole["logprobs"]]
    assert ["prompt_logprobs" in piece for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert pieces[-1]["finish_reason"] == "length"


def test_how_likely_a_text_is_without_an_answer(server, prompt_ids, expected):
    asked = {**RAW, "prompt": ASKED["prompt"], "details": True, "echo": True, "max_new_tokens": 0}
    (document,) = documents_of(server.predict(asked))
    assert (document["text"], document["output_tokens"], "logprobs" in document) == ("", 0, False)
    total = sum(entry["logprob"] for entry in document["prompt_logprobs"][1:])
    assert total == pytest.approx(expected(prompt_ids).sum().item(), abs=0.05)


def test_why_an_answer_ended(server, plain):
    assert plain["metrics"]["finish_reason"] == ["length"] * 3
    assert server.predict(ASKED)["metrics"]["finish_reason"] == "length"
    beams = server.predict({**ASKED, "num_beams": 2, "n": 2})
    assert beams["metrics"]["finish_reason"] == ["length"] * 2
    stop = plain["output"][0][5:7]
    (document,) = documents_of(server.predict({**ASKED, "details": True, "stop": [stop]}))
    assert (document["finish_reason"], document["stop"]) == ("stop", stop)
    full = server.predict({**RAW, "prompt": "x" * 2040, "max_new_tokens": 50, "min_new_tokens": 50})
    assert full["metrics"]["finish_reason"] == "context"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logprobs": 1}, "logprobs need details"),
        ({"echo": True, "details": True, "num_beams": 2}, "do not go with num_beams above 1"),
        ({"max_new_tokens": 0, "min_new_tokens": 0}, "max_new_tokens 0 needs echo"),
    ],
)
def test_scores_that_nobody_could_get_are_refused(server, wrong, message):
    prediction = server.predict({**ASKED, **wrong})
    assert (prediction["status"], message in prediction["error"]) == ("failed", True), prediction


# Cancel and disconnect free the slot and the blocks ------------------------------------------------------------------


def test_room_is_scarce(scarce):
    """What the next two tests rest on: one waits for the other's blocks, and runs to its end if nobody cancels."""
    events, waited = run_with_one_waiting(scarce, lambda: None)
    assert events[-1][2]["status"] == "succeeded"
    assert waited["status"] == "succeeded"
    ran_s = next(at for at, name, _ in events if name == "completed") - events[0][0]
    assert 0.5 * ran_s < waited["metrics"]["queue_s"] < 1.5 * ran_s


def test_cancel_frees_slot_and_blocks(scarce):
    cancel = f"{scarce.server.url}/predictions/to-cancel/cancel"
    events, waited = run_with_one_waiting(scarce, lambda: httpx.post(cancel).raise_for_status())
    assert events[-1][2]["status"] == "canceled"
    assert 0 < len(chunks(events)) < 400
    metrics = events[-1][2]["metrics"]
    assert len(chunks(events)) <= metrics["output_tokens"] < 600
    assert metrics["prompt_tokens"] == len(scarce.running["prompt"]) + 2
    assert waited["status"] == "succeeded"  # there was no room for it while the other ran


def test_disconnect_frees_slot_and_blocks(scarce):
    address, headers = f"{scarce.server.url}/predictions/to-leave", {"Accept": "text/event-stream"}
    with httpx.stream("PUT", address, json={"input": scarce.running}, headers=headers, timeout=60) as reply:
        assert chunks(list(read_events(reply, stop_after=2)))
    assert scarce.server.predict(scarce.waiting)["status"] == "succeeded"
    assert re.search(r"Prediction cancelled.*to-leave", scarce.server.log_text())  # it had not come to its end


def test_a_cancelled_request_that_waits_never_runs(scarce):
    waiting = f"{scarce.server.url}/predictions/waiting"

    def cancel_the_waiting_one() -> None:
        body = {"input": {**scarce.waiting, "prompt": scarce.waiting["prompt"].replace("y", "z")}}
        assert httpx.put(waiting, json=body, headers={"Prefer": "respond-async"}).status_code == 202
        time.sleep(0.05)
        assert httpx.post(f"{waiting}/cancel").status_code == 200

    events, waited = run_with_one_waiting(scarce, cancel_the_waiting_one)
    assert events[-1][2]["status"] == "succeeded"
    assert waited["status"] == "succeeded"
    again = scarce.server.predict({**scarce.waiting, "prompt": scarce.waiting["prompt"].replace("y", "z")})
    assert again["metrics"]["cached_tokens"] == 0


def test_what_can_never_fit_fails_at_once_naming_the_sizes(scarce):
    first = threading.Event()
    running = threading.Thread(target=lambda: stream_until_end(scarce, first))
    running.start()
    assert first.wait(timeout=20)
    refused = scarce.server.predict({**RAW, "prompt": "y" * (scarce.context - 1)})
    assert running.is_alive()  # it did not wait for the other
    httpx.post(f"{scarce.server.url}/predictions/to-cancel/cancel").raise_for_status()
    running.join()
    assert refused["status"] == "failed"
    assert (
        f"the prompt is {scarce.context + 1} tokens long and the model's context is {scarce.context}"
        in refused["error"]
    )
    assert f"refused: the prompt is {scarce.context + 1} tokens" in scarce.server.log_text()


def stream_until_end(scarce: ScarceServer, first: threading.Event) -> list[tuple[float, str, dict]]:
    """The long request's events; `first` is set with its first piece."""
    events = []
    address, headers = f"{scarce.server.url}/predictions/to-cancel", {"Accept": "text/event-stream"}
    with httpx.stream("PUT", address, json={"input": scarce.running}, headers=headers, timeout=60) as reply:
        for event in read_events(reply):
            events.append(event)
            if event[1] == "output":
                first.set()
    return events


def run_with_one_waiting(scarce: ScarceServer, act: Callable[[], object]) -> tuple[list, dict]:
    """Start the long request, then the one that has to wait, then `act`; the first's events, the other's result."""
    first, done = threading.Event(), threading.Event()
    found: dict[str, object] = {}

    def wait_in_line() -> None:
        found["waited"] = scarce.server.predict(scarce.waiting)
        done.set()

    running = threading.Thread(target=lambda: found.__setitem__("events", stream_until_end(scarce, first)))
    waiting = threading.Thread(target=wait_in_line)
    running.start()
    assert first.wait(timeout=20)
    waiting.start()
    assert not done.wait(0.1)
    act()
    running.join(timeout=30)
    waiting.join(timeout=30)
    return found["events"], found["waited"]


# The hook for cancellation, without a server ------------------------------------------------------------------------


@pytest.fixture
def predictor(llama_folder, tmp_path, monkeypatch):
    """A Predictor with an engine, outside of Cog's runtime; `metrics` is what it recorded."""
    import predict

    monkeypatch.setattr(predict, "_said_no_hook", False)
    predictor = predict.Predictor()
    predictor.engine, predictor.folders = load_engine(llama_folder, ServerSettings()), PredictionFolders(tmp_path)
    predictor.metrics = {}
    predictor.record_metric = predictor.metrics.__setitem__
    yield predictor
    predictor.engine.close()


def all_inputs(**values) -> dict:
    """As the runtime gives them: every one, the defaults of those not asked for."""
    inputs = vars(PredictionInputs(**values))
    return {**inputs, "stop": list(inputs["stop"])}


def test_without_the_hook_predictions_run_and_the_log_says_so_once(predictor, caplog):
    for seed in (1, 2):
        inputs = all_inputs(**RAW, max_new_tokens=9, min_new_tokens=9, seed=seed)
        pieces = list(asyncio.run(predictor.run(**inputs)))  # asyncio's own loop: no future of coglet's
        assert len(pieces) == 1
        assert pieces[0]
        assert (predictor.metrics["output_tokens"], predictor.metrics["seed"]) == (9, seed)
    said = [record for record in caplog.records if "no hook for cancellation" in record.message]
    assert [record.message for record in said] == [
        "this Cog version gives no hook for cancellation: predictions run to their end"
    ]
    with pytest.raises(InputError, match="n must be from 1 to 5"):
        list(asyncio.run(predictor.run(**all_inputs(**RAW, n=6))))


def test_with_the_hook_the_future_cancels_the_generation(predictor, caplog):
    """As coglet calls it: the coroutine on its loop, the generator on a thread, cancel on the future."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    inputs = all_inputs(**{**LONG, "max_new_tokens": 2000, "min_new_tokens": 2000})
    future: Future = asyncio.run_coroutine_threadsafe(predictor.run(**inputs), loop)
    pieces = future.result(timeout=10)
    seen = [next(pieces)]
    assert future.cancel() is True
    with pytest.raises(BaseException, match=r"^$") as ended:  # Cog's exception has no text
        seen += pieces
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    assert type(ended.value).__name__ == "CancelationException"
    assert len(seen) <= predictor.metrics["output_tokens"] < 2000
    assert len("".join(seen)) < 2000
    assert "no hook" not in caplog.text


def test_figures_of_a_request_that_was_cancelled_while_it_waited():
    generation = Generation(request())
    time.sleep(0.01)
    metrics = generation.metrics()
    assert (metrics["output_tokens"], metrics["tokens_per_second"]) == (0, 0)
    assert 0.01 <= metrics["queue_s"] < 10


# ------------------------------------------------------------------------------------------------------------------


def test_prints_land_in_the_right_prediction(server):
    asked = {**RAW, "max_new_tokens": 100, "min_new_tokens": 100}
    logs = in_threads(12, lambda i: server.predict({**asked, "seed": 101 + i})["logs"])
    for seed, log in enumerate(logs, start=101):
        assert re.findall(r"seed (\d+)", log) == [str(seed)]
        assert "100 tokens after 1, " in log


def test_too_long_a_prompt_fails_naming_both_lengths(server):
    for times, said in ((2000, "tokens long and the model's context is 2048"), (10**6, "5,000,139 characters long")):
        prediction = server.predict({"prompt": "word " * times})
        assert prediction["status"] == "failed"
        assert said in prediction["error"]


@pytest.mark.parametrize(
    "input",
    [{"prompt": "x", "n": 6}, {"prompt": "x", "temperature": "hot"}, {"prompt": "x", "stop": "a"}, {"prompt": 3},
     {"prompt": "x", "seed": -1}],
)  # fmt: skip
def test_the_schema_refuses_bad_inputs(server, input):
    refused = httpx.post(f"{server.url}/predictions", json={"input": input})
    assert refused.status_code == 422
    assert refused.json()["detail"]


def test_other_programs_names_for_an_input_are_named_in_the_log(server):
    asked = {**RAW, "prompt": "x", "max_new_tokens": 3, "min_new_tokens": 3, "temperature": 0}
    prediction = server.predict({**asked, "max_tokens": 2, "max_length": 1})
    assert (prediction["status"], prediction["metrics"]["output_tokens"]) == ("succeeded", 3)
    assert (
        "max_tokens is no input of this model, and 2 was not used: did you mean max_new_tokens?" in prediction["logs"]
    )
    assert (
        "max_length is no input of this model, and 1 was not used: did you mean max_new_tokens, or total_tokens"
        in (prediction["logs"])
    )
    assert "no input" not in server.predict(asked)["logs"]


def test_cogs_runtime_drops_what_the_schema_does_not_list(server):
    """So nothing here can speak of it. When this fails, Cog hands such inputs over: name them in the log then."""
    prediction = server.predict({**RAW, "prompt": "x", "max_new_tokens": 1, "maximum_tokens": 2})
    assert prediction["status"] == "succeeded"
    assert "maximum_tokens" not in prediction["logs"]


def test_combinations_are_refused_with_a_reason(server):
    prediction = server.predict({"prompt": "x", "stream": True, "n": 2})
    assert prediction["status"] == "failed"
    assert "use it with n = 1" in prediction["error"]


def test_the_log_says_what_was_loaded_and_how_long_it_took(server, folder):
    log = server.log_text()
    assert re.search(
        rf"{folder}: 0\.1 M weights, float32 on cpu, quantization none, 0\.00 GB; context 2048 tokens, "
        r"\d+ blocks of 16 tokens \(\d\.\d\d GB\), up to 80 sequences a step; no graphs",
        log,
    )
    names = ["start and imports", "tokenizer", "weights", "cache", "kernels and graphs", "constraints", "first request"]
    assert re.search("ready: " + ", ".join(rf"{name} \d+\.\d s" for name in names), log)
    assert "no hook for cancellation" not in log  # on the Cog version that is pinned


def test_health_and_schema(server):
    assert server.request("/health-check")["status"] == "READY"
    assert server.request("/openapi.json") == json.loads((ROOT / ".cog" / "openapi_schema.json").read_text())


def test_setup_without_weights_says_which_step_is_missing(server_without_model):
    with pytest.raises(ServerFailedError, match=r"no model in .*nothing"):
        server_without_model.wait_until("READY", timeout_s=60)
    refused = httpx.post(f"{server_without_model.url}/predictions", json={"input": {"prompt": "x"}})
    assert refused.status_code == 503


def test_setup_without_memory_fails_in_a_sentence(llama_folder, monkeypatch):
    """The setup alone: the test above sees where the server takes its error's words."""
    import predict

    monkeypatch.setenv("ALPACA_MEMORY_FRACTION", "0.00001")
    with pytest.raises(NotEnoughSpace, match=r"GB are free after the weights, .* no request fits"):
        predict.Predictor().setup(str(llama_folder))


@pytest.mark.slow
def test_the_transformers_engine_still_serves(llama_folder):
    with running_server(["--weights", str(llama_folder), "--engine", "transformers"], on_failure=print) as server:
        assert "quantization none, context 2048 tokens" in server.log_text()
        prediction = server.predict({"prompt": "hi", "n": 2, "max_new_tokens": 8, "min_new_tokens": 8, "seed": 1})
        assert len(prediction["output"]) == 2
        assert prediction["metrics"]["output_tokens"] == 16
        assert chunks(sse_events(server.url, {**LONG, "max_new_tokens": 20, "min_new_tokens": 20}))


def test_script_predict_ended_by_a_signal_leaves_no_server(llama_folder):
    command = [sys.executable, "-m", "deploy.local_predict", "--weights", str(llama_folder)]
    process = subprocess.Popen([*command, "-i", "prompt=x"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 143
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive


def test_a_signal_while_the_server_is_being_started_leaves_none(monkeypatch):
    """What the test above meets now and then on a busy machine, made to happen."""
    popen, started = subprocess.Popen, []

    def start_sleep(command: list[str], **options) -> subprocess.Popen:
        started.append(popen(["sleep", "60"], **options))
        return started[-1]

    def end_by_signal(*args, **options):
        sys.exit(143)  # as stop_children_on_sigterm has it

    monkeypatch.setattr("deploy.local_server.subprocess.Popen", start_sleep)
    monkeypatch.setattr("deploy.local_server.threading.Thread", end_by_signal)
    with pytest.raises(SystemExit, match="143"), running_server([]):
        pass
    try:
        assert started[0].wait(timeout=1) is not None
    finally:
        started[0].kill()
        started[0].wait()
        started[0].stdout.close()


@pytest.mark.slow
def test_script_predict_prints_what_cog_predict_does(llama_folder, server, monkeypatch):
    command = [sys.executable, "-m", "deploy.local_predict", "--weights", str(llama_folder)]
    inputs = ["prompt=tell me something about รามาเกียรติ์", "max_new_tokens=5", "stop=a", "stop=b", "seed=1"]
    given = [part for text in inputs for part in ("-i", text)]
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert isinstance(output, list)
    assert len(output) == 1
    monkeypatch.setattr(local_predict, "running_server", lambda flags: contextlib.nullcontext(server))
    monkeypatch.setattr(local_predict, "stop_children_on_sigterm", lambda: None)
    monkeypatch.setattr(sys, "argv", ["script/predict", "-i", "promt=x"])
    with pytest.raises(InputError, match=r"no input is named 'promt'; did you mean prompt\?"):
        local_predict.main()


def test_instruction_generation_asks_a_model_that_knows_nothing(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "generate", "--endpoint", f"{server.url}/predictions", "--output_dir", str(tmp_path), "--max_tokens", "64",
        "--num_prompt_instructions", "1", "--max_requests", "3", "--request_batch_size", "2",
    ])  # fmt: skip
    generate_instruction.main()
    said = capsys.readouterr().err
    assert "0 of 100 tasks; rejected: " in said  # mostly cut off; sampled, so now and then its nonsense ends early
    assert "ended early: --max_requests 3 is reached; the same command goes on" in said
    assert not (tmp_path / REGEN).exists()
    with Journal(tmp_path) as journal:
        assert len(journal.state.answered) == 3
        assert journal.state.prompt_tokens > 300
        assert journal.state.output_tokens > 0


def test_the_log_has_a_line_of_the_engine_now_and_then(server):
    """Late in this file, so that the 10 seconds between two such lines have passed."""
    pattern = r"engine: running \d+, waiting 0, blocks used \d+ of 10240, \d+\.\d tokens/s"  # 80 sequences of 128
    deadline = time.monotonic() + 30
    while not (found := re.findall(pattern, server.log_text())) and time.monotonic() < deadline:
        server.predict({**RAW, "max_new_tokens": 5, "min_new_tokens": 5})
        time.sleep(0.3)
    assert found


@pytest.mark.may_cost(300)  # all that the server did for this file
def test_one_signal_stops_server_and_worker(server):
    """Last in this file: it ends the server of the others."""
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(family) >= 2
    assert server.stop() in (0, -15)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
