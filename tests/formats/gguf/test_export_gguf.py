"""GGUF export: the file holds Meta's own tensors and SentencePiece's own tokens, and every error is clear.

llama.cpp itself reads it in test_export_gguf_llama_cpp.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca.errors import InputError, MissingInput
from alpaca.formats.gguf import tensors
from alpaca.formats.gguf.model import rotary_divisors
from alpaca.formats.hf.folder import read_description
from alpaca.formats.meta.sharding import rotary_halves, rotary_pairs
from alpaca.text.loading import load_tokenizer
from tests.formats.gguf_models import (
    change_config,
    change_tensors,
    num_pieces,
    run,
    tensors_of,
    types_of,
    value,
    write_byte_level,
    write_model,
)
from tests.formats.hf.saved_sources import save_quantized
from tests.tiny import TEXT, TinyLlama, train_tokenizer, write_meta

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")

META_NAMES = {  # llama.cpp's name -> Meta's
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
OUTER_NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}


# Tensors ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A converted model with grouped heads, and Meta's own tensors by llama.cpp's names."""
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments as parse

    base = tmp_path_factory.mktemp("meta")
    model = TinyLlama(vocab_size=num_pieces(train_tokenizer(base)), n_kv_heads=2, rope_theta=5e5, norm_eps=1e-3)
    tensors = model.tensors()
    write_meta(base / "T", tensors, model.params(max_seq_len=77))
    folder = convert(parse(["--input_dir", str(base), "--model_size", "T", "--output_dir", str(base / "out")]))
    named = {f"{ours}.weight": tensors[f"{metas}.weight"] for ours, metas in OUTER_NAMES.items()}
    for layer in range(model.n_layers):
        for ours, metas in META_NAMES.items():
            named[f"blk.{layer}.{ours}.weight"] = tensors[f"layers.{layer}.{metas}.weight"]
    return folder, named


