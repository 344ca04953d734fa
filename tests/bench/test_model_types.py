"""The sweep over model types tells right from wrong, goes on where it stopped, and its page names every type."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from alpaca.serving.loading import load_engine
from bench import model_types, tiny_models
from bench.model_types import ROOT, TABLE, make_table, serve_and_compare, try_type, write_tokenizer


@pytest.mark.parametrize(
    ("name", "outcome", "note"),
    [
        ("llama", "LLaMA engine", ""),
        ("gpt2", "transformers", ""),
        ("openai-gpt", "transformers, slowly", "every token computes the whole text again"),
        ("xlnet", "refused", "a model of type xlnet cannot be served"),
        ("musicgen", "not tried", "no tiny model: StrictDataclassFieldValidationError"),
    ],
)
@pytest.mark.fast_rows(2)
def test_a_type_is_told_as_it_is(name, outcome, note, monkeypatch):
    monkeypatch.setattr(model_types, "_PROMPTS", {"short": 30})
    monkeypatch.setattr("alpaca.serving.hugging_face.proof._CHEAP", {"cpu": 0})
    found = try_type(name)
    assert found["outcome"] == outcome
    assert found["note"].startswith(note)


def test_a_wrong_answer_is_told(tmp_path, monkeypatch):
    tiny_models.tiny_model("gpt2").save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 400)

    def load(folder, settings):
        engine = load_engine(folder, settings)
        engine._model.lm_head.weight.data.mul_(-1)
        return engine

    monkeypatch.setattr("alpaca.serving.loading.load_engine", load)
    found = serve_and_compare(tmp_path, 400)
    assert found["outcome"] == "WRONG"
    assert re.match(r"short prompt, n 1: \[\[\d+, .* and not \[\[\d+, ", found["note"])


def test_it_goes_on_where_it_stopped_and_ends_with_1_if_any_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_types, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(model_types, "TABLE", tmp_path / "models.md")
    monkeypatch.setattr(tiny_models, "model_types", lambda: ["a", "b", "c"])
    tried = []

    def try_one(name, *, limit_s):
        tried.append(name)
        if name == "b" and len(tried) == 2:
            raise KeyboardInterrupt
        return {"outcome": "WRONG" if name == "c" else "refused", "note": "said why"}

    monkeypatch.setattr(model_types, "_try_apart", try_one)
    monkeypatch.setattr("sys.argv", ["model_types"])
    with pytest.raises(KeyboardInterrupt):
        model_types.main()
    with pytest.raises(SystemExit, match="wrong answers: c"):
        model_types.main()
    assert tried == ["a", "b", "b", "c"]
    assert json.loads(capsys.readouterr().out) == {"refused": 2, "WRONG": 1}
    assert "| `b` | refused | said why |" in (tmp_path / "models.md").read_text()


def test_a_process_that_hangs_or_dies_is_told(monkeypatch):
    monkeypatch.setattr(model_types, "try_type", lambda name: time.sleep(60))
    assert model_types._try_apart("gpt2", limit_s=0.05)["note"] == "it took longer than 0 s"
    monkeypatch.setattr(model_types, "try_type", lambda name: os._exit(7))
    assert model_types._try_apart("gpt2", limit_s=10)["note"] == "its process ended with status 7"
    monkeypatch.setattr(model_types, "try_type", lambda name: {"outcome": "refused", "note": name})
    assert model_types._try_apart("gpt2", limit_s=10) == {"outcome": "refused", "note": "gpt2"}


def test_the_page_names_every_type_of_the_installed_transformers_and_none_is_wrong():
    text = TABLE.read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert sorted(rows) == sorted(tiny_models.model_types())
    assert set(rows.values()) <= {"LLaMA engine", "transformers", "transformers, slowly", "refused", "not tried"}
    record = json.loads(model_types.RECORD.read_text())
    assert make_table(record["types"]) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.model_types())
def test_no_type_is_wrong_without_a_word(name):
    command = [sys.executable, "-m", "bench.model_types", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["outcome"] != "WRONG", found["note"]
