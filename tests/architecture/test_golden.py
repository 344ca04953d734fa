"""One config.json, many spellings, five readers: each cell has the right answer, and it is transformers' own.

A model of three layers is written once; each row edits its config.json. "ok" means that a reader takes the folder as
transformers computes it, "transformers" that the LLaMA engine leaves it to the transformers engine, and any other text
that the reader refuses it and says so.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from alpaca.errors import InputError, UnsupportedModel
from alpaca.formats.gguf import export as gguf_export
from alpaca.formats.hf.folder import WeightsFolder, read_description
from alpaca.formats.meta import from_hf
from alpaca.formats.meta import params as meta_params
from alpaca.serving.llama.network import rotary_frequencies
from alpaca.serving.llama.weights import read_llama, require_tensors
from alpaca.text.sentencepiece import write_llama_tokenizer
from alpaca.training.configuration.config import make_config
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.distributed import World
from alpaca.training.model.base import open_base
from alpaca.training.model.building import load_model
from alpaca.training.planning.workload import read_model

SIZES = dict(
    vocab_size=480, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LINEAR = {"type": "linear", "factor": 2.0}
GONE = object()  # a key that is taken out

OK = dict.fromkeys(("engine", "training", "planner", "gguf", "meta"), "ok")


def refused(text: str, **others: str) -> dict[str, str]:
    """All readers refuse with `text`, but those named."""
    return {**dict.fromkeys(OK, text), **others}


def biased(text: str) -> dict[str, str]:
    """What Meta's code does not compute; the folder has no such tensors, which the others then miss."""
    return {"engine": text, "training": text, "planner": "ok", "gguf": text, "meta": "which Meta's LLaMA has"}


def other_family(name: str) -> tuple[dict[str, object], dict[str, str]]:
    """Another family with LLaMA's tensors: what serves and trains takes it, and the exports name it."""
    return {"model_type": name}, {**OK, "gguf": f"model_type is '{name}', not llama", "meta": f"is '{name}', not llama"}


WHOLE = "expected a whole number from 1 to .* for '{}'"
MORE_LAYERS = r"holds weights of layer 2 \(counted from 0\), and its config.json says that the model has 2 layers"
ROWS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "as transformers 5 writes it": ({}, OK),
    "theta at the top": ({"rope_parameters": GONE, "rope_theta": 5e5}, OK),
    "theta at the top, scaling null": ({"rope_parameters": GONE, "rope_theta": 5e5, "rope_scaling": None}, OK),
    "no rope at all": ({"rope_parameters": GONE}, OK),
    "scaling with rope_type": (
        {"rope_parameters": GONE, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {**OK, "meta": "Meta's code cannot have the rope scaling"},
    ),
    "scaling with type": (
        {"rope_parameters": GONE, "rope_scaling": LINEAR},
        {**OK, "meta": "rope type 'linear' is not one of Meta's"},
    ),
    "scaling beside parameters replaces them": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": LINEAR},
        {**OK, "meta": "rope type 'linear' is not one of Meta's"},
    ),
    "parameters without a theta": ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 777.0}, OK),
    "a rope type that no export knows": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        {**OK, "gguf": "rope type 'yarn' is not one of", "meta": "rope type 'yarn' is not"},
    ),
    "a rope type nobody knows": (
        {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}},
        {"engine": "transformers", "training": "cannot be loaded", "planner": "ok",
         "gguf": "rope type 'spiral'", "meta": "rope type 'spiral'"},
    ),
    "linear without a factor": (
        {"rope_parameters": {"rope_type": "linear"}},
        refused("needs a number above 0 for 'factor'"),
    ),
    "theta as text": (
        {"rope_parameters": GONE, "rope_theta": "10000"},
        refused("needs a number above 0 for 'rope_theta'"),
    ),
    "no key/value heads, which are then the heads": (
        {"num_key_value_heads": GONE}, refused("k_proj.weight is", planner="ok"),
    ),
    "key/value heads null": (
        {"num_key_value_heads": None}, refused("k_proj.weight is", planner="ok"),
    ),
    "key/value heads that do not divide": (
        {"num_key_value_heads": 3}, refused("to be a multiple of num_key_value_heads"),
    ),
    "head_dim absent": ({"head_dim": GONE}, OK),
    "head_dim null": ({"head_dim": None}, OK),
    "head_dim odd": ({"head_dim": 7}, refused("expected an even head width")),
    "a width as text": ({"hidden_size": "32"}, refused(WHOLE.format("hidden_size"))),
    "layers as 3.0": ({"num_hidden_layers": 3.0}, refused(WHOLE.format("num_hidden_layers"))),
    "layers as true": (
        {"num_hidden_layers": True}, refused(WHOLE.format("num_hidden_layers")),
    ),
    "no layers": (
        {"num_hidden_layers": 0},
        refused(WHOLE.format("num_hidden_layers")),
    ),
    "fewer layers than the files have": ({"num_hidden_layers": 2}, refused(MORE_LAYERS, planner="ok")),
    "more layers than the files have": (
        {"num_hidden_layers": 4}, refused("lacks weights of its model: model.layers.3", planner="ok"),
    ),
    "another vocabulary": (
        {"vocab_size": 500},
        # Meta's files are written for the tokens that there are.
        refused("embed_tokens.weight is", planner="ok", meta="ok"),
    ),
    "another feed-forward width": (
        {"intermediate_size": 64}, refused("gate_proj.weight is", planner="ok"),
    ),
    "biases in attention": ({"attention_bias": True}, biased("lacks weights of its model: .*bias")),
    "swish, which is silu": ({"hidden_act": "swish"}, OK),
    "gelu": (
        {"hidden_act": "gelu"},
        {**OK, "gguf": "llama.cpp's LLaMA computes", "meta": "which Meta's LLaMA has not"},
    ),
    "eps as text": ({"rms_norm_eps": "1e-5"}, refused("for 'rms_norm_eps'")),
    "said to be tied, with a head of its own": ({"tie_word_embeddings": True}, OK),
    "tied said by text": ({"tie_word_embeddings": "false"}, refused("expected true or false")),
    "no hidden_size": ({"hidden_size": GONE}, refused("'hidden_size' is missing")),
    "not causal": (
        {"is_causal": False},
        {**OK, "engine": "transformers", "gguf": "its is_causal asks for", "meta": "is_causal, which Meta's LLaMA has"},
    ),
    "Mistral": other_family("mistral"),
    "SmolLM 3": other_family("smollm3"),
    "Granite": other_family("granite"),
    "another kind of model": (
        {"model_type": "mamba"},
        refused("its model_type is 'mamba'", engine="transformers", training="lacks weights|cannot be loaded",
                planner="model_type 'mamba' is not known"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "base"
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 5e5}
    LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).save_pretrained(folder)
    write_llama_tokenizer(sentencepiece_model, folder)
    return folder


