"""Bases as other tools leave them: saved quantized, tied with a head of their own; and what the final config says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from alpaca.errors import InputError
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import resolve_settings
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.distributed import World
from alpaca.training.model.base import open_base
from alpaca.training.model.building import _make_empty, load_model
from alpaca.training.model.final import describe_final
from alpaca.training.planning.workload import read_model
from tests.formats.hf.saved_sources import save_quantized

ALONE = World(rank=0, num_processes=1, device=torch.device("cpu"))
Configure = Callable[..., TrainConfig]


def settings_of(config: TrainConfig) -> RunSettings:
    return resolve_settings(config, num_processes=1, device=ALONE.device)


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("kind", ["gptq", "compressed w4a16"])
def test_a_base_that_was_saved_quantized_is_trained_whole(
    kind: str, configure: Configure, tiny_llama: Path, tmp_path: Path
):
    expected = save_quantized(tiny_llama, tmp_path / "saved", kind)
    config = configure(model_name_or_path=str(tmp_path / "saved"))
    base = open_base(settings_of(config).base)
    model = load_model(base, settings_of(config).model, ALONE)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name][: len(tensor)], tensor.float()) for name, tensor in expected.items())
    assert all(parameter.requires_grad for parameter in found.values())
    assert "quantization_config" not in describe_final(model, base, torch.float32).configs["config.json"]


def test_a_base_saved_in_4_bit_is_trained_on_as_it_is(configure: Configure, tiny_llama: Path, tmp_path: Path):
    import bitsandbytes

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=480, **sizes)).save_pretrained(tmp_path / "whole")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=how, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "saved")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "saved")
    config = configure(model_name_or_path=str(tmp_path / "saved"), method="qlora")
    base = open_base(settings_of(config).base)
    model = load_model(base, settings_of(config).model, ALONE)
    codes = {n: m.weight for n, m in saved.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    found = {n: m.weight for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(found) == len(codes) > 0
    for name, weight in found.items():
        assert torch.equal(weight.data, codes[name.removeprefix("base_model.model.").replace(".base_layer", "")].data)


def test_another_quantization_than_the_saved_one_is_made_of_the_unpacked_weights(
    configure: Configure, tiny_llama: Path, tmp_path: Path
):
    """Where the folder has no method that bitsandbytes' layers could keep."""
    save_quantized(tiny_llama, tmp_path / "saved", "gptq")
    config = configure(model_name_or_path=str(tmp_path / "saved"), method="lora", base_quantization="int8")
    base = open_base(settings_of(config).base)
    names = [type(module).__name__ for module in load_model(base, settings_of(config).model, ALONE).modules()]
    assert "Linear8bitLt" in names


def test_a_method_that_is_not_read_is_refused(configure: Configure, tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "saved")
    change_config(folder, quantization_config={"quant_method": "hqq"})
    with pytest.raises(InputError, match="was saved quantized by hqq, which is not read here"):
        open_base(settings_of(configure(model_name_or_path=str(folder))).base)


def test_a_trained_head_of_a_tied_base_is_its_own_everywhere(configure: Configure, tiny_llama: Path, tmp_path: Path):
    """In the model that is trained, in the one that is sharded, in the plan, and in the config that is written."""
    folder = shutil.copytree(tiny_llama, tmp_path / "head")
    change_config(folder, tie_word_embeddings=True, rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=9000.0)
    settings = settings_of(configure(model_name_or_path=str(folder)))
    base = open_base(settings.base)
    model = load_model(base, settings.model, ALONE)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.get_output_embeddings().weight[: len(head)], head.float())
    empty = _make_empty(base, settings.model)
    assert empty.get_output_embeddings().weight is not empty.get_input_embeddings().weight
    assert not read_model(folder).ties_embeddings
    config = describe_final(model, base, torch.float32).configs["config.json"]
    assert config["tie_word_embeddings"] is False
    linear = {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert (config["rope_theta"], config["rope_scaling"]) == (9000.0, linear)
    assert config["rope_parameters"] == {**linear, "rope_theta": 9000.0}


def test_an_equal_head_stays_tied_in_the_plan(tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "equal")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    change_config(folder, tie_word_embeddings=True)
    assert read_model(folder).ties_embeddings
