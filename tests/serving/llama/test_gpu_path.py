"""The engine's way on a GPU: Triton's kernels, quantized layers' kernels, and decode graphs, in one piece.

On a GPU as it is; elsewhere float32 in Triton's interpreter (triton_interpreter), where a function called anew stands
in for a captured graph.
"""

import pytest
import torch

from alpaca.formats.hf.adapters import AdapterFolder, open_adapter
from alpaca.formats.hf.folder import WeightsFolder
from alpaca.serving.kernels import ops
from alpaca.serving.llama.adapters import with_adapters
from alpaca.serving.llama.graphs import DecodeGraphs
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.runner import Runner
from alpaca.serving.llama.sampling import SamplingState
from alpaca.serving.llama.step import StepFields
from alpaca.serving.llama.weights import load_llama, read_llama
from tests.serving.llama.families import MODELS
from tests.serving.llama.families import save as save_family
from tests.serving.llama.test_llama import logits, save_model
from tests.serving.llama.test_llama_engine import CalledEachTime, engine_of, naive, naive_of_all, request, tokens
from tests.serving.llama.test_serving_adapters import ADAPTERS, Oracle, write_adapter
from tests.triton_interpreter import DEVICE, need_kernels

pytest.importorskip("triton")

ON_GPU = DEVICE == "cuda"
# In the interpreter they belong to --all: the kernels alone (test_triton_*) and the graphs with the twins
# (test_llama_engine, "graphs") are in the fast run.
pytestmark = [pytest.mark.gpu if ON_GPU else pytest.mark.slow]
SIZE = 16
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 0.06 if ON_GPU else 1e-4
_QUICK = ("gemma2", "qwen3, biases and windows")
FAMILIES = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in MODELS]
# The interpreter takes milliseconds for each program: one layer there, as the families' models have three.
SHAPE = dict(
    num_key_value_heads=2, hidden_size=64, num_attention_heads=4, intermediate_size=96,
    num_hidden_layers=2 if ON_GPU else 1,
)  # fmt: skip


@pytest.fixture
def triton_ops(monkeypatch):
    need_kernels(monkeypatch)
    from alpaca.serving.kernels import triton_ops

    return triton_ops


def load(folder, module, quantization: str = "none") -> LlamaModel:
    config = read_llama(folder)
    return load_llama(
        WeightsFolder(folder), config, device=torch.device(DEVICE), dtype=DTYPE, quantization=quantization,
        num_positions=config.max_context, ops=module,
    )  # fmt: skip


def make_runner(model: LlamaModel, *, max_running: int) -> Runner:
    cache = KeyValueCache(model.config, num_blocks=80, block_size=SIZE, dtype=model.dtype, device=model.device)
    for layer in (*cache.keys, *cache.values):
        layer.normal_(generator=torch.Generator(model.device).manual_seed(1))
    return Runner(model, cache, max_running=max_running, max_context=128, vocab_size=120, eos_ids=frozenset([2]))


def make_graphs(runner: Runner) -> DecodeGraphs:
    graphs = runner.make_graphs(None if ON_GPU else CalledEachTime)
    graphs.capture()
    return graphs


