"""Scores of a model that was just trained, by lm-eval in a process of its own, whose memory ends with it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from alpaca.errors import InputError
from alpaca.evaluation.tasks import find_tasks, read_metrics
from alpaca.files.reading import read_json

RESULT = "evaluation.json"
Scores = dict[str, tuple[float, float | None]]  # "task metric": value and standard error
_ROOT = Path(__file__).resolve().parents[2]
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_scorer(tasks: str, *, base: str | None) -> Callable[[Path], Scores]:
    """What scores the folder of a final model, and writes evaluation.json and its page there.

    base: the model under an adapter. Raises MissingPackage and InputError now, before anything is trained.
    """
    names = [name for name in tasks.split(",") if name]
    if not names:
        raise InputError("--eval_tasks: expected names of lm-eval's tasks, or YAML files, separated by commas")
    find_tasks(names, None)

    def score(folder: Path) -> Scores:
        output = folder / RESULT
        command = [sys.executable, "-m", "alpaca.evaluation.command", "--weights", str(folder), "--tasks", tasks]
        command += ["--output", str(output), *(["--base_model", base] if base else [])]
        environment = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), environment.get("PYTHONPATH"))))
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise InputError(f"the final model could not be scored: {lines[-1]}")
        (found,) = read_json(output)["tasks"].values()
        return read_metrics(found)

    return score
