"""Each measured figure on the pages is the one in the results' file that its row names, rounded."""

import json
import re
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest

from tests.conftest import ROOT

FIGURES, README = ROOT / "docs" / "figures.md", ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
Results = dict[str, Any]


def rounded(value: float, digits: int = 0) -> str:
    """As a person rounds, halves up, with commas between thousands."""
    return f"{Decimal(str(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):,}"


def percent(share: float) -> str:
    return f"{rounded(100 * share)} %"


def conversion(results: Results) -> list[str]:
    """This project's cell, the baseline's, the ceiling's."""
    ours = f"{rounded(results['ours_s'], 1)} s, {rounded(results['ours_peak_anonymous_mb'])} MB"
    ceiling = f"{rounded(results['cp_with_fsync_s'], 1)} s"
    if "theirs_s" not in results:
        return [ours, "", ceiling]
    return [ours, f"{rounded(results['theirs_s'], 1)} s, {rounded(results['theirs_peak_anonymous_mb'])} MB", ceiling]


def training(results: Results) -> list[str]:
    rates = {name: rounded(row["tokens_per_second"]) for name, row in results["results"].items()}
    ours = f"{rates['packed']} useful tokens/s; `--numerics fast` {rates['fast']}; LoRA {rates['lora']}"
    return [ours, rates["padded"], ""]


def similarity(results: Results) -> list[str]:
    return [f"{rounded(results['full_ms'], 1)} ms", f"{rounded(results['original_ms'])} ms", ""]


def encoding(results: Results) -> list[str]:
    return [f"{rounded(results[f'{way}_s'], 1)} s" for way in ("ours", "original", "ceiling")]


def start(results: Results) -> list[str]:
    return [f"{rounded(results[way]['first_token_s'], 1)} s" for way in ("server", "baseline")] + [""]


def adapters(results: Results) -> list[str]:
    one, four = (percent(1 - results["cases"][name]["of_none"]) for name in ("one", "four"))
    return [f"costs {one}; {four}", "", ""]


def served(name: str) -> Callable[[Results], list[str]]:
    def cells(results: Results) -> list[str]:
        rows = {row["name"]: row for row in results["rows"]}
        rates = {one: rounded(row["tokens_per_s"]) for one, row in rows.items()}
        clients = rows[name]["clients"]
        baseline = {1: rates["generate"], 8: rates["batching 8"], 16: ""}[clients]
        share = percent(rows[name]["share_of_bandwidth"])
        return [f"{rates[name]} tokens/s", baseline, share if clients == 1 else rates[f"engine {clients}"]]

    return cells


def sampled(label: str) -> Callable[[Results], list[str]]:
    return lambda results: [
        f"costs {percent(next(one['value'] for one in results['targets'] if one['label'] == label))}",
        "",
        "",
    ]


def families(results: Results) -> list[str]:
    """The least and the most of all families' ratios."""
    found = [figures["times_generate"] for figures in results["families"].values()]
    parts = []
    for clients, name in (("8 clients", "engine 8"), ("1 client", "engine 1")):
        least, most = (rounded(choose(one[name] for one in found), 1) for choose in (min, max))
        parts.append(f"{clients} {least} to {most} times")
    return [f"{parts[0]} `generate`, {parts[1]}", "", ""]


def structured(results: Results) -> list[str]:
    costs = (percent(max(0, 1 - results["cases"][name]["of_free"])) for name in ("half", "constrained"))
    return [f"costs {'; '.join(costs)}", "", ""]


def openai(results: Results) -> list[str]:
    costs = (f"{percent(1 - found['share'])}, {found['added_ms']:+.1f} ms" for found in map(
        results["figures"].get, ("openai", "details")
    ))  # fmt: skip
    return [f"costs {'; '.join(costs)}", "", ""]


def libraries(results: Results) -> list[str]:
    def means(name: str) -> str:
        found = results["speed"][name].values()
        return "; ".join(f"{rounded(one['mask_us_again']['mean'])} us" for one in found)

    return [means("llguidance"), f"xgrammar: {means('xgrammar')}", ""]


def evaluated(task: str) -> Callable[[Results], list[str]]:
    def cells(results: Results) -> list[str]:
        row = results["tasks"][f"bench_{task}"]
        return [f"{rounded(row['engine_s'], 1)} s", f"{rounded(min(row['hf_s'].values()), 1)} s", ""]

    return cells


# How a row's cells follow from its results, by how its first cell begins; where none is named, by its results' file.
CELLS = {
    "one client, streamed": served("stream 1"),
    "8 clients, streamed": served("stream 8"),
    "16 clients, streamed": served("stream 16"),
    "sampling at a temperature": sampled("engine 8: cost of temperature"),
    "top_k with top_p": sampled("engine 8: cost of top_p and top_k"),
    "lm-eval, four choices without": evaluated("choices"),
    "lm-eval, four choices after": evaluated("choices_5_shot"),
    "lm-eval, whole texts": evaluated("texts"),
    "lm-eval, answers": evaluated("answers"),
    "convert-": conversion,
    "train-cpu": training,
    "similarity": similarity,
    "encode": encoding,
    "cold-start-cpu": start,
    "adapters-cpu": adapters,
    "families-cpu": families,
    "structured-cpu": structured,
    "structured-libraries": libraries,
    "openai-cpu": openai,
}


