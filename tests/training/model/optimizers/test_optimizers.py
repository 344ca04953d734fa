"""--optim: each as transformers' Trainer has it or its author says, resumed bit for bit, its moments counted."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from alpaca.errors import InputError, MissingPackage
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import resolve_settings
from alpaca.training.loop import train
from alpaca.training.model.optimizers.choosing import group_parameters, list_trained, make_optimizer, moment_bytes
from alpaca.training.model.optimizers.eight_bit import EightBitAdamW
from tests.samples import sampled
from tests.training.checkpoints.test_checkpoint import Crash, assert_same_run, crash_after
from tests.training.model.peers import PLAIN, train_plainly
from tests.training.test_loop import history

Configure = Callable[..., TrainConfig]
CPU = torch.device("cpu")
RESUMED = ("adamw_8bit", "adafactor", "muon")
FULL = {**PLAIN, "weight_decay": 0.1, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    """bitsandbytes' manager is one for all optimizers of a process, and the Trainer writes into it."""
    yield
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for kept in (manager.pid2config, manager.index2config, manager.module_weight_config_triple):
        kept.clear()


@pytest.fixture(autouse=True)
def eager_bitsandbytes() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def padded_base(folder: Path) -> LlamaForCausalLM:
    """The base as our run has it: with a row for the padding token."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(481, mean_resizing=False)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        table.data[480] = table.data[:480].mean(0)
    return model.train()


def assert_equal_training(config: TrainConfig, model: nn.Module, losses: list[float], *, atol: float) -> None:
    """Our run's losses and final weights are the peer's."""
    folder = train(config)
    assert losses[-1] != losses[0]
    assert history(folder) == pytest.approx(losses, abs=1e-4)
    written = load_file(folder / "model.safetensors")
    for name, expected in model.state_dict().items():
        assert torch.allclose(written[name], expected, atol=atol), name


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit"])
def test_each_trains_as_in_transformers_trainer(
    optim: str, configure: Configure, tiny_llama: Path, sentencepiece_model: Path, records: Path, tmp_path: Path
):
    """The Trainer's own optimizer, made by the Trainer, in a plain loop; embeddings have moments of 32 bits in both."""
    config, model = configure(**FULL, optim=optim), padded_base(tiny_llama)
    given = TrainingArguments(output_dir=str(tmp_path), optim=optim, learning_rate=3e-3, weight_decay=0.1, use_cpu=True)
    optimizer = Trainer(model=model, args=given).create_optimizer()
    losses = train_plainly(model, [optimizer], config, records=records, model_file=sentencepiece_model)
    # A moment in 8 bits may fall on either side between two values, which is worth two steps of a weight.
    assert_equal_training(config, model, losses, atol=3e-5 if optim == "adafactor" else 6e-3)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest(
    configure: Configure, tiny_llama: Path, sentencepiece_model: Path, records: Path
):
    config, model = configure(**FULL, optim="muon"), padded_base(tiny_llama)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    assert len(hidden) == 14
    optimizers = [
        torch.optim.Muon(hidden, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(tables, lr=3e-3, weight_decay=0.1),
        torch.optim.AdamW(norms, lr=3e-3, weight_decay=0.0),
    ]
    losses = train_plainly(model, optimizers, config, records=records, model_file=sentencepiece_model)
    assert_equal_training(config, model, losses, atol=2e-3)  # its products are bfloat16


@pytest.mark.parametrize("optim", sampled([*RESUMED, "paged_adamw_8bit"], *RESUMED))
@pytest.mark.fast_rows(1)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(optim: str, configure: Configure, tmp_path: Path):
    values = {"optim": optim, "max_steps": 4, "save_steps": 2, "weight_decay": 0.1, "model_max_length": 120}
    whole = train(configure(**values, output_dir=str(tmp_path / "whole")))
    interrupted = {**values, "output_dir": str(tmp_path / "interrupted")}
    with pytest.raises(Crash, match="crashed on purpose"):
        train(configure(**interrupted), on_step=crash_after(3))
    assert_same_run(whole, train(configure(**interrupted, resume_from_checkpoint="auto")))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_moments_are_paged_again_once_loaded(monkeypatch: pytest.MonkeyPatch):
    """On a CPU nothing is paged; the buffers that would be are told by who asks for them."""
    parameter = nn.Parameter(torch.randn(64, 80))
    optimizer = EightBitAdamW([{"params": [parameter]}], is_paged=True, lr=1e-2)
    parameter.grad = torch.randn(64, 80)
    optimizer.step()
    saved, real, given = optimizer.state_dict(), EightBitAdamW.get_state_buffer, []

    def get_buffer(self: EightBitAdamW, *arguments: object, **named: object) -> torch.Tensor:
        given.append(real(self, *arguments, **named))
        return given[-1]

    monkeypatch.setattr(EightBitAdamW, "get_state_buffer", get_buffer)
    other = EightBitAdamW([{"params": [parameter]}], is_paged=True, lr=1e-2)
    other.load_state_dict(saved)
    for buffer, name in zip(given, ("state1", "state2"), strict=True):
        assert other.state[parameter][name] is buffer
        assert torch.equal(buffer, optimizer.state[parameter][name])
        assert buffer.any()


def test_another_optimizer_does_not_go_on(configure: Configure):
    train(configure(max_steps=2, save_steps=2, model_max_length=120))
    with pytest.raises(InputError, match="optim was not written down, by an older version, and is 'adafactor'"):
        train(configure(max_steps=2, model_max_length=120, optim="adafactor", resume_from_checkpoint="auto"))


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "adafactor", "muon"])
def test_moments_are_counted_to_the_byte(name: str, configure: Configure, tiny_llama: Path):
    model = padded_base(tiny_llama)
    settings = resolve_settings(configure(optim=name), num_processes=1, device=CPU).optimizer
    optimizer = make_optimizer(model, settings, by_chance=False, fused=False)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    apart = ("step", "RMS", "qmap1", "qmap2")
    found = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key not in apart and isinstance(value, torch.Tensor)
    )
    assert found == moment_bytes(list_trained(model), name)


