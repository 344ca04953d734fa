"""report.html of a data set: the analysis on one page that loads nothing and runs no script but its own.

Texts of the data set are shown only through `html.escape`, cut to a few hundred characters.
"""

import base64
import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from alpaca.data.analysis import verb_plot
from alpaca.data.analysis.checks import RULES, Rule
from alpaca.data.analysis.cleaning import MEANINGS, Change
from alpaca.data.analysis.duplicates import NEAR, Copy
from alpaca.data.analysis.languages import UNDETERMINED
from alpaca.data.analysis.summary import Analysis, TokenCounts
from alpaca.data.analysis.verb_plot import VerbCount, count_verbs
from alpaca.data.analysis.verbs import ACCURACY
from alpaca.data.examples import Example
from alpaca.pages.html import note, page, section, table

_NUM_SHOWN = 5  # examples of each finding
_MOST = 400  # characters of a text that are shown
_STYLE = """
details { border-bottom: 1px solid var(--line); padding: .35rem 0; }
summary { cursor: pointer; display: flex; gap: .6rem; } summary::before { content: "▸"; }
details[open] > summary::before { content: "▾"; } summary::-webkit-details-marker { display: none; }
summary b { font-weight: 600; flex: 1; } summary .num { color: var(--soft); white-space: nowrap; }
a { color: var(--a); }
details article { margin: .6rem 0; padding: .2rem .8rem .7rem; } .bar { fill: var(--a); } .cut { fill: var(--b); }
table.wide th, table.wide td { width: auto; } td.num, th.num { text-align: right; white-space: nowrap; }
"""


def make_page(analysis: Analysis, changes: Sequence[Change], *, png: bytes, cleaned: Path | None = None) -> str:
    """The page as HTML. changes: what cleaning does, or did when it was written to `cleaned`."""
    verbs = count_verbs(analysis.roots)
    sections = [
        section("In short", table(_highlights(analysis))),
        section("Length", _lengths(analysis)),
        section("What the instructions ask for", _verbs(analysis, verbs, png)),
        section("Suspicious examples", _findings(analysis)),
        section("Copies", _copies(analysis)),
        section("Languages", _languages(analysis)),
        section("Mending", _mending(analysis, changes, cleaned)),
    ]
    if analysis.unreadable:
        sections.insert(1, section("Records that cannot be read", _unreadable(analysis)))
    name = Path(analysis.data_path).name
    style = _STYLE + verb_plot.STYLE
    return page(f"Data: {name}", name, sections, style=style, script=verb_plot.script())


def _highlights(analysis: Analysis) -> dict[str, str]:
    examples, copies = list(analysis.examples.values()), analysis.duplicates
    total = len(examples)
    rows = {
        "data": analysis.data_path,
        "records": f"{analysis.num_records:,}",
        "examples": f"{total:,}",
        "with an input": _share(sum(example.input != "" for example in examples), total),
        "empty answers": _share(len(analysis.findings["empty_output"]), total),
        "with a suspicious trait": _share(analysis.num_suspicious, total),
        "exact copies of an earlier one": _share(len(copies.exact), total),
        "near copies of an earlier one": _share(len(copies.near), total),
    }
    if analysis.unreadable:
        rows["records that cannot be read"] = f"{len(analysis.unreadable):,}"
    if tokens := analysis.tokens:
        rows["tokens"] = f"{sum(tokens.lengths):,}, {sum(tokens.lengths) / total:.1f} an example"
    return rows


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.2%})" if total else f"{count:,}"


# Lengths ------------------------------------------------------------------------------------------------------


def _lengths(analysis: Analysis) -> str:
    examples = list(analysis.examples.values())
    texts = {
        "instruction": [len(example.instruction.split()) for example in examples],
        "input, where there is one": [len(example.input.split()) for example in examples if example.input],
        "answer": [len(example.output.split()) for example in examples],
    }
    if analysis.tokens is None:
        unit = "No tokenizer was given (--tokenizer FOLDER), so tokens are not counted and a cut is not foretold."
        body = _histogram(texts["answer"], cut=None, unit="words in the answer") + note(unit)
    else:
        body = _histogram(analysis.tokens.lengths, cut=analysis.tokens.max_length, unit="tokens of an example")
        body += table(_token_rows(analysis.tokens))
    return body + "<h3>words</h3>" + _spread(texts)


def _token_rows(tokens: TokenCounts) -> dict[str, str]:
    total, cut = len(tokens.lengths), tokens.max_length
    everything = sum(tokens.lengths)
    return {
        "tokens, prompt and answer and EOS": f"{everything:,}",
        "tokens an example": f"mean {everything / total:.1f}, {_quantiles(tokens.lengths)}",
        "tokens of a prompt": f"mean {sum(tokens.prompt_lengths) / total:.1f}, {_quantiles(tokens.prompt_lengths)}",
        f"longer than {cut:,}: cut, without their EOS": _share(tokens.num_cut, total),
        f"tokens that the cut at {cut:,} loses": _share(tokens.num_tokens_lost, everything),
        "prompt alone fills it: dropped from training": _share(tokens.num_all_masked, total),
        "tokens that carry loss after the cut": f"{tokens.num_targets:,}",
    }