def decode_step(
    lengths: list[int], step: int, adapter_indices: list[int] | None = None
) -> tuple[StepFields[list], torch.Tensor]:
    """A step in which sequence i computes its token number lengths[i] + step, in blocks of its own."""
    positions = [length + step for length in lengths]
    tables = torch.arange(1, 1 + 8 * len(lengths), dtype=torch.int32).view(-1, 8)
    made = StepFields(
        token_ids=[3 + (7 * i + step) % 100 for i in range(len(lengths))],
        positions=positions,
        slot_mapping=[int(tables[i, at // SIZE]) * SIZE + at % SIZE for i, at in enumerate(positions)],
        adapter_indices=adapter_indices or [0] * len(lengths),
        state_rows=list(range(1, 1 + len(lengths))),
        seq_lens=[at + 1 for at in positions],
        query_lens=[1] * len(lengths),
    )
    return made, tables


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_its_twins_logits(tmp_path, triton_ops, name):
    if ON_GPU and "experts" in str(MODELS[name]):
        pytest.skip("in bfloat16 another expert may be chosen where two are nearly alike")
    save_family(tmp_path, name, torch.float32)
    prompts = [list(range(3, 17)), [5, 6, 7]]
    found = logits(load(tmp_path, triton_ops), prompts, chunk=8)
    for one, expected in zip(found, logits(load(tmp_path, ops), prompts, chunk=8), strict=True):
        torch.testing.assert_close(one.cpu().float(), expected.cpu().float(), rtol=TOLERANCE, atol=10 * TOLERANCE)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"] if ON_GPU else ["none"])
def test_every_bucket_gives_the_twins_logits_while_lengths_change(tmp_path, triton_ops, quantization):
    """A stale parameter baked into a graph would show as soon as a length, a block or a row count changes."""
    save_model(tmp_path, torch.float32, **SHAPE)
    runner = make_runner(load(tmp_path, triton_ops, quantization), max_running=9 if ON_GPU else 5)
    twin = make_runner(load(tmp_path, ops, quantization), max_running=9 if ON_GPU else 5)
    graphs = make_graphs(runner)
    lengths = [5, 70, 16, 31, 100, 1, 47, 15, 64]
    for step, num_rows in enumerate([9, 1, 2, 3, 5, 8, 9] if ON_GPU else [5, 1, 2, 3, 4, 5]):
        made, tables = decode_step(lengths[:num_rows], step)
        rows = [SamplingState(request(), 0, eos_ids=[2])] * num_rows
        with torch.inference_mode():
            found = graphs.launch(made, tables.numpy(), rows)
            hidden = twin._run_network(made, tables.numpy())
            torch.testing.assert_close(found.float(), twin.model.logits(hidden).float(), rtol=0, atol=TOLERANCE)
            assert graphs.sample(num_rows).tolist() == found.argmax(-1).tolist()


def test_graphs_with_and_without_adapters_share_what_samples(tmp_path, triton_ops):
    """Steps with adapters, other mixtures of them, and none, one after the other in the same buffers."""
    base = save_model(tmp_path / "base", torch.float32, **SHAPE)
    adapters = write_adapters(base, tmp_path)
    runner = make_runner(with_adapters(load(tmp_path / "base", triton_ops), adapters), max_running=4)
    twin = make_runner(with_adapters(load(tmp_path / "base", ops), adapters), max_running=4)
    graphs = make_graphs(runner)
    lengths = [5, 33, 16, 1]
    for step, indices in enumerate([[1, 1, 1], [0] * 4, [0, 1, 2, 2], [0], [2]]):
        made, tables = decode_step(lengths[: len(indices)], step, indices)
        rows = [SamplingState(request(), 0, eos_ids=[2])] * len(indices)
        with torch.inference_mode():
            found = graphs.launch(made, tables.numpy(), rows)
            hidden = twin._run_network(made, tables.numpy())
            torch.testing.assert_close(found.float(), twin.model.logits(hidden).float(), rtol=0, atol=TOLERANCE)
            assert graphs.sample(len(indices)).tolist() == found.argmax(-1).tolist()


def write_adapters(base, folder) -> dict[str, AdapterFolder]:
    return {
        name: open_adapter(write_adapter(base, folder / name, seed=seed, **ADAPTERS[name]))
        for seed, name in enumerate(("alpaca-lora", "dora"))
    }


def test_the_engine_with_adapters_gives_what_pefts_model_gives(tmp_path, triton_ops):
    base = save_model(tmp_path / "base", torch.float32, **SHAPE)
    adapters = write_adapters(base, tmp_path)
    oracle = Oracle(base.to(DEVICE), {name: adapter.path for name, adapter in adapters.items()})
    runner = make_runner(with_adapters(load(tmp_path / "base", triton_ops), adapters), max_running=2)
    runner.graphs = make_graphs(runner)
    engine = engine_of(runner, launches_ahead=True)
    asked = [
        request(prompt_ids=tuple(3 + (i * 5 + j) % 110 for j in range(1 + 3 * i)), max_new_tokens=3, seed=i,
                reads_along=False, adapter=name)
        for i, name in enumerate(("dora", None, "alpaca-lora", "dora"))
    ]  # fmt: skip
    generations = [engine.submit(one) for one in asked]
    found = [tokens(generation) for generation in generations]
    engine.close()
    if ON_GPU:  # bfloat16: one tie decided otherwise changes the rest
        assert [len(rows[0]) for rows in found] == [3] * 4
    else:
        assert found == [naive(oracle.using(one.adapter), one, rows) for one, rows in zip(asked, found, strict=True)]


def test_the_engine_gives_what_naive_decoding_gives(tmp_path, triton_ops):
    reference = save_model(tmp_path, torch.float32, **SHAPE).to(DEVICE)
    runner = make_runner(load(tmp_path, triton_ops), max_running=3)
    if torch.float32 != DTYPE:
        reference = reference.to(DTYPE)
    if ON_GPU:  # the interpreter builds nothing, and runs these long steps for a minute
        runner.compile_prefill()
    runner.graphs = make_graphs(runner)
    engine = engine_of(runner, launches_ahead=True)
    asked = [
        request(prompt_ids=tuple(3 + (i * 5 + j) % 110 for j in range(2 + 7 * i)), max_new_tokens=4, seed=i,
                temperature=0.9 * (i % 2), top_k=5 * (i == 3), repetition_penalty=1.0 + (i == 2), reads_along=False)
        for i in range(4)
    ]  # fmt: skip
    generations = [engine.submit(one) for one in asked]
    found = [tokens(generation) for generation in generations]
    engine.close()
    if ON_GPU:  # bfloat16: one tie decided otherwise changes the rest
        assert [len(rows[0]) for rows in found] == [4] * 4
    else:
        assert found == naive_of_all(reference, asked, found)
