"""Stochastic AdamW: unbiased, equal to torch's where nothing is rounded, the kernel's bits, and whole runs with it."""

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alpaca.errors import InputError
from alpaca.training import gradients, loop
from alpaca.training import run as run_module
from alpaca.training.configuration.config import TrainConfig, config_json
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.distributed import clip_gradients, join_world
from alpaca.training.loop import train
from alpaca.training.model.optimizers import choosing
from alpaca.training.model.optimizers.by_chance import StochasticAdamW, make_keys, make_update
from alpaca.training.model.optimizers.rounding import (
    CHUNK_ELEMENTS,
    Update,
    draw_bits,
    round_stochastically,
    update_parameter,
)
from tests.conftest import ROOT
from tests.samples import sampled
from tests.training.checkpoints.test_checkpoint import Crash, assert_same_run, crash_after
from tests.training.conftest import SAMPLE, torchrun
from tests.training.test_distributed import train_in_processes
from tests.training.test_loop import history
from tests.triton_interpreter import DEVICE, INTERPRETED, need_kernels

Configure = Callable[..., TrainConfig]
LOW = torch.bfloat16
# Elements, and the number of the first: part of a program over the end of 32 bits, a whole one, some and a rest.
KERNEL_PLACES = ((40, 2**32 - 5), (1024, 0), (5003, 4096))


