"""Reading, splitting and encoding of examples; ids and labels against an independent copy of the original's steps."""

import dataclasses
import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from alpaca.data import examples as module
from alpaca.data.encoding.prompt_layout import PromptLayout
from alpaca.data.example import Example
from alpaca.data.examples import EncodedDataset, encode_examples, split_examples
from alpaca.data.records import read_examples
from alpaca.errors import InputError, MissingInput, MissingPackage
from alpaca.text.hugging_face import HuggingFaceTokenizer
from alpaca.text.sentencepiece import SentencePieceTokenizer

SAMPLE = Path(module.__file__).with_name("sample.json")
HOSTILE = [  # what tokenizers and formats trip over; an answer that starts with " or - merges with the prompt's colon
    {"instruction": "Quote.", "input": "", "output": '"To be"'},
    {"instruction": "List.", "input": "<No Input>", "output": "- one\n- two"},
    {"instruction": "", "input": " ", "output": " leading and trailing  \n"},
    {"instruction": "</s><s><unk>", "input": "[PAD]", "output": "</s> is text</s>"},
    {"instruction": "{input}", "input": "{instruction}", "output": "{}"},
    {"instruction": "ภาษาไทย 🦙👩‍👩‍👧", "input": "\u2028\x00\t\r\n", "output": "ช้าง ม้า \ufeff e\u0301 \U0001f999"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Write much. " * 40, "input": "", "output": "a long answer, " * 200},
]


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of LLaMA's kind (BPE, byte fallback, text as it is), trained on the sample set."""
    lines = [
        line
        for record in json.loads(SAMPLE.read_text("utf-8"))
        for text in record.values()
        for line in text.split("\n")
    ]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, "### Instruction:", "### Input:", "### Response:"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(model_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model_file)


@pytest.fixture(scope="session")
def records() -> list[dict[str, str]]:
    return [*json.loads(SAMPLE.read_text("utf-8")), *HOSTILE]


def to_examples(records: list[dict[str, str]]) -> list[Example]:
    return [Example(record["instruction"], record["output"], record["input"]) for record in records]


def to_lists(dataset: EncodedDataset) -> list[tuple[list[int], list[int]]]:
    pairs = [dataset.example(index) for index in range(len(dataset))]
    return [(ids.tolist(), labels.tolist()) for ids, labels in pairs]


# The original's preprocessing, written from its description and from nothing of ours ---------------------------


def original_source(record: dict[str, str]) -> str:
    if record.get("input", "") != "":
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
            " response that appropriately completes the request.\n\n### Instruction:\n" + record["instruction"]
            + "\n\n### Input:\n" + record["input"] + "\n\n### Response:"
        )  # fmt: skip
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n" + record["instruction"] + "\n\n### Response:"
    )


def original_pair(
    processor: SentencePieceProcessor, record: dict[str, str], max_length: int
) -> tuple[list[int], list[int]]:
    """One text at a time: tokenize source and source + target, cut both, mask as many labels as the source is long."""
    source = original_source(record)
    source_ids = [processor.bos_id(), *processor.encode(source)]
    ids = [processor.bos_id(), *processor.encode(source + record["output"]), processor.eos_id()]
    num_source = len(source_ids[:max_length])
    ids = ids[:max_length]
    return ids, [-100 if position < num_source else token for position, token in enumerate(ids)]


def original_pairs(
    model_file: Path, records: list[dict[str, str]], *, max_length: int
) -> list[tuple[list[int], list[int]]]:
    processor = SentencePieceProcessor(model_file=str(model_file))
    return [original_pair(processor, record, max_length) for record in records]


