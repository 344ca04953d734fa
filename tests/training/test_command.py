"""train.py as people start it: alone, by torchrun, and wrongly."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from alpaca.training.checkpoints.state import list_checkpoints
from alpaca.training.configuration.config import TrainConfig
from tests.conftest import ROOT
from tests.processes import run_module, run_ranks
from tests.training.checkpoints.test_checkpoint import assert_same_run, wait_until
from tests.training.conftest import command, flags, run_train
from tests.training.test_loop import history

SEEDS = """--model_name_or_path weights/llama-7b --tokenizer_name_or_path weights/tokenizer --data_path ./data.json
--bf16 True --output_dir alpaca_out --num_train_epochs 3 --per_device_train_batch_size 4
--per_device_eval_batch_size 4 --gradient_accumulation_steps 8 --evaluation_strategy no --save_strategy steps
--save_steps 2000 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--logging_steps 1 --fsdp_transformer_layer_cls_to_wrap LLaMADecoderLayer --tf32 True"""


@pytest.mark.slow  # three interpreters; its parts are tested by test_flags, test_config and test_distributed
def test_the_seeds_command_in_two_processes(tiny_llama: Path, records: Path, tmp_path: Path):
    shutil.copytree(tiny_llama, tmp_path / "weights" / "llama-7b")
    shutil.copytree(tiny_llama, tmp_path / "weights" / "tokenizer")
    shutil.copy(records, tmp_path / "data.json")
    arguments = [*SEEDS.split(), "--fsdp", "full_shard auto_wrap"]
    finished = run_train(arguments, num_processes=2, folder=tmp_path)
    assert "global batch 64: 2 processes × 4 × 8 = 64; the recipe's is 128" in finished.stderr
    assert "bf16 and tf32 dropped" in finished.stderr
    assert "LLaMADecoderLayer: the layers of this model are LlamaDecoderLayer" in finished.stderr
    assert "done: alpaca_out (float32), verified" in finished.stderr
    assert finished.stderr.count("dropped") == 1  # one process speaks
    assert len(history(tmp_path / "alpaca_out")) == 3
    assert (tmp_path / "alpaca_out" / "runs" / "alpaca_out").is_dir()
    AutoModelForCausalLM.from_pretrained(tmp_path / "alpaca_out")


def test_a_mistake_is_one_line(configure: Callable[..., TrainConfig], tmp_path: Path):
    wrong = configure(data_path=str(tmp_path / "missing.json"))
    finished = run_module("train", *flags(wrong))
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("error: no data at ")
    finished = run_train(["--deepspeed", "zero3.json", *flags(wrong)], check=False)
    assert finished.stderr == 'error: --deepspeed is not supported: use --fsdp "full_shard auto_wrap offload"\n'


def test_a_mistake_is_said_once_by_several_processes(configure: Callable[..., TrainConfig], tmp_path: Path):
    """As under torchrun, the first process that fails ends the others."""
    finished = run_ranks("train", *flags(configure(learning_rate=-1.0)), num_processes=2, on_machine=2)
    assert finished.returncode == 1
    assert finished.stderr.count("error: --learning_rate: expected at least 0, found -1.0") == 1
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_two_processes_that_are_terminated_go_on_later(configure: Callable[..., TrainConfig], tmp_path: Path):
    config = configure(num_train_epochs=30)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = configure(num_train_epochs=30, output_dir=str(tmp_path / "whole"))
    run_train(flags(whole), num_processes=2)
    arguments = [*flags(config), "--resume_from_checkpoint", "auto", "--save_steps", "20"]
    process = subprocess.Popen(command(arguments, num_processes=2), cwd=ROOT, env=environment)
    wait_until(lambda: list_checkpoints(Path(config.output_dir)))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    saved = list_checkpoints(Path(config.output_dir))[0]
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] % 20  # not one by --save_steps
    run_train(arguments, num_processes=2)
    assert_same_run(Path(config.output_dir), Path(whole.output_dir))
