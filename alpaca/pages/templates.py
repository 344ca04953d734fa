"""HTML from Jinja2 templates: every value is escaped, a missing one is an error, and nothing is loaded from elsewhere.

A template lies beside the code that fills it. Whole pages extend base.html.j2, whose look can be read on a phone and in
the dark; parts.html.j2 has macros that all pages share.
"""

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

_SHARED = Path(__file__).parent


def render_page(
    template: Path, *, title: str, heading: str, style: str = "", script: str = "", **values: object
) -> str:
    """Fill the template of a whole page.

    style and script: CSS and JavaScript of our own, never a user's text; a Content-Security-Policy lets the browser run
    that one script and load nothing at all. Raises jinja2.UndefinedError for a value that the template lacks.
    """
    return _load(template).render(
        title=title,
        heading=heading,
        styles=Markup(read_asset(_SHARED / "style.css") + style),
        script=Markup(script),
        policy=Markup(_make_policy(script)),
        **values,
    )


def render_part(template: Path, **values: object) -> Markup:
    """Fill the template of a part of a page; other templates take the result as HTML."""
    return Markup(_load(template).render(**values))


@functools.cache
def read_asset(path: Path) -> str:
    """A style sheet or script that lies beside the code."""
    return path.read_text("utf-8")


def _load(template: Path) -> jinja2.Template:
    return _make_environment(template.parent).get_template(template.name)


@functools.cache
def _make_environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _make_policy(script: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return policy