def with_targets(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    return [(ids, labels) for ids, labels in pairs if any(label != -100 for label in labels)]


# Encoding = the original ----------------------------------------------------------------------------------------


def test_all_real_examples_equal_the_original_token_by_token(real: Path):
    model_file, path = real / "llama-tokenizer" / "tokenizer.model", real / "alpaca_4000.json"
    expected = original_pairs(model_file, json.loads(path.read_text("utf-8")), max_length=512)
    dataset = encode_examples(read_examples(str(path)), PromptLayout("alpaca", SentencePieceTokenizer(model_file)))
    assert len(dataset) == 4000
    assert to_lists(dataset) == expected
    assert dataset.report.num_tokens == sum(len(ids) for ids, _ in expected) == len(dataset.ids)
    assert dataset.report.num_without_eos == sum(ids[-1] != 2 for ids, _ in expected) == 2


@pytest.mark.parametrize("max_length", [1, 60, 190, 512])
def test_hostile_and_sample_examples_equal_the_original(
    model_file: Path, tokenizer: SentencePieceTokenizer, records: list[dict[str, str]], max_length: int
):
    records = [*records, {"instruction": "", "input": "", "output": ""}]
    expected = with_targets(original_pairs(model_file, records, max_length=max_length))
    if expected:
        assert (
            to_lists(encode_examples(to_examples(records), PromptLayout("alpaca", tokenizer), max_length=max_length))
            == expected
        )
    else:
        with pytest.raises(
            InputError, match=r"none of the \d+ examples has a token to learn from.* --model_max_length"
        ):
            encode_examples(to_examples(records), PromptLayout("alpaca", tokenizer), max_length=max_length)


def test_both_kinds_of_tokenizer_and_literal_eos_text_give_the_same(
    tokenizer: SentencePieceTokenizer, records: list[dict[str, str]], tmp_path: Path
):
    """The original appends EOS as text and takes ids from AutoTokenizer; ours by id, from either tokenizer class."""
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    dataset = encode_examples(to_examples(records), PromptLayout("alpaca", tokenizer))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = [index for index, record in enumerate(records) if "</s>" not in record["output"]]
    texts = [original_source(records[index]) + records[index]["output"] + theirs.eos_token for index in plain]
    assert [to_lists(dataset)[index][0] for index in plain] == [
        theirs(text, truncation=True, max_length=512)["input_ids"] for text in texts
    ]
    (tmp_path / "tokenizer.model").unlink()
    assert to_lists(
        encode_examples(to_examples(records), PromptLayout("alpaca", HuggingFaceTokenizer(tmp_path)))
    ) == to_lists(dataset)


def test_batched_equals_alone(
    tokenizer: SentencePieceTokenizer, records: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
):
    examples = to_examples(records)
    together = to_lists(encode_examples(examples, PromptLayout("alpaca", tokenizer)))
    assert [
        to_lists(encode_examples([example], PromptLayout("alpaca", tokenizer)))[0] for example in examples
    ] == together
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert to_lists(encode_examples(examples, PromptLayout("alpaca", tokenizer), progress=False)) == together


def test_special_tokens_in_the_texts_are_text(tokenizer: SentencePieceTokenizer):
    ids, _ = encode_examples(
        [Example("Say </s>", "</s> <s> [PAD]", "<unk>")], PromptLayout("alpaca", tokenizer)
    ).example(0)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not tokenizer.special_ids & set(ids[1:-1].tolist())
    assert tokenizer.decode(ids.tolist()).endswith("### Response:</s> <s> [PAD]")


# The encoded data set -------------------------------------------------------------------------------------------


def test_tensors_have_the_promised_types_and_shapes(tokenizer: SentencePieceTokenizer, records: list[dict[str, str]]):
    dataset = encode_examples(to_examples(records), PromptLayout("alpaca", tokenizer))
    assert (dataset.ids.dtype, dataset.offsets.dtype, dataset.prompt_lengths.dtype) == (
        torch.int32,
        torch.int64,
        torch.int64,
    )
    assert dataset.offsets.shape == (len(dataset) + 1,)
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in to_lists(dataset)]
    assert {tensor.dtype for tensor in dataset.example(0)} == {torch.int64}


def test_targets_are_the_labels_left_after_the_shift(tokenizer: SentencePieceTokenizer, records: list[dict[str, str]]):
    dataset = encode_examples(to_examples(records), PromptLayout("alpaca", tokenizer))
    expected = [sum(label != -100 for label in labels[1:]) for _, labels in to_lists(dataset)]
    assert dataset.target_counts.tolist() == expected
    assert dataset.report.num_targets == sum(expected)
    unmasked = dataclasses.replace(dataset, trained=torch.ones_like(dataset.trained))
    assert unmasked.target_counts.tolist() == [len(labels) - 1 for _, labels in to_lists(dataset)]


