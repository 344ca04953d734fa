"""Clients of completion services against a server with faults, and the rules of waiting, repeating and bounding."""

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from alpaca.data.generation.requests import Budget, BudgetSpent, Patience, Requester, Stopped
from alpaca.data.generation.services import (
    Client,
    CogClient,
    Completion,
    OpenAIClient,
    RequestFailed,
    Sampling,
    hide_secrets,
    plain_address,
    read_retry_after,
)
from alpaca.errors import InputError, MissingPackage, ServiceFailed
from tests.data.generation.completion_service import Reply, Service, error_reply, running_service

SAMPLING = Sampling(temperature=0.9, top_p=0.8, stop="\n20. Instruction:", seed=3)
KEY = "sk-secret-of-this-test"
QUICK = Patience(max_attempts=4, first_wait_s=0.01, longest_wait_s=0.02)


@pytest.fixture
def service() -> Iterator[Service]:
    with running_service() as service:
        yield service


def openai_client(service: Service, *, model: str = "some-model", api: str = "auto", **options: object) -> OpenAIClient:
    pytest.importorskip("openai", reason="the optional package: pip install openai")
    environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"{service.url}/v1"}
    return OpenAIClient(model, SAMPLING, **{"api": api, "environment": environment, "timeout_s": 5.0, **options})


def cog_client(service: Service, **options: object) -> CogClient:
    return CogClient(f"{service.url}/predictions", SAMPLING, **{"model": "mine", "timeout_s": 5.0, **options})


def requester(client: Client, patience: Patience = QUICK, **options: object) -> Requester:
    budget = options.pop("budget", None) or Budget(max_requests=None, max_tokens_total=None)
    return Requester(client, budget, **{"max_tokens": 1000, "stop": SAMPLING.stop, "patience": patience, **options})


CLIENTS: list[Callable[..., Client]] = [openai_client, cog_client]


def first(replies: list[Reply]) -> Callable[[int, dict], Reply | None]:
    """Faults for the first requests."""
    return lambda number, body: replies[number] if number < len(replies) else None


# What is sent and read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "api", "is_chat"),
    [
        ("gpt-9", "auto", True), ("text-davinci-003", "auto", False), ("davinci-002", "auto", False),
        ("gpt-3.5-turbo-instruct", "auto", False), ("gpt-3.5-turbo", "auto", True),
        ("llama-3-8b-instruct", "auto", True), ("davinci-002", "chat", True),
        ("mistral", "completions", False),
    ],
)  # fmt: skip
def test_openai_request(service: Service, model: str, api: str, is_chat: bool):
    client = openai_client(service, model=model, api=api)
    service.finish_reason = "length"
    completion = client.complete("a prompt", max_tokens=77, number=1)
    body = service.bodies[0]
    assert client.is_chat is is_chat
    assert ("messages" in body, "prompt" in body) == (is_chat, not is_chat)
    expected = {"model": model, "temperature": 0.9, "top_p": 0.8, "max_tokens": 77, "stop": [SAMPLING.stop]}
    assert {name: body[name] for name in expected} == expected
    assert body.get("logit_bias") == ({"50256": -100} if model.startswith("text-") else None)
    assert completion == Completion(
        text=service.text("a prompt"),
        finish_reason="length",
        prompt_tokens=2,
        output_tokens=len(service.text("a prompt")) // 4,
        model=f"{model}-1",
    )
    assert service.headers[0]["authorization"] == f"Bearer {KEY}"


def test_cog_request(service: Service):
    completion = cog_client(service).complete("a prompt", max_tokens=77, number=5)
    assert service.bodies[0]["input"] == {
        "prompt": "a prompt", "prompt_template": "{prompt}", "max_new_tokens": 77, "temperature": 0.9, "top_p": 0.8,
        "stop": [SAMPLING.stop], "seed": (3 << 20) + 5,
    }  # fmt: skip
    assert (completion.text, completion.finish_reason) == (service.text("a prompt"), "unknown")
    assert (completion.prompt_tokens, completion.model) == (2, "mine")


def test_a_refusal_without_text_is_an_empty_completion(service: Service):
    client = openai_client(service)
    service.text = lambda prompt: None if prompt == "bad" else "x"
    service.fault = lambda number, body: (
        200, {}, json.dumps({"model": "m", "choices": [
            {"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant", "content": None}}
        ]}).encode(),
    )  # fmt: skip
    completion = client.complete("bad", max_tokens=9, number=0)
    assert (completion.text, completion.finish_reason, completion.prompt_tokens) == ("", "content_filter", 0)


def test_what_a_model_does_not_take_is_left_out_and_said(service: Service):
    refused = [
        error_reply(400, code="unsupported_parameter", param="max_tokens"),
        error_reply(400, code="unsupported_value", param="temperature"),
        error_reply(400, code="unsupported_parameter", param="stop"),
    ]
    service.fault = first(refused)
    said: list[str] = []
    client = openai_client(service, say=said.append)
    service.text = lambda prompt: "good" + SAMPLING.stop + " more"
    assert requester(client).ask("p", number=0).text == "good", "cut here, where the service does not"
    body = service.bodies[-1]
    assert not {"max_tokens", "temperature", "stop"} & set(body)
    assert body["max_completion_tokens"] == 1000
    assert said == [
        "this model calls the length max_completion_tokens",
        "this model does not take temperature: it is left out",
        "this model does not take stop: it is left out",
    ]


