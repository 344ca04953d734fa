"""NEFTune: transformers' formula by each example's own length, the same in every layout, off in evaluation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune, neftune_post_forward_hook

from alpaca.errors import InputError
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.loop import train
from alpaca.training.model.noise import draw_noise, example_seed
from tests.training.checkpoints.test_checkpoint import Crash, assert_same_run, crash_after
from tests.training.model.peers import PLAIN, train_plainly
from tests.training.test_loop import history

Configure = Callable[..., TrainConfig]
NOISY = {**PLAIN, "neftune_noise_alpha": 5.0, "learning_rate": 1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_of_an_example_is_transformers(dtype: torch.dtype):
    embeddings = torch.randn(1, 37, 48, dtype=dtype)
    module = torch.nn.Embedding(1, 1).train()
    module.neftune_noise_alpha = 5.0
    torch.manual_seed(11)
    expected = neftune_post_forward_hook(module, (), embeddings)
    noise = draw_noise(11, 37, embeddings, 5.0)
    assert torch.equal(embeddings + noise, expected)
    assert 0.9 < noise.float().abs().max() / (5 / (37 * 48) ** 0.5) < 1.01


def test_training_is_that_with_transformers_hook(
    configure: Configure, tiny_llama: Path, sentencepiece_model: Path, records: Path
):
    """Their hook on one example at a time, with the seeds of ours."""
    config = configure(**{**NOISY, "lora_dropout": 0.0}, method="lora")
    torch.manual_seed(config.seed)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    activate_neftune(model, 5.0)

    def seed_noise(step: int, example: int) -> None:
        torch.manual_seed(example_seed(config.seed, step, example))

    expected = train_plainly(
        model, [optimizer], config, records=records, model_file=sentencepiece_model, before_example=seed_noise
    )
    assert history(train(config)) == pytest.approx(expected, abs=1e-4)
    noiseless = configure(
        **{**NOISY, "lora_dropout": 0.0, "neftune_noise_alpha": 0.0}, method="lora", overwrite_output_dir=True
    )
    assert history(train(noiseless)) != pytest.approx(expected, abs=1e-3)


LAYOUTS = {
    "packed": {},
    "packed, small": {"per_device_train_batch_size": 1},
    "padded": {"padding_free": False, "per_device_train_batch_size": 3},
}


def test_losses_do_not_depend_on_the_layout(configure: Configure, tmp_path: Path):
    lengths = {**NOISY, "model_max_length": 256, "max_steps": 2}  # several examples, none cut: 120 leave one
    losses = [
        history(train(configure(**lengths, **values, output_dir=str(tmp_path / name))))
        for name, values in LAYOUTS.items()
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    assert losses[2] == pytest.approx(losses[0], abs=2e-5)


@pytest.mark.slow
def test_evaluation_has_no_noise_and_a_resumed_run_has_the_same(configure: Configure, tmp_path: Path):
    values = {**NOISY, "model_max_length": 200, "max_steps": 3, "save_steps": 1, "save_strategy": "steps"}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "val_set_size": 4}
    whole = train(configure(**values, output_dir=str(tmp_path / "whole")))
    interrupted = {**values, "output_dir": str(tmp_path / "interrupted")}
    with pytest.raises(Crash, match="crashed on purpose"):
        train(configure(**interrupted), on_step=crash_after(2))
    assert_same_run(whole, train(configure(**interrupted, resume_from_checkpoint="auto")))
    quiet = {**values, "neftune_noise_alpha": 0.0, "max_steps": 1, "output_dir": str(tmp_path / "quiet")}
    first = [history(folder, "eval_loss")[0] for folder in (whole, train(configure(**quiet)))]
    assert first[0] == first[1]  # before the first step


def test_a_negative_noise_is_refused(configure: Configure):
    with pytest.raises(InputError, match=r"--neftune_noise_alpha: expected at least 0, found -1\.0"):
        train(configure(neftune_noise_alpha=-1.0))
