"""The page in headless Chromium, in front of the real server: what a person at it sees.

Needs the extra `web`, playwright, and a Chromium: ALPACA_CHROMIUM names it (a script that starts it will do), else it
is looked for on the PATH. ALPACA_SCREENSHOTS names a folder for pictures.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.local_server import LocalServer, running_server
from tests.conftest import ROOT

CHROMIUM = os.environ.get("ALPACA_CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Chromium (ALPACA_CHROMIUM)"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}"),
]
IS_DONE = "!document.querySelector('#start').disabled"
TIMEOUT_MS = 60_000


class PageProcess:
    """`python -m web` for a target; `url` is what it printed."""

    def __init__(self, target: str) -> None:
        command = [sys.executable, "-m", "web", "--target", target, "--port", "0"]
        env = {**os.environ, "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        found = re.search(r"page for \S+: (http://127\.0\.0\.1:\d+)", self.process.stdout.readline())
        if not found:
            pytest.fail(f"the page did not start: status {self.stop()}")
        self.url = found[1]

    def stop(self) -> int:
        self.process.terminate()
        status = self.process.wait(timeout=20)
        self.process.stdout.close()
        return status


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory) -> Path:
    """A random LLaMA large enough that a person could press Stop before it is done."""
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments
    from tests.tiny import TinyLlama, train_tokenizer, write_meta

    base = tmp_path_factory.mktemp("slow")
    train_tokenizer(base)
    model = TinyLlama(vocab_size=400, dim=256, n_layers=8)
    write_meta(base / "S", model.tensors(), model.params())
    return convert(parse_arguments(["--input_dir", str(base), "--model_size", "S", "--output_dir", str(base / "out")]))


@pytest.fixture(scope="module")
def server(slow_folder) -> Iterator[LocalServer]:
    with running_server(["--weights", str(slow_folder), "--concurrency", "8"], on_failure=print) as server:
        yield server


@pytest.fixture(scope="module")
def web(server) -> Iterator[PageProcess]:
    process = PageProcess(server.url)
    yield process
    process.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Person:
    """Somebody with the page open; `asked` are the addresses the browser went to, `said` is its console."""

    def __init__(self, browser: Any, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.goto(url)

    def wait_for_form(self) -> "Person":
        self.page.wait_for_selector("#start")
        return self

    def set_number(self, knob: str, value: object) -> None:
        box = self.page.locator(f"#knob-{knob} input[type=number]").first
        box.fill(str(value))
        box.press("Tab")

    def write(self, text: str) -> None:
        self.page.fill("#knob-prompt textarea", text)

    def take_example(self, name: str, beginning: str) -> None:
        self.page.click(f"#examples >> text={name}")
        self.wait_for(f"document.querySelector('#knob-prompt textarea').value.startsWith('{beginning}')")

    def start_long(self) -> None:
        """Raw text of 1,900 tokens, which takes seconds."""
        self.page.fill("#knob-prompt_template input, #knob-prompt_template textarea", "{prompt}")
        self.set_number("max_new_tokens", 1900)
        self.set_number("min_new_tokens", 1900)
        self.write("alpacas")
        self.page.click("#start")
        self.wait_for_text("#line", " pieces")

    def wait_for(self, condition: str) -> None:
        self.page.wait_for_function(condition)

    def wait_for_text(self, selector: str, text: str) -> None:
        self.wait_for(f"document.querySelector('{selector}')?.innerText.includes('{text}')")

    def wait_until_done(self) -> None:
        self.wait_for(IS_DONE)

    def answers(self) -> list[str]:
        return self.page.locator(".card .text").all_inner_texts()

    def line(self) -> str:
        return self.page.inner_text("#line")

    def status(self) -> str:
        return self.page.inner_text("#status")

    def picture(self, name: str, *, whole: bool = False) -> None:
        if folder := os.environ.get("ALPACA_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)


@pytest.fixture
def person(browser, web) -> Iterator[Person]:
    person = Person(browser, web.url).wait_for_form()
    yield person
    person.context.close()


def log_has(server: LocalServer, pattern: str, *, since: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if any(re.search(pattern, line) for line in server.logs[since:]):
            return True
        time.sleep(0.05)
    return False


def watch_lengths(person: Person) -> None:
    """Have the browser note the answer's length every 20 ms."""
    script = "(window.lengths = []) && setInterval(() => window.lengths.push({}), 20) && null"
    person.page.evaluate(script.format("document.querySelector('#answers').innerText.length"))


