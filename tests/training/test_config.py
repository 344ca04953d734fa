"""What a run is: the recipe's defaults, what is worked out from them, and values that cannot be meant."""

import dataclasses
import functools
import json
import logging
import math
import typing

import pytest
import torch
from transformers import get_scheduler

from alpaca.data.batching import count_steps_per_epoch
from alpaca.errors import InputError
from alpaca.training.configuration import limits
from alpaca.training.configuration.config import RECIPES, SCHEDULES, TrainConfig, config_json
from alpaca.training.configuration.flags import parse_flags
from alpaca.training.configuration.parsing import parse_fsdp
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.schedule import count_held_out, count_steps, count_warmup_steps, learning_rate_factor

NEEDED = ["--model_name_or_path", "weights/llama-7b", "--data_path", "data.json"]
CPU = torch.device("cpu")
NO_UNIT = "expected a size with its unit, found '80', which is 80 bytes; write .80GB. if"


def test_the_recipes_defaults():
    config = parse_flags(NEEDED)
    steps = count_steps(make_settings(config).batch, count_steps_per_epoch(52_002, global_batch_size=128))
    assert (steps, count_warmup_steps(make_settings(config).optimizer, steps)) == (1218, 37)
    assert resolve(config, num_processes=1, device=CPU).global_batch_size == 128
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.max_grad_norm) == (0.9, 0.999, 1e-8, 1)
    assert (config.learning_rate, config.model_max_length, config.bf16, config.seed) == (2e-5, 512, True, 42)


