"""The page: an instruction, the server's knobs beside it, and the answers as they are written; or a chat.

The form is made from the server's inputs, so it appears once the server has answered, and again when those change. A
model with a chat template gets a chat beside it. A server that trains gets a tab for its trainings instead.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from alpaca.errors import InputError
from web.chat import has_chat
from web.chat_form import draw_chat
from web.client import Generation, Health, Server, ServerTrouble
from web.fields import MAIN, field, main_field
from web.knobs import Knob, read_knobs
from web.sheet import Sheet, as_sentence, complaint, status_line, values_to_send
from web.training_form import draw_training
from web.trainings import Training, serves_trainings

TITLE = "Alpaca"
EXAMPLES = {  # name: (instruction, input)
    "Alpacas": ("Tell me something about alpacas.", ""),
    "FizzBuzz": ("Write a Python program that prints FizzBuzz for the numbers from 1 to 100.", ""),
    "รามาเกียรติ์": ("tell me something about รามาเกียรติ์", ""),
    "With an input": (
        "Say in one word whether the writer liked the walk.",
        "We climbed for six hours, the llamas carried everything, and the view made us forget our feet.",
    ),
}
_POLL_S = 3.0
_REDRAW_S = 0.04  # pieces that come faster than this are drawn together
_FILES_S = (3600, 86400)  # how often files of trainings are looked through, and how long they stay
_TRY_AGAIN_S = 60.0  # until a server that could not be asked for a chat is asked again


def build_page(server: Server) -> gr.Blocks:
    """The page for one server; any number of people may have it open, each with a prediction of their own."""
    desk = Desk(server)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=_FILES_S) as page:
        gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title")
        status = gr.HTML(status_line(Health(state="starting", sentence="Asking the server …")), elem_id="status")
        version, timer = gr.Textbox(visible="hidden"), gr.Timer(_POLL_S)

        @gr.render(inputs=[version], triggers=[version.change])
        def form(known: str) -> None:
            if known and desk.trains:
                with gr.Tabs(elem_id="ways"), gr.Tab("Training", elem_id="way-training"):
                    draw_training(desk.server, desk.knobs, begin=desk.begin, end=desk.end, stop=desk.stop)
            elif known:
                draw_form(desk, desk.knobs, chats=desk.chats)

        for event in (page.load, timer.tick):
            # Not by the queue: an event of it that ends closes the stream under an answer on its way to this page.
            event(
                desk.look, None, [status, version], queue=False, show_progress="hidden", api_visibility="private"
            )  # fmt: skip
        page.unload(desk.leave)
    page.queue(default_concurrency_limit=None, api_open=False)
    return page


class Desk:
    """What runs for whom: at most one prediction or training for each open page, by Gradio's session."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._running: dict[str, Generation | Training] = {}
        self._looked_at, self._health = 0.0, Health(state="gone", sentence="")
        self.knobs: list[Knob] = []
        self.chats = False  # whether the model takes conversations
        self.trains, self._knows_kind = False, False  # whether the knobs are those of trainings
        self._knows_chat, self._tried_at = False, -math.inf
        self._looking = asyncio.Lock()

    async def look(self) -> tuple[str, str]:
        """The status line, and a name for the server's inputs as they are now, empty before the first are known."""
        async with self._looking:  # many pages ask the server once a second
            if time.monotonic() - self._looked_at > 1:
                await self._ask()
        known = repr((self.knobs, self.chats, self.trains)) if self.knobs else ""
        return status_line(self._health), hashlib.sha256(known.encode()).hexdigest() if known else ""

    async def _ask(self) -> None:
        self._health = await self._server.health()
        if self._health.answers:
            try:
                if not self._knows_kind:
                    self.trains, self._knows_kind = await serves_trainings(self._server), True
                document = await self._server.schema()
                self.knobs = read_knobs(document, of="TrainingInput" if self.trains else "Input")
            except (ServerTrouble, InputError) as trouble:
                self._health = Health(state="broken", sentence=as_sentence(str(trouble)))
            else:
                await self._find_chat()
        else:
            self._knows_chat, self._tried_at = False, -math.inf  # what comes up next may be another model
            self._knows_kind = False
        self._looked_at = time.monotonic()

    async def _find_chat(self) -> None:
        """Learn once whether the server takes conversations, while it has a slot free to be asked."""
        if self.trains:
            return
        is_due = self._health.state == "ready" and time.monotonic() - self._tried_at > _TRY_AGAIN_S
        if self._knows_chat or not is_due:
            return
        self._tried_at = time.monotonic()
        found = await has_chat(self._server, self.knobs)
        if found is not None:
            self.chats, self._knows_chat = found, True

    def begin(self, session: str, started: Generation | Training) -> None:
        """A page's chat has asked, or its training has begun."""
        self._running[session] = started

    def end(self, session: str) -> None:
        self._running.pop(session, None)

    @property
    def server(self) -> Server:
        return self._server

    async def answer(self, knobs: list[Knob], shown: list[Any], session: str) -> AsyncIterator[tuple[str, str, bool]]:
        """(answers, line below them, whether that is all), again whenever there is more; the last has the figures."""
        try:
            values = values_to_send(knobs, shown)
        except InputError as error:
            yield "", complaint(f"{error}."), True
            return
        sheet = Sheet(values)
        yield sheet.answers(), sheet.line(), False
        generation = self._running[session] = Generation(self._server, values)
        try:
            async for batch in generation.batches():
                for event in batch:
                    sheet.take(event)
                yield sheet.answers(), sheet.line(), sheet.is_complete
                await asyncio.sleep(_REDRAW_S)
        finally:
            if self._running.get(session) is generation:
                del self._running[session]

    async def stop(self, request: gr.Request) -> None:
        """Cancel this page's prediction or training; its last event then ends it here, too."""
        if generation := self._running.get(request.session_hash):
            await generation.stop()

    async def leave(self, request: gr.Request) -> None:
        """The page was closed: nobody waits for its answer."""
        await self.stop(request)


