"""The import rule of the design: an arrow that is not drawn is a mistake."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAGES = {"data", "training", "serving"}
ALLOWED_BETWEEN_STAGES = {("training", "data")}
NOBODY_IMPORTS = {"convert", "bench", "web", "predict", "train", "tests", "script"}
COG_USERS = {"predict.py", "train.py", "deploy/schema.py"}
FILES = sorted(path for folder in ("alpaca", "convert") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules a file names in its imports, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def stage(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "alpaca" and len(parts) > 1 and parts[1] in STAGES else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    relative = path.relative_to(ROOT)
    own = relative.parts[1] if relative.parts[0] == "alpaca" and relative.parts[1] in STAGES else None
    for name in imported(path):
        first = name.split(".")[0]
        allowed_first = NOBODY_IMPORTS - ({"convert"} if relative.parts[0] == "convert" else set())
        assert first not in allowed_first, f"{relative} imports {name}"
        other = stage(name)
        if other and other != own:
            assert own, f"{relative}, a root module, imports the stage {name}"
            assert (own, other) in ALLOWED_BETWEEN_STAGES, f"{relative} imports {name}"
        if relative.parts[0] == "convert":
            assert other is None, f"{relative} imports {name}"


def test_only_these_import_cog():
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if not {".venv", ".bench"} & set(path.relative_to(ROOT).parts)
        and any(name.split(".")[0] in ("cog", "coglet") for name in imported(path))
    }
    assert users == COG_USERS


def test_packages_have_empty_inits():
    assert not [path for path in ROOT.glob("alpaca/**/__init__.py") if path.read_text()]


def test_scheduler_side_of_serving_needs_no_torch():
    for name in ("request", "detokenize", "engine", "settings", "cache", "scheduler", "housekeeping"):
        assert not [n for n in imported(ROOT / f"alpaca/serving/{name}.py") if n.split(".")[0] == "torch"]
