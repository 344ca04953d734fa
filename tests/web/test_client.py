"""The page's client against the real server: streams, stops, waits for a slot, and says what is wrong."""

import asyncio
import contextlib
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest

from alpaca.errors import InputError
from deploy.local_server import LocalServer, running_server
from tests.conftest import ROOT
from tests.test_imports import imported
from web.client import (
    Ended,
    Event,
    Generation,
    Piece,
    Server,
    ServerTrouble,
    Started,
    Waiting,
    plain_error,
    read_events,
)
from web.knobs import read_knobs
from web.trainings import serves_trainings

RAW = {"prompt": "", "prompt_template": "{prompt}"}
LONG = {**RAW, "max_new_tokens": 2000, "min_new_tokens": 2000, "stream": True}


@pytest.fixture(scope="module")
def running(llama_folder) -> Iterator[LocalServer]:
    with running_server(["--weights", str(llama_folder), "--concurrency", "2"], on_failure=print) as server:
        yield server


@pytest.fixture
def server(running) -> Server:
    return Server(running.url)


async def collect(generation: Generation) -> list[Event]:
    return [event async for batch in generation.batches() for event in batch]


def test_a_server_of_predictions_serves_no_trainings(server):
    assert not asyncio.run(serves_trainings(server))


def run(server: Server, values: dict, **options: float) -> list[Event]:
    return asyncio.run(collect(Generation(server, values, **options)))


def text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


async def first_piece(batches: AsyncIterator[list[Event]]) -> None:
    async for batch in batches:
        if any(isinstance(event, Piece) for event in batch):
            return


def log_says(running: LocalServer, what: str, generation: Generation) -> bool:
    """Whether the server logged this of the prediction, within a moment."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if any(what in line and generation.id in line for line in list(running.logs)):
            return True
        time.sleep(0.02)
    return False


# What is asked is what is got ---------------------------------------------------------------------------------------


def test_the_streamed_pieces_are_the_servers_own_answer(running, server):
    asked = {**RAW, "max_new_tokens": 60, "min_new_tokens": 60, "seed": 5}
    whole = running.predict(asked)
    events = run(server, {**asked, "stream": True})
    assert isinstance(events[0] if not isinstance(events[0], Waiting) else events[1], Started)
    assert len([event for event in events if isinstance(event, Piece)]) > 20
    assert [text(events)] == whole["output"]
    end = events[-1]
    assert (end.status, end.error) == ("succeeded", "")
    assert (end.metrics["output_tokens"], end.metrics["seed"]) == (60, 5)
    assert end.metrics["tokens_per_second"] > 0


def test_several_completions_come_each_with_its_index(running, server):
    asked = {**RAW, "max_new_tokens": 8, "n": 3, "seed": 1}
    events = run(server, asked)
    pieces = [event for event in events if isinstance(event, Piece)]
    assert [piece.index for piece in pieces] == [0, 1, 2]
    assert [piece.text for piece in pieces] == running.predict(asked)["output"]


def test_the_inputs_are_read_from_the_server_itself(server):
    assert asyncio.run(server.health()).state == "ready"
    knobs = read_knobs(asyncio.run(server.schema()))
    assert [knob.name for knob in knobs][:3] == ["prompt", "input", "prompt_template"]


# Stopping -----------------------------------------------------------------------------------------------------------


def test_stop_cancels_at_the_server(running, server):
    async def act() -> tuple[Generation, list[Event], float]:
        generation = Generation(server, LONG)
        batches = generation.batches()
        await first_piece(batches)
        asked_at = time.monotonic()
        stopping = asyncio.create_task(generation.stop())
        rest = [event async for batch in batches for event in batch]
        await stopping
        return generation, rest, time.monotonic() - asked_at

    generation, rest, took_s = asyncio.run(act())
    assert rest[-1].status == "canceled"
    assert log_says(running, "Prediction cancelled", generation)
    assert took_s < 4  # the server said so; nobody waited for the grace to pass
    assert run(server, {**RAW, "max_new_tokens": 2})[-1].status == "succeeded"


def test_to_stop_reading_cancels_at_the_server(running, server):
    async def act() -> bool:
        generation = Generation(server, LONG)
        async with contextlib.aclosing(generation.batches()) as batches:
            await first_piece(batches)
        return await asyncio.to_thread(log_says, running, "Prediction cancelled", generation)

    assert asyncio.run(act())  # the end of this loop would close the connection, too


def test_stop_at_once_never_leaves_a_prediction_running(running, server):
    """The cancel may come to the server before the request does, which it then knows nothing of."""

    async def act() -> tuple[Generation, list[Event]]:
        generation = Generation(server, LONG)
        events, _ = await asyncio.gather(collect(generation), generation.stop())
        return generation, events

    generation, events = asyncio.run(act())
    assert events[-1].status == "canceled"
    assert running.predict({**RAW, "max_new_tokens": 1})["status"] == "succeeded"
    started = any("Starting prediction" in line and generation.id in line for line in running.logs)
    assert not started or log_says(running, "Prediction cancelled", generation)


@contextlib.asynccontextmanager
async def full(server: Server) -> AsyncIterator[None]:
    """Both slots of the server taken."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            batches = await stack.enter_async_context(contextlib.aclosing(Generation(server, LONG).batches()))
            await first_piece(batches)
        yield


