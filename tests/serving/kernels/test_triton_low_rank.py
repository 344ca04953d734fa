"""The kernels add what their twin in `low_rank` adds, whatever mixture of adapters the rows have.

On a GPU as they are; without one in Triton's interpreter (triton_interpreter).
"""

import pytest
import torch

from alpaca.serving.kernels.low_rank import AdapterRows, LowRankStack
from alpaca.serving.kernels.low_rank import add_low_rank as add_by_twin
from tests.triton_interpreter import DEVICE, INTERPRETED, need_kernels

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# (input width, outputs of the layer, parts that adapters change, rank)
LAYERS = {
    "qkv": (96, 160, ((0, 96), (96, 32), (128, 32)), 8),
    "q and v": (96, 160, ((0, 96), (128, 32)), 3),
    "gate": (48, 200, ((0, 100),), 5),
    "wide": (1100, 70, ((0, 70),), 20),
    "large rank": (64, 64, ((0, 64),), 80),
}
SLOTS = {
    "one row": [2],
    "none": [0, 0, 0],
    "all one": [1] * 5,
    "mixed": [3, 0, 1, 1, 2, 0, 3],
    "many sorted": [0] * 20 + [1] * 33 + [2] * 5 + [3] * 12,
    "many mixed": [row % 4 for row in range(67)],
}

with_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def kernels(monkeypatch):
    need_kernels(monkeypatch)
    from alpaca.serving.kernels import triton_low_rank

    return triton_low_rank


def make_stack(layer: str, *, has_factors: bool = False, num_adapters: int = 3) -> LowRankStack:
    width, _, parts, rank = LAYERS[layer]
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(num_adapters, len(parts) * rank, width, generator=generator) * width**-0.5
    b = torch.randn(num_adapters, sum(outputs for _, outputs in parts), rank, generator=generator)
    factors = torch.rand(b.shape[:2], generator=generator) + 0.5 if has_factors else None
    return LowRankStack(a, b, parts, factors)


def moved(stack: LowRankStack, dtype: torch.dtype, device: str = DEVICE) -> LowRankStack:
    factors = None if stack.factors is None else stack.factors.to(device, dtype)
    return LowRankStack(stack.a.to(device, dtype), stack.b.to(device, dtype), stack.parts, factors)


def make_rows(layer: str, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    width, num_outputs = LAYERS[layer][:2]
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, width, generator=generator), torch.randn(num_rows, num_outputs, generator=generator)


def rows_of(indices: list[int]) -> AdapterRows:
    return AdapterRows(torch.tensor(indices, dtype=torch.int32, device=DEVICE))


def check(kernels, layer: str, indices: list[int], dtype: torch.dtype, *, has_factors: bool = False) -> None:
    x, y = (tensor.to(DEVICE, dtype) for tensor in make_rows(layer, len(indices)))
    stack = moved(make_stack(layer, has_factors=has_factors), dtype)
    expected = naive(y, x, stack, indices)
    found = kernels.add_low_rank(y, x, stack, rows_of(indices))
    assert found is y
    assert (found.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


def naive(y: torch.Tensor, x: torch.Tensor, stack: LowRankStack, indices: list[int]) -> torch.Tensor:
    """Row by row and part by part, as the formula reads, in float64."""
    out = y.double().clone()
    for row, index in enumerate(indices):
        first = 0
        for part, (start, width) in enumerate(stack.parts if index else ()):
            a = stack.a[index - 1, part * stack.rank : (part + 1) * stack.rank].double()
            b = stack.b[index - 1, first : first + width].double()
            out[row, start : start + width] += b @ (a @ x[row].double())
            if stack.factors is not None:
                out[row, start : start + width] *= stack.factors[index - 1, first : first + width].double()
            first += width
    return out


@pytest.mark.parametrize("indices", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("has_factors", [False, True], ids=["LoRA", "DoRA"])
def test_the_twin_is_the_formula(layer, indices, has_factors):
    x, y = (tensor.double() for tensor in make_rows(layer, len(indices)))
    stack = moved(make_stack(layer, has_factors=has_factors), torch.float64, "cpu")
    expected = naive(y, x, stack, indices)
    rows = AdapterRows(torch.tensor(indices, dtype=torch.int32))
    torch.testing.assert_close(add_by_twin(y, x, stack, rows), expected, rtol=1e-12, atol=1e-12)


def test_the_twin_keeps_what_another_adapter_makes_of_a_row_out_of_it():
    x, y = (tensor.double() for tensor in make_rows("qkv", 4))
    stack = moved(make_stack("qkv", has_factors=False), torch.float64, "cpu")
    assert stack.joined, "adapters few enough to be computed at once"
    indices = [1, 2, 0, 1]
    expected = naive(y, x, stack, indices)
    stack.a[1] = torch.inf  # of the second adapter, whose rows alone are lost by it
    found = add_by_twin(y.clone(), x, stack, AdapterRows(torch.tensor(indices, dtype=torch.int32)))
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-12, atol=1e-12)
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("indices", SLOTS.values(), ids=SLOTS)
@pytest.mark.fast_rows(2)
def test_any_mixture(kernels, indices):
    check(kernels, "qkv", indices, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("indices", ["mixed", "many sorted"])
@pytest.mark.fast_rows(1)
def test_narrow_types(kernels, indices, dtype):
    check(kernels, "gate", SLOTS[indices], dtype)


@pytest.mark.parametrize("indices", ["mixed", "many mixed"])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "qkv"])
@pytest.mark.fast_rows(2)
def test_any_layer(kernels, layer, indices):
    check(kernels, layer, SLOTS[indices], torch.float32)


