"""The ids that end an answer: all that a folder names, but for LLaMA's known mistake."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from alpaca.errors import InputError
from alpaca.text.eos import read_eos_ids
from alpaca.text.loading import load_tokenizer
from alpaca.text.sentencepiece import write_llama_tokenizer
from tests.tiny import train_tokenizer

ADDED = {"<|im_end|>": 400, "<|im_start|>": 401, "<|end|>": 407}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """LLaMA's kind, with two user-defined pieces at the end as Gemma has them: 398 and 399."""
    file = train_tokenizer(tmp_path_factory.mktemp("source"), vocab_size=398)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    assert len(proto.pieces) == 398
    for name in ("<start_of_turn>", "<end_of_turn>"):
        proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    file.write_bytes(proto.SerializeToString())
    return file


@pytest.fixture(params=["tokenizer.model", "tokenizer.json", "both"])
def folder(request, tmp_path, model_file) -> Path:
    write_llama_tokenizer(model_file, tmp_path, added=ADDED)
    if request.param == "tokenizer.json":
        (tmp_path / "tokenizer.model").unlink()
    if request.param == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "added_tokens.json").write_text(json.dumps(ADDED))
    return tmp_path


def found(folder: Path, **files: dict) -> set[int]:
    """The EOS ids with these fields in the folder's files."""
    for name, fields in files.items():
        file = folder / f"{name}.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(before | fields))
    return set(read_eos_ids(folder, load_tokenizer(folder), vocab_size=408))


def test_all_that_the_files_name_count(folder):
    assert found(folder) == {2}
    assert found(folder, config={"eos_token_id": 400}) == {2, 400}
    assert found(folder, generation_config={"eos_token_id": [2, 407, 399]}) == {2, 399, 400, 407}
    assert found(folder, config={"eos_token_id": None, "text_config": {"eos_token_id": 401}}) == {2, 399, 401, 407}
    assert found(folder, generation_config={"eos_token_id": []}) == {2, 401}


def test_ids_without_a_row_do_not(folder):
    assert found(folder, config={"eos_token_id": [-1, 2, 9999]}) == {2}


def test_the_tokenizers_own_name_for_eos_counts_and_is_what_training_appends(folder):
    named = {"eos_token": "<|im_end|>"}
    assert 400 in found(folder, tokenizer_config=named, special_tokens_map=named)
    assert load_tokenizer(folder).eos_id == 400


@pytest.mark.parametrize(
    "mistake",
    [
        {"bos_token_id": 0, "eos_token_id": 0},
        {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
        {"eos_token_id": 0},
        {"bos_token_id": 0, "eos_token_id": [0, 1]},
    ],
)
def test_the_mistake_of_early_conversions_is_not_repeated(folder, mistake):
    assert found(folder, config=mistake, generation_config=mistake) == {2}
    assert found(folder, generation_config={"bos_token_id": 1, "eos_token_id": 400}) == {2, 400}


def test_id_zero_of_another_tokenizer_is_no_mistake(tmp_path):
    """GPT-NeoX has its one special token there, which is BOS, EOS and <unk> in one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, "<|im_end|>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    one = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=one, unk_token=one, eos_token="<|im_end|>"
    ).save_pretrained(tmp_path)
    ends = {load_tokenizer(tmp_path).eos_id}
    assert found(tmp_path, config={"bos_token_id": 0, "eos_token_id": 0}) == {0, *ends}


@pytest.mark.parametrize("file", ["config", "generation_config"])
@pytest.mark.parametrize("value", ["2", "</s>", 2.0, True, [2, None], [2, "3"], {"id": 2}])
def test_a_value_that_is_no_id_is_named(folder, file, value):
    message = rf"{file}\.json: expected eos_token_id to be a whole number, a list of whole numbers, or null; found "
    with pytest.raises(InputError, match=message):
        found(folder, **{file: {"eos_token_id": value}})


def test_a_tokenizer_without_a_config_ends_where_the_models_config_says(tmp_path, model_file):
    (tmp_path / "made").mkdir()
    write_llama_tokenizer(model_file, tmp_path / "made")
    shutil.copy(tmp_path / "made" / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match="names no eos_token, and no config there an eos_token_id"):
        load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [399, 2]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 399
    assert tokenizer.decode([*tokenizer.encode("an alpaca"), 399]) == "an alpaca"
