"""The command line: the seeds' commands, and every flag that is ignored, refused or unknown."""

import dataclasses
import json
import shlex

import pytest
import torch

from alpaca.errors import InputError
from alpaca.training.configuration.config import TrainConfig, config_json
from alpaca.training.configuration.flags import IGNORED, REFUSED, RENAMED, parse_flags
from alpaca.training.configuration.resolving import resolve

NEEDED = ["--model_name_or_path", "weights/llama-7b", "--data_path", "data.json"]
CPU = torch.device("cpu")
ISSUE_COMMAND = """--model_name_or_path weights/llama-7b --tokenizer_name_or_path weights/tokenizer --data_path
data.json --bf16 True --output_dir alpaca_out --num_train_epochs 3 --per_device_train_batch_size 4
--per_device_eval_batch_size 4 --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps"
--save_steps 2000 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
--logging_steps 1 --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --tf32 True"""
COG_COMMAND = ISSUE_COMMAND.replace("LlamaDecoderLayer", "LLaMADecoderLayer").replace("weights/", "/src/weights/")


@pytest.mark.parametrize("command", [ISSUE_COMMAND, COG_COMMAND], ids=["issue", "cog"])
def test_the_seeds_commands_parse_to_the_recipe(command: str):
    config = parse_flags(shlex.split(command))
    recipe = parse_flags(NEEDED)
    changed = {
        item.name for item in dataclasses.fields(config) if getattr(config, item.name) != getattr(recipe, item.name)
    }
    assert changed - {"model_name_or_path"} == {
        "tokenizer_name_or_path", "per_device_train_batch_size", "gradient_accumulation_steps", "fsdp",
        "fsdp_transformer_layer_cls_to_wrap",
    }  # fmt: skip
    assert resolve(config, num_processes=4, device=CPU).global_batch_size == 128


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--bf16"], "bf16", True),
        (["--bf16", "False"], "bf16", False),
        (["--bf16=false"], "bf16", False),
        (["--overwrite-output-dir", "--bf16"], "overwrite_output_dir", True),
        (["--eval-strategy=steps"], "eval_strategy", "steps"),
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--per_gpu_train_batch_size", "2"], "per_device_train_batch_size", 2),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--weight_decay", "0."], "weight_decay", 0.0),
        (["--output-dir=a--b=c"], "output_dir", "a--b=c"),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "false"], "gradient_checkpointing", False),
        (["--gradient-checkpointing=8"], "gradient_checkpointing", 8),
        (["--gradient_checkpointing", "Auto"], "gradient_checkpointing", "auto"),
        (["--torch_compile", "True"], "compile_layers", True),
        (["--torch_compile"], "compile_layers", True),
        (["--memory_limit", "7.4GiB"], "memory_limit", "7.4GiB"),
        (["--run_name", "a_b-c"], "run_name", "a_b-c"),
    ],
)
def test_spellings(arguments: list[str], field: str, value: object):
    assert getattr(parse_flags([*NEEDED, *arguments]), field) == value


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; the nearest known one is --learning_rate"),
        (["--epochs", "3"], "unknown flag --epochs"),
        (["--lora_rank=8"], "unknown flag --lora_rank"),
        (["stray"], "unexpected argument 'stray'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--bf16", "maybe"], "expected True or False, found 'maybe'"),
        (["--save_steps"], "expected one argument"),
        (["--gradient_checkpointing", "some"], "expected auto, True, False or a number of layers, found 'some'"),
        (["--gradient_checkpointing", "9" * 5000], r"a number of layers, found '9{20}… \(5000 characters\)'"),
        (["--gradient_checkpointing", "-1"], "expected auto, True, False or a number of layers, found '-1'"),
        (["--lr_scheduler_type", "sine"], "invalid choice: 'sine'"),
        (["--optim", "sgd"], "invalid choice: 'sgd'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], text: str):
    with pytest.raises(InputError, match=text):
        parse_flags([*NEEDED, *arguments])


def test_what_must_be_given():
    with pytest.raises(InputError, match="--model_name_or_path and --data_path must be given"):
        parse_flags(["--bf16"])


@pytest.mark.parametrize("name", [*IGNORED, "ddp_find_unused_parameters", "ddp_timeout"])
def test_ignored_flags_warn_in_one_line(name: str, caplog: pytest.LogCaptureFixture):
    assert parse_flags([*NEEDED, f"--{name}", "4"]) == parse_flags(NEEDED)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith(f"--{name} is ignored: ")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_flags_name_what_to_use(name: str):
    with pytest.raises(InputError, match=f"--{name} is not supported: .{{9}}"):
        parse_flags([*NEEDED, f"--{name}", "something"])
    with pytest.raises(InputError, match=f"--{name} is not supported"):
        parse_flags([*NEEDED, f"--{name}"])
    assert parse_flags([*NEEDED, f"--{name}", "False"]) == parse_flags(NEEDED)


def test_no_flag_is_in_two_tables():
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    assert set(RENAMED.values()) <= fields
    names = [*fields, *RENAMED, *IGNORED, *REFUSED]
    assert len(names) == len(set(names))


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        parse_flags(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{item.name}" in said for item in dataclasses.fields(TrainConfig))
    assert "--deepspeed" not in said


# Files of flags -----------------------------------------------------------------------------------------------------


MODEL = "model_name_or_path: m\ndata_path: d\n"


def test_a_file_gives_flags_and_the_command_line_goes_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndata-path: [a.json=2, b.json]\nlearning_rate: 1e-4  # a text, as YAML 1.1 reads it\n"
        "bf16: false\nmax_steps: 7\neval_data: held_out.json\neval_strategy: null\n"
    )
    config = parse_flags(["--config", str(file), "--max-steps", "9"])
    assert (config.model_name_or_path, config.data_path) == ("m", "a.json=2,b.json")
    assert (config.learning_rate, config.bf16, config.max_steps) == (1e-4, False, 9)
    assert config.eval_data_path == "held_out.json"
    assert parse_flags([f"--config={file}", "--data_path", "c.json"]).data_path == "c.json"


def test_lists_of_names_and_ids_are_whole(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"{MODEL}method: lora\nlora_target_modules: [q_proj, v_proj]\nlora_modules_to_save: [embed_tokens, lm_head]\n"
        "trainable_token_indices: [5, 7]\nlora_rank_pattern: [q_proj=16, v_proj=4]\n"
    )
    config = parse_flags(["--config", str(file)])
    assert (config.lora_target_modules, config.lora_modules_to_save) == ("q_proj,v_proj", "embed_tokens,lm_head")
    assert (config.trainable_token_indices, config.lora_rank_pattern) == ("5,7", "q_proj=16,v_proj=4")


def test_an_earlier_runs_configuration_is_one(tmp_path):
    given = {
        "model_name_or_path": "m", "data_path": "d", "method": "lora", "seed": 7, "lora_init": "pissa",
        "loraplus_lr_ratio": 16, "lora_rank_pattern": "q_proj=16,v_proj=4", "trainable_token_indices": "added",
        "lora_modules_to_save": "model.norm", "neftune_noise_alpha": 5, "optim": "adamw_8bit",
    }  # fmt: skip
    before = parse_flags([f"--{name}={value}" for name, value in given.items()])
    file = tmp_path / "train_config.json"
    file.write_text(json.dumps({**config_json(before), "base_fingerprint": "ab"}))
    assert parse_flags(["--config", str(file)]) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"expected flags' names and their values; found \['a'\]"),
        ("a: [b\n", r"is neither YAML nor JSON"),
        ("seed: {a: 1}\n", r"seed: expected a plain value, found \{'a': 1\}"),
        (f"{MODEL}learning_rates: 1\n", r"nearest known one is --learning_rate"),
        (f"{MODEL}fp16: true\n", r"--fp16 is not supported"),
        (f"{MODEL}min_lr_rate: 0.1\n", r"cosine_with_min_lr and --min_lr_rate go together"),
    ],
)  # fmt: skip
def test_files_that_are_no_flags(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        resolve(parse_flags(["--config", str(tmp_path / "run.yaml")]), num_processes=1, device=torch.device("cpu"))


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        parse_flags(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match=r"expected a YAML or JSON file, found nothing"):
        parse_flags(["--config"])
