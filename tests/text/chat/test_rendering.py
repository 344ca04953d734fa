"""Conversations are rendered as transformers renders them, and no template makes a server wait or swell."""

import json
import subprocess
import sys
import threading
import time

import psutil
import pytest

from alpaca.errors import InputError, ServiceFailed
from alpaca.subprocesses import bounded
from alpaca.text.chat import sandbox
from alpaca.text.chat.files import ChatTemplate, read_chat_template
from alpaca.text.chat.renderer import Renderer, TemplateFailed
from tests.conftest import ROOT
from tests.text.chat.conversations import TEMPLATES, conversations

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
HELLO = [{"role": "user", "content": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": " Name"}, {"type": "text", "text": " one. "}]}]


@pytest.fixture(scope="module")
def theirs(llama_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.fixture(scope="module")
def renderer():
    one = Renderer()
    yield one
    one.close()


def render(renderer: Renderer, source: str, messages: list[dict], **values: str) -> str:
    return renderer.render(ChatTemplate(source, "the folder"), messages, {**NAMES, **values}, now=time.time())


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_transformers(name, theirs, renderer):
    options = {"chat_template": TEMPLATES[name], "add_generation_prompt": True, "tokenize": False}
    for messages in [*conversations(25, seed=name, further=("<s>", "</s>", "<|im_end|>")), PARTS]:
        try:
            expected = theirs.apply_chat_template(messages, **options)
        except Exception as error:  # a list where a text is expected
            with pytest.raises(TemplateFailed, match=type(error).__name__):
                render(renderer, TEMPLATES[name], messages)
            assert messages == PARTS
        else:
            assert render(renderer, TEMPLATES[name], messages) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_prefixes_are_what_each_of_them_gives_alone(name, renderer):
    template = ChatTemplate(TEMPLATES[name], "own.jinja")
    messages = max(conversations(9, seed="prefixes"), key=len)
    wanted = [(number, adds) for number in range(1, len(messages) + 1) for adds in (True, False)] * 2
    values = {"bos_token": "<s>", "eos_token": "</s>"}
    alone = [renderer.render(template, messages[:n], values, now=0, adds_prompt=adds) for n, adds in wanted]
    assert renderer.render_prefixes(template, messages, values, wanted, now=0) == alone


@pytest.mark.slow
def test_each_prefix_has_the_whole_limit_of_time_and_no_more(renderer):
    busy = "{% for i in range(REPEATS) %}{% for j in range(9000) %}{% endfor %}{% endfor %}"
    brief, endless = (ChatTemplate(busy.replace("REPEATS", repeats), "own.jinja") for repeats in ("300", "90000"))
    asked = [{"role": "user", "content": "a"}]
    assert renderer.render_prefixes(brief, asked, {}, [(1, True)] * 12, now=0) == [""] * 12  # more than 2 s together
    with pytest.raises(InputError, match=r"takes more than 2 s of processor time"):
        renderer.render_prefixes(endless, asked, {}, [(1, True)] * 2, now=0)


def test_a_template_that_refuses_is_quoted(renderer):
    source = TEMPLATES["system merged into the first user's turn"]
    with pytest.raises(InputError, match=r"template refuses the messages: roles must alternate: user, assistant, user"):
        render(renderer, source, HELLO * 2)
    with pytest.raises(InputError, match=r"refuses the messages: x{500}…$"):
        render(renderer, "{{ raise_exception('x' * 1000) }}", HELLO)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", r"the folder is no chat template that can be read \(line 1: "),
        ("{{ nothing.at_all }}", "fails on the messages: UndefinedError: 'nothing' is undefined"),
        ("{{ messages.append(1) }}", "fails on the messages: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "fails on the messages: SecurityError"),
        ("{{ messages[0].content + 1 }}", "fails on the messages: TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on the messages: RecursionError"),
        ("{% for i in range(10**6) %}{% endfor %}", "fails on the messages: OverflowError: Range too big"),
        ("{% include 'x' %}", "fails on the messages: TypeError: no loader"),
    ],
)
def test_what_is_wrong_with_a_template_is_said(renderer, source, message):
    with pytest.raises(InputError, match=message):
        render(renderer, source, HELLO)
    assert render(renderer, "{{ messages[0].content }}", HELLO) == "hello"


HUGE = {
    "one piece": "{{ messages[0].role * 10**9 }}",
    "a constant": "{{ 'x' * 10**9 }}",  # which goes into the compiled template
    "many pieces": "{% for i in range(99999) %}{% for j in range(99999) %}xxxx{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a list": "{% set x = [0] * 10**10 %}",
    "a width": "{{ '%1999999999d' % (messages | length) }}",
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a number": "{{ 10 ** (10 ** 9) }}",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_makes_too_much_is_stopped(renderer, name):
    stopped = (
        r"makes more than 8,388,608 characters .* or needs too much memory|takes more than 2 s"  # whichever is first
    )
    with pytest.raises(InputError, match=stopped):
        render(renderer, HUGE[name], HELLO)
    assert render(renderer, "{{ messages[0].content }}", HELLO) == "hello"
    assert psutil.Process().memory_info().rss < 4 << 30


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.fast_rows(1)
def test_a_template_that_never_ends_is_stopped(renderer, name):
    start = time.monotonic()
    with pytest.raises(InputError, match=r"takes more than 2 s of processor time"):
        render(renderer, ENDLESS[name], HELLO)
    assert time.monotonic() - start > 1.5
    assert render(renderer, "{{ messages[0].content }}", HELLO) == "hello"


def test_a_process_that_was_killed_is_started_again(renderer):
    render(renderer, "", HELLO)
    for _ in range(2):
        killed = psutil.Process(renderer._process.pid)
        killed.kill()
        psutil.wait_procs([killed])
        assert render(renderer, "again", HELLO) == "again"


def test_a_process_killed_at_work_is_replaced_once(renderer, monkeypatch):
    render(renderer, "", HELLO)
    first = psutil.Process(renderer._process.pid)
    first.suspend()
    timer = threading.Timer(0.1, first.kill)
    timer.start()
    assert render(renderer, "{{ messages[0].content }}", HELLO) == "hello"
    timer.join()

    monkeypatch.setattr(renderer._process, "_module", "tests.text.chat.dying_sandbox")
    renderer.close()
    with pytest.raises(ServiceFailed, match="ended with status -9; try again"):
        render(renderer, "a", HELLO)


def test_a_process_that_does_not_answer_is_replaced_once(renderer, monkeypatch):
    waits, ask_once = [0.2, 60], renderer._process._ask_once

    def wait_less_at_first(request):
        monkeypatch.setattr(bounded, "_MOST_WAITING_S", waits.pop(0))
        return ask_once(request)

    render(renderer, "", HELLO)
    psutil.Process(renderer._process.pid).suspend()
    monkeypatch.setattr(renderer._process, "_ask_once", wait_less_at_first)
    assert render(renderer, "again", HELLO) == "again"
    assert waits == []
    waits[:] = [0.2, 0.2]
    with pytest.raises(ServiceFailed, match="does not answer; try again"):
        render(renderer, ENDLESS["loops"], HELLO)


def test_the_process_ends_with_the_one_that_asks():
    code = (
        "import os\nfrom alpaca.text.chat.renderer import RENDERER\nfrom alpaca.text.chat.files import ChatTemplate\n"
        "RENDERER.render(ChatTemplate('', ''), [], {}, now=0)\n"
        "print(RENDERER._process.pid, flush=True)\nos._exit(0)"  # as if it had been killed
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, timeout=60).stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_threads_get_their_own_texts(renderer):
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = render(renderer, "{{ messages[0].content }}", [{"role": "user", "content": f"{number}" * 5000}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"{number}" * 5000 for number in range(20)}


def test_two_thousand_messages_are_rendered(renderer):
    messages = [{"role": "user", "content": "x" * 2000}] * 2000
    assert len(render(renderer, TEMPLATES["chatml"], messages)) > 4_000_000


def test_the_words_of_a_template():
    assert {"</think>", "\n", "user", "<|user|>"} <= sandbox.read_words(TEMPLATES["namespace"])


# Where the template is found ------------------------------------------------------------------------------------------


def test_the_file_of_its_own_counts_first(tmp_path):
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "b"}))
    assert read_chat_template(tmp_path) == ChatTemplate("b", tmp_path / "tokenizer_config.json")
    (tmp_path / "chat_template.jinja").write_text("ก\n")
    assert read_chat_template(tmp_path) == ChatTemplate("ก\n", tmp_path / "chat_template.jinja")


@pytest.mark.parametrize(
    ("value", "source"),
    [
        (None, None),
        ("", ""),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ({"default": "d", "rag": "r"}, "d"),
        ([{"name": "rag", "template": "r"}], None),
    ],
)
def test_named_templates(tmp_path, value, source):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    found = read_chat_template(tmp_path)
    assert (found and found.source) == source


@pytest.mark.parametrize("value", [3, ["x"], [{"name": "default"}], {"default": 1}])
def test_other_values_are_refused(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: expected chat_template to be a text, or a list"):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"chat_template\.jinja is not text in UTF-8"):
        read_chat_template(tmp_path)
