"""The tests of Triton kernels, where there is no GPU: in the interpreter, all in one process, which must choose it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.triton_interpreter import DEVICE, INTERPRETED, TESTS

pytest.importorskip("triton")


@pytest.mark.may_cost(300)
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels' tests run in this process")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_in_the_interpreter(which):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    twins_alone = "test_the_twin"  # they have no kernel in them, and are run as all others are
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-m", which, "-k", f"not {twins_alone}", *TESTS]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_every_test_that_needs_kernels_is_run_in_the_interpreter():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
             if "need_kernels(monkeypatch)" in path.read_text()}  # fmt: skip
    files.discard("tests/test_triton_interpreter.py")
    assert files == {name.partition("::")[0] for name in TESTS}
