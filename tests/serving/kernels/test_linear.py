"""Every kind of linear layer gives the plain product of the weight it stands for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alpaca.errors import InputError
from alpaca.formats.hf.quantization import quantize_parts
from alpaca.serving.kernels import cpu_linear, linear
from alpaca.serving.kernels.cpu_linear import NativeLinear, PackedLinear
from alpaca.serving.kernels.linear import (
    Int8Linear,
    Nf4Linear,
    SideBySide,
    lay_end_to_end,
    make_linear,
)
from alpaca.serving.kernels.linear_base import Linear, PlainLinear
from alpaca.serving.kernels.native import library as native

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMS_ROWS = (0, 1, 2, 3, 7, 16, 33, 70)
SHAPES = (((64, 32, 32), 64), ((17, 48), 96), ((5, 3), 80), ((1,), 33), ((130,), 1376))  # rows of the parts, width
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def make_parts(nums_rows: tuple[int, ...], width: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(nums_rows))
    return [(torch.randn(rows, width, generator=generator) * 0.05).to(dtype) for rows in nums_rows]


def stood_for(parts: list[torch.Tensor], quantization: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, I] that a layer of `parts` multiplies with, in float64."""
    if quantization == "none":
        return torch.cat(parts).to(dtype).double()
    alone = [quantize_parts([part], quantization=quantization, device=CPU) for part in parts]
    return torch.cat([weight.dequantize(torch.float32) for weight in alone]).double()


def make(parts: list[torch.Tensor], quantization: str, dtype: torch.dtype) -> Linear:
    return make_linear(parts, quantization=quantization, device=CPU, dtype=dtype)