@pytest.mark.parametrize("indices", ["mixed", "many mixed"])
@pytest.mark.fast_rows(1)
def test_dora(kernels, indices):
    check(kernels, "q and v", SLOTS[indices], torch.float32, has_factors=True)


def test_rows_without_an_adapter_are_not_touched(kernels):
    x, y = (tensor.to(DEVICE) for tensor in make_rows("qkv", 3))
    y[1], x[1] = torch.nan, torch.nan
    before = y.clone()
    kernels.add_low_rank(y, x, moved(make_stack("qkv", has_factors=True), torch.float32), rows_of([1, 0, 2]))
    assert torch.equal(y[1].isnan(), before[1].isnan())
    assert y[[0, 2]].isfinite().all()


@with_gpu
@pytest.mark.gpu
def test_in_a_cuda_graph(kernels):
    """Slots are read at each replay; without an adapter nothing changes."""
    x, y = (tensor.to(DEVICE) for tensor in make_rows("qkv", 7))
    stack, rows = moved(make_stack("qkv"), torch.float32), rows_of(SLOTS["mixed"])
    kernels.add_low_rank(y.clone(), x, stack, rows)
    torch.cuda.synchronize()
    out = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.add_low_rank(out.copy_(y), x, stack, rows)
    for indices in (SLOTS["mixed"], [0] * 7, [1, 1, 1, 2, 2, 3, 0]):
        rows.adapter_indices.copy_(torch.tensor(indices, dtype=torch.int32))
        graph.replay()
        expected = naive(y, x, stack, indices)
        assert (out.double() - expected).abs().max() <= 3e-6 * expected.abs().max()


class Launches:
    """Stands for a kernel: notes what it is launched with."""

    def __init__(self, kernel) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        return lambda *args, num_warps, **constants: self.calls.append((grid, args, num_warps, constants))


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests above compile them")
@pytest.mark.parametrize("rank", [8, 128])
@pytest.mark.parametrize("num_rows", [8, 1100], ids=["few", "many"])
def test_compiles_for_a_gpu(monkeypatch, num_rows, rank):
    """For Hopper and bfloat16, LLaMA-7B's qkv: a tile that Triton's passes cannot lay out fails."""
    from alpaca.serving.kernels import triton_low_rank as kernels

    launches = {name: Launches(getattr(kernels, name)) for name in ("_shrink_kernel", "_expand_kernel")}
    for name, launch in launches.items():
        monkeypatch.setattr(kernels, name, launch)
    meta = dict(device="meta", dtype=torch.bfloat16)
    parts = tuple((part * 4096, 4096) for part in range(3))
    stack = LowRankStack(
        torch.empty(2, 3 * rank, 4096, **meta), torch.empty(2, 12288, rank, **meta), parts,
        torch.empty(2, 12288, **meta),
    )  # fmt: skip
    rows = AdapterRows(torch.empty(num_rows, dtype=torch.int32, device="meta"))
    kernels.add_low_rank(torch.empty(num_rows, 12288, **meta), torch.empty(num_rows, 4096, **meta), stack, rows)
    for launch in launches.values():
        ((_, args, num_warps, constants),) = launch.calls
        compile_for_hopper(launch.kernel, args, num_warps, constants)


def compile_for_hopper(kernel, args: tuple, num_warps: int, constants: dict) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    given = dict(zip(kernel.arg_names, args, strict=False))
    assert {*given, *constants} == set(kernel.arg_names)
    types = {name: kinds[arg.dtype] if isinstance(arg, torch.Tensor) else "i32" for name, arg in given.items()}
    aligned = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) or arg % 16 == 0]
    source = triton.compiler.ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=num_warps))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 227 * 1024