def test_type_and_see_it_grow(person):
    watch_lengths(person)
    person.start_long()
    person.picture("streaming")
    person.wait_until_done()
    lengths = sorted(set(person.page.evaluate("window.lengths")))
    assert len(lengths) > 10
    assert re.match(r"1900 tokens · [\d.]+ tokens/s · first token after [\d.]+ s · .*seed \d+$", person.line())
    assert len(person.answers()) == 1
    assert person.page.is_disabled("#stop")
    person.picture("done")


def test_the_seed_on_the_page_is_the_servers_seed(person, server):
    """The same figures typed into the page and sent to the server give the same text: nothing is lost between."""
    for knob, value in (("seed", 11), ("max_new_tokens", 20), ("temperature", 1.25), ("top_k", 30)):
        person.set_number(knob, value)
    person.page.fill("#knob-stop textarea", "qqqqq\n\\n\\nzz")
    person.write("Name three Andean animals.")
    person.page.keyboard.press("Shift+Enter")
    person.wait_for_text("#line", "seed 11")
    asked = {"seed": 11, "max_new_tokens": 20, "temperature": 1.25, "top_k": 30, "stop": ["qqqqq", "\n\nzz"]}
    whole = server.predict({"prompt": "Name three Andean animals.", **asked})["output"]
    assert person.page.locator(".card .text").all_text_contents() == whole


def test_stop_stops_the_server(person, server):
    since = len(server.logs)
    person.start_long()
    begun = time.monotonic()
    person.page.click("#stop")
    person.wait_until_done()
    took_s = time.monotonic() - begun
    assert person.line().startswith("Stopped after ")
    assert log_has(server, "Prediction cancelled.*page-", since=since)
    assert took_s < 4
    assert not any("1900 tokens after" in line for line in server.logs[since:])
    assert person.answers()[0]  # what there was stays
    person.picture("stopped")


def test_closing_the_page_stops_the_server(browser, web, server):
    since = len(server.logs)
    person = Person(browser, web.url).wait_for_form()
    person.start_long()
    person.context.close()
    assert log_has(server, "Prediction cancelled.*page-", since=since)


def test_three_side_by_side(person):
    person.set_number("n", 3)
    person.set_number("max_new_tokens", 40)
    person.take_example("FizzBuzz", "Write a Python")
    person.page.click("#start")
    person.wait_for_text("#line", "seed")
    assert all(person.answers())
    assert len(person.answers()) == 3
    boxes = [person.page.locator(".card").nth(i).bounding_box() for i in range(3)]
    assert len({box["y"] for box in boxes}) == 1
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    person.picture("three", whole=True)


def test_copy_copies(person):
    person.set_number("max_new_tokens", 10)
    person.take_example("Alpacas", "Tell me something")
    person.page.click("#start")
    person.wait_for_text("#line", "seed")
    person.page.click(".card button")
    assert person.page.inner_text(".card button") == "copied"
    person.page.click("#knob-input textarea")
    person.page.keyboard.press("Control+V")
    pasted = person.page.input_value("#knob-input textarea")
    assert pasted.split() == person.answers()[0].split()


def test_examples_fill_both_fields(person):
    person.take_example("With an input", "Say in one word")
    assert "llamas carried everything" in person.page.input_value("#knob-input textarea")
    person.take_example("รามาเกียรติ์", "tell me something about รามาเกียรติ์")
    assert person.page.input_value("#knob-input textarea") == ""


