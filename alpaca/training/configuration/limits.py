"""Checks of single values of a configuration: their types, their choices, the least and the most that can be meant."""

import dataclasses
import math
import types
import typing

from alpaca.errors import InputError
from alpaca.training.configuration.parsing import parse_memory

_LEAST = {
    "model_max_length": 2, "val_set_size": 0, "global_batch_size": 1, "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_steps": 1,
    "save_steps": 1, "save_total_limit": 1, "save_minutes": 0, "warmup_steps": 0, "weight_decay": 0,
    "max_grad_norm": 0, "learning_rate": 0, "seed": 0, "num_samples": 0, "plan_gpus": 1, "plan_gpus_per_machine": 1,
    "plan_tflops": 0.001, "lora_r": 1, "lora_dropout": 0, "data_limit_mib": 1,
    "early_stopping_patience": 0, "neftune_noise_alpha": 0, "loraplus_lr_ratio": 0.001, "kto_desirable_weight": 0,
    "kto_undesirable_weight": 0,
}  # fmt: skip
_MOST = {  # far beyond any use, and within what torch and a float can count
    "model_max_length": 10**7, "val_set_size": 10**9, "global_batch_size": 10**9, "per_device_train_batch_size": 10**6,
    "per_device_eval_batch_size": 10**6, "gradient_accumulation_steps": 10**9, "num_train_epochs": 10**6,
    "max_steps": 10**9, "logging_steps": 10**9, "eval_steps": 10**9, "save_steps": 10**9, "save_total_limit": 10**6,
    "save_minutes": 10**9, "warmup_steps": 10**9, "num_samples": 1000, "plan_gpus": 10**5,
    "plan_gpus_per_machine": 10**3, "plan_tflops": 10**6, "lora_r": 10**5,
    "data_limit_mib": 10**9, "early_stopping_patience": 10**6, "neftune_noise_alpha": 10**6, "loraplus_lr_ratio": 10**6,
    "dpo_beta": 10**6, "orpo_beta": 10**6, "kto_beta": 10**6, "kto_desirable_weight": 10**6,
    "kto_undesirable_weight": 10**6,
    "seed": 2**32 - 1,  # as transformers has it; each process adds its rank, and torch takes 64 bits
}  # fmt: skip
_POSITIVE = ("num_train_epochs", "adam_epsilon", "dpo_beta", "orpo_beta", "kto_beta")
_BELOW_ONE = (
    "label_smoothing_factor",
    "dpo_label_smoothing",
    "min_lr_rate",
    "adam_beta1",
    "adam_beta2",
    "warmup_ratio",
    "lora_dropout",
    "eval_fraction",
)
_MEMORIES = ("memory_limit", "plan_memory")


def check_each_value(config: object) -> None:
    """Raise InputError for the first field of a configuration (a dataclass) whose own value cannot be meant."""
    _check_types(config)
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name}: expected at least {least}, found {value}")
    for name, most in _MOST.items():
        value = getattr(config, name)
        if value is not None and not value <= most:
            raise InputError(f"--{name}: expected at most {most:,}, found {value}")
    for name in _POSITIVE:
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise InputError(f"--{name}: expected a number above 0, found {getattr(config, name)}")
    for name in _BELOW_ONE:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise InputError(f"--{name}: expected a number from 0 up to (not including) 1, found {value}")
    for name in _MEMORIES:
        if getattr(config, name) is not None:
            parse_memory(name, getattr(config, name))


def _check_types(config: object) -> None:
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, choices = getattr(config, item.name), item.metadata["choices"]
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{item.name}: expected a number, found {value}")
        if choices and value is not None and value not in choices:
            raise InputError(f"--{item.name}: expected one of {', '.join(choices)}, found {value!r}")
        kinds = value_types(hints[item.name])
        if value is not None and not isinstance(value, (float, int) if kinds == (float,) else kinds):
            raise InputError(f"--{item.name}: expected {' or '.join(k.__name__ for k in kinds)}, found {value!r}")


def value_types(hint: object) -> tuple[type, ...]:
    """The types of a field's values by its hint: (int,) of `int | None`."""
    if isinstance(hint, types.UnionType):
        return tuple(kind for kind in typing.get_args(hint) if kind is not type(None))
    return (hint,)