# The form -----------------------------------------------------------------------------------------------------------


def draw_form(desk: Desk, knobs: list[Knob], *, chats: bool) -> None:
    """Instruction, buttons and answers on one side, or a chat; the knobs on the other; on a phone below."""
    fields: dict[str, gr.components.Component] = {}
    with gr.Row(elem_id="form"):
        with gr.Column(scale=5, min_width=320), gr.Tabs(elem_id="ways") if chats else contextlib.nullcontext():
            join_chat = _no_chat
            if chats:
                with gr.Tab("Chat", elem_id="way-chat"):
                    join_chat = draw_chat(desk.server, knobs, begin=desk.begin, end=desk.end, stop=desk.stop)
            with gr.Tab("Instruction", elem_id="way-instruction") if chats else contextlib.nullcontext():
                fields |= {knob.name: main_field(knob) for knob in knobs if knob.name in MAIN}
                draw_examples(fields)
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Generate", variant="primary", elem_id="start")
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                answers = gr.HTML(elem_id="answers", key="answers")
                line = gr.HTML(elem_id="line", key="line")
        with gr.Column(scale=2, min_width=300), gr.Accordion("Settings", open=True, elem_id="settings"):
            fields |= {knob.name: field(knob) for knob in knobs if knob.name not in MAIN}
    join_chat(fields)

    async def run(shown: dict[gr.components.Component, Any], request: gr.Request) -> AsyncIterator[tuple[Any, ...]]:
        async for drawn, said, done in desk.answer(
            knobs, [shown[fields[knob.name]] for knob in knobs], request.session_hash
        ):
            yield drawn, said, gr.Button(interactive=done), gr.Button(interactive=not done)

    triggers = [start.click] + [fields[name].submit for name in MAIN if name in fields]
    gr.on(
        triggers, run, set(fields.values()), [answers, line, start, stop],
        show_progress="hidden", concurrency_limit=None, trigger_mode="once", api_visibility="private",
    )  # fmt: skip
    stop.click(desk.stop, None, None, queue=False, show_progress="hidden", api_visibility="private")


def _no_chat(fields: dict[str, gr.components.Component]) -> None:
    """Nothing to join where there is no chat."""


def draw_examples(fields: dict[str, gr.components.Component]) -> None:
    """A button for each example; it fills the two texts in the browser."""
    if not set(MAIN) <= fields.keys():
        return
    with gr.Row(elem_id="examples"):
        for name, texts in EXAMPLES.items():
            fill = f"() => {json.dumps(texts)}"
            targets = [fields[main] for main in MAIN]
            gr.Button(name, size="sm", min_width=100).click(None, None, targets, js=fill, api_visibility="private")
