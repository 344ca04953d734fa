"""Fine-tune a model with the Alpaca recipe: `python train.py --model_name_or_path … --data_path …`, or by torchrun.

`train` is the same for Cog's training server: a data file in, an archive of weights out.
"""

import asyncio
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path as LocalPath

from cog import Input, Path, current_scope

from alpaca import cpu_threads

cpu_threads.set_defaults()  # before anything below imports torch

from alpaca.archives import open_weights, pack
from alpaca.errors import AlpacaError, InputError, run_command

_one_training = threading.Lock()
_last_output: tempfile.TemporaryDirectory | None = None  # the runtime reads it after `train` returned
_STOPPING_S = 10  # how long a training waits for one that was cancelled to end its step


async def train(
    data: Path = Input(description="Examples: a JSON list or JSON lines of instruction, input (optional) and output"),
    model: str = Input(default="weights/llama-7b", description="Folder or .tar of the base model, in the image or beside it"),
    recipe: str = Input(default="alpaca-7b", choices=["alpaca-7b", "alpaca-13b"], description="Values of what is not given below"),
    method: str = Input(default="full", choices=["full", "lora", "qlora"], description="Train every weight; or an adapter on a frozen base; or the same on a base in 4 bit"),
    lora_r: int | None = Input(default=None, ge=1, description="Rank of an adapter: 8"),
    lora_alpha: float | None = Input(default=None, ge=0.01, description="Scale of an adapter, divided by its rank: 16"),
    lora_target_modules: str | None = Input(default=None, description="Layers that get an adapter: q_proj,v_proj (of BLOOM query_key_value), or all-linear"),
    num_train_epochs: float | None = Input(default=None, ge=0.01, description="Passes over the data; the recipe has 3, for 13B 5"),
    max_steps: int | None = Input(default=None, ge=1, description="Optimizer steps instead of epochs"),
    learning_rate: float | None = Input(default=None, ge=0, description="Highest learning rate; the recipe has 2e-5, for 13B 1e-5; adapters have 3e-4"),
    global_batch_size: int = Input(default=128, ge=1, description="Examples of an optimizer step"),
    per_device_train_batch_size: int = Input(default=4, ge=1, description="Examples of a micro-batch: less takes less memory"),
    model_max_length: int = Input(default=512, ge=2, description="Tokens an example is cut to"),
    seed: int = Input(default=42, ge=0, description="Of the order of the examples"),
) -> Path:  # fmt: skip
    """Fine-tune on one GPU and return a .tar that COG_WEIGHTS takes.

    A coroutine because the image sets COG_MAX_CONCURRENCY for predictions, and the runtime then takes nothing else.
    """
    values = {name: value for name, value in locals().items() if value is not None}
    stop = threading.Event()
    work = asyncio.ensure_future(asyncio.to_thread(_train_to_archive, values, stop))
    try:
        return Path(await asyncio.shield(work))
    except asyncio.CancelledError:
        stop.set()  # the loop ends after its step
        await asyncio.wait([work])
        work.exception()  # that it was stopped is no news
        raise


def _train_to_archive(values: dict[str, object], stop: threading.Event) -> LocalPath:
    global _last_output
    if not _one_training.acquire(timeout=_STOPPING_S):
        raise InputError("a training is running already; wait for its end, or cancel it")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        if _last_output is not None:
            _last_output.cleanup()
        _last_output = tempfile.TemporaryDirectory(prefix="alpaca-training-")
        folder = LocalPath(_last_output.name)
        archive = pack(_train_in(folder / "alpaca_out", values, stop), folder / "weights.tar")
        shutil.rmtree(folder / "alpaca_out")
        return archive
    finally:
        _one_training.release()


def _train_in(output_dir: LocalPath, values: dict[str, object], stop: threading.Event) -> LocalPath:
    from alpaca.training.config import make_config
    from alpaca.training.loop import train as run_training

    base = open_weights(values["model"], named="model")
    flags = {**values, "data_path": str(values["data"]), "model_name_or_path": str(base)}
    del flags["data"], flags["model"]
    config = make_config({**flags, "output_dir": str(output_dir), "save_strategy": "no", "report_to": "none"})
    return run_training(config, on_step=_report_step, should_stop=stop.is_set)


def _report_step(entry: dict[str, float]) -> None:
    for name in ("step", "max_steps", "loss", "learning_rate"):
        current_scope().record_metric(name, entry[name])
    print("step {step}/{max_steps}: loss {loss:.4f}".format(**entry))


def main() -> None:
    """Parse the command line and train; several processes started by torchrun share the work."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("alpaca").setLevel(logging.INFO if _is_main() else logging.ERROR)
    from alpaca.training.flags import parse_flags

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
