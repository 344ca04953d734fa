"""Llama 3's kind of tokenizer: the ids of tiktoken's algorithm, written down here a second time, through every way.

Meta's own file cannot be had here and the package `tiktoken` is not installed: the files are of the same format,
trained on this repository (and the real instructions where they are), and the oracle is the algorithm at its slowest.
"""

import base64
import itertools
import json
import os
import random
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import regex

from alpaca.errors import InputError, MissingInput
from alpaca.serving.detokenize import CompletionText
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import is_sentencepiece
from alpaca.text.tiktoken import TIKTOKEN_FILE, TiktokenModel, is_tiktoken, read_ranks, special_tokens
from alpaca.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.text.test_tokenizer import CORNER_CASES, random_texts
from tests.tiny import TEXT, train_tokenizer

# As Meta's tokenizer.py has it: https://github.com/meta-llama/llama-models
PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NUM_RANKS = 2000
MORE_CASES = [
    "It's I'LL we'Ve don't 'ſ", "1234567 3.14159 ๑๒๓ ²³ ½", "a  b   c\t\td\u00a0\u3000e", "line\r\n\r\n\n  next\r",
    " \n \n x", "👩🏽\u200d💻👨\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈 🇹🇭", "ก็ปี่น้ำ ๆ ฯลฯ", "你好，世界。こんにちは 안녕",
    "नमस्ते مرحبا שלום", "Ǆ ǅ ß ẞ ﬀ K Å", "---- ==== .... !!?? ////", "\u200b\u200d\ufe0f", "<|", "|>",
    "<|begin_of_text|>", "a<|eot_id|>b <|end_of_text|>", "<|reserved_special_token_0|><|finetune_right_pad_id|>",
    "def f(x):\n    return {'a': [x ** 2, \"b\\n\"]}  # done\n", " " * 300, "\n" * 70, "a" * 500, "ab" * 99,
]  # fmt: skip


def write_tiktoken(path: Path, *, num_ranks: int, texts: Iterable[str] = (TEXT,)) -> Path:
    """A file of `base64 rank` lines: byte-level BPE trained on texts, cut by Llama 3's expression."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = Backend(models.BPE())
    cut = pre_tokenizers.Split(Regex(PATTERN.pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=num_ranks, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    assert len(ranks) == num_ranks
    lines = [(bytes(byte_of[character] for character in token), rank) for token, rank in ranks]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in lines))
    return path


def oracle(ranks: dict[bytes, int], text: str) -> list[int]:
    """tiktoken's ids: in each piece join the neighbours of lowest rank, the leftmost of equals, until none has one."""
    ids: list[int] = []
    for piece in PATTERN.findall(text):
        data = piece.encode()
        parts = [data] if data in ranks else [data[i : i + 1] for i in range(len(data))]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def training_texts() -> Iterator[str]:
    if folder := os.environ.get("ALPACA_REAL"):
        examples = json.loads((Path(folder) / "alpaca_4000.json").read_text("utf-8"))
        yield from (text for example in examples[:1500] for text in example.values())
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "alpaca").rglob("*.py"))]:
        yield path.read_text()
    yield from [TEXT * 20, "สวัสดีครับ ประเทศไทย ขอบคุณ " * 30, "👩‍👩‍👧 🦙🦙 " * 30, " " * 64 + "\n\n\n" + "=" * 40] * 5


