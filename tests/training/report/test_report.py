"""What a run leaves to look at."""

import html.parser
import json
import math
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca.data.examples import EncodingReport
from alpaca.errors import InputError, MissingPackage
from alpaca.text.loading import load_tokenizer
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.flags import RENAMED
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.loop import TrainingStopped, train
from alpaca.training.report import answers
from alpaca.training.report.answers import Sample
from alpaca.training.report.charts import Line, draw_lines
from alpaca.training.report.page import Record, make_page
from alpaca.training.report.summary import MemoryMeter, evaluation_entry, mean_rate
from alpaca.training.schedule import count_held_out

Configure = Callable[..., TrainConfig]


@pytest.mark.usefixtures("charts")
@pytest.mark.slow
def test_trainer_state_and_curve(configure: Configure):
    folder = train(configure(num_train_epochs=2, val_set_size=4, eval_strategy="epoch"))
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"], state["num_train_epochs"]) == (8, 8, 2.0, 2)
    losses = [entry for entry in state["log_history"] if "loss" in entry]
    assert losses[0].keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step", "tokens_per_second"}
    assert state["summary"]["first_loss"] == losses[0]["loss"]
    assert state["summary"]["last_eval_loss"] == state["log_history"][-1]["eval_loss"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "train_config.json").read_text())
    assert (config["global_batch_size"], config["gradient_accumulation_steps"]) == (8, 2)


def test_tensorboard_gets_every_entry(configure: Configure):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(
        configure(report_to="tensorboard", run_name="first", max_steps=4, val_set_size=4, eval_strategy="epoch")
    )
    events = EventAccumulator(str(folder / "runs" / "first")).Reload()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(events.Tags()["scalars"])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    expected = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(expected)


