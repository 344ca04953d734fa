"""Folders as other tools leave them: which file counts, under which names, and what is no model at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alpaca.errors import InputError
from alpaca.formats.hf.loading import load_causal_lm
from alpaca.formats.hf.naming import find_names
from alpaca.formats.hf.pickled import open_model_weights, opens_as_stored
from tests.formats.hf.test_saved import IDS, save_whole

LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
TIED = {**LLAMA, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole(tmp_path_factory.mktemp("naming") / "whole")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole(tmp_path_factory.mktemp("naming") / "tied", tie_word_embeddings=True)


def write_renamed(source: Path, folder: Path, rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """A copy of a folder with other names; the tensors by their plain ones."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "a module of its own": lambda name: f"model.{name}",
    "a vision model's text part": lambda name: f"language_model.{name}",
    "a vision model's text part, newer": lambda name: name.replace("model.", "model.language_model.", 1),
    "a whole text part in a vision model": lambda name: f"model.language_model.{name}",
    "TRL": lambda name: f"pretrained_model.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('layers.1.', 'layers.1._fsdp_wrapped_module.')}",
    "one layer of FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._fpw_module."),
    "gradient checkpointing": lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "a bare model with its head": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_are_read_as_the_models_own(wrapper: str, whole: Path, tmp_path: Path):
    expected = write_renamed(whole, tmp_path / "w", WRAPPERS[wrapper])
    weights = open_model_weights(tmp_path / "w")
    assert set(weights.names) == {spec.name for spec in weights.specs()} == set(expected)
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in expected.items())


def test_transformers_loads_a_wrapped_model_from_what_is_read_here(whole: Path, tmp_path: Path):
    write_renamed(whole, tmp_path / "w", WRAPPERS["PEFT"])
    model, found = load_causal_lm(tmp_path / "w", dtype=torch.float32, unpacks=False)
    assert not found["missing_keys"]
    plain = AutoModelForCausalLM.from_pretrained(whole)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("wrapper", ["", "pretrained_model."])
def test_a_value_head_is_left_out_and_logged(wrapper: str, whole: Path, tmp_path: Path, caplog):
    expected = write_renamed(whole, tmp_path / "w", lambda name: wrapper + name)
    beside = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    save_file(load_file(tmp_path / "w" / "model.safetensors") | beside, tmp_path / "w" / "model.safetensors")
    with caplog.at_level("INFO"):
        weights = open_model_weights(tmp_path / "w")
    assert set(weights.names) == {spec.name for spec in weights.specs()} == set(expected)
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in expected.items())
    assert "v_head.summary.weight of TRL's value head are not read" in caplog.text
    assert not opens_as_stored(tmp_path / "w")


def test_a_bare_tied_model_is_whole(tied: Path, tmp_path: Path):
    expected = write_renamed(tied, tmp_path / "w", WRAPPERS["a bare model with its head"])
    assert set(open_model_weights(tmp_path / "w").names) == set(expected)


def test_the_head_alone_serves_as_the_embedding_of_a_tied_model(tied: Path, tmp_path: Path):
    expected = write_renamed(tied, tmp_path / "w", lambda name: name.replace("model.embed_tokens", "lm_head"))
    weights = open_model_weights(tmp_path / "w")
    assert torch.equal(weights.tensor("model.embed_tokens.weight"), expected["model.embed_tokens.weight"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "w")
    assert torch.equal(loaded.get_input_embeddings().weight, expected["model.embed_tokens.weight"])


PLAIN = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]


def test_plain_names_and_half_wrapped_ones_stay_as_they_are():
    assert find_names(PLAIN, LLAMA, where=Path("w")) == {}
    half = [f"module.{PLAIN[0]}", *PLAIN[1:]]
    assert find_names(half, LLAMA, where=Path("w")) == {}


REFUSED = {
    "an adapter inside its base": (
        [*PLAIN, "model.layers.0.mlp.up_proj.lora_A.default.weight"], "model with an adapter that was not merged",
    ),
    "a base layer": (
        ["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"], "model with an adapter that was not merged",
    ),
    "an adapter alone": (
        ["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"], "LoRA adapter without its adapter_config.json",
    ),
    "no head": ([name.removeprefix("model.") for name in PLAIN[:3]], "bare model without lm_head.weight"),
    "a classifier": ([*PLAIN[:3], "score.weight"], r"classifier .*'score\.weight' in place of lm_head\.weight"),
    "a wrapped classifier": ([f"module.{name}" for name in [*PLAIN[:3], "score.weight"]], "classifier or reward model"),
    "a vision model": (
        ["model.visual.proj.weight", *(name.replace("model.", "model.language_model.") for name in PLAIN)],
        r"model that takes images or sound \('model\.visual\.proj\.weight'\)",
    ),
    "flat parameters": (["_fsdp_wrapped_module._flat_param"], "parameters that FSDP keeps flat"),
    "twice": ([*PLAIN, "_orig_mod.lm_head.weight"], "under two names, plain and wrapped"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_whole_model_is_named(kind: str):
    names, message = REFUSED[kind]
    with pytest.raises(InputError, match=f"^w holds .*{message}"):
        find_names(names, LLAMA, where=Path("w"))


# Which file ------------------------------------------------------------------------------------------------------


def write_index(folder: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))


def test_one_file_counts_before_an_older_index_as_in_transformers(whole: Path, tmp_path: Path, caplog):
    folder = shutil.copytree(whole, tmp_path / "w")
    tensors = load_file(whole / "model.safetensors")
    write_index(folder, "model-00001-of-00001.safetensors", {name: 2 * tensor for name, tensor in tensors.items()})
    found = open_model_weights(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(found.tensor(name), loaded[name]) for name in found.names)
    assert "model.safetensors is read, and model.safetensors.index.json beside it is not" in caplog.text


def test_an_index_says_the_files_and_the_files_say_the_tensors(whole: Path, tmp_path: Path):
    """Merging tools leave an index that lacks some names, or has them in another file: transformers does not mind."""
    folder = shutil.copytree(whole, tmp_path / "w")
    (folder / "model.safetensors").unlink()
    tensors = load_file(whole / "model.safetensors")
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:5]}, folder / "a.safetensors", metadata={"format": "pt"})
    save_file({name: tensors[name] for name in names[5:]}, folder / "b.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {names[0]: "b.safetensors", names[6]: "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_model_weights(folder)
    assert set(found.names) == set(tensors)
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in tensors.items())
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_another_programs_safetensors_do_not_hide_pickles(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "w")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    found = open_model_weights(folder)
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in tensors.items())