def test_a_full_server_is_waited_for(running, server):
    async def act() -> list[Event]:
        generation = Generation(server, {**RAW, "max_new_tokens": 2})
        async with full(server):
            waiting = asyncio.create_task(collect(generation))
            await asyncio.sleep(1)
            assert not waiting.done()
        return await waiting

    events = asyncio.run(act())
    assert isinstance(events[0], Waiting)
    assert events[-1].status == "succeeded"


def test_what_waits_for_a_slot_can_be_stopped_and_gives_up_some_time(running, server):
    async def act() -> tuple[Generation, list[Event], list[Event]]:
        stopped = Generation(server, {**RAW, "max_new_tokens": 2})
        async with full(server):
            waiting = asyncio.create_task(collect(stopped))
            await asyncio.sleep(0.2)
            await stopped.stop()
            return stopped, await waiting, await collect(Generation(server, RAW, patience_s=0.6))

    stopped, events, impatient = asyncio.run(act())
    assert events[-1].status == "canceled"
    assert not any("Starting prediction" in line and stopped.id in line for line in running.logs)
    assert impatient[-1].error == "The server was full for 1 seconds. Try again in a while."


# What is wrong, in a sentence ---------------------------------------------------------------------------------------


def test_a_prompt_too_long_is_said_without_names_of_classes(server):
    end = run(server, {"prompt": "word " * 3000, "stream": True})[-1]
    assert end.status == "failed"
    assert end.error.startswith("The prompt is ")
    assert "characters long; the model's context is 2,048 tokens" in end.error


def test_refused_inputs_are_named_with_their_bounds(server):
    end = run(server, {"prompt": "x", "temperature": 9, "n": 0})[-1]
    assert end.error == "n: 0 is less than the minimum of 1. temperature: 9 is greater than the maximum of 5."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("Prediction failed: Prediction failed: ValueError: boom", "Boom"),
        ("Prediction failed: Generator iteration error: PromptTooLong: it is: long", "It is: long"),
        ("Prediction failed: GPU: gone", "GPU: gone"),
        ("", "The server gave no reason; its log may."),
    ],
)
def test_the_runtimes_own_words_are_left_out(error, said):
    assert plain_error(error) == said


def test_nobody_there():
    nobody = Server("http://127.0.0.1:9")
    expected = "No server answers at http://127.0.0.1:9. Start it with script/serve"
    assert asyncio.run(nobody.health()).sentence.startswith(expected)
    assert run(nobody, {"prompt": "x"})[-1].error.startswith(expected)
    with pytest.raises(ServerTrouble, match="No server answers"):
        asyncio.run(nobody.schema())


@pytest.fixture(scope="module")
def starting(llama_folder) -> Iterator[LocalServer]:
    """A second server, of which the first test that asks for it sees the start."""
    server = LocalServer(["--weights", str(llama_folder)])
    yield server
    server.stop()


def test_a_server_that_loads_its_model_says_so_and_then_answers(starting):
    while not starting.url:
        time.sleep(0.01)
    server = Server(starting.url)
    assert asyncio.run(server.health()).state == "starting"
    assert "it loads the model" in run(server, {"prompt": "x"})[-1].error  # the runtime: "does not support streaming"
    with pytest.raises(ServerTrouble, match="it loads the model"):
        asyncio.run(server.schema())
    starting.wait_until("READY")
    assert run(server, {**RAW, "max_new_tokens": 2})[-1].status == "succeeded"


def test_a_server_without_a_model_gives_its_reason(server_without_model):
    health = asyncio.run(Server(server_without_model.url).health())
    assert health.state == "broken"
    assert "could not load its model" in health.sentence
    assert re.search("It says: No model in .*/nothing", health.sentence)