# Rounding -------------------------------------------------------------------------------------------------------


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers next to float32 ones, towards zero and away from it, in float64."""
    bits = values.view(torch.int32) & ~0xFFFF
    inner = bits.view(torch.float32)
    outer = torch.where(values == inner, bits, bits + 0x10000).view(torch.float32)
    return inner.double(), outer.double()


def test_rounding_is_to_a_neighbour_and_right_on_average():
    """Over 4,000 steps the mean lies within five standard errors of each value, and these are spread as they should."""
    num_draws, values = 4000, torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.02
    inner, outer = neighbours(values)
    share = (values.double() - inner) / (outer - inner)
    deviation = (outer - inner).abs() * (share * (1 - share) / num_draws).sqrt()
    steps = [draw_bits(500, 0, make_keys(1, step, 7), device=CPU) for step in range(num_draws)]
    for draws in map(torch.stack, zip(*steps, strict=True)):
        rounded = round_stochastically(values.expand(num_draws, 500), draws).double()
        assert ((rounded == inner) | (rounded == outer)).all()
        errors = (rounded.mean(0) - values.double()) / deviation
        assert errors.abs().max() < 5
        assert errors.std().item() == pytest.approx(1, abs=0.15)
        assert abs(errors.mean().item()) < 5 / math.sqrt(500)


def test_draws_of_elements_steps_parameters_and_tensors_have_nothing_in_common():
    streams = [
        own.double() for step in range(3) for parameter in range(3)
        for own in draw_bits(20_000, 0, make_keys(0, step, parameter), device=CPU)
    ]  # fmt: skip
    streams += [streams[0].roll(1)]
    found = torch.corrcoef(torch.stack(streams))
    assert (found - torch.eye(len(streams))).abs().max() < 5 / math.sqrt(20_000)
    for own in streams:
        counts = torch.histc(own, bins=16, min=0, max=65536)
        assert ((counts - 1250) ** 2 / 1250).sum() < 50  # chi squared of 15 degrees: once in 1e5


def test_what_bfloat16_holds_is_kept_and_the_ends_are_right():
    ends = [0.0, -0.0, math.inf, -math.inf, torch.finfo(LOW).max, -torch.finfo(LOW).max, 1e-40, 2.0**-133, 1.0]
    exact = torch.cat([torch.tensor(ends).to(LOW), torch.randn(100).to(LOW)])
    for draw in (0, 1, 65535):
        draws = torch.full(exact.shape, draw, dtype=torch.int32)
        rounded = round_stochastically(exact.float(), draws)
        assert torch.equal(rounded.view(torch.int16), exact.view(torch.int16))
    largest = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    most = torch.full((2,), 65535, dtype=torch.int32)
    assert round_stochastically(largest, most).tolist() == [torch.finfo(LOW).max, -torch.finfo(LOW).max]
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000], dtype=torch.int32)
    for draw in (0, 65535):
        assert (
            round_stochastically(payloads.view(torch.float32), torch.full((5,), draw, dtype=torch.int32)).isnan().all()
        )


# AdamW ----------------------------------------------------------------------------------------------------------


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, *, first: int = 0) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(first, first + num_steps):
        inputs = torch.randn(8, 30, generator=torch.Generator().manual_seed(step))
        model(inputs.to(model[0].weight.dtype)).float().square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def group(model: nn.Module) -> list[dict[str, object]]:
    own = list(model.parameters())
    return [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0},
    ]


def test_in_float32_it_is_torchs():
    settings = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6}
    ours, theirs = make_model(), make_model()
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    optimizers = [StochasticAdamW(group(ours), **settings), torch.optim.AdamW(group(theirs), **settings)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        take_steps(model, optimizer, 50)
    for own, other, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        assert (own - before).abs().max() > 1e-2
        for name in ("step", "exp_avg", "exp_avg_sq"):
            found, expected = (opt.state[p][name] for opt, p in zip(optimizers, (own, other), strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_small_updates_arrive_on_average_and_rounding_to_the_nearest_loses_them():
    """A thousand steps of 2e-5 on weights of 0.75, whose neighbours are 3.9e-3 apart."""
    found = {}
    for kind in (StochasticAdamW, torch.optim.AdamW):
        weights = nn.Parameter(torch.full((4000,), 0.75, dtype=LOW))
        optimizer = kind([weights], lr=2e-5, weight_decay=0.0)
        for _ in range(1000):
            weights.grad = torch.full_like(weights, 1e-3)
            optimizer.step()
        found[kind] = weights.detach().double()
    assert found[torch.optim.AdamW].unique().tolist() == [0.75]
    moved = 0.75 - found[StochasticAdamW]
    spacing = 2.0**-8  # of bfloat16 below 1; each step is one of so much by chance
    error = math.sqrt(1000 * 2e-5 * spacing / 4000)
    assert moved.mean().item() == pytest.approx(1000 * 2e-5, abs=5 * error)
    assert 5 * error < 0.05 * 1000 * 2e-5
    assert moved.std().item() == pytest.approx(math.sqrt(1000 * 2e-5 * spacing), rel=0.1)


def test_moments_of_constant_gradients_become_those_of_torch():
    """beta2 of 0.999 moves a second moment by less than half a spacing, which the nearest would never leave."""
    weights, gradient = nn.Parameter(torch.zeros(2000, dtype=LOW)), 1.5e-3
    optimizer = StochasticAdamW([weights], lr=0.0, betas=(0.9, 0.999))
    for _ in range(1000):
        weights.grad = torch.full_like(weights, gradient)
        optimizer.step()
    square, (state,) = float(torch.tensor(gradient).to(LOW)) ** 2, optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == LOW
    assert state["exp_avg"].double().mean().item() == pytest.approx(math.sqrt(square), rel=0.002)
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(square * (1 - 0.999**1000), rel=0.005)
    assert (weights == 0).all()


def test_a_step_with_a_rate_of_zero_changes_no_weight():
    """As torch.distributed.checkpoint takes one to make the states."""
    model = make_model(LOW)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = StochasticAdamW(model.parameters(), lr=0.0, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(own, old) for own, old in zip(model.parameters(), before, strict=True))
    assert all((state[name] == 0).all() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))


def test_the_seed_decides_and_a_state_goes_on():
    def weights(seed: int, *, interrupted: bool = False) -> Tensor:
        model = make_model(LOW)
        optimizer = StochasticAdamW(group(model), lr=1e-2, seed=seed)
        take_steps(model, optimizer, 4)
        if interrupted:
            state = optimizer.state_dict()
            optimizer = StochasticAdamW(group(model), lr=1e-2, seed=seed)
            optimizer.load_state_dict(json_of(state))
        take_steps(model, optimizer, 4, first=4)
        return nn.utils.parameters_to_vector(model.parameters())

    def json_of(state: dict) -> dict:
        return {**state, "state": {key: dict(value) for key, value in state["state"].items()}}

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(weights(0), weights(0, interrupted=True))


def test_parameters_it_cannot_update_are_refused():
    with pytest.raises(ValueError, match=r"bfloat16 or float32, found torch.float16"):
        StochasticAdamW([nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    with pytest.raises(ValueError, match=r"expected contiguous .* strides \(1, 2\) for shape \(2, 3\)"):
        StochasticAdamW([nn.Parameter(torch.zeros(3, 2).T)])


def test_bfloat16_gradients_are_clipped_by_their_exact_norm():
    torch.manual_seed(0)
    model = make_model(LOW)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    whole = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    norm = clip_gradients(model, 0.37)
    assert norm == pytest.approx(whole.norm().item(), rel=1e-6)
    clipped = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert torch.equal(clipped, (whole.float() * (0.37 / (norm + 1e-6))).to(LOW))
    assert clip_gradients(model, 0.5) == pytest.approx(0.37, rel=1e-3)
    assert torch.equal(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), clipped)


# The kernel -----------------------------------------------------------------------------------------------------


def make_rows(num_elements: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights, gradient and moments with magnitudes of training and, at the front, those that no formula likes."""
    torch.manual_seed(0)
    weights, gradient = torch.randn(num_elements) * 0.02, torch.randn(num_elements) * 1e-3
    first, second = torch.randn(num_elements) * 1e-3, torch.rand(num_elements) * 1e-6
    odd = torch.tensor([0.0, math.inf, -math.inf, math.nan, 3.38e38, -3.38e38, 1e-39, -1e-42])
    weights[:8] = gradient[8:16] = first[16:24] = odd[: len(weights)]
    second[24:29] = torch.tensor([0.0, math.inf, math.nan, 3.38e38, 1e-42])
    gradient[29:31] = 0.0
    second[29:31] = first[29:31] = 0.0
    return [row.to(dtype) for row in (weights, gradient, first, second)]


