"""report.html of a data set: the analysis on one page that loads nothing and runs no script but its own.

The functions here make plain values, which page.html.j2 shows. Texts of the data set are cut to a few hundred
characters, and escaped by the template as every value is.
"""

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alpaca.data.analysis import verb_plot
from alpaca.data.analysis.checks import RULES, Rule
from alpaca.data.analysis.cleaning import MEANINGS, Change
from alpaca.data.analysis.duplicates import NEAR, Copy
from alpaca.data.analysis.languages import UNDETERMINED
from alpaca.data.analysis.summary import Analysis, TokenCounts
from alpaca.data.analysis.verb_plot import count_verbs
from alpaca.data.analysis.verbs import ACCURACY
from alpaca.data.example import AnyExample
from alpaca.pages.templates import read_asset, render_page

_NUM_SHOWN = 5  # examples of each finding
_MAX_SHOWN_CHARS = 400  # of each text
_TEMPLATE = Path(__file__).with_name("page.html.j2")
_STYLE = Path(__file__).with_name("page.css")


def make_page(analysis: Analysis, changes: Sequence[Change], *, png: bytes, cleaned: Path | None = None) -> str:
    """The page as HTML.

    changes: the changes of cleaning, which were written to `cleaned` if that is given, and else would be made.
    png: the figure of verbs.
    """
    name = Path(analysis.data_path).name
    return render_page(
        _TEMPLATE,
        title=f"Data: {name}",
        heading=name,
        style=read_asset(_STYLE),
        script=verb_plot.read_script(),
        highlights=_highlights(analysis),
        unreadable={f"record {index}": reason[:_MAX_SHOWN_CHARS] for index, reason in analysis.unreadable[:50]},
        num_unreadable=len(analysis.unreadable),
        png=base64.b64encode(png).decode(),
        findings=_findings(analysis),
        copies=_copies(analysis),
        **_lengths(analysis),
        **_verbs(analysis),
        **_languages(analysis),
        **_mending(analysis, changes, cleaned),
    )


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


def _lengths(analysis: Analysis) -> dict[str, object]:
    examples, tokens = list(analysis.examples.values()), analysis.tokens
    texts = {
        "instruction": [len(example.instruction.split()) for example in examples],
        "input, where there is one": [len(example.input.split()) for example in examples if example.input],
        "answer": [len(example.output.split()) for example in examples],
    }
    if tokens is None:
        bars = _make_histogram(texts["answer"], cut=None, unit="words in the answer")
    else:
        bars = _make_histogram(tokens.lengths, cut=tokens.max_length, unit="tokens of an example")
    return {"bars": bars, "token_rows": _token_rows(tokens) if tokens else {}, "word_rows": _word_rows(texts)}


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


def _word_rows(texts: Mapping[str, Sequence[int]]) -> dict[str, str]:
    return {
        name: f"{sum(counts):,}; mean {sum(counts) / len(counts):.1f}, {_quantiles(counts)}"
        for name, counts in texts.items()
        if counts
    }


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """A bar of a histogram, in units of the drawing. is_cut: training cuts the examples that it counts."""

    x: float
    width: float
    height: float
    is_cut: bool
    title: str


@dataclass(frozen=True, kw_only=True)
class _Histogram:
    """Bars, labels below them with their places, and the count of the highest bar."""

    bars: list[_Bar]
    labels: list[tuple[float, str]]
    unit: str
    highest: int


