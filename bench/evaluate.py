"""Evaluating: lm-eval with the engine against lm-eval's own `hf` backend, on the same tasks, weights and precision.

    python -m bench.evaluate                    a random LLaMA of 46 M parameters; on two cores about 10 minutes
    python -m bench.evaluate --weights FOLDER   any model of one's own

The tasks are written here, of the Alpaca sample (or of --texts, a text a line): choices (four endings a question,
without and with solved questions before it), whole texts (perplexity), and short answers. Seconds are those inside the
model's methods; lm-eval's own work around them is the same. `hf` runs at each of --batch_sizes, and the ratio is
against its fastest. (Its `auto` begins with 64 sequences of the model's whole context, which takes a CPU minutes.)
Scores must be equal in all digits that lm-eval prints. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as predict.py

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from alpaca.errors import MissingInput, run_command
from alpaca.evaluation.tasks import read_metrics, require_harness
from bench.provenance import ROOT, provenance
from bench.random_model import model_folder

LEAST = 5.0  # times the rate of lm-eval's own backend
_METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
_LONGEST_WORDS, _ENDING_WORDS, _CHOICES = 60, 8, 4


def main() -> None:
    options = parse_arguments()
    require_harness()
    origin = provenance("evaluate", ("torch", "transformers", "lm_eval"))
    with model_folder(options.weights, "46m", "float32") as folder, tempfile.TemporaryDirectory() as made:
        tasks = write_tasks(Path(made), read_texts(options.texts), options.questions)
        rows = {}
        for task in tasks:
            rows[task] = measure_task(folder, task, Path(made), options)
            print(describe_row(task, rows[task]), flush=True)
    print(json.dumps({"bench": "evaluate", "least": LEAST, "questions": options.questions, "tasks": rows, **origin}))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a folder to use instead of a random model")
    parser.add_argument("--texts", type=Path, help="texts of the model's domain, one a line")
    parser.add_argument("--questions", type=int, default=60, help="of each task (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="the shortest of them counts (default: %(default)s)")
    parser.add_argument("--batch_sizes", nargs="+", default=["8", "32"], help="of lm-eval's own backend")
    return parser.parse_args(arguments)


def read_texts(file: Path | None) -> list[str]:
    """Texts with room for a context and an ending."""
    if file is None:
        records = json.loads((ROOT / "alpaca" / "data" / "sample.json").read_text("utf-8"))
        texts = [f"{record['instruction']} {record['output']}" for record in records]
    elif file.is_file():
        texts = file.read_text("utf-8").splitlines()
    else:
        raise MissingInput(f"--texts {file} is no file")
    return [" ".join(text.split()[:_LONGEST_WORDS]) for text in texts if len(text.split()) > 2 * _ENDING_WORDS]


# Tasks --------------------------------------------------------------------------------------------------------------


def write_tasks(
    folder: Path, texts: Sequence[str], num_questions: int, *, perplexity: str = "byte_perplexity"
) -> list[str]:
    """Write tasks and their data into a folder; returns the tasks' names.

    A question is a text without its end; the choices are its own end and those of the three texts after it.
    perplexity: the metric of whole texts. That of words has, for random weights, more digits than float32.
    """
    records = list(map(make_question, [texts] * num_questions, range(num_questions)))
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    choices = {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {
        "choices": choices,
        "choices_5_shot": {**choices, "fewshot_split": "test", "num_fewshot": 5},
        "texts": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": perplexity}, {"metric": "bits_per_byte"}],
        },
        "answers": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 32}, "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, kind in kinds.items():  # JSON is YAML
        (folder / f"bench_{name}.yaml").write_text(json.dumps({"task": f"bench_{name}", **source, **kind}), "utf-8")
    return [f"bench_{name}" for name in kinds]


def make_question(texts: Sequence[str], place: int) -> dict[str, Any]:
    """A question of the text at `place`; when all texts are used up they begin anew, each time cut shorter."""
    turn, place = divmod(place, len(texts))
    own = texts[place].split()[turn:]
    endings = [" ".join(texts[(place + i) % len(texts)].split()[-_ENDING_WORDS:]) for i in range(_CHOICES)]
    answer = place % _CHOICES
    endings[0], endings[answer] = endings[answer], endings[0]
    return {
        "text": " ".join(own),
        "question": " ".join(own[:-_ENDING_WORDS]),
        "choices": endings,
        "answer": answer,
    }


# Measuring ----------------------------------------------------------------------------------------------------------


def measure_task(folder: Path, task: str, include_path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways, the shortest of rounds in which they take turns, and the scores as lm-eval prints them.

    The prefix cache of the engine is emptied between rounds by making it anew.
    """
    hf = {size: open_hf(folder, size) for size in options.batch_sizes}
    times: dict[str, list[float]] = {name: [] for name in ("engine", *hf)}
    scores: dict[str, dict[str, str]] = {}
    for _ in range(options.rounds):
        with open_engine(folder) as engine_lm:
            for name, lm in {"engine": engine_lm, **hf}.items():
                run(lm, task, include_path, limit=2)  # warm
                seconds, scores[name] = run(lm, task, include_path, limit=options.questions)
                times[name].append(seconds)
    best = {name: round(min(seconds), 3) for name, seconds in times.items()}
    own = best.pop("engine")
    return {
        "engine_s": own,
        "hf_s": best,
        "times_hf": round(min(best.values()) / own, 2),
        "scores": scores["engine"],
        "equal": all(found == scores["engine"] for found in scores.values()),
    }


@contextlib.contextmanager
def open_engine(folder: Path) -> Iterator[Any]:
    from alpaca.evaluation.harness import EngineLM
    from alpaca.serving.loading import load_engine
    from alpaca.serving.settings import ServerSettings

    engine = load_engine(folder, ServerSettings(weights=str(folder), dtype="float32"))
    try:
        yield EngineLM(engine, adapter=None, shows_progress=False)
    finally:
        engine.close()


def open_hf(folder: Path, batch_size: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    size = int(batch_size) if batch_size.isdigit() else batch_size
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=size)


def run(lm: Any, task: str, include_path: Path, *, limit: int) -> tuple[float, dict[str, str]]:
    """Seconds inside the model's methods, and the metrics in the digits that lm-eval prints."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    spent = 0.0

    def timed(method: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                spent += time.perf_counter() - start

        return call

    methods = {name: getattr(lm, name) for name in _METHODS}
    for name, method in methods.items():
        setattr(lm, name, timed(method))
    try:
        known = TaskManager(include_path=str(include_path), include_defaults=False)
        found = simple_evaluate(lm, tasks=[task], task_manager=known, limit=limit, bootstrap_iters=0, log_samples=False)
    finally:
        for name, method in methods.items():
            setattr(lm, name, method)
    return spent, {name: f"{value:.4f}" for name, (value, _) in read_metrics(found).items()}


def describe_row(task: str, row: dict[str, Any]) -> str:
    hf = ", ".join(f"batch {size} {seconds:.2f} s" for size, seconds in row["hf_s"].items())
    equal = "equal scores" if row["equal"] else "OTHER SCORES"
    missed = "" if row["times_hf"] >= LEAST else f"  MISSED: {LEAST:g}x"
    return f"{task:22}engine {row['engine_s']:.2f} s   hf {hf}   {row['times_hf']:.2f}x   {equal}{missed}"


if __name__ == "__main__":
    run_command(main)
