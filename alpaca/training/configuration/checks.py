"""Checks of a configuration's values against each other."""

from pathlib import Path

from alpaca.errors import InputError
from alpaca.files.outputs import require_apart
from alpaca.training.configuration.adapters import check_adapter
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.limits import check_each_value
from alpaca.training.configuration.objective import check_objective
from alpaca.training.configuration.parsing import parse_checkpointing, parse_fsdp


def check_values(config: TrainConfig) -> None:
    """Raise InputError for the first value that cannot be meant."""
    check_each_value(config)
    if config.max_steps == 0 or config.max_steps < -1:
        raise InputError(f"--max_steps: expected a number above 0 (or -1 for none), found {config.max_steps}")
    if (config.lr_scheduler_type == "cosine_with_min_lr") != bool(config.min_lr_rate):
        raise InputError(
            "--lr_scheduler_type cosine_with_min_lr and --min_lr_rate go together: the share of the highest rate that "
            f"the schedule ends at, such as 0.1; found {config.lr_scheduler_type} and {config.min_lr_rate:g}"
        )
    parse_fsdp(config.fsdp)
    parse_checkpointing(config.gradient_checkpointing)
    check_adapter(config)
    check_objective(config)
    _check_optimizer(config)
    _check_numerics(config)
    _check_evaluation(config)
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        source = getattr(config, name)
        if source and Path(source).resolve() == Path(config.output_dir).resolve():
            raise InputError(f"--output_dir is also --{name} ({source}), which would be lost; choose another folder")
    for name in ("model_name_or_path", "tokenizer_name_or_path", "data_path", "eval_data_path"):
        for folder in Path(config.output_dir).glob("checkpoint-*"):  # a new run removes them, others' too
            require_apart(folder, {f"--{name}": Path(source) if (source := getattr(config, name)) else None})


def _check_evaluation(config: TrainConfig) -> None:
    if config.eval_strategy == "no" and (config.load_best_model_at_end or config.early_stopping_patience):
        raise InputError(
            "--load_best_model_at_end and --early_stopping_patience go by held-out loss: add --eval_strategy steps or "
            "epoch, and --val_set_size N or --eval_data_path"
        )
    if config.load_best_model_at_end and config.save_strategy == "no":
        raise InputError(
            "--load_best_model_at_end keeps the best evaluation's checkpoint, and --save_strategy no keeps none; leave "
            "one of them out"
        )
    given = [name for name in ("val_set_size", "eval_fraction", "eval_data_path") if getattr(config, name)]
    if config.eval_strategy != "no" and not given:
        raise InputError(
            f"--eval_strategy {config.eval_strategy} needs examples to evaluate on: hold some out with "
            "--val_set_size N or --eval_fraction 0.02, or name a file with --eval_data_path"
        )
    if len(given) > 1:
        raise InputError(f"--{' and --'.join(given)} both say what to evaluate on; give one of them")


def _check_numerics(config: TrainConfig) -> None:
    if config.numerics == "fast" and config.method != "full":
        raise InputError(
            f"--numerics fast is for --method full, found --method {config.method}: an adapter is a few float32 "
            "matrices on a base that is frozen in bfloat16 or fewer bits already, so nothing would be won; leave it out"
        )


def _check_optimizer(config: TrainConfig) -> None:
    if config.numerics == "fast" and not config.optim.startswith("adamw_torch"):
        raise InputError(
            f"--numerics fast has an AdamW of its own, which rounds by chance, and does not go with --optim "
            f"{config.optim}: leave one of them out"
        )
    if parse_fsdp(config.fsdp).offload and not config.optim.startswith("adamw_torch"):
        raise InputError(
            f'--fsdp "{config.fsdp}" keeps AdamW\'s moments in main memory, which is not done for --optim '
            f"{config.optim}: use --optim adamw_torch, or leave offload out"
        )


def check_processes(config: TrainConfig, num_processes: int) -> None:
    """Raise InputError for what cannot be sharded, over processes or to main memory."""
    if num_processes == 1 and not parse_fsdp(config.fsdp).offload:
        return
    if config.base_quantization == "int8":
        raise InputError(
            "--base_quantization int8 cannot be sharded over processes or offloaded (the scales of bitsandbytes' "
            "8-bit layers do not travel); use --base_quantization nf4 or none, or one process"
        )
    for flag, value, why in (
        ("optim", config.optim if not config.optim.startswith("adamw_torch") else None,
         "it works on whole tensors, and several processes have shards of them; use --optim adamw_torch"),
        ("lora_init", config.lora_init if config.lora_init.startswith(("pissa", "olora")) else None,
         "it takes whole matrices apart, and several processes have shards of them"),
        ("trainable_token_indices", config.trainable_token_indices,
         "PEFT looks rows up in whole matrices, and several processes have shards of them"),
    ):  # fmt: skip
        if value:
            raise InputError(f"--{flag} {value} cannot be sharded over processes or offloaded: {why}, or one process")
