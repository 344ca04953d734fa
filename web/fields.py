"""A component of the page for each of the server's inputs."""

import gradio as gr

from web.knobs import Knob

_MAIN_WORDS = {"prompt": ("Instruction", 3, "Shift+Enter sends"), "input": ("Input", 2, "may stay empty")}
MAIN = tuple(_MAIN_WORDS)  # these two have a place of their own


def main_field(knob: Knob) -> gr.Textbox:
    """The two texts people write: wide, Shift+Enter sends."""
    label, lines, placeholder = _MAIN_WORDS[knob.name]
    return gr.Textbox(
        knob.shown or "", label=label, info=knob.description, lines=lines, max_lines=12, placeholder=placeholder,
        interactive=True, key=knob.name, elem_id=f"knob-{knob.name}",
    )  # fmt: skip


def field(knob: Knob) -> gr.components.Component:
    """The component for a knob, with the server's words, bounds and default."""
    common = dict(interactive=True, label=knob.name, info=knob.hint, key=knob.name, elem_id=f"knob-{knob.name}")
    if knob.name == "stream":  # the page is for reading along; its box starts ticked
        return gr.Checkbox(True, **{**common, "info": knob.description})
    if knob.choices:
        return gr.Dropdown([*([] if knob.required else [("", None)]), *knob.choices], value=knob.shown, **common)
    if knob.kind == "boolean":
        if knob.default is None:
            return gr.Dropdown([("", None), ("yes", True), ("no", False)], value=None, **common)
        return gr.Checkbox(knob.shown, **common)
    if knob.slides:
        return gr.Slider(knob.minimum, knob.maximum, value=knob.shown, step=knob.step, **common)
    if knob.kind in ("integer", "number"):
        return gr.Number(knob.shown, step=1 if knob.kind == "integer" else 0.01, **common)
    lines = 2 if knob.kind == "strings" else 1
    return gr.Textbox(knob.shown, lines=lines, type="password" if knob.secret else "text", **common)
