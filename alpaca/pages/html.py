"""What the HTML pages of all stages share: one file with nothing to load from elsewhere, its look, tables, sections.

Readable on a phone, and in the dark: colours are CSS variables that follow the reader's system. Every text is escaped
here; besides, a page with a script forbids the browser to load anything and to run any other script.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --page: #fff; --box: #f6f8fa;
  --a: #0969da; --b: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --page: #0d1117;
  --box: #161b22; --a: #4493f8; --b: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .9rem; margin: .8rem 0 .2rem; color: var(--soft); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); width: 42%; }
figure { margin: .5rem 0; } svg { display: block; width: 100%; height: auto; max-width: 44rem; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .a, .b { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .dot { fill: var(--b); stroke: none; }
text.key-a { fill: var(--a); } text.key-b { fill: var(--b); }
article { background: var(--box); border-radius: 8px; padding: .5rem 1rem 1rem; margin: 1rem 0; }
pre { margin: 0; white-space: pre-wrap; font: .88rem/1.45 ui-monospace, monospace; }
p { margin: .5rem 0; } .note { color: var(--soft); }
"""


def page(title: str, heading: str, sections: Iterable[str], *, style: str = "", script: str = "") -> str:
    """A whole HTML page; title and heading are text, sections HTML, script JavaScript of our own."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        + (_policy(script) if script else "")
        + '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(heading)}</h1>\n"
        + "\n".join(sections)
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body>\n</html>\n"
    )


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def table(rows: Mapping[str, str]) -> str:
    """Two columns of text."""
    cells = (f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
