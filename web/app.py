"""The page as a web application, which asks nothing of any other host.

Not by Gradio's `launch`: that fetches its own address first, which a proxy in the environment breaks, and keeps the
port to itself.
"""

import socket

import fastapi
import gradio as gr
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.client import Server
from web.page import build_page
from web.trainings import MOST_DATA_BYTES

_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " form-action 'self'; frame-ancestors 'self'"
)
_STYLE = """
main.fillable { max-width: 90rem; margin: auto }
#title > div, #status > div, #answers > div, #line > div, #chat > div, #chat-line > div { padding: 0 !important }
#settings .head { display: block; position: relative }
#settings .head .has-info { display: block; min-height: 1.9rem; padding-right: 8rem }
#settings .head .tab-like-container { position: absolute; top: 0; right: 0 }
#title h1 { font-size: 1.5rem; margin: 0 }
#status p { margin: 0; font-size: .9rem; overflow-wrap: anywhere }
#status .dot { display: inline-block; width: .65rem; height: .65rem; border-radius: 50%; margin-right: .5rem;
    background: #c90 }
#status .ready .dot, #status .busy .dot { background: #2a2 }
#status .gone .dot, #status .broken .dot { background: #d33 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .75rem }
.card { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .75rem 1rem;
    background: var(--block-background-fill); min-width: 0 }
.card header { display: flex; justify-content: space-between; font-size: .8rem; margin-bottom: .5rem;
    color: var(--body-text-color-subdued) }
#answers .card button { all: unset; cursor: pointer; text-decoration: underline; font-size: .8rem }
#answers .card button:focus-visible { outline: 2px solid var(--color-accent) }
.card .text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 1.5em; line-height: 1.5 }
.card.running .text::after { content: "▍"; opacity: .5 }
.turns { display: grid; gap: .5rem }
.turn { border-left: 3px solid var(--border-color-primary); padding: .35rem .75rem; min-width: 0 }
.turn.user { border-color: var(--color-accent); background: var(--block-background-fill) }
.turn.left-out { opacity: .6 }
.turn header { font-size: .8rem; color: var(--body-text-color-subdued) }
.turn .text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 1.5em; line-height: 1.5 }
.turn.running .text::after { content: "▍"; opacity: .5 }
.curve { width: 100%; max-width: 48rem; color: var(--color-accent) }
.curve text { fill: var(--body-text-color-subdued); font-size: 12px; stroke: none }
.note { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0 }
.complaint { border-left: 4px solid #d33; padding: .5rem .75rem; margin: 0; background: var(--block-background-fill);
    overflow-wrap: anywhere }
"""


def build_app(server: Server) -> ASGIApp:
    """The page at /, under a policy by which the browser itself refuses what comes from elsewhere."""
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        build_page(server),
        path="/",
        footer_links=[],
        max_file_size=MOST_DATA_BYTES,  # a training's data; nothing else takes files
        ssr_mode=False,
        enable_monitoring=False,
        theme=_theme(),
        css=_STYLE,
    )
    return _OwnOriginOnly(app)


def _theme() -> gr.themes.Base:
    """Gradio's own, with fonts that are on the reader's machine and hints dark enough to read."""
    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
    )


class _OwnOriginOnly:
    """Adds the policy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_policy)


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Serve until a signal. Open pages are not waited for."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])