def test_without_the_openai_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackage, match=r"pip install openai; this project's own server needs none: --endpoint"):
        OpenAIClient("m", SAMPLING, api="auto", environment={"OPENAI_API_KEY": KEY}, timeout_s=1)


def test_without_a_key_or_an_address_the_error_names_both():
    pytest.importorskip("openai", reason="the optional package: pip install openai")
    with pytest.raises(InputError, match=r"set OPENAI_API_KEY \(and OPENAI_BASE_URL .* --endpoint"):
        OpenAIClient("m", SAMPLING, api="auto", environment={}, timeout_s=1)
    environment = {"OPENAI_BASE_URL": "http://user:pw@127.0.0.1:1/v1?k=sk-1"}
    assert OpenAIClient("m", SAMPLING, api="auto", environment=environment, timeout_s=1).endpoint.startswith(
        "http://127.0.0.1:1/v1"
    )


def test_a_password_in_the_endpoint_is_refused_and_not_shown():
    with pytest.raises(InputError, match=r"--endpoint http://h:1/predictions: it came with a user") as caught:
        CogClient("http://me:secret@h:1/predictions", SAMPLING, model="", timeout_s=1)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["localhost:5000", "http://h:1/", "ftp://h/predictions", "http://h/prediction"])
def test_a_wrong_endpoint_is_named(address: str):
    with pytest.raises(InputError, match=r"--endpoint .*: expected http://HOST:PORT/predictions"):
        CogClient(address, SAMPLING, model="", timeout_s=1)


# Faults ---------------------------------------------------------------------------------------------------------

PASSING = {
    "500": error_reply(500),
    "503": error_reply(503),
    "429": error_reply(429, {"Retry-After": "0"}),
    "409": error_reply(409),
    "time-out": (200, {"X-Wait": "1"}, b"{}"),
    "truncated": (200, {"X-Claim-Length": "500"}, b'{"choices": [{"te'),
    "half JSON": (200, {}, b'{"choices": [{"text": "Name'),
    "HTML": (200, {"Content-Type": "text/html"}, b"<html>busy</html>"),
    "nothing": (200, {}, b""),
    "no choices": (200, {}, b'{"choices": [], "status": "succeeded", "output": []}'),
    "null": (200, {}, b"null"),
    "failed": (200, {}, b'{"status": "failed", "error": "out of memory"}'),
}


@pytest.mark.parametrize("make_client", CLIENTS)
@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_asked_again(service: Service, make_client: Callable[..., Client], fault: str):
    client = make_client(service, timeout_s=0.4 if fault == "time-out" else 5.0)
    service.fault = first([PASSING[fault]] * 2)
    said: list[str] = []
    assert requester(client, say=said.append).ask("p", number=4).text == service.text("p")
    assert len(service.bodies) == 3
    assert [line.split(":")[0] for line in said] == ["prompt 4", "prompt 4"]


@pytest.mark.parametrize("make_client", CLIENTS)
def test_giving_up_says_why_and_after_how_much(service: Service, make_client: Callable[..., Client]):
    client = make_client(service)
    service.fault = lambda number, body: error_reply(503, message=f"overloaded, {KEY}")
    with pytest.raises(ServiceFailed, match=r"gave up on prompt 7 after 4 attempts; the last one: http.* answered 503"):
        requester(client).ask("p", number=7)
    assert len(service.bodies) == 4


def test_no_server_at_all(service: Service):
    for client in (
        CogClient("http://127.0.0.1:9/predictions", SAMPLING, model="", timeout_s=1),
        openai_client(service, environment={"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}),
    ):
        with pytest.raises(ServiceFailed, match=r"after 4 attempts; .*http://127.0.0.1:9/.* gave no answer"):
            requester(client).ask("p", number=0)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (error_reply(401, message=f"Incorrect API key provided: {KEY}"), r"answered 401 \(check the API key\)"),
        (error_reply(404), r"answered 404 \(check the address and the model's name\)"),
        (error_reply(429, code="insufficient_quota"), "answered 429"),
        (error_reply(422), "answered 422"),
    ],
)
def test_what_does_not_pass_is_asked_once(service: Service, reply: Reply, reason: str):
    client = openai_client(service)
    service.fault = lambda number, body: reply
    with pytest.raises(ServiceFailed, match=reason) as caught:
        requester(client).ask("p", number=0)
    assert len(service.bodies) == 1
    assert KEY not in str(caught.value)