def test_training_on_inputs_masks_nothing(
    tokenizer: SentencePieceTokenizer, model_file: Path, records: list[dict[str, str]]
):
    """alpaca-lora's `train_on_inputs`: the same ids, all of them labels; a prompt that fills the cut teaches, too."""
    originals = original_pairs(model_file, records, max_length=120)
    masked, whole = (
        encode_examples(to_examples(records), PromptLayout("alpaca", tokenizer), max_length=120, train_on_inputs=on)
        for on in (False, True)
    )
    assert to_lists(whole) == [(ids, ids) for ids, _ in originals]
    assert len(masked) < len(whole) == len(records)


def test_subset_holds_the_chosen_examples(tokenizer: SentencePieceTokenizer, records: list[dict[str, str]]):
    dataset = encode_examples(to_examples(records), PromptLayout("alpaca", tokenizer))
    pairs, chosen = to_lists(dataset), [5, 0, len(dataset) - 1, 5]
    assert to_lists(dataset.subset(chosen)) == [pairs[index] for index in chosen]
    assert to_lists(dataset.subset(torch.tensor(chosen))) == [pairs[index] for index in chosen]
    assert dataset.subset(chosen).target_counts.tolist() == dataset.target_counts[chosen].tolist()
    assert len(dataset.subset([])) == len(dataset.subset([]).ids) == 0


def test_index_outside_is_an_error(tokenizer: SentencePieceTokenizer):
    dataset = encode_examples([Example("Name a bird.", "A condor.")], PromptLayout("alpaca", tokenizer))
    assert torch.equal(dataset.example(-1)[0], dataset.example(0)[0])
    with pytest.raises(IndexError, match="out of range"):
        dataset.example(1)


def test_no_examples_encode_to_an_empty_set(tokenizer: SentencePieceTokenizer):
    dataset = encode_examples([], PromptLayout("alpaca", tokenizer))
    assert (len(dataset), dataset.offsets.tolist(), dataset.report.num_kept) == (0, [0], 0)


def test_report_counts_what_the_original_loses_in_silence(tokenizer: SentencePieceTokenizer):
    short = Example("Name a bird.", "A condor.")
    long_answer, long_prompt = Example("Go on.", "on and " * 600), Example("Go on. " * 600, "No.")
    examples = [short, long_prompt, Example("Hush.", ""), short, long_answer, Example("Hush.", " \n"), short]
    dataset = encode_examples(examples, PromptLayout("alpaca", tokenizer))
    report = dataset.report
    assert (report.num_read, report.num_all_masked, report.num_kept) == (7, 1, 6)
    assert (report.num_empty_outputs, report.num_duplicates, report.num_without_eos) == (2, 2, 1)
    kept = to_lists(encode_examples([e for e in examples if e != long_prompt], PromptLayout("alpaca", tokenizer)))
    assert to_lists(dataset) == kept
    assert report.lines() == [
        f"6 of 7 examples: {len(dataset.ids):,} tokens, {int(dataset.target_counts.sum()):,} of them carry loss",
        "1 dropped: their prompt fills all 512 tokens, nothing is left to learn",
        "1 longer than 512 tokens: cut, and without their EOS",
        "2 with an empty output: they teach to answer nothing",
        "2 exact copies of an earlier one",
    ]


def test_example_that_just_fits_keeps_its_eos(tokenizer: SentencePieceTokenizer):
    example = Example("Name a bird.", "A condor.")
    whole = encode_examples([example], PromptLayout("alpaca", tokenizer))
    fits = encode_examples([example], PromptLayout("alpaca", tokenizer), max_length=len(whole.ids))
    cut = encode_examples([example], PromptLayout("alpaca", tokenizer), max_length=len(whole.ids) - 1)
    assert (fits.report.num_without_eos, fits.ids.tolist()) == (0, whole.ids.tolist())
    assert (cut.report.num_without_eos, cut.ids.tolist()) == (1, whole.ids.tolist()[:-1])


def test_report_of_flawless_examples_is_one_line(tokenizer: SentencePieceTokenizer):
    assert (
        len(
            encode_examples(
                to_examples(json.loads(SAMPLE.read_text("utf-8"))), PromptLayout("alpaca", tokenizer)
            ).report.lines()
        )
        == 1
    )


# Reading --------------------------------------------------------------------------------------------------------