def table_rows(text: str) -> list[list[str]]:
    """The cells of each row of each table but heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [i for i, row in enumerate(rows) if set("".join(row)) <= set("-: ")]
    return [row for i, row in enumerate(rows) if i not in rules and i + 1 not in rules]


ROWS = [row for row in table_rows(FIGURES.read_text()) if "bench/results" in " ".join(row)]


def results_of(row: list[str]) -> tuple[str, Results]:
    name = re.search(r"bench/results/([\w-]+)\.json", row[4])[1]
    return name, json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_says_what_was_measured(row: list[str]):
    name, results = results_of(row)
    make = next(
        cells for beginning, cells in CELLS.items() if row[0].startswith(beginning) or name.startswith(beginning)
    )
    for cell, expected in zip(row[1:4], make(results), strict=True):
        assert expected in cell
        assert bool(cell) == bool(expected)
    assert row[5] == f"`{results['command']}`"


def test_every_results_file_is_told_of():
    told = {results_of(row)[0] for row in ROWS}
    assert told == {path.stem for path in RESULTS.glob("*.json")}


def test_the_page_of_structured_answers_has_the_libraries_figures():
    """Each row below its head: llguidance's cell and xgrammar's, in the file's order."""
    results = json.loads((RESULTS / "structured-libraries.json").read_text())
    rows = {row[0]: row[1:] for row in table_rows((ROOT / "docs" / "structured.md").read_text())}
    for place, name in enumerate(("llguidance", "xgrammar")):
        small, large = results["speed"][name]["32000"], results["speed"][name]["128256"]
        found = {
            "a mask, mean, 32,000 rows": f"{rounded(small['mask_us_again']['mean'])} us",
            "a mask, mean, 128,256 rows": f"{rounded(large['mask_us_again']['mean'])} us",
            "the longest mask, 32,000; 128,256 rows": "; ".join(map(longest, (small, large))),
            "built with its first mask, 32,000 rows": span(small),
            "built with its first mask, 128,256 rows": span(large),
            "the vocabulary made ready, 128,256 rows": f"{rounded(large['prepared_s'], 1)} s",
        }
        verdicts = {key: verdict for key, verdict in results["keywords"][name].items() if key != "no answer"}
        found[f"of {len(verdicts)} keywords: held"] = str(list(verdicts.values()).count("held"))
        for verdict, row in (("refused", "refused"), ("not held", "not held, without an error")):
            found[row] = ", ".join(key for key, said in verdicts.items() if said == verdict) or "none"
        assert {row: rows[row][place] for row in found} == found
        assert results["keywords"][name]["no answer"] == "refused"
        assert f"{name} {results['versions'][name]}" in (ROOT / "docs" / "structured.md").read_text()


def test_the_page_of_structured_answers_has_the_rates():
    cases = json.loads((RESULTS / "structured-cpu.json").read_text())["cases"]
    rows = {row[0]: row[1:] for row in table_rows((ROOT / "docs" / "structured.md").read_text())}
    for name, row in (
        ("free", "all free"),
        ("half", "four constrained by a JSON schema"),
        ("constrained", "all constrained"),
    ):
        share = "" if name == "free" else rounded(cases[name]["of_free"], 2)
        assert rows[row] == [rounded(cases[name]["tokens_per_second"]), share]


def longest(speed: Results) -> str:
    return f"{rounded(max(speed[f'mask_us_{turn}']['worst'] for turn in ('first', 'again')) / 1000, 1)} ms"


def span(speed: Results) -> str:
    times = speed["built_ms"].values()
    return f"{rounded(min(times), 1)} to {rounded(max(times), 1)} ms"


def test_no_figure_of_the_readme_is_another():
    """A row of the README's table has the cells of a row of the figures' page."""
    measured = README.read_text().partition("\n## Measured\n")[2].partition("\n## ")[0]
    rows = table_rows(measured)
    known = [row[1:4] for row in ROWS]
    assert len(rows) >= 8
    for row in rows:
        assert [cell.removeprefix("`cp` and fsync: ") for cell in row[1:4]] in known, row


def test_the_pages_name_the_machine_that_measured():
    for page in (FIGURES, README):
        text = " ".join(page.read_text().split())
        assert "2 cores of an AMD EPYC without a GPU" in text
        assert "torch 2.13.0" in text
    for row in ROWS:
        _, results = results_of(row)
        if "gpu" in results["hardware"]:
            continue
        is_older = (results.get("bench"), results.get("dtype")) == ("families", "bfloat16")
        cpu = "Intel(R) Xeon(R) Processor" if is_older else "AMD EPYC"
        assert results["hardware"] == {"cpu": cpu, "cores": 2}
        assert results["versions"].get("torch", "2.13.0+cpu").startswith("2.13.0")
