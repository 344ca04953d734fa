"""llama.cpp itself reads exported files and computes what transformers does, token for token.

Needs llama-cpp-python, built from source (cmake and a C++ compiler; 4 minutes on two cores, without a GPU):

    export CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF"
    pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
"""

import base64
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.formats.gguf_models import change_config, change_tensors, num_pieces, run, write_byte_level, write_model
from tests.tiny import TEXT

pytest.importorskip("gguf", reason="GGUF files need the package gguf")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp itself: pip install llama-cpp-python==0.3.36")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

PROMPTS = [
    "", "Once upon a time", "Lily and Tom went to the park", 'The dog said: "No!"', "  two spaces\n\nnew line",
    "One day, a little girl named Sue",
]  # fmt: skip
ODD_TEXTS = [
    " ", "  ", "\n", "\t\t x", " leading", "trailing ", "สวัสดีครับ ประเทศไทย", "🦙🦙 llama 🏳️‍🌈", "¿Dónde está?", "a\x00b",
    "\u200b\ufeff",
    "<s> hi </s>", "</s>", "<unk>", "[PAD]", "<0x0A>", "▁▁x", "ﬁ ﬂ Å é e\u0301", "中文字符 日本語 한국어",
    "\r\n\r\n", "x" * 300, "1234567890 3.14 1,000", "def f(x):\n    return x\n", "I'LL we'Re don't", "<|end_of_text|>",
]  # fmt: skip
NEW_TOKENS = 200


def load(file: Path, **settings: object):
    """llama.cpp with a float32 cache: by default it keeps keys and values as float16."""
    return llama_cpp.Llama(
        str(file), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, type_k=0, type_v=0, **settings
    )


def greedy(model, ids: list[int], num_tokens: int) -> list[int]:
    found = model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    return [token for token, _ in zip(found, range(num_tokens), strict=False)]


def logits_of(model, ids: list[int]) -> torch.Tensor:
    """[T, V] of a model loaded with logits_all."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.fixture(scope="module")
def stories(real, tmp_path_factory) -> Path:
    """The real tiny model, converted."""
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments

    source, out = str(real / "unconverted-weights"), str(tmp_path_factory.mktemp("stories"))
    return convert(parse_arguments(["--input_dir", source, "--model_size", "260K", "--output_dir", out]))


@pytest.fixture(scope="module")
def continuations(stories) -> list[tuple[list[int], list[int]]]:
    """transformers' ids for each prompt, and what it goes on with."""
    from transformers import AutoModelForCausalLM

    from alpaca.text.loading import load_tokenizer

    tokenizer = load_tokenizer(stories)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer.prefix_ids + tokenizer.encode(prompt)
        whole = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        found.append((ids, whole[len(ids) :]))
    return found


def test_greedy_tokens_of_the_real_model_are_transformers(stories, continuations, tmp_path):
    run(stories, tmp_path / "m.gguf", "--outtype", "f32")
    model = load(tmp_path / "m.gguf")
    for prompt, (ids, expected) in zip(PROMPTS, continuations, strict=True):
        assert model.tokenize(prompt.encode(), add_bos=True) == ids
        assert greedy(model, ids, len(expected)) == expected, prompt


def test_text_of_the_real_model_is_the_published_one(real, stories, tmp_path):
    run(stories, tmp_path / "m.gguf", "--outtype", "f32")
    model = load(tmp_path / "m.gguf")
    found = model.detokenize(greedy(model, [1], 256)).decode()
    assert found.strip() == (real / "stories260k-greedy.txt").read_text().strip()


@pytest.mark.parametrize(("outtype", "least"), [("f16", 0.99), ("bf16", 0.96), ("q8_0", 0.97)])
def test_most_likely_token_of_narrower_types(stories, continuations, tmp_path, outtype, least):
    """After the same text (transformers' own, float32) the same next token; llama.cpp rounds activations as well."""
    run(stories, tmp_path / "m.gguf", "--outtype", outtype)
    model = load(tmp_path / "m.gguf", logits_all=True)
    same = total = 0
    for ids, expected in continuations:
        found = logits_of(model, ids + expected)[len(ids) - 1 : -1].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(found, expected, strict=True))
        total += len(expected)
    print(f"{outtype}: {same} of {total} next tokens are float32's ({same / total:.2%})")
    assert same / total >= least


LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        {"rope_theta": 77.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": LLAMA_3_ROPE},
        {"head_dim": 32},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
    ids=str,
)
def test_logits_of_every_kind_are_transformers(tmp_path, changes):
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "m", **changes)
    run(folder, tmp_path / "m.gguf", "--outtype", "f32")
    ids = random.Random(0).choices(range(3, 300), k=100)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model(torch.tensor([ids])).logits[0].detach()
    found = logits_of(load(tmp_path / "m.gguf", logits_all=True), ids)
    assert found.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_logits_with_an_adapter_are_pefts(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "m")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(tmp_path / "a")
    run(folder, tmp_path / "m.gguf", "--outtype", "f32", "--adapter", str(tmp_path / "a"))
    ids = random.Random(0).choices(range(3, 300), k=100)
    expected = model(torch.tensor([ids])).logits[0].detach()
    found = logits_of(load(tmp_path / "m.gguf", logits_all=True), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def corpus(real: Path) -> list[str]:
    records = json.loads((real / "alpaca_4000.json").read_text())
    return [record[key] for record in records for key in ("instruction", "input", "output") if record[key]]


@pytest.mark.parametrize("name", ["unconverted-weights", "llama-tokenizer"])
@pytest.mark.parametrize("keeps_model_file", [True, False])
def test_tokens_are_sentencepieces(real, tmp_path, name, keeps_model_file):
    from sentencepiece import SentencePieceProcessor

    from alpaca.text.sentencepiece import SentencePieceTokenizer

    pieces = SentencePieceProcessor(model_file=str(real / name / "tokenizer.model"))
    folder = write_model(tmp_path / "m", vocab_size=pieces.get_piece_size() + 8)
    shutil.copy(real / name / "tokenizer.model", folder)
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    tokenizer.add_pad_token()
    tokenizer.save(folder)
    if not keeps_model_file:
        (folder / "tokenizer.model").unlink()
    run(folder, tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf", vocab_only=True)
    texts = [*corpus(real), *ODD_TEXTS]
    wrong = [text for text in texts if model.tokenize(text.encode(), add_bos=False) != pieces.encode(text)]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[0]!r}"
    assert model.tokenize(b"a", add_bos=True) == [1, *pieces.encode("a")]


@pytest.mark.parametrize("pre", ["llama-bpe", "smaug-bpe", "gpt-2", "smollm"])
def test_byte_level_tokens_are_hugging_faces(real, tmp_path, pre):
    from alpaca.text.loading import load_tokenizer

    folder = write_model(tmp_path / "m", vocab_size=400)
    write_byte_level(folder, pre)
    run(folder, tmp_path / "m.gguf")
    model, tokenizer = load(tmp_path / "m.gguf", vocab_only=True), load_tokenizer(folder)
    texts = [TEXT, *TEXT.split(), *corpus(real), *ODD_TEXTS]
    expected = tokenizer.encode_batch(texts)
    found = [model.tokenize(text.encode(), add_bos=False) for text in texts]
    wrong = [text for text, ours, theirs in zip(texts, expected, found, strict=True) if ours != theirs]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[0]!r}"
    assert model.tokenize(b"a", add_bos=True) == tokenizer.prefix_ids + tokenizer.encode("a")


def test_tokens_of_metas_llama_3_file(real, tmp_path):
    """A tiktoken file, by way of the tokenizer.json that conversion writes for it."""
    from alpaca.text.loading import load_tokenizer
    from alpaca.text.tiktoken import TiktokenModel

    folder = write_model(tmp_path / "m", vocab_size=1000)
    words = sorted({word for text in TEXT.split() for word in (text, f" {text}")})
    made = {word.encode()[:size] for word in words for size in range(2, len(word.encode()) + 1)}
    tokens = [bytes([i]) for i in range(256)] + sorted(made, key=lambda token: (len(token), token))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    (folder / "tokenizer.model").unlink()
    model = TiktokenModel(tmp_path / "tokenizer.model")
    change_config(folder, vocab_size=model.size)
    table = torch.randn(model.size, 64)
    change_tensors(folder, model__embed_tokens__weight=table, lm_head__weight=table.clone())
    model.save(folder)
    run(folder, tmp_path / "m.gguf")
    found, tokenizer = load(tmp_path / "m.gguf", vocab_only=True), load_tokenizer(folder)
    texts = [TEXT, *TEXT.split(), *corpus(real), *ODD_TEXTS]
    assert [found.tokenize(text.encode(), add_bos=False) for text in texts] == tokenizer.encode_batch(texts)
    assert found.tokenize(b"a", add_bos=True)[0] == model.bos_id
    assert found.token_eos() == model.eos_id


def test_rows_without_a_token_do_no_harm(tmp_path):
    folder = write_model(tmp_path / "m", vocab_size=450)
    pieces = num_pieces(folder / "tokenizer.model")
    run(folder, tmp_path / "m.gguf", "--outtype", "f32")
    model = load(tmp_path / "m.gguf")
    assert model.n_vocab() == 450
    assert len(greedy(model, [1, 5, 9], 20)) == 20
    assert max(model.tokenize("Name three colours. 🦙".encode())) < pieces