def test_what_is_wrong_is_said_in_a_sentence(person):
    person.write("word " * 3000)
    person.page.click("#start")
    person.page.wait_for_selector(".complaint")
    assert re.match(r"The prompt is \d+ tokens long and the model's context is 2048: shorten", person.line())
    person.picture("too_long")
    person.set_number("seed", -1)
    person.write("x")
    person.page.click("#start")
    person.wait_for_text("#line", "seed")
    assert person.line() == "seed must be 0 or more; found -1."
    person.set_number("seed", "")
    person.set_number("max_new_tokens", 3)
    person.page.click("#start")
    person.wait_for_text("#line", "3 tokens")


def test_two_people_at_once(browser, web):
    people = [Person(browser, web.url).wait_for_form() for _ in range(2)]
    for person in people:
        person.start_long()
    before = [len(person.answers()[0]) for person in people]
    people[0].page.wait_for_timeout(500)
    after = [len(person.answers()[0]) for person in people]
    assert [person.page.evaluate(IS_DONE) for person in people] == [False, False]
    assert all(new > old for new, old in zip(after, before, strict=True))
    people[0].page.click("#stop")  # and only the one who asked is stopped
    people[0].wait_until_done()
    people[1].wait_until_done()
    assert people[0].line().startswith("Stopped after ")
    assert people[1].line().startswith("1900 tokens")
    for person in people:
        person.context.close()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_has_nothing_to_scroll_sideways(browser, web, dark):
    person = Person(browser, web.url, width=390, height=844, dark=dark).wait_for_form()
    person.set_number("n", 2)
    person.set_number("max_new_tokens", 60)
    person.take_example("With an input", "Say in one word")
    person.page.click("#start")
    person.wait_for_text("#line", "seed")
    assert person.page.evaluate("document.documentElement.scrollWidth") <= 390
    for selector in ("#start", "#stop", ".card", "#knob-temperature", "#knob-stop"):
        box = person.page.locator(selector).first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    person.picture("phone_dark" if dark else "phone", whole=True)
    person.context.close()


def test_nothing_is_asked_of_any_other_host(browser, web):
    person = Person(browser, web.url).wait_for_form()
    person.set_number("max_new_tokens", 3)
    person.take_example("Alpacas", "Tell me something")
    person.page.click("#start")
    person.wait_for_text("#line", "seed")
    assert len(person.asked) > 10
    assert [url for url in person.asked if not url.startswith((web.url, "data:", "blob:"))] == []
    assert person.said == []  # the browser names what the page's policy kept back
    person.context.close()


