"""The first 20 steps of each objective against TRL's own trainer, on the same tokens in the same order."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from alpaca.data.batching import epoch_permutation
from alpaca.text.prompts import format_prompt
from alpaca.training import loop
from alpaca.training.configuration.config import TrainConfig, make_config
from alpaca.training.loop import train
from tests.peer_environments import interpreter_with
from tests.training.conftest import SAMPLE, SETTINGS

pytestmark = pytest.mark.slow

PACKAGE = "trl==1.16.0"
STEPS, BATCH, LENGTH = 20, 4, 300
NUM = STEPS * BATCH


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter with TRL beside the project's packages: this one, or that of an environment made once."""
    return interpreter_with("trl", PACKAGE)


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA with a padding token, so that neither side adds one."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("base") / "padded")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            file = folder / name
            file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "<unk>"}))
    return folder


def records(objective: str) -> list[dict[str, object]]:
    """Prompts that end in a line feed, so that no token holds the end of one and the beginning of an answer."""
    sample = json.loads(SAMPLE.read_text())
    made = []
    for index in range(NUM):
        one, other = sample[index], sample[(index + 11) % len(sample)]
        prompt = format_prompt(one["instruction"], one.get("input", ""), "alpaca_newline")
        if objective == "kto":
            is_good = index % 3 != 0
            made.append({"prompt": prompt, "completion": (one if is_good else other)["output"], "label": is_good})
        else:
            made.append({"prompt": prompt, "chosen": one["output"], "rejected": other["output"]})
    return made


ARGUMENTS = {
    "dpo": {"beta": 0.1},
    "dpo accumulated": {"beta": 0.3},
    "orpo": {"beta": 0.2},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.5},
}
OURS = {
    "dpo": {"dpo_beta": 0.1},
    "dpo accumulated": {"dpo_beta": 0.3, "per_device_train_batch_size": 2},
    "orpo": {"orpo_beta": 0.2, "train_on_inputs": True},
    "kto": {"kto_beta": 0.1, "kto_undesirable_weight": 1.5},
}


def their_run(python: str, case: str, base: Path, folder: Path, ordered: list[dict[str, object]]) -> dict:
    micro = 2 if "accumulated" in case else 1
    job = {
        "objective": case.split()[0], "model": str(base), "output_dir": str(folder / "trl"), "records": ordered,
        "arguments": {
            "max_steps": STEPS, "learning_rate": 1e-4, "max_length": LENGTH, "max_grad_norm": 1.0,
            "per_device_train_batch_size": BATCH // micro, "gradient_accumulation_steps": micro, **ARGUMENTS[case],
        },
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    worker = Path(__file__).with_name("trl_worker.py")
    command = [python, str(worker), str(folder / "job.json"), str(folder / "result.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def our_config(case: str, base: Path, data: Path, folder: Path) -> TrainConfig:
    given = {
        **SETTINGS, "model_name_or_path": str(base), "data_path": str(data), "output_dir": str(folder / "ours"),
        "objective": case.split()[0], "learning_rate": 1e-4, "max_steps": STEPS, "global_batch_size": BATCH,
        "lr_scheduler_type": "constant", "model_max_length": LENGTH, "save_strategy": "no", **OURS[case],
    }  # fmt: skip
    return make_config(given)


def our_tokens(run: loop.Run) -> list[list[int]]:
    sequences = run.data.sequences
    return [sequences.example(place)[0].tolist() for place in run.data.places(torch.arange(len(run.data))).tolist()]


@pytest.mark.parametrize("case", OURS)
def test_the_first_steps_are_trls(case: str, python: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    objective = case.split()[0]
    listed, order = records(objective), epoch_permutation(NUM, seed=42, epoch=0).tolist()
    (tmp_path / "data.json").write_text(json.dumps(listed))
    runs: list[loop.Run] = []
    real = loop.prepare
    monkeypatch.setattr(loop, "prepare", lambda *given: runs.append(real(*given)) or runs[-1])
    ours: list[dict[str, float]] = []
    train(our_config(case, base, tmp_path / "data.json", tmp_path), on_step=ours.append)
    theirs = their_run(python, case, base, tmp_path, [listed[index] for index in order])

    made, tokens = our_tokens(runs[0]), theirs["tokens"]
    for place, index in enumerate(order):
        for offset, name in enumerate(("chosen", "rejected") if objective != "kto" else ("completion",)):
            found = (
                tokens[f"{name}_input_ids"][place]
                if objective == "orpo"
                else (tokens["prompt_ids"][place] + tokens[f"{name}_ids"][place])[:LENGTH]
            )
            assert made[index * runs[0].data.width + offset] == found
    size = len(theirs["losses"]) // STEPS
    losses = [sum(theirs["losses"][i : i + size]) / size for i in range(0, len(theirs["losses"]), size)]
    differences = [abs(own["loss"] - their) / abs(their) for own, their in zip(ours, losses, strict=True)]
    print(case, f"largest relative difference of a loss {max(differences):.1e}; losses", [round(x, 4) for x in losses])
    assert len(differences) == STEPS
    assert max(differences) < 2e-5
    for own, their in zip(ours, theirs["history"], strict=True):
        for name in own.keys() & their.keys() - {"loss", "epoch", "learning_rate"}:
            assert own[name] == pytest.approx(their[name], rel=2e-3, abs=2e-4), name
    shared = ours[-1].keys() & theirs["history"][-1].keys()
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "grad_norm"} <= shared