def edit(written: Path, folder: Path, changes: dict[str, object]) -> Path:
    shutil.copytree(written, folder)
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def read_by_engine(folder: Path) -> None:
    require_tensors(WeightsFolder(folder), read_llama(folder))


def read_by_training(folder: Path) -> None:
    config = make_config({"model_name_or_path": str(folder), "data_path": "none", "method": "lora", "bf16": False})
    settings = make_settings(resolve(config, num_processes=1, device=torch.device("cpu")))
    load_model(open_base(settings.base), settings.model, World(rank=0, num_processes=1, device=torch.device("cpu")))


def read_by_gguf(folder: Path) -> None:
    source = gguf_export.Source(folder, WeightsFolder(folder), folder, "name")
    gguf_export.plan_tensors(gguf_export._read_model(source), source.weights, "f32")


def read_by_meta(folder: Path) -> None:
    model = read_description(folder, only="llama")
    if reason := meta_params.supports(model):
        raise InputError(reason)
    from_hf._check_tensors(WeightsFolder(folder), model.with_vocab(SIZES["vocab_size"]))
    shape = meta_params.meta_shape(model, num_rows=SIZES["vocab_size"])
    meta_params.make_params(model, shape, has_tiktoken=False, known_vocab=True)


READERS: dict[str, Callable[[Path], object]] = {
    "engine": read_by_engine,
    "training": read_by_training,
    "planner": read_model,
    "gguf": read_by_gguf,
    "meta": read_by_meta,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("row", ROWS)
def test_every_reader_gives_the_right_answer(row: str, reader: str, written: Path, tmp_path: Path):
    changes, answers = ROWS[row]
    folder = edit(written, tmp_path / "model", changes)
    if answers[reader] == "ok":
        READERS[reader](folder)
    elif answers[reader] == "transformers":
        with pytest.raises(UnsupportedModel, match=str(folder)):
            READERS[reader](folder)
    else:
        with pytest.raises(InputError, match=answers[reader]) as refusal:
            READERS[reader](folder)
        assert not isinstance(refusal.value, UnsupportedModel) or "model_type" in str(refusal.value)


@pytest.mark.parametrize(
    "row",
    [row for row, (changes, answers) in ROWS.items() if answers["engine"] == "ok" and "model_type" not in changes],
)
def test_what_is_taken_is_what_transformers_computes(row: str, written: Path, tmp_path: Path):
    folder = edit(written, tmp_path / "model", ROWS[row][0])
    found, config = read_llama(folder), AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    torch.testing.assert_close(rotary_frequencies(found), LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)
    assert (found.norm_eps, found.max_context) == (config.rms_norm_eps, config.max_position_embeddings)
