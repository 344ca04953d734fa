"""script/evaluate: what is wrong is said before a model is loaded, and the result is whole."""

import json
import shutil
from pathlib import Path

import pytest

from alpaca.errors import InputError, MissingInput, MissingPackage
from alpaca.evaluation import command, tasks
from alpaca.evaluation.models import find_candidates
from alpaca.evaluation.page import make_page
from alpaca.training.configuration.flags import parse_flags
from tests.conftest import ROOT

SAMPLE = ROOT / "alpaca" / "data" / "sample.json"


def run(tmp_path: Path, weights: Path, *flags: str) -> dict:
    options = command.parse_arguments(["--weights", str(weights), "--output", "result.json", *flags])
    return command.evaluate(options, here=tmp_path)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that loads a model fails."""
    monkeypatch.setattr(command, "opened", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ([], InputError, "nothing to evaluate: give --tasks, --data or --prompts"),
        (["--data", "nothing.json"], MissingInput, "no data at"),
        (["--data", "empty.json"], InputError, "holds no examples"),
        (["--data", "half.json"], InputError, "the field 'output' is missing"),
        (["--prompts", "nothing.jsonl"], MissingInput, "is no file"),
        (["--prompts", "blank.jsonl"], InputError, "has no line with a prompt"),
        (["--prompts", "wrong.jsonl"], InputError, "wrong.jsonl, line 2: expected a JSON object"),
        (["--prompts", "several.jsonl"], InputError, "line 1: n cannot be given here"),
        (["--prompts", "hot.jsonl"], InputError, "temperature must be from 0 to 5"),
        (["--output", "result.txt"], InputError, "must name a .json file"),
        (["--output", "no/result.json"], MissingInput, "there is no folder"),
        (["--tasks", "", "--data", "good.json", "--weights", "elsewhere"], MissingInput, "no model in elsewhere"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path, llama_folder, flags, error, words):
    good = {"instruction": "a", "output": "b"}
    for name, text in {
        "empty.json": "[]", "half.json": '[{"instruction": "a"}]', "good.json": json.dumps([good]), "blank.jsonl": "\n",
        "wrong.jsonl": '{"prompt": "a"}\n["b"]\n', "several.jsonl": '{"prompt": "a", "n": 2}\n',
        "hot.jsonl": '{"prompt": "a", "temperature": 9}\n',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    if "--output" in flags:
        flags = [*flags, "--data", "good.json"]
    with pytest.raises(error, match=words):
        run(tmp_path, llama_folder, *flags)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.usefixtures("no_loading")
def test_without_the_harness_the_line_that_installs_it_is_said_at_once(tmp_path, llama_folder, monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install --group evaluate"):
        run(tmp_path, llama_folder, "--tasks", "hellaswag")


def test_training_says_so_before_it_trains(monkeypatch):
    from alpaca.evaluation.after_training import make_scorer

    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    config = parse_flags(["--model_name_or_path", "m", "--data_path", "d", "--eval_tasks", "hellaswag,arc_easy"])
    with pytest.raises(MissingPackage, match="pip install --group evaluate"):
        make_scorer(config.eval_tasks, base=None)
    with pytest.raises(InputError, match="expected names of lm-eval's tasks"):
        make_scorer(",", base=None)


def test_another_models_tokenizer_is_refused(tmp_path, llama_folder, sentencepiece_model):
    from alpaca.text.sentencepiece import write_llama_tokenizer

    other = Path(shutil.copytree(llama_folder, tmp_path / "other"))
    for file in other.glob("*token*"):
        file.unlink()
    write_llama_tokenizer(sentencepiece_model, other, max_length=64)
    with pytest.raises(InputError, match="different tokenizers"):
        find_candidates(str(other), str(llama_folder))
    same = shutil.copytree(llama_folder, tmp_path / "same")
    assert [one.role for one in find_candidates(str(same), str(llama_folder))] == ["fine-tune", "base"]


@pytest.mark.slow
def test_the_result_has_both_models_and_the_page_shows_it(tmp_path, llama_folder):
    data, prompts = tmp_path / "held_out.json", tmp_path / "prompts.jsonl"
    data.write_text(json.dumps(json.loads(SAMPLE.read_text())[:4]))
    prompts.write_text('{"prompt": "<b>What</b> is an alpaca?", "max_new_tokens": 5}\n{"prompt": "x", "input": "y"}\n')
    flags = ["--base", str(llama_folder), "--data", "held_out.json", "--prompts", "prompts.jsonl"]
    found = run(tmp_path, Path(shutil.copytree(llama_folder, tmp_path / "tuned")), *flags)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(found))
    assert found["models"]["fine-tune"]["name"] == "tuned"
    assert found["models"]["fine-tune"]["fingerprint"] == found["models"]["base"]["fingerprint"]
    assert found["held_out"]["fine-tune"] == found["held_out"]["base"]
    assert found["answers"]["base"]["each"][0]["tokens"] <= 5
    assert {"hardware", "versions", "commit", "command", "seed"} == set(found["provenance"])
    page = (tmp_path / "result.html").read_text()
    assert page == make_page(found)
    assert "&lt;b&gt;What&lt;/b&gt; is an alpaca?" in page
    assert f"{found['held_out']['base']['loss']:.6f}" in page
    assert "Answers side by side" in page
    assert "Scores" not in page


def test_the_metrics_of_lm_evals_results_are_read_with_their_errors():
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 1, "f1_stderr,strict": "N/A"},
            "b": {"alias": " - b", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
        }
    }
    assert tasks.read_metrics(results) == {
        "a acc": (0.5, 0.25), "a f1 (strict)": (1.0, None), "b word_perplexity": (12.5, None),
    }  # fmt: skip


@pytest.mark.slow  # to import PEFT takes seconds
def test_an_adapter_and_its_base_share_an_engine(tmp_path, llama_folder, monkeypatch):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from alpaca.serving import loading

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "held_out.json").write_text(json.dumps(json.loads(SAMPLE.read_text())[:3]))
    loaded, load = [], loading.load_engine
    monkeypatch.setattr(loading, "load_engine", lambda *given: loaded.append(given) or load(*given))
    data = ["--data", "held_out.json"]
    both = run(tmp_path, tmp_path / "adapter", *data, "--base", str(llama_folder))["held_out"]
    assert len(loaded) == 1
    alone = run(tmp_path, tmp_path / "adapter", *data, "--base_model", str(llama_folder))["held_out"]
    base = run(tmp_path, llama_folder, *data)["held_out"]
    assert both == {"fine-tune": alone["fine-tune"], "base": base["fine-tune"]}
    assert alone["fine-tune"]["loss"] != base["fine-tune"]["loss"]
    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    for file in llama_folder.glob("*token*"):
        shutil.copy(file, tmp_path / "merged")
    merged = run(tmp_path, tmp_path / "merged", *data)["held_out"]["fine-tune"]
    assert merged["loss"] == pytest.approx(alone["fine-tune"]["loss"], rel=1e-5)