def any_characters(num_texts: int) -> list[str]:
    """Characters of all planes that stood in Unicode before the libraries' tables could differ."""
    rng = random.Random(1)
    known = [i for i in range(0x30000) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]
    return ["".join(chr(rng.choice(known)) for _ in range(rng.randint(1, 30))) for _ in range(num_texts)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    texts = list(training_texts())
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken") / "tokenizer.model", num_ranks=NUM_RANKS, texts=texts)


@pytest.fixture(scope="module")
def ranks(model_file: Path) -> dict[bytes, int]:
    lines = (line.split() for line in model_file.read_text().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@pytest.fixture(scope="module")
def folder(model_file: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    TiktokenModel(model_file).save(folder, max_length=131072)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def corpus() -> list[str]:
    files = [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "tests").glob("*.py")),
        *sorted((ROOT / "convert").glob("*.py")),
    ]
    lines = [line for path in files for line in path.read_text().splitlines(keepends=True)]
    blocks = ["".join(lines[i : i + 12]) for i in range(0, len(lines), 12)]
    broken = [random.Random(i).randbytes(60).decode("utf-8", errors="replace") for i in range(300)]
    return [*CORNER_CASES, *MORE_CASES, *blocks, *random_texts(1500), *any_characters(1500), *broken]


def specials_out(texts: list[str]) -> list[str]:
    return [text for text in texts if "<|" not in text]


@pytest.mark.slow
def test_ids_are_tiktokens(ranks, ours):
    texts = corpus()
    assert sum(map(len, texts)) > 150_000
    expected = [oracle(ranks, text) for text in texts]
    assert ours.encode_batch(texts) == expected
    assert max(max(ids, default=0) for ids in expected) > NUM_RANKS - 300  # late merges are reached
    assert [ours.decode(ids) for ids in expected] == texts


@pytest.mark.slow
def test_ids_through_auto_tokenizer_have_bos_in_front(folder, ranks):
    from transformers import AutoTokenizer

    theirs, texts = AutoTokenizer.from_pretrained(folder), specials_out(corpus())
    assert theirs(texts)["input_ids"] == [[NUM_RANKS, *oracle(ranks, text)] for text in texts]
    assert [theirs.decode(oracle(ranks, text)) for text in texts[:300]] == texts[:300]
    assert theirs("hi<|end_of_text|>")["input_ids"][-1] == NUM_RANKS + 1  # special there, text for us
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (NUM_RANKS, NUM_RANKS + 1, NUM_RANKS + 4)
    assert (len(theirs), theirs.model_max_length) == (NUM_RANKS + 256, 131072)


def test_ids_are_tiktokens_on_real_text(real, ranks, ours):
    examples = json.loads((real / "alpaca_4000.json").read_text())[1500:]  # not those it was trained on
    texts = [text for example in examples for text in example.values()]
    assert ours.encode_batch(texts) == [oracle(ranks, text) for text in texts]


@pytest.mark.parametrize("seed", range(6))
def test_equal_ranks_of_periodic_text_are_joined_from_the_left(tmp_path, seed):
    """Where several splits make one token their order could matter: ranks at random over one or two letters."""
    rng = random.Random(seed)
    letters = [b"a", b"b"][: 1 + seed % 2]
    ranks = {bytes([i]): i for i in range(256)}
    pool, made = list(letters), []
    while len(made) < 15 + 25 * (len(letters) - 1):
        token = rng.choice(pool) + rng.choice(pool)
        if token not in ranks and token not in made:
            made.append(token)
            pool.append(token)
    rng.shuffle(made)
    ranks |= {token: 256 + i for i, token in enumerate(made)}
    write_ranks(tmp_path / "tokenizer.model", ranks)
    TiktokenModel(tmp_path / "tokenizer.model").save(tmp_path)
    texts = ["".join(rng.choice(letters).decode() for _ in range(rng.randint(1, 60))) for _ in range(300)]
    assert load_tokenizer(tmp_path).encode_batch(texts) == [oracle(ranks, text) for text in texts]


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


def test_bytes_that_are_no_text_are_decoded_as_tiktoken_does(ranks, ours):
    token_of = {rank: token for token, rank in ranks.items()}
    for seed in range(50):
        ids = [random.Random(seed * 100 + i).randrange(NUM_RANKS) for i in range(12)]
        assert ours.decode(ids) == b"".join(token_of[i] for i in ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    "text", ["👩🏽‍💻 ก็ปี่น้ำ", " leading and  two", "naïve € 你好\n\n", "def f():\n    pass", "🦙" * 30]
)
def test_streamed_pieces_are_the_text(ours, text):
    ids = ours.encode(text)
    for prompt in ([ours.bos_id], [ours.bos_id, *ours.encode("### Response:")]):
        pieces = CompletionText(ours, prompt)
        assert "".join([*map(pieces.push, ids), pieces.finish()]) == text


def test_specials_in_user_text_are_text(ours):
    for token in special_tokens("3.1"):
        ids = ours.encode(f"a{token}b")
        assert max(ids) < NUM_RANKS
        assert ours.decode(ids) == f"a{token}b"
    assert ours.special_ids == set(range(NUM_RANKS, NUM_RANKS + 256))
    assert ours.decode([ours.bos_id, *ours.encode("hi"), NUM_RANKS + 9, ours.eos_id]) == "hi"
    assert (ours.prefix_ids, ours.size, ours.pad_id) == ([NUM_RANKS], NUM_RANKS + 256, NUM_RANKS + 4)


def test_special_tokens_are_metas():
    names, first = special_tokens("3.1"), special_tokens("3")
    at = {128000: "begin_of_text", 128001: "end_of_text", 128002: "reserved_special_token_0",
          128004: "finetune_right_pad_id", 128005: "reserved_special_token_2", 128006: "start_header_id",
          128007: "end_header_id", 128008: "eom_id", 128009: "eot_id", 128010: "python_tag",
          128011: "reserved_special_token_3", 128255: "reserved_special_token_247"}  # fmt: skip
    assert {i: names[i - 128000] for i in at} == {i: f"<|{name}|>" for i, name in at.items()}
    at = {128004: "reserved_special_token_2", 128008: "reserved_special_token_4", 128009: "eot_id",
          128010: "reserved_special_token_5", 128255: "reserved_special_token_250"}  # fmt: skip
    assert {i: first[i - 128000] for i in at} == {i: f"<|{name}|>" for i, name in at.items()}
    assert len(set(names)) == len(set(first)) == 256


@pytest.mark.parametrize(("version", "eos_ids"), [("3", [1, 9]), ("3.1", [1, 8, 9])])
def test_an_instruct_model_ends_at_the_turn(model_file, tmp_path, version, eos_ids):
    model = TiktokenModel(model_file, version=version, instruct=True)
    model.save(tmp_path)
    assert model.eos_ids == [NUM_RANKS + i for i in eos_ids]
    assert load_tokenizer(tmp_path).eos_id == model.eos_id == NUM_RANKS + 9


def test_pad_token_of_llama_3_is_added_saved_and_read_back(model_file, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    TiktokenModel(model_file, version="3").save(tmp_path / "a")
    tokenizer = load_tokenizer(tmp_path / "a")
    assert (tokenizer.pad_id, tokenizer.add_pad_token()) == (None, True)
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert (again.pad_id, again.size) == (NUM_RANKS + 256, NUM_RANKS + 257)
    assert again.prefix_ids == [NUM_RANKS]
    texts = CORNER_CASES + MORE_CASES
    assert again.encode_batch(texts) == load_tokenizer(tmp_path / "a").encode_batch(texts)
    assert (tmp_path / "b" / TIKTOKEN_FILE).read_bytes() == model_file.read_bytes()


def test_kinds_of_files_are_told_apart(model_file, tmp_path):
    pieces = train_tokenizer(tmp_path / "pieces")
    assert (is_tiktoken(model_file), is_sentencepiece(model_file)) == (True, False)
    assert (is_tiktoken(pieces), is_sentencepiece(pieces)) == (False, True)


def test_metas_file_beside_a_tokenizer_json_does_no_harm(folder, model_file, tmp_path, ours):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(model_file, copy / "tokenizer.model")
    assert load_tokenizer(copy).encode_batch(MORE_CASES) == ours.encode_batch(MORE_CASES)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(MissingInput, match=r"no tokenizer\.json; convert\.convert_llama_weights_to_hf writes one"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:700], b"aGk="], r"line 701: expected a base64 token and its rank, found b'aGk='"),
        (lambda lines: [*lines[:700], b"!!! 700"], "line 701: expected a base64 token"),
        (lambda lines: [*lines, b"YQ== 2000"], r"line 2001: the token b'a' stands there twice"),
        (lambda lines: lines[:200], r"\(200 tokens\) has no token for the byte"),
        (lambda lines: [*lines[:600], *lines[601:]], "ranks that leave numbers out; it is damaged or truncated"),
    ],
)
def test_damaged_files_are_named(model_file, tmp_path, change, message):
    damaged = tmp_path / "tokenizer.model"
    damaged.write_bytes(b"\n".join(change(model_file.read_bytes().splitlines())))
    with pytest.raises(InputError, match=message):
        read_ranks(damaged)
