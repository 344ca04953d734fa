"""A folder that was saved quantized is served as its weights stand for: in the engine's own layers, or unpacked."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alpaca.errors import InputError, MissingPackage
from alpaca.formats.hf.loading import load_causal_lm
from alpaca.formats.hf.pickled import open_model_weights
from alpaca.formats.hf.quantization import allow_any_width_on_cpu
from alpaca.serving import plan
from alpaca.serving.hugging_face.engine import TransformersEngine
from alpaca.serving.kernels import ops
from alpaca.serving.kernels.cpu_linear import NativeLinear
from alpaca.serving.kernels.linear import Int8Linear, Nf4Linear, SideBySide
from alpaca.serving.llama.engine import LlamaEngine
from alpaca.serving.llama.weights import load_llama, read_llama
from alpaca.serving.loading import load_engine
from alpaca.serving.settings import ServerSettings
from tests.formats.hf.saved_sources import FORMATS, save_quantized
from tests.serving.llama.families import save as save_family
from tests.serving.llama.test_llama import logits

PROMPT = [1, 300, 310, 320, 5, 7]
HOW = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


@pytest.fixture
def load() -> Iterator[Callable[..., LlamaEngine | TransformersEngine]]:
    engines: list[LlamaEngine | TransformersEngine] = []

    def load(folder: Path, **settings: object) -> LlamaEngine | TransformersEngine:
        engines.append(load_engine(folder, ServerSettings(memory_fraction=0.05, **settings)))  # type: ignore[arg-type]
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def found_logits(engine: LlamaEngine | TransformersEngine) -> torch.Tensor:
    if isinstance(engine, LlamaEngine):
        return logits(engine._runner.model, [PROMPT], chunk=4, size=16)[0]
    with torch.inference_mode():
        return engine._model(torch.tensor([PROMPT])).logits[0]


@pytest.fixture(scope="module")
def whole(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as bitsandbytes' folders are made from."""
    folder = shutil.copytree(llama_folder, tmp_path_factory.mktemp("saved") / "whole")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_by_bitsandbytes(whole: Path, folder: Path, **how: object) -> Path:
    settings = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.copy(whole / "tokenizer.model", folder)
    return folder


@pytest.mark.parametrize("kind", ["gptq, columns in another order", "compressed w8a8", "fp8 by blocks"])
@pytest.mark.fast_rows(1)
def test_unpacked_weights_answer_as_the_whole_ones(kind: str, whole: Path, tmp_path: Path, load, caplog):
    tensors = save_quantized(whole, tmp_path / "saved", kind)
    shutil.copytree(whole, tmp_path / "unpacked")
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, tmp_path / "unpacked" / "model.safetensors")
    with caplog.at_level(logging.INFO):
        engine = load(tmp_path / "saved")
    assert isinstance(engine, LlamaEngine)
    assert f"saved quantized by {FORMATS[kind][1]['quant_method']}" in caplog.text
    assert torch.equal(found_logits(engine), found_logits(load(tmp_path / "unpacked")))


@pytest.mark.parametrize("kind", HOW)
def test_int8_and_nf4_go_into_the_engines_own_layers_without_bitsandbytes(
    kind: str, whole: Path, tmp_path: Path, load, monkeypatch: pytest.MonkeyPatch
):
    folder = save_by_bitsandbytes(whole, tmp_path / "saved", **HOW[kind])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    expected = found_logits(load(whole, quantization=kind))
    for settings in ({}, {"quantization": kind}):
        engine = load(folder, **settings)
        assert isinstance(
            engine._runner.model.layers[0].down, {"int8": (Int8Linear, NativeLinear), "nf4": Nf4Linear}[kind]
        )
        assert torch.equal(found_logits(engine), expected)
    other = {"int8": "nf4", "nf4": "int8"}[kind]
    with pytest.raises(InputError, match=f"was saved as {kind} .*ALPACA_QUANTIZATION asks for {other}: leave it out"):
        load(folder, quantization=other)


