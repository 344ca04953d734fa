"""Every release of Meta's converts: same logits as Meta's forward pass on the shards, and the release's config.

The published checkpoints cannot be had here: the tiny ones have their params.json's keys, their splits over shards and
their kind of tokenizer.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alpaca.errors import OutputExists
from alpaca.text.eos import read_eos_ids
from alpaca.text.loading import load_tokenizer
from tests.formats.meta_sources import (
    DIM,
    FAMILIES,
    HEADS,
    LAYERS,
    NUM_RANKS,
    Family,
    random_model,
    run,
    split,
    write,
)
from tests.tiny import train_tokenizer


def metas_forward(family: Family, shards: list[dict[str, torch.Tensor]], ids: list[int]) -> torch.Tensor:
    """Logits [T, V] in float64, computed on the shards as Meta's parallel layers do, without joining any matrix.

    Each rank has its own query heads and the key/value heads they need; the ranks' parts of wo and w2 are added up.
    Rotary embedding: complex numbers on adjacent pairs, frequencies as in Meta's apply_scaling.
    """
    ranks = [{name: tensor.double() for name, tensor in shard.items()} for shard in shards]
    eps, d, theta = family.params["norm_eps"], DIM // HEADS, family.params.get("rope_theta", 10000.0)
    frequencies = torch.tensor([scaled(theta ** (-i / d), family.rope_factor) for i in range(0, d, 2)])
    angles = torch.outer(torch.arange(len(ids)).float(), frequencies)  # in float32, as Meta and transformers have it
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    causal = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.float64).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * ranks[0][name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * turn).flatten(2)

    def attend(rank: dict[str, torch.Tensor], x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = ((x @ rank[f"{name}.{w}.weight"].T).view(len(ids), -1, d) for w in ("wq", "wk", "wv"))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (rotate(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / d**0.5 + causal
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ rank[f"{name}.wo.weight"].T

    def feed(rank: dict[str, torch.Tensor], x: torch.Tensor, name: str) -> torch.Tensor:
        gate = torch.nn.functional.silu(x @ rank[f"{name}.w1.weight"].T)
        return (gate * (x @ rank[f"{name}.w3.weight"].T)) @ rank[f"{name}.w2.weight"].T

    x = torch.cat([rank["tok_embeddings.weight"] for rank in ranks], dim=family.embedding_axis)[ids]
    for i in range(LAYERS):
        h = norm(x, f"layers.{i}.attention_norm.weight")
        x = x + sum(attend(rank, h, f"layers.{i}.attention") for rank in ranks)
        h = norm(x, f"layers.{i}.ffn_norm.weight")
        x = x + sum(feed(rank, h, f"layers.{i}.feed_forward") for rank in ranks)
    name, axis = ("tok_embeddings.weight", family.embedding_axis) if family.head == "missing" else ("output.weight", 0)
    return norm(x, "norm.weight") @ torch.cat([rank[name] for rank in ranks], dim=axis).T


def scaled(frequency: float, factor: float) -> float:
    """Meta's apply_scaling for one frequency: https://github.com/meta-llama/llama-models models/llama3/model.py."""
    wave = 2 * torch.pi / frequency
    if factor == 1 or wave < 8192 / 4:
        return frequency
    if wave > 8192:
        return frequency / factor
    smooth = (8192 / wave - 1) / (4 - 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def transformers_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


IDS = [(7 + i * i * 31) % 390 for i in range(160)]  # long enough for the scaled waves to turn

# What arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_shards"), [(name, shards) for name, family in FAMILIES.items() for shards in family.shards]
)
@pytest.mark.fast_rows(6)
def test_logits_equal_metas_forward_on_the_shards(tmp_path, tokenizers, name, num_shards):
    family = FAMILIES[name]
    tokenizer, vocab_size = tokenizers[family.has_tiktoken]
    shards = split(family, random_model(family, vocab_size), num_shards)
    write(tmp_path / "in" / "T", family, shards, tokenizer)
    folder = run(tmp_path, "--model_size", "T")
    torch.testing.assert_close(transformers_logits(folder, IDS), metas_forward(family, shards, IDS), rtol=0, atol=1e-3)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == family.context


def test_the_scaling_shows_in_the_logits(tokenizers):
    """The comparison above would fail by far with the wrong factor."""
    family = FAMILIES["Llama 3.1"]
    shards = split(family, random_model(family, tokenizers[True][1]), 1)
    base = metas_forward(family, shards, IDS)
    for factor in (1.0, 32.0):
        assert (metas_forward(Family(params=family.params, rope_factor=factor), shards, IDS) - base).abs().max() > 0.3


def test_any_number_of_shards_gives_the_same_bytes(tmp_path, tokenizers):
    for name in ("LLaMA 2 70B", "Llama 3.1", "Llama 3.2, head kept"):
        family, files = FAMILIES[name], set()
        tokenizer, vocab_size = tokenizers[family.has_tiktoken]
        for num_shards in (1, 2, 8):
            source = tmp_path / f"{name}-{num_shards}"
            write(source, family, split(family, random_model(family, vocab_size), num_shards), tokenizer)
            files.add((run(tmp_path / f"{name} {num_shards}", source=source) / "model.safetensors").read_bytes())
        assert len(files) == 1