def test_a_completion_too_long_for_the_context_is_asked_for_shorter(service: Service):
    client = openai_client(service)
    service.fault = lambda number, body: (
        error_reply(400, code="context_length_exceeded") if body["max_tokens"] > 700 else None
    )
    requester(client).ask("p", number=0)
    assert [body["max_tokens"] for body in service.bodies] == [1000, 800, 640]


def test_a_prompt_that_fills_the_context_is_said(service: Service):
    client = openai_client(service)
    service.fault = lambda number, body: error_reply(400, code="context_length_exceeded")
    with pytest.raises(ServiceFailed, match="the prompt alone fills the context: lower --num_prompt_instructions"):
        requester(client, max_tokens=70).ask("p", number=0)
    too_long = {"status": "failed", "error": "the prompt is 9 tokens long and the model's context is 8"}
    service.fault = lambda number, body: (200, {}, json.dumps(too_long).encode())
    service.bodies.clear()
    with pytest.raises(ServiceFailed, match=r"the model's context is 8; lower --num_prompt_instructions, or serve"):
        requester(cog_client(service)).ask("p", number=0)
    assert len(service.bodies) == 1


# Waiting --------------------------------------------------------------------------------------------------------


def test_retry_after_holds_for_every_thread(service: Service):
    client = cog_client(service)
    service.fault = first([error_reply(429, {"Retry-After": "0.6"})])
    shared = requester(client)
    threads = [threading.Thread(target=shared.ask, args=("p",), kwargs={"number": 0})]
    threads[0].start()
    while not service.bodies:
        time.sleep(0.01)
    time.sleep(0.2)  # the reply is on its way back
    threads += [threading.Thread(target=shared.ask, args=(f"p{n}",), kwargs={"number": n}) for n in (1, 2)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(service.times) == 4
    assert min(service.times[1:]) - service.times[0] >= 0.6


def test_waits_double_with_jitter_up_to_a_longest():
    class Failing:
        endpoint, is_chat = "here", False

        def complete(self, prompt: str, *, max_tokens: int, number: int) -> Completion:
            raise RequestFailed("busy")

    random.seed(0)
    slept: list[float] = []
    patience = Patience(max_attempts=8, first_wait_s=1, longest_wait_s=10)
    asker = requester(Failing(), patience)
    asker._sleep = slept.append
    with pytest.raises(ServiceFailed, match="gave up on prompt 0 after 8 attempts; the last one: busy"):
        asker.ask("p", number=0)
    waits = slept[1::2]
    assert len(waits) == 7
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, [1, 2, 4, 8, 10, 10, 10], strict=True))
    assert len(set(waits)) == 7


def test_a_service_that_asks_for_hours_is_not_waited_for(service: Service):
    client = cog_client(service)
    service.fault = lambda number, body: error_reply(429, {"Retry-After": "7200"})
    with pytest.raises(ServiceFailed, match=r"asks to wait 7,200 s, more than the 900 s this command waits"):
        requester(client).ask("p", number=0)


def test_stop_ends_a_wait_at_once(service: Service):
    client = cog_client(service)
    service.fault = lambda number, body: error_reply(429, {"Retry-After": "600"})
    asker = requester(client)
    threading.Timer(0.3, asker.stop).start()
    start = time.monotonic()
    with pytest.raises(Stopped):
        asker.ask("p", number=0)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None), ({"retry-after": "7"}, 7.0), ({"retry-after": " 0.5 "}, 0.5), ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None), ({"retry-after": "Thu, 01 Jan 1970 00:02:00 GMT"}, 20.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0), ({"retry-after": "Thu, 01 Jan 1970 00:02:00"}, 20.0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(headers: dict[str, str], seconds: float | None):
    assert read_retry_after(headers, now=lambda: 100.0) == seconds


# The bill -------------------------------------------------------------------------------------------------------


def test_requests_are_bounded_failed_ones_included(service: Service):
    client = cog_client(service)
    service.fault = first([error_reply(500)])
    asker = requester(client, budget=Budget(max_requests=3, max_tokens_total=None))
    asker.ask("p", number=0)
    asker.ask("p", number=1)
    with pytest.raises(BudgetSpent, match="--max_requests 3 is reached"):
        asker.ask("p", number=2)
    assert len(service.bodies) == 3


def test_tokens_are_bounded_by_the_most_that_requests_under_way_may_take():
    budget = Budget(max_requests=None, max_tokens_total=1000, num_tokens=100)
    budget.take(400)
    budget.take(400)
    with pytest.raises(BudgetSpent, match=r"no room for another request \(100 used, the next may take 400\)"):
        budget.take(400)
    budget.settle(400, 50)
    budget.take(400)
    assert (budget.num_tokens, budget.num_requests) == (150, 3)


def test_secrets_are_hidden():
    shown = f"key {KEY}, sk-abcdefgh1234, sk-ab****wxyz, Authorization: Bearer abc.def, plain-but-secret"
    text = hide_secrets(shown, ("plain-but-secret", "key"))
    assert text == "key ***, ***, ***, Authorization: Bearer ***, ***"
    assert plain_address("https://me:pw@host:8/v1/x?key=1#f") == "https://host:8/v1/x"