TWO = [
    {"instruction": "Zähle\u2028auf.", "input": "ไทย", "output": "eins,\nzwei"},
    {"instruction": "Hush.", "output": "", "id": 7},
]
TWO_READ = [Example("Zähle\u2028auf.", "eins,\nzwei", "ไทย"), Example("Hush.", "")]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TWO, ensure_ascii=False),
        "\r\n " + json.dumps(TWO, indent=2),
        "\n".join(json.dumps(record, ensure_ascii=False) for record in TWO),
        "\n\r\n" + "\r\n".join(json.dumps(record) for record in TWO) + "\r\n \n",
    ],
    ids=["list", "indented list", "lines", "lines of DOS"],
)
def test_content_says_which_kind_of_file(tmp_path: Path, text: str, mark: str, name: str):
    (tmp_path / name).write_bytes((mark + text).encode())
    assert read_examples(str(tmp_path / name)) == TWO_READ


@pytest.mark.parametrize(
    ("fields", "input"),
    [
        ({}, ""),
        ({"input": None}, ""),
        ({"input": ""}, ""),
        ({"input": "<No Input>"}, "<No Input>"),
        ({"input": " "}, " "),
    ],
)
def test_missing_and_null_inputs_are_empty(tmp_path: Path, fields: dict[str, str | None], input: str):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b", **fields}]))
    assert read_examples(path) == [Example("a", "b", input)]


GOOD = '{"instruction": "a", "output": "b"}'
MALFORMED = {
    "empty file": ("", r"data holds no examples; expected at least one record"),
    "white space": (" \n", r"data holds no examples"),
    "empty list": ("[]", r"data holds no examples"),
    "list cut off": (f"[{GOOD},", r"data: expected a JSON list of records, found invalid JSON: .*line 1 column \d+"),
    "a hundred thousand brackets": ("[" * 100_000, r"data: expected a JSON list .* invalid JSON: maximum recursion"),
    "text": ("some text, and more", r"data: expected a JSON list .* text that starts str 'some text, and more'"),
    "header alone": ("instruction,output", r"data holds no examples"),
    "number": ("17", r"data: expected a JSON list of records, one record a line, or a table"),
    "object": ('{"date": []}', r"data holds no examples"),
    "indented object": (
        '{\n "date": 7\n}',
        r"data: expected a JSON list of records, .*found an object with \['date'\]",
    ),
    "line cut off": (f'{GOOD}\n\n{{"instruction"', r"data, line 3: expected a whole record on each line"),
    "list on a line": (f"{GOOD}\n[]", r"record 1 \(counted from 0, line 2\): expected an object .* found list \[\]"),
    "text for a record": (f'[{GOOD}, "b"]', r"data, record 1 \(counted from 0\): expected an object .*found str 'b'"),
    "no output": (
        f'[{GOOD}, {{"instruction": "a"}}]',
        r"record 1 .*: the field 'output' is missing, .*'instruction'\]",
    ),
    "no instruction": ('[{"output": "a"}]', r"record 0 .*: the field 'instruction' is missing"),
    "null output": (
        '[{"instruction": "a", "output": null}]',
        r"record 0 .*field 'output': expected text, found NoneType",
    ),
    "number input": (
        f'{GOOD}\n\n{{"instruction": "a", "input": 7, "output": "b"}}',
        r"record 1 \(counted from 0, line 3\), field 'input': expected text, found int 7; mend or remove the record",
    ),
    "list output": ('[{"instruction": "a", "output": ["b"]}]', r"field 'output': expected text, found list \['b'\]"),
    "not a number": ('[{"instruction": NaN, "output": "b"}]', r"field 'instruction': expected text, found float nan"),
    "lone surrogate": (r'[{"instruction": "a", "output": "\ud83e"}]', r"field 'output': expected valid Unicode text"),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_named_with_what_was_expected(tmp_path: Path, text: str, message: str):
    (tmp_path / "data").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_examples(tmp_path / "data")
    assert str(caught.value).startswith(str(tmp_path / "data"))


def test_bytes_that_are_no_text_are_named(tmp_path: Path):
    (tmp_path / "data.json").write_bytes(json.dumps(TWO, ensure_ascii=False).encode("cp1252", errors="replace"))
    with pytest.raises(InputError, match=r"data\.json is not UTF-8 text \(.*position \d+.*\); save it as UTF-8"):
        read_examples(tmp_path / "data.json")


def test_folder_is_no_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot be read as a file \(Is a directory\)"):
        read_examples(tmp_path)


@pytest.mark.parametrize(
    "name", ["missing.json", "data/missing.jsonl", "./missing", "/missing/data", "owner/name/more", "x"]
)
def test_missing_file_is_named_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MissingInput, match=rf"no data at {name.removeprefix('./')} \(found in .*\); expected a JSON or"
    ):
        read_examples(name)


