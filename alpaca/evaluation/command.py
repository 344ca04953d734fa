"""How good is a fine-tune? lm-eval's tasks, the loss of held-out examples, and answers beside the base model's.

    script/evaluate --weights alpaca_out --base weights/llama-7b --tasks hellaswag,arc_easy --output scores.json

The result is one JSON file, and beside it the same as a page (scores.html). What is missing or wrong is said before a
model is loaded.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca import cpu_threads

cpu_threads.set_defaults()  # before anything below imports torch

from alpaca.data.example import AnyExample
from alpaca.data.records import read_examples
from alpaca.errors import InputError, MissingInput, run_command
from alpaca.evaluation.answers import answer_prompts, read_prompts, summarize
from alpaca.evaluation.models import find_candidates, opened
from alpaca.evaluation.page import write_page
from alpaca.evaluation.provenance import provenance
from alpaca.evaluation.tasks import find_tasks, run_tasks
from alpaca.files.atomic import write_json
from alpaca.formats.precisions import DTYPES
from alpaca.serving.settings import ServerSettings

SEED = 1234  # lm-eval's


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="folder or archive of the model, or of an adapter")
    parser.add_argument("--base", help="the model that it is held against; of an adapter its own base")
    parser.add_argument("--base_model", help="the model under an adapter, where only the adapter is evaluated")
    parser.add_argument("--tasks", default="", help="lm-eval's names, or YAML files, separated by commas")
    parser.add_argument("--include_path", help="folder with tasks of one's own")
    parser.add_argument("--num_fewshot", type=_whole, help="solved examples before each question: the task's number")
    parser.add_argument("--limit", type=_whole, help="questions of each task: all")
    parser.add_argument("--data", help="examples for the loss, as train.py takes them: JSON or JSON lines")
    parser.add_argument("--model_max_length", type=_whole, default=512, help="tokens an example is cut to: %(default)s")
    parser.add_argument("--prompts", help="a JSON object of inputs a line, as script/predict --input takes them")
    parser.add_argument("--output", required=True, help="the JSON file; the page is written beside it")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU by default")
    parser.add_argument("--seed", type=_whole, default=SEED, help="of few-shot examples and of sampling: %(default)s")
    return parser.parse_args(arguments)


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def main() -> None:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    result = evaluate(options, here=Path(os.environ.get("ALPACA_CALLER", ".")))
    print(json.dumps(_short(result), ensure_ascii=False))


def evaluate(options: argparse.Namespace, *, here: Path) -> dict[str, Any]:
    """Measure all that was asked for, and write it. Paths start at `here`. Raises AlpacaErrors."""
    names = [name for name in options.tasks.split(",") if name]
    if not (names or options.data or options.prompts):
        raise InputError("nothing to evaluate: give --tasks, --data or --prompts")
    output = _check_output(here / options.output)
    names = [str(here / name) if (here / name).is_file() else name for name in names]
    include_path = here / options.include_path if options.include_path else None
    known = find_tasks(names, include_path) if names else None
    examples = read_examples(_place(options.data, here)) if options.data else None
    records = read_prompts(here / options.prompts) if options.prompts else None
    weights, base, under = (
        place and _place(place, here) for place in (options.weights, options.base, options.base_model)
    )
    candidates = find_candidates(weights, base)
    result: dict[str, Any] = {
        "models": {one.role: one.describe() for one in candidates},
        "provenance": provenance(seed=options.seed),
    }
    settings = ServerSettings(dtype=options.dtype, base_model=(base or under) if candidates[0].is_adapter else None)
    with opened(candidates, settings) as models:
        for candidate, engine, adapter in models:
            found = _measure(options, engine, adapter, names=names, known=known, examples=examples, records=records)
            for part, values in found.items():
                result.setdefault(part, {})[candidate.role] = values
    if records:
        result["prompts"] = records
    write_json(output, result)
    write_page(output.with_suffix(".html"), result)
    return result


def _measure(
    options: argparse.Namespace,
    engine: Any,
    adapter: str | None,
    *,
    names: list[str],
    known: Any,
    examples: list[AnyExample] | None,
    records: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """What is found of one model, by the parts of the result."""
    from alpaca.evaluation.held_out import measure_loss

    found: dict[str, Any] = {}
    if examples:
        found["held_out"] = measure_loss(engine, examples, adapter=adapter, max_length=options.model_max_length)
    if names:
        found["tasks"] = run_tasks(
            engine, names, known, adapter=adapter, num_fewshot=options.num_fewshot, limit=options.limit,
            seed=options.seed,
        )  # fmt: skip
    if records:
        answers = answer_prompts(engine, records, adapter=adapter, seed=options.seed)
        found["answers"] = {"summary": summarize(answers), "each": answers}
    return found


def _place(text: str, here: Path) -> str:
    """A path of the command line from where it was typed; what is no path here stays, such as an address."""
    return str(here / text) if (here / text).exists() else text


def _check_output(output: Path) -> Path:
    if output.suffix != ".json" or output.is_dir():
        raise InputError(f"--output must name a .json file; found {output}")
    if not output.parent.is_dir():
        raise MissingInput(f"--output {output}: there is no folder {output.parent}")
    return output


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """The result without single answers, for the terminal."""
    parts = {name: result[name] for name in ("models", "held_out") if name in result}
    if "tasks" in result:
        parts["tasks"] = {role: found["results"] for role, found in result["tasks"].items()}
    if "answers" in result:
        parts["answers"] = {role: found["summary"] for role, found in result["answers"].items()}
    return parts


if __name__ == "__main__":
    run_command(main)
