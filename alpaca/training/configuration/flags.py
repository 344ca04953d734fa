"""The command line of train.py. Its flags are the fields of TrainConfig.

Flags of transformers' Trainer that make no difference here are accepted with a warning, and those that would be
silently disobeyed are refused with the name of what to use.
"""

import argparse
import dataclasses
import difflib
import logging
import re
import typing
from collections.abc import Sequence
from typing import NoReturn

from alpaca.errors import InputError
from alpaca.training.configuration.config import TrainConfig, make_config
from alpaca.training.configuration.files import take_config
from alpaca.training.configuration.limits import value_types
from alpaca.training.configuration.parsing import parse_checkpointing

logger = logging.getLogger(__name__)

RENAMED = {  # older spellings in transformers and their present names
    "eval_data": "eval_data_path",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "torch_compile": "compile_layers",
}
IGNORED = {  # flags that make no difference here, and why
    "dataloader_num_workers": "the data is in memory",
    "dataloader_pin_memory": "the data is in memory",
    "dataloader_persistent_workers": "the data is in memory",
    "dataloader_prefetch_factor": "the data is in memory",
    "disable_tqdm": "there is one progress bar",
    "do_eval": "--eval_strategy decides",
    "do_train": "that is what this program does",
    "group_by_length": "the order of the data is the recipe's",
    "local_rank": "torchrun's environment says it",
    "log_level": "there is one level",
    "logging_dir": "logs go to output_dir/runs",
    "logging_first_step": "--logging_steps decides",
    "logging_strategy": "--logging_steps decides",
    "remove_unused_columns": "there are none",
    "save_safetensors": "weights are always safetensors",
    "train_sampling_strategy": "the order of the data is the recipe's",
}
IGNORED_PREFIX = "ddp_"  # several processes always shard the model
_LOSS = "the lowest held-out loss is the best; leave it out"
REFUSED = {  # flags that would be disobeyed, and what to use
    "deepspeed": 'use --fsdp "full_shard auto_wrap offload"',
    "fp16": "use --bf16 True (float16 training needs loss scaling and still diverges)",
    "fp16_full_eval": "use --bf16 True",
    "bf16_full_eval": "use --bf16 True",
    "fsdp_config": 'use --fsdp "full_shard auto_wrap"',
    "metric_for_best_model": _LOSS,
    "greater_is_better": _LOSS,
    "auto_find_batch_size": "choose --per_device_train_batch_size; the global batch does not depend on it",
    "no_cuda": "set the environment variable CUDA_VISIBLE_DEVICES to nothing",
    "use_cpu": "set the environment variable CUDA_VISIBLE_DEVICES to nothing",
    "push_to_hub": "upload output_dir afterwards: hf upload NAME output_dir",
    "save_only_model": "the model alone cannot be resumed; use --save_strategy no",
    "trust_remote_code": "use a model that transformers knows",
}


_JOINED = (  # given more than once (or as lists in a file), their values are one, between commas
    "data_path", "lora_target_modules", "lora_modules_to_save", "trainable_token_indices", "lora_rank_pattern",
    "lora_alpha_pattern",
)  # fmt: skip


class _Join(argparse.Action):
    """Puts a flag's values together, in their order."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


class _Parser(argparse.ArgumentParser):
    """argparse with this project's errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the flags")


def parse_flags(arguments: Sequence[str]) -> TrainConfig:
    """The configuration a command line asks for: its flags over those of --config, over its recipe's values.

    Raises InputError.
    """
    arguments = [_normal_spelling(argument) for argument in take_config([_normal_spelling(a) for a in arguments])]
    given = _parse(arguments)
    _drop_ignored(given)
    _refuse(given)
    return make_config(given)


def _parse(arguments: list[str]) -> dict[str, object]:
    parser = _make_parser(arguments)
    given, unknown = parser.parse_known_args(arguments)
    for argument in unknown:
        _refuse_unknown(argument)
    return vars(given)


def _make_parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py", description="Fine-tune a model.", allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    hints = typing.get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        _add_flag(parser, item, hints[item.name])
    prefixed = {argument[2:].split("=")[0] for argument in arguments if argument.startswith(f"--{IGNORED_PREFIX}")}
    parser.add_argument("--config", metavar="FILE", help="flags from a YAML or JSON file, such as train_config.json")
    for name in [*IGNORED, *REFUSED, *prefixed]:
        parser.add_argument(f"--{name}", nargs="?", const="True", help=argparse.SUPPRESS)
    return parser


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field, hint: object) -> None:
    kind, *others = value_types(hint)
    default = "required" if item.default is dataclasses.MISSING else item.default
    text = item.metadata["help"] + ("" if default in (None, "") else f" ({default})")
    choices = item.metadata["choices"] or None
    if others:
        metavar = "auto|True|False|N"
        parser.add_argument(
            f"--{item.name}", nargs="?", const=True, type=_parse_checkpointing, help=text, metavar=metavar
        )
    elif kind is bool:
        parser.add_argument(f"--{item.name}", nargs="?", const=True, type=_parse_bool, help=text, metavar="True|False")
    elif item.name in _JOINED:
        parser.add_argument(
            f"--{item.name}", action=_Join, help=text, metavar="PATH" if item.name == "data_path" else "STR"
        )
    else:
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(f"--{item.name}", type=kind, choices=choices, help=text, metavar=metavar)


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "y", "t", "on"):
        return True
    if text.lower() in ("false", "0", "no", "n", "f", "off", "none"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


def _parse_checkpointing(text: str) -> bool | int | str:
    try:
        return parse_checkpointing(text)
    except InputError as error:  # argparse would put words of its own in its place
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error


def _normal_spelling(argument: str) -> str:
    """`--eval-strategy=no` and `--evaluation_strategy=no` as `--eval_strategy=no`."""
    match = re.fullmatch(r"--([A-Za-z][\w-]*)(=.*)?", argument, re.DOTALL)
    if not match:
        return argument
    name = match[1].replace("-", "_")
    return f"--{RENAMED.get(name, name)}{match[2] or ''}"


def _drop_ignored(given: dict[str, object]) -> None:
    for name in [name for name in given if name in IGNORED or name.startswith(IGNORED_PREFIX)]:
        reason = IGNORED.get(name, "several processes always shard the model")
        logger.warning("--%s is ignored: %s", name, reason)
        del given[name]


def _refuse(given: dict[str, object]) -> None:
    """Refuse flags of the table, unless they are switched off (`--fp16 False`)."""
    for name in [name for name in given if name in REFUSED]:
        if str(given[name]).lower() not in ("false", "0", "0.0", "no", "none", ""):
            raise InputError(f"--{name} is not supported: {REFUSED[name]}")
        del given[name]


def _refuse_unknown(argument: str) -> NoReturn:
    if not argument.startswith("-"):
        raise InputError(f"unexpected argument {argument!r}: every value needs its --flag before it")
    name = argument.lstrip("-").split("=")[0]
    known = [item.name for item in dataclasses.fields(TrainConfig)] + [*RENAMED, *IGNORED, *REFUSED]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise InputError(f"unknown flag --{name}; the nearest known one is --{nearest}")
