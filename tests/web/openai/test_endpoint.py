"""The endpoint as a process, asked by OpenAI's own client, in front of servers without a model."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.conftest import ROOT
from tests.test_imports import imported
from tests.web.openai.fake_server import FakeServer, completion
from tests.web.openai.running import RunningEndpoint, running_endpoint, wait_for

SAID = [{"role": "user", "content": "one two three"}]
TEXT = "".join(completion("one two three", 0))


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def endpoint(fake) -> Iterator[RunningEndpoint]:
    flags = ["--concurrency", "2", "--max_waiting", "1", "--adapters", "poet=/somewhere,cook"]
    with running_endpoint([fake.url], *flags, ALPACA_SERVER_TOKEN="for-the-gate") as endpoint:
        yield endpoint
        assert endpoint.stop() == 0
        assert endpoint.output == []


@pytest.fixture(scope="module")
def client(endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="any", max_retries=0) as client:
        yield client


# OpenAI's client ----------------------------------------------------------------------------------------------------


def test_a_chat(client):
    reply = client.chat.completions.create(model="alpaca", messages=SAID, logprobs=True, top_logprobs=2)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert [entry.token for entry in choice.logprobs.content] == completion("one two three", 0)
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 4
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 4, 11)
    assert reply._request_id


def test_a_streamed_chat(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="alpaca", messages=SAID, **options))
    *pieces, last, usage = chunks
    assert [piece.choices[0].delta.content for piece in pieces] == ["", *completion("one two three", 0)]
    assert (last.choices[0].finish_reason, usage.usage.completion_tokens) == ("stop", 4)
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions(client):
    reply = client.completions.create(model="alpaca", prompt=["one two three", "four"], n=2, max_tokens=2, echo=True)
    texts = [prompt + "".join(completion(prompt, i)[:2]) for prompt in ("one two three", "four") for i in (0, 1)]
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.finish_reason for choice in reply.choices] == ["length", "length", "stop", "stop"]


def test_streams_of_several_prompts_come_side_by_side(client):
    chunks = client.completions.create(model="alpaca", prompt=["slow 0.05 a b", "slow 0.05 c d"], stream=True)
    order, texts = [], {0: "", 1: ""}
    for chunk in chunks:
        order.append(chunk.choices[0].index)
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {i: "".join(completion(f"slow 0.05 {words}", 0)) for i, words in enumerate(("a b", "c d"))}
    assert order != sorted(order)


def test_the_asynchronous_client(endpoint):
    async def act() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="any") as client:
            reply = await client.chat.completions.create(model="alpaca", messages=SAID)
            stream = await client.chat.completions.create(model="alpaca", messages=SAID, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return reply.choices[0].message.content, "".join(pieces)

    assert asyncio.run(act()) == (TEXT, TEXT)


def test_models(client, fake):
    assert [model.id for model in client.models.list()] == ["alpaca", "poet", "cook"]
    assert client.models.retrieve("poet").id == "poet"
    client.completions.create(model="poet", prompt="x")
    inputs, headers = fake.asked[-1]
    assert (inputs["replicate_weights"], headers["authorization"]) == ("poet", "Bearer for-the-gate")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here") as error:
        client.models.retrieve("gpt")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("prompt", "fields", "kind", "message", "code"),
    [
        (
            "x",
            {"logit_bias": {"1": 2}},
            openai.BadRequestError,
            "this server has no logit_bias",
            "unsupported_parameter",
        ),
        ("x", {"n": 9}, openai.BadRequestError, "n: 9 is greater than 5", None),
        ("x", {"n": 10**12}, openai.BadRequestError, "n: 9 is greater than 5", None),
        ("fail InputError: it is: bad", {}, openai.BadRequestError, "It is: bad", None),
        ("fail PromptTooLong: long", {"stream": True}, openai.BadRequestError, "Long", "context_length_exceeded"),
        ("fail ValueError: boom", {}, openai.InternalServerError, "Boom", None),
        ("vanish", {}, openai.InternalServerError, "the model server was interrupted", None),
        ("break", {}, openai.InternalServerError, "the model server was interrupted", None),
    ],
)
def test_errors_are_the_clients_exceptions(client, prompt, fields, kind, message, code):
    with pytest.raises(kind, match=message) as error:
        client.completions.create(model="alpaca", prompt=prompt, **fields)
    assert error.value.code == code


@pytest.mark.parametrize(
    ("said", "fields", "message", "param"),
    [
        ("max_new_tokens 0 needs echo: x", {"max_tokens": 0}, "max_tokens 0 needs echo: x", "max_tokens"),
        ("max_new_tokens 0", {"max_completion_tokens": 1}, "max_completion_tokens 0", "max_completion_tokens"),
        (
            "json_schema: no 'max_new_tokens'",
            {"response_format": {"type": "json_object"}},
            "response_format: no 'max_new_tokens'",
            "response_format",
        ),
        ("messages[0]: expected it", {}, "messages[0]: expected it", "messages[0]"),
        ("logprobs must be", {"logprobs": True, "top_logprobs": 9}, "top_logprobs must be", "top_logprobs"),
        ("this model has none", {}, "This model has none", None),
    ],
)  # fmt: skip
def test_errors_have_the_clients_names(client, said, fields, message, param):
    asked = [{"role": "user", "content": f"fail InputError: {said}"}]
    with pytest.raises(openai.BadRequestError, match="400") as error:
        client.chat.completions.create(model="alpaca", messages=asked, **fields)
    assert (error.value.body["message"], error.value.param) == (message, param)


def test_a_prompt_that_is_too_long_is_named(client):
    with pytest.raises(openai.BadRequestError, match="Long") as error:
        client.completions.create(model="alpaca", prompt="fail PromptTooLong: long")
    assert error.value.param == "prompt"


def test_a_stream_that_breaks_off_ends_in_an_error(client):
    stream = client.completions.create(model="alpaca", prompt="break off here", stream=True)
    assert next(stream).choices[0].text == " break"
    with pytest.raises(openai.APIError, match="the model server was interrupted"):
        next(stream)


# Over HTTP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/embeddings", {}, 404),
        ("GET", "/v1/completions", {}, 405),
        ("POST", "/v1/models", {}, 405),
        ("POST", "/v1/completions", {"content": b"{"}, 400),
        ("POST", "/v1/completions", {"content": b"x" * (9 << 20)}, 413),
        ("POST", "/v1/completions", {"headers": {"host": "evil.net"}}, 403),
        ("POST", "/v1/completions", {"headers": {"origin": "http://evil.net"}}, 403),
        ("GET", "/metrics", {"headers": {"host": "evil.net"}}, 403),
    ],
)
def test_refusals_have_openais_form(endpoint, method, path, options, status):
    reply = endpoint.client.request(method, path, **options)
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    allowed = {"/v1/completions": "POST", "/v1/models": "GET"}[path] if status == 405 else None
    assert reply.headers.get("allow") == allowed


def test_a_first_piece_does_not_wait_for_the_heads_receipt(endpoint):
    """On a connection that is kept, clients say only after 40 ms that a packet has come."""
    seconds = []
    for _ in range(10):
        begun = time.monotonic()
        with endpoint.client.stream(
            "POST", "/v1/completions", json={"model": "alpaca", "prompt": "a", "stream": True}
        ) as reply:
            pieces = reply.iter_raw()
            next(pieces)
            seconds.append(time.monotonic() - begun)
            assert b"[DONE]" in b"".join(pieces)
    assert min(seconds[1:]) < 0.035


def test_a_client_that_leaves_cancels_its_prediction(endpoint, fake):
    before = fake.num_gone
    with endpoint.client.stream(
        "POST", "/v1/completions", json={"model": "alpaca", "prompt": "slow 0.05 " + "x " * 100, "stream": True}
    ) as reply:
        next(reply.iter_lines())
    wait_for(lambda: fake.num_gone == before + 1)
    with pytest.raises(httpx.ReadTimeout, match="timed out"):
        endpoint.client.post("/v1/completions", json={"model": "alpaca", "prompt": "hold " + "x " * 50}, timeout=0.2)
    wait_for(lambda: endpoint.figure(f'openai_running{{target="{fake.url}"}}') == 0)
    assert endpoint.figure('openai_requests_total{route="/v1/completions",status="499"}') == 1
    fake.release.set()
    wait_for(lambda: fake.num_gone == before + 2)
    fake.release.clear()


def test_a_full_line_is_429_and_who_waits_is_answered(endpoint, fake):
    running = f'openai_running{{target="{fake.url}"}}'
    with ThreadPoolExecutor(3) as threads:
        first = [threads.submit(endpoint.complete, "hold 1"), threads.submit(endpoint.complete, "hold 2")]
        wait_for(lambda: endpoint.figure(running) == 2)
        waiting = threads.submit(endpoint.complete, "patient")
        wait_for(lambda: endpoint.figure("openai_waiting") == 1)
        refused = endpoint.complete("one too many")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert not waiting.done()
        fake.release.set()
        assert [reply.result().status_code for reply in (*first, waiting)] == [200] * 3
    fake.release.clear()


def test_a_target_without_a_slot_is_asked_again(endpoint, fake):
    fake.num_full = 4
    assert endpoint.complete("again").status_code == 200
    assert fake.num_full == 0


def test_what_broke_off_before_an_answer_is_asked_once_more(endpoint, fake):
    assert endpoint.complete("vanish-once").status_code == 200
    before = fake.prompts().count("vanish")
    assert endpoint.complete("vanish").status_code == 503
    assert fake.prompts().count("vanish") == before + 2


def test_the_figures(endpoint):
    names = ["openai_prompt_tokens_total", "openai_output_tokens_total", "openai_time_to_first_token_seconds_count"]
    names += ['openai_request_seconds_count{route="/v1/completions"}']
    names += ['openai_requests_total{route="/v1/completions",status="200"}']
    before = [endpoint.figure(name) for name in names]
    endpoint.complete("one two three")
    endpoint.complete("one two three", stream=True)
    assert [endpoint.figure(name) - was for name, was in zip(names, before, strict=True)] == [14, 8, 1, 2, 2]


# Keys ---------------------------------------------------------------------------------------------------------------


def test_keys(fake, tmp_path):
    file = tmp_path / "keys"
    file.write_text("\nfirst-key\n second-kéy \n")
    with running_endpoint([fake.url], "--api_keys_file", str(file)) as endpoint:
        refused = endpoint.complete("x")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="this server asks for a key"):
                client.models.list()
            assert client.with_options(api_key="first-key").models.list().data
        key = "Bearer second-kéy".encode()
        assert httpx.get(f"{endpoint.url}/v1/models", headers={"Authorization": key}).status_code == 200
        assert endpoint.client.get("/metrics").status_code == 200
        endpoint.stop()
        assert "key" not in "".join(endpoint.output)


# Several targets ----------------------------------------------------------------------------------------------------


class Pair:
    """Two servers and the endpoint in front of them."""

    def __init__(self, servers: tuple[FakeServer, FakeServer], endpoint: RunningEndpoint) -> None:
        self.servers, self.endpoint = servers, endpoint

    def is_up(self, server: FakeServer) -> bool:
        return self.endpoint.figure(f'openai_target_up{{target="{server.url}"}}') == 1

    def reset(self) -> None:
        for server in self.servers:
            server.status = "READY"
            server.asked.clear()
            server.release.clear()
        wait_for(lambda: all(map(self.is_up, self.servers)))


@pytest.fixture(scope="module")
def started_pair() -> Iterator[Pair]:
    servers = FakeServer(), FakeServer()
    with running_endpoint([server.url for server in servers]) as endpoint:
        yield Pair(servers, endpoint)
    for server in servers:
        server.stop()


@pytest.fixture
def pair(started_pair) -> Pair:
    started_pair.reset()
    return started_pair


def test_the_target_with_the_fewest_predictions_is_next(pair):
    with ThreadPoolExecutor(6) as threads:
        held = []
        for number in range(6):
            held.append(threads.submit(pair.endpoint.complete, f"hold {number}"))
            wait_for(lambda n=number: sum(len(server.asked) for server in pair.servers) == n + 1)
        assert [len(server.asked) for server in pair.servers] == [3, 3]
        for server in pair.servers:
            server.release.set()
        assert all(reply.result().status_code == 200 for reply in held)


def test_a_target_that_is_not_ready_is_left_and_taken_back(pair):
    first, second = pair.servers
    first.status = "UNHEALTHY"
    wait_for(lambda: not pair.is_up(first))
    assert [pair.endpoint.complete("x").status_code for _ in range(3)] == [200] * 3
    assert (len(first.asked), len(second.asked)) == (0, 3)
    first.status = "BUSY"  # it answers, with all slots taken just now
    wait_for(lambda: pair.is_up(first))
    assert pair.endpoint.complete("x").status_code == 200


def test_what_has_not_begun_moves_to_another_target(pair):
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(pair.endpoint.complete, "hold")
        wait_for(lambda: any(server.asked for server in pair.servers))
        asked, other = sorted(pair.servers, key=lambda server: -len(server.asked))
        other.release.set()
        asked.status = "UNHEALTHY"
        assert held.result(timeout=5).status_code == 200
    assert (asked.prompts(), other.prompts()) == (["hold"], ["hold"])


def test_a_target_that_is_gone_is_left_at_once(pair):
    """Before its health was looked at: the first that is sent there finds nobody. The last of them, too."""
    first, second = pair.servers
    first.stop_listening()
    assert [pair.endpoint.complete("x").status_code for _ in range(4)] == [200] * 4
    second.stop_listening()
    assert pair.endpoint.complete("x").status_code == 503


def test_without_a_target_clients_are_told_so():
    with running_endpoint([(server := FakeServer()).url]) as endpoint:
        server.status = "STARTING"
        wait_for(lambda: not endpoint.is_healthy())
        reply = endpoint.complete("x")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
        server.status = "READY"
        wait_for(endpoint.is_healthy)
        assert endpoint.complete("x").status_code == 200
        server.stop()


# The command --------------------------------------------------------------------------------------------------------


def test_it_imports_nothing_of_the_model():
    files = sorted((ROOT / "web" / "openai").glob("*.py"))
    ours = {name for file in files for name in imported(file)}
    assert not {n for n in ours if n.startswith(("alpaca.serving", "alpaca.training", "alpaca.text", "cog", "predict"))}
    code = "import sys, web.openai.__main__, web.openai.app; print({'torch', 'transformers', 'cog'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "ftp://x"], "--target must be an address such as http://127.0.0.1:5000; found 'ftp://x'"),
        (
            ["--target", "http://x", "--api_keys_file", "/no/such"],
            "--api_keys_file /no/such: No such file or directory",
        ),
        (["--target", "http://x", "--api_keys_file", "/dev/null"], "--api_keys_file /dev/null: there is no key in it"),
        (["--target", "http://x", "--concurrency", "0"], "--concurrency at least 1"),
    ],
)
def test_wrong_flags_are_said(flags, said):
    command = [sys.executable, "-m", "web.openai", "--port", "0", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (1, True, False), done.stderr


def test_without_the_extra_the_command_names_it():
    code = "import sys, runpy; sys.modules['prometheus_client'] = None; sys.argv = ['x', '--target', 'http://x']; "
    code += "runpy.run_module('web.openai', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "this endpoint needs an extra: pip install --group endpoint" in done.stderr
