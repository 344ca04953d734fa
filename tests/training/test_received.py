"""What a client may give as a training's data: itself, or an address of the operator's list; bounded, and stoppable."""

import base64
import contextlib
import gzip
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from alpaca.data.records import read_examples
from alpaca.errors import InputError, MissingInput, MissingPackage
from alpaca.files.network.addresses import split_list
from alpaca.training import received, service
from alpaca.training.received import DownloadStopped, receive_data

CONTENT = json.dumps([{"instruction": "Say a.", "output": "a ü 🦙"}]).encode()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/away/"):
            self.send_response(302)
            self.send_header("Location", urllib.parse.unquote(self.path.removeprefix("/away/")))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client went away
            while self.path in ("/silent", "/slow", "/endless"):
                if self.path != "/silent":
                    self.wfile.write(b"[" * (1 if self.path == "/slow" else 1 << 20))
                if self.path != "/endless":
                    time.sleep(0.02)
                    self.connection.getpeername()
            self.wfile.write(b"secret, and no JSON" if self.path == "/other" else CONTENT)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def receive(data: str, folder, allowed: str = "", stop: threading.Event | None = None):
    return receive_data(data, folder, allowed=split_list(allowed), stop=stop or threading.Event())


@pytest.mark.parametrize(
    "head", ["data:application/json;base64,", "data:;base64,", "data:text/plain;charset=utf-8;BASE64,"]
)
def test_an_upload_is_what_was_sent(tmp_path, head, monkeypatch):
    monkeypatch.setattr(received, "_BASE64_PIECE", 8)
    found = receive(head + base64.b64encode(CONTENT).decode(), tmp_path)
    assert found.path.read_bytes() == CONTENT
    assert found.is_upload


def test_an_upload_may_be_quoted_characters(tmp_path):
    assert receive("data:," + urllib.parse.quote(CONTENT), tmp_path).path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "data",
    [
        "/etc/passwd",
        "../alpaca/data/sample.json",
        "alpaca/data/sample.json",
        "/dev/zero",
        "tatsu-lab/alpaca",
        "",
        "data:x",
    ],
)
def test_no_path_and_no_name_of_the_server_is_data(tmp_path, data):
    with pytest.raises(
        InputError, match=r"expected the examples themselves as a data URL .*Clients may not name files"
    ):
        receive(data, tmp_path, allowed="/etc/,http://h/")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"PAR1 and more", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10\0\0\0"])
def test_tables_are_not_taken_over_http(tmp_path, content):
    with pytest.raises(InputError, match=r"Parquet and Arrow files are not taken over HTTP"):
        receive("data:;base64," + base64.b64encode(content).decode(), tmp_path)
    packed = receive("data:;base64," + base64.b64encode(gzip.compress(content)).decode(), tmp_path)
    with pytest.raises(InputError, match=r"is a packed Parquet or Arrow file, which is packed in itself"):
        read_examples(packed.path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("file:///etc/passwd", "expected an http or https address"),
        ("ftp://h/x", "expected an http or https address"),
        ("data:;base64,%%%%", "expected base64 after ;base64"),
        ("http://127.0.0.1/x", "does not allow the address 'http://127.0.0.1/x'"),
    ],
)
def test_what_else_is_no_data(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        receive(data, tmp_path)


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("https://h.org/data/a.json", True),
        ("https://H.ORG:443/data/sub/a.json?token=1", True),
        ("https://user:secret@h.org/data/a.json", True),
        ("https://h.org/one.json", True),
        ("http://in.net:8000/", True),
        ("http://h.org/data/a.json", False),
        ("https://h.org:444/data/a.json", False),
        ("https://h.org/database", False),
        ("https://h.org/one.json/more", False),
        ("https://h.org/data/../secret", False),
        ("https://h.org/data/%2e%2e/secret", False),
        ("https://h.org.evil.net/data/a.json", False),
        ("https://h.org@evil.net/data/a.json", False),
        ("https://evil.net/https://h.org/data/", False),
    ],
)
def test_only_addresses_of_the_list_are_asked(tmp_path, monkeypatch, address, is_allowed):
    asked = []
    monkeypatch.setattr(received, "_download", lambda address, path, **options: asked.append(address))
    with (
        contextlib.nullcontext() if is_allowed else pytest.raises(InputError, match="operator of this server does not")
    ):
        receive(address, tmp_path, allowed=" https://h.org/data/, https://h.org/one.json,http://in.net:8000/")
    assert len(asked) == is_allowed


def test_an_allowed_file_comes_whole(server, tmp_path):
    found = receive(f"{server}/data.json", tmp_path, allowed=server + "/")
    assert found.path.read_bytes() == CONTENT
    assert not found.is_upload


def test_a_redirect_leads_nowhere_else(server, tmp_path):
    inside = urllib.parse.quote(f"{server}/data.json", safe="")
    assert receive(f"{server}/away/{inside}", tmp_path, allowed=server + "/").path.read_bytes() == CONTENT
    with pytest.raises(InputError, match=r"redirects to http://127\.0\.0\.1:\d+/data.json, which is not allowed"):
        receive(f"{server}/away/{inside}", tmp_path, allowed=server + "/away/")


def test_a_file_that_is_not_there(server, tmp_path):
    with pytest.raises(MissingInput, match="HTTP 404"):
        receive(f"{server}/none", tmp_path, allowed=server + "/")


def test_a_file_without_end_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(received, "MOST_BYTES", 3 << 20)
    with pytest.raises(InputError, match="at most 3 MiB of examples"):
        receive(f"{server}/endless", tmp_path, allowed=server + "/")
    assert (tmp_path / "data.json").stat().st_size <= 3 << 20
    with pytest.raises(InputError, match="at most 3 MiB of examples"):
        receive("data:;base64," + "A" * (5 << 20), tmp_path)


@pytest.mark.parametrize("path", ["/slow", "/silent"])
def test_a_cancel_ends_a_download_at_once(server, tmp_path, path):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(DownloadStopped, match="cancelled"):
        receive(server + path, tmp_path, allowed=server + "/", stop=stop)
    assert time.monotonic() - begun < 5


def test_a_download_has_its_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(received, "MOST_DOWNLOAD_S", 0.2)
    with pytest.raises(MissingInput, match="sent no whole file within"):
        receive(f"{server}/slow", tmp_path, allowed=server + "/")


def test_a_package_that_is_missing_is_said_without_the_path_of_the_data(tmp_path):
    mine = receive("data:,x", tmp_path)
    with pytest.raises(MissingPackage, match=r"^data is packed by zstd$"), service._hides_what_was_not_sent(mine):
        raise MissingPackage(f"{mine.path} is packed by zstd")


def test_a_model_that_is_not_there_is_named_as_the_client_named_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInput, match=r"^no model in weights/none\. model must name") as caught:
        service._open_base("weights/none")
    assert str(tmp_path) not in str(caught.value)


def test_errors_quote_an_upload_and_nothing_else(server, tmp_path):
    mine = receive("data:," + urllib.parse.quote('[{"instruction": "mine"}]'), tmp_path)
    with (
        pytest.raises(InputError, match=r"^data, record 0 .*'output' is missing"),
        service._hides_what_was_not_sent(mine),
    ):
        read_examples(mine.path)
    other = receive(f"{server}/other", tmp_path, allowed=server + "/")
    with (
        pytest.raises(InputError, match="holds no examples that can be read") as caught,
        service._hides_what_was_not_sent(other),
    ):
        read_examples(other.path)
    assert "secret" not in str(caught.value)
