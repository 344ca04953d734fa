"""Tokens that a fine-tune added: read in texts and shown in answers as AutoTokenizer has them, in every layout."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from alpaca.errors import InputError
from alpaca.serving.detokenize import CompletionText
from alpaca.text.hugging_face import HuggingFaceTokenizer
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import SentencePieceTokenizer, write_llama_tokenizer
from alpaca.text.tokenizer import Tokenizer
from tests.tiny import TEXT, train_tokenizer

LLAMA = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "add_bos_token": True,
}  # fmt: skip
FLAGS = {
    "<|im_end|>": {"special": True},
    "<|im_start|>": {"special": True, "rstrip": True},
    "<tool>": {},
    "<left>": {"lstrip": True},
    "<right>": {"rstrip": True},
    "<both>": {"lstrip": True, "rstrip": True},
    "qwort": {"single_word": True},
    "<plain>": {"normalized": True},
}
ORDINARY = [token for token, flags in FLAGS.items() if not flags.get("special")]


@dataclass(frozen=True)
class Source:
    """A SentencePiece model, and the ids after its own vocabulary."""

    model_file: Path

    @property
    def added(self) -> dict[str, int]:
        size = SentencePieceProcessor(model_file=str(self.model_file)).get_piece_size()
        return {token: size + at for at, token in enumerate(FLAGS)}

    def decoder(self) -> dict[str, dict]:
        absent = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
        return {str(self.added[token]): {"content": token, **absent, **flags} for token, flags in FLAGS.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source(train_tokenizer(tmp_path_factory.mktemp("source")))


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def with_decoder(folder: Path, source: Source, **changes: object) -> Path:
    write(folder, tokenizer_config={**LLAMA, **changes, "added_tokens_decoder": source.decoder()})
    shutil.copy(source.model_file, folder)
    return folder


def with_legacy_spaces(folder: Path, source: Source) -> Path:
    return with_decoder(folder, source, legacy=True)


def with_added_tokens_file(folder: Path, source: Source) -> Path:
    write(folder, tokenizer_config={**LLAMA, "eos_token": "<|im_end|>"}, added_tokens=source.added)
    shutil.copy(source.model_file, folder)
    return folder


def written_by_transformers(folder: Path, source: Source) -> Path:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(with_decoder(folder.with_name("decoder"), source)).save_pretrained(write(folder))
    return folder


def written_by_transformers_beside_the_model_file(folder: Path, source: Source) -> Path:
    shutil.copy(source.model_file, written_by_transformers(folder, source))
    return folder


def written_by_us(folder: Path, source: Source) -> Path:
    load_tokenizer(with_decoder(folder.with_name("decoder"), source)).save(write(folder))
    return folder


def byte_level(folder: Path, source: Source) -> Path:
    """As Qwen and Llama 3 have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken(token, **{"normalized": False, **flags}) for token, flags in FLAGS.items()])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(write(folder))
    return folder


