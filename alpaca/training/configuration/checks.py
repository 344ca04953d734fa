"""Checks of a configuration's values against each other."""

from pathlib import Path

from alpaca.architecture.families import USUAL_TARGETS
from alpaca.errors import InputError
from alpaca.files.outputs import require_apart
from alpaca.training.configuration.config import ALL_LINEAR, TrainConfig
from alpaca.training.configuration.limits import check_each_value
from alpaca.training.configuration.parsing import parse_checkpointing, parse_fsdp, target_names


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
    _check_method(config)
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


_ADAPTER_FLAGS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora", "base_quantization",
)  # fmt: skip


def _check_method(config: TrainConfig) -> None:
    """Refuse flags of another method than the one asked for, and numbers that no adapter can have."""
    for name in _ADAPTER_FLAGS if config.method == "full" else ():
        if getattr(config, name) not in (None, False, "none"):
            raise InputError(
                f"--{name} {getattr(config, name)} is for adapters, and --method full trains every weight: add "
                "--method lora or qlora, or leave it out"
            )
    if config.method == "qlora" and config.base_quantization == "none":
        raise InputError("--method qlora --base_quantization none contradict each other; --method lora is that")
    if config.compile_layers and config.base_quantization == "int8":
        raise InputError(
            "--compile_layers True does not go with --base_quantization int8 (bitsandbytes' 8-bit layers keep state of "
            "their own between calls); use --base_quantization nf4 or none, or leave --compile_layers out"
        )
    if config.use_dora and config.base_quantization == "int8":
        raise InputError(
            "--use_dora True does not go with --base_quantization int8 (PEFT loses the scales of bitsandbytes' 8-bit "
            "layers when it measures them); use --base_quantization nf4 or none"
        )
    if config.lora_alpha is not None and not config.lora_alpha > 0:
        raise InputError(f"--lora_alpha: expected a number above 0, found {config.lora_alpha}")
    if config.lora_target_modules is not None and not target_names(config.lora_target_modules):
        raise InputError(
            f'--lora_target_modules: expected names such as "{",".join(USUAL_TARGETS)}", or "{ALL_LINEAR}"; '
            f"found {config.lora_target_modules!r}"
        )


def _check_numerics(config: TrainConfig) -> None:
    if config.numerics == "fast" and config.method != "full":
        raise InputError(
            f"--numerics fast is for --method full, found --method {config.method}: an adapter is a few float32 "
            "matrices on a base that is frozen in bfloat16 or fewer bits already, so nothing would be won; leave it out"
        )
