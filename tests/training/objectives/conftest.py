"""Pairs of answers made of the sample, and configurations that train on them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alpaca.training.configuration.config import TrainConfig
from tests.training.conftest import SAMPLE

Configure = Callable[..., TrainConfig]
NUM, BATCH, CUT = 16, 8, 150
VALUES = {
    "dpo": {"dpo_beta": 0.3, "dpo_label_smoothing": 0.1},
    "orpo": {"orpo_beta": 0.4},
    "orpo with prompts": {"orpo_beta": 0.4, "train_on_inputs": True},
    "kto": {"kto_beta": 0.2, "kto_desirable_weight": 1.5, "kto_undesirable_weight": 0.5},
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with a chosen and a rejected answer, which is another record's."""
    sample = json.loads(SAMPLE.read_text())[: NUM + 4]
    path = tmp_path_factory.mktemp("data") / "pairs.json"
    made = [
        {"instruction": one["instruction"], "input": one.get("input", ""), "chosen": one["output"]}
        | {"rejected": sample[index - 3]["output"]}
        for index, one in enumerate(sample)
    ]
    path.write_text(json.dumps(made[:NUM]))
    path.with_name("held_out.json").write_text(json.dumps(made[NUM:]))
    return path


@pytest.fixture
def prefer(configure: Configure, pairs: Path) -> Configure:
    """A configuration that trains on the pairs. case: of VALUES."""

    def make(case: str, **values: object) -> TrainConfig:
        given = {"data_path": str(pairs), "objective": case.split()[0], "global_batch_size": BATCH, **VALUES[case]}
        return configure(**{**given, "model_max_length": CUT, "lr_scheduler_type": "constant", **values})

    return make
