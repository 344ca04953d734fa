"""Which requests pass the gate."""

import json

import pytest

from deploy.gate.rules import Refused, Route, Rules, check_body, check_sender, find_route

RULES = Rules(hosts=("models.example.org",), webhooks=("http://127.0.0.1:8000/", "https://h.org/one"))
TRAINING = Rules(serves_training=True)
START = Route(kind="start", path="/predictions")


@pytest.mark.parametrize(
    ("method", "path", "kind", "id"),
    [
        ("GET", "/", "look", None),
        ("GET", "/health-check", "look", None),
        ("HEAD", "/health-check", "look", None),
        ("GET", "/openapi.json", "look", None),
        ("POST", "/predictions", "start", None),
        ("PUT", "/predictions/job-1", "start", "job-1"),
        ("PUT", "/predictions/a" + "b" * 63, "start", "a" + "b" * 63),
        ("POST", "/predictions/job_1.x/cancel", "cancel", "job_1.x"),
    ],
)
def test_the_routes_that_are_meant(method, path, kind, id):
    assert find_route(method, path, RULES) == Route(kind=kind, path=path, id=id)
    other = path.replace("predictions", "trainings")
    assert find_route(method, other, TRAINING) == Route(kind=kind, path=other, id=id)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/shutdown", 404),
        ("GET", "/shutdown", 404),
        ("POST", "/trainings", 404),
        ("GET", "/docs", 404),
        ("POST", "//predictions", 404),
        ("POST", "/predictions/../shutdown", 422),
        ("POST", "/health-check", 405),
        ("GET", "/predictions", 405),
        ("DELETE", "/predictions/x", 405),
        ("POST", "/predictions/x", 405),
        ("PUT", "/predictions/x/cancel", 405),
        ("PUT", "/predictions/x/y", 404),
        ("PUT", "/predictions/", 404),
        ("POST", "/predictions/", 404),
        ("PUT", "/predictions/x/", 404),
        ("PUT", "/predictions/..", 422),
        ("PUT", "/predictions/.hidden", 422),
        ("PUT", "/predictions/a b", 422),
        ("PUT", "/predictions/a\x00", 422),
        ("PUT", "/predictions/ü", 422),
        ("PUT", "/predictions/" + "x" * 65, 422),
        ("POST", "/predictions/..%2f/cancel", 422),
    ],
)
def test_no_other_route(method, path, status):
    with pytest.raises(Refused) as caught:
        find_route(method, path, RULES)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:5000",
        "127.0.0.1:5000",
        "10.1.2.3",
        "[::1]:5000",
        "models.example.org",
        "MODELS.example.org:1",
    ],
)
def test_hosts_that_are_this_server(host):
    check_sender({"host": host, "origin": f"http://{host}"}, START, RULES)
    check_sender({"host": host, "origin": "http://localhost:7860"}, START, RULES)
    check_sender({"host": host, "origin": "https://models.example.org"}, START, RULES)
    check_sender({"host": host}, START, RULES)


@pytest.mark.parametrize(
    "host",
    ["", "evil.net", "localhost.evil.net", "models.example.org.evil.net", "127.0.0.1.evil.net", "[::1", "a@evil.net"],
)
def test_a_name_that_somebody_pointed_here_is_refused(host):
    with pytest.raises(Refused, match="this server is not known as"):
        check_sender({"host": host}, START, RULES)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.net",
        "null",
        "https://evil.net:5000",
        "file://",
        "http://203.0.113.5",
        "http://127.0.0.1:81",
        "http://[",
        "http://",
        "",
        "http://localhost.evil.net",
        "http://evil.net/localhost",
        "x",
    ],
)
def test_pages_of_other_sites_are_refused(origin):
    with pytest.raises(Refused, match="may not use this server"):
        check_sender({"host": "127.0.0.1", "origin": origin}, START, RULES)


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ("Bearer second", True),
        ("bearer  second", True),
        ("Bearer first", True),
        ("", False),
        ("Bearer", False),
        ("Bearer third", False),
        ("Bearer firs", False),
        ("Basic first", False),
        ("Bearer ü", False),
        ("Bearer \u00c3\u00bc", True),  # UTF-8, as it comes over HTTP
    ],
)
def test_keys(given, passes):
    rules, headers = Rules(keys=("first", "second", "ü")), {"host": "localhost", "authorization": given}
    if passes:
        check_sender(headers, START, rules)
    else:
        with pytest.raises(Refused, match="asks for a key"):
            check_sender(headers, START, rules)
    check_sender({"host": "localhost"}, Route(kind="look", path="/health-check"), rules)


