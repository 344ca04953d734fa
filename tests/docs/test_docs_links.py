"""Links between the pages lead to files and headings that exist; the pages keep their lengths."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.pages import NOTES, PAGES, anchors, read_links

LONGEST = {"README.md": 200, "CONTRIBUTING.md": 60}  # lines
LARGEST_PICTURE_BYTES = 200_000


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in read_links(page):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or not target.is_relative_to(ROOT):
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            broken.append(f"{link}: no such heading")
    return broken


@pytest.mark.parametrize("page", [*PAGES, NOTES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = ROOT / "docs" / ".links.md"
    page.write_text(
        "[a](serving.md#settings) [b](serving.md#no-such) [c](none.md) [d](#here) [e](../../x)\n\n# Here!\n"
    )
    try:
        assert broken_links(page) == [
            "serving.md#no-such: no such heading",
            "none.md: no such file",
            "../../x: no such file",
        ]
    finally:
        page.unlink()


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        names = [link.partition("#")[0] for link in read_links(page) if not link.startswith("http")]
        waiting += [path for name in names if name.endswith(".md") and (path := (page.parent / name).resolve())]
    assert [page for page in PAGES if page not in reached and page.parent in (ROOT, ROOT / "docs")] == []


def test_every_picture_is_shown_and_small():
    shown = {(page.parent / link).resolve() for page in PAGES for link in read_links(page)}
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture in shown, picture
        assert picture.stat().st_size < LARGEST_PICTURE_BYTES, picture


@pytest.mark.parametrize("name", LONGEST)
def test_pages_keep_their_length(name: str):
    assert len((ROOT / name).read_text().splitlines()) <= LONGEST[name]
