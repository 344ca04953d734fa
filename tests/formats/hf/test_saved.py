"""Folders that were saved quantized: each weight is what its own format says, bit for bit, wherever it is read."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from alpaca.errors import InputError
from alpaca.formats.hf.loading import load_causal_lm
from alpaca.formats.hf.merging import open_merged
from alpaca.formats.hf.pickled import open_model_weights
from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight
from alpaca.formats.hf.saved.gptq import _read_zeros
from alpaca.formats.hf.saved.packed import unpack_integers
from tests.formats.hf.saved_sources import FORMATS, compressed_config, less_ones, pack_rows, save_quantized

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 33, 60, 2, 7]])


def save_whole(folder: Path, *, width: int = 64, ffn: int = 96, **values: object) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **values,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole(tmp_path_factory.mktemp("saved") / "whole")


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_integers_are_unpacked_from_a_stream_of_bits(num_bits: int):
    values = torch.randint(0, 2**num_bits, (3, 75))
    assert torch.equal(unpack_integers(pack_rows(values, num_bits), num_bits, 75), values.int())


def test_a_zero_point_of_0_borrows_from_its_neighbours_and_gets_it_back():
    """GPTQModel's word arithmetic: zero points 0 1 0 … of 4 bits, less 0x11111111, are no nibbles less one."""
    zeros = torch.arange(64).view(1, 64) % 2
    stored = less_ones(pack_rows(zeros, 4), 4)
    assert not torch.equal(stored, pack_rows((zeros - 1) % 16, 4))
    assert torch.equal(_read_zeros(stored, 4, 64, {}, less_one=True), zeros.int())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.fast_rows(4)
def test_whole_tensors_are_what_the_format_stands_for(kind: str, whole: Path, tmp_path: Path):
    expected = save_quantized(whole, tmp_path, kind)
    weights = open_model_weights(tmp_path)
    assert set(weights.names) == set(expected)
    for spec in weights.specs():
        found = weights.tensor(spec.name)
        assert (tuple(found.shape), found.dtype) == (spec.shape, spec.dtype) == (expected[spec.name].shape, found.dtype)
        assert bits_of(found) == bits_of(expected[spec.name]), spec.name


@pytest.mark.slow
def test_blocks_of_rows_make_no_difference(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number, kind in enumerate(FORMATS):
        expected = save_quantized(whole, tmp_path / str(number), kind)
        monkeypatch.setattr("alpaca.formats.hf.saved.packed._CHUNK_ELEMENTS", 1000)
        weights = open_model_weights(tmp_path / str(number))
        assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["gptq", "fp8 by blocks"])
def test_transformers_gets_the_whole_model(kind: str, whole: Path, tmp_path: Path):
    """The base of a training: the same logits as a folder with the whole tensors in it."""
    expected = {name: tensor.float() for name, tensor in save_quantized(whole, tmp_path, kind).items()}
    model, found = load_causal_lm(tmp_path, dtype=torch.float32, unpacks=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


def save_by_bitsandbytes(whole: Path, folder: Path, **how: object) -> LlamaForCausalLM:
    settings = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


BITSANDBYTES = {
    "int8": ({"load_in_8bit": True}, Int8Weight),
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Nf4Weight),
    "nf4 twice": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, Nf4Weight),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, None),
}


@pytest.mark.parametrize("kind", BITSANDBYTES)
@pytest.mark.parametrize(
    "ffn", [64, 172]
)  # 172: blocks of 64 across rows; of 96 columns bitsandbytes itself reads others on a CPU
def test_weights_of_bitsandbytes_are_read_without_it(kind: str, ffn: int, tmp_path: Path):
    import bitsandbytes

    how, own = BITSANDBYTES[kind]
    source = save_whole(tmp_path / "whole", width=128, ffn=ffn)
    model = save_by_bitsandbytes(source, tmp_path / "saved", **how)
    weights = open_model_weights(tmp_path / "saved")
    assert set(weights.names) == set(load_file(source / "model.safetensors"))
    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            continue
        stored = weights.stored(f"{name}.weight")
        found = weights.tensor(f"{name}.weight")
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            expected = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            assert torch.equal(stored.codes, module.weight.data)
        else:
            state = module.weight.quant_state
            expected = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        assert weights.keeps(f"{name}.weight") == (own is not None)
        assert isinstance(stored, own or torch.Tensor)
        assert torch.equal(found, expected.to(torch.bfloat16)), name


def test_a_block_of_any_multiple_of_64_is_the_engines_own(tmp_path: Path):
    """bitsandbytes takes other sizes of blocks, too: their scales are repeated."""
    import bitsandbytes

    source = save_whole(tmp_path / "whole", width=128)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    packed, state = bitsandbytes.functional.quantize_4bit(tensors.pop(name), blocksize=128, quant_type="nf4")
    parts = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    (tmp_path / "saved").mkdir()
    save_file({**tensors, name: packed, **parts}, tmp_path / "saved" / "model.safetensors")
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": how}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    found = open_model_weights(tmp_path / "saved").stored(name)
    assert isinstance(found, Nf4Weight)
    assert torch.equal(found.dequantize(torch.float32), bitsandbytes.functional.dequantize_4bit(packed, state))


