"""The chat on the page: the conversation, a box for the next message, and the system's text."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from alpaca.errors import InputError
from web.chat import Conversation, Shown, converse, draw, settings_to_send
from web.client import Generation, Server
from web.knobs import Knob
from web.sheet import complaint

Field = gr.components.Component


def draw_chat(
    server: Server,
    knobs: list[Knob],
    *,
    begin: Callable[[str, Generation], None],
    end: Callable[[str], None],
    stop: Callable[..., Any],
) -> Callable[[dict[str, Field]], None]:
    """Draw the chat's side of the form. What is returned joins it with the settings' fields, once they are drawn.

    begin, end: told of each generation of a page's session, so that `stop` can cancel it.
    """
    fields: dict[str, Field] = {}
    state = gr.State(Conversation())
    turns = gr.HTML(draw(Conversation()), elem_id="chat", key="chat")
    line = gr.HTML(elem_id="chat-line", key="chat-line")
    box = gr.Textbox(
        label="Message", lines=2, max_lines=12, placeholder="Shift+Enter sends", interactive=True, key="chat-box",
        elem_id="chat-box",
    )  # fmt: skip
    with gr.Row(elem_id="chat-buttons"):
        send = gr.Button("Send", variant="primary", elem_id="chat-send")
        halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="chat-stop")
        anew = gr.Button("New chat", elem_id="chat-new")
    system = gr.Textbox(
        label="System", info="What the model is told before the conversation; may stay empty", lines=2, max_lines=8,
        interactive=True, key="chat-system", elem_id="chat-system",
    )  # fmt: skip

    async def say(shown: dict[Field, Any], request: gr.Request) -> AsyncIterator[dict[Field, Any]]:
        text, conversation, session = shown[box], shown[state], request.session_hash
        if not text.strip():
            yield {line: complaint("Write a message first.")}
            return
        try:
            settings = settings_to_send(knobs, [shown[fields[knob.name]] for knob in knobs])
        except InputError as error:
            yield {line: complaint(f"{error}.")}
            return
        yield {box: ""}
        try:
            async for now in converse(
                server, settings, system=shown[system], conversation=conversation, text=text,
                on_start=lambda generation: begin(session, generation),
            ):  # fmt: skip
                yield updates_of(now)
        finally:
            end(session)

    def updates_of(now: Shown) -> dict[Field, Any]:
        updates = {
            turns: now.turns, line: now.line, send: gr.Button(interactive=now.is_complete),
            halt: gr.Button(interactive=not now.is_complete), anew: gr.Button(interactive=now.is_complete),
        }  # fmt: skip
        if now.is_complete:
            updates |= {state: now.conversation, **({box: now.unsent} if now.unsent else {})}
        return updates

    def join(fields_drawn: dict[str, Field]) -> None:
        fields.update(fields_drawn)
        gr.on(
            [send.click, box.submit], say, {state, box, system, *fields.values()},
            [turns, line, state, box, send, halt, anew],
            show_progress="hidden", concurrency_limit=None, trigger_mode="once", api_visibility="private",
        )  # fmt: skip

    halt.click(stop, None, None, queue=False, show_progress="hidden", api_visibility="private")
    anew.click(
        lambda: (Conversation(), draw(Conversation()), ""), None, [state, turns, line],
        queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return join