def test_config_of_llama_3_2(tmp_path, tokenizers):
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES["Llama 3.2"]
    tokenizer, vocab_size = tokenizers[True]
    tensors = random_model(family, vocab_size)
    write(tmp_path / "in", family, [tensors], tokenizer)
    folder = run(tmp_path, "--model_size", "Llama3.2-1B")
    assert folder.name == "llama3.2-1b"
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {**scaling, "rope_theta": 500000.0}
    assert (config["rope_theta"], config["tie_word_embeddings"], config["torch_dtype"]) == (500000.0, True, "bfloat16")
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [NUM_RANKS, NUM_RANKS + 1, NUM_RANKS + 4]
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 400, "eos_token_id": 401}
    assert AutoConfig.from_pretrained(folder).rope_parameters == config["rope_parameters"]
    written = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in written
    assert torch.equal(written["model.embed_tokens.weight"], tensors["tok_embeddings.weight"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_head_that_differs_in_one_value_is_kept(tmp_path, tokenizers):
    family = FAMILIES["Llama 3.2, head kept"]
    tokenizer, vocab_size = tokenizers[True]
    tensors = random_model(family, vocab_size)
    tensors["output.weight"][-1, -1] += 1
    write(tmp_path / "in", family, split(family, tensors, 2), tokenizer)
    folder = run(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["rope_parameters"]["factor"]) == (False, 8.0)  # Llama 3.1's
    assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], tensors["output.weight"])


def test_equal_matrices_of_older_models_stay_two(tmp_path, tokenizers):
    """No release before 3.2 ties them: a fine-tune that happens to start so may not be tied for good."""
    family = Family(params=FAMILIES["Code Llama"].params, embedding_axis=1, kv_heads=HEADS, head="copy")
    tokenizer, vocab_size = tokenizers[False]
    write(tmp_path / "in", family, [random_model(family, vocab_size)], tokenizer)
    assert "lm_head.weight" in load_file(run(tmp_path) / "model.safetensors")


@pytest.mark.parametrize("name", ["Llama 3", "Llama 3.2"])
def test_the_tokenizer_of_llama_3_is_served_and_trained_with(tmp_path, tokenizers, name):
    from transformers import AutoTokenizer

    family = FAMILIES[name]
    tokenizer, vocab_size = tokenizers[True]
    write(tmp_path / "in", family, [random_model(family, vocab_size)], tokenizer)
    folder = run(tmp_path)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.size == vocab_size
    ours.require_rows(vocab_size, folder)
    assert theirs("An alpaca 🦙")["input_ids"] == [*ours.prefix_ids, *ours.encode("An alpaca 🦙")]
    assert read_eos_ids(folder, ours, vocab_size=vocab_size) == {NUM_RANKS + 1}
    assert ours.pad_id == (None if name == "Llama 3" else NUM_RANKS + 4)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer.tiktoken", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out" / "tokenizer").iterdir()) == names
    assert (folder / "tokenizer.tiktoken").read_bytes() == tokenizer.read_bytes()
    assert not (folder / "tokenizer.model").exists()
    with pytest.raises(OutputExists, match="exists already"):
        run(tmp_path)


@pytest.mark.parametrize(("folder", "flags"), [("Llama3.1-8B-Instruct", []), ("T", ["--instruct"])])
def test_instruct_models_end_at_a_turn(tmp_path, tokenizers, folder, flags):
    tokenizer, vocab_size = tokenizers[True]
    family = FAMILIES["Llama 3.1"]
    write(tmp_path / "in" / folder, family, [random_model(family, vocab_size)], tokenizer)
    made = run(tmp_path, *flags)
    ends = [NUM_RANKS + i for i in (1, 8, 9)]
    assert json.loads((made / "config.json").read_text())["eos_token_id"] == ends
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == ends
    assert read_eos_ids(made, load_tokenizer(made), vocab_size=vocab_size) == set(ends)


def test_code_llamas_infilling_tokens_arrive(tmp_path):
    """Code Llama's tokenizer.model has 16 pieces more than LLaMA's, ▁<PRE> and its like among them."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from transformers import AutoTokenizer

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train_tokenizer(tmp_path / "old", vocab_size=384).read_bytes())
    infilling = ["▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    lowest = min(piece.score for piece in proto.pieces)
    for number, token in enumerate([*infilling, "▁<EOT>>", "▁<EOT>>>", "▁<EOT>>>>", "▁<<", "▁<<<"]):
        kind = 1 if not token.endswith(">") or ">>" in token else 4  # normal, or user defined as the four tokens are
        proto.pieces.add(piece=token, score=lowest - 1 - number, type=kind)
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(proto.SerializeToString())
    family = FAMILIES["Code Llama"]
    write(tmp_path / "in" / "CodeLlama-7b", family, split(family, random_model(family, 400), 2), tokenizer)
    folder = run(tmp_path, "--model_size", "7b")
    oracle = SentencePieceProcessor(model_file=str(tokenizer))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["▁<PRE>", " <PRE> def f(x):\n <SUF>\n return y <MID>", "x <EOT>", "plain text", "<PRE>", "a <M b <MI <<"]
    assert ours.encode_batch(texts) == oracle.encode(texts)
    assert oracle.piece_to_id("▁<PRE>") in ours.encode(" <PRE> def")
    assert theirs("plain text")["input_ids"] == [1, *oracle.encode("plain text")]


def test_the_engine_answers_as_transformers_does(tmp_path, tokenizers):
    from transformers import AutoModelForCausalLM

    from alpaca.serving.loading import load_engine
    from alpaca.serving.settings import ServerSettings
    from tests.serving.llama.test_llama_engine import request, tokens

    family = FAMILIES["Llama 3.2"]
    tokenizer, vocab_size = tokenizers[True]
    write(tmp_path / "in", family, [random_model(family, vocab_size)], tokenizer)
    folder = run(tmp_path, "--dtype", "float32")
    engine = load_engine(folder, ServerSettings(engine="llama", max_context=512))
    prompt = (NUM_RANKS, *IDS[:100])
    [answer] = tokens(engine.submit(request(prompt_ids=prompt, max_new_tokens=24)))
    engine.close()
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert answer == [token_id for token_id in expected if token_id != NUM_RANKS + 1]
    assert len(set(answer)) > 3
