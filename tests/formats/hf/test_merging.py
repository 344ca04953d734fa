"""Merged weights: PEFT's own merge, on any base; a quantized base as bitsandbytes has it; no merge that is none."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from alpaca.errors import InputError, MissingInput
from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.export import merged_config
from alpaca.formats.hf.folder import WeightsFolder, fingerprint
from alpaca.formats.hf.merging import MergedWeights, open_merged, read_base_record
from alpaca.formats.hf.quantization import bitsandbytes_config, keep_trainable_on_cpu

IDS = [1, 5, 17, 130, 99, 42, 7, 101]
ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "v_proj", "fc1", "fc2"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
with_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(kind: str, *, vocab_size: int = 160, **values: object) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "opt":
        sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        return OPTForCausalLM(
            OPTConfig(vocab_size=vocab_size, word_embed_proj_dim=128, max_position_embeddings=64, init_std=0.1, **sizes)
        )
    if kind == "bloom":
        return BloomForCausalLM(
            BloomConfig(vocab_size=vocab_size, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1)
        )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"num_key_value_heads": 2, "initializer_range": 0.1, **sizes, **values}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes))


def save_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **values: object) -> Path:
    make_model(kind, **values).to(dtype).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, std: float = 0.1, **values: object) -> Path:
    """PEFT's folder of an adapter that was trained: all its matrices, and magnitudes, away from where they start."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ALL["llama"], **values}
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
            elif "magnitude" in name:
                parameter *= 1 + std * torch.rand_like(parameter)
            elif (
                "modules_to_save" in name
                or "trainable_tokens" in name
                or (parameter.requires_grad and name.endswith("bias"))
            ):
                parameter += std * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([IDS])).logits[0].float()


def loaded_with(base: Path, tensors: MergedWeights, folder: Path) -> torch.nn.Module:
    """transformers' model of a folder that holds the merged tensors."""
    shutil.copytree(base, folder)
    merged = {name: tensors.tensor(name).contiguous().clone() for name in tensors.names}
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "lora", base)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(trained, tmp_path / "adapter")


# Equal to PEFT --------------------------------------------------------------------------------------------------

CASES = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.mlp.up_proj": 3}}),
    "dora": ("llama", {"use_dora": True}),
    "dora rslora": ("llama", {"use_dora": True, "use_rslora": True}),
    "opt": ("opt", {"target_modules": ALL["opt"]}),
    "opt dora": ("opt", {"target_modules": ALL["opt"], "use_dora": True}),
    "bloom": ("bloom", {"target_modules": ALL["bloom"]}),
    "biases": ("opt", {"target_modules": ALL["opt"], "bias": "all"}),
    "head and embedding": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "rows": ("llama", {"trainable_token_indices": [3, 7]}),
    "rows of both": ("llama", {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [9]}}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.fast_rows(3)
def test_the_tensors_are_pefts_after_its_merge(case: str, tmp_path: Path):
    kind, values = CASES[case]
    base = save_base(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, **values)
    expected, before = merged_by_peft(base, adapter), WeightsFolder(base)
    merged = open_merged(base, adapter)
    assert merged.names == before.names
    changed = set()
    for spec in merged.specs():
        tensor = merged.tensor(spec.name)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
        assert torch.allclose(tensor, expected[spec.name], atol=1e-6), spec.name
        if not torch.equal(tensor, before.tensor(spec.name)):
            changed.add(spec.name)
    assert changed == {name for name, change in merged.changes.items() if change > 0}
    assert {f"{target}.weight" for target in open_adapter(adapter).targets} <= changed
    merged.require_change()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_rounded_once(dtype: torch.dtype, tmp_path: Path):
    """float32's sum, rounded to the nearest the dtype has: PEFT rounds what is added first, and is further off."""
    base = save_base(tmp_path / "base", "llama", dtype)
    adapter = save_adapter(tmp_path / "adapter", base)
    exact = merged_by_peft(base, adapter, torch.float32)
    merged = open_merged(base, adapter)
    for name in merged.names:
        assert torch.allclose(
            merged.tensor(name).float(), exact[name], atol=2**-24, rtol=torch.finfo(dtype).eps / 2 + 1e-6
        )


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_rows_come_in_blocks_that_make_no_difference(
    quantization: str, base: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, cut = (open_merged(base, trained, quantization=quantization) for _ in range(2))
    expected = {name: whole.tensor(name) for name in whole.names}
    again = {name: whole.tensor(name) for name in whole.names}
    monkeypatch.setattr("alpaca.formats.hf.merging._CHUNK_ELEMENTS", 64 * 7)
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
        assert torch.allclose(cut.tensor(name), tensor, atol=1e-6), name


def test_bloom_files_without_the_prefix_of_the_head(tmp_path: Path):
    """bigscience's own files name `h.0…`, the adapter `transformer.h.0…`."""
    base = save_base(tmp_path / "base", "bloom")
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=ALL["bloom"])
    expected = merged_by_peft(base, adapter)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, base / "model.safetensors"
    )
    merged = open_merged(base, adapter)
    assert len(merged.names) == len(tensors)
    for name in merged.names:
        assert torch.allclose(merged.tensor(name), expected[f"transformer.{name}"], atol=1e-6), name
    assert len(merged.changes) == 8


