"""The picture of serving shows the figures of the results' file, each where it belongs, and no other."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from alpaca.errors import InputError, MissingInput
from bench import plot_serving
from tests.conftest import ROOT

RESULTS = ROOT / "bench" / "results" / "serve-cpu.json"
PICTURE = ROOT / "docs" / "images" / "serving.svg"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text())


def measured(results: dict) -> dict[str, list[tuple[int, float]]]:
    """What the picture has to show, taken from the rows by their names, one by one."""
    rows = {row["name"]: (row["clients"], row["tokens_per_s"]) for row in results["rows"]}
    return {
        "engine": [rows[f"engine {clients}"] for clients in (1, 2, 4, 8, 16, 32, 64)],
        "stream": [rows[f"stream {clients}"] for clients in (1, 8, 16, 32)],
        "batching": [rows["batching 8"]],
        "generate": [rows["generate"]],
    }


def points_of(group: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the points of a series lie in the picture."""
    marks = [(float(use.get("x")), float(use.get("y"))) for use in group.iter(f"{SVG}use")]
    assert marks, "a series without a mark"
    return marks


def test_the_series_are_the_rows(results):
    assert plot_serving.read_series(results) == measured(results)


def test_the_committed_picture_is_of_the_committed_results(results):
    """Marks lie where one straight scale for each axis puts the figures; the figures beside them are the rows'."""
    tree = ElementTree.fromstring(PICTURE.read_text())
    groups = {group.get("id"): group for group in tree.iter(f"{SVG}g")}
    expected = measured(results)
    drawn = {way: points_of(groups[f"series-{way}"]) for way in expected}
    (x1, y1), (x2, y2) = drawn["engine"][0], drawn["engine"][-1]
    (c1, r1), (c2, r2) = expected["engine"][0], expected["engine"][-1]
    for way, rows in expected.items():
        at = [(x1 + (c - c1) * (x2 - x1) / (c2 - c1), y1 + (r - r1) * (y2 - y1) / (r2 - r1)) for c, r in rows]
        assert [value for pair in drawn[way] for value in pair] == pytest.approx([v for pair in at for v in pair])
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    for way in ("stream", "batching", "generate"):
        assert all(plot_serving.label_of(rate) in texts for _, rate in expected[way])
    machine = f"{results['hardware']['cores']} cores of an {results['hardware']['cpu']}"
    assert f"model {results['config']['shape']} in {results['config']['dtype']} on {machine}" in texts


def test_drawing_again_gives_the_same_text(results, tmp_path: Path):
    drawn = plot_serving.draw(results)
    assert plot_serving.draw(results) == drawn
    plot_serving.write_aside(tmp_path / "new" / "serving.svg", drawn)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["serving.svg"]
    assert re.search(r"<svg ", (tmp_path / "new" / "serving.svg").read_text())


def test_another_figure_is_another_picture(results):
    changed = json.loads(RESULTS.read_text())
    next(row for row in changed["rows"] if row["name"] == "stream 8")["tokens_per_s"] = 777.0
    assert ">777<" in plot_serving.draw(changed)
    assert ">777<" not in plot_serving.draw(results)


def test_what_cannot_be_drawn_is_named(results, tmp_path: Path):
    rows = [row for row in results["rows"] if not row["name"].startswith("batching")]
    with pytest.raises(InputError, match=r"measured for batching; run python -m bench\.serve"):
        plot_serving.draw({**results, "rows": rows})
    with pytest.raises(MissingInput, match=r"no file .*none\.json; python -m bench\.serve writes one"):
        plot_serving.read_results(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"expected results of bench\.serve, found those of 'encode'"):
        plot_serving.read_results(ROOT / "bench" / "results" / "encode.json")
