"""Layers that are recomputed or compiled train what layers left alone do, and no more of them than said."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca.data.batching import pack
from alpaca.errors import InputError, MissingPackage, NotEnoughSpace
from alpaca.training import loop
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.parsing import count_checkpointed, parse_checkpointing
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.loop import train
from alpaca.training.model import padding_free
from alpaca.training.model.layers import checkpoint_layers, compile_layers
from alpaca.training.planning import feasibility
from alpaca.training.planning.command import open_planner
from alpaca.training.planning.hardware import Hardware
from alpaca.training.planning.workload import make_setup
from alpaca.training.run import Run
from tests.training.test_loop import history

Configure = Callable[..., TrainConfig]
CPU = torch.device("cpu")
LORA = {"method": "lora", "lora_dropout": 0.3, "lora_target_modules": "all-linear"}
compiler_warns = pytest.mark.filterwarnings("ignore")  # torch.compile sets off warnings of torch's own
MODELS = ("tiny_llama", "tiny_opt", "tiny_bloom")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def assert_equal_runs(left: Path, right: Path, *, atol: float) -> None:
    assert history(left) == pytest.approx(history(right), abs=atol)
    others = tensors(right)
    differences = {name: (tensor - others[name]).abs().max().item() for name, tensor in tensors(left).items()}
    if atol:  # whose gradient is nothing but rounding, since softmax does not see it; AdamW makes steps of it
        differences = {name: value for name, value in differences.items() if not name.endswith("k_proj.bias")}
    assert max(differences.values()) <= atol, max(differences, key=differences.__getitem__)


@pytest.fixture
def kept_runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were prepared."""
    runs, real = [], loop.prepare

    def prepare(*arguments: object) -> Run:
        runs.append(real(*arguments))
        return runs[-1]

    monkeypatch.setattr(loop, "prepare", prepare)
    return runs


# Recomputed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.fast_rows(1)
def test_recomputing_some_layers_changes_no_bit(
    model: str, method: dict, configure: Configure, request, tmp_path: Path
):
    """Dropout included: OPT's own, and LoRA's."""
    base = str(request.getfixturevalue(model))
    common = {"model_name_or_path": base, "max_steps": 2, **method}
    none, first, every = (
        train(configure(**common, gradient_checkpointing=asked, output_dir=str(tmp_path / str(asked))))
        for asked in (False, "1", True)
    )
    assert_equal_runs(none, first, atol=0)
    assert_equal_runs(none, every, atol=0)


@pytest.mark.parametrize(("number", "calls"), [(0, [1, 1, 1, 1]), (1, [2, 1, 1, 1]), (3, [2, 2, 2, 1]), (4, [2] * 4)])
def test_the_first_layers_are_recomputed_and_no_others(number: int, calls: list[int]):
    model = make_llama(num_layers=4)
    checkpoint_layers(model.model.layers, number)
    counted = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda *_, index=index: counted.__setitem__(index, counted[index] + 1)
        )
    padding_free.sum_packed_losses(model, next(batches()), bf16=False).backward()
    assert counted == calls


def test_layers_of_another_make_are_refused():
    with pytest.raises(InputError, match="transformers cannot recompute a Linear; pass False"):
        checkpoint_layers([torch.nn.Linear(2, 2)], 1)


@pytest.mark.parametrize(
    ("asked", "meant", "layers"),
    [(True, True, 4), ("TRUE", True, 4), ("off", False, 0), (False, False, 0), ("0", 0, 0), ("1", 1, 1), (3, 3, 3),
     ("Auto", "auto", None)],
)  # fmt: skip
def test_ways_to_say_how_many(asked: object, meant: object, layers: int | None):
    parsed = parse_checkpointing(asked)
    assert (parsed, type(parsed)) == (meant, type(meant))
    assert count_checkpointed(asked, 4) == layers


def test_more_layers_than_there_are():
    with pytest.raises(InputError, match="--gradient_checkpointing 5: the model has 4 decoder layers"):
        count_checkpointed(5, 4)


# Chosen by the plan ---------------------------------------------------------------------------------------------


def peaks(config: TrainConfig) -> list[int]:
    """Planned, with none, one, … of the tiny LLaMA's layers recomputed."""
    planner = open_planner(make_settings(resolve(config, num_processes=1, device=CPU)))
    setups = [
        make_setup(make_settings(configured(config, k)), planner.shape, num_processes=1, on_gpu=False) for k in range(3)
    ]
    return [planner.memory(setup).peak_bytes for setup in setups]


def configured(config: TrainConfig, number: int) -> TrainConfig:
    return dataclasses.replace(resolve(config, num_processes=1, device=CPU), gradient_checkpointing=number)


