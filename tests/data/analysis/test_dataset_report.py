"""The report of a data set: its counts against independent ones, its page with hostile texts, its command."""

import io
import json
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from alpaca.data.analysis.cleaning import clean_records
from alpaca.data.analysis.page import make_page
from alpaca.data.analysis.summary import Analysis, analyse, count_tokens
from alpaca.data.analysis.verb_plot import NUM_VERBS, count_verbs, draw_png, draw_svg, read_script
from alpaca.data.analysis.verbs import Root
from alpaca.data.encoding.prompt_layout import PromptLayout
from alpaca.data.example import Example
from alpaca.data.examples import encode_examples
from alpaca.data.records import make_reader, read_examples, read_records
from alpaca.data.report import parse_arguments, write_outputs
from alpaca.errors import InputError, MissingInput, OutputExists
from alpaca.text.loading import load_tokenizer
from alpaca.text.prompts import alpaca_prompt
from tests.conftest import ROOT
from tests.data.analysis.test_duplicates import near_copies_slowly

# Records of the 4,000 that were read by eye and found to be so (counted from 0).
READ_BY_EYE = {
    "empty_output": [2335],
    "empty_instruction": [],
    "placeholder_output": [1275, 1750, 1844, 3122, 3141, 3163, 3883],
    "merged_task": [2710, 2930, 3493],
    "label_in_text": [167, 729],
    "refusal": [863, 3181],
    "repeated_lines": [3561, 3978],  # refrains of songs
    "wrong_sum": [2989],
    "leaked_template": [],
    "open_fence": [],
    "cut_ending": [],
    "damaged_text": [],
}
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>&lt;b&gt;<!-- -->"
    "{{7*7}}{% raw %}"
)


