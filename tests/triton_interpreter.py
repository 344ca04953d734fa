"""Triton's interpreter, in which the kernels run where there is no GPU.

It is chosen when Triton is imported, for a whole process. So test_triton_interpreter.py runs the files of `TESTS` in
one process that has chosen it, and in any other their tests of kernels are skipped where there is no GPU. To run one
of them alone: TRITON_INTERPRET=1 .venv/bin/python -m pytest FILE
"""

import os
from types import FunctionType

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TESTS = (
    "tests/serving/kernels/test_triton_linear.py",
    "tests/serving/kernels/test_triton_low_rank.py",
    "tests/serving/kernels/test_triton_ops.py",
    "tests/serving/llama/test_gpu_path.py",
    "tests/training/model/optimizers/test_optimizer.py::test_the_kernel_writes_the_twins_bits",
)


def need_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process fit to run kernels, or skip the test that asks."""
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("run by tests/test_triton_interpreter.py, in a process of its own")
    if INTERPRETED:
        _let_numbers_be_indices(monkeypatch)
        _patch_the_language_once(monkeypatch)


def _let_numbers_be_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter holds a number as an array of one element, and NumPy 2.4 makes no int of that."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


class _Kept:
    """Stands for what the interpreter replaced in the language, which stays replaced."""

    def restore(self) -> None:
        pass


def _patch_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter looks through Triton's whole language at each launch, and at each call of a kernel's function.

    That took a quarter of the time. Nothing but kernels uses the language in such a process: once a module is enough.
    """
    from triton.runtime import interpreter

    patch_language, patched = interpreter._patch_lang, set()

    def patch(function: FunctionType) -> _Kept:
        if function.__module__ not in patched:
            patch_language(function)
            patched.add(function.__module__)
        return _Kept()

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
