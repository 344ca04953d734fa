"""No command unpickles without restriction: held by a walk through the source."""

import ast
from collections.abc import Iterator

from tests.conftest import ROOT

RESTRICTED = "alpaca/training/checkpoints/untrusted.py"  # the one place with an unpickler, which knows few classes
UNPICKLERS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "_pickle.load", "_pickle.loads",
    "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load",
    "cloudpickle.loads", "torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle",
}  # fmt: skip


def sources() -> Iterator[tuple[str, ast.Module]]:
    for top in ("alpaca", "convert", "bench", "deploy", "script", "web", "predict.py", "train.py"):
        path = ROOT / top
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())


def find_unrestricted(tree: ast.Module) -> Iterator[str]:
    """What in a module may run what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "_pickle", "marshal", "shelve"):
            yield f"line {node.lineno}: import the module, so that its calls are seen here"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNPICKLERS:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if not isinstance(node, ast.Call):
            continue
        call, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if call.endswith("torch.load") and given.get("weights_only") != "True":
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if call in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            yield f"line {node.lineno}: {call} with pickles"
        if call in ("dcp.load", "torch.distributed.checkpoint.load") and not (
            given.get("storage_reader", "") and given.get("planner") == "DataOnlyPlanner()"
        ):
            yield f"line {node.lineno}: {call} reads its index and its values as pickles"
        if given.get("trust_remote_code", "False") != "False":
            yield f"line {node.lineno}: {call} runs code of a folder"


def test_nothing_is_unpickled_without_restriction():
    found = {path: list(find_unrestricted(tree)) for path, tree in sources()}
    assert len(found) > 150
    assert {path: faults for path, faults in found.items() if faults and path != RESTRICTED} == {}
    assert [fault.partition(": ")[2] for fault in found[RESTRICTED]] == ["pickle._Unpickler", "pickle._Unpickler"]


def test_the_walk_sees_what_it_is_there_for():
    faults = """
import pickle
from pickle import loads
torch.load(path)
torch.load(path, weights_only=False)
pickle.load(file)
reader = pickle.Unpickler
dcp.load(state, checkpoint_id=folder)
AutoModel.from_pretrained(folder, trust_remote_code=True)
np.load(file, allow_pickle=True)
"""
    assert len(list(find_unrestricted(ast.parse(faults)))) == 8