def _make_histogram(values: Sequence[int], *, cut: int | None, unit: str) -> _Histogram:
    """Bars of 30 equal classes up to the 99.5th percentile (or the cut); one more holds all larger values."""
    ordered = sorted(values)
    top = max(ordered[round((len(ordered) - 1) * 0.995)], cut or 0, 30)
    class_size = -(-top // 30)
    counts = Counter(min(value // class_size, 30) for value in values)
    highest, last = max(counts.values()), max(counts)
    step = 440 / (last + 1)
    bars = [
        _Bar(
            x=20 + place * step, width=step * 0.86, height=190 * counts[place] / highest,
            is_cut=cut is not None and place * class_size >= cut,
            title=f"{_name_class(place, class_size)}: {counts[place]:,}",
        )
        for place in range(last + 1)
    ]  # fmt: skip
    labelled = {0: "0", (last + 1) // 2: f"{(last + 1) // 2 * class_size:,}", last: f"{last * class_size:,}"}
    labels = [(20 + place * step, text) for place, text in labelled.items()]
    return _Histogram(bars=bars, labels=labels, unit=unit, highest=highest)


def _name_class(place: int, size: int) -> str:
    if place == 30:
        return f"{place * size:,} and more"
    return f"{place * size:,}" + ("" if size == 1 else f"–{(place + 1) * size - 1:,}")


# Verbs --------------------------------------------------------------------------------------------------------


def _verbs(analysis: Analysis) -> dict[str, object]:
    verbs = count_verbs(analysis.roots)
    shown = verb_plot.select_shown(verbs)
    lines = [(v.verb, f"{v.count:,}", _listed(v.objects[: verb_plot.NUM_OBJECTS])) for v in shown]
    about = (
        f"Inner ring: the {verb_plot.NUM_VERBS} commonest root verbs with an object; outer ring: the "
        f"{verb_plot.NUM_OBJECTS} commonest direct objects of each, by their counts. Found by a lexicon and rules "
        f"for English orders, not by a parser; {ACCURACY}. Questions have no root verb here, objects after a "
        "preposition (“come up with a list”) do not count, other languages are not understood."
    )
    rows = _verb_rows(analysis, len(verbs))
    return {"verb_figure": verb_plot.draw_svg(verbs), "verb_rows": rows, "verb_lines": lines, "verb_note": about}


def _verb_rows(analysis: Analysis, num_verbs: int) -> dict[str, str]:
    total = len(analysis.roots)
    kinds = Counter(root.kind for root in analysis.roots)
    with_object = sum(bool(root.object) for root in analysis.roots)
    questions = Counter(root.verb for root in analysis.roots if root.kind == "question").most_common(8)
    return {
        "orders (with a root verb)": _share(kinds["order"], total),
        "with a direct object as well": _share(with_object, total),
        "different verbs": f"{num_verbs:,}",
        "questions": _share(kinds["question"], total) + ("; " if questions else "") + _listed(questions),
        "neither": _share(kinds["other"], total),
    }


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts)


# Findings -----------------------------------------------------------------------------------------------------


def _findings(analysis: Analysis) -> list[dict[str, object]]:
    order = sorted(RULES, key=lambda rule: -len(analysis.findings[rule.name]))
    return [_finding(analysis, rule) for rule in order]


def _finding(analysis: Analysis, rule: Rule) -> dict[str, object]:
    found = analysis.findings[rule.name]
    examples = [
        (f"record {finding.index}", _texts(analysis.examples[finding.index], evidence=finding.evidence))
        for finding in found[:_NUM_SHOWN]
    ]
    places = "records " + ", ".join(f"{finding.index}" for finding in found[:200]) if found else ""
    more = f" and {len(found) - 200:,} more" if len(found) > 200 else ""
    return {
        "title": rule.title, "share": _share(len(found), len(analysis.examples)), "meaning": rule.meaning,
        "examples": examples, "places": places + more,
    }  # fmt: skip


def _texts(example: AnyExample, *, evidence: str = "") -> dict[str, str]:
    """The texts of an example that are not empty, by their names, cut to what is shown of them."""
    parts = {"seen": evidence, "instruction": example.instruction, "input": example.input, "output": example.output}
    return {name: _cut(text) for name, text in parts.items() if text.strip()}


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + " …"


def _copies(analysis: Analysis) -> list[dict[str, object]]:
    found = analysis.duplicates
    near = (
        f"The pairs of neighbouring words of instruction and input overlap by {NEAR} or more (shared over all) "
        "with those of an earlier example that is no copy itself; every such example is found."
    )
    kinds = (
        ("Exact copies", found.exact, "Instruction, input and output equal those of an earlier example."),
        (
            "Prompts answered again",
            found.conflicting,
            "Instruction and input equal those of an earlier example, the output differs.",
        ),
        ("Near copies", found.near, near),
    )
    total = len(analysis.examples)
    return [
        {"title": title, "share": _share(len(copies), total), "meaning": meaning, "examples": _pairs(analysis, copies)}
        for title, copies, meaning in kinds
    ]


def _pairs(analysis: Analysis, copies: Sequence[Copy]) -> list[tuple[str, dict[str, str]]]:
    """The first copies, each followed by the example that it repeats."""
    shown = []
    for copy in copies[:_NUM_SHOWN]:
        shown.append((f"record {copy.index}, overlap {copy.overlap:.2f}", _texts(analysis.examples[copy.index])))
        shown.append((f"which repeats record {copy.of}", _texts(analysis.examples[copy.of])))
    return shown


def _languages(analysis: Analysis) -> dict[str, object]:
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
    return {"language_lines": lines, "language_note": about + (places if other else "") + "."}


# Mending ------------------------------------------------------------------------------------------------------


def _mending(analysis: Analysis, changes: Sequence[Change], cleaned: Path | None) -> dict[str, object]:
    if not changes:
        return {"mending_note": "No rule of --clean would change anything.", "mending_lines": []}
    counts = Counter(change.rule for change in changes)
    lines = [(rule, f"{counts[rule]:,}", meaning) for rule, meaning in MEANINGS.items() if counts[rule]]
    num_dropped = sum(change.field is None for change in changes)
    done = f"Written to {cleaned}" if cleaned else "What --clean OUT would do"
    left = f"{analysis.num_records - num_dropped:,} records left, {num_dropped:,} dropped."
    return {"mending_note": f"{done}: {left}", "mending_lines": lines}