@pytest.mark.parametrize(
    ("outtype", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_tensors_are_metas_own(checkpoint, tmp_path, outtype, dtype):
    folder, metas = checkpoint
    reader = run(folder, tmp_path / "m.gguf", "--outtype", outtype)
    found = tensors_of(reader)
    assert set(found) == set(metas)
    for name, tensor in metas.items():
        expected = tensor.float() if tensor.ndim == 1 else tensor.to(dtype).float()
        assert torch.equal(torch.from_numpy(found[name].copy()), expected), name
    assert {types_of(reader)[name] for name in found if "norm" in name} == {"F32"}
    assert {types_of(reader)[name] for name in found if "norm" not in name} == {outtype.upper()}


def test_eight_bit_is_within_half_a_step_of_the_value(checkpoint, tmp_path):
    folder, metas = checkpoint
    reader = run(folder, tmp_path / "m.gguf", "--outtype", "q8_0")
    found, types = tensors_of(reader), types_of(reader)
    odd = {f"blk.{layer}.ffn_down.weight" for layer in (0, 1)}  # rows of 176, no multiple of 32
    assert {name for name in found if types[name] == "F16"} == odd
    assert {name for name in found if types[name] == "F32"} == {name for name in found if "norm" in name}
    for name, tensor in metas.items():
        exact = tensor.float().numpy()
        if types[name] != "Q8_0":
            assert np.array_equal(found[name], exact)
            continue
        largest = np.abs(exact).reshape(-1, 32).max(axis=1)[:, None]
        error = np.abs(found[name] - exact).reshape(-1, 32)
        assert (error <= largest * (0.5 / 127 + 2.0**-11) + 1e-9).all()  # half a step; the step itself is a float16
        assert error.max() > 0


def test_float16_is_torchs_rounding(tmp_path):
    folder = write_model(tmp_path / "m")
    found = tensors_of(run(folder, tmp_path / "m.gguf"))
    weights = load_file(folder / "model.safetensors")
    assert np.array_equal(found["token_embd.weight"], weights["model.embed_tokens.weight"].half().float().numpy())
    assert np.array_equal(found["blk.1.ffn_norm.weight"], weights["model.layers.1.post_attention_layernorm.weight"])


def test_head_width_of_its_own_and_biases(tmp_path):
    folder = write_model(tmp_path / "m", head_dim=32, attention_bias=True, mlp_bias=True)
    reader = run(folder, tmp_path / "m.gguf", "--outtype", "f32")
    found, weights = tensors_of(reader), load_file(folder / "model.safetensors")
    for ours, theirs, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        for kind in ("weight", "bias"):
            exact = weights[f"model.layers.1.self_attn.{theirs}.{kind}"]
            for row in range(heads * 32):  # row (head, pair i, member j) was (head, j, i)
                head, i, j = row // 32, row % 32 // 2, row % 2
                assert np.array_equal(found[f"blk.1.{ours}.{kind}"][row], exact[head * 32 + j * 16 + i])
    assert np.array_equal(found["blk.0.ffn_gate.bias"], weights["model.layers.0.mlp.gate_proj.bias"])
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        assert value(reader, f"llama.{key}") == 32


@pytest.mark.parametrize("num_heads", [1, 3])
def test_permutation_there_and_back(num_heads):
    weight = torch.randn(num_heads * 8, 5)
    there = rotary_halves(weight, num_heads).reshape(weight.shape)
    assert not torch.equal(there, weight)
    assert torch.equal(rotary_pairs(there, num_heads).reshape(weight.shape), weight)


def test_blocks_of_rows_are_the_whole(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "m")
    run(folder, tmp_path / "whole.gguf", "--outtype", "q8_0")
    monkeypatch.setattr(tensors, "_BLOCK_BYTES", 5 * 64 * 4)
    run(folder, tmp_path / "parts.gguf", "--outtype", "q8_0")
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_tied_embeddings_are_written_once(tmp_path):
    folder = write_model(tmp_path / "m", tie_word_embeddings=True)
    assert "output.weight" not in types_of(run(folder, tmp_path / "m.gguf"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, lm_head__weight=embedding)  # a copy of it says nothing new
    assert "output.weight" not in types_of(run(folder, tmp_path / "again.gguf"))
    change_tensors(folder, lm_head__weight=embedding + 1)  # a head of its own, whatever the config says
    own = run(folder, tmp_path / "own.gguf", "--outtype", "f32")
    assert np.array_equal(tensors_of(own)["output.weight"], (embedding + 1).float().numpy())


def test_pickled_weights_are_read_too(tmp_path):
    folder = write_model(tmp_path / "m")
    run(folder, tmp_path / "safetensors.gguf")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    run(folder, tmp_path / "pickled.gguf")
    assert (tmp_path / "pickled.gguf").read_bytes() == (tmp_path / "safetensors.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["gptq, columns in another order", "awq", "compressed w4a16", "fp8 by blocks"])
@pytest.mark.fast_rows(1)
def test_weights_that_were_saved_quantized_are_exported_whole(kind, tmp_path):
    tensors = save_quantized(write_model(tmp_path / "m"), tmp_path / "saved", kind)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "m" / "model.safetensors")
    whole = tensors_of(run(tmp_path / "m", tmp_path / "whole.gguf", "--outtype", "f32"))
    saved = tensors_of(run(tmp_path / "saved", tmp_path / "saved.gguf", "--outtype", "f32"))
    assert whole.keys() == saved.keys()
    assert all(np.array_equal(whole[name], saved[name]) for name in whole)


# The model's numbers ----------------------------------------------------------------------------------------------


def test_sizes_and_constants_are_the_configs(checkpoint, tmp_path):
    folder, _ = checkpoint
    reader = run(folder, tmp_path / "m.gguf", "--outtype", "q8_0")
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "llama-t", "general.file_type": 7,
        "llama.vocab_size": config["vocab_size"], "llama.block_count": 2, "llama.context_length": 77,
        "llama.embedding_length": 64, "llama.feed_forward_length": 176, "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 5e5,
        "llama.rope.scaling.type": None,
    }  # fmt: skip
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7e4, "factor": 4.0}},
    ],
)
def test_linear_rope_scaling_in_either_spelling(tmp_path, spelling):
    reader = run(write_model(tmp_path / "m", **spelling), tmp_path / "m.gguf")
    assert value(reader, "llama.rope.freq_base") == 7e4
    assert (value(reader, "llama.rope.scaling.type"), value(reader, "llama.rope.scaling.factor")) == ("linear", 4.0)


