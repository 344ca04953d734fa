"""A folder holds exactly the tensors of its model; what is missing, further or of another shape is said."""

import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.families import FAMILIES
from alpaca.architecture.inventory import check_layers, check_tensors, untie
from alpaca.errors import InputError

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "vocab_size": 20,
}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MORE = {
    "rotary tables": {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": (2,) for n in range(5)},
    "a rotary table of the whole": {"model.rotary_emb.inv_freq": (2,)},
    "rotary tables by position": {"model.layers.0.self_attn.rotary_emb.cos_cached": (1, 1, 64, 4)},
    "what a mask was filled with": {"model.layers.0.self_attn.masked_bias": ()},
    "a value head": {"v_head.summary.weight": (1, 48)},
}
REFUSED = {
    "a bias": (
        {"model.layers.0.self_attn.q_proj.bias": (16,)}, r"here holds tensors that .* does not call for: .*q_proj.bias",
    ),
    "another part": ({"vision.weight": (3,)}, "does not call for: vision.weight; they are not of one model"),
    "a prefix": ({"_orig_mod.model.norm.weight": (16,)}, "does not call for: _orig_mod.model.norm.weight"),
    "many": ({f"t{n}": (1,) for n in range(9)}, "does not call for: t0, t1, t2, t3, t4 and 4 more"),
    "one missing": ({"model.layers.2.mlp.up_proj.weight": None}, "here lacks .*: model.layers.2.mlp.up_proj.weight;"),
    "no embedding": ({EMBEDDING: None}, "here lacks weights of its model: model.embed_tokens.weight; copy it again"),
    "no head": ({HEAD: None}, "here lacks weights of its model: lm_head.weight"),
    "another width": (
        {"model.layers.4.self_attn.k_proj.weight": (16, 16)},
        r"here: model.layers.4.self_attn.k_proj.weight is \[16, 16\], config.json makes it \[8, 16\]",
    ),
    "another number of axes": ({"model.norm.weight": (16, 1)}, r"model.norm.weight is \[16, 1\], .* makes it \[16\]"),
}  # fmt: skip


def describe(**changes: object) -> ModelDescription:
    return ModelDescription.from_config({"model_type": "llama", **SIZES, **changes})


def found_with(changes: dict[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...]]:
    """The whole model's shapes with some added, replaced, or (None) taken away."""
    return {name: shape for name, shape in {**describe().tensor_shapes(), **changes}.items() if shape is not None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_models_own_tensors_are_right(kind):
    sizes = {**SIZES, "ffn_dim": 24} if kind == "opt" else SIZES
    model = ModelDescription.from_config({"model_type": kind, **sizes})
    check_tensors(model, model.tensor_shapes(), where="here")


@pytest.mark.parametrize("name", MORE)
def test_stored_buffers_may_be_there(name):
    check_tensors(describe(), found_with(MORE[name]), where="here")


@pytest.mark.parametrize("name", REFUSED)
def test_any_difference_is_refused_by_name(name):
    changes, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        check_tensors(describe(), found_with(changes), where="here")


@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_further_layers_are_counted(num_layers):
    layers = "layer 4" if num_layers == 4 else f"layers {num_layers} to 4"
    message = rf"here holds weights of {layers} \(counted from 0\), and .* has {num_layers} layers"
    with pytest.raises(InputError, match=message):
        check_tensors(describe(num_hidden_layers=num_layers), found_with({}), where="here")
    unread = describe().tensor_shapes().keys() - describe(num_hidden_layers=num_layers).tensor_shapes().keys()
    with pytest.raises(InputError, match=message):
        check_layers(num_layers, unread, where="here")
    check_layers(5, unread, where="here")


def test_more_layers_than_the_files_hold_are_missing():
    with pytest.raises(InputError, match=r"here lacks .*: model\.layers\.5\.input_layernorm\.weight"):
        check_tensors(describe(num_hidden_layers=6), found_with({}), where="here")


def test_biases_are_part_of_a_model_that_asks_for_them():
    biased = describe(attention_bias=True, mlp_bias=True)
    check_tensors(biased, biased.tensor_shapes(), where="here")
    with pytest.raises(InputError, match=r"lacks weights of its model: model.layers.0.mlp.down_proj.bias"):
        check_tensors(biased, found_with({}), where="here")


# Tied embeddings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("head", ["none", "equal", "another"])
def test_a_head_is_tied_as_transformers_ties_it(tmp_path, flag, head):
    """Its number of parameters tells: one matrix or two."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=flag))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    heads = {"none": None, "equal": tensors[EMBEDDING].clone(), "another": torch.randn(20, 16)}
    tensors = {name: tensor for name, tensor in {**tensors, HEAD: heads[head]}.items() if tensor is not None}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    description = describe(tie_word_embeddings=flag)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    read = untie(description, shapes, has_equal_head=lambda: torch.equal(tensors[EMBEDDING], tensors[HEAD]))
    assert read.num_parameters == sum(parameter.numel() for parameter in loaded.parameters())
    if said["missing_keys"]:
        with pytest.raises(InputError, match=r"lacks weights of its model: lm_head\.weight"):
            check_tensors(read, shapes, where="here")
    else:
        check_tensors(read, shapes, where="here")


def test_values_are_compared_only_where_both_could_be_one():
    def never() -> bool:
        raise AssertionError("nothing is to be compared")

    tied, untied = describe(tie_word_embeddings=True), describe()
    assert untie(untied, untied.tensor_shapes(), has_equal_head=never) is untied
    assert untie(tied, tied.tensor_shapes(), has_equal_head=never) is tied
    longer = {**untied.tensor_shapes(), HEAD: (21, 16)}
    with pytest.raises(InputError, match=r"lm_head.weight is \[21, 16\], config.json makes it \[20, 16\]"):
        check_tensors(untie(tied, longer, has_equal_head=never), longer, where="here")


def test_shapes_hold_as_many_elements_as_the_description_counts():
    for tied in (False, True):
        model = describe(tie_word_embeddings=tied)
        assert model.num_parameters == sum(math.prod(shape) for shape in model.tensor_shapes().values())
