"""A training in a process of its own that reports its plan and its peak memory: memory_worker.py CONFIG.json."""

import json
import sys
from pathlib import Path

from alpaca.training import loop
from alpaca.training.configuration.config import make_config
from alpaca.training.run import Run


def main() -> None:
    runs = []
    prepare = loop.prepare

    def keep(*arguments: object) -> Run:
        runs.append(prepare(*arguments))
        return runs[0]

    loop.prepare = keep
    loop.train(make_config(json.loads(Path(sys.argv[1]).read_text())))
    memory = runs[0].plan.memory
    print(json.dumps({"planned": memory.peak_bytes, "measured": runs[0].memory.peak_bytes()}))


if __name__ == "__main__":
    main()
