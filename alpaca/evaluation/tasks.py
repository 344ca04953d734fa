"""Runs lm-eval's tasks, which are an optional package, on an engine. Everything is checked before any work is done."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca.errors import InputError, MissingPackage
from alpaca.files.names import quote_name

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from alpaca.serving.engine import Engine

_KEPT = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")


def require_harness() -> None:
    """Raise MissingPackage where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackage("--tasks are run by lm-eval, which is not installed: pip install --group evaluate")


def find_tasks(names: Sequence[str], include_path: Path | None) -> "TaskManager":
    """lm-eval's index of tasks, those of a folder of one's own among them.

    Raises InputError for a name that is neither a task, a group nor a tag in it, nor a task's YAML file.
    """
    require_harness()
    import difflib

    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include_path {include_path} is no folder of tasks")
    own = str(include_path) if include_path else None
    known = TaskManager(include_path=own, include_defaults=False)
    if _missing(names, known):  # to read the thousands of its own takes seconds
        known = TaskManager(include_path=own)
    for name in _missing(names, known):
        near = difflib.get_close_matches(name, known.all_tasks, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {len(known.all_tasks):,} others."
        raise InputError(
            f"--tasks: lm-eval has no task {quote_name(name)}; {hint} --include_path adds a folder of them"
        )
    return known


def _missing(names: Sequence[str], known: "TaskManager") -> list[str]:
    return [name for name in names if name not in known.all_tasks and not Path(name).is_file()]


def run_tasks(
    engine: "Engine",
    names: Sequence[str],
    known: "TaskManager",
    *,
    adapter: str | None,
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    """lm-eval's results of an engine: metrics with their standard errors, and of what tasks, of which versions."""
    from lm_eval import simple_evaluate

    from alpaca.evaluation.harness import EngineLM

    found = simple_evaluate(
        EngineLM(engine, adapter=adapter),
        tasks=list(names),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=known,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {name: found[name] for name in _KEPT if name in found}


def read_metrics(results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """ "task metric" -> (value, standard error or None), of the results of `run_tasks`."""
    metrics = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
            metrics[name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return metrics
