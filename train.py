"""Fine-tune a model with the Alpaca recipe: `python train.py --model_name_or_path … --data_path …`, or by torchrun."""

import logging
import os
import sys
import time

from alpaca.errors import AlpacaError, run_command


def main() -> None:
    """Parse the command line and train; several processes started by torchrun share the work."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("alpaca").setLevel(logging.INFO if _is_main() else logging.ERROR)
    from alpaca.training.config import parse_flags

    config = parse_flags(sys.argv[1:])
    from alpaca.training.distributed import leave_world  # after the flags: these imports take seconds
    from alpaca.training.loop import TrainingStopped, train

    try:
        train(config)
    except TrainingStopped as stopped:
        if _is_main():
            print(stopped, file=sys.stderr)
        status = 128 + stopped.signal if stopped.signal else 1
        leave_world(status)
        sys.exit(status)
    leave_world()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _main_of_one_or_many() -> None:
    """`main`; a mistake is made in every process, so rank 0 says it and torchrun ends the others before they do."""
    try:
        main()
    except AlpacaError:
        if not _is_main():
            time.sleep(3)
        raise


if __name__ == "__main__":
    run_command(_main_of_one_or_many)