def test_the_first_step_has_no_learning_rate_and_the_last_almost_none():
    factor = functools.partial(learning_rate_factor, schedule="cosine", num_warmup_steps=37, num_steps=1218)
    assert factor(0) == 0
    assert factor(37) == 1
    assert factor(1217) == pytest.approx(0.5 * (1 + math.cos(math.pi * 1180 / 1181)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_warmup_steps", "num_steps"), [(37, 1218), (0, 10), (3, 3), (1, 15)])
def test_schedules_are_those_of_transformers(schedule: str, num_warmup_steps: int, num_steps: int):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    has_floor = schedule == "cosine_with_min_lr"
    theirs = get_scheduler(
        schedule, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.1} if has_floor else None,
    ).lr_lambdas[0]  # fmt: skip
    sizes = {"num_warmup_steps": num_warmup_steps, "num_steps": num_steps, "least": 0.1 if has_floor else 0.0}
    for step in range(num_steps):
        assert learning_rate_factor(step, schedule=schedule, **sizes) == pytest.approx(theirs(step), abs=1e-12)


def test_a_recipe_fills_only_what_is_not_given():
    config = parse_flags([*NEEDED, "--recipe", "alpaca-13b"])
    assert (config.learning_rate, config.num_train_epochs) == (1e-5, 5)
    config = parse_flags([*NEEDED, "--recipe=alpaca-13b", "--learning_rate=2e-5"])
    assert (config.learning_rate, config.num_train_epochs) == (2e-5, 5)
    with pytest.raises(InputError, match="invalid choice: 'alpaca-70b'"):
        parse_flags([*NEEDED, "--recipe", "alpaca-70b"])
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    assert all(set(values) <= fields for values in RECIPES.values())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--learning_rate", "-1"], "--learning_rate: expected at least 0, found -1"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number, found nan"),
        (["--num_train_epochs", "0"], "--num_train_epochs: expected a number above 0"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size: expected at least 1"),
        (["--max_steps", "0"], "--max_steps: expected a number above 0"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio: expected a number from 0"),
        (["--seed", "-1"], "--seed: expected at least 0"),
        (["--memory_limit", "0GB"], "--memory_limit: expected a size such as"),
        (
            ["--memory_limit", "80"],
            "--memory_limit: expected a size with its unit, found '80', which is 80 bytes; write .80GB.",
        ),
        (
            ["--plan_memory", "80"],
            "--plan_memory: expected a size with its unit, found '80', which is 80 bytes; write .80GB.",
        ),
        (["--plan_memory", "0GB"], "--plan_memory: expected a size such as"),
        (["--plan_memory", "9" * 400], "--plan_memory: expected a size such as"),
        (["--plan_tflops", "-5"], "--plan_tflops: expected at least 0.001, found -5"),
        (["--plan_tflops", "1e300"], "--plan_tflops: expected at most 1,000,000, found 1e"),
        (["--plan_gpus", "100001"], "--plan_gpus: expected at most 100,000"),
        (["--num_train_epochs", "1e308"], "--num_train_epochs: expected at most 1,000,000, found 1e"),
        (["--seed", str(2**63)], "--seed: expected at most 4,294,967,295, found 9223372036854775808"),
        (["--model_max_length", str(10**30)], "--model_max_length: expected at most 10,000,000, found 1000"),
        (["--max_steps", str(10**30)], "--max_steps: expected at most 1,000,000,000, found 1000"),
        (["--warmup_steps", "1e308"], "--warmup_steps: expected at most 1,000,000,000, found 1e"),
        (["--eval_fraction", "1"], "--eval_fraction: expected a number from 0 up to .not including. 1, found 1.0"),
        (
            ["--method", "lora", "--base_quantization", "int8", "--torch_compile"],
            "--compile_layers True does not go with",
        ),
        (["--fsdp", "half_shard"], "--fsdp: expected one of full_shard, shard_grad_op, hybrid_shard, hybrid_"),
        (["--fsdp", "full_shard shard_grad_op"], "--fsdp: expected"),
        (["--eval_strategy", "steps"], "needs examples to evaluate on: hold some out with --val_set_size"),
        (["--val_set_size", "5", "--eval_data_path", "x"], "give one of them"),
        (
            ["--global_batch_size", "64", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8"],
            "--global_batch_size 64 contradicts 1 process × 4 × 8 = 32",
        ),
    ],
)
def test_values_that_cannot_be_meant(arguments: list[str], text: str):
    with pytest.raises(InputError, match=text):
        resolve(parse_flags([*NEEDED, *arguments]), num_processes=1, device=CPU)


def test_every_number_has_a_least_and_a_most():
    """Or is checked elsewhere: rates and scales, whose size no program can judge, and -1 that means none."""
    hints = typing.get_type_hints(TrainConfig)
    numbers = {name for name, hint in hints.items() if set(limits.value_types(hint)) <= {int, float}}
    judged = numbers - {*limits._BELOW_ONE, "adam_epsilon"}
    assert judged - limits._MOST.keys() == {"learning_rate", "weight_decay", "max_grad_norm", "lora_alpha"}
    assert judged - limits._LEAST.keys() - {*limits._POSITIVE} == {"max_steps", "lora_alpha"}


def test_a_share_that_leaves_nothing_to_train_on_is_named():
    config = parse_flags([*NEEDED, "--eval_fraction", "0.999"])
    with pytest.raises(InputError, match=r"--eval_fraction 0.999 holds out 64 of 64 examples of data.json, and leaves"):
        count_held_out(make_settings(config).data, 64)
    assert count_held_out(make_settings(config).data, 2000) == 1998


def test_qlora_asked_for_is_4_bit_whatever_the_recipe_has():
    def quantization(*arguments: str) -> str:
        config = parse_flags([*NEEDED, "--recipe", "alpaca-lora", *arguments])
        return resolve(config, num_processes=1, device=CPU).base_quantization

    assert quantization() == quantization("--method", "lora") == "int8"
    assert quantization("--method", "qlora") == "nf4"
    assert quantization("--method", "qlora", "--base_quantization", "int8") == "int8"


def test_values_given_in_python_are_checked_too():
    config = TrainConfig(model_name_or_path="a", data_path="b", report_to="paper")
    with pytest.raises(InputError, match="--report_to: expected one of tensorboard, wandb, none, found 'paper'"):
        resolve(config, num_processes=1, device=CPU)
    config = TrainConfig(model_name_or_path="a", data_path="b", save_steps="many")
    with pytest.raises(InputError, match="--save_steps: expected int, found 'many'"):
        resolve(config, num_processes=1, device=CPU)


@pytest.mark.parametrize(
    ("given", "num_processes", "batch", "micro", "accumulation", "said"),
    [
        ({}, 1, 128, 4, 32, "global batch 128: 1 process × 4 × 32 = 128"),
        ({}, 8, 128, 4, 4, "8 processes × 4 × 4 = 128"),
        ({}, 3, 128, 4, 11, "3 processes × 4 × 11 = 132, the last micro-batches of a step are smaller or empty"),
        ({"global_batch_size": 64}, 2, 64, 4, 8, "= 64; the recipe's is 128"),
        ({"per_device_train_batch_size": 8}, 1, 128, 8, 16, "= 128"),
        ({"gradient_accumulation_steps": 8}, 4, 128, 4, 8, "= 128"),
        ({"gradient_accumulation_steps": 8}, 3, 128, 6, 8, "= 144, the last"),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8},
            8, 256, 4, 8, "global batch 256: 8 processes × 4 × 8 = 256; the recipe's is 128",
        ),
    ],
)  # fmt: skip
def test_the_batch_is_worked_out_and_said(given, num_processes, batch, micro, accumulation, said, caplog):
    caplog.set_level(logging.INFO)
    config = TrainConfig(model_name_or_path="a", data_path="b", bf16=False, tf32=False, **given)
    config = resolve(config, num_processes=num_processes, device=CPU)
    assert config.global_batch_size == batch
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (micro, accumulation)
    assert said in caplog.text
    assert resolve(config, num_processes=num_processes, device=CPU) == config