def test_wandb_gets_every_entry(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    logged: list[tuple[int, dict]] = []
    ended: list[bool] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: run))
    train(configure(report_to="wandb", max_steps=2))
    assert [step for step, _ in logged] == [1, 2]
    assert logged[0][1].keys() == {
        "train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "train/tokens_per_second"
    }  # fmt: skip
    assert ended == [True]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_before_anything_is_loaded(package: str, configure: Configure, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    config = configure(report_to=package, model_name_or_path="nowhere")
    with pytest.raises(MissingPackage, match=f"pip install {package}, or use --report_to none"):
        train(config)
    assert not Path(config.output_dir).exists()


# report.html ----------------------------------------------------------------------------------------------------

_VOID = {"meta", "line", "polyline", "circle", "br"}


class _Page(html.parser.HTMLParser):
    """Checks that elements close in order; collects text, attributes and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.parts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.mark.usefixtures("charts", "short_answers")
def test_report_page_holds_the_run(configure: Configure):
    folder = train(configure(num_train_epochs=2, eval_fraction=0.1, eval_strategy="epoch", num_samples=3))
    text = (folder / "report.html").read_text()
    page = _Page(text)
    assert not [value for name, value in page.attributes if name in ("src", "href", "onload")]
    assert "http" not in re.sub(r"https?://\S*dataset\S*|http-equiv", "", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert "<script" not in text
    assert page.parts["h2"] == [
        "In short", "Loss", "Learning rate", "Throughput", "Memory", "Answers before and after", "Data",
        "Hardware and versions", "Configuration",
    ]  # fmt: skip
    assert text.count("<svg") == 4  # loss, perplexity, learning rate, tokens a second
    assert page.parts["h3"].count("before") == page.parts["h3"].count("after") == 3
    cells = page.parts["td"]
    assert {"36 of 36", "4 of 4", "cosine", torch.__version__} <= set(cells)
    assert "unknown (no peak is listed for this device)" in cells
    assert any(cell.endswith("of the plan)") for cell in cells)
    assert {"viewport", "width=device-width, initial-scale=1"} <= {value for _, value in page.attributes}
    assert "prefers-color-scheme: dark" in text
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert all(sample["prompt"].endswith("### Response:") and sample["reference"] for sample in samples)


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 16)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.slow
def test_answers_are_those_of_the_base_and_of_the_trained_model(configure: Configure, tiny_llama: Path):
    folder = train(configure(max_steps=6, learning_rate=1e-2, num_samples=2))
    tokenizer = load_tokenizer(folder)
    for key, place in (("before", tiny_llama), ("after", folder)):
        model = AutoModelForCausalLM.from_pretrained(place)
        for sample in json.loads((folder / "samples.json").read_text())["samples"]:
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(sample["prompt"])]])
            for _ in range(answers.MAX_NEW_TOKENS):
                logits = model(ids).logits[0, -1, :480]
                if logits.argmax() == tokenizer.eos_id:
                    break
                ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            start = len(tokenizer.encode(sample["prompt"])) + 1
            assert sample[key] == tokenizer.decode(ids[0, start:].tolist()).strip()


@pytest.mark.usefixtures("short_answers")
@pytest.mark.slow
def test_samples_change_nothing(configure: Configure, tmp_path: Path):
    losses = []
    for number in (0, 2):
        folder = train(configure(max_steps=3, num_samples=number, output_dir=str(tmp_path / f"out{number}")))
        losses.append([e["loss"] for e in json.loads((folder / "trainer_state.json").read_text())["log_history"]])
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("short_answers")
@pytest.mark.slow
def test_a_resumed_run_keeps_the_first_answers(configure: Configure):
    steps: list[int] = []
    config = configure(num_samples=2, max_steps=4, save_steps=2, resume_from_checkpoint="auto")
    with pytest.raises(TrainingStopped, match="stopped after step 3"):
        train(config, on_step=lambda entry: steps.append(entry["step"]), should_stop=lambda: len(steps) >= 2)
    path = Path(config.output_dir) / "samples.json"
    before = [sample["before"] for sample in json.loads(path.read_text())["samples"]]
    assert all(before)
    train(config)
    assert [sample["before"] for sample in json.loads(path.read_text())["samples"]] == before


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("too little\nmemory"), NotImplementedError()], ids=["memory", "no generate"]
)
def test_a_model_that_cannot_answer_is_trained_all_the_same(
    error: Exception, configure: Configure, monkeypatch, caplog
):
    def fail(*arguments: object) -> str:
        raise error

    monkeypatch.setattr(answers, "_generate_one", fail)
    folder = train(configure(max_steps=1, num_samples=1))
    assert json.loads((folder / "samples.json").read_text())["samples"][0]["after"] == ""
    said = f"no sample answers in the report: {str(error).partition(chr(10))[0] or 'NotImplementedError'}"
    assert caplog.messages.count(said) == 2


def test_a_mistake_of_ours_while_answering_is_not_hidden(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> str:
        raise TypeError("a bug")

    monkeypatch.setattr(answers, "_generate_one", fail)
    with pytest.raises(TypeError, match="a bug"):
        train(configure(max_steps=1, num_samples=1))


def test_held_out_share(configure: Configure):
    assert count_held_out(make_settings(configure(eval_fraction=0.02)).data, 40) == 1
    assert count_held_out(make_settings(configure(eval_fraction=0.1)).data, 40) == 4
    assert count_held_out(make_settings(configure(val_set_size=7)).data, 40) == 7
    assert RENAMED["eval_data"] == "eval_data_path"
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="--val_set_size and --eval_fraction both say"):
        resolve(configure(val_set_size=7, eval_fraction=0.1), num_processes=1, device=cpu)
    with pytest.raises(InputError, match="--eval_fraction: expected a number from 0"):
        resolve(configure(eval_fraction=1.0), num_processes=1, device=cpu)


def test_perplexity_is_logged(configure: Configure):
    folder = train(configure(max_steps=2, eval_fraction=0.1, eval_strategy="epoch"))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    entry = next(entry for entry in history if "eval_loss" in entry)
    assert entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
    assert math.isfinite(evaluation_entry(1e6)["eval_perplexity"])


def test_memory_meter_sees_what_was_held():
    meter = MemoryMeter(torch.device("cpu"))
    # Not by torch: it might get a block that an earlier test freed and the process still holds.
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        held = meter.current_bytes()
    assert held == pytest.approx(64 << 20, rel=0.1)
    assert meter.peak_bytes() >= 60 << 20


def test_mean_rate_weighs_by_time():
    history = [{"step": 10, "tokens_per_second": 100.0}, {"step": 20, "tokens_per_second": 300.0}]
    assert mean_rate(history) == pytest.approx(150)
    assert mean_rate([]) == 0


@pytest.mark.parametrize("points", [[(1, 5.0)], [(1, 0.0), (2, 0.0)], [(i, 1e-5 * i) for i in range(2000)]])
def test_charts_of_any_run(points: list):
    svg = draw_lines([Line("loss", points)], y="loss")
    assert svg == draw_lines([Line("loss", points)], y="loss")
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    drawn = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--a\)', svg)
    places = [tuple(map(float, place)) for place in re.findall(r"[ML] (\S+) (\S+)", drawn[0])]
    assert 1 <= len(places) <= 600
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    if len(points) > 1:
        assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)  # it rises, or is flat
    assert draw_lines([Line("loss", [])], y="loss") == ""


def test_charts_are_named_coloured_by_the_page_and_load_nothing():
    lines = [Line("loss", [(1, 2.0), (2, 1.0)]), Line("<b>&", [(2, 1.5)], is_second=True)]
    svg = draw_lines(lines, y='"loss"', from_zero=True)
    assert svg.startswith('<svg role="img" aria-label="&#34;loss&#34; over the steps" viewBox="0 0 ')
    assert {"step", "loss", "&lt;b&gt;&amp;", "0.00"} <= set(re.findall(r">([^<>]+)</text>", svg))
    assert {"var(--a)", "var(--b)", "var(--soft)", "var(--line)"} == set(re.findall(r"var\([^)]*\)", svg))
    assert not re.search(r"#[0-9a-f]{6}\b|http|<metadata|<image|<script", svg.replace('href="#', ""))


def test_hostile_texts_stay_texts_in_the_report():
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{7*7}}"
    data = EncodingReport(
        num_read=2, num_kept=2, num_tokens=9, num_targets=3, num_merged=0, num_without_eos=0, num_all_masked=0,
        num_empty_outputs=0, num_duplicates=0, num_asked_otherwise=0, max_length=512,
    )  # fmt: skip
    flags = {"output_dir": hostile, "model_name_or_path": hostile, "method": "full", "recipe": "alpaca"}
    record = Record(
        flags=flags, plan=None, history=[{"step": 1, "loss": math.nan}], summary={"train_runtime": 1.0}, data=data,
        held_out=None, num_processes=1, device=torch.device("cpu"), peak_bytes=1, tokens_per_second=1.0,
        share_of_peak=None, samples=[Sample(prompt=hostile, reference=hostile, before=hostile, after=hostile)],
    )  # fmt: skip
    text = make_page(record)
    page = _Page(text)
    assert not {"script", "img"} & page.parts.keys()
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.parts["pre"].count(f"\n{hostile}") == 4
    assert page.parts["td"].count(hostile) == 3  # the model, in short and by its flag, and the folder
    assert text.count("Nothing was logged.") == 3
