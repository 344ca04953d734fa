"""Kernels at LLaMA-7B's shapes fit an H100's multiprocessor, as far as a compiler without a GPU can tell."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from alpaca.serving.kernels import triton_ops
from bench.gpu import kernel_cache, kernel_sizes
from bench.gpu.builds import BuildLog
from bench.gpu.kernel_sizes import compile_launches, measure_kernels, programs_per_multiprocessor


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_programs_by_hand():
    assert programs_per_multiprocessor(128, 0, 4) == 4  # 65,536 / (128 * 128 threads)
    assert programs_per_multiprocessor(121, 0, 4) == 4  # by steps of 256 registers a warp: as 128
    assert programs_per_multiprocessor(32, 100 << 10, 4) == 2
    assert programs_per_multiprocessor(16, 0, 8) == 8  # 2,048 threads
    assert programs_per_multiprocessor(16, 0, 1) == 32


def test_launches_are_compiled_and_the_kernels_put_back():
    before = triton_ops._rms_norm_kernel
    x, weight = torch.empty(32, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(4096, device="meta")
    (row,) = compile_launches("norm", [triton_ops], lambda: triton_ops.rms_norm(x, weight, 1e-6))
    assert triton_ops._rms_norm_kernel is before
    assert (row["setting"], row["kernel"], row["num_warps"]) == ("norm", "_rms_norm_kernel", 8)
    assert row["programs"] == [32]
    assert row["constants"] == {"width": 4096, "block": 4096, "adds_residual": False}
    assert 0 < row["registers"] < 256


@pytest.mark.slow
def test_no_kernel_spills_at_7bs_shapes():
    rows = measure_kernels()
    assert {row["kernel"] for row in rows} >= {
        "_attention_kernel", "_combine_kernel", "_int8_one_row", "_nf4_one_row", "_int8_few_rows", "_nf4_few_rows",
        "_shrink_kernel", "_expand_kernel", "_adamw_kernel",
    }  # fmt: skip
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert max(row["shared_bytes"] for row in rows) <= 227 << 10
    assert "_adamw_kernel" in kernel_sizes.describe(rows)


def test_kernels_that_have_moved_with_their_cache_are_found_again(tmp_path, monkeypatch):
    """What the kit carries from machine to machine, with Triton's own compiler and cache."""
    from triton import knobs

    monkeypatch.setattr(knobs.compilation, "listener", None)
    x, weight = torch.empty(4, 512, dtype=torch.bfloat16, device="meta"), torch.empty(512, device="meta")
    there, here = tmp_path / "there" / "kernels", tmp_path / "here" / "kernels"

    def build(folder: Path) -> list[dict[str, object]]:
        monkeypatch.setenv("TRITON_CACHE_DIR", kernel_cache.environment(folder)["TRITON_CACHE_DIR"])
        log = BuildLog()
        list(compile_launches("norm", [triton_ops], lambda: triton_ops.rms_norm(x, weight, 1e-6)))
        return [row for _, row in log.rows([triton_ops])]

    (built,) = build(there)
    assert (built["kernel"], built["from_cache"], built["num_warps"]) == ("_rms_norm_kernel", False, 1)
    assert built["build_s"] > 0
    assert built["constants"] == {"width": 512, "block": 512, "adds_residual": False}
    kernel_cache.pack(there, tmp_path, {"device": "H100"})
    kernel_cache.unpack(tmp_path, here, {"device": "H100"})
    shutil.rmtree(there)
    (found,) = build(here)
    assert found["from_cache"] is True