def test_what_the_hardware_lacks_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture):
    config = resolve(parse_flags(NEEDED), num_processes=1, device=CPU)
    assert (config.bf16, config.tf32) == (False, False)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["bf16 and tf32 dropped: this CPU has none; float32 is used"]


def test_warmup_as_transformers_counts_it():
    def warmup(*arguments: str) -> int:
        return count_warmup_steps(make_settings(parse_flags([*NEEDED, *arguments])).optimizer, 100)

    assert warmup("--warmup_steps", "7") == 7
    assert warmup("--warmup_steps", "0.055") == 6
    assert warmup("--warmup_ratio", "0.055") == 6
    assert warmup("--warmup_ratio", "0") == 0


def test_epochs_and_steps():
    assert count_steps(make_settings(parse_flags([*NEEDED, "--num_train_epochs", "2.5"])).batch, 3) == 8
    assert count_steps(make_settings(parse_flags([*NEEDED, "--max_steps", "5"])).batch, 406) == 5


@pytest.mark.parametrize(
    ("text", "reshard", "offload", "hybrid"),
    [
        ("", True, False, False),
        ("True", True, False, False),
        ("full_shard auto_wrap", True, False, False),
        ("full_shard auto_wrap offload", True, True, False),
        ("shard_grad_op,auto_wrap", False, False, False),
        ("hybrid_shard auto_wrap", True, False, True),
        ("hybrid_shard_zero2 auto_wrap offload", False, True, True),
    ],
)
def test_fsdp_words(text: str, reshard: bool, offload: bool, hybrid: bool):
    sharding = parse_fsdp(text)
    assert (sharding.reshard_after_forward, sharding.offload, sharding.hybrid) == (reshard, offload, hybrid)


def test_the_configuration_as_json_gives_the_same_configuration():
    config = resolve(parse_flags(NEEDED), num_processes=2, device=CPU)
    assert TrainConfig(**json.loads(json.dumps(config_json(config)))) == config


@pytest.mark.parametrize(("asked", "meant"), [("True", "auto"), ("auto", "auto"), ("False", None), ("a/b", "a/b")])
def test_ways_to_ask_for_resuming(asked: str, meant: str | None):
    config = parse_flags([*NEEDED, "--resume_from_checkpoint", asked])
    assert resolve(config, num_processes=1, device=CPU).resume_from_checkpoint == meant