def test_the_runtime_gets_the_fields_it_knows_once_each():
    content = (
        b'{"input": {"prompt": "no"}, "input": {"prompt": "\\u00fc"}, "output_file_prefix": "http://in/", "id": "x-1"}'
    )
    assert json.loads(check_body(content, RULES).content) == {"input": {"prompt": "ü"}, "id": "x-1"}


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"\xff", 400),
        (b"[]", 422),
        (b'{"id": "../x"}', 422),
        (b'{"id": 5}', 422),
        (b'{"webhook": "http://127.0.0.1:8001/x"}', 422),
        (b'{"webhook": "http://127.0.0.1:8000/../x"}', 422),
        (b'{"webhook": "https://h.org/one/more"}', 422),
        (b'{"webhook": "https://h.org@evil.net/one"}', 422),
        (b'{"webhook": "file:///etc/passwd"}', 422),
        (b'{"webhook": "https://evil.net\\\\@h.org/one"}', 422),
        (b'{"webhook": "http://127.0.0.1:8000/a\\\\..\\\\..\\\\b"}', 422),
        (b'{"webhook": "http://127.0.0.1:8000/ b"}', 422),
        (b'{"webhook": "http://127.0.0.1:8000/\\tb"}', 422),
        (b'{"webhook": "http://me:secret@127.0.0.1:8000/b"}', 422),
        (b'{"webhook": ["http://127.0.0.1:8000/"]}', 422),
        (b'{"webhook": "http://127.0.0.1:8000/' + b"x" * 2048 + b'"}', 422),
        (b'{"webhook_events_filter": ["begin"]}', 422),
        (b'{"webhook_events_filter": [["start"]]}', 422),
        (b'{"webhook_events_filter": "start"}', 422),
    ],
)
def test_bodies_that_do_not_pass(content, status):
    with pytest.raises(Refused) as caught:
        check_body(content, RULES)
    assert caught.value.status == status


@pytest.mark.parametrize("letter", ["x", "ü", "🦙", '"', "\n", "\x01"])
def test_a_context_is_bounded_by_its_json(letter):
    """In UTF-8, as the runtime writes it for its worker."""
    room = (64 << 10) - len('{"k":""}')
    each = len(json.dumps(letter, ensure_ascii=False).encode()) - 2
    largest = letter * (room // each)
    passed = json.loads(check_body(json.dumps({"context": {"k": largest}}).encode(), RULES).content)
    assert passed == {"context": {"k": largest}}
    with pytest.raises(Refused, match="context may have 64 KiB as JSON; what the model is to read goes into input"):
        check_body(json.dumps({"context": {"k": largest + letter}}).encode(), RULES)


def test_many_small_keys_of_a_context_count_too():
    with pytest.raises(Refused, match="context may have 64 KiB"):
        check_body(json.dumps({"context": {str(number): "" for number in range(8000)}}).encode(), RULES)


@pytest.mark.parametrize("context", [None, [], "x", {"x": 1}, {"x": None}, {"x": {"y": "z"}}])
def test_a_context_of_another_shape_is_refused(context):
    with pytest.raises(Refused, match="expected an object whose values are texts"):
        check_body(json.dumps({"context": context}).encode(), RULES)


def test_the_events_of_a_webhook_are_passed_once_each():
    given = ["completed", "start"] * 1000
    content = check_body(json.dumps({"webhook_events_filter": given}).encode(), RULES).content
    assert json.loads(content) == {"webhook_events_filter": ["start", "completed"]}


@pytest.mark.parametrize("webhook", ["http://127.0.0.1:8000/done", "https://h.org/one", "https://h.org/one?x=1", None])
def test_webhooks_that_the_operator_lists(webhook):
    content = json.dumps({"input": {}, "webhook": webhook}).encode()
    assert json.loads(check_body(content, RULES).content)["webhook"] == webhook