def test_loraplus_groups_are_pefts(configure: Configure, tiny_llama: Path):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), settings)
    peer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
    own = group_parameters(model, weight_decay=0.1, rate=1e-3, ratio=16)
    expected, found = (
        {id(p): (group.get("lr", 1e-3), group["weight_decay"]) for group in groups for p in group["params"]}
        for groups in (peer.param_groups, own)
    )
    assert found == expected
    assert {rate for rate, _ in found.values()} == {1e-3, 1.6e-2}


def test_without_bitsandbytes_it_is_said(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackage, match="--optim adamw_8bit is bitsandbytes', which cannot be imported"):
        train(configure(optim="adamw_8bit"))


REFUSED = {
    "--numerics fast has an AdamW of its own": {"optim": "muon", "numerics": "fast"},
    "not done for --optim adafactor": {"optim": "adafactor", "fsdp": "full_shard offload"},
    "--loraplus_lr_ratio goes with AdamW": {"optim": "muon", "method": "lora", "loraplus_lr_ratio": 4.0},
    "--loraplus_lr_ratio 4.0 is for adapters": {"loraplus_lr_ratio": 4.0},
    "--optim: expected one of adamw_torch, .*, found 'sgd'": {"optim": "sgd"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_makes_no_sense_is_refused(message: str, configure: Configure):
    with pytest.raises(InputError, match=message):
        resolve_settings(configure(**REFUSED[message]), num_processes=1, device=CPU)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor", "muon"])
def test_shards_are_refused_by_name(optim: str, configure: Configure):
    with pytest.raises(InputError, match=f"--optim {optim} cannot be sharded over processes"):
        resolve_settings(configure(optim=optim), num_processes=2, device=CPU)
