"""The tree on the architecture page is the one there is."""

import re

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
TREE = PAGE.partition("## The tree")[2].partition("## ")[0]


def rooms_on_the_page() -> set[str]:
    """Folders named in the tree, with their parents by indentation."""
    rooms: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in TREE.splitlines():
        match = re.match(r"( {4,})([a-z_]+)/", line)
        if match:
            indent = len(match[1])
            parents = [(depth, name) for depth, name in parents if depth < indent]
            path = "/".join([name for _, name in parents] + [match[2]])
            parents.append((indent, match[2]))
            rooms.add(path)
    return rooms


def test_every_room_is_on_the_page_and_there():
    found = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "alpaca").rglob("*.py")}
    assert {room for room in rooms_on_the_page() if room.split("/")[0] == "alpaca"} == found
    assert not [room for room in rooms_on_the_page() if not (ROOT / room).is_dir()]


def test_modules_that_the_page_names_are_there():
    for path in re.findall(r"`((?:alpaca|serving|formats|training|tests)/[a-z_/]+(?:\.py)?)/?`", PAGE):
        places = [ROOT / path, ROOT / "alpaca" / path, ROOT / f"{path}.py", ROOT / "alpaca" / f"{path}.py"]
        assert any(place.exists() for place in places), path