# Bases in 8 and 4 bit -------------------------------------------------------------------------------------------


@with_bitsandbytes
@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.fast_rows(2)
def test_a_quantized_base_is_merged_as_the_adapter_saw_it(quantization: str, kind: str, tmp_path: Path):
    """Logits of transformers' quantized model with PEFT's adapter; the unquantized base's are far from them."""
    base = save_base(tmp_path / "base", kind, torch.float16)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=ALL[kind][:2], std=0.02)
    with torch.compiler.set_stance("force_eager"):
        quantized = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=bitsandbytes_config(quantization, torch.float32)
        )
        if quantization == "nf4":
            keep_trainable_on_cpu(quantized)
        expected = logits(PeftModel.from_pretrained(quantized, adapter))
    found = loaded_with(base, open_merged(base, adapter, quantization=quantization), tmp_path / "merged")
    naive = loaded_with(base, open_merged(base, adapter, quantization="none"), tmp_path / "naive")
    error, naive_error = (float((logits(model) - expected).abs().max()) for model in (found, naive))
    scale = float(expected.abs().max())
    # bitsandbytes also rounds what goes into an 8-bit layer
    assert error < (1e-3 if quantization == "nf4" else 4e-2) * scale
    assert error < 0.05 * naive_error if quantization == "nf4" else error <= naive_error


@with_bitsandbytes
@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
def test_the_layers_that_are_quantized_are_transformers_own(kind: str, tmp_path: Path):
    from bitsandbytes.nn import Linear4bit

    base = save_base(tmp_path / "base", kind)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=ALL[kind][:1])
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=bitsandbytes_config("nf4", torch.float32), dtype=torch.float32
    )
    expected = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    merged, before = open_merged(base, adapter, quantization="nf4"), WeightsFolder(base)
    changed = {name for name in merged.names if not torch.equal(merged.tensor(name), before.tensor(name))}
    assert changed == {f"{name}.weight" for name in expected}
    assert len(merged.changes) == len(open_adapter(adapter).targets)


@pytest.mark.parametrize("where", [".", ".."])
def test_what_the_adapter_was_trained_on_is_read_from_its_record(where: str, base: Path, adapter: Path):
    assert read_base_record(adapter) == (None, None)
    assert open_merged(base, adapter).quantization == "none"
    record = adapter / where / "train_config.json"
    record.write_text(json.dumps({"method": "qlora", "base_quantization": "nf4", "bf16": True}))
    assert read_base_record(adapter) == ("nf4", torch.bfloat16)
    merged, by_hand = open_merged(base, adapter), open_merged(base, adapter, quantization="none")
    assert (merged.quantization, by_hand.quantization) == ("nf4", "none")
    name = "model.layers.0.self_attn.q_proj.weight"
    in_bfloat16 = MergedWeights(
        WeightsFolder(base), open_adapter(adapter), quantization="nf4", rounded_to=torch.bfloat16
    )
    in_float32 = MergedWeights(WeightsFolder(base), open_adapter(adapter), quantization="nf4")
    assert torch.equal(merged.tensor(name), in_bfloat16.tensor(name))
    assert not torch.equal(merged.tensor(name), in_float32.tensor(name))
    record.write_text(json.dumps({"base_quantization": "gptq"}))
    with pytest.raises(InputError, match="expected a base_quantization of none, int8, nf4, found 'gptq'"):
        open_merged(base, adapter)
    record.unlink()
    with pytest.raises(InputError, match="quantization must be one of none, int8, nf4; found 'fp4'"):
        open_merged(base, adapter, quantization="fp4")