def test_biases_of_zeros_are_left_out_of_models_that_have_none(whole: Path, tmp_path: Path):
    save_quantized(whole, tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    biases = {f"{name.removesuffix('qweight')}bias": torch.zeros(1) for name in tensors if name.endswith("qweight")}
    save_file(tensors | biases, tmp_path / "model.safetensors")
    assert not [name for name in open_model_weights(tmp_path).names if name.endswith("bias")]


REFUSED = {
    "exl2": ({"quant_method": "exl2", "bits": 4.0}, "was saved quantized by exl2, which is not read here .* take"),
    "no name": ({"bits": 4}, "was saved quantized by an unnamed method, which is not read here"),
    "a layout of GPTQ": ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "GPTQ model in the layout 'marlin'"),
    "a version of AWQ": ({"quant_method": "awq", "version": "gemv"}, "AWQ model of version 'gemv' with 4 bits"),
    "a compressed format": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'",
    ),
    "rotated weights": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}},
        "with a transform_config: its weights are rotated .*; take the model it was made from",
    ),
    **{
        f"a block of {block}": (compressed_config("float-quantized", "float", 8, block_structure=block),
        "expected two whole numbers for 'block_structure', .* found")
        for block in ("", "128", "128x", "128x128x128", "0x128", [128], [128, "128"], [128.0, 128], [True, 128])
    },
    "whole weights": ({"quant_method": "gptq", "bits": 4}, "saved quantized by gptq, and none of its tensors is"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_name(kind: str, whole: Path, tmp_path: Path):
    how, message = REFUSED[kind]
    tensors = load_file(whole / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((whole / "config.json").read_text()) | {"quantization_config": how}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_model_weights(tmp_path)


def change_how(folder: Path, **how: object) -> None:
    """Change config.json's quantization_config; None takes a setting out."""
    config = json.loads((folder / "config.json").read_text())
    changed = config["quantization_config"] | how
    config["quantization_config"] = {name: value for name, value in changed.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("transform", [{}, {"config_groups": {}}])
def test_a_transform_of_nothing_is_none(transform: dict[str, object], whole: Path, tmp_path: Path):
    expected = save_quantized(whole, tmp_path, "compressed fp8")
    change_how(tmp_path, transform_config=transform)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(open_model_weights(tmp_path).tensor(name), expected[name])


@pytest.mark.parametrize("declared", [None, [32, 32]])
def test_a_guessed_size_of_blocks_is_logged(declared: list[int] | None, whole: Path, tmp_path: Path, caplog):
    expected = save_quantized(whole, tmp_path, "fp8 by blocks")
    change_how(tmp_path, weight_block_size=declared)
    weights = open_model_weights(tmp_path)
    assert all(torch.equal(weights.tensor(name).float(), tensor.float()) for name, tensor in expected.items())
    assert ("names no weight_block_size; blocks of 128 x 128 are assumed" in caplog.text) == (declared is None)


def test_more_scales_than_one_of_a_whole_matrix_are_refused(whole: Path, tmp_path: Path):
    save_quantized(whole, tmp_path, "compressed fp8")
    change_how(tmp_path, quant_method="fp8")
    with pytest.raises(InputError, match=r"weight_scale is \[\d+, 1\], expected one scale for the whole weight"):
        open_model_weights(tmp_path)


DAMAGES = {
    "no scales": (lambda tensors, name: tensors.pop(f"{name}.scales"), "lacks '.*scales'"),
    "other scales": (lambda tensors, name: tensors.update({f"{name}.scales": torch.ones(2, 2)}), "expected 2 columns"),
    "other words": (
        lambda tensors, name: tensors.update({f"{name}.qweight": torch.ones(5, 64).int()}),
        "no whole number",
    ),
    "no zeros": (lambda tensors, name: tensors.pop(f"{name}.qzeros"), "lacks '.*qzeros'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fast_rows(1)
def test_parts_that_do_not_fit_are_named(damage: str, whole: Path, tmp_path: Path):
    save_quantized(whole, tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    change, message = DAMAGES[damage]
    change(tensors, "model.layers.1.self_attn.q_proj")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        open_model_weights(tmp_path)


def test_the_log_says_what_was_unpacked(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_quantized(whole, tmp_path, "gptq")
    with caplog.at_level(logging.INFO):
        open_model_weights(tmp_path)
        open_model_weights(tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "saved quantized by gptq: 14 of 21 tensors, unpacked when read" in lines[0]


def test_an_adapter_is_merged_into_what_4_bit_weights_stand_for(tmp_path: Path):
    """As it was trained: on the saved weights as they are, never quantized a second time."""
    from peft import LoraConfig, get_peft_model

    source = save_whole(tmp_path / "whole", width=128, ffn=64)
    save_by_bitsandbytes(source, tmp_path / "saved", **BITSANDBYTES["nf4 twice"][0])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(source), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    weights = open_model_weights(tmp_path / "saved")
    merged = open_merged(tmp_path / "saved", tmp_path / "adapter", quantization="nf4", dtype=torch.float32)
    for name in merged.names:
        stored = weights.stored(name)
        expected = (stored if isinstance(stored, torch.Tensor) else stored.dequantize(torch.float32)).float()
        if name.endswith("q_proj.weight"):
            change = merged.adapter.low_rank(name.removesuffix(".weight"))
            expected = expected + change.scale * change.b @ change.a
        assert torch.allclose(merged.tensor(name), expected, atol=1e-6), name
