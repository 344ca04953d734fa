"""The training tab: a data file, the server's inputs, the loss while it trains, and the weights to take away."""

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from alpaca.errors import InputError
from web.client import Server
from web.curve import describe, draw_curve
from web.fields import field
from web.knobs import OMITTED, Knob
from web.sheet import complaint, note
from web.trainings import DATA, Progress, Training, as_data_url, read_data_url

_KEPT_OPEN = "The training belongs to this page: closing or reloading it cancels the training."


def draw_training(
    server: Server,
    knobs: list[Knob],
    *,
    begin: Callable[[str, Training], None],
    end: Callable[[str], None],
    stop: Callable[..., Any],
) -> None:
    """Draw the tab's form. begin, end: told of each training of a page's session, so that `stop` can cancel it."""
    described = next((knob.description for knob in knobs if knob.name == DATA), "")
    others = [knob for knob in knobs if knob.name != DATA]
    with gr.Row(elem_id="training"):
        with gr.Column(scale=5, min_width=320):
            data = gr.File(
                label="Data", file_count="single", type="filepath", elem_id="training-data", key="training-data"
            )
            gr.HTML(note(described), elem_id="training-about")
            with gr.Row(elem_id="training-buttons"):
                start = gr.Button("Train", variant="primary", elem_id="training-start")
                halt = gr.Button("Cancel", variant="stop", interactive=False, elem_id="training-cancel")
            curve = gr.HTML(elem_id="training-curve", key="training-curve")
            line = gr.HTML(note(_KEPT_OPEN), elem_id="training-line", key="training-line")
            weights = gr.DownloadButton(
                "Download the weights", visible=False, elem_id="training-weights", key="training-weights"
            )
        with gr.Column(scale=2, min_width=300), gr.Accordion("Settings", open=True, elem_id="settings"):
            fields = {knob.name: field(knob) for knob in others}

    async def train(shown: dict[Any, Any], request: gr.Request) -> AsyncIterator[tuple[Any, ...]]:
        try:
            values = _values_to_send(others, shown[data], [shown[fields[knob.name]] for knob in others])
        except InputError as error:
            yield gr.skip(), complaint(f"{error}."), gr.skip(), gr.skip(), gr.skip()
            return
        training, begun = Training(server, values), time.monotonic()
        begin(request.session_hash, training)
        try:
            async for now in training.progress():
                drawn = draw_curve(now.losses, int(now.metrics.get("max_steps") or 0))
                said = describe(now, time.monotonic() - begun)
                with _Archive(now) as archive:
                    button = gr.DownloadButton(value=archive, visible=archive is not None)
                    yield (
                        drawn,
                        said,
                        button,
                        gr.Button(interactive=now.is_over),
                        gr.Button(interactive=not now.is_over),
                    )
        finally:
            end(request.session_hash)

    gr.on(
        [start.click], train, {data, *fields.values()}, [curve, line, weights, start, halt],
        show_progress="hidden", concurrency_limit=None, trigger_mode="once", api_visibility="private",
    )  # fmt: skip
    halt.click(stop, None, None, queue=False, show_progress="hidden", api_visibility="private")


def _values_to_send(knobs: list[Knob], path: str | None, shown: list[Any]) -> dict[str, Any]:
    """The training's inputs. Raises InputError."""
    if not path:
        raise InputError("Choose a data file first")
    sent = {knob.name: knob.sent(value) for knob, value in zip(knobs, shown, strict=True)}
    return {DATA: as_data_url(Path(path)), **{name: value for name, value in sent.items() if value is not OMITTED}}


class _Archive:
    """The archive of a training that is done, as a file while Gradio takes its own copy; None where there is none."""

    def __init__(self, progress: Progress) -> None:
        self._content = read_data_url(progress.output) if progress.status == "succeeded" else None
        self._name = progress.name
        self._folder: str | None = None

    def __enter__(self) -> str | None:
        if self._content is None:
            return None
        self._folder = tempfile.mkdtemp(prefix="alpaca-page-")
        path = Path(self._folder, self._name)
        path.write_bytes(self._content)
        return str(path)

    def __exit__(self, *error: object) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