# Refused --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_changes_nothing_is_refused(base: Path, tmp_path: Path):
    nothing = save_adapter(tmp_path / "zero", base, std=0.0)
    with pytest.raises(InputError, match=r"zero changes nothing: every lora_B is zero"):
        open_merged(base, nothing)
    magnitudes = open_merged(base, save_adapter(tmp_path / "dora", base, std=0.0, use_dora=True))
    for name in magnitudes.names:
        magnitudes.tensor(name)
    with pytest.raises(InputError, match=r"dora changes none of the 14 weights it is for"):
        magnitudes.require_change()
    moved = open_merged(base, save_adapter(tmp_path / "moved", base, std=1e-3, use_dora=True))
    moved.tensor("model.layers.0.self_attn.q_proj.weight")
    moved.require_change()


def test_a_change_that_rounding_swallows_is_refused(tmp_path: Path):
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "small", base, std=1e-9)
    merged = open_merged(base, adapter)
    tensors = {name: merged.tensor(name) for name in merged.names}
    assert all(torch.equal(tensor, WeightsFolder(base).tensor(name)) for name, tensor in tensors.items())
    with pytest.raises(InputError, match=r"changes none of the 14 weights .* smaller than torch.bfloat16 can tell"):
        merged.require_change()


def test_values_that_are_no_numbers_are_refused(base: Path, adapter: Path):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 1] = torch.nan
    save_file(tensors, file)
    merged = open_merged(base, adapter)
    with pytest.raises(InputError, match=r"makes model.layers.1.mlp.up_proj.weight infinite or no number"):
        merged.tensor("model.layers.1.mlp.up_proj.weight")


def test_another_models_adapter_is_refused(base: Path, trained: Path, tmp_path: Path):
    opt = save_base(tmp_path / "opt", "opt")
    with pytest.raises(InputError, match=r"changes model.layers.0.mlp.down_proj, .* and 11 more, which .*opt does not"):
        open_merged(opt, trained)
    wider = save_base(tmp_path / "wide", "llama", intermediate_size=96)
    with pytest.raises(InputError, match=r"0.mlp.down_proj.weight as a float matrix \[64, 128\]; .* \[64, 96\]"):
        open_merged(wider, trained)
    with pytest.raises(MissingInput, match=r"no folder .*nothing; expected a Hugging Face model"):
        open_merged(tmp_path / "nothing", trained)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"fan_in_fan_out": True}, "asks for fan_in_fan_out"),
        ({"alora_invocation_tokens": [1]}, "asks for alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights pissa_niter_4 \(it changed the base's weights"),
        ({"use_dora": True}, r"expected the magnitudes \[64\] \(DoRA\) for .*down_proj.weight, found none"),
    ],
)
def test_other_kinds_of_adapters_are_refused(values: dict[str, object], text: str, base: Path, adapter: Path):
    edit_config(adapter, **values)
    with pytest.raises(InputError, match=text):
        open_merged(base, adapter)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapted_embedding_is_refused(base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "a", base, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(InputError, match=r"it holds 'model.embed_tokens.lora_embedding_A' \(2 such\)"):
        open_merged(base, adapter)


def test_tied_embeddings(tmp_path: Path):
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in WeightsFolder(base).names
    plain = save_adapter(tmp_path / "plain", base)
    found = loaded_with(base, open_merged(base, plain), tmp_path / "merged")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain)
    assert torch.allclose(logits(found), logits(model), atol=1e-4)