def test_the_page_follows_the_server_down_and_up(browser, llama_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--weights", str(llama_folder), "--port", str(port)]
    web = PageProcess(f"http://127.0.0.1:{port}")
    person, server = Person(browser, web.url), None
    try:
        person.wait_for_text("#status", "No server answers")
        assert person.page.locator("#start").count() == 0
        server = LocalServer(flags)
        person.wait_for_form()
        person.write("still here")
        server.stop()
        person.wait_for_text("#status", "No server answers")
        person.page.click("#start")
        person.page.wait_for_selector(".complaint")
        assert person.line().startswith("No server answers at http://127.0.0.1:")
        person.picture("gone")
        server = LocalServer(flags)
        person.wait_for_text("#status", "is ready")
        assert person.page.input_value("#knob-prompt textarea") == "still here"
        person.set_number("max_new_tokens", 3)
        person.page.click("#start")
        person.wait_for_text("#line", "3 tokens")
    finally:
        person.context.close()
        web.stop()
        if server:
            server.stop()


def test_one_signal_ends_the_page_while_it_is_open(browser, server):
    web = PageProcess(server.url)
    person = Person(browser, web.url).wait_for_form()
    assert web.stop() in (0, -15, 143)
    person.context.close()


# The chat -----------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def chat_server(slow_folder, tmp_path_factory) -> Iterator[LocalServer]:
    folder = Path(shutil.copytree(slow_folder, tmp_path_factory.mktemp("chat") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with running_server(["--weights", str(folder)], on_failure=print) as server:
        yield server


class Talker(Person):
    """Somebody at the chat."""

    def say(self, text: str) -> None:
        self.page.fill("#chat-box textarea", text)
        self.page.click("#chat-send")

    def wait_for_answer(self, num_turns: int) -> None:
        self.wait_for(
            f"document.querySelectorAll('.turn .text').length == {num_turns}"
            " && !document.querySelector('.turn.running') && !document.querySelector('#chat-send').disabled"
        )

    def turns(self) -> list[str]:
        return self.page.locator(".turn .text").all_text_contents()

    def chat_line(self) -> str:
        return self.page.inner_text("#chat-line")


@pytest.fixture
def talker(browser, chat_server) -> Iterator[Talker]:
    web = PageProcess(chat_server.url)
    talker = Talker(browser, web.url)
    talker.page.wait_for_selector("#chat-send")
    yield talker
    talker.context.close()
    web.stop()


def test_a_chat_of_two_turns_is_the_servers_own(talker, chat_server):
    """With a system's text and the settings beside it; nothing is asked of another host."""
    for knob, value in (("seed", 3), ("max_new_tokens", 20), ("min_new_tokens", 20)):
        talker.set_number(knob, value)
    talker.page.fill("#chat-system textarea", "Be kind.")
    messages = [{"role": "system", "content": "Be kind."}]
    for number, text in enumerate(("Hello <b>you</b>", "And now?"), start=1):
        talker.say(text)
        talker.wait_for_answer(2 * number)
        messages.append({"role": "user", "content": text})
        asked = {"messages": messages, "seed": 3, "max_new_tokens": 20, "min_new_tokens": 20}
        (own,) = chat_server.predict(asked)["output"]
        messages.append({"role": "assistant", "content": own})
        assert talker.turns() == [message["content"] for message in messages[1:]]
    assert re.match(r"20 tokens · .*seed 3$", talker.chat_line())
    assert talker.page.input_value("#chat-box textarea") == ""
    talker.picture("chat", whole=True)
    origin = talker.page.url.rstrip("/")
    assert [url for url in talker.asked if not url.startswith((origin, "data:", "blob:"))] == []
    assert talker.said == []
    talker.page.click("#chat-new")
    talker.wait_for("document.querySelectorAll('.turn').length == 0")


def test_a_chat_streams_and_stops(talker, chat_server):
    since = len(chat_server.logs)
    for knob, value in (("max_new_tokens", 1900), ("min_new_tokens", 1900)):
        talker.set_number(knob, value)
    talker.say("Tell me everything.")
    talker.wait_for("document.querySelector('.turn.running .text')?.innerText.length > 20")
    talker.page.click("#chat-stop")
    talker.wait_for_answer(2)
    assert talker.chat_line().startswith("Stopped after ")
    assert log_has(chat_server, "Prediction cancelled.*page-", since=since)
    assert len(talker.turns()[1]) > 20  # what there was stays


def test_a_chat_says_what_is_wrong_and_keeps_the_text(talker):
    talker.say("word " * 3000)
    talker.page.wait_for_selector("#chat-line .complaint")
    assert re.search(r"the model's context is 2,?048", talker.chat_line())
    assert talker.page.input_value("#chat-box textarea").startswith("word word")
    assert talker.turns() == []


def test_a_chat_in_a_full_context_leaves_the_oldest_out(talker):
    talker.set_number("max_new_tokens", 5)
    for number in range(1, 4):
        talker.say("many words " * 120)
        talker.wait_for_answer(2 * number)
    assert "The context is full: the model no longer sees the first" in talker.chat_line()
    assert talker.page.locator(".turn.left-out").count() >= 2


def test_the_instruction_stays_beside_the_chat(talker):
    talker.page.click("button[role=tab]:has-text('Instruction')")
    talker.page.wait_for_selector("#start:visible")
    talker.set_number("max_new_tokens", 4)
    talker.write("alpacas")
    talker.page.click("#start")
    talker.wait_for_text("#line", "4 tokens")


def test_a_model_without_a_template_has_no_chat(person):
    assert person.page.locator("#chat-send").count() == 0
    assert person.page.locator("button[role=tab]").count() == 0
