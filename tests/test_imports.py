"""The rooms of the tree: arrows between them run one way, nothing goes round in a circle, and no room is too full."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A room imports itself and the rooms before it; of those on one line, none imports another.
LAYERS = (
    {"alpaca.errors", "alpaca.memory", "alpaca.cpu_threads", "alpaca.processes", "alpaca.subprocesses"},
    {"alpaca.architecture", "alpaca.files", "alpaca.pages"},
    {"alpaca.text"},
    {"alpaca.formats"},
    {"alpaca.data"},
    {"alpaca.training", "alpaca.serving"},
    {"alpaca.evaluation"},
    {"convert", "predict", "train"},
    {"deploy"},
    {"bench", "web", "script"},
)
MAY_NOT_IMPORT = {"web": {"alpaca.serving", "alpaca.training", "predict", "train"}}  # the page talks HTTP
COG_USERS = {"predict.py", "train.py", "deploy/schema.py"}
MOST_FILES = 11
ROOMS = ("alpaca", "convert", "deploy", "web", "bench", "script")
SOURCES = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")] + [ROOT / "predict.py", ROOT / "train.py"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


@functools.cache
def imported(path: Path) -> set[str]:
    """The names a file imports, wherever the statement stands: modules, and what is taken from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """The project's modules that a module imports."""
    names = imported(MODULES[module])
    return (
        {name for name in names if name in MODULES} | {name.rpartition(".")[0] for name in names}
    ) & MODULES.keys() - {module}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.startswith("alpaca.") else module.split(".")[0]


def layer_of(room: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "alpaca"])
def test_arrows_run_one_way(module):
    room = room_of(module)
    for other in map(room_of, own_imports(module) - {"alpaca"}):
        assert other == room or layer_of(other) < layer_of(room), f"{module} imports from {other}"
        assert other not in MAY_NOT_IMPORT.get(room, ()), f"{module} imports from {other}"


def test_no_import_circle():
    """Statements inside functions and under TYPE_CHECKING count, too."""
    graph = {module: own_imports(module) for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}")


def test_no_room_is_too_full():
    full = {}
    for folder in {path.parent for path in (ROOT / "alpaca").rglob("*.py")}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        if len(files) > MOST_FILES:
            full[str(folder.relative_to(ROOT))] = len(files)
    assert not full


def test_only_these_import_cog():
    users = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if not {".venv", ".venv.old", ".bench"} & set(path.relative_to(ROOT).parts)
        and any(name.split(".")[0] in ("cog", "coglet") for name in imported(path))
    }
    assert users == COG_USERS


def test_packages_have_empty_inits():
    assert not [path for path in ROOT.glob("alpaca/**/__init__.py") if path.read_text()]


def test_architecture_is_pure():
    """A mapping goes in and a description comes out: no library is needed, and nothing that opens files."""
    allowed = sys.stdlib_module_names - {"io", "os", "pathlib", "shutil", "tempfile", "subprocess"} | {"alpaca"}
    for name in MODULES:
        if room_of(name) == "alpaca.architecture":
            names = imported(MODULES[name])
            assert {other.split(".")[0] for other in names} <= allowed, name
            assert "open" not in called(MODULES[name]), name


def called(path: Path) -> set[str]:
    """The names of the functions that a file calls without a dot before them."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


def test_kernels_know_no_engine():
    for name in MODULES:
        if name.startswith("alpaca.serving.kernels."):
            others = {other for other in own_imports(name) if other.startswith("alpaca.serving.")}
            assert all(other.startswith("alpaca.serving.kernels") for other in others), f"{name} imports {others}"


def test_the_deciding_side_of_serving_needs_no_torch():
    decides = ("request", "detokenize", "engine", "settings", "housekeeping", "llama.cache", "llama.scheduler")
    for name in decides:
        assert not [n for n in imported(MODULES[f"alpaca.serving.{name}"]) if n.split(".")[0] == "torch"]


def test_the_server_starts_without_the_template_language():
    """Chat templates are rendered in another process."""
    code = "import sys, alpaca.serving.request, alpaca.text.loading; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_commands_for_data_start_without_torch():
    """Its import would take most of their time."""
    code = "import sys, alpaca.data.generate_instruction, alpaca.data.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
