"""The list of planted faults: its texts are there, and each named test sees its fault (slow).

Each fault is planted in a copy of the tree, one process each, two at a time.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.mutations import MUTATIONS, Mutation

COPIED = ("alpaca", "bench", "convert", "deploy", "script", "tests", "web", "predict.py", "train.py", "pyproject.toml")
NUM_AT_ONCE = 2
MOST_S = 300  # for one test, which takes a few seconds
TESTS_FAILED = 1  # pytest's exit status; an error before a test could run has another


def test_the_old_texts_occur_once():
    """The list follows the code: a fault that cannot be planted is no test."""
    for mutation in MUTATIONS:
        count = (ROOT / mutation.path).read_text().count(mutation.old)
        assert count == 1, (
            f"tests/mutations.py: {mutation.path} has {mutation.old!r} {count} times, not once; "
            "plant the fault in the line that replaced it"
        )
        assert mutation.new != mutation.old
        assert (ROOT / mutation.killed_by.partition("::")[0]).is_file(), mutation.killed_by


def plant(mutation: Mutation, tree: Path) -> None:
    """Copy the product and its tests into `tree` and put the fault into its file."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tree / name)
    path = tree / mutation.path
    path.write_text(path.read_text().replace(mutation.old, mutation.new))


def run_tests(names: list[str], tree: Path) -> subprocess.CompletedProcess[str]:
    """Run tests in a tree, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line", *names]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=MOST_S, check=False)


def find_survival(mutation: Mutation, tree: Path) -> str | None:
    """None where the named test fails on an assertion or an error in its own run; else what happened."""
    tree.mkdir()
    plant(mutation, tree)
    done = run_tests([mutation.killed_by], tree)
    shutil.rmtree(tree)
    if done.returncode == TESTS_FAILED and "ImportError" not in done.stdout:
        return None
    fault = f"{mutation.path}: {mutation.new!r} for {mutation.old!r}"
    return f"{fault} is not seen by {mutation.killed_by}:\n{done.stdout[-2000:]}"


@pytest.mark.slow
def test_the_named_tests_pass_without_a_fault():
    names = sorted({mutation.killed_by for mutation in MUTATIONS})
    done = run_tests(names, ROOT)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_each_fault_is_seen(tmp_path):
    trees = [tmp_path / str(number) for number in range(len(MUTATIONS))]
    with ThreadPoolExecutor(NUM_AT_ONCE) as executor:
        found = list(executor.map(find_survival, MUTATIONS, trees))
    survivors = [text for text in found if text is not None]
    assert not survivors, "\n\n".join(survivors)
