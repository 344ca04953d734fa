"""Fine-tune a model with the Alpaca recipe: `python train.py --model_name_or_path … --data_path …`, or by torchrun.

`train` is the same for Cog's training server: a data file in, an archive of weights out.
"""

import asyncio
import logging
import os
import sys
import threading
import time

from cog import Input, Path, current_scope

from alpaca import cpu_threads

cpu_threads.set_defaults()  # before anything below imports torch

from alpaca.errors import AlpacaError, run_command
from alpaca.processes import end_with_parent


async def train(
    data: str = Input(description="Examples as an upload (-i data=@file, a data URL), or at an address the operator lists in ALPACA_DATA_ADDRESSES: instruction, input (optional) and output, or any other form that train.py reads, as JSON or CSV"),
    model: str = Input(default="weights/llama-7b", description="Base model: a folder or archive in weights/ or alpaca_out/, or a name the operator listed in ALPACA_BASE_MODELS"),
    recipe: str = Input(default="alpaca-7b", choices=["alpaca-7b", "alpaca-13b", "alpaca-lora"], description="Values of what is not given below"),
    method: str = Input(default="lora", choices=["full", "lora", "qlora"], description="An adapter on a frozen base; or the same on a base in 4 bit; or train every weight, for which the server mostly needs an upload address"),
    objective: str = Input(default="sft", choices=["sft", "dpo", "orpo", "kto"], description="Learn the answers; or prefer chosen ones to rejected ones (dpo, orpo), or good ones to bad ones (kto), for which the data needs prompt, chosen and rejected, or of kto prompt, completion and label"),
    dpo_beta: float | None = Input(default=None, ge=0.001, description="How closely dpo keeps to the base: 0.1"),
    orpo_beta: float | None = Input(default=None, ge=0.001, description="Weight of orpo's odds ratio: 0.1"),
    kto_beta: float | None = Input(default=None, ge=0.001, description="How closely kto keeps to the base: 0.1"),
    lora_r: int | None = Input(default=None, ge=1, description="Rank of an adapter: 8"),
    lora_alpha: float | None = Input(default=None, ge=0.01, description="Scale of an adapter, divided by its rank: 16"),
    lora_dropout: float | None = Input(default=None, ge=0, le=0.99, description="Dropout before an adapter's matrices: 0.05"),
    lora_target_modules: str | None = Input(default=None, description="Layers that get an adapter: q_proj,v_proj (of BLOOM query_key_value), or all-linear"),
    base_quantization: str | None = Input(default=None, choices=["none", "int8", "nf4"], description="Precision of an adapter's frozen base: none with lora, nf4 with qlora, int8 in the recipe alpaca-lora"),
    num_train_epochs: float | None = Input(default=None, ge=0.01, description="Passes over the data; the recipes have 3, for 13B 5"),
    max_steps: int | None = Input(default=None, ge=1, description="Optimizer steps instead of epochs"),
    learning_rate: float | None = Input(default=None, ge=0, description="Highest learning rate: 3e-4 of adapters, 2e-5 of every weight, for 13B 1e-5; of dpo, orpo and kto 1e-5, and 1e-6"),
    global_batch_size: int = Input(default=128, ge=1, description="Examples of an optimizer step"),
    per_device_train_batch_size: int = Input(default=4, ge=1, description="Examples of a micro-batch: less takes less memory"),
    model_max_length: int | None = Input(default=None, ge=2, description="Tokens an example is cut to: 512, in the recipe alpaca-lora 256"),
    train_on_inputs: bool | None = Input(default=None, description="Prompts carry loss too, as in the recipe alpaca-lora"),
    eval_fraction: float | None = Input(default=None, ge=0, le=0.99, description="Share of the data held out and evaluated on after each epoch: none, in the recipe alpaca-lora 2,000 examples each 200 steps"),
    gradient_checkpointing: str = Input(default="auto", description="Layers whose activations are recomputed, for less memory: auto, True for all, False for none, or how many"),
    numerics: str = Input(default="stanford", choices=["stanford", "fast"], description="With method full: float32 weights as the original, or bfloat16 in five eighths of the memory"),
    save_dtype: str | None = Input(default=None, choices=["float32", "float16", "bfloat16"], description="Of the weights returned: the base model's, of adapters float32"),
    seed: int = Input(default=42, ge=0, description="Of the order of the examples, of those held out and of dropout"),
) -> Path:  # fmt: skip
    """Fine-tune on one GPU and return a .tar that COG_WEIGHTS takes: an adapter's, or with method full a model's.

    A coroutine because the image sets COG_MAX_CONCURRENCY for predictions, and the runtime then takes nothing else.
    """
    values = {name: value for name, value in locals().items() if value is not None}
    from alpaca.training.service import serve_training

    end_with_parent()
    stop, record = threading.Event(), current_scope().record_metric
    work = asyncio.ensure_future(asyncio.to_thread(serve_training, values, stop=stop, record=record))
    try:
        output = await asyncio.shield(work)
        return output if isinstance(output, str) else Path(output)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([work])
        work.exception()  # that it was stopped is no news
        raise


def main() -> None:
    """Parse the command line and train; several processes started by torchrun share the work."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("alpaca").setLevel(logging.INFO if _is_main() else logging.ERROR)
    from alpaca.training.configuration.flags import parse_flags

    config = parse_flags(sys.argv[1:])
    from alpaca.training.distributed import leave_world  # after the flags: these imports take seconds
    from alpaca.training.loop import TrainingStopped, train

    score = None
    if config.eval_tasks and _is_main() and not config.plan_only:
        from alpaca.evaluation.after_training import make_scorer

        score = make_scorer(config.eval_tasks, base=None if config.method == "full" else config.model_name_or_path)
    try:
        train(config, score=score)
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
