"""Tokenizers: the ids of SentencePiece, through ours and through AutoTokenizer, and nothing else."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from alpaca.errors import InputError, MissingInput
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import SentencePieceTokenizer, write_llama_tokenizer
from tests.conftest import ROOT
from tests.tiny import TEXT, train_tokenizer

CORNER_CASES = [
    "", " ", "  ", "   x", " leading", "trailing ", "a\nb\n\n", "\n", "\t\ttabs",
    "\x00\x01\x7f", "a\u00a0b", "é e\u0301 ﬁ",
    "รามาเกียรติ์ สวัสดีครับ", "🦙👩‍👩‍👧 🇵🇪", "▁ ▁▁a", "<0x0A>", "<0x41>b", "\ufeffx", "\u2028", "İstanbul", "123 4567",
    "Below is an instruction", "### Response:", "a" * 300, " " * 40 + "code()", "<", "</", "<s", "[PAD]",
]  # fmt: skip


def random_texts(num_texts: int) -> list[str]:
    rng = random.Random(0)
    alphabet = ["a", "e", "t", "the", "ing", " ", "  ", "\n", "1", "กา", "€", "😀", "<", ">", "/", "s", ":", '"', "-"]

    def text() -> str:
        return "".join(rng.choice([*alphabet, chr(rng.randint(1, 0xD7FF))]) for _ in range(rng.randint(0, 40)))

    made = [text() for _ in range(num_texts)]
    return [t for t in made if not any(special in t for special in ("<s>", "</s>", "<unk>"))]


def code_and_bytes() -> list[str]:
    """This project's sources and random bytes read as text, but for literal special tokens."""
    code = [part for path in sorted((ROOT / "alpaca").glob("*.py")) for part in path.read_text().split("\n\n")]
    noise = [random.Random(i).randbytes(60).decode("utf-8", errors="replace") for i in range(300)]
    return [text for text in code + noise if not any(token in text for token in ("<s>", "</s>", "<unk>", "\0"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_llama_tokenizer(train_tokenizer(folder / "source"), folder, max_length=2048)
    return folder


def assert_ids_are_sentencepieces(folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    oracle = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = oracle.encode(texts)
    ours = load_tokenizer(folder)
    assert ours.encode_batch(texts) == expected
    assert [ours.decode(ids) for ids in expected] == [oracle.decode(ids) for ids in expected]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(texts)["input_ids"] == [[oracle.bos_id(), *ids] for ids in expected]
    assert [theirs.decode(ids) for ids in expected] == [oracle.decode(ids) for ids in expected]


def test_ids_are_sentencepieces(folder):
    assert_ids_are_sentencepieces(folder, CORNER_CASES + random_texts(3000))


@pytest.mark.parametrize("model", ["llama-tokenizer", "unconverted-weights"])
def test_ids_are_sentencepieces_on_real_text(tmp_path, real, model):
    write_llama_tokenizer(real / model / "tokenizer.model", tmp_path)
    examples = json.loads((real / "alpaca_4000.json").read_text())
    texts = [text for example in examples for text in example.values()]
    assert_ids_are_sentencepieces(tmp_path, texts + [f" {text}" for text in texts[:500]] + CORNER_CASES)
    assert_ids_are_sentencepieces(tmp_path, random_texts(3000) + code_and_bytes())


def test_normalising_models_are_followed_too(tmp_path):
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 3), model_prefix=str(tmp_path / "nfkc"), vocab_size=420,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    write_llama_tokenizer(tmp_path / "nfkc.model", tmp_path)
    texts = ["two  spaces ", " lead", "ﬁne", "Ａlpaca", "of South America"]
    assert_ids_are_sentencepieces(tmp_path, texts)


def test_specials_are_text_for_us_and_special_for_other_programs(folder):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.eos_id not in ours.encode("an answer</s>")
    assert theirs("an answer</s>")["input_ids"] == [ours.bos_id, *ours.encode("an answer"), ours.eos_id]
    assert theirs("an answer" + theirs.eos_token)["input_ids"][-1] == ours.eos_id
    assert json.loads((folder / "tokenizer_config.json").read_text())["split_special_tokens"] is False


def test_pad_token_is_added_saved_and_read_back(folder, tmp_path):
    from transformers import AutoTokenizer

    ours = load_tokenizer(folder)
    size = ours.size
    assert (ours.pad_id, ours.add_pad_token(), ours.add_pad_token()) == (None, True, False)
    ours.save(tmp_path)
    again, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.pad_id, again.size) == (theirs.pad_token_id, len(theirs)) == (size, size + 1)
    assert again.decode([*again.encode("hi"), again.pad_id, again.eos_id]) == "hi"
    assert again.pad_id not in again.encode("[PAD]")


def test_pad_token_of_older_folders(folder, tmp_path):
    shutil.copy(folder / "tokenizer.model", tmp_path)
    size = load_tokenizer(folder).size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.size) == (size, size + 1)


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""},
        {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"},
        {"bos_token": {"content": "<unk>"}, "eos_token": "<unk>"},
    ],
)
def test_known_bad_configs_are_repaired_and_said(folder, tmp_path, config, caplog):
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert "its tokenizer.model is right" in caplog.text


def test_good_config_is_not_complained_of(folder, caplog):
    load_tokenizer(folder)
    assert not caplog.text


def test_a_folder_without_tokenizer_model_is_read_as_its_json_says(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(folder / name, tmp_path)
    ours, exact = load_tokenizer(tmp_path), load_tokenizer(folder)
    assert ours.encode_batch(CORNER_CASES) == exact.encode_batch(CORNER_CASES)
    assert ours.encode("a</s>") == exact.encode("a</s>")
    assert (ours.prefix_ids, ours.eos_id, ours.pad_id, ours.size) == ([1], 2, None, exact.size)
    assert (ours.add_pad_token(), ours.pad_id) == (True, exact.size)


def test_missing_and_wrong_files(tmp_path):
    with pytest.raises(MissingInput, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(MissingInput, match=r"no usable tokenizer in .* \(found: nothing\)"):
        load_tokenizer(tmp_path)
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 3), model_prefix=str(tmp_path / "unigram"), vocab_size=90,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(InputError, match="is not a BPE model"):
        write_llama_tokenizer(tmp_path / "unigram.model", tmp_path)


def test_a_tokenizer_model_cut_anywhere_is_refused_though_there_is_a_tokenizer_json(folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "cut")
    content = (folder / "tokenizer.model").read_bytes()
    for size in (*range(0, len(content) - 150, 97), *range(len(content) - 150, len(content))):
        (cut / "tokenizer.model").write_bytes(content[:size])
        with pytest.raises(InputError, match=rf"cut/tokenizer\.model \({size} bytes\) is neither a SentencePiece"):
            load_tokenizer(cut)
    (cut / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"it is damaged, cut short or a Git LFS pointer\. Copy the model's own again"):
        load_tokenizer(cut)


def test_pieces_put_together_give_the_text(folder):
    tokenizer = load_tokenizer(folder)
    for text in CORNER_CASES:
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode() == (text and f" {text}").replace(
            "▁", " "
        )


def test_special_ids(folder):
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    assert tokenizer.special_ids == {1, 2}