def test_a_server_killed_in_the_middle(starting):
    server = starting
    server.wait_until("READY")
    children = psutil.Process(server.process.pid).children(recursive=True)

    async def act() -> Ended:
        batches = Generation(Server(server.url), LONG).batches()
        await first_piece(batches)
        server.process.send_signal(signal.SIGKILL)
        *_, last = [event async for batch in batches for event in batch]
        return last

    try:
        end = asyncio.run(act())
    finally:
        for child in children:  # it ends by itself, some seconds later
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        server.stop()
    assert end.status == "failed"
    assert end.error.startswith(
        "The connection to the server broke off before the answer was complete. No server answers"
    )


def test_a_worker_killed_in_the_middle_is_not_waited_for(running, server):
    """The last to ask the module's server, which starts its worker again."""

    async def act() -> Ended:
        batches = Generation(server, LONG).batches()
        await first_piece(batches)
        runtime, worker = psutil.Process(running.process.pid).children(recursive=True)
        assert worker.ppid() == runtime.pid
        worker.kill()
        *_, last = [event async for batch in batches for event in batch]
        return last

    assert "worker died while it computed this" in asyncio.run(act()).error
    deadline = time.monotonic() + 30
    while (
        status := run(server, {**RAW, "max_new_tokens": 2})[-1].status
    ) != "succeeded" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status == "succeeded"


# What is not the real server ----------------------------------------------------------------------------------------


class Pretender(http.server.BaseHTTPRequestHandler):
    """Some other web server, which writes down what it was sent."""

    seen: list[str | None] = []  # noqa: RUF012  one of a kind

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization"))
        self.send_response(401 if self.path == "/openapi.json" else 200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def do_PUT(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'event: output\ndata: {"chunk": \n\n')

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def pretender() -> Iterator[str]:
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pretender)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    Pretender.seen.clear()
    yield f"127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()
    thread.join()


def test_some_other_server_is_told_apart(pretender):
    health = asyncio.run(Server(f"http://{pretender}").health())
    assert (health.state, "is no server of this kind (status 200)" in health.sentence) == ("broken", True)


def test_an_answer_that_is_no_json_ends_the_prediction(pretender, caplog):
    end = run(Server(f"http://{pretender}"), {"prompt": "x"})[-1]
    assert (end.status, "could not be read (JSONDecodeError" in end.error) == ("failed", True)
    assert "Traceback" in caplog.text


def test_a_token_is_sent_and_never_shown(pretender):
    server = Server(f"http://me:hush@{pretender}/", token="secret-token")
    health = asyncio.run(server.health())
    assert Pretender.seen == ["Bearer secret-token"]
    said = health.sentence + server.name
    assert f"http://{pretender}" in said
    assert "secret" not in said
    assert "hush" not in said


@pytest.mark.parametrize("target", ["127.0.0.1:5000", "ftp://x", "http://", "here", "http://[::1"])
def test_a_target_that_is_no_address(target):
    with pytest.raises(InputError, match=r"--target must be an address such as http://127\.0\.0\.1:5000; found "):
        Server(target)


def test_lines_end_at_line_feeds_only():
    """JSON may hold U+2028, U+2029 and U+0085 as they are; and a piece of the network ends anywhere."""
    chunk = "one\u2028two\u2029three\u0085four ไ"
    wire = f"event: output\ndata: {json.dumps({'chunk': chunk, 'index': 0}, ensure_ascii=False)}\n\n".encode()

    async def read(size: int) -> list[tuple[str, dict]]:
        async def parts() -> AsyncIterator[bytes]:
            for i in range(0, len(wire), size):
                yield wire[i : i + size]

        return [event async for event in read_events(parts())]

    for size in (1, 7, 1000):
        assert asyncio.run(read(size)) == [("output", {"chunk": chunk, "index": 0})]


# The command --------------------------------------------------------------------------------------------------------


def test_the_page_imports_nothing_of_the_model():
    files = sorted((ROOT / "web").glob("*.py"))
    assert len(files) > 3
    ours = {name for file in files for name in imported(file) if name.split(".")[0] in ("alpaca", "cog", "predict")}
    assert {".".join(name.split(".")[:2]) for name in ours} == {"alpaca.errors", "alpaca.pages"}
    code = "import sys, web.__main__, web.client, web.knobs; print({'torch', 'transformers', 'cog'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_without_the_extra_the_command_names_it():
    code = "import sys, runpy; sys.modules['gradio'] = None; sys.argv = ['web']; "
    code += "runpy.run_module('web', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the page needs an extra: pip install --group web" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said():
    from web.__main__ import listen

    with (
        listen("127.0.0.1", 0) as taken,
        pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1 port \d+ .*; --port 0 picks a free one"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
