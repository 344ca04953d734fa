"""Preferences with adapters that start from the base, and on quantized bases: what is written is what was measured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from alpaca.training.configuration.config import TrainConfig
from alpaca.training.loop import train
from tests.samples import sampled
from tests.training.objectives.test_steps import answers, entries, token_logps

Configure = Callable[..., TrainConfig]
BASES = {  # flags, what transformers calls the base, and how far its products may be off in a sum of log-probabilities
    "pissa": ({"method": "lora", "lora_init": "pissa"}, None, 2e-2),
    "nf4": (
        {"method": "qlora"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        2e-2,
    ),
    "int8": ({"method": "lora", "base_quantization": "int8"}, {"load_in_8bit": True}, 0.2),
}
KINDS = [
    ("pissa", "orpo"),
    ("pissa", "dpo"),
    ("pissa", "kto"),
    ("nf4", "dpo"),
    ("nf4", "orpo"),
    ("nf4", "kto"),
    ("int8", "dpo"),
]


@pytest.mark.parametrize("kind", sampled(KINDS, KINDS[0]), ids=" ".join)
def test_what_is_written_is_what_was_measured(
    kind: tuple[str, str],
    prefer: Configure,
    packable_llama: Path,
    pairs: Path,
    sentencepiece_model: Path,
    tmp_path: Path,
):
    """Before the first step the model is its base; after the last, PEFT's loader gives the model that was evaluated."""
    name, objective = kind
    values, quantized, tolerance = BASES[name]
    tolerance /= 50 if objective == "orpo" else 1  # whose log-probabilities are means over tokens
    folder = train(
        prefer(
            objective, model_name_or_path=str(packable_llama), max_steps=4, learning_rate=5e-3, save_strategy="no",
            eval_data_path=str(pairs), eval_strategy="steps", eval_steps=4, **values,
        )
    )  # fmt: skip
    how = {"quantization_config": BitsAndBytesConfig(**quantized)} if quantized else {}
    model = LlamaForCausalLM.from_pretrained(packable_llama, dtype=torch.float32, **how)
    sequences = answers(pairs, sentencepiece_model, tmp_path)

    def mean_logps() -> tuple[float, float]:
        with torch.no_grad():
            each = [token_logps(model, one) for one in sequences]
        found = torch.stack([values[own].mean() if objective == "orpo" else values[own].sum() for values, own in each])
        return found[::2].mean().item(), found[1::2].mean().item()

    before = mean_logps()
    model = PeftModel.from_pretrained(model, folder)
    after = mean_logps()
    evaluated = entries(folder, "eval_logps/chosen")
    first, last = evaluated[0], evaluated[-1]
    assert (first["step"], last["step"]) == (0, 4)
    for entry, expected in ((first, before), (last, after)):
        assert entry["eval_logps/chosen"] == pytest.approx(expected[0], abs=tolerance)
        assert entry["eval_logps/rejected"] == pytest.approx(expected[1], abs=tolerance)
    moved = max(abs(now - then) for now, then in zip(after, before, strict=True))
    print(f"before {before}, after {after}, evaluated {first['eval_logps/chosen']}, {last['eval_logps/chosen']}")
    assert moved > 3 * tolerance
    if objective == "dpo":
        assert abs(first["eval_rewards/margins"]) < 1e-4
        assert last["eval_rewards/margins"] > 0.1
    assert json.loads((folder / "train_config.json").read_text())["objective"] == objective