def word_pieces(folder: Path, source: Source) -> Path:
    """A decoder that puts spaces between the tokens: text depends on what stood before."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(["</s>"])
    backend.add_tokens([AddedToken(token, **{"normalized": False, **flags}) for token, flags in FLAGS.items()])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(write(folder))
    return folder


LAYOUTS: list[Callable[[Path, Source], Path]] = [
    with_decoder, with_legacy_spaces, with_added_tokens_file, written_by_transformers,
    written_by_transformers_beside_the_model_file, written_by_us, byte_level, word_pieces,
]  # fmt: skip


def random_texts(num_texts: int, *, seed: int = 0) -> list[str]:
    """Scripts with and without tokens, and names of tokens. No runs of spaces: AutoTokenizer joins them wrongly."""
    rng = random.Random(seed)
    parts = [
        "alpaca", "the", " ", " ", "\n", "ing", "1", "23", "ខ្ញុំ", "Ꭳ", "ሰ", "€", "é", "😀", "한", "日本", "<", ">", "|",
        "</s>", "<s>", "<unk>", ".", "<0x0A>", *FLAGS,
    ]  # fmt: skip
    made = ("".join(rng.choice(parts) for _ in range(rng.randint(1, 14))) for _ in range(num_texts))
    return [text.replace("  ", " ").replace("  ", " ") for text in made]


def assert_as_auto_tokenizer(folder: Path, texts: list[str]) -> None:
    """The ids of texts, and what is shown of each as a whole answer and after any part of it as the prompt."""
    from transformers import AutoTokenizer

    ours, theirs, rng = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder), random.Random(1)
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode_batch(texts) == expected
    assert (ours.size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    assert ours.prefix_ids == theirs("a")["input_ids"][: len(ours.prefix_ids)]
    for ids in expected:
        specials = [theirs.eos_token_id] * rng.randint(0, 2)
        at = rng.randint(0, len(ids))
        answer = [*ids[:at], *specials, *ids[at:]]
        whole = theirs.decode(answer, skip_special_tokens=True)
        assert streamed(ours, [], answer) == whole
        before = theirs.decode(ids[:at], skip_special_tokens=True)
        if "\ufffd" not in before and before:
            assert before + streamed(ours, ids[:at], answer[at:]) == whole


def streamed(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    text = CompletionText(tokenizer, [*tokenizer.prefix_ids, *prompt])
    return "".join(text.push(token_id) for token_id in answer) + text.finish()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_text_are_auto_tokenizers(tmp_path, source, layout):
    assert_as_auto_tokenizer(layout(tmp_path / "folder", source), random_texts(120))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_text_of_many_texts_are_auto_tokenizers(tmp_path, source, layout):
    assert_as_auto_tokenizer(layout(tmp_path / "folder", source), random_texts(2000, seed=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ordinary_tokens_are_read_and_shown_and_special_ones_are_text(tmp_path, source, layout):
    tokenizer = load_tokenizer(layout(tmp_path / "folder", source))
    listed = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text()).get("added_tokens_decoder")
    for token in ORDINARY:
        (token_id,) = tokenizer.encode(token)
        assert tokenizer.decode([token_id]) == token
        assert listed is None or listed[str(token_id)]["content"] == token
        assert tokenizer.special_id(token) is None
    end = tokenizer.special_id("<|im_end|>")
    assert end is not None
    assert end not in tokenizer.encode("a<|im_end|> b")
    assert tokenizer.decode([*tokenizer.encode("a"), end]) == "a"


def test_a_folder_saved_again_has_the_same_tokens(tmp_path, source):
    for layout in (with_decoder, with_legacy_spaces, with_added_tokens_file):
        first = load_tokenizer(layout(tmp_path / layout.__name__, source))
        first.save(write(tmp_path / f"{layout.__name__} saved"))
        again = load_tokenizer(tmp_path / f"{layout.__name__} saved")
        texts = random_texts(100)
        assert again.encode_batch(texts) == first.encode_batch(texts)
        facts = [(t.bos_id, t.eos_id, t.pad_id, t.size, t.prefix_ids, t.special_ids - {0}) for t in (first, again)]
        assert facts[0] == facts[1]  # <unk>, id 0, is special for transformers; SentencePiece shows it


def test_ids_that_leave_some_out_are_kept(tmp_path, source):
    """Phi-3's are 32000, 32001, 32007 …: `tokenizers` itself would number them 32000, 32001, 32002."""
    size = min(source.added.values())
    added = {"<end>": size, "<tool>": size + 7, "<turn>": size + 10}
    write(tmp_path, tokenizer_config={**LLAMA, "eos_token": "<end>"}, added_tokens=added)
    shutil.copy(source.model_file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.size, tokenizer.eos_id) == (size + 11, size)
    assert tokenizer.encode("<tool>") == [size + 7]
    tokenizer.save(write(tmp_path / "saved"))
    again = load_tokenizer(tmp_path / "saved")
    assert (again.encode("<tool>"), again.size, again.eos_id) == ([size + 7], size + 11, size)


def test_a_tokenizer_json_with_other_pieces_than_tokenizer_model_holds(tmp_path, source, caplog):
    from transformers import AutoTokenizer

    write_llama_tokenizer(source.model_file, write(tmp_path))
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    old = next(piece for piece in reversed(vocabulary) if len(piece) == 1 and piece.isascii())
    content["model"]["vocab"] = {"vicuña" if piece == old else piece: i for piece, i in vocabulary.items()}
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if old not in ("".join(pair), *pair)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("An alpaca") == theirs("An alpaca", add_special_tokens=False)["input_ids"]
    assert f"'vicuña' in tokenizer.json and {old!r} in tokenizer.model; tokenizer.json holds" in caplog.text


