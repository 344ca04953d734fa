"""Downloads from real local HTTP servers: resumed, restarted, checked, never twice, and silent about secrets."""

import contextlib
import hashlib
import logging
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from alpaca.errors import InputError, MissingInput, NotEnoughSpace
from alpaca.files import downloads
from alpaca.files.downloads import cache_folder, download
from alpaca.files.network import requests, retries
from alpaca.files.network.addresses import parse_address
from alpaca.files.uploads import upload
from tests.conftest import ROOT
from tests.disk_events import until_rename_to, watch_disk

CONTENT = random.Random(0).randbytes(4_000_000)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPACA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(requests, "_TIMEOUT_S", 2.0)


class FileServer(ThreadingHTTPServer):
    """Serves CONTENT at any path. `behave` may answer a request itself, returning True, or change the attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.etag, self.date, self.ranges = CONTENT, '"one"', "", True
        self.drop_after: list[int] = []  # of the next requests for data: bytes before the connection ends
        self.sending: list[_Handler] = []
        self.served, self.requests, self.behave, self.pause_s = 0, [], lambda handler: False, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.tar"

    def data_requests(self) -> list[str]:
        """The Range of each request but those that ask for the first byte only."""
        return [asked for asked in self.requests if asked != "bytes=0-0"]


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        server.requests.append(asked)
        if server.behave(self):
            return
        size = len(server.content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if server.ranges else None
        if match and self.headers.get("If-Range", server.etag or server.date) in (server.etag, server.date):
            first, last = int(match[1]), min(int(match[2] or size), size - 1)
            if first >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            first, last = 0, size - 1
            self.send_response(200)
        self.send_header("Content-Length", str(last - first + 1))
        for name, value in (("ETag", server.etag), ("Last-Modified", server.date)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        most = server.drop_after.pop(0) if server.drop_after and asked != "bytes=0-0" else size
        self._send(server.content[first : last + 1][:most])

    def _send(self, data: bytes) -> None:
        self.server.sending.append(self)
        with contextlib.suppress(OSError):  # the client went away
            for start in range(0, len(data), 50_000):
                self.server.served += len(data[start : start + 50_000])
                self.wfile.write(data[start : start + 50_000])
                time.sleep(self.server.pause_s)
        self.server.sending.remove(self)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answer(handler: BaseHTTPRequestHandler, status: int, **headers: str) -> bool:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    return True


def left_in_cache() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "downloads").iterdir() if not path.name.startswith("."))


# The file ---------------------------------------------------------------------------------------------------------


def test_the_file_arrives_once(server):
    file = download(server.url)
    assert file.read_bytes() == CONTENT
    assert download(server.url) == file  # as a second start does
    assert server.data_requests() == [""]
    deadline = time.monotonic() + 5
    while server.served < len(CONTENT) + 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # who only wants to know the version does not wait for the byte
    assert server.served == len(CONTENT) + 2
    server.content, server.etag = CONTENT[::-1], '"two"'
    newer = download(server.url)
    assert newer != file
    assert newer.read_bytes() == CONTENT[::-1]


def test_the_file_is_on_the_disk_before_it_takes_its_name(server, monkeypatch):
    events = watch_disk(cache_folder() / "downloads", monkeypatch)
    name = download(server.url).name
    partial = f".{downloads._key(parse_address(server.url))}.partial"
    assert partial in until_rename_to(events, name)


def test_a_broken_connection_is_gone_on_with(server):
    server.drop_after = [1_500_000, 1_200_000, 0]
    assert download(server.url).read_bytes() == CONTENT
    assert server.data_requests() == ["", "bytes=1500000-", "bytes=2700000-", "bytes=2700000-"]
    assert server.served == len(CONTENT) + 1


@pytest.mark.parametrize("why", ["no ranges", "weak tag", "another file"])
def test_what_cannot_be_resumed_is_begun_again(server, why):
    server.drop_after = [1_500_000]
    if why == "no ranges":
        server.ranges = False
    elif why == "weak tag":
        server.etag = 'W/"one"'
    else:

        def change(handler) -> bool:
            if len(server.data_requests()) == 2:
                server.content, server.etag = CONTENT[::-1], '"two"'
            return False

        server.behave = change
    assert download(server.url).read_bytes() == server.content
    assert server.data_requests() == (["", ""] if why == "weak tag" else ["", "bytes=1500000-"])


def test_a_date_resumes_too_and_nothing_at_all_is_not_trusted(server):
    server.etag, server.date, server.drop_after = "", "Sat, 21 Nov 2026 10:00:00 GMT", [1_500_000]
    assert download(server.url).read_bytes() == CONTENT
    assert server.data_requests() == ["", "bytes=1500000-"]
    server.date, server.content = "", CONTENT[::-1]  # of the same size
    for _ in range(2):
        assert download(server.url).read_bytes() == CONTENT[::-1]
    assert server.data_requests()[2:] == ["", ""]


def test_a_server_that_ignores_if_range_is_caught(server):
    def change(handler) -> bool:
        if len(server.data_requests()) == 2 and server.etag == '"one"':
            server.content, server.etag = CONTENT[::-1], '"two"'
            handler.headers.replace_header("If-Range", '"two"')
        return False

    server.behave, server.drop_after = change, [1_500_000]
    assert download(server.url).read_bytes() == CONTENT[::-1]


KILLED = """
import sys
from alpaca.files.downloads import download
print(download(sys.argv[1]), flush=True)
"""


def start_process(url: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", KILLED, url], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_is_gone_on_with(server):
    server.pause_s = 0.02  # 1.6 s for all of it
    process = start_process(server.url)
    while server.served < 1_000_000 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    while server.sending:
        time.sleep(0.01)
    (partial,) = (cache_folder() / "downloads").glob(".*.partial")
    had, server.pause_s = partial.stat().st_size, 0.0
    assert 500_000 < had < len(CONTENT)
    before = server.served
    assert download(server.url).read_bytes() == CONTENT
    assert server.data_requests() == ["", f"bytes={had}-"]
    assert server.served - before == len(CONTENT) - had + 1
    assert not list((cache_folder() / "downloads").glob(".*.partial"))


def test_killed_after_the_last_byte(server, monkeypatch, tmp_path):
    def interrupt(*arguments) -> None:
        raise KeyboardInterrupt("now")

    monkeypatch.setattr(downloads, "_check_digest", interrupt)
    with pytest.raises(KeyboardInterrupt, match="now"):
        download(server.url)
    monkeypatch.undo()
    monkeypatch.setenv("ALPACA_CACHE", str(tmp_path / "cache"))
    assert download(server.url).read_bytes() == CONTENT
    assert server.served == len(CONTENT) + 2
    assert server.data_requests() == ["", f"bytes={len(CONTENT)}-"]


def test_two_processes_at_once_download_once(server):
    server.pause_s = 0.005
    processes = [start_process(server.url) for _ in range(2)]
    names = {process.communicate(timeout=60)[0] for process in processes}
    assert len(names) == 1
    assert Path(names.pop().strip()).read_bytes() == CONTENT
    assert server.data_requests() == [""]


def test_uploads(server, tmp_path):
    (tmp_path / "w x.tar").write_bytes(CONTENT)
    seen, calls = [], []

    def put(handler) -> None:
        body = b"".join(handler.rfile.read(500_000) for _ in range(len(CONTENT) // 500_000))
        seen.append((handler.path, handler.headers["Authorization"], handler.headers["Content-Length"], body))
        answer(handler, 503 if len(seen) == 1 else 201, Content_Length="0", **location)

    _Handler.do_PUT = put
    location = {}
    place = f"http://me:hidden1@127.0.0.1:{server.server_port}/to/?sig=hidden2"
    there = upload(tmp_path / "w x.tar", place, on_piece=lambda: calls.append(1))
    assert there == f"http://127.0.0.1:{server.server_port}/to/w%20x.tar"
    assert seen == [("/to/w%20x.tar?sig=hidden2", "Basic bWU6aGlkZGVuMQ==", "4000000", CONTENT)] * 2
    assert len(calls) == 8
    location = {"Location": "/final/5"}
    assert upload(tmp_path / "w x.tar", place) == f"http://127.0.0.1:{server.server_port}/final/5"


def test_a_location_that_is_none_does_not_undo_an_upload(server, tmp_path, monkeypatch):
    (tmp_path / "w.tar").write_bytes(b"x")
    for location in ("http://[", "http://ho st:x/", "mailto:someone"):

        def put(handler, location=location) -> None:
            handler.rfile.read(1)
            answer(handler, 201, Content_Length="0", Location=location)

        monkeypatch.setattr(_Handler, "do_PUT", put, raising=False)
        place = f"http://127.0.0.1:{server.server_port}/to"
        assert upload(tmp_path / "w.tar", place) == f"{place}/w.tar"


def test_a_failed_upload_speaks_of_no_download(tmp_path):
    (tmp_path / "w.tar").write_bytes(b"x")
    with pytest.raises(MissingInput, match=r"could not be uploaded in 6 tries: .*; check the address and the network$"):
        upload(tmp_path / "w.tar", "http://127.0.0.1:9/to")
    with pytest.raises(MissingInput, match=r"could not be reached in 6 tries: .*\. Nothing was downloaded yet$"):
        download("http://127.0.0.1:9/w.tar")


def test_an_upload_ends_with_the_error_that_its_caller_raises(server, tmp_path, monkeypatch):
    (tmp_path / "w.tar").write_bytes(CONTENT)
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise InputError("stopped while uploading")

    monkeypatch.setattr(_Handler, "do_PUT", lambda handler: handler.rfile.read(len(CONTENT)), raising=False)
    with pytest.raises(InputError, match=r"^stopped while uploading$"):
        upload(tmp_path / "w.tar", f"http://127.0.0.1:{server.server_port}/to", on_piece=stop)
    assert len(calls) == 2


def test_uploads_follow_no_redirect(server, tmp_path, monkeypatch):
    (tmp_path / "w.tar").write_bytes(b"x")
    seen = []

    def put(handler) -> None:
        seen.append(handler.path)
        handler.rfile.read(1)
        answer(handler, 307, Location="/elsewhere", Content_Length="0")

    monkeypatch.setattr(_Handler, "do_PUT", put, raising=False)
    with pytest.raises(MissingInput, match="the server answered HTTP 307; check the address"):
        upload(tmp_path / "w.tar", f"http://127.0.0.1:{server.server_port}/to")
    assert seen == ["/to/w.tar"]


def test_the_environment_names_the_proxy(server, monkeypatch):
    seen = {}

    def behave(handler) -> bool:
        seen[handler.path] = handler.headers.get("Proxy-Authorization")
        return False

    server.behave = behave
    monkeypatch.setenv("http_proxy", f"me:pw@127.0.0.1:{server.server_port}")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")  # says nothing of http and https here
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert download("http://example.invalid/w.tar").read_bytes() == CONTENT
    assert seen == {"http://example.invalid/w.tar": "Basic bWU6cHc="}
    assert download(server.url).read_bytes() == CONTENT
    assert seen["/weights.tar"] is None
    monkeypatch.setenv("http_proxy", "socks5://me:hidden@127.0.0.1:1")
    with pytest.raises(InputError, match=r"http_proxy: expected an http or https proxy, .* 'socks5'") as caught:
        download("http://example.invalid/w.tar")
    assert "hidden" not in str(caught.value)


def test_redirects_in_a_circle_end(server):
    server.behave = lambda handler: answer(handler, 302, Location="/weights.tar")
    with pytest.raises(MissingInput, match=r"more than 10 redirects; check the address"):
        download(server.url)
    assert len(server.requests) == 11


# What is refused --------------------------------------------------------------------------------------------------


def test_the_digest_is_checked(server):
    right, wrong = hashlib.sha256(CONTENT).hexdigest(), "0" * 64
    with pytest.raises(InputError, match=f"expected sha256 {wrong}, found {right}; it was removed"):
        download(f"{server.url}#sha256={wrong}")
    assert left_in_cache() == []
    file = download(f"{server.url}#sha256={right}")
    assert file.read_bytes() == CONTENT
    asked = len(server.requests)
    assert download(f"{server.url}?signature=another#sha256={right}") == file  # known by its content: nobody is asked
    assert len(server.requests) == asked


def test_a_length_that_never_comes(server):
    server.behave = lambda handler: (
        answer(handler, 200, Content_Length="9000000", ETag='"x"') and not handler._send(CONTENT)
    )
    with pytest.raises(
        MissingInput, match=r"weights\.tar could not be downloaded in 6 tries: .* after 4,000,000 of 9,000,000 bytes"
    ):
        download(server.url)
    assert left_in_cache() == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_redirects_to_other_schemes(server, target):
    server.behave = lambda handler: answer(handler, 302, Location=target)
    scheme = target.split(":")[0]
    with pytest.raises(InputError, match=f"redirects to an address of the scheme '{scheme}'"):
        download(server.url)


@pytest.mark.parametrize("target", ["http://[", "http://127.0.0.1:99999/x", "http://ho%20st:x/", "http://a..b/"])
def test_redirects_to_no_address(server, target):
    server.behave = lambda handler: answer(handler, 302, Location=target)
    with pytest.raises(InputError, match=r"/weights\.tar redirects (to what is no address|elsewhere: .*host such as)"):
        download(server.url)
    assert len(server.requests) == 1


@pytest.mark.parametrize("text", ["²", "9" * 5_000, "-1", "1_000"])
def test_lengths_that_are_no_numbers(server, text):
    server.behave = lambda handler: answer(handler, 200, Content_Length=text)
    with pytest.raises(MissingInput, match="in 6 tries: the server's Content-Length is no number of bytes; "):
        download(server.url)
    server.behave = lambda handler: answer(handler, 206, Content_Range=f"bytes 0-0/{text}", Content_Length="1")
    with pytest.raises(MissingInput, match="in 6 tries: the server sent a part of the file without saying which; "):
        download(server.url)
    server.behave = lambda handler: answer(handler, 416, Content_Range=f"bytes */{text}", Content_Length="0")
    with pytest.raises(MissingInput, match=r"has another file now; .*Whatever the download brought is kept"):
        download(server.url)
    assert left_in_cache() == []


def test_redirects_are_followed_and_passwords_stay(server):
    seen = {}

    def redirect(handler) -> bool:
        seen[handler.path] = handler.headers.get("Authorization")
        return handler.path == "/weights.tar" and answer(handler, 302, Location=f"http://localhost:{port}/moved")

    server.behave, port = redirect, server.server_port
    server.drop_after = [1_500_000]
    url = server.url.replace("127.0.0.1", "me:secret@127.0.0.1")
    assert download(url).read_bytes() == CONTENT
    assert seen == {"/weights.tar": "Basic bWU6c2VjcmV0", "/moved": None}


def test_servers_in_trouble_are_asked_again(server):
    server.behave = lambda handler: len(server.requests) < 4 and answer(handler, 503)
    assert download(server.url).read_bytes() == CONTENT
    server.etag, server.behave = '"new"', lambda handler: answer(handler, 500)
    with pytest.raises(MissingInput, match="in 6 tries: the server answered HTTP 500"):
        download(server.url)
    with pytest.raises(MissingInput, match=r"in 6 tries: no connection \(Connection refused\)"):
        download("http://127.0.0.1:9/weights.tar")


def test_a_server_that_falls_silent(server, monkeypatch):
    monkeypatch.setattr(requests, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(retries, "_MOST_FAILURES", 2)
    server.behave = lambda handler: time.sleep(0.6) is None
    with pytest.raises(MissingInput, match="in 2 tries: no connection"):
        download(server.url)


@pytest.mark.parametrize(("status", "advice"), [(403, "a signed address ends at its time"), (404, "check the address")])
def test_plain_refusals_are_not_tried_again(server, status, advice):
    server.behave = lambda handler: answer(handler, status)
    with pytest.raises(MissingInput, match=f"HTTP {status}; .*{advice}"):
        download(server.url)
    assert len(server.requests) == 1


def test_no_room(server, monkeypatch):
    free = downloads.require_free_space.__globals__["shutil"].disk_usage("/").free
    with pytest.raises(NotEnoughSpace, match="GB free"):
        download(server.url, space_factor=2 * free / len(CONTENT))
    (partial,) = (cache_folder() / "downloads").glob(".*.partial")
    assert partial.stat().st_size == 0


def test_what_may_have_no_end_leaves_room_on_the_disk(server, monkeypatch):
    def send_on(handler: _Handler) -> bool:
        answer(handler, 200, ETag='"x"')
        while len(server.requests) < 50:
            try:
                handler.wfile.write(CONTENT)
            except OSError:
                break
        return True

    free = shutil.disk_usage(cache_folder()).free
    monkeypatch.setattr(downloads, "_KEPT_FREE_BYTES", free - 5_000_000)
    monkeypatch.setattr(downloads, "_LOOK_BYTES", 100_000)
    server.behave = send_on
    with pytest.raises(NotEnoughSpace, match="GB free"):
        download(server.url)
    assert left_in_cache() == []
    assert not list((cache_folder() / "downloads").glob(".*.partial"))


NO_HOSTS = (
    "http://[", "http://u:hidden@[::1/x", f"http://{'a' * 64}.com/x", "http://xn--☃..com/x", "http://☃.com/x",
    "http://host:abc/x", "http://host:0/x", "http://host:99999/x", "http://ho st/x", "http://ho\0st/x", "http://a..b/x",
    "http://[1.2.3.4]/x", "http://me:hid/den@host/x", "http://host/\ud800",
)  # fmt: skip


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "expected an http or https address, found the scheme 'file'"),
        ("ftp://host/x", "found the scheme 'ftp'"),
        ("http:///x", "expected an http or https address"),
        *((url, "with a host such as .* found none that is valid") for url in NO_HOSTS),
        ("https://host/x#sha256=12", "expected sha256= and 64 hexadecimal digits, found 'sha256=12'"),
    ],
)
def test_addresses_that_are_none(url, message):
    with pytest.raises(InputError, match=message) as caught:
        download(url)
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "a_b.example.com.", "[::1]:80", "10.0.0.5:8000", "host:"])
def test_addresses_that_are_some(host):
    assert str(parse_address(f"HTTP://me:x%2Fy@{host}/w.tar?a")) == f"http://{host}/w.tar"


def test_nothing_secret_is_said(server, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    url = server.url.replace("127.0.0.1", "me:hidden1@127.0.0.1") + "?token=hidden2"
    server.drop_after = [1_500_000]
    path = download(url)
    server.behave = lambda handler: answer(handler, 404)
    errors = []
    for text in (url, url.replace("http", "ftp", 1), url + " \n?hidden1", url + f"#sha256={'0' * 64}"):
        with pytest.raises((InputError, MissingInput), match=r".") as caught:
            download(text)
        errors.append(str(caught.value))
    said = "".join([*errors, caplog.text, *capfd.readouterr(), str(path), repr(parse_address(url))])
    assert "downloading http://127.0.0.1" in said
    assert "hidden" not in said
    assert "weights.tar" in said
    assert not [file for file in cache_folder().rglob("*") if file.is_file() and b"hidden" in file.read_bytes()]


def test_the_shared_place_must_be_ones_own(tmp_path, monkeypatch):
    monkeypatch.delenv("ALPACA_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / "alpaca-weights"
    assert (tmp_path / "alpaca-weights").stat().st_mode & 0o777 == 0o700
    (tmp_path / "alpaca-weights").rmdir()
    (tmp_path / "alpaca-weights").symlink_to(tmp_path)
    with pytest.raises(InputError, match="a link or another user's; name a folder of your own with ALPACA_CACHE"):
        cache_folder()
