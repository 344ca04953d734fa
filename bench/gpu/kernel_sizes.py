"""What each Triton kernel takes of an H100 at LLaMA-7B's shapes: registers, spills, shared memory. It needs no GPU.

    python -m bench.gpu.kernel_sizes

Every launch that serving and fine-tuning make is made on tensors without memory, and compiled for sm_90 instead of
being run. Programs of one multiprocessor are bounded by what is least: registers (65,536), shared memory (227 KiB) and
threads (2,048). The last line is one JSON object.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import triton
from triton.backends.compiler import GPUTarget

from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight
from alpaca.serving.kernels import triton_linear, triton_low_rank, triton_ops
from alpaca.serving.kernels.low_rank import AdapterRows, LowRankStack
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.training.model.optimizers import triton_adamw
from alpaca.training.model.optimizers.rounding import Update

Row = dict[str, object]

_REGISTERS, _SHARED_BYTES, _THREADS, _MOST_PROGRAMS = 65_536, 227 << 10, 2048, 32
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8",
    torch.uint8: "*u8",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_WIDTH, _FFN, _HEADS, _HEAD_WIDTH, _PAGE, _CONTEXT = 4096, 11_008, 32, 128, 16, 2048
_BF16 = {"dtype": torch.bfloat16, "device": "meta"}


def main() -> None:
    rows = measure_kernels()
    print(describe(rows))
    print(json.dumps({"bench": "kernel_sizes", "target": "sm_90", "triton": triton.__version__, "rows": rows}))


def measure_kernels() -> list[Row]:
    """A row for each kernel and setting."""
    return [row for label, modules, launch in launches() for row in compile_launches(label, modules, launch)]


class Recorder:
    """In place of a kernel: keeps how it would be launched."""

    def __init__(self, kernel: object, calls: list[tuple]) -> None:
        self._kernel, self._calls = kernel, calls

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: self._calls.append((self._kernel, grid, args, options))


def compile_launches(label: str, modules: list[ModuleType], launch: Callable[[], object]) -> Iterator[Row]:
    """Make the launches of one call, and compile each."""
    calls: list[tuple] = []
    kernels = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if isinstance(kernel, triton.runtime.JITFunction)
    ]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel, calls))
    try:
        launch()
    finally:  # before anything is compiled: kernels call others by their names in the module
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
    for kernel, grid, args, options in calls:
        yield {"setting": label, **resources(kernel, args, options), "programs": list(grid)}


def resources(kernel: object, args: tuple, options: dict[str, object]) -> Row:
    """Compile one launch for sm_90 and read what ptxas gave it."""
    names = kernel.arg_names
    chosen = {name: options[name] for name in _OPTIONS if name in options}
    constants = {name: value for name, value in options.items() if name not in _OPTIONS}
    given = dict(zip(names, args, strict=False))
    is_constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants |= {name: value for name, value in given.items() if name in is_constant}
    given = {name: value for name, value in given.items() if name not in is_constant}
    source = triton.compiler.ASTSource(
        kernel,
        {name: _kind(value) for name, value in given.items()} | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in given if _is_aligned(given[name])},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=chosen)
    registers, spilled = read_usage(compiled.asm["cubin"])
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    return {
        "kernel": kernel.__name__, "num_warps": num_warps, "num_stages": compiled.metadata.num_stages,
        "registers": registers, "spilled_bytes": spilled, "shared_bytes": shared,
        "programs_per_multiprocessor": programs_per_multiprocessor(registers, shared, num_warps),
        "constants": {name: value for name, value in constants.items() if isinstance(value, (int, bool))},
    }  # fmt: skip


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_aligned(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory a thread, where spilled registers go; by NVIDIA's cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    stack, registers = (int(re.search(rf"{word}:(\d+)", done.stdout)[1]) for word in ("STACK", "REG"))
    return registers, stack


def programs_per_multiprocessor(registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs fit one multiprocessor at once; registers are given to warps by 256, shared memory by 1 KiB."""
    by_registers = _REGISTERS // (-(-registers * 32 // 256) * 256 * num_warps)
    by_shared = _SHARED_BYTES // (shared_bytes + 1024)
    return min(by_registers, by_shared, _THREADS // (32 * num_warps), _MOST_PROGRAMS)


# The launches


def launches() -> Iterator[tuple[str, list[ModuleType], Callable[[], object]]]:
    """Setting, the modules whose kernels take part, and the call that launches them."""
    ops = [triton_ops]
    x, weight = torch.empty(32, _WIDTH, **_BF16), torch.empty(_WIDTH, **_BF16)
    yield "norm", ops, lambda: triton_ops.rms_norm(x, weight, 1e-6)
    yield "add and norm", ops, lambda: triton_ops.add_rms_norm(x, x, weight, 1e-6)
    yield "silu", ops, lambda: triton_ops.silu_mul(torch.empty(32, 2 * _FFN, **_BF16))
    yield "rotate and store", ops, _rotate
    for name, count, length, num_new in (
        ("decode 1", 1, _CONTEXT, 1), ("decode 32", 32, _CONTEXT, 1), ("prefill 1024", 1, 1024, 1024),
    ):  # fmt: skip
        yield name, ops, lambda count=count, length=length, num_new=num_new: _attend(count, length, num_new)
    for num_rows in (1, 8, 32, 64):
        for outputs, width in ((3 * _WIDTH, _WIDTH), (_WIDTH, _FFN)):
            label = f"{num_rows} rows, {outputs} x {width}"
            yield label, [triton_linear], lambda n=num_rows, o=outputs, i=width: _multiply(n, o, i)
    yield "dequantise", [triton_linear], _dequantize
    for num_rows in (1, 128):
        yield f"adapter, {num_rows} rows", [triton_low_rank], lambda n=num_rows: _adapt(n)
    yield "AdamW", [triton_adamw], _optimize


def _rotate() -> None:
    caches = torch.empty(2, 8, _PAGE, _HEADS, _HEAD_WIDTH, **_BF16)
    table = torch.empty(_CONTEXT, _HEAD_WIDTH, device="meta")
    places = torch.empty(32, dtype=torch.int64, device="meta")
    triton_ops.rotate_and_store(torch.empty(32, 3 * _WIDTH, **_BF16), table, places, places, *caches)


def _attend(count: int, length: int, num_new: int) -> None:
    numbers = {"dtype": torch.int32, "device": "meta"}
    batch = AttentionBatch(
        torch.empty(count, _CONTEXT // _PAGE, **numbers), torch.empty(count, **numbers),
        torch.empty(count + 1, **numbers), num_new, length,
    )  # fmt: skip
    caches = torch.empty(2, 8, _PAGE, _HEADS, _HEAD_WIDTH, **_BF16)
    q = torch.empty(count * num_new, _HEADS, _HEAD_WIDTH, **_BF16)
    triton_ops.paged_attention(q, *caches, batch, _HEAD_WIDTH**-0.5)


def _weights(outputs: int, width: int) -> tuple[Int8Weight, Nf4Weight]:
    int8 = Int8Weight.empty(outputs, width, torch.device("meta"))
    return int8, Nf4Weight.empty(outputs, width, torch.device("meta"))


def _multiply(num_rows: int, outputs: int, width: int) -> None:
    int8, nf4 = _weights(outputs, width)
    x = torch.empty(num_rows, width, **_BF16)
    triton_linear.multiply_int8(x, int8)
    triton_linear.multiply_nf4(x, nf4)


def _dequantize() -> None:
    int8, nf4 = _weights(_WIDTH, _FFN)
    triton_linear.dequantize_int8(int8, torch.bfloat16)
    triton_linear.dequantize_nf4(nf4, torch.bfloat16)


def _adapt(num_rows: int, *, rank: int = 8) -> None:
    a, b = torch.empty(1, 3 * rank, _WIDTH, **_BF16), torch.empty(1, 3 * _WIDTH, rank, **_BF16)
    stack = LowRankStack(a, b, [(part * _WIDTH, _WIDTH) for part in range(3)])
    rows = AdapterRows(torch.empty(num_rows, dtype=torch.int32, device="meta"))
    y, x = torch.empty(num_rows, 3 * _WIDTH, **_BF16), torch.empty(num_rows, _WIDTH, **_BF16)
    triton_low_rank.add_low_rank(y, x, stack, rows)


def _optimize() -> None:
    update = Update(
        decay=1.0, first_share=0.1, second_kept=0.9, second_share=0.1, step_size=1e-4, root_scale=1.0, eps=1e-8,
        first_element=0, keys=(1, 2),
    )  # fmt: skip
    parameter = torch.empty(_WIDTH * _WIDTH, **_BF16)
    triton_adamw.update_parameter(parameter, parameter, parameter, parameter, update)


def describe(rows: list[Row]) -> str:
    """A table for people."""
    heads = ("warps", "registers", "spilled B", "shared B", "programs/SM")
    lines = [f"{'setting':30}{'kernel':28}" + "".join(f"{head:>12}" for head in heads)]
    names = ("num_warps", "registers", "spilled_bytes", "shared_bytes", "programs_per_multiprocessor")
    for row in rows:
        lines.append(f"{row['setting']:30}{row['kernel']:28}" + "".join(f"{row[name]:>12}" for name in names))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