@pytest.fixture(scope="module")
def records(real: Path) -> list[dict[str, str]]:
    return json.loads((real / "alpaca_4000.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def analysis(real: Path) -> Analysis:
    path = real / "alpaca_4000.json"
    read = list(read_records(path))
    return analyse(path, read, make_reader(read), load_tokenizer(real / "llama-tokenizer"), progress=False)


def found(analysis: Analysis, name: str) -> list[int]:
    return [finding.index for finding in analysis.findings[name]]


# The real examples --------------------------------------------------------------------------------------------


def test_findings_in_the_real_examples_are_those_read_by_eye(analysis: Analysis):
    assert {name: found(analysis, name) for name in READ_BY_EYE} == READ_BY_EYE


def test_counts_of_the_real_examples_equal_plain_ones(analysis: Analysis, records: list[dict[str, str]]):
    def where(condition) -> list[int]:
        return [index for index, record in enumerate(records) if condition(record)]

    def has_link(text: str) -> bool:
        return any(start in text.lower() for start in ("http://", "https://", "www."))

    def says_none(record: dict[str, str]) -> bool:
        letters = "".join(letter for letter in record["input"].lower() if letter.isalpha())
        return letters in ("noinput", "ninput", "noinputneeded", "noinputrequired", "none") or record["input"] == "N/A"

    assert len(analysis.examples) == analysis.num_records == len(records) == 4000
    assert [index for index, example in analysis.examples.items() if example.input] == where(lambda r: r["input"])
    assert found(analysis, "link_in_output") == where(lambda r: has_link(r["output"]))
    assert found(analysis, "link_in_prompt") == where(lambda r: has_link(r["instruction"] + " " + r["input"]))
    assert found(analysis, "placeholder_input") == where(says_none)
    assert found(analysis, "repeats_prompt") == where(
        lambda r: r["output"].strip() and r["output"].split() in (r["input"].split(), r["instruction"].split())
    )
    whole = [json.dumps(record, sort_keys=True) for record in records]
    assert len(analysis.duplicates.exact) == len(whole) - len(set(whole))
    assert sum(root.kind == "question" for root in analysis.roots) == 332
    kinds = [root.kind for root in analysis.roots]
    asked = sum(record["instruction"].strip().endswith("?") for record in records)
    assert abs(kinds.count("question") - asked) < 40  # an orders may end in a question mark, a question may lack it


def test_tokens_of_the_real_examples_equal_sentencepiece(analysis: Analysis, records: list[dict[str, str]], real: Path):
    processor = SentencePieceProcessor(model_file=str(real / "llama-tokenizer" / "tokenizer.model"))
    prompts = [alpaca_prompt(record["instruction"], record["input"]) for record in records]
    texts = [prompt + record["output"] for prompt, record in zip(prompts, records, strict=True)]
    lengths = [len(ids) + 2 for ids in processor.encode(texts)]  # BOS and EOS
    assert analysis.tokens.lengths == lengths
    assert analysis.tokens.prompt_lengths == [len(ids) + 1 for ids in processor.encode(prompts)]
    assert analysis.tokens.num_cut == len([length for length in lengths if length > 512]) == 2
    assert analysis.tokens.num_tokens_lost == sum(length - 512 for length in lengths if length > 512)


@pytest.mark.parametrize("max_length", [40, 60, 512])
def test_what_a_cut_loses_equals_what_training_reports(max_length: int, real: Path):
    examples = read_examples(real / "alpaca_4000.json")[:300]
    tokenizer = load_tokenizer(real / "llama-tokenizer")
    counts = count_tokens(examples, tokenizer, max_length=max_length, progress=False)
    if max_length == 40:
        with pytest.raises(InputError, match="none of the 5"):
            encode_examples(examples[:5], PromptLayout("alpaca", tokenizer), max_length=40, progress=False)
        assert count_tokens(examples[:5], tokenizer, max_length=40, progress=False).num_all_masked == 5
        return
    report = encode_examples(examples, PromptLayout("alpaca", tokenizer), max_length=max_length, progress=False).report
    assert counts.num_all_masked == report.num_all_masked
    assert counts.num_targets == report.num_targets
    assert counts.num_cut - counts.num_all_masked <= report.num_without_eos <= counts.num_cut


@pytest.mark.slow
def test_near_copies_of_the_real_examples_equal_the_slow_search(analysis: Analysis):
    examples = list(analysis.examples.values())
    assert [(copy.index, copy.of, copy.overlap) for copy in analysis.duplicates.near] == near_copies_slowly(examples)


@pytest.mark.slow
def test_as_many_as_the_whole_alpaca_data_take_no_minute(tmp_path: Path, real: Path):
    """52,000 examples: the real ones, each thirteen times with other words put in."""
    words = sorted({word for e in read_examples(real / "alpaca_4000.json") for word in e.instruction.split()})
    random_ = random.Random(0)
    many = []
    for example in read_examples(real / "alpaca_4000.json"):
        for _ in range(13):
            text = [random_.choice(words) if random_.random() < 0.3 else word for word in example.instruction.split()]
            many.append({"instruction": " ".join(text), "input": example.input, "output": example.output})
    path = tmp_path / "many.json"
    path.write_text(json.dumps(many))
    start = time.process_time()
    write_outputs(parse_arguments(["--data_path", str(path), "--output", str(tmp_path / "r.html")]))
    assert time.process_time() - start < 60


# The page -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements and attributes that a browser would make of a page, and the texts in its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.texts).append(data)


def page_of(records: list[object], name: str = "data.json") -> str:
    numbered = [(f"{name}, record {index}", record) for index, record in enumerate(records)]
    reader = make_reader(numbered)
    analysis = analyse(name, numbered, reader, progress=False)
    _, changes = clean_records(numbered, reader, progress=False)
    return make_page(analysis, changes, png=b"png", cleaned=Path(name))


def test_hostile_texts_stay_texts():
    """In every field, in verbs, objects, evidence, copies, reasons and the file's own name."""
    records: list[object] = [
        {"instruction": f"Write the {HOSTILE}", "input": HOSTILE, "output": f"https://x.org {HOSTILE}\x00"},
        {"instruction": f"Write the {HOSTILE}", "input": HOSTILE, "output": HOSTILE},
        {"instruction": 'Grab the "<b>bold</b>"', "input": "", "output": ""},
        {"instruction": "x</script><script>alert(4)</script> the table", "output": "a"},
        {"instruction": HOSTILE, HOSTILE: 1},
    ]
    harmless = json.loads(json.dumps(records).replace(json.dumps(HOSTILE)[1:-1], "harmless"))
    page, expected = Page(page_of(records, HOSTILE)), Page(page_of(harmless))
    assert page.tags.keys() <= expected.tags.keys() | {"details", "article", "pre", "h3"}
    assert page.tags["script"] == 2
    assert "img" not in page.tags
    assert not {name for name in page.attributes if name.startswith("on")}
    data = json.loads(page.scripts[0])
    assert {verb["verb"] for verb in data["verbs"]} <= {"write", "grab", "x"}
    assert page.scripts[-1] == read_script()
    assert page.texts.count(HOSTILE) == 1  # the heading
    assert page.texts.count(f"\n{HOSTILE}") >= 4  # inputs and outputs; a line's end after <pre> is dropped
    assert all(link.startswith("data:image/png") for link in page.links)


def test_the_page_loads_nothing_and_allows_its_own_script_only(analysis: Analysis):
    text = make_page(analysis, [], png=draw_png(count_verbs(analysis.roots)))
    page = Page(text)
    assert page.links
    assert all(link.startswith("data:image/png") for link in page.links)
    assert not re.search(r"@import|url\(", text.split("</style>")[0])
    assert "default-src 'none'" in text
    assert re.search(r"script-src 'sha256-[\w+/]+='", text)
    for number in ("1,549 (38.73%)", "510,096", "2 (0.05%)", "3,661 (91.53%)", "55 (1.38%)"):
        assert number in text


def test_unreadable_records_are_listed_and_counted_apart():
    good = {"instruction": "Name it.", "output": "Red."}
    text = page_of([{"instruction": "No answer."}, good, 5])
    assert "the field &#39;output&#39; is missing" in text
    assert "record 2" in text
    assert "2 in all" in text
    with pytest.raises(InputError, match="holds no examples"):
        page_of([5])


def test_a_set_without_orders_has_a_page():
    assert "<svg" in page_of([{"instruction": "你好", "output": "好"}])


# The figure ---------------------------------------------------------------------------------------------------


def test_the_figure_counts_as_a_table_would():
    roots = [Root("order", "write", "story")] * 5 + [Root("order", "write", "poem")] * 3 + [Root("order", "write")] * 2
    roots += [Root("order", "come")] * 9 + [Root("question", "what")] * 7 + [Root("other")]
    roots += [Root("order", f"verb{number}", "thing") for number in range(30)]
    verbs = count_verbs(roots)
    assert [(verb.verb, verb.count) for verb in verbs[:2]] == [("write", 10), ("come", 9)]
    assert verbs[0].objects == [("story", 5), ("poem", 3)]
    svg = draw_svg(verbs)
    data = json.loads(svg.split('id="verb-data">')[1].split("</script>")[0])
    assert len(data["verbs"]) == NUM_VERBS
    assert data["total"] == 49
    assert data["verbs"][0] == {"verb": "write", "count": 10, "objects": [["story", 5], ["poem", 3]], "rest": 2}
    assert svg.count("<path") == 2 * NUM_VERBS + 1


def test_no_verb_or_object_can_end_the_figures_script():
    svg = draw_svg(count_verbs([Root("order", "</script><script>", "</script><img src=x onerror=alert(1)>&amp;")]))
    page = Page(svg)
    assert page.tags["script"] == 1
    assert "img" not in page.tags
    assert json.loads(page.scripts[0])["verbs"][0]["objects"] == [["</script><img src=x onerror=alert(1)>&amp;", 1]]


def test_one_verb_alone_is_a_full_ring_and_letters_beyond_the_font_do_no_harm():
    from PIL import Image

    verbs = count_verbs([Root("order", "ärgere", "ภาษา$x^")])
    assert draw_svg(verbs).count("<path") == 2
    image = Image.open(io.BytesIO(draw_png(verbs)))
    assert image.size == (1600, 1600)
    assert len(image.convert("RGB").getcolors(10**6)) > 10
    assert draw_svg([]) == ""
    assert draw_png([]).startswith(b"\x89PNG")


# The command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_page_figure_and_mended_set(tmp_path: Path):
    source = tmp_path / "data.json"
    source.write_text(json.dumps([{"instruction": "Name it.", "input": "<noinput>", "output": "Red."}] * 2))
    command = [
        sys.executable,
        "-m",
        "alpaca.data.report",
        "--data_path",
        str(source),
        "--output",
        str(tmp_path / "r.html"),
    ]
    command += ["--clean", str(tmp_path / "clean.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 examples, 2 (100.0%) with an input" in done.stdout
    assert "mended set: 1 records; 1 dropped, 2 changed" in done.stdout
    names = {"data.json", "r.html", "r-verbs.png", "clean.json", "clean.json.log.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert read_examples(tmp_path / "clean.json") == [Example(instruction="Name it.", output="Red.")]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (["--data_path", "nowhere.json"], MissingInput, "no data at"),
        (["--data_path", "d.json", "--clean", "d.json", "--overwrite"], InputError, "files of their own"),
        (["--data_path", "d.json", "--output", "d.json", "--overwrite"], InputError, "files of their own"),
        (["--data_path", "d.json", "--output", "."], InputError, "is a folder"),
        (["--data_path", "d.json", "--output", "there.html"], OutputExists, "--overwrite"),
        (["--data_path", "d.json", "--model_max_length", "0"], InputError, "1 or more, found 0"),
        (["--data_path", "d.json", "--tokenizer", "nowhere"], MissingInput, "no tokenizer folder"),
        (["--data_path", "bad.json"], InputError, "invalid JSON"),
        (["--data_path", "empty.json"], InputError, "holds no examples"),
    ],
)  # fmt: skip
def test_mistakes_are_said_and_nothing_is_written(
    arguments: list[str], error: type[Exception], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    files = {
        "d.json": '[{"instruction": "a", "output": "b"}]',
        "there.html": "old",
        "bad.json": "[1,",
        "empty.json": "[]",
    }
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(error, match=match):
        write_outputs(parse_arguments(arguments))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
