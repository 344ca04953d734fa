"""The list of planted faults: its texts are there, and each named test sees its fault (slow).

Each fault is planted in a copy of the tree of its own, never in the checkout. `run_planted.py` runs the tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.mutations import MUTATIONS, Mutation

COPIED = ("alpaca", "bench", "convert", "deploy", "script", "tests", "web", "predict.py", "train.py", "pyproject.toml")
MOST_S = 1800  # for all of them, which take a few minutes
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # two run at once
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # pytest warns of plugins that were imported before it ran
    "TRITON_INTERPRET": "1",  # so that kernels are compared with their twins where there is no GPU
}
PASSED, FAILED = 0, 1  # pytest's exit statuses; others say that the test could not be run
NOT_SEEN_BY_A_TEST = ("ImportError", "ModuleNotFoundError", "SyntaxError", "error at setup")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.path}: {mutation.old}")
def test_the_old_text_occurs_once(mutation: Mutation):
    """The list follows the code: a fault that cannot be planted is no test."""
    count = (ROOT / mutation.path).read_text().count(mutation.old)
    assert count == 1, (
        f"tests/mutations.py: {mutation.path} has {mutation.old!r} {count} times, expected once; "
        "plant the fault in the line that replaced it"
    )
    assert mutation.new != mutation.old
    assert (ROOT / mutation.killed_by.partition("::")[0]).is_file(), f"no file for {mutation.killed_by}"


def copy_tree(tree: Path) -> Path:
    """The product and its tests, in a new folder."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def plant(mutation: Mutation, tree: Path) -> Path:
    """Copy the tree and put the fault into its file."""
    path = copy_tree(tree) / mutation.path
    path.write_text(path.read_text().replace(mutation.old, mutation.new))
    return tree


def run_planted(pairs: list[tuple[Path, str]]) -> dict[Path, dict[str, object]]:
    """Run each test in its tree; what came of it by tree: status, seconds, output."""
    command = [sys.executable, str(ROOT / "tests" / "run_planted.py"), *(str(part) for pair in pairs for part in pair)]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=MOST_S, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {Path(result["tree"]): result for result in results}


@pytest.mark.slow
def test_the_named_tests_pass_without_a_fault(tmp_path: Path):
    tree = copy_tree(tmp_path / "tree")
    names = sorted({mutation.killed_by for mutation in MUTATIONS})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *names]
    done = subprocess.run(
        command, cwd=tree, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=MOST_S, check=False
    )
    assert done.returncode == PASSED, done.stdout[-4000:]


@pytest.mark.slow
def test_each_fault_is_seen(tmp_path: Path):
    trees = {plant(mutation, tmp_path / str(number)): mutation for number, mutation in enumerate(MUTATIONS)}
    results = run_planted([(tree, mutation.killed_by) for tree, mutation in trees.items()])
    assert results.keys() == trees.keys()
    for tree, mutation in trees.items():
        print(f"{results[tree]['seconds']:6.1f} s  {mutation.path}: {mutation.new!r}  {mutation.killed_by}")
    survivors = [say_survival(mutation, results[tree]) for tree, mutation in trees.items()]
    assert not any(survivors), "\n\n".join(filter(None, survivors))


def say_survival(mutation: Mutation, result: dict[str, object]) -> str:
    """ "" where the test ran and failed, else what happened instead."""
    output = str(result["output"])
    if result["status"] == FAILED and not any(text in output for text in NOT_SEEN_BY_A_TEST):
        return ""
    fault = f"{mutation.path}: {mutation.new!r} for {mutation.old!r}"
    return f"{fault} is not seen by {mutation.killed_by} (status {result['status']}):\n{output[-2000:]}"


@pytest.mark.parametrize(
    ("status", "output", "is_seen"),
    [
        (FAILED, "E   assert 1 == 2", True),
        (PASSED, "1 passed", False),
        (FAILED, "E   ImportError: cannot import name 'x'", False),
        (2, "Interrupted: 1 error during collection", False),
        (4, "no tests ran", False),
        (-9, "", False),
    ],
)
def test_only_a_test_that_ran_and_failed_has_seen_a_fault(status: int, output: str, is_seen: bool):
    said = say_survival(MUTATIONS[0], {"status": status, "output": output})
    assert (said == "") == is_seen
    assert is_seen or MUTATIONS[0].killed_by in said


def test_a_fault_is_planted_in_the_copy_alone(tmp_path: Path):
    mutation = MUTATIONS[0]
    before = (ROOT / mutation.path).read_text()
    planted = (plant(mutation, tmp_path / "tree") / mutation.path).read_text()
    assert planted == before.replace(mutation.old, mutation.new) != before
    assert (ROOT / mutation.path).read_text() == before
