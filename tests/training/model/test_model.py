"""The base model: float32 to train, rows for new tokens, tied embeddings, layers found, clear errors."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, BloomForCausalLM, LlamaForCausalLM

from alpaca.errors import InputError, MissingInput
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import make_settings
from alpaca.training.distributed import World
from alpaca.training.model.base import open_base
from alpaca.training.model.building import _make_empty, count_parameters, grow_embeddings, load_model
from alpaca.training.model.layers import check_layer_class, find_layer_class
from alpaca.training.model.optimizers.choosing import group_parameters

ALONE = World(rank=0, num_processes=1, device=torch.device("cpu"))
Configure = Callable[..., TrainConfig]


def test_new_rows_are_the_mean_of_the_others(configure: Configure, tiny_llama: Path):
    config = configure()
    base = open_base(make_settings(config).base)
    model, original = load_model(base, make_settings(config).model, ALONE), LlamaForCausalLM.from_pretrained(tiny_llama)
    assert base.tokenizer.pad_id == base.tokenizer.fill_id == 480
    assert model.config.vocab_size == 481
    for part in ("get_input_embeddings", "get_output_embeddings"):
        table, before = getattr(model, part)().weight, getattr(original, part)().weight
        assert torch.equal(table[:480], before)
        assert torch.allclose(table[480], before.mean(0), atol=1e-6)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 480)
    assert model.training
    assert not model.config.use_cache


def test_embeddings_never_shrink(configure: Configure, tiny_opt: Path):
    config = configure(model_name_or_path=str(tiny_opt))
    base = open_base(make_settings(config).base)
    model = load_model(base, make_settings(config).model, ALONE)
    assert base.tokenizer.size < 408
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 408
    assert base.tokenizer.pad_id == 1


def test_tied_embeddings_stay_one_table(tiny_opt: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_opt)
    before = model.get_input_embeddings().weight.clone()
    grow_embeddings(model, 410)
    table = model.get_input_embeddings().weight
    assert table is model.get_output_embeddings().weight
    assert torch.equal(table[:408], before)
    assert torch.allclose(table[408:], before.mean(0).expand(2, -1), atol=1e-6)


def test_half_precision_weights_are_trained_in_float32(configure: Configure, tiny_llama: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_llama, tmp_path / "half")
    half = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    half.save_pretrained(folder)
    config = configure(model_name_or_path=str(folder))
    base = open_base(make_settings(config).base)
    model = load_model(base, make_settings(config).model, ALONE)
    assert base.dtype == torch.float16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.norm.weight, half.model.norm.weight.float())


def test_the_empty_model_has_the_whole_ones_shapes_buffers_and_ties(
    configure: Configure, tiny_llama: Path, tiny_opt: Path
):
    for folder in (tiny_llama, tiny_opt):
        config = configure(model_name_or_path=str(folder))
        base = open_base(make_settings(config).base)
        whole, empty = (
            load_model(base, make_settings(config).model, ALONE),
            _make_empty(base, make_settings(config).model),
        )
        assert {n: p.shape for n, p in whole.named_parameters()} == {n: p.shape for n, p in empty.named_parameters()}
        assert all(parameter.is_meta for parameter in empty.parameters())
        buffers = dict(empty.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())
        assert count_parameters(whole) == count_parameters(empty)


def test_the_layer_class_is_the_models_own(tiny_llama: Path, tiny_opt: Path, caplog: pytest.LogCaptureFixture):
    classes = {"LlamaDecoderLayer": tiny_llama, "OPTDecoderLayer": tiny_opt}
    for name, folder in classes.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        assert find_layer_class(model) == name
        model._no_split_modules = None
        assert find_layer_class(model) == name
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50))
    assert find_layer_class(bloom) == "BloomBlock"
    for asked in (None, "LlamaDecoderLayer"):
        check_layer_class(asked, "LlamaDecoderLayer")
    assert not caplog.records
    check_layer_class("LLaMADecoderLayer", "LlamaDecoderLayer")
    assert "LLaMADecoderLayer: the layers of this model are LlamaDecoderLayer" in caplog.text


def test_biases_and_norms_do_not_decay(tiny_opt: Path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_opt))
    decaying, others = group_parameters(model, weight_decay=0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith(".bias") or "norm" in names[id(p)] for p in others["params"])
    assert not any(names[id(p)].endswith(".bias") or "norm" in names[id(p)] for p in decaying["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def test_a_missing_model_names_the_step_to_run(configure: Configure, tmp_path: Path, tiny_llama: Path):
    with pytest.raises(
        MissingInput, match=r"no model at .*nothing.* convert Meta's checkpoint first: python -m convert"
    ):
        open_base(make_settings(configure(model_name_or_path=str(tmp_path / "nothing"))).base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match=r"found there: nothing\): expected a Hugging Face folder with config.json"):
        open_base(make_settings(configure(model_name_or_path=str(tmp_path / "empty"))).base)
    with pytest.raises(MissingInput, match=r"no model at .*no_tokenizer"):
        open_base(make_settings(configure(tokenizer_name_or_path=str(tmp_path / "no_tokenizer"))).base)


def test_a_hub_name_that_cannot_be_had(configure: Configure):
    with pytest.raises(MissingInput, match="nor could it be had from the Hugging Face hub"):
        open_base(make_settings(configure(model_name_or_path="nobody-here/no-such-model")).base)


def test_weights_that_lack_a_tensor_are_refused(configure: Configure, tiny_llama: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = configure(model_name_or_path=str(folder))
    with pytest.raises(InputError, match=r"lacks weights of its model: model.layers.1.mlp.up_proj.weight"):
        load_model(open_base(make_settings(config).base), make_settings(config).model, ALONE)


def test_quantized_weights_are_refused(configure: Configure, tiny_llama: Path, tmp_path: Path):
    from safetensors.torch import save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "int8")
    save_file({"a": torch.zeros(100, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"torch.int8 weights; expected one of float32, float16, bfloat16"):
        open_base(make_settings(configure(model_name_or_path=str(folder))).base)


def test_weights_in_an_older_format_take_their_dtype_from_the_config(
    configure: Configure, tiny_llama: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_llama, tmp_path / "old")
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config_file = folder / "config.json"
    content = json.loads(config_file.read_text())
    content.pop("dtype", None)
    config_file.write_text(json.dumps({**content, "torch_dtype": "bfloat16"}))
    config = configure(model_name_or_path=str(folder))
    base = open_base(make_settings(config).base)
    assert base.dtype == torch.bfloat16
    assert load_model(base, make_settings(config).model, ALONE).dtype == torch.float32


def test_the_pad_token_is_said(configure: Configure, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    open_base(make_settings(configure()).base)
    assert "added [PAD] as id 480" in caplog.text