def some_update(*, step: int = 3, first_element: int = 0) -> Update:
    settings = {"lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    return make_update(settings, step=step, first_element=first_element, keys=make_keys(42, step, 5))


def same_bits(left: Tensor, right: Tensor) -> bool:
    kind = torch.int16 if left.dtype == LOW else torch.int32
    numbers = ~left.isnan()  # which NaN comes of an invalid operation is the processor's choice
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(left[numbers].view(kind), right[numbers].view(kind))


@pytest.mark.parametrize(
    ("num_elements", "first_element"),
    [
        pytest.param(count, first, marks=() if (count, first) in KERNEL_PLACES else pytest.mark.slow)
        for count in (40, 1024, 5003)
        for first in (0, 4096, 2**32 - 5)
    ],
)
@pytest.mark.parametrize(
    ("dtype", "gradient"),
    [(LOW, LOW), (LOW, torch.float32), (torch.float32, torch.float32)],
    ids=["bfloat16", "float32's gradient", "float32"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities
def test_the_kernel_writes_the_twins_bits(dtype, gradient, num_elements, first_element, monkeypatch):
    pytest.importorskip("triton")
    need_kernels(monkeypatch)
    from alpaca.training.model.optimizers import triton_adamw

    expected = make_rows(num_elements, dtype)
    expected[1] = make_rows(num_elements, gradient)[1]
    found = [row.to(DEVICE) for row in expected]
    before = expected[0].clone()
    for step in (1, 2, 700):
        update = some_update(step=step, first_element=first_element)
        update_parameter(*expected, update)
        triton_adamw.update_parameter(*found, update)
        assert all(same_bits(own.cpu(), other) for own, other in zip(found, expected, strict=True))
    assert not same_bits(before, expected[0])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_an_h100_without_fused_products(dtype: str, monkeypatch, tmp_path: Path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from alpaca.training.model.optimizers import triton_adamw

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_adamw._adamw_kernel
    kinds = [f"*{dtype}"] * 4 + ["i32"] * 4 + ["fp32"] * 7 + ["constexpr"]
    source = triton.compiler.ASTSource(
        kernel,
        dict(zip(kernel.arg_names, kinds, strict=True)),
        constexprs={(kernel.arg_names.index("block"),): triton_adamw._BLOCK},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(5)},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    ptx = compiled.asm["ptx"]
    assert "fma." not in ptx
    assert "sqrt.rn.f32" in ptx
    assert "div.rn.f32" in ptx
    assert ".approx" not in ptx
    wide = "ld.global.v4.b32"  # 16 bytes a load: the memory's bandwidth is the limit
    assert ptx.count(wide) == (4 if dtype == "bf16" else 8)


def test_chunks_do_not_show():
    rows = make_rows(CHUNK_ELEMENTS + 37, LOW)
    parts = [[row[part].clone() for row in rows] for part in (slice(0, 1000), slice(1000, None))]
    update_parameter(*rows, some_update())
    update_parameter(*parts[0], some_update())
    update_parameter(*parts[1], some_update(first_element=1000))
    for whole, left, right in zip(rows, *parts, strict=True):
        assert same_bits(whole, torch.cat([left, right]))


# Runs -----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_fast_is_for_full_fine_tuning_and_one_of_two(configure: Configure):
    for method in ("lora", "qlora"):
        with pytest.raises(InputError, match=f"--numerics fast is for --method full, found --method {method}: an adap"):
            resolve(configure(numerics="fast", method=method), num_processes=1, device=CPU)
    with pytest.raises(InputError, match="--numerics: expected one of stanford, fast, found 'faster'"):
        resolve(configure(numerics="faster"), num_processes=1, device=CPU)


def test_on_a_cpu_bfloat16_stays_and_a_gpu_without_it_is_refused(configure: Configure, monkeypatch, caplog):
    model = make_settings(resolve(configure(numerics="fast", bf16=True), num_processes=1, device=CPU)).model
    assert model.computes_low
    assert not model.autocasts
    assert "bf16 dropped" not in caplog.text
    assert make_settings(
        resolve(configure(numerics="fast", bf16=False), num_processes=1, device=CPU)
    ).model.computes_low
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla V100")
    with pytest.raises(InputError, match="computes in bfloat16, and Tesla V100 has none; use --numerics stanford"):
        resolve(configure(numerics="fast"), num_processes=1, device=torch.device("cuda"))


def run_of(monkeypatch: pytest.MonkeyPatch) -> list[run_module.Run]:
    """What the loop prepares, from then on."""

    runs: list[run_module.Run] = []
    prepare = loop.prepare
    monkeypatch.setattr(loop, "prepare", lambda *given: runs.append(prepare(*given)) or runs[-1])
    return runs


def test_everything_is_bfloat16_and_the_losses_are_float32(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    runs, dtypes, gradients = run_of(monkeypatch), set(), set()
    step = StochasticAdamW.step

    def look(optimizer: StochasticAdamW, closure: None = None) -> None:
        gradients.update(p.grad.dtype for own in optimizer.param_groups for p in own["params"])
        step(optimizer, closure)

    monkeypatch.setattr(StochasticAdamW, "step", look)
    folder = train(configure(numerics="fast", max_steps=2, save_dtype="bfloat16"))
    trainee = runs[0].trainee
    dtypes |= {parameter.dtype for parameter in trainee.model.parameters()}
    dtypes |= {state[name].dtype for state in trainee.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")}
    assert dtypes == {LOW}
    assert gradients == {torch.float32}  # of two micro-batches, added up
    losses = history(folder)
    assert any(float(torch.tensor(loss).to(LOW)) != loss for loss in losses)
    assert json.loads((folder / "train_config.json").read_text())["numerics"] == "fast"


@pytest.mark.slow
def test_a_steps_gradient_is_its_micro_batches_sum_to_float32s_precision(configure: Configure, tmp_path: Path):
    """Against float64's sum of 40 gradients; added up in bfloat16 it is several times as far off as one rounding."""
    path = tmp_path / "many.json"
    path.write_text(json.dumps(json.loads(SAMPLE.read_text())[:48]))
    config = configure(
        data_path=str(path), numerics="fast", global_batch_size=40, per_device_train_batch_size=1, padding_free=False
    )
    run = run_module.prepare(make_settings(resolve(config, num_processes=1, device=CPU)), join_world())
    parameters = dict(run.trainee.model.named_parameters())
    exact = {name: torch.zeros_like(own, dtype=torch.float64) for name, own in parameters.items()}
    low = {name: torch.zeros_like(own) for name, own in parameters.items()}
    assert len(run.data) >= 40
    for index in range(40):
        (gradients.sum_losses(run, run.data, torch.tensor([index])) / int(run.data.target_counts[:40].sum())).backward()
        for name, own in parameters.items():
            exact[name] += own.grad.double()
            low[name] += own.grad.to(LOW)
            own.grad = None
    gradients.accumulate_gradients(run, torch.arange(40))

    def error(found: dict[str, Tensor]) -> float:
        difference = sum((found[name].double() - whole).square().sum() for name, whole in exact.items())
        return math.sqrt(difference / sum(whole.square().sum() for whole in exact.values()))

    errors = error({name: own.grad for name, own in parameters.items()}), error(low)
    rounded = error({name: whole.to(LOW) for name, whole in exact.items()})
    print(f"float32 {errors[0]:.2e}, bfloat16 {errors[1]:.2e}, one rounding {rounded:.2e}")
    assert errors[0] < 1e-5
    assert errors[1] > 3 * rounded


def test_one_micro_batch_keeps_its_gradient_in_bfloat16(configure: Configure):
    """Nothing is added up, so nothing is won by more bytes."""
    config = configure(numerics="fast", per_device_train_batch_size=8)
    run = run_module.prepare(make_settings(resolve(config, num_processes=1, device=CPU)), join_world())
    gradients.accumulate_gradients(run, torch.arange(8))
    assert {own.grad.dtype for own in run.trainee.model.parameters()} == {LOW}


class NearestAdamW(torch.optim.AdamW):
    """What is there without it: AdamW on bfloat16 tensors, as torch rounds."""

    def __init__(self, params: list, *, seed: int, **settings: object) -> None:
        super().__init__(params, **settings, foreach=False)


@pytest.mark.slow
def test_it_learns_what_float32_does_and_rounding_to_the_nearest_does_not(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the sample, at a rate whose updates are a small part of the weights' spacing; means of ten steps each."""

    def losses(name: str, numerics: str) -> list[float]:
        return history(train(configure(
            output_dir=str(tmp_path / name), data_path=str(SAMPLE), numerics=numerics, learning_rate=1e-4,
            max_steps=20, warmup_ratio=0.0, lr_scheduler_type="constant", logging_steps=10, global_batch_size=4,
        )))  # fmt: skip

    stanford, fast = losses("stanford", "stanford"), losses("fast", "fast")
    monkeypatch.setattr(choosing, "StochasticAdamW", NearestAdamW)
    nearest = losses("nearest", "fast")
    print(f"stanford {stanford}\nfast {fast}\nnearest {nearest}")
    assert fast == pytest.approx(stanford, abs=0.01)
    assert nearest[-1] > stanford[-1] + 0.15


@pytest.mark.parametrize("base", sampled(["tiny_llama", "tiny_opt"], "tiny_opt"))
@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(base: str, configure: Configure, tmp_path: Path, request):
    values = {"model_name_or_path": str(request.getfixturevalue(base)), "numerics": "fast", "save_steps": 2,
              "weight_decay": 0.1, "save_dtype": "float32", "max_steps": 6}  # fmt: skip
    whole = train(configure(output_dir=str(tmp_path / "whole"), **values))
    config = configure(output_dir=str(tmp_path / "resumed"), **values)
    with pytest.raises(Crash, match="on purpose"):
        train(config, on_step=crash_after(3))
    assert_same_run(whole, train(dataclasses.replace(config, resume_from_checkpoint="auto")))
    stanford = dataclasses.replace(config, numerics="stanford", resume_from_checkpoint=str(whole / "checkpoint-6"))
    with pytest.raises(InputError, match="numerics was 'fast' and is 'stanford'"):
        train(dataclasses.replace(stanford, output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize("sharding", ["full_shard", pytest.param("hybrid_shard", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_two_processes_train_near_one_and_resume(configure: Configure, tmp_path: Path, sharding: str):
    """Gradients are added up in float32, but reduced in another order; the draws are the same."""
    values = {"numerics": "fast", "learning_rate": 2e-4, "max_steps": 3, "save_steps": 2, "save_dtype": "float32",
              "weight_decay": 0.1, "per_device_train_batch_size": 2, "fsdp": f"{sharding} auto_wrap"}  # fmt: skip
    two = configure(output_dir=str(tmp_path / "two"), **values)
    again = configure(
        output_dir=str(tmp_path / "again"), resume_from_checkpoint=f"{two.output_dir}/checkpoint-2", **values
    )
    finished = train_in_processes(2, [config_json(config) for config in (two, again)], tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_run(Path(two.output_dir), Path(again.output_dir))
    alone = train(dataclasses.replace(two, output_dir=str(tmp_path / "one")))
    assert history(Path(two.output_dir)) == pytest.approx(history(alone), abs=5e-3)
    assert history(Path(two.output_dir), "grad_norm") == pytest.approx(history(alone, "grad_norm"), rel=0.02)


@pytest.mark.slow
def test_shards_are_updated_as_the_whole_is(tmp_path: Path):
    """Bit for bit, given equal gradients: rows that do not divide, a process without any, copies on two machines."""
    worker = Path(__file__).with_name("shard_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run([*torchrun(4), str(worker)], capture_output=True, text=True, env=environment, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("equal") == 4
