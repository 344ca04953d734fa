"""Our int8 and nf4 are bitsandbytes' to the last bit, and hold what they promise where it is not installed."""

import importlib.util
import itertools

import pytest
import torch

from alpaca.errors import InputError, MissingPackage
from alpaca.formats.hf.quantization import (
    NF4_VALUES,
    Int8Weight,
    Nf4Weight,
    bitsandbytes_config,
    dynamic_map,
    quantize_int8,
    quantize_nf4,
    quantize_parts,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (96, 256), (1, 1), (1, 64), (5, 63), (3, 65), (33, 17), (7, 80), (300, 192), (210, 1376))
KINDS = ("plain", "zeros", "outliers", "huge", "tiny")
with_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def make_weight(shape: tuple[int, int], dtype: torch.dtype, kind: str = "plain") -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.02
    if kind == "zeros":
        weight[::2] = 0
    if kind == "outliers":
        weight.view(-1)[::97] *= 1000
    return (weight * {"huge": 5e5, "tiny": 1e-5}.get(kind, 1)).to(dtype)


@pytest.fixture
def bnb():
    """bitsandbytes' functions; what it would compile is run as it stands, or each shape takes seconds."""
    import bitsandbytes.functional as functional

    with torch.compiler.set_stance("force_eager"):
        yield functional


@with_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_bitsandbytes(bnb, dtype, kind):
    from bitsandbytes.nn import Int8Params

    for shape in SHAPES if kind == "plain" else SHAPES[1::3]:
        weight = make_weight(shape, dtype, kind)
        expected, found = Int8Params(weight.clone(), requires_grad=False).to("cpu"), quantize_int8(weight)
        assert torch.equal(found.codes, expected.CB), shape
        assert torch.equal(found.absmax, expected.SCB), shape
        whole = bnb.int8_vectorwise_dequant(expected.CB, expected.SCB)
        assert all(torch.equal(found.dequantize(to), whole.to(to)) for to in DTYPES), shape


@with_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_is_bitsandbytes(bnb, dtype, kind):
    for shape in SHAPES if kind == "plain" else SHAPES[1::3]:
        weight = make_weight(shape, dtype, kind)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        found = quantize_nf4(weight)
        assert torch.equal(found.packed, packed.view(-1)), shape
        assert torch.equal(found.absmax, bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset), shape
        # As one long row: with AVX512, bitsandbytes 0.50 takes wrong scales for widths that 16 divides and 64 does not.
        state.shape = (1, weight.numel())
        for state.dtype in DTYPES:
            expected = bnb.dequantize_4bit(packed, state).reshape(shape)
            assert torch.equal(found.dequantize(state.dtype), expected), (shape, state.dtype)


@with_bitsandbytes
def test_layers_of_bitsandbytes_hold_our_weights():
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    weight = make_weight((128, 192), torch.float32)
    four = Linear4bit(192, 128, bias=False, quant_type="nf4", compress_statistics=True)
    eight = Linear8bitLt(192, 128, bias=False, has_fp16_weights=False)
    for layer in (four, eight):
        layer.load_state_dict({"weight": weight})
        layer.to("cpu")
    assert torch.equal(four.weight.data.view(-1), quantize_nf4(weight).packed)
    assert torch.equal(eight.weight.data, quantize_int8(weight).codes)


@with_bitsandbytes
def test_dynamic_map_is_bitsandbytes(bnb):
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