def test_what_was_saved_whole_beside_4_bit_stays_whole(whole: Path, tmp_path: Path, load, capsys, monkeypatch):
    """As Unsloth's dynamic folders have it: some matrices of a layer are left alone."""
    skipped = ["lm_head", "k_proj", "model.layers.0.mlp.down_proj"]
    folder = save_by_bitsandbytes(whole, tmp_path / "saved", **HOW["nf4"], llm_int8_skip_modules=skipped)
    monkeypatch.setattr("alpaca.serving.kernels.linear.held_dtype", lambda stored, dtype: dtype)  # as a GPU does
    engine = load(folder)
    layer = engine._runner.model.layers[0]
    assert isinstance(layer.qkv, SideBySide)
    assert not isinstance(layer.down, Nf4Linear)
    unpacked, _ = load_causal_lm(folder, dtype=torch.float32, unpacks=True)
    with torch.inference_mode():
        expected = unpacked(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(found_logits(engine), expected, rtol=0, atol=1e-4)
    monkeypatch.setattr("sys.argv", ["plan", "--weights", str(folder), "--memory", "8GB", "--dtype", "float32"])
    plan.main()
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])["weights_bytes"]
    assert planned == engine._runner.model.num_bytes


def test_the_plan_counts_the_unpacked_size(whole: Path, tmp_path: Path, capsys, monkeypatch):
    save_quantized(whole, tmp_path / "saved", "gptq")
    sizes = []
    for folder in (whole, tmp_path / "saved"):
        monkeypatch.setattr("sys.argv", ["plan", "--weights", str(folder), "--memory", "8GB"])
        plan.main()
        sizes.append(json.loads(capsys.readouterr().out.splitlines()[-1])["weights_bytes"])
    assert sizes[0] == sizes[1]


def test_a_4_bit_folder_whose_kind_is_left_to_the_default_says_both_precisions(whole: Path, tmp_path: Path, load):
    folder = shutil.copytree(whole, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(InputError, match=r"was saved as fp4 .*ALPACA_QUANTIZATION asks for int8: leave it out"):
        load(folder, quantization="int8")


# transformers ----------------------------------------------------------------------------------------------------


def test_transformers_loads_a_saved_quantization_as_it_does_by_itself(whole: Path, tmp_path: Path, load):
    folder = save_by_bitsandbytes(whole, tmp_path / "saved", **HOW["nf4"])
    engine = load(folder, engine="transformers", dtype="bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    allow_any_width_on_cpu(expected)
    with torch.inference_mode():
        assert torch.equal(found_logits(engine), expected(torch.tensor([PROMPT])).logits[0])


def test_transformers_without_a_formats_package_gets_unpacked_weights(whole: Path, tmp_path: Path, load, caplog):
    tensors = save_quantized(whole, tmp_path / "saved", "gptq")
    engine = load(tmp_path / "saved", engine="transformers")
    assert "is unpacked, for transformers lacks a package for gptq here: " in caplog.text
    found = engine._model.state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())


def test_a_method_that_nobody_here_reads_names_the_missing_package(whole: Path, tmp_path: Path, load):
    folder = shutil.copytree(whole, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    how = {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": 1,
        "nbits_per_codebook": 16,
    }
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(MissingPackage, match=r"by aqlm, for which transformers lacks a package here: .*aqlm"):
        load(folder)


def test_pickles_are_served_by_the_llama_engine(llama_folder: Path, tmp_path: Path, load):
    folder = shutil.copytree(llama_folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")  # transformers does not read it, either
    engine = load(folder)
    assert isinstance(engine, LlamaEngine)
    assert torch.equal(found_logits(engine), found_logits(load(llama_folder)))


@pytest.mark.parametrize("kind", HOW)
@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma2", "qwen3_moe"])
@pytest.mark.fast_rows(2)
def test_saved_families_are_what_the_engine_makes_of_the_whole_ones(name: str, kind: str, tmp_path: Path):
    """Biases, fused projections, norms and routers stay whole, or are read as they were saved."""
    save_family(tmp_path / "whole", name, torch.bfloat16, hidden_size=64, num_attention_heads=8, intermediate_size=128)
    how = BitsAndBytesConfig(**HOW[kind])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=how, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "saved")
    found, expected = (family_logits(tmp_path / folder, kind) for folder in ("saved", "whole"))
    assert torch.equal(found, expected)


def family_logits(folder: Path, quantization: str) -> torch.Tensor:
    model = load_llama(
        open_model_weights(folder), read_llama(folder), device=torch.device("cpu"), dtype=torch.float32,
        quantization=quantization, num_positions=256, ops=ops,
    )  # fmt: skip
    return logits(model, [list(range(3, 40))], chunk=8)[0]