ENDS = {
    "the head": {"modules_to_save": ["lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:.*tied:UserWarning")
def test_rows_of_a_tied_base_stay_one(tmp_path: Path):
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, trainable_token_indices=[3, 7])
    expected, merged = merged_by_peft(base, adapter), open_merged(base, adapter)
    assert merged.is_tied
    name = "model.embed_tokens.weight"
    changed = (merged.tensor(name) != WeightsFolder(base).tensor(name)).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [3, 7]
    assert torch.equal(merged.tensor(name), expected[name])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, r"expected 2 ids of tokens for model\.embed_tokens in 'trainable_token_indices', found None"),
        ([3], r"expected 2 ids of tokens .* found \[3\]"),
        ([3, 10**6], r"up to number 1000000, .* they are not of one model"),
    ],
)
def test_rows_without_their_ids_are_refused(ids: list[int] | None, message: str, tmp_path: Path):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, trainable_token_indices=[3, 7])
    edit_config(adapter, trainable_token_indices=ids)
    with pytest.raises(InputError, match=message):
        open_merged(base, adapter)


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:.*tied:UserWarning")
@pytest.mark.parametrize("ends", ENDS)
def test_an_adapter_that_trains_an_end_of_a_tied_base_unties_it(ends: str, tmp_path: Path):
    """As PEFT's merge leaves the two matrices; transformers reads them back so only if the config says it, too."""
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, **ENDS[ends])
    expected, merged = merged_by_peft(base, adapter), open_merged(base, adapter)
    assert merged.unties
    assert not torch.equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert set(merged.names) == set(expected)
    for name in merged.names:
        assert torch.allclose(merged.tensor(name), expected[name], atol=1e-6), name
    assert merged_config(merged, merged.specs())["tie_word_embeddings"] is False


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_low_rank_change_of_a_tied_head_leaves_the_embedding_alone(tmp_path: Path):
    """What the unmerged adapter computes; PEFT's own merge would change the embedding with the head."""
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    merged = open_merged(base, adapter)
    change = open_adapter(adapter).low_rank("lm_head")
    embedding = WeightsFolder(base).tensor("model.embed_tokens.weight")
    assert torch.equal(merged.tensor("model.embed_tokens.weight"), embedding)
    assert torch.allclose(merged.tensor("lm_head.weight"), embedding + change.scale * change.b @ change.a, atol=1e-6)


def test_an_equal_head_in_the_file_stays_tied_and_another_does_not(tmp_path: Path):
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base)
    tensors = load_file(base / "model.safetensors")
    for factor, is_tied in ((1, True), (2, False)):
        save_file(
            {**tensors, "lm_head.weight": factor * tensors["model.embed_tokens.weight"]}, base / "model.safetensors"
        )
        merged = open_merged(base, adapter)
        assert merged.is_tied == is_tied
        assert merged_config(merged, merged.specs())["tie_word_embeddings"] == is_tied


def test_an_embedding_that_grew_with_the_adapter(base: Path, tmp_path: Path):
    """alpaca-lora's users who added a token: PEFT saves both tables whole."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(161, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.ones_(adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default").weight)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged = open_merged(base, tmp_path / "adapter")
    assert merged.num_added_rows == 1
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    expected = adapted.merge_and_unload().state_dict()
    for spec in merged.specs():
        assert spec.shape == tuple(merged.tensor(spec.name).shape)
        assert torch.allclose(merged.tensor(spec.name), expected[spec.name], atol=1e-6)
        assert (spec.shape[0] == 161) == (spec.name in tables)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"adds rows at one end of the model only \(model.embed_tokens.weight \[161"):
        open_merged(base, tmp_path / "adapter")


# Another base of the same shapes --------------------------------------------------------------------------------


def test_a_base_that_is_not_the_recorded_one_is_refused_unless_it_is_named(base: Path, adapter: Path, tmp_path, caplog):
    edit_config(adapter, base_model_name_or_path="weights/its-own")
    record = adapter / "train_config.json"
    record.write_text(json.dumps({"base_quantization": "none", "base_fingerprint": fingerprint(base)}))
    open_merged(base, adapter)
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, other / "model.safetensors")
    for given in (other, WeightsFolder(other)):
        with pytest.raises(InputError, match=r"other is not the model .*adapter was trained on \(weights/its-own\)"):
            open_merged(given, adapter)
    assert not caplog.records
    open_merged(other, adapter, base_is_named=True)
    assert re.search(r"other is not the model .* \(weights/its-own\).* Going on, since it was named", caplog.text)
    record.write_text("{}")  # of an older train.py
    open_merged(other, adapter)