# Hugging Face data sets -----------------------------------------------------------------------------------------


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load) -> None:
    """The Hub is outside: this stands for its package."""
    package = types.ModuleType("datasets")
    package.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", package)


def test_dataset_id_reads_the_train_split(monkeypatch: pytest.MonkeyPatch):
    def load(name: str, *, split: str) -> list[dict[str, str]]:
        assert (name, split) == ("tatsu-lab/alpaca", "train")
        return TWO

    fake_datasets(monkeypatch, load)
    assert read_examples("tatsu-lab/alpaca") == TWO_READ


def test_malformed_record_of_a_dataset_is_named(monkeypatch: pytest.MonkeyPatch):
    fake_datasets(monkeypatch, lambda name, split: [*TWO, {"text": "a"}])
    with pytest.raises(InputError, match=r"^owner/name, record 2 .*: the field 'instruction' is missing.*\['text'\]"):
        read_examples("owner/name")


def test_dataset_id_without_the_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"no file tatsu-lab/alpaca here, .*: pip install 'datasets>=4'"):
        read_examples("tatsu-lab/alpaca")


def test_dataset_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def load(name: str, *, split: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")

    fake_datasets(monkeypatch, load)
    with pytest.raises(
        MissingInput, match=r"yahma/alpaca-cleaned cannot be loaded \(ConnectionError: .*check the name"
    ):
        read_examples("yahma/alpaca-cleaned")


def test_file_that_exists_wins_over_a_dataset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("tatsu-lab").mkdir()
    Path("tatsu-lab/alpaca").write_text(json.dumps(TWO))
    assert read_examples("tatsu-lab/alpaca") == TWO_READ


# Splitting ------------------------------------------------------------------------------------------------------

NUMBERED = [Example(str(number), "") for number in range(100)]


def test_split_parts_the_examples_in_their_order():
    train, held_out = split_examples(NUMBERED, num_held_out=30, seed=42)
    assert (len(train), len(held_out)) == (70, 30)
    assert sorted([*train, *held_out], key=NUMBERED.index) == NUMBERED
    assert (train, held_out) == tuple(sorted(part, key=NUMBERED.index) for part in (train, held_out))


def test_split_depends_on_the_seed_alone():
    first = split_examples(NUMBERED, num_held_out=30, seed=42)
    torch.manual_seed(1)
    assert split_examples(NUMBERED, num_held_out=30, seed=42) == first
    assert split_examples(NUMBERED, num_held_out=30, seed=43) != first
    assert set(first[1]) < set(split_examples(NUMBERED, num_held_out=31, seed=42)[1])


def test_split_of_nothing_keeps_all():
    assert split_examples(NUMBERED, num_held_out=0, seed=42) == (NUMBERED, [])


@pytest.mark.parametrize("num_held_out", [-1, 100, 2000])
def test_split_leaves_something_to_train_on(num_held_out: int):
    with pytest.raises(InputError, match=r"cannot hold out .* of 100 examples; expected a number from 0 to 99"):
        split_examples(NUMBERED, num_held_out=num_held_out, seed=42)


# The sample set -------------------------------------------------------------------------------------------------


def test_sample_set_is_sound():
    sample = read_examples(SAMPLE)
    assert 90 <= len(sample) <= 120
    assert sum(example.input != "" for example in sample) >= 30
    assert len({(example.instruction, example.input) for example in sample}) == len(sample)
    assert all(example.instruction.strip() and example.output.strip() for example in sample)
    assert all(text == text.strip() for e in sample for text in (e.instruction, e.input, e.output))


def test_sample_set_is_not_from_the_stanford_data(real: Path):
    theirs = {example.instruction for example in read_examples(real / "alpaca_4000.json")}
    assert not theirs & {example.instruction for example in read_examples(SAMPLE)}