def test_llama_3_rope_scaling_is_transformers(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = write_model(tmp_path / "m", head_dim=64, rope_parameters=rope)
    reader = run(folder, tmp_path / "m.gguf", "--outtype", "q8_0")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(folder), device="cpu")
    plain = 5e5 ** -(torch.arange(0, 64, 2).double() / 64)
    divisors = tensors_of(reader)["rope_freqs.weight"]
    np.testing.assert_allclose(divisors, (plain / scaled).numpy(), rtol=1e-6)
    assert divisors[0] == 1
    assert divisors[-1] == 8
    assert any(1.01 < divisor < 7.9 for divisor in divisors)
    assert types_of(reader)["rope_freqs.weight"] == "F32"
    assert torch.equal(rotary_divisors(read_description(folder)), torch.from_numpy(divisors.copy()))


# The tokenizer ----------------------------------------------------------------------------------------------------


def add_pad(folder: Path, token_id: int) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": token_id}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))


def test_tokens_are_sentencepieces(tmp_path):
    from sentencepiece import SentencePieceProcessor

    folder = write_model(tmp_path / "m", vocab_size=410)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = pieces.get_piece_size()
    add_pad(folder, size)
    reader = run(folder, tmp_path / "m.gguf")
    tokens, scores = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.scores")
    types = value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(scores) == len(types) == 410
    assert tokens[:size] == [pieces.id_to_piece(i) for i in range(size)]
    assert scores[:size] == [pieces.get_score(i) for i in range(size)]
    for i in range(size):
        kind = 2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        assert types[i] == kind
    assert (tokens[size], types[size]) == ("[PAD]", 3)  # a control token: in text it is text, as in ours
    assert types[size + 1 :] == [5] * (409 - size)
    assert len(set(tokens)) == 410
    expected = {
        "model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "padding_token_id": size, "add_bos_token": True, "add_eos_token": False, "add_space_prefix": True,
    }  # fmt: skip
    assert {key: value(reader, f"tokenizer.ggml.{key}") for key in expected} == expected
    assert value(reader, "tokenizer.chat_template") is None


@pytest.mark.parametrize("saved", [False, True])
def test_ordinary_added_tokens_are_user_defined(tmp_path, saved):
    """llama.cpp finds these in any text, as AutoTokenizer does. `saved`: with a tokenizer.json that lists them, too."""
    folder = write_model(tmp_path / "m", vocab_size=410)
    size = load_tokenizer(folder).size
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<tool>": size + 2}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    if saved:
        load_tokenizer(folder).save(folder)
    reader = run(folder, tmp_path / "m.gguf")
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert [(tokens[i], types[i]) for i in (size, size + 2)] == [("<|im_end|>", 3), ("<tool>", 4)]
    assert value(reader, "tokenizer.ggml.eos_token_id") == size


def test_pad_token_without_a_row_is_left_out(tmp_path, caplog):
    folder = write_model(tmp_path / "m")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    add_pad(folder, size)
    reader = run(folder, tmp_path / "m.gguf")
    assert len(value(reader, "tokenizer.ggml.tokens")) == size
    assert value(reader, "tokenizer.ggml.padding_token_id") is None
    assert f"[PAD] beyond the model's {size} rows: left out" in caplog.text


