"""Adapter folders: PEFT's own are read, and what is empty, damaged or no LoRA is refused with its reason."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca.errors import InputError, MissingInput
from alpaca.files.model_folders import is_adapter
from alpaca.formats.hf.adapters import open_adapter, unsupported_kind

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def peft_model(**values: object) -> torch.nn.Module:
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **values}
    return get_peft_model(base, LoraConfig(**settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = peft_model()
    model.peft_config["default"].base_model_name_or_path = "weights/llama-7b"
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def test_pefts_folder_is_read(folder: Path, tmp_path: Path):
    adapter = open_adapter(folder)
    assert is_adapter(folder)
    assert not is_adapter(tmp_path)
    assert (adapter.base_name, adapter.rank, adapter.alpha) == ("weights/llama-7b", 4, 8.0)
    assert adapter.targets == tuple(sorted(
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ))  # fmt: skip
    assert not adapter.is_base
    assert adapter.describe() == "LoRA adapter of weights/llama-7b: rank 4, alpha 8, 4 layers (q_proj, v_proj)"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(adapter.tensor(name), torch.ones(16, 4))


def test_variants_are_read(tmp_path: Path):
    peft_model(use_dora=True, use_rslora=True, rank_pattern={"v_proj": 2}).save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    assert (adapter.uses_dora, adapter.uses_rslora, adapter.is_base) == (True, True, True)
    assert adapter.describe().startswith("DoRA rsLoRA adapter of ")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_changed_weights_are_pefts_own_after_a_merge(kind: str, tmp_path: Path):
    uses = {"use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}
    model = peft_model(**uses, **patterns)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = open_adapter(tmp_path)
    before = {
        name: model.get_submodule(f"base_model.model.{name}").base_layer.weight.clone() for name in adapter.targets
    }
    merged = model.merge_and_unload()
    for name, weight in before.items():
        change = adapter.low_rank(name)
        changed = weight + change.scale * change.b @ change.a
        assert (change.magnitude is not None) == (kind == "dora")
        if change.magnitude is not None:
            changed *= (change.magnitude / changed.norm(dim=1))[:, None]
        assert torch.allclose(merged.get_submodule(name).weight, changed, atol=1e-5), name


def test_older_folders_hold_a_bin_file(folder: Path):
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    before = open_adapter(folder)
    file.unlink()
    assert before.targets == open_adapter(folder).targets
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(
        MissingInput, match=r"no adapter_model.safetensors or adapter_model.bin in .*found: README.md, ad"
    ):
        open_adapter(folder)


def test_an_empty_adapter_is_refused(folder: Path):
    """The 443 bytes that alpaca-lora's save wrote with newer PEFTs: a dictionary of nothing."""
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"holds an empty adapter \(0 tensors, none of them lora_A\)"):
        open_adapter(folder)


def test_damage_is_refused(folder: Path):
    file = folder / "adapter_model.safetensors"
    tensors, content = load_file(file), file.read_bytes()
    file.write_bytes(content[:-40])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged"):
        open_adapter(folder)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.v_proj.lora_B" not in name}, file
    )
    with pytest.raises(InputError, match=r"rank 4 for model.layers.1.self_attn.v_proj, found A \[4, 16\], B missing"):
        open_adapter(folder)
    file.write_bytes(content)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(InputError, match=r"expected rank 8 for .*, found A \[4, 16\], B \[16, 4\]"):
        open_adapter(folder)
    del config["r"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"adapter_config.json: expected a whole number above 0 for 'r', found None"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"lora_alpha": float("nan")}, r"a finite number for 'lora_alpha', found nan"),
        ({"lora_alpha": float("inf")}, r"a finite number for 'lora_alpha', found inf"),
        ({"lora_alpha": 10**400}, r"a finite number for 'lora_alpha', found 10000"),
        ({"lora_alpha": True}, r"a finite number for 'lora_alpha', found True"),
        ({"r": 0}, r"a whole number above 0 for 'r', found 0"),
        ({"r": 4.5}, r"a whole number above 0 for 'r', found 4\.5"),
        ({"alpha_pattern": {"(": 3}}, r"'\(' in 'alpha_pattern' is no regular expression: missing \)"),
        ({"alpha_pattern": [1]}, r"an object of layer names and numbers for 'alpha_pattern', found \[1\]"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"a finite number for 'q_proj' in 'alpha_pattern', found 'x'"),
        ({"alpha_pattern": {"q_proj": float("-inf")}}, r"a finite number for 'q_proj' in 'alpha_pattern', found -inf"),
        ({"rank_pattern": {"*": 3}}, r"'\*' in 'rank_pattern' is no regular expression: nothing to repeat"),
        ({"rank_pattern": "v_proj"}, r"an object of layer names and numbers for 'rank_pattern', found v_proj"),
        ({"rank_pattern": {"v_proj": 2.0}}, r"a whole number above 0 for 'v_proj' in 'rank_pattern', found 2\.0"),
    ],
)
def test_numbers_that_would_merge_wrong_are_refused(values: dict[str, object], found: str, folder: Path):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(InputError, match=rf"adapter_config\.json: .*{found}"):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian", "use_dora": True, "use_rslora": True}, None),
        ({"lora_bias": True, "use_qalora": True}, "lora_bias, use_qalora"),
        (
            {"init_lora_weights": "PiSSA_niter_4"},
            "init_lora_weights PiSSA_niter_4 (it changed the base's weights, too)",
        ),
        ({"init_lora_weights": "kasa"}, "init_lora_weights kasa (it changed the base's weights, too)"),
    ],
)
def test_what_is_more_than_lora_is_named(values: dict[str, object], found: str | None):
    assert unsupported_kind(values) == found


def test_target_parameters_are_refused_by_name_before_shapes_are_looked_at(folder: Path):
    tensors = load_file(folder / "adapter_model.safetensors")
    stacked = {name: tensor.repeat(2, 1) if ".lora_A." in name else tensor for name, tensor in tensors.items()}
    save_file(stacked, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({**plain, "target_parameters": ["mlp.experts.gate_up_proj"]}))
    with pytest.raises(InputError, match=r"has target_parameters \['mlp\.experts\.gate_up_proj'\]: it changes param"):
        open_adapter(folder)
    file.write_text(json.dumps({**plain, "target_parameters": []}))
    with pytest.raises(InputError, match="expected rank"):
        open_adapter(folder)


def test_other_kinds_are_refused(tmp_path: Path):
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    get_peft_model(base, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected the peft_type LORA, found 'PROMPT_TUNING'"):
        open_adapter(tmp_path)
    with pytest.raises(MissingInput, match=r"adapter_config\.json is missing"):
        open_adapter(tmp_path / "nothing")