def _quantiles(values: Sequence[int]) -> str:
    ordered = sorted(values)
    places = {"median": 0.5, "95 %": 0.95, "longest": 1.0}
    return ", ".join(f"{name} {ordered[round((len(ordered) - 1) * place)]:,}" for name, place in places.items())


def _spread(texts: Mapping[str, Sequence[int]]) -> str:
    rows = {
        name: f"{sum(counts):,}; mean {sum(counts) / len(counts):.1f}, {_quantiles(counts)}"
        for name, counts in texts.items()
        if counts
    }
    return table(rows)


def _histogram(values: Sequence[int], *, cut: int | None, unit: str) -> str:
    """Bars of 30 equal classes up to the 99.5th percentile (or the cut); the last holds all beyond."""
    ordered = sorted(values)
    top = max(ordered[round((len(ordered) - 1) * 0.995)], cut or 0, 30)
    width = -(-top // 30)
    classes = Counter(min(value // width, 30) for value in values)
    highest, last = max(classes.values()), max(classes)
    step, parts = 440 / (last + 1), []
    for place in range(last + 1):
        count, size = classes[place], 190 * classes[place] / highest
        style = "cut" if cut is not None and place * width >= cut else "bar"
        beyond = " and more" if place == 30 else "" if width == 1 else f"–{(place + 1) * width - 1:,}"
        title = f"{place * width:,}{beyond}: {count:,}"
        parts.append(
            f'<rect class="{style}" x="{20 + place * step:.1f}" y="{210 - size:.1f}" width="{step * 0.86:.1f}" '
            f'height="{size:.1f}"><title>{title}</title></rect>'
        )
    labels = {0: "0", (last + 1) // 2: f"{(last + 1) // 2 * width:,}", last: f"{last * width:,}"}
    for place, text in labels.items():
        parts.append(f'<text x="{20 + place * step:.1f}" y="228" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="240" y="248" text-anchor="middle">{html.escape(unit)}; highest bar: {highest:,}</text>')
    look = f'viewBox="0 0 480 254" role="img" aria-label="{html.escape(unit)}"'
    return f"<figure><svg {look}>{''.join(parts)}</svg></figure>"


# Verbs --------------------------------------------------------------------------------------------------------


def _verbs(analysis: Analysis, verbs: list[VerbCount], png: bytes) -> str:
    total = len(analysis.roots)
    kinds = Counter(root.kind for root in analysis.roots)
    with_object = sum(bool(root.object) for root in analysis.roots)
    questions = Counter(root.verb for root in analysis.roots if root.kind == "question").most_common(8)
    rows = {
        "orders (with a root verb)": _share(kinds["order"], total),
        "with a direct object as well": _share(with_object, total),
        "different verbs": f"{len(verbs):,}",
        "questions": _share(kinds["question"], total) + ("; " if questions else "") + _listed(questions),
        "neither": _share(kinds["other"], total),
    }
    shown = verb_plot.shown_verbs(verbs)
    objects = {verb.verb: _listed(verb.objects[: verb_plot.NUM_OBJECTS]) for verb in shown}
    lines = [(verb.verb, f"{verb.count:,}", objects[verb.verb]) for verb in shown]
    image = base64.b64encode(png).decode()
    link = f'<p><a download="verbs.png" href="data:image/png;base64,{image}">the figure as PNG</a></p>' if verbs else ""
    about = (
        f"Inner ring: the {verb_plot.NUM_VERBS} commonest root verbs with an object; outer ring: the "
        f"{verb_plot.NUM_OBJECTS} commonest direct objects of each, by their counts. Found by a lexicon and rules "
        f"for English orders, not by a parser; {ACCURACY}. Questions have no root verb here, objects after a "
        "preposition (“come up with a list”) do not count, other languages are not understood."
    )
    listing = f"<details><summary>as a table</summary>{_grid(('verb', 'count', 'objects'), lines)}</details>"
    return verb_plot.draw_svg(verbs) + table(rows) + (listing if verbs else "") + link + note(about)


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts)


def _grid(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of any number of columns; all but the first and last are numbers."""
    style = ['class="num"' if 0 < place < len(header) - 1 else "" for place in range(len(header))]

    def row(cells: Sequence[str], tag: str) -> str:
        inside = (f"<{tag} {look}>{html.escape(cell)}</{tag}>" for cell, look in zip(cells, style, strict=True))
        return f"<tr>{''.join(inside)}</tr>"

    return f'<table class="wide">{row(header, "th")}{"".join(row(line, "td") for line in lines)}</table>'


# Findings -----------------------------------------------------------------------------------------------------


def _findings(analysis: Analysis) -> str:
    order = sorted(RULES, key=lambda rule: -len(analysis.findings[rule.name]))
    about = "What a rule finds is a reason to look, not a verdict. Records are counted from 0."
    return note(about) + "".join(_finding(analysis, rule) for rule in order)


def _finding(analysis: Analysis, rule: Rule) -> str:
    found = analysis.findings[rule.name]
    shown = (
        _example(f"record {finding.index}", analysis.examples[finding.index], evidence=finding.evidence)
        for finding in found[:_NUM_SHOWN]
    )
    places = ", ".join(f"{finding.index}" for finding in found[:200])
    more = f" and {len(found) - 200:,} more" if len(found) > 200 else ""
    body = note(rule.meaning) + "".join(shown) + (note(f"records {places}{more}") if found else "")
    return _fold(rule.title, _share(len(found), len(analysis.examples)), body)


def _fold(title: str, number: str, body: str) -> str:
    head = f'<summary><b>{html.escape(title)}</b> <span class="num">{html.escape(number)}</span></summary>'
    return f"<details>{head}{body}</details>"


def _example(title: str, example: Example, *, evidence: str = "") -> str:
    parts = {"seen": evidence, "instruction": example.instruction, "input": example.input, "output": example.output}
    body = "".join(f"<h3>{name}</h3><pre>{_cut(text)}</pre>" for name, text in parts.items() if text.strip())
    return f"<article><h3>{html.escape(title)}</h3>{body}</article>"


def _cut(text: str) -> str:
    return html.escape(text if len(text) <= _MOST else text[:_MOST] + " …")


def _copies(analysis: Analysis) -> str:
    kinds = {
        "Exact copies": (analysis.duplicates.exact, "Instruction, input and output equal those of an earlier example."),
        "Prompts answered again": (
            analysis.duplicates.conflicting,
            "Instruction and input equal those of an earlier example, the output differs.",
        ),
        "Near copies": (
            analysis.duplicates.near,
            f"The pairs of neighbouring words of instruction and input overlap by {NEAR} or more (shared over all) "
            "with those of an earlier example that is no copy itself; every such example is found.",
        ),
    }
    return "".join(
        _fold(title, _share(len(copies), len(analysis.examples)), note(meaning) + _pairs(analysis, copies))
        for title, (copies, meaning) in kinds.items()
    )


def _pairs(analysis: Analysis, copies: Sequence[Copy]) -> str:
    return "".join(
        _example(f"record {copy.index}, overlap {copy.overlap:.2f}", analysis.examples[copy.index])
        + _example(f"which repeats record {copy.of}", analysis.examples[copy.of])
        for copy in copies[:_NUM_SHOWN]
    )


def _languages(analysis: Analysis) -> str:
    instructions, outputs = (Counter(column) for column in zip(*analysis.languages, strict=True))
    total = len(analysis.languages)
    names = sorted(instructions | outputs, key=lambda name: (-instructions[name], -outputs[name], name))
    lines = [(name, _share(instructions[name], total), _share(outputs[name], total), "") for name in names]
    other = [
        index
        for index, (_, language) in zip(analysis.examples, analysis.languages, strict=True)
        if language not in ("English", UNDETERMINED)
    ]
    about = (
        "By script, commonest words and letters of some 40 languages. Undetermined: too short, or names, numbers, "
        f"code. Answers in other languages than English: {len(other):,}"
    )
    places = f" (records {', '.join(f'{index}' for index in other[:40])}{', …' if len(other) > 40 else ''})"
    return _grid(("language", "instructions", "answers", ""), lines) + note(about + (places if other else "") + ".")


# Mending ------------------------------------------------------------------------------------------------------


def _mending(analysis: Analysis, changes: Sequence[Change], cleaned: Path | None) -> str:
    counts = Counter(change.rule for change in changes)
    lines = [(rule, f"{counts[rule]:,}", meaning) for rule, meaning in MEANINGS.items() if counts[rule]]
    dropped = sum(change.field is None for change in changes)
    left = analysis.num_records - dropped
    if not changes:
        return note("No rule of --clean would change anything.")
    done = f"Written to {cleaned}" if cleaned else "What --clean OUT would do"
    return note(f"{done}: {left:,} records left, {dropped:,} dropped.") + _grid(("rule", "changes", "meaning"), lines)


def _unreadable(analysis: Analysis) -> str:
    rows = {f"record {index}": reason[:_MOST] for index, reason in analysis.unreadable[:50]}
    return table(rows) + note(f"{len(analysis.unreadable):,} in all; they count nowhere else on this page.")
