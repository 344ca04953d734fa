"""The flags of objectives: their defaults, what contradicts them, and what is written down."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alpaca.errors import BadExamples, InputError
from alpaca.training.configuration.config import TrainConfig, make_config
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.configuration.settings import ObjectiveSettings
from alpaca.training.loop import train
from alpaca.training.planning.command import print_plan

Configure = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def resolved(config: TrainConfig) -> TrainConfig:
    return resolve(config, num_processes=1, device=CPU)


def test_defaults_are_filled_in_for_the_objective_alone(configure: Configure):
    config = resolved(configure(objective="kto", kto_beta=0.4, method="lora"))
    assert (config.kto_beta, config.kto_desirable_weight, config.kto_undesirable_weight) == (0.4, 1.0, 1.0)
    assert (config.dpo_beta, config.orpo_beta, config.lora_dropout) == (None, None, 0.0)
    assert make_settings(config).objective == ObjectiveSettings(name="kto", beta=0.4)
    identity = make_settings(config).identity
    assert {name: identity[name] for name in ("objective", "kto_beta")} == {"objective": "kto", "kto_beta": 0.4}
    assert "objective" not in make_settings(resolved(configure())).identity  # earlier checkpoints know none
    assert resolved(configure(method="lora")).lora_dropout == 0.05


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({"objective": "dpo"}, 1e-6),
        ({"objective": "orpo", "method": "lora"}, 1e-5),
        ({"objective": "kto", "learning_rate": 3e-6}, 3e-6),
        ({}, 2e-5),
    ],
)
def test_learning_rates_are_the_objectives(given: dict, rate: float, tiny_llama: Path, records: Path):

    assert (
        make_config({"model_name_or_path": str(tiny_llama), "data_path": str(records), **given}).learning_rate == rate
    )


def test_a_recipes_loss_on_prompts_gives_way(configure: Configure):
    assert not resolved(configure(recipe="alpaca-lora", objective="dpo", base_quantization="none")).train_on_inputs
    assert resolved(configure(recipe="alpaca-lora", objective="orpo", base_quantization="none")).train_on_inputs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dpo_beta": 0.1}, r"--dpo_beta is for --objective dpo, found --objective sft; leave it out"),
        ({"objective": "dpo", "kto_desirable_weight": 2.0}, r"--kto_desirable_weight is for --objective kto"),
        ({"objective": "dpo", "dpo_beta": 0.0}, r"--dpo_beta: expected a number above 0, found 0"),
        ({"objective": "dpo", "dpo_label_smoothing": 0.5}, r"--dpo_label_smoothing: expected a number .*0\.5"),
        ({"objective": "kto", "kto_undesirable_weight": -1.0}, r"--kto_undesirable_weight: expected at least 0"),
        ({"objective": "kto", "train_on_inputs": True}, r"--train_on_inputs True: --objective kto compares answers"),
        ({"objective": "dpo", "label_smoothing_factor": 0.1}, r"for --objective sft, found dpo; use --dpo_label_"),
        ({"objective": "orpo", "loss_average": "micro_batch"}, r"--loss_average micro_batch is for --objective sft"),
        ({"objective": "ppo"}, r"--objective: expected one of sft, dpo, orpo, kto, found 'ppo'"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(given: dict, message: str, configure: Configure):
    with pytest.raises(InputError, match=message):
        resolved(configure(**given))


@pytest.mark.parametrize(
    ("objective", "message"),
    [("dpo", "--objective dpo needs chosen and rejected"), ("sft", "one answer for each prompt, found preferences")],
)
def test_a_run_refuses_data_of_another_objective(objective: str, message: str, configure: Configure, tmp_path: Path):
    path = tmp_path / "data.json"
    answer = {"instruction": "Add 2 and 2.", "output": "4"}
    path.write_text(json.dumps([answer if objective == "dpo" else {**answer, "rejected": "5"}]))
    config = configure(data_path=str(path), objective=objective)
    with pytest.raises(BadExamples, match=message):
        train(config)
    assert not any(Path(config.output_dir).glob("*"))


def test_the_plan_counts_both_sequences_of_a_pair(configure: Configure, records: Path, tmp_path: Path):
    """The chosen answers are the records' own, and the rejected ones the same again: twice the tokens."""
    pairs = [{**one, "rejected": one["output"]} for one in json.loads(records.read_text())]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    plans = {}
    for objective, path in (("sft", records), ("dpo", tmp_path / "pairs.json"), ("kto", tmp_path / "pairs.json")):
        shown: list[str] = []
        print_plan(
            configure(data_path=str(path), objective=objective, per_device_train_batch_size=8), show=shown.append
        )
        plans[objective] = json.loads(shown[-1])
    sft, dpo, kto = (plans[name]["work"] for name in ("sft", "dpo", "kto"))
    assert (sft["num_examples"], dpo["num_examples"], kto["num_examples"]) == (40, 40, 80)
    assert (dpo["num_tokens"], dpo["max_tokens"]) == (2 * sft["num_tokens"], 2 * sft["max_tokens"])
    assert (sft["num_forward"], dpo["num_forward"]) == (0, 2 * sft["num_tokens"] // 3)  # once, of three epochs
    assert kto["num_forward"] == 2 * 2 * sft["num_tokens"] // 3 + kto["num_tokens"]
    activations = [plans[name]["memory"]["activations_bytes"] for name in ("sft", "dpo")]
    sizes = json.loads((Path(configure().model_name_or_path) / "config.json").read_text())
    head = 4 * (sizes["vocab_size"] + 1) * sizes["hidden_size"]  # with the padding token; sft keeps its gradient
    assert activations[1] == 2 * (activations[0] - head)


def test_the_report_and_the_configuration_say_the_objective(configure: Configure, tmp_path: Path, charts: None):
    record = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    (tmp_path / "pairs.json").write_text(json.dumps([record] * 4))
    folder = train(
        configure(data_path=str(tmp_path / "pairs.json"), objective="orpo", global_batch_size=4, max_steps=2)
    )
    page = (folder / "report.html").read_text()
    assert "<h2>Rewards</h2>" in page
    assert all(name in page for name in ("rewards of chosen answers", "rewards of rejected answers"))
    written = json.loads((folder / "train_config.json").read_text())
    assert (written["objective"], written["orpo_beta"], written["dpo_beta"]) == ("orpo", 0.1, None)