def test_tokenizer_json_alone_gives_the_same_merges(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint[0], tmp_path / "m")
    whole = run(folder, tmp_path / "whole.gguf")
    (folder / "tokenizer.model").unlink()
    alone = run(folder, tmp_path / "alone.gguf")
    for key in ("tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token", "model",
                "add_space_prefix"):  # fmt: skip
        assert value(alone, f"tokenizer.ggml.{key}") == value(whole, f"tokenizer.ggml.{key}"), key
    tokens, types = value(whole, "tokenizer.ggml.tokens"), value(whole, "tokenizer.ggml.token_type")
    merged = [i for i, token in enumerate(tokens) if types[i] == 1 and len(token) > 1]
    by_score = [sorted(merged, key=lambda i: -value(reader, "tokenizer.ggml.scores")[i]) for reader in (whole, alone)]
    assert len(merged) > 50
    assert by_score[0] == by_score[1]


@pytest.mark.parametrize("pre", ["llama-bpe", "smaug-bpe", "gpt-2", "smollm"])
def test_byte_level_tokens_and_merges(tmp_path, pre):
    folder = write_model(tmp_path / "m", vocab_size=400)
    tokens = write_byte_level(folder, pre)
    reader = run(folder, tmp_path / "m.gguf")
    bos = tokens.index("<|begin_of_text|>")
    expected = {
        "model": "gpt2", "pre": pre, "bos_token_id": bos, "eos_token_id": bos + 1, "add_bos_token": True,
        "add_eos_token": False, "scores": None, "padding_token_id": None,
    }  # fmt: skip
    assert {key: value(reader, f"tokenizer.ggml.{key}") for key in expected} == expected
    assert value(reader, "tokenizer.ggml.tokens")[: len(tokens)] == tokens
    types = value(reader, "tokenizer.ggml.token_type")
    assert types == [1] * bos + [3, 3, 4] + [5] * (400 - len(tokens))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert value(reader, "tokenizer.chat_template") == "{{ messages }}"


def test_tokenizers_that_llama_cpp_has_no_equal_of(tmp_path):
    folder = write_model(tmp_path / "m", vocab_size=400)
    write_byte_level(folder, pattern=r"\p{L}+|\s+")
    with pytest.raises(InputError, match=r"not Llama 3's, GPT-2's or SmolLM's: .*convert_hf_to_gguf\.py may know it"):
        run(folder, tmp_path / "m.gguf")
    written = json.loads((folder / "tokenizer.json").read_text())
    written["model"] = {"type": "WordLevel", "vocab": written["model"]["vocab"], "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match="neither SentencePiece's BPE with byte fallback nor byte-level BPE"):
        run(folder, tmp_path / "m.gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingInput, match=r"(?s)no usable tokenizer in .*copy the model's tokenizer\.model"):
        run(folder, tmp_path / "m.gguf")


def test_tokens_that_a_gguf_file_cannot_hold(tmp_path):
    folder = write_model(tmp_path / "m", vocab_size=400)
    tokens = write_byte_level(folder)
    change_config(folder, vocab_size=len(tokens) - 2)
    tables = {name: torch.ones(len(tokens) - 2, 64) for name in ("model__embed_tokens__weight", "lm_head__weight")}
    change_tensors(folder, **tables)
    with pytest.raises(InputError, match=r"EOS \d+ of .* must have rows in the model's embedding, which has \d+"):
        run(folder, tmp_path / "m.gguf")
    folder = write_model(tmp_path / "n", vocab_size=402)
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": 401}))
    with pytest.raises(InputError, match=r"has more than one id for '<s>', which GGUF cannot hold"):
        run(folder, tmp_path / "m.gguf")


def test_sentencepiece_of_another_kind(tmp_path):
    import sentencepiece

    folder = write_model(tmp_path / "m")
    for kind, fallback, message in (("unigram", True, "is not a BPE model"), ("bpe", False, "has 0 byte tokens")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(folder / "tokenizer"), vocab_size=400,
            model_type=kind, byte_fallback=fallback, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        with pytest.raises(InputError, match=message):
            run(folder, tmp_path / "m.gguf")


def test_normalisation_that_llama_cpp_lacks_is_warned_of(tmp_path, caplog):
    import sentencepiece

    folder = write_model(tmp_path / "m", vocab_size=400)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    run(folder, tmp_path / "m.gguf")
    assert "normalises text (nmt_nfkc), llama.cpp does not" in caplog.text