def test_a_byte_level_vocabulary_under_llamas_class_is_read_as_written(tmp_path, source):
    folder = byte_level(tmp_path, source)
    texts = random_texts(50)
    expected = load_tokenizer(folder).encode_batch(texts)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    assert load_tokenizer(folder).encode_batch(texts) == expected


# What stands before a prompt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_json", [False, True])
@pytest.mark.parametrize(("said", "num_before"), [(True, 1), (False, 0), (None, 1)])
def test_add_bos_token_is_obeyed(tmp_path, source, has_json, said, num_before):
    write_llama_tokenizer(source.model_file, write(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"add_bos_token": said}
    if said is None:
        del config["add_bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / ("tokenizer.model" if has_json else "tokenizer.json")).unlink()
    assert load_tokenizer(tmp_path).prefix_ids == [1] * num_before


@pytest.mark.parametrize(
    ("template", "prefix"), [("$A </s>", []), ("<s> $A </s>", [1]), ("</s> $A", [2]), ("</s> $A </s>", [2]), ("$A", [])]
)
def test_an_appended_eos_stands_nowhere(tmp_path, source, template, prefix):
    from tokenizers import Tokenizer, processors

    write_llama_tokenizer(source.model_file, write(tmp_path))
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["add_bos_token"], config["add_eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").unlink()
    assert load_tokenizer(tmp_path).prefix_ids == prefix


def test_a_model_file_that_puts_no_space_in_front_drops_none(tmp_path, source):
    """Gemma's."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(source.model_file.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer = load_tokenizer(tmp_path)
    for text in ("an alpaca", " an alpaca", "  x"):
        assert tokenizer.decode(tokenizer.encode(text)) == streamed(tokenizer, [], tokenizer.encode(text)) == text


# What is wrong in the files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config", {"eos_token": 2}, r"tokenizer_config\.json: expected eos_token to be .* found 2"),
        ("special_tokens_map", {"pad_token": ["x"]}, r"special_tokens_map\.json: expected pad_token to be"),
        ("special_tokens_map", {"pad_token": {"content": 0}}, r"special_tokens_map\.json: expected pad_token to be"),
        ("tokenizer_config", {"add_bos_token": "no"}, "expected add_bos_token to be true, false or null; found 'no'"),
        ("tokenizer_config", {"added_tokens_decoder": ["x"]}, "expected added_tokens_decoder to be an object"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "y"}}}, "expected an added token to be a text"),
        ("tokenizer_config", {"added_tokens_decoder": {"999": None}}, "expected an added token to be a text"),
        ("tokenizer_config", {"additional_special_tokens": "<x>"}, "expected additional_special_tokens to be a list"),
        ("added_tokens", {"<x>": "999"}, r"added_tokens\.json: expected an added token to be a text and its id"),
        ("added_tokens", {"<x>": None}, r"added_tokens\.json: expected an added token to be a text and its id"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_json", [False, True])
def test_wrong_values_are_named(tmp_path, source, file, content, message, has_json):
    write_llama_tokenizer(source.model_file, write(tmp_path))
    (tmp_path / ("tokenizer.model" if has_json else "tokenizer.json")).unlink()
    write(tmp_path, **{file: content})
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_null_means_none(tmp_path, source):
    nothing = dict.fromkeys(["bos_token", "pad_token", "add_bos_token", "added_tokens_decoder", "extra_special_tokens"])
    write_llama_tokenizer(source.model_file, write(tmp_path))
    write(tmp_path, tokenizer_config={**nothing, "eos_token": None}, special_tokens_map=nothing)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.prefix_ids) == (1, 2, None, [1])


def test_a_config_can_say_that_no_space_is_put_in_front(source, tmp_path):
    """`add_prefix_space: false`: in the folder as it came, and as it is saved."""
    from transformers import AutoTokenizer

    folder = write(tmp_path / "own", tokenizer_config={**LLAMA, "add_prefix_space": False})
    shutil.copy(source.model_file, folder)
    with_space = shutil.copytree(folder, tmp_path / "usual")
    (with_space / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    text = "Once upon a time  there was"
    saved = write(tmp_path / "saved")
    load_tokenizer(folder).save(saved)
    expected = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert expected != load_tokenizer(with_space).encode(text)
    for place in (folder, saved):
        tokenizer = load_tokenizer(place)
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text
        assert AutoTokenizer.from_pretrained(place)(text, add_special_tokens=False)["input_ids"] == expected
    assert not load_tokenizer(folder).drops_first_space
    assert load_tokenizer(with_space).drops_first_space