def assert_product(layer: Linear, weight: torch.Tensor, x: torch.Tensor) -> None:
    found, expected = layer(x), x.double() @ weight.T
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    if expected.numel():  # rounding follows what is added up, not the sum, in which it may cancel
        added_up = x.double().abs() @ weight.abs().T
        assert ((found.double() - expected).abs() <= ROUNDING[x.dtype] * added_up).all()


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("nums_rows", "width"), SHAPES, ids=str)
def test_product_of_the_weight_stood_for(nums_rows, width, dtype, quantization):
    parts = make_parts(nums_rows, width)
    layer, weight = make(parts, quantization, dtype), stood_for(parts, quantization, dtype)
    assert (layer.out_features, layer.in_features) == weight.shape
    for num_rows in NUMS_ROWS:
        assert_product(layer, weight, torch.randn(num_rows, width).to(dtype))


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_of_the_input(dtype, quantization):
    parts = make_parts((64, 32), 64)
    layer, weight = make(parts, quantization, dtype), stood_for(parts, quantization, dtype)
    wide = torch.randn(3, 129).to(dtype)
    for x in (wide[:, ::2][:, :64], wide[:, 1:65], wide[:1, 1:65], wide.T[:64, :].T, wide.view(-1)[3:67].view(1, 64)):
        assert_product(layer, weight, x)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_blocks_of_rows_do_not_show(monkeypatch, quantization):
    parts = make_parts((44, 40), 80)
    whole, x = make(parts, quantization, torch.float32), torch.randn(5, 80)
    expected = whole(x)
    monkeypatch.setitem(linear._BLOCK_ELEMENTS, "cpu", 700)  # 8 rows; nf4 blocks end after every 4
    assert torch.allclose(whole(x), expected, atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_parts_end_to_end_are_parts_side_by_side(quantization):
    parts, x = make_parts((64, 16, 16), 64), torch.randn(4, 64, dtype=torch.float64)
    together = make(parts, quantization, torch.float64)
    alone = [make([part], quantization, torch.float64)(x) for part in parts]
    assert torch.allclose(together(x), torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)


def test_nf4_parts_that_share_a_block_stay_apart():
    parts = make_parts((5, 3), 80)
    assert isinstance(make(parts, "nf4", torch.float32), SideBySide)
    assert isinstance(make(parts[:1], "nf4", torch.float32), Nf4Linear)
    assert isinstance(make(make_parts((4, 3), 80), "nf4", torch.float32), Nf4Linear)


needs_native = pytest.mark.skipif(native.load() is None, reason="our C++ kernels are not built here")


@pytest.fixture
def no_native(monkeypatch):
    """As where there is no C++ compiler."""
    for module in (cpu_linear, linear):
        monkeypatch.setattr(module, "load" if module is cpu_linear else "load_native", lambda: None)
    cpu_linear._choose.cache_clear()
    yield
    cpu_linear._choose.cache_clear()


@needs_native
def test_kinds_and_their_bytes():
    parts = make_parts((64, 32), 64)
    for quantization, dtype, kind, num_bytes in (
        ("none", torch.float64, PlainLinear, 96 * 64 * 8),
        ("none", torch.float32, NativeLinear, 96 * 64 * 4),
        ("int8", torch.float32, NativeLinear, 96 * 64 + 96 * 4),
        ("int8", torch.bfloat16, Int8Linear, 96 * 64 + 96 * 4),
        ("nf4", torch.bfloat16, Nf4Linear, 96 * 64 // 2 + 96 * 4),
    ):
        layer = make(parts, quantization, dtype)
        assert isinstance(layer, kind)
        assert layer.num_bytes == num_bytes


def refuse(*args: object) -> torch.Tensor:
    raise RuntimeError("not on this CPU")


def give_nothing(x: torch.Tensor, *args: object) -> torch.Tensor:
    return x.new_zeros(x.shape[0], 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", ["missing", "refusing", "wrong"])
def test_without_packing_the_layer_is_plain(monkeypatch, no_native, broken, dtype):
    class Operators:
        _reorder_linear_weight = staticmethod(refuse if broken == "refusing" else torch.Tensor.clone)
        _linear_pointwise = staticmethod(give_nothing)

    monkeypatch.setattr(torch.ops, "mkldnn", object() if broken == "missing" else Operators)
    parts = make_parts((24, 16), 64)
    layer = make(parts, "none", dtype)
    assert isinstance(layer, PlainLinear)
    assert_product(layer, stood_for(parts, "none", dtype), torch.randn(3, 64).to(dtype))


@pytest.mark.parametrize("broken", ["missing", "refusing", "wrong"])
def test_without_fused_int8_blocks_are_dequantised(monkeypatch, broken):
    if broken == "missing":
        monkeypatch.delattr(torch, "_weight_int8pack_mm")
    else:
        monkeypatch.setattr(torch, "_weight_int8pack_mm", refuse if broken == "refusing" else give_nothing)
    parts = make_parts((24, 16), 64)
    layer = make(parts, "int8", torch.bfloat16)
    assert not layer._is_fused
    assert_product(layer, stood_for(parts, "int8", torch.bfloat16), torch.randn(3, 64).bfloat16())


def test_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for quantization in ("none", "int8", "nf4"):
        make(make_parts((32,), 64), quantization, torch.float32)
    assert torch.equal(torch.rand(1), expected)


def test_parts_of_a_file_are_read_one_by_one(tmp_path: Path):
    parts = make_parts((64, 32), 64, torch.float16)
    save_file({str(i): part for i, part in enumerate(parts)}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        layer = make([file.get_tensor("0"), file.get_tensor("1")], "none", torch.float32)
    assert_product(layer, torch.cat(parts).double(), torch.randn(3, 64))


def test_a_single_finished_part_is_not_copied():
    weight = torch.randn(8, 4, dtype=torch.float64)
    assert make([weight], "none", torch.float64).weight.data_ptr() == weight.data_ptr()
    assert lay_end_to_end([weight, weight], device=CPU, dtype=torch.float64).shape == (16, 4)


@needs_native
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
def test_a_cpu_holds_weights_as_they_are_stored(stored):
    """And multiplies them as float32, which has all their values: the same bits as of the wide weight."""
    parts = make_parts((64, 33), 96, stored)
    held, wide = make(parts, "none", torch.float32), make([part.float() for part in parts], "none", torch.float32)
    assert (held.num_bytes, wide.num_bytes) == (97 * 96 * 2, 97 * 96 * 4)
    for num_rows in NUMS_ROWS:
        x = torch.randn(num_rows, 96)
        assert torch.equal(held(x), wide(x))
    mixed = make([parts[0], parts[1].float()], "none", torch.float32)
    assert mixed.num_bytes == 97 * 96 * 4


@needs_native
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_row_comes_to_the_same_bits_whatever_is_beside_it(quantization):
    layer = make(make_parts((70, 30), 1376), quantization, torch.float32)
    assert isinstance(layer, NativeLinear)
    x = torch.randn(250, 1376)
    together = layer(x)
    for num_rows in (*range(1, 26), 119, 120, 121, 241):
        assert torch.equal(layer(x[:num_rows]), together[:num_rows]), num_rows
        assert torch.equal(layer(x[-num_rows:]), together[-num_rows:]), num_rows


@pytest.mark.parametrize("faster", ["ours", "theirs"])
def test_the_faster_kernel_is_taken(monkeypatch, faster):
    def seconds(layer: Linear, x: torch.Tensor) -> float:
        return 1.0 if isinstance(layer, NativeLinear) == (faster == "ours") else 3.0

    if native.load() is None:
        pytest.skip("our C++ kernels are not built here")
    monkeypatch.setattr(cpu_linear, "_seconds", seconds)
    cpu_linear._choose.cache_clear()
    kind = type(make(make_parts((512,), 512), "none", torch.float32))
    cpu_linear._choose.cache_clear()
    assert kind is (NativeLinear if faster == "ours" else PackedLinear)


def test_packing_without_a_compiler(no_native):
    parts = make_parts((64, 32), 64, torch.float16)
    layer = make(parts, "none", torch.float32)
    assert isinstance(layer, PackedLinear)
    assert_product(layer, stood_for(parts, "none", torch.float32), torch.randn(3, 64))


def test_packing_releases_the_plain_weight():
    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    before = resident_mib()
    layer = make([torch.ones(16384, 1024)], "none", torch.float32)  # 64 MiB
    assert not isinstance(layer, PlainLinear)
    assert resident_mib() - before < 100


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(InputError, match=r"one input width; found \(4, 8\), \(4, 9\)"):
        make([torch.ones(4, 8), torch.ones(4, 9)], "none", torch.float32)
    with pytest.raises(InputError, match=r"one input width; found \(8,\)"):
        make([torch.ones(8)], "none", torch.float32)
    with pytest.raises(InputError, match="one input width; found none"):
        make([], "none", torch.float32)
    with pytest.raises(InputError, match="quantization must be none, int8 or nf4; found 'int4'"):
        make([torch.ones(4, 8)], "int4", torch.float32)
