"""A config.json is read as transformers reads it, or refused with the key, what was expected and what was found."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.families import FAMILIES
from alpaca.errors import InputError

LLAMA = {
    "model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 120, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_dim": 80,
    "vocab_size": 120, "max_position_embeddings": 64,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 120}
ABSENT = object()
MODELS: dict[str, dict[str, object]] = {
    "LLaMA": LLAMA,
    "every head its own key": {**LLAMA, "num_key_value_heads": ABSENT},
    "null for key heads": {**LLAMA, "num_key_value_heads": None},
    "null for the head's width": {**LLAMA, "head_dim": None},
    "a head width of its own": {**LLAMA, "head_dim": 16},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "defaults": {**LLAMA, "rms_norm_eps": ABSENT, "max_position_embeddings": ABSENT, "hidden_act": ABSENT},
    "swish": {**LLAMA, "hidden_act": "swish"},
    "Mistral": {**LLAMA, "model_type": "mistral"},
    "Mistral without key heads": {
        **LLAMA, "model_type": "mistral", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": ABSENT,
    },
    "Mistral without a context": {**LLAMA, "model_type": "mistral", "max_position_embeddings": ABSENT},
    "Mistral has no biases": {**LLAMA, "model_type": "mistral", "attention_bias": True, "mlp_bias": True},
    "Qwen 2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen 2 without key heads": {
        **LLAMA, "model_type": "qwen2", "hidden_size": 128, "num_attention_heads": 32, "num_key_value_heads": ABSENT,
    },
    "Qwen 2 with a null for them": {**LLAMA, "model_type": "qwen2", "num_key_value_heads": None},
    "Qwen 2 has its own biases": {**LLAMA, "model_type": "qwen2", "attention_bias": True, "mlp_bias": True},
    "Qwen 3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "Qwen 3 without a head width": {**LLAMA, "model_type": "qwen3"},
    "Qwen 3 with biases": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "Phi 3": {**LLAMA, "model_type": "phi3", "pad_token_id": 0},
    "Phi 3, defaults": {
        **LLAMA, "model_type": "phi3", "pad_token_id": 0, "rms_norm_eps": ABSENT, "max_position_embeddings": ABSENT,
    },
    "Phi 3, parts of heads": {
        **LLAMA, "model_type": "phi3", "pad_token_id": 0, "rope_parameters": {"partial_rotary_factor": 0.5},
    },
    "Mistral with a window": {**LLAMA, "model_type": "mistral", "sliding_window": 32},
    "Mistral without a window": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "Ministral": {**LLAMA, "model_type": "ministral", "head_dim": 8, "sliding_window": 32},
    "Ministral, layers listed": {
        **LLAMA, "model_type": "ministral", "head_dim": 8, "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Qwen 2 with windows": {
        **LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1,
    },
    "Qwen 2 with windows from a late layer on": {
        **LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32,
    },
    "Qwen 3, layers listed": {
        **LLAMA, "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma": {**LLAMA, "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "head_dim": 16},
    "Gemma, defaults": {
        **LLAMA, "model_type": "gemma", "num_attention_heads": 16, "num_key_value_heads": ABSENT,
        "max_position_embeddings": ABSENT, "rms_norm_eps": ABSENT,
    },
    "Gemma 2": {**LLAMA, "model_type": "gemma2", "head_dim": 16, "sliding_window": 32, "attention_bias": True},
    "Gemma 2, defaults": {
        **LLAMA, "model_type": "gemma2", "num_attention_heads": 8, "num_key_value_heads": ABSENT,
        "max_position_embeddings": ABSENT, "num_hidden_layers": 3,
    },
    "Gemma 2, no caps": {
        **LLAMA, "model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "query_pre_attn_scalar": 144, "tie_word_embeddings": False, "hidden_activation": "gelu",
    },
    "Gemma 3": {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 32},
    "Gemma 3, older names": {
        **LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 32, "sliding_window_pattern": 2,
        "rope_theta": 5000.0, "rope_local_base_freq": 70.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "Gemma 3, an object for each kind of layer": {
        **LLAMA, "model_type": "gemma3_text", "sliding_window": 32, "final_logit_softcapping": 9.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
        },
    },
    "SmolLM 3": {**LLAMA, "model_type": "smollm3", "pad_token_id": 0, "num_hidden_layers": 5},
    "SmolLM 3, defaults": {
        **LLAMA, "model_type": "smollm3", "pad_token_id": 0, "num_attention_heads": 8, "num_key_value_heads": ABSENT,
        "max_position_embeddings": ABSENT, "no_rope_layer_interval": 2,
    },
    "SmolLM 3 with windows": {
        **LLAMA, "model_type": "smollm3", "pad_token_id": 0, "use_sliding_window": True,
        "sliding_window": 32, "no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "Granite": {
        **LLAMA, "model_type": "granite", "attention_multiplier": 0.3, "embedding_multiplier": 3, "mlp_bias": True,
        "residual_multiplier": 0.4, "logits_scaling": 2.5,
    },
    "Granite, defaults": {**LLAMA, "model_type": "granite"},
    "OLMo 2": {**LLAMA, "model_type": "olmo2", "attention_bias": True},
    "OLMo 2, defaults": {**LLAMA, "model_type": "olmo2", "rms_norm_eps": ABSENT, "max_position_embeddings": ABSENT},
    "EXAONE 4": {**LLAMA, "model_type": "exaone4", "num_hidden_layers": 5, "sliding_window": 32},
    "EXAONE 4, a pattern": {
        **LLAMA, "model_type": "exaone4", "num_hidden_layers": 5, "sliding_window": 32, "sliding_window_pattern": 2,
    },
    "EXAONE 4, a pattern of letters, layers listed": {
        **LLAMA, "model_type": "exaone4", "sliding_window": 32, "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "EXAONE 4 without windows or a pattern": {
        **LLAMA, "model_type": "exaone4", "sliding_window": None, "sliding_window_pattern": None,
        "layer_types": ["full_attention"] * 2,
    },
    "EXAONE 4 without windows": {
        **LLAMA, "model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2,
    },
    "Mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 3},
    "Mixtral, defaults": {
        **LLAMA, "model_type": "mixtral", "num_attention_heads": 8, "num_key_value_heads": ABSENT,
        "max_position_embeddings": ABSENT, "rms_norm_eps": ABSENT, "sliding_window": 32,
    },
    "Qwen 3 with experts": {
        **LLAMA, "model_type": "qwen3_moe", "num_experts": 5, "moe_intermediate_size": 24, "num_experts_per_tok": 3,
        "norm_topk_prob": True, "head_dim": 16,
    },
    "Qwen 3 with experts, defaults": {
        **LLAMA, "model_type": "qwen3_moe", "num_attention_heads": 8, "num_key_value_heads": ABSENT, "num_experts": 9,
        "max_position_embeddings": ABSENT, "moe_intermediate_size": ABSENT, "use_sliding_window": True,
        "sliding_window": 32, "attention_bias": True,
    },
    "OPT": OPT,
    "OPT, head of its own": {**OPT, "tie_word_embeddings": False},
    "OPT, narrow embedding": {**OPT, "word_embed_proj_dim": 24},
    "OPT, narrow embedding and a head": {**OPT, "word_embed_proj_dim": 24, "tie_word_embeddings": False},
    "OPT, null for the embedding's width": {**OPT, "word_embed_proj_dim": None},
    "OPT, norms after": {**OPT, "do_layer_norm_before": False},
    "OPT, last norm removed": {**OPT, "_remove_final_layer_norm": True},
    "OPT without biases": {**OPT, "enable_bias": False},
    "BLOOM": BLOOM,
    "BLOOM, head of its own": {**BLOOM, "tie_word_embeddings": False},
    "BLOOM, old name of the width": {**BLOOM, "hidden_size": 96, "n_embed": 48},
    "BLOOM, a null under the old name": {**BLOOM, "n_embed": None},
    "BLOOM, new names": {
        **BLOOM, "n_layer": ABSENT, "n_head": ABSENT, "num_hidden_layers": 3, "num_attention_heads": 8,
    },
    "BLOOM, both names": {**BLOOM, "num_hidden_layers": 3, "num_attention_heads": 8},
}  # fmt: skip
REFUSED = {
    "no layers": ({"num_hidden_layers": 0}, "a whole number from 1 to 16,384 for 'num_hidden_layers', found 0"),
    "fewer than none": ({"num_hidden_layers": -1}, "for 'num_hidden_layers', found -1"),
    "layers as text": ({"num_hidden_layers": "2"}, "for 'num_hidden_layers', found '2'"),
    "layers as a fraction": ({"num_hidden_layers": 2.0}, "for 'num_hidden_layers', found 2.0"),
    "true for a number": ({"num_hidden_layers": True}, "for 'num_hidden_layers', found True"),
    "layers null": ({"num_hidden_layers": None}, "for 'num_hidden_layers', found None"),
    "layers missing": ({"num_hidden_layers": ABSENT}, "'num_hidden_layers' is missing"),
    "width missing": ({"hidden_size": ABSENT}, "'hidden_size' is missing"),
    "vocabulary missing": ({"vocab_size": ABSENT}, "'vocab_size' is missing"),
    "feed-forward missing": ({"intermediate_size": ABSENT}, "'intermediate_size' is missing"),
    "absurd": ({"intermediate_size": 10**12}, "from 1 to .* for 'intermediate_size', found 1000000000000"),
    "beyond every machine": ({"vocab_size": 10**30}, "for 'vocab_size'"),
    "context null": ({"max_position_embeddings": None}, "for 'max_position_embeddings', found None"),
    "context zero": ({"max_position_embeddings": 0}, "for 'max_position_embeddings', found 0"),
    "context text": ({"max_position_embeddings": "2048"}, "for 'max_position_embeddings', found '2048'"),
    "heads that do not divide": (
        {"num_key_value_heads": 4}, "num_attention_heads to be a multiple of num_key_value_heads, found 6 and 4",
    ),
    "more key heads": ({"num_key_value_heads": 12}, "a multiple of num_key_value_heads, found 6 and 12"),
    "no key heads": ({"num_key_value_heads": 0}, "for 'num_key_value_heads', found 0"),
    "heads that do not make the width": ({"num_attention_heads": 10}, "does not divide into num_attention_heads 10"),
    "an odd head": ({"head_dim": 7}, "an even head width, .* found 7"),
    "an odd head that follows": ({"hidden_size": 54}, "an even head width, .* found 9"),
    "no head": ({"head_dim": 0}, "for 'head_dim', found 0"),
    "epsilon null": ({"rms_norm_eps": None}, "'rms_norm_eps', found None"),
    "epsilon text": ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps', found '1e-5'"),
    "epsilon whole": ({"rms_norm_eps": 0}, "'rms_norm_eps', found 0"),
    "epsilon below": ({"rms_norm_eps": -1e-5}, "'rms_norm_eps', found -1e-05"),
    "epsilon not a number": ({"rms_norm_eps": math.nan}, "'rms_norm_eps', found nan"),
    "epsilon without end": ({"rms_norm_eps": math.inf}, "'rms_norm_eps', found inf"),
    "tied as text": ({"tie_word_embeddings": "true"}, "true or false for 'tie_word_embeddings', found 'true'"),
    "tied as a number": ({"tie_word_embeddings": 1}, "true or false for 'tie_word_embeddings', found 1"),
    "tied null": ({"tie_word_embeddings": None}, "true or false for 'tie_word_embeddings', found None"),
    "biases null": ({"attention_bias": None}, "true or false for 'attention_bias', found None"),
    "activation null": ({"hidden_act": None}, "an activation for 'hidden_act', found None"),
    "quantized by a word": ({"quantization_config": "nf4"}, "an object for 'quantization_config', found 'nf4'"),
    "a type that is no name": ({"model_type": 3}, "model_type 3 is not known here"),
    "no type": ({"model_type": ABSENT}, "model_type None is not known here; known are llama, mistral"),
    "a window of text": ({"model_type": "mistral", "sliding_window": "9"}, "'sliding_window', found '9'"),
    "an empty window": ({"model_type": "mistral", "sliding_window": 0}, "'sliding_window', found 0"),
    "layers of an unknown kind": (
        {"model_type": "qwen3", "head_dim": 8, "layer_types": ["linear_attention"] * 2}, "sliding_attention or full",
    ),
    "too few layers listed": ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "expected 2 names"),
    "a windowed layer without a window": (
        {"model_type": "gemma2", "sliding_window": None},
        "some layers have a sliding window, and 'sliding_window' is null",
    ),
    "a pattern of letters": ({"model_type": "exaone4", "sliding_window_pattern": "LG"}, "'sliding_window_pattern'"),
    "too few rotations listed": (
        {"model_type": "smollm3", "pad_token_id": 0, "no_rope_layers": [1]}, "a number for each layer in 'no_rope_lay",
    ),
    "a cap of text": (
        {"model_type": "gemma2", "final_logit_softcapping": "30"}, "above 0 for 'final_logit_softcapping', found '30'",
    ),
    "more experts a token than there are": (
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "gets 3 experts of 2",
    ),
    "longrope of another head": (
        {"model_type": "phi3", "pad_token_id": 0,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "expected 4 factors of longrope",
    ),
    "longrope without factors": (
        {"model_type": "phi3", "pad_token_id": 0, "rope_scaling": {"type": "longrope"}}, "needs a list of numbers",
    ),
    "another type": ({"model_type": "mine"}, "model_type 'mine' is not known here"),
    "rotary settings": ({"rope_theta": "500"}, "needs a number above 0 for 'rope_theta'; found '500'"),
}  # fmt: skip
ONLY_OURS = {  # transformers would go on, with numbers that mean nothing
    "no layers", "fewer than none", "layers missing", "width missing", "vocabulary missing", "feed-forward missing",
    "absurd", "beyond every machine", "context zero", "heads that do not divide", "more key heads", "no key heads",
    "an odd head", "an odd head that follows", "an empty window", "layers of an unknown kind",
    "a windowed layer without a window", "too few rotations listed", "more experts a token than there are",
    "a pattern of letters", "no head", "epsilon below", "epsilon not a number",
    "epsilon without end", "rotary settings",
}  # fmt: skip


def given(config: dict[str, object], **changes: object) -> dict[str, object]:
    """A config of its own: transformers writes into the objects it is given."""
    return copy.deepcopy({name: value for name, value in {**config, **changes}.items() if value is not ABSENT})


def read_with_transformers(config: dict[str, object], folder: Path):
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def shapes_of_transformers(config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's parameters, one of each tied pair."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.fast_rows(17)
def test_tensors_and_counts_are_those_of_transformers(tmp_path, name):
    config = given(MODELS[name])
    model = ModelDescription.from_config(config)
    expected = shapes_of_transformers(read_with_transformers(config, tmp_path))
    if model.model_type == "bloom":  # its published files lack the prefix
        expected = {key.removeprefix("transformer."): shape for key, shape in expected.items()}
    if model.num_experts:
        expected = apart(expected, model)
    assert model.tensor_shapes() == expected
    assert model.num_parameters == sum(math.prod(shape) for shape in expected.values())


def apart(shapes: dict[str, tuple[int, ...]], model: ModelDescription) -> dict[str, tuple[int, ...]]:
    """transformers lays experts end to end in memory, and writes each by itself, as they are published."""
    names = model.family.experts
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer, _, tensor = name.partition("mlp.")
        if tensor == "gate.weight":
            found[f"{layer}{names.router}.weight"] = shape
        elif tensor.startswith("experts."):
            parts = [names.gate, names.up] if "gate_up" in tensor else [names.down]
            each = shape[1] // len(parts), shape[2]
            experts = (f"{layer}{names.experts}.{expert}" for expert in range(shape[0]))
            found |= {f"{expert}.{part}.weight": each for expert in experts for part in parts}
        else:
            found[name] = shape
    return found


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("OPT", "BLOOM"))])
def test_constants_are_those_of_transformers(tmp_path, name):
    config = given(MODELS[name])
    model, theirs = ModelDescription.from_config(config), read_with_transformers(config, tmp_path)
    assert (model.norm_eps, model.max_context) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert model.ties_embeddings == theirs.tie_word_embeddings
    assert model.num_kv_heads == theirs.num_key_value_heads
    activation = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert model.activation == {"swish": "silu"}.get(activation, activation)
    ropes = theirs.rope_parameters
    if model.windowed_rope is None:
        assert model.rope.theta == ropes["rope_theta"]
    else:
        pairs = (model.rope, "full_attention"), (model.windowed_rope, "sliding_attention")
        assert all((r.theta, r.kind) == (ropes[key]["rope_theta"], ropes[key]["rope_type"]) for r, key in pairs)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("OPT", "BLOOM"))])
@pytest.mark.fast_rows(14)
def test_layers_and_multipliers_are_those_of_transformers(tmp_path, name):
    """Read off its modules: their configs alone do not say what is used."""
    config = given(MODELS[name])
    model, theirs = ModelDescription.from_config(config), read_with_transformers(config, tmp_path)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(theirs)
    attentions = [layer.self_attn for layer in made.model.layers]
    listed = getattr(theirs, "layer_types", None) or [None] * len(attentions)
    if model.model_type in ("mistral", "phi3", "mixtral", "qwen3_moe"):  # one mask for all layers
        listed = ["sliding_attention" if theirs.sliding_window is not None else None] * len(attentions)
    windows = [theirs.sliding_window if kind == "sliding_attention" else 0 for kind in listed]
    assert [model.window(layer) for layer in range(model.num_layers)] == [
        window if window < model.max_context else 0 for window in windows
    ]
    assert {model.attention_scale} == {attention.scaling for attention in attentions}
    if model.model_type == "smollm3":
        assert [model.rope_of(layer) is not None for layer in range(model.num_layers)] == [
            bool(attention.use_rope) for attention in attentions
        ]
    for ours, key in (("logits_softcap", "final_logit_softcapping"), ("logits_divisor", "logits_scaling"),
                      ("embedding_multiplier",) * 2, ("residual_multiplier",) * 2):  # fmt: skip
        assert getattr(model, ours) == (getattr(theirs, key, getattr(ModelDescription, ours)) or 0), key


def test_every_family_is_in_the_table():
    assert {config["model_type"] for config in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_key_and_value(name):
    changes, message = REFUSED[name]
    with pytest.raises(InputError, match=f"^here/config.json: .*{message}"):
        ModelDescription.from_config(given(LLAMA, **changes), source="here/config.json")


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ONLY_OURS])
def test_transformers_refuses_it_too(tmp_path, name):
    """Or the row belongs to ONLY_OURS, with a reason to be stricter."""
    changes, _ = REFUSED[name]
    with pytest.raises((StrictDataclassError, ValueError, AttributeError, KeyError), match=r"\w"):
        read_with_transformers(given(LLAMA, **changes), tmp_path)


@pytest.mark.parametrize("head_width", [8, 16])
def test_cache_elements_of_one_token(head_width):
    model = ModelDescription.from_config(given(LLAMA, head_dim=head_width))
    assert model.kv_elements_per_token() == 2 * 2 * 2 * head_width  # keys and values, layers, key heads


def test_a_longer_vocabulary_changes_embedding_and_head_alone():
    model = ModelDescription.from_config(given(LLAMA))
    grown = model.with_vocab(130)
    changed = {name for name, shape in grown.tensor_shapes().items() if model.tensor_shapes()[name] != shape}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    assert grown.num_parameters - model.num_parameters == 2 * 10 * 48


def test_quantized_folders_are_named_by_their_method():
    assert ModelDescription.from_config(given(LLAMA)).quantized_by == ""
    for config, method in [
        ({"quant_method": "gptq"}, "gptq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "an unnamed method"),
    ]:
        assert ModelDescription.from_config(given(LLAMA, quantization_config=config)).quantized_by == method


def test_the_largest_sizes_there_may_be_stay_within_64_bits():
    """Else a config could make a plan overflow before a file is looked at."""
    most = ModelDescription.from_config(
        given(LLAMA, hidden_size=1 << 18, intermediate_size=1 << 22, num_hidden_layers=1 << 14, vocab_size=1 << 28)
        | {"num_attention_heads": 1 << 11, "num_key_value_heads": 1 << 11}
    )
    assert 4 * most.num_parameters < 2**63