def give_memory(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> None:
    hardware = Hardware(
        name="this CPU", memory_bytes=memory_bytes, on_gpu=False, peak_flops=None, flops=1e9, flops_are="assumed"
    )
    monkeypatch.setattr(feasibility, "find_hardware", lambda device: hardware)


def test_auto_recomputes_as_few_layers_as_fit(configure: Configure, monkeypatch, caplog, tmp_path, kept_runs):
    caplog.set_level(logging.INFO, logger="alpaca")
    config = configure(max_steps=2, per_device_train_batch_size=8)
    none, one, both = peaks(config)
    assert one < none
    folders = {}
    for name, memory, number in (("enough", none, 0), ("less", none - 1, 1), ("too little", 1000, None)):
        caplog.clear()
        give_memory(monkeypatch, memory)
        folders[name] = train(configure(**{**vars(config), "output_dir": str(tmp_path / name)}))
        chosen = kept_runs[-1].settings.model.checkpointing
        assert number is None or chosen == number
        flags = [layer.gradient_checkpointing for layer in kept_runs[-1].trainee.model.model.layers]
        assert flags == [index < chosen for index in range(2)]
        assert ("layers recomputed" in caplog.text) == (chosen > 0)
    assert "--gradient_checkpointing auto: " in caplog.text
    assert min(one, both) > 1000
    assert_equal_runs(folders["enough"], folders["less"], atol=0)


def test_a_memory_limit_is_planned_with_and_refused(configure: Configure, kept_runs):
    config = configure(max_steps=1, per_device_train_batch_size=8)
    none, *_ = peaks(config)
    train(configure(**{**vars(config), "memory_limit": f"{none}"}))
    train(configure(**{**vars(config), "memory_limit": f"{none - 1}", "overwrite_output_dir": True}))
    assert [run.settings.model.checkpointing for run in kept_runs] == [0, 1]
    with pytest.raises(NotEnoughSpace, match=r"this CPU \(--memory_limit 300KB\) has 0\.00 GB to use"):
        train(configure(**{**vars(config), "memory_limit": "300KB", "overwrite_output_dir": True}))
    with pytest.raises(InputError, match='--memory_limit: expected a size such as "5GB" or "400MB", found \'much\''):
        train(configure(memory_limit="much"))


# Compiled -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_llama(*, num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=176, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    padding_free.enable(model)
    return model


def batches() -> Iterator:
    """Five micro-batches of different tokens, targets, and numbers of examples."""
    generator = torch.Generator().manual_seed(1)
    for lengths in [(10, 20, 7), (30,), (5, 9, 11, 13), (17, 18), (40, 3, 3)]:
        ids = [torch.randint(0, 100, (length,), generator=generator) for length in lengths]
        yield pack([(own, torch.cat([torch.full_like(own[:2], -100), own[2:]])) for own in ids], pad_id=0)


def losses_and_gradients(model: LlamaForCausalLM) -> tuple[list[float], list[torch.Tensor], list[int]]:
    """Of each batch; and how many graphs there were after it."""
    losses, gradients, graphs = [], [], []
    for batch in batches():
        model.zero_grad()
        loss = padding_free.sum_packed_losses(model, batch, bf16=False)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, gradients, graphs


@pytest.mark.slow
@compiler_warns
def test_compiled_layers_share_graphs_that_serve_any_micro_batch(fresh_compiler):
    """No graph is added after the first batch, nor by more layers; losses and gradients are the eager ones'."""
    numbers = []
    for num_layers in (2, 4):
        model = make_llama(num_layers=num_layers)
        expected = losses_and_gradients(model)
        assert expected[2][-1] == (numbers[-1] if numbers else 0)
        padding_free.keep_out_of_graphs()
        compile_layers(model.model.layers)
        losses, gradients, graphs = losses_and_gradients(model)
        assert losses == pytest.approx(expected[0], rel=1e-5)
        for own, theirs in zip(gradients, expected[1], strict=True):
            assert torch.allclose(own, theirs, atol=1e-5)
        assert len(set(graphs)) == 1
        numbers.append(graphs[0])
    assert numbers[0] == numbers[1] > 0
    assert not counters["recompiles"]


COMPILED = {
    "llama": ("tiny_llama", {"gradient_checkpointing": 1}),
    "lora": ("tiny_llama", {**LORA, "gradient_checkpointing": 1}),
    "padded": ("tiny_llama", {"padding_free": False}),
    "opt": ("tiny_opt", {}),
    "bloom": ("tiny_bloom", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
@compiler_warns
def test_compiled_runs_are_eager_runs(case: str, configure: Configure, request, tmp_path: Path, fresh_compiler):
    """With the same dropout, evaluation, sample answers, and the check of the adapter that was written."""
    model, values = COMPILED[case]
    base = str(request.getfixturevalue(model))
    common = {"model_name_or_path": base, "max_steps": 3, "val_set_size": 4, "eval_strategy": "epoch", **values}
    folders = [
        train(configure(**common, num_samples=1, compile_layers=on, output_dir=str(tmp_path / str(on))))
        for on in (False, True)
    ]
    assert counters["stats"]["unique_graphs"] > 0
    assert_equal_runs(*folders, atol=2e-5)


def test_a_missing_compiler_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackage, match=r"--compile_layers needs a C compiler, and none of g\+\+, gcc, clang"):
        train(configure(max_steps=1, compile_layers=True))
