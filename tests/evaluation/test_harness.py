"""lm-eval with the engine, in an environment that has it: its scores are those of the `hf` backend, digit for digit.

The tasks are of the stories that the real small model itself tells, so that it knows what comes next in them.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from alpaca.evaluation.asking import GREEDY, answer_all
from alpaca.serving.loading import load_engine
from alpaca.serving.request import Request
from alpaca.serving.settings import ServerSettings
from bench.evaluate import write_tasks
from tests.conftest import ROOT
from tests.peer_environments import interpreter_with

pytestmark = pytest.mark.slow

PACKAGE = "lm_eval==0.4.13"
NUM_QUESTIONS, NUM_STORIES = 24, 24


@pytest.fixture(scope="session")
def python() -> str:
    """An interpreter with lm-eval beside the project's packages: this one, or that of an environment made once."""
    return interpreter_with("lm_eval", PACKAGE)


@pytest.fixture(scope="module")
def folder(real, tmp_path_factory) -> Path:
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments

    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K"]
    return convert(parse_arguments([*flags, "--output_dir", str(tmp_path_factory.mktemp("stories"))]))


@pytest.fixture(scope="module")
def tasks(folder, tmp_path_factory) -> Iterator[Path]:
    """Choices, choices after solved questions, whole texts and answers, of stories that the model made up."""
    engine = load_engine(folder, ServerSettings(weights=str(folder), dtype="float32"))
    begin = (*engine.tokenizer.prefix_ids, *engine.tokenizer.encode("Once upon a time"))
    values = {**GREEDY, "temperature": 0.8}
    asked = [Request(**{**values, "seed": i}, prompt_ids=begin, max_new_tokens=110) for i in range(NUM_STORIES)]
    stories = ["Once upon a time" + a.text for a in answer_all(engine, [(one, (), False) for one in asked])]
    engine.close()
    made = tmp_path_factory.mktemp("tasks")
    texts = [" ".join(story.split()) for story in stories]
    write_tasks(made, texts, NUM_QUESTIONS, perplexity="word_perplexity")
    return made


def run(python: str, module: str, *arguments: str, home: Path, status: int = 0) -> str:
    given = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [python, *module.split(), *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr


def printed(results: dict) -> dict[str, str]:
    """A task's metrics with their errors in the digits that lm-eval prints."""
    return {
        f"{task} {key}": f"{value:.4f}"
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, float) and "," in key and "word_perplexity_stderr" not in key
    }


NAMES = "bench_choices,bench_choices_5_shot,bench_texts,bench_answers"


def test_scores_are_those_of_lm_evals_own_backend(python, folder, tasks, tmp_path):
    output = tmp_path / "result.json"
    flags = ["--include_path", str(tasks), "--tasks", NAMES]
    ours = ["--weights", str(folder), *flags, "--output", str(output), "--dtype", "float32"]
    run(python, "-m alpaca.evaluation.command", *ours, home=tmp_path)
    theirs = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    theirs += ["--batch_size", "8", "--seed", "1234", "--output_path", str(tmp_path / "hf")]
    run(python, "-m lm_eval", *theirs, *flags, home=tmp_path)
    (file,) = (tmp_path / "hf").rglob("results_*.json")
    found = json.loads(output.read_text())
    own = printed(found["tasks"]["fine-tune"]["results"])
    assert own == printed(json.loads(file.read_text())["results"])
    assert len(own) > 8
    assert float(own["bench_choices acc,none"]) > 0.5  # it knows its own stories: not the scores of nothing
    assert float(own["bench_texts bits_per_byte,none"]) < 2
    page = output.with_suffix(".html").read_text()
    assert f'<td>bench_choices acc</td><td class="num">{own["bench_choices acc,none"]}' in page


def test_an_unknown_task_is_named_with_its_nearest(python, folder, tmp_path):
    flags = ["--weights", str(folder), "--tasks", "hellaswga", "--output", str(tmp_path / "r.json")]
    said = run(python, "-m alpaca.evaluation.command", *flags, home=tmp_path, status=1)
    assert "lm-eval has no task 'hellaswga'; did you mean hellaswag" in said
    assert "weights," not in said  # no model was loaded


@pytest.mark.parametrize(
    ("program", "method"),
    [("train.py", "full"), ("train.py", "lora"), ("-m torch.distributed.run --nproc_per_node=2 train.py", "full")],
    ids=["full", "lora", "two processes"],
)
def test_a_training_ends_with_the_scores_in_its_report(python, folder, tasks, tmp_path, program, method):
    task, output = tasks / "bench_choices.yaml", tmp_path / "out"
    flags = ["--model_name_or_path", str(folder), "--data_path", str(ROOT / "alpaca/data/sample.json")]
    flags += ["--method", method, "--output_dir", str(output), "--max_steps", "1", "--num_samples", "0"]
    said = run(python, program, *flags, "--eval_tasks", str(task), home=tmp_path)
    state = json.loads((output / "trainer_state.json").read_text())
    scores = state["log_history"][-1]
    shown = f"{scores['eval_bench_choices_acc']:.4f} ± "
    assert f"bench_choices acc: {shown}" in said
    page = (output / "report.html").read_text()
    assert "<h2>Scores</h2>" in page
    assert f"<tr><th>bench_choices acc</th><td>{shown}" in page
    found = json.loads((output / "evaluation.json").read_text())
    assert found["tasks"]["fine-tune"]["results"]["bench_choices"]["acc,none"] == scores["eval_bench_choices_acc"]


def test_a_training_with_an_unknown_task_does_not_begin(python, folder, tmp_path):
    flags = ["--model_name_or_path", str(folder), "--data_path", str(ROOT / "alpaca/data/sample.json")]
    flags += ["--output_dir", str(tmp_path / "out"), "--eval_tasks", "no_such_task_at_all"]
    said = run(python, "train.py", *flags, home=tmp_path, status=1)
    assert "lm-eval has no task 'no_such_task_at_all'" in said
    assert not (tmp_path / "out").exists()