def test_chunks_do_not_show(monkeypatch):
    weight = make_weight((300, 192), torch.bfloat16)
    whole = quantize_int8(weight), quantize_nf4(weight)
    monkeypatch.setattr("alpaca.formats.hf.quantization._CHUNK_ELEMENTS", 640)
    pieces = quantize_int8(weight), quantize_nf4(weight)
    assert torch.equal(whole[0].codes, pieces[0].codes)
    assert torch.equal(whole[0].absmax, pieces[0].absmax)
    assert torch.equal(whole[1].packed, pieces[1].packed)
    assert torch.equal(whole[1].absmax, pieces[1].absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape):
    weight = make_weight(shape, torch.float16).float()
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((quantize_int8(weight).dequantize(torch.float32) - weight).abs() <= steps * 0.501).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_within_half_the_widest_gap(shape):
    weight = make_weight(shape, torch.float32)
    largest = weight.abs().amax()
    gap = max(b - a for a, b in itertools.pairwise(NF4_VALUES))
    off = (quantize_nf4(weight).dequantize(torch.float32) - weight).abs().amax()
    assert off <= largest * (gap / 2 + 0.04)  # and what the scales lost


def test_nf4_of_its_own_values_is_exact():
    weight = torch.tensor(NF4_VALUES).repeat(8, 8)  # every scale is 1, so that nothing is lost of them
    found = quantize_nf4(weight)
    assert torch.equal(found.dequantize(torch.float32), weight)
    assert found.packed[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


def test_zeros_stay_zeros():
    weight = torch.zeros(4, 96)
    assert not quantize_int8(weight).dequantize(torch.float32).any()
    assert not quantize_nf4(weight).dequantize(torch.float32).any()


def test_numbers_of_bytes():
    weight = torch.randn(128, 192)
    assert quantize_int8(weight).num_bytes == 128 * 192 + 128 * 4
    assert quantize_nf4(weight).num_bytes == 128 * 192 // 2 + 128 * 3 * 4


@pytest.mark.parametrize(("quantization", "quantize"), [("int8", quantize_int8), ("nf4", quantize_nf4)])
def test_parts_are_quantised_alone_and_laid_end_to_end(quantization, quantize):
    parts = [make_weight((rows, 80), torch.bfloat16) for rows in (32, 16, 4)]
    whole = quantize_parts(parts, quantization=quantization, device=CPU)
    assert whole.shape == (52, 80)
    alone = torch.cat([quantize(part).dequantize(torch.float32) for part in parts])
    assert torch.equal(whole.dequantize(torch.float32), alone)
    assert torch.equal(whole.rows(32, 48).dequantize(torch.float32), alone[32:48])


def test_nf4_rows_are_cut_between_blocks():
    weight = quantize_nf4(make_weight((12, 80), torch.float32))  # 4 rows are 5 blocks
    assert weight.row_step == 4
    whole = weight.dequantize(torch.float32)
    assert torch.equal(weight.rows(4, 8).dequantize(torch.float32), whole[4:8])
    with pytest.raises(InputError, match="end after every 4 rows; found rows 2 to 8"):
        weight.rows(2, 8)
    with pytest.raises(InputError, match="end after every 4 rows; found rows 0 to 3"):
        quantize_parts([torch.randn(3, 80), torch.randn(5, 80)], quantization="nf4", device=CPU)


def test_empty_weights_have_the_shapes_of_quantised_ones():
    for kind, quantize in ((Int8Weight, quantize_int8), (Nf4Weight, quantize_nf4)):
        empty, full = kind.empty(5, 63, CPU), quantize(torch.randn(5, 63))
        assert empty.shape == full.shape
        assert empty.num_bytes == full.num_bytes


def test_what_is_not_finite_is_refused():
    weight = torch.ones(4, 64)
    weight[2, 3] = 1e6
    with pytest.raises(InputError, match="finite in float16, at most 65504; found inf"):
        quantize_int8(weight)
    weight[2, 3] = float("nan")
    with pytest.raises(InputError, match="nf4 weights must be finite; found nan"):
        quantize_nf4(weight)


@with_bitsandbytes
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, whose library is there")
def test_a_bitsandbytes_that_cannot_use_the_gpu_is_said(bnb, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(MissingPackage, match="no library for CUDA"):
        bitsandbytes_config("nf4", torch.bfloat16)


def test_a_missing_bitsandbytes_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install bitsandbytes"):
        bitsandbytes_config("int8", torch.bfloat16)
