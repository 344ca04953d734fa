"""Products of bfloat16 weights in float32, on a CPU without units for bfloat16: what they give, and when they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from alpaca.training import run as run_module
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import make_settings, resolve
from alpaca.training.distributed import World
from alpaca.training.loop import train
from alpaca.training.model import building, padding_free
from alpaca.training.model.base import open_base
from alpaca.training.model.wide_products import WideLinear, multiplies_bfloat16, multiply_wide
from alpaca.training.planning import workload
from alpaca.training.planning.workload import make_setup, read_model
from tests.samples import sampled
from tests.training.test_loop import history

Configure = Callable[..., TrainConfig]
CPU, LOW = torch.device("cpu"), torch.bfloat16


def has_units(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """Training takes this CPU for one that has units for bfloat16, or that has none."""
    for module in (building, workload):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: there)


@pytest.mark.parametrize(
    ("machine", "wanted"), [("x86_64", "_is_avx512_bf16_supported"), ("AMD64", "_is_amx_tile_supported")]
)
def test_torch_is_asked_for_the_units(machine: str, wanted: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not multiplies_bfloat16()
    monkeypatch.setattr(torch.cpu, wanted, lambda: True)
    assert multiplies_bfloat16()


def test_this_machines_own_list_says_the_same():
    flags = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), [])
    if not flags:
        pytest.skip("this machine does not list what its CPU can do")
    assert multiplies_bfloat16() == bool({"avx512_bf16", "amx_tile"} & set(flags))


def gradients(multiply: Callable[..., Tensor], tensors: list[Tensor], out: Tensor) -> list[Tensor]:
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    product = multiply(*own)
    product.backward(out.to(product.dtype))
    return [product.detach(), *(tensor.grad for tensor in own)]


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24)])
def test_a_product_is_the_exact_one_rounded(shape: tuple[int, ...]):
    """And so are the gradients: against float64, each within half a step of bfloat16, float32's sums apart."""
    torch.manual_seed(0)
    x, weight, out = (torch.randn(size).to(LOW) for size in (shape, (7, 24), (*shape[:-1], 7)))
    found = gradients(lambda x, weight: multiply_wide(x, weight, None), [x, weight], out)
    exact = gradients(linear, [x.double(), weight.double()], out)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == LOW
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-5)


def test_bias_is_added_and_weights_that_add_up_in_float32_get_rounded_gradients():
    """As units would give them: a run's sums are the same on both."""
    layer = nn.Linear(8, 3).to(LOW)
    layer.weight.grad_dtype = torch.float32
    x = torch.randn(4, 8).to(LOW)
    torch.testing.assert_close(multiply_wide(x, layer.weight, layer.bias), layer(x), rtol=2**-7, atol=2**-7)
    multiply_wide(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight.grad, x.float().sum(0).to(LOW).float().expand(3, 8))
    assert layer.bias.grad.tolist() == [4, 4, 4]


def test_what_is_kept_is_bfloat16():
    x, weight = torch.randn(4, 8).to(LOW).requires_grad_(), torch.randn(3, 8).to(LOW).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        multiply_wide(x, weight, None)
    assert {tensor.dtype for tensor in kept} == {LOW}


# Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", sampled(["tiny_llama", "tiny_opt"], "tiny_opt"))
@pytest.mark.parametrize("padding_free", [True, False])
def test_a_run_is_the_one_on_units(
    base: str, padding_free: bool, configure: Configure, tmp_path, monkeypatch, caplog, request
):
    """Losses differ by the order of sums alone; weights and what is written stay bfloat16."""
    caplog.set_level("INFO", logger="alpaca")
    losses = {}
    for there in (True, False):
        has_units(monkeypatch, there)
        config = configure(
            model_name_or_path=str(request.getfixturevalue(base)), output_dir=str(tmp_path / str(there)),
            numerics="fast", max_steps=4, save_dtype="bfloat16", padding_free=padding_free, learning_rate=1e-4,
        )  # fmt: skip
        folder = train(config)
        losses[there] = history(folder)
        assert caplog.text.count("products are computed in float32") == (0 if there else 1)
    assert len(losses[True]) == 4
    assert losses[False] == pytest.approx(losses[True], abs=2e-3)
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {LOW}


def test_only_fast_numerics_are_widened_and_all_products_are(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    kinds = {}
    for numerics in ("fast", "stanford"):
        for there in (True, False):
            has_units(monkeypatch, there)
            settings = make_settings(resolve(configure(numerics=numerics), num_processes=1, device=CPU))
            base = open_base(settings.base)
            model = building.load_model(base, settings.model, World(rank=0, num_processes=1, device=CPU))
            kinds[numerics, there] = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
            assert model.get_output_embeddings().is_wide == (numerics == "fast" and not there)
            setup = make_setup(settings, read_model(base.folder), num_processes=1, on_gpu=False)
            assert setup.is_wide == (numerics == "fast" and not there)
    plain = {nn.Linear, padding_free.TargetHead}
    assert kinds.pop(("fast", False)) == {WideLinear, padding_free.TargetHead}
    assert set(map(frozenset, kinds.values())) == {frozenset(plain)}


class Products(TorchDispatchMode):
    """Keeps the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes.add(arguments[-1].dtype)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("there", [True, False])
def test_no_product_of_bfloat16_is_left(there: bool, configure: Configure, monkeypatch: pytest.MonkeyPatch):
    """Forward and back: where losses are summed, where they come one by one, and where logits are wanted."""
    has_units(monkeypatch, there)
    world = World(rank=0, num_processes=1, device=CPU)
    run = run_module.prepare(make_settings(resolve(configure(numerics="fast"), num_processes=1, device=CPU)), world)
    ids, labels = run.data.example(0)
    with Products() as products:
        total = run.passes.sum_losses([(ids, labels)])
        total.backward()
        each = run.passes.target_losses([(ids, labels)])
        each.sum().backward()
        logits = run.trainee.model(input_ids=ids[None], packing=padding_free.Packing([len(ids)])).logits[0]
        logits.float().sum().backward()
    assert products.dtypes == ({torch.float32, LOW} if there else {torch.float32})
    whole = nn.functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum").item()
    assert each.sum().item() == pytest.approx(total.item(), rel=1e-2)
    assert whole == pytest.approx(total.item(), rel=1e-2)
