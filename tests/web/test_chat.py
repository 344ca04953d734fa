"""The page's chat against the real server: what is sent, what comes back, and what is left out in a full context."""

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local_server import LocalServer, running_server
from web import chat
from web.chat import Conversation, Shown, converse, draw, has_chat, settings_to_send
from web.client import Generation, Server
from web.knobs import Knob, read_knobs

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'forbidden' %}{{ raise_exception('not that word') }}{% endif %}"
    "{{ message.role[0] }} {{ message.content }}\n{% endfor %}a"
)
SETTINGS = {"seed": 5, "max_new_tokens": 12, "min_new_tokens": 12}
CONTEXT = 128


@pytest.fixture(scope="module")
def running(llama_folder, tmp_path_factory) -> Iterator[LocalServer]:
    folder = Path(shutil.copytree(llama_folder, tmp_path_factory.mktemp("chat") / "model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with running_server(["--weights", str(folder), "--max_context", str(CONTEXT)], on_failure=print) as server:
        yield server


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The inputs of each prediction that the chat asks for."""
    asked: list[dict] = []

    class Watched(Generation):
        def __init__(self, server: Server, values: dict, **options: float) -> None:
            asked.append(json.loads(json.dumps(values)))
            super().__init__(server, values, **options)

    monkeypatch.setattr(chat, "Generation", Watched)
    return asked


def say(
    running: LocalServer, conversation: Conversation, text: str, *, system: str = "", stops: bool = False, **settings
) -> list[Shown]:
    async def act() -> list[Shown]:
        begun: list[Generation] = []
        shown, stopping = [], None
        talk = converse(
            Server(running.url), {**SETTINGS, **settings}, system=system, conversation=conversation, text=text,
            on_start=begun.append,
        )  # fmt: skip
        async for now in talk:
            shown.append(now)
            if stops and stopping is None and len(texts(now)[-1]) > 0 and "running" in now.turns:
                stopping = asyncio.create_task(begun[-1].stop())
        if stopping:
            await stopping
        return shown

    return asyncio.run(act())


def texts(shown: Shown) -> list[str]:
    return re.findall(r'<div class="text" dir="auto">(.*?)</div>', shown.turns, flags=re.DOTALL)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_two_turns_are_the_servers_own_answers(running, sent):
    """The whole conversation goes along each time, with the system's text before it; the pieces are seen to grow."""
    first = say(running, Conversation(), "hi", system="Be kind.")
    second = say(running, first[-1].conversation, "more", system="Be kind.")
    messages = [{"role": "system", "content": "Be kind."}, user("hi")]
    for shown in (first, second):
        (own,) = running.predict({"messages": messages, **SETTINGS})["output"]
        assert shown[-1].conversation.turns[-1] == {"role": "assistant", "content": own}
        messages += [{"role": "assistant", "content": own}, user("more")]
    assert sent == [
        {**SETTINGS, "messages": messages[:2], "stream": True}, {**SETTINGS, "messages": messages[:4], "stream": True},
    ]  # fmt: skip
    assert [now.is_complete for now in first] == [False] * (len(first) - 1) + [True]
    assert "tokens/s" in first[-1].line
    assert len(texts(second[-1])) == 4


def test_a_full_context_leaves_the_oldest_turns_out_and_says_so(running, sent):
    old = Conversation()
    for number in range(6):
        old = old.say("user", f"question {number} of many").say("assistant", "an answer of some length")
    *_, last = say(running, old, "and now?", system="S")
    left_out = last.conversation.num_left_out
    assert 0 < left_out < 12
    assert left_out % 2 == 0
    assert [len(values["messages"]) for values in sent] == [14 - out for out in range(0, left_out + 1, 2)]
    assert all(values["messages"][0] == {"role": "system", "content": "S"} for values in sent)
    assert f"no longer sees the first {left_out} messages" in last.line
    assert last.turns.count("no longer sent") == left_out
    again = say(running, last.conversation, "x", system="S")  # goes on from there: what is out stays out
    assert sent[left_out // 2 + 1]["messages"][1:] == [*last.conversation.turns[left_out:], user("x")]
    assert again[-1].conversation.num_left_out >= left_out


def test_an_answer_that_ends_at_the_contexts_end_says_so(running):
    *_, last = say(running, Conversation(), "hi", max_new_tokens=4 * CONTEXT, min_new_tokens=4 * CONTEXT)
    assert "the answer ended where the context was full" in last.line


@pytest.mark.parametrize(
    ("text", "words"), [("word " * 400, "the model&#39;s context is"), ("forbidden", "not that word")]
)
def test_what_is_refused_is_said_and_goes_back_into_the_box(running, text, words):
    before = Conversation().say("user", "a").say("assistant", "b")
    *_, last = say(running, before, text)
    assert words in last.line
    assert 'class="complaint"' in last.line
    assert (last.unsent, last.is_complete) == (text, True)
    assert last.conversation == before
    assert texts(last) == ["a", "b"]


def test_stopping_keeps_what_there_is(running):
    for _ in range(5):  # the answer takes a third of a second, in which a busy machine may not come to stop it
        *_, last = say(running, Conversation(), "hi", stops=True, max_new_tokens=100, min_new_tokens=100)
        if "Stopped after" in last.line:
            break
    assert "Stopped after" in last.line
    assert last.conversation.turns[-1]["role"] == "assistant"
    assert last.conversation.turns[-1]["content"]


def test_nobody_there_is_said(running):
    gone = Server("http://127.0.0.1:9")

    async def act() -> Shown:
        talk = converse(gone, {}, system="", conversation=Conversation(), text="hi", on_start=lambda _: None)
        return [now async for now in talk][-1]

    last = asyncio.run(act())
    assert "No server answers at http://127.0.0.1:9" in last.line
    assert last.unsent == "hi"


async def look(url: str) -> bool | None:
    server = Server(url)
    return await has_chat(server, read_knobs(await server.schema()))


def test_chat_is_for_models_with_a_template(running):
    assert asyncio.run(look(running.url)) is True
    gone = Server("http://127.0.0.1:9")
    assert asyncio.run(has_chat(gone, [Knob(name="prompt", kind="string")])) is False
    knobs = [Knob(name=name, kind="json") for name in ("messages", "details", "echo", "max_new_tokens")]
    assert asyncio.run(has_chat(gone, knobs)) is None


@pytest.mark.slow
def test_a_model_without_a_template_has_no_chat(llama_folder):
    with running_server(["--weights", str(llama_folder)], on_failure=print) as plain:
        assert asyncio.run(look(plain.url)) is False


def test_settings_are_those_that_are_no_prompt():
    knobs = [
        Knob(name="prompt", kind="string", required=True), Knob(name="n", kind="integer", default=1),
        Knob(name="seed", kind="integer"), Knob(name="temperature", kind="number", default=0.75),
        Knob(name="stream", kind="boolean", default=False), Knob(name="stop", kind="strings"),
    ]  # fmt: skip
    found = settings_to_send(knobs, ["text", 3, None, 0.5, False, "a\nb"])
    assert found == {"temperature": 0.5, "stop": ["a", "b"]}


def test_texts_are_no_markup():
    drawn = draw(Conversation().say("user", "<b>x</b>"), "<script>")
    assert "&lt;b&gt;x&lt;/b&gt;" in drawn
    assert "<script>" not in drawn
