"""One of torchrun's processes: trains the configurations of a JSON file one after the other.

A key "crash_after" ends rank 0 after that step with an exception; the other processes hear nothing of it.
"""

import json
import sys
from pathlib import Path

from alpaca.training.config import make_config
from alpaca.training.distributed import leave_world
from alpaca.training.loop import train


def crash_after(step: int, entry: dict) -> None:
    if entry["step"] == step:
        raise RuntimeError("this process broke")


def main() -> None:
    for values in json.loads(Path(sys.argv[1]).read_text()):
        step = values.pop("crash_after", 0)
        train(make_config(values), on_step=lambda entry, step=step: crash_after(step, entry))
    leave_world()


if __name__ == "__main__":
    main()
