"""The kernels' products are the plain ones of the weights they read.

On a GPU as they are; without one in Triton's interpreter (triton_interpreter).
"""

import pytest
import torch

from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight, quantize_parts
from tests import triton_interpreter
from tests.triton_interpreter import INTERPRETED, need_kernels

pytest.importorskip("triton")

DEVICE = torch.device(triton_interpreter.DEVICE)
# The interpreter multiplies bfloat16 as if it were integers, and rounds to it by cutting.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
HOT_SHAPES = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))  # LLaMA-7B, its parts end to end

TYPES = {
    "x": "*bf16", "out": "*bf16", "codes": "*i8", "packed": "*u8", "absmax": "*fp32", "values": "*fp32", "step": "fp32",
}  # fmt: skip
COMPILED = [
    ("_int8_one_row", dict(width=4096, output_tile=8, width_tile=512), dict(num_warps=4)),
    ("_nf4_one_row", dict(width=4096, output_tile=4, block_tile=16), dict(num_warps=4)),
    ("_dequantize_int8", dict(width_tile=1024), dict(num_warps=4)),
    ("_dequantize_nf4", dict(element_tile=2048), dict(num_warps=4)),
    *(
        (f"_{name}_few_rows", dict(width=4096, row_tile=rows, output_tile=outputs, **tile), dict(num_warps=4, **stages))
        for rows, outputs, blocks in ((16, 16, 4), (16, 32, 4), (32, 32, 2), (64, 64, 2))
        for name, tile, stages in (
            ("int8", dict(width_tile=128), dict(num_stages=4)),
            ("nf4", dict(block_tile=blocks), dict(num_stages=1)),
        )
    ),
]

with_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def kernels(monkeypatch):
    need_kernels(monkeypatch)
    from alpaca.serving.kernels import triton_linear

    return triton_linear


def make_weight(num_outputs: int, width: int, quantization: str) -> Int8Weight | Nf4Weight:
    weight = torch.randn(num_outputs, width, generator=torch.Generator().manual_seed(width)) * 0.05
    return quantize_parts([weight], quantization=quantization, device=DEVICE)


def make_rows(num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows)).to(DEVICE, dtype)


def multiply(kernels, x: torch.Tensor, weight: Int8Weight | Nf4Weight) -> torch.Tensor:
    return (kernels.multiply_int8 if isinstance(weight, Int8Weight) else kernels.multiply_nf4)(x, weight)


def dequantize(kernels, weight: Int8Weight | Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    return (kernels.dequantize_int8 if isinstance(weight, Int8Weight) else kernels.dequantize_nf4)(weight, dtype)


def assert_product(found: torch.Tensor, x: torch.Tensor, weight: Int8Weight | Nf4Weight) -> None:
    expected = x.double() @ weight.dequantize(torch.float32).double().T
    assert found.dtype == x.dtype
    assert (found.double() - expected).abs().max() <= ROUNDING[x.dtype] * expected.abs().max()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "width"), [(48, 64), (33, 320)])
@pytest.mark.fast_rows(4)
def test_products(kernels, num_outputs, width, dtype, quantization):
    weight = make_weight(num_outputs, width, quantization)
    for num_rows in (1, 2, 16, 17, 64):
        x = make_rows(num_rows, width, dtype)
        assert_product(multiply(kernels, x, weight), x, weight)


def test_int8_of_an_odd_width(kernels):
    weight = make_weight(21, 77, "int8")
    for num_rows in (1, 5):
        x = make_rows(num_rows, 77, torch.float16)
        assert_product(kernels.multiply_int8(x, weight), x, weight)


def test_rows_apart_in_memory(kernels):
    x = make_rows(6, 128, torch.float16)[::2, 64:]
    for quantization in ("int8", "nf4"):
        weight = make_weight(16, 64, quantization)
        assert_product(multiply(kernels, x, weight), x, weight)


def test_large_products_do_not_overflow_half_precision(kernels):
    weight = quantize_parts([torch.full((16, 512), 0.5)], quantization="int8", device=DEVICE)
    x = torch.full((2, 512), 100.0, dtype=torch.float16, device=DEVICE)  # 25,600; before the scale 6.5 million
    assert torch.allclose(kernels.multiply_int8(x, weight).float(), torch.tensor(25600.0, device=DEVICE), rtol=1e-3)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_outputs", "width"), [(48, 128), (5, 33), (3, 1376)])
def test_dequantised_bit_for_bit(kernels, num_outputs, width, dtype, quantization):
    weight = make_weight(num_outputs, width, quantization)
    assert torch.equal(dequantize(kernels, weight, dtype), weight.dequantize(dtype))


@with_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize(("num_outputs", "width"), HOT_SHAPES)
def test_hot_shapes(kernels, num_outputs, width, quantization):
    weight = make_weight(num_outputs, width, quantization)
    assert torch.equal(dequantize(kernels, weight, torch.bfloat16), weight.dequantize(torch.bfloat16))
    for num_rows in (1, 4, 16, 40, 64):
        x = make_rows(num_rows, width, torch.bfloat16)
        assert_product(multiply(kernels, x, weight), x, weight)


@with_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layers_on_the_gpu(dtype, quantization):
    from alpaca.serving.kernels.linear import make_linear

    parts = [torch.randn(rows, 256) * 0.05 for rows in (128, 64, 64)]
    layer = make_linear(parts, quantization=quantization, device=DEVICE, dtype=dtype)
    if quantization == "none":
        weight = torch.cat(parts).to(DEVICE, dtype)
    else:
        weight = quantize_parts(parts, quantization=quantization, device=DEVICE).dequantize(torch.float32)
    for num_rows in (1, 3, 64, 65, 200):
        x = make_rows(num_rows, 256, dtype)
        expected = x.double() @ weight.double().T
        assert (layer(x).double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()


@with_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_in_a_cuda_graph(kernels, quantization):
    weight = make_weight(4096, 4096, quantization)
    for num_rows in (1, 8, 64):
        x = make_rows(num_rows, 4096, torch.bfloat16)
        multiply(kernels, x, weight)  # compiled before it is recorded
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = multiply(kernels, x, weight)
        x.copy_(make_rows(num_rows, 4096, torch.bfloat16).flip(0) * 2)
        graph.replay()
        assert_product(out, x, weight)


@with_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_cpu_and_gpu_quantise_alike(quantization):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    on_cpu, on_gpu = (
        quantize_parts([weight], quantization=quantization, device=device).dequantize(torch.float32).cpu()
        for device in (torch.device("cpu"), DEVICE)
    )
    # bitsandbytes rounds some of nf4's scales another way on each; the codes' own error is ten times as large
    assert (on_cpu - on_gpu).abs().max() <= 0.02 * weight.abs().max()


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests above compile them")
@pytest.mark.parametrize(("kernel", "constants", "options"), COMPILED, ids=str)
def test_compiles_for_a_gpu(kernel, constants, options):
    """For Hopper and bfloat16, which the interpreter cannot show: a tile that Triton's passes cannot lay out fails."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from alpaca.serving.kernels import triton_linear as kernels

    function = getattr(kernels, kernel)
    types = {name: TYPES.get(name, "i32") if name not in constants else "constexpr" for name in function.arg_names}
    places = {name: (place,) for place, name in enumerate(function.arg_names)}
    aligned = [name for name in types if types[name].startswith("*") or name in ("num_outputs", "num_elements")]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
