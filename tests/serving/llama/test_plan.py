"""The plan's arithmetic is what tensors really take, and what it promises fits the card."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alpaca.architecture.description import ModelDescription
from alpaca.errors import InputError, MissingInput, NotEnoughSpace
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.serving.llama.cache import BlockPool
from alpaca.serving.llama.network import KeyValueCache
from alpaca.serving.llama.planning import (
    BLOCK_SIZE,
    PREFILL_TOKENS,
    MemoryPlan,
    max_running,
    plan_memory,
    weights_bytes,
    working_bytes,
)
from alpaca.serving.llama.scheduler import Scheduler, Sequence
from alpaca.serving.llama.weights import read_llama
from alpaca.serving.plan import describe_windows, main
from alpaca.serving.settings import ServerSettings
from tests.conftest import ROOT
from tests.processes import mistake_of
from tests.serving.llama.families import COVERING
from tests.serving.llama.families import MODELS as FAMILIES_MODELS
from tests.serving.llama.families import save as save_family
from tests.serving.llama.test_llama import CPU, KINDS, LLAMA3_ROPE, SMALL, load, save_model

BF16 = torch.bfloat16
FAMILIES = [
    pytest.param(name, marks=() if name in COVERING or name == "qwen2" else pytest.mark.slow)
    for name in FAMILIES_MODELS
]
# As their publishers' config.json have them.
SHAPES = {
    "7b": dict(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008,
        max_position_embeddings=2048,
    ),
    "13b": dict(
        vocab_size=32000, hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824,
        max_position_embeddings=2048,
    ),
    "8b": dict(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, max_position_embeddings=131072, rope_parameters=LLAMA3_ROPE,
    ),
}  # fmt: skip
NUM_WEIGHTS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "8b": 8_030_261_248}


def write_config(folder: Path, **values) -> ModelDescription:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    return read_llama(folder)


@pytest.fixture
def small(tmp_path) -> ModelDescription:
    return write_config(tmp_path / "small", **SMALL)


def plan(config: ModelDescription, free_bytes: int, *, device: str = "cuda", dtype=BF16, **settings) -> MemoryPlan:
    return plan_memory(config, ServerSettings(**settings), free_bytes=free_bytes, device=device, dtype=dtype)


# Bytes that are really taken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].get("tie_word_embeddings")])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_plain_weights_take_what_is_planned(tmp_path, kind, dtype):
    save_model(tmp_path, torch.float32, **KINDS[kind])
    assert weights_bytes(read_llama(tmp_path), dtype, "none") == load(tmp_path, dtype).num_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_weights_and_cache_take_what_is_planned(tmp_path, name):
    save_family(tmp_path, name, torch.float32)
    config = read_llama(tmp_path)
    model = load(tmp_path, torch.float16)  # not packed on a CPU: as on a GPU, a tied head is the embedding itself
    assert weights_bytes(config, torch.float16, "none") == model.num_bytes
    planned = plan(config, 10**9, dtype=torch.float16, concurrency=2)
    cache = KeyValueCache(config, num_blocks=planned.num_blocks, block_size=BLOCK_SIZE, dtype=torch.float16, device=CPU)
    assert planned.kv_bytes == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))


def test_quantized_experts_take_what_is_planned(tmp_path):
    sizes = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=8, moe_intermediate_size=256)
    save_family(tmp_path, "qwen3_moe", torch.float32, **sizes)
    for quantization in ("int8", "nf4"):
        planned = weights_bytes(read_llama(tmp_path), BF16, quantization)
        assert planned == pytest.approx(load(tmp_path, BF16, quantization).num_bytes, rel=0.01)


def test_tied_embeddings_are_counted_once(tmp_path):
    save_model(tmp_path, torch.float32, **KINDS["tied embeddings"])
    model = load(tmp_path, torch.float16)  # not packed on a CPU: as on a GPU, the head is the embedding itself
    assert model.head.weight.data_ptr() == model.embedding.data_ptr()
    assert weights_bytes(read_llama(tmp_path), torch.float16, "none") == model.num_bytes


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_take_what_is_planned(tmp_path, quantization):
    save_model(tmp_path, torch.float32, hidden_size=512, num_attention_heads=8, intermediate_size=1024)
    config = read_llama(tmp_path)
    model = load(tmp_path, BF16, quantization)
    assert weights_bytes(config, BF16, quantization) == pytest.approx(model.num_bytes, rel=0.01)
    assert model.num_bytes < weights_bytes(config, BF16, "none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_takes_what_is_planned(tmp_path, kind, dtype):
    config = write_config(tmp_path, **{**SMALL, **KINDS[kind]})
    planned = plan(config, 10**9, dtype=dtype, concurrency=2)
    cache = KeyValueCache(config, num_blocks=planned.num_blocks, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
    assert planned.kv_bytes == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes(tmp_path, name):
    config = write_config(tmp_path, **SHAPES[name])
    assert config.num_parameters == NUM_WEIGHTS[name]
    assert weights_bytes(config, BF16, "none") == 2 * NUM_WEIGHTS[name]
    mib_per_token = {"7b": 0.5, "13b": 0.78125, "8b": 0.125}  # 8B shares each key head among four queries
    assert config.kv_elements_per_token() * BF16.itemsize == mib_per_token[name] * 2**20


# Division -----------------------------------------------------------------------------------------------------------


def test_the_cache_gets_its_share_of_what_is_free(tmp_path):
    config = write_config(tmp_path, **SHAPES["7b"])
    for fraction in (0.9, 0.5):
        found = plan(config, 20 * 10**9, memory_fraction=fraction)
        room = fraction * 20 * 10**9 - found.working_bytes
        assert 0 <= room - found.kv_bytes < BLOCK_SIZE * found.kv_bytes_per_token  # not one block more would do
    on_cpu = plan(config, 80 * 10**9, device="cpu")
    assert on_cpu.kv_bytes <= 0.9 * 0.25 * 80 * 10**9


def test_a_gpu_holds_the_working_memory_twice(tmp_path):
    """Once in the graphs' own pool, once for steps with prompts."""
    config = write_config(tmp_path, **SHAPES["7b"])
    found = plan(config, 20 * 10**9)
    one_step = working_bytes(
        config, BF16, num_tokens=found.max_running + PREFILL_TOKENS["cuda"], num_sampled=found.max_running
    )
    assert found.working_bytes == 2 * one_step


def test_a_wide_vocabulary_fits_a_cpu_with_room(tmp_path):
    """A step of it takes more than the least share of the cache: the one is not taken from the other."""
    config = write_config(
        tmp_path, **{**SHAPES["7b"], "vocab_size": 128256, "hidden_size": 2048, "max_position_embeddings": 2048}
    )
    assert plan(config, 200 * 10**9, device="cpu", dtype=torch.float32).max_context == 2048


def test_no_more_blocks_than_can_ever_be_held(small):
    found = plan(small, 10**12, concurrency=3)
    assert found.max_running == max_running(ServerSettings(concurrency=3)) == 15
    assert found.num_blocks == 1 + 15 * 256 // BLOCK_SIZE
    assert found.cached_tokens == 15 * 256
    assert found.num_requests(256) == 15
    assert found.num_requests(1) == 15  # not more than run in one step
    assert max_running(ServerSettings(concurrency=1000)) == 256


WINDOWED = {
    **SMALL,
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "sliding_window": 32,
    "max_position_embeddings": 4096,
}


def test_windows_let_more_and_longer_requests_run(tmp_path):
    """As many as the plan says run at once in the engine's own scheduler, and none gives its blocks back."""
    config = write_config(tmp_path / "windowed", **WINDOWED)
    full = write_config(tmp_path / "full", **{**WINDOWED, "sliding_window": None})
    free_bytes = 3_500_000
    found, plain = (plan(one, free_bytes, device="cpu", dtype=torch.float32, concurrency=8) for one in (config, full))
    assert found.num_blocks == plain.num_blocks
    assert plain.max_context == plain.cached_tokens < 3000
    assert found.max_context == 4096
    num_requests = found.num_requests(3000)
    assert 3 < num_requests < found.max_running
    assert plain.num_requests(3000) == 0
    scheduler = Scheduler(
        BlockPool(found.num_blocks, BLOCK_SIZE), max_running=found.max_running, window=config.longest_window,
        max_step_tokens=found.max_running + PREFILL_TOKENS["cpu"],
    )  # fmt: skip
    assert scheduler.fits(found.max_context)
    for number in range(num_requests):
        scheduler.add(Sequence([number + 3] * 200, max_new_tokens=2800))
    most = 0
    while scheduler.running or scheduler.waiting:
        scheduled = scheduler.schedule()
        scheduler.record_launch(scheduled)
        most = max(most, len(scheduler.running))
        for item in scheduled:
            if item.samples_token:
                scheduler.append_token(item.sequence, 7)
                if item.sequence.num_generated == 2800:
                    scheduler.finish(item.sequence)
    assert most == num_requests
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "all layers see 32 tokens at most: blocks behind are freed while a request runs"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "2 of 3 layers see a window"),
        ({"sliding_window": None}, ""),
    ],
)
def test_the_plan_says_what_windows_free(tmp_path, changes, said):
    text = describe_windows(write_config(tmp_path / "model", **{**WINDOWED, **changes}))
    assert text.startswith(said)
    assert bool(text) == bool(said)


def test_context_is_the_smallest_of_model_setting_and_room(small):
    assert plan(small, 10**12).max_context == 256
    assert plan(small, 10**12, max_context=40).max_context == 40
    assert plan(small, 10**12, max_context=1000).max_context == 256
    working = plan(small, 10**12, concurrency=1, memory_fraction=1.0).working_bytes
    per_block = BLOCK_SIZE * small.kv_elements_per_token() * BF16.itemsize
    scarce = plan(small, working + 7 * per_block, concurrency=1, memory_fraction=1.0)
    assert (scarce.num_blocks, scarce.max_context) == (7, 6 * BLOCK_SIZE)


def test_requests_at_once_are_those_the_blocks_hold(small):
    found = plan(small, 10**12, concurrency=3)
    few = MemoryPlan(**{**found.__dict__, "num_blocks": 1 + 20})
    assert few.num_requests(16) == 15
    assert few.num_requests(17) == 10  # two blocks each
    assert few.num_requests(256) == 1
    assert few.num_requests(20 * 16 + 1) == 0


def test_too_little_memory_names_the_sizes(small):
    needed = plan(small, 10**12).working_bytes / 1e9
    with pytest.raises(
        NotEnoughSpace,
        match=rf"0\.00 GB are free after the weights, of which ALPACA_MEMORY_FRACTION \(0\.9\) may be used; "
        rf"a step takes {needed:.2f} GB and the key/value cache 0\.001 MB a token: no request fits\. "
        r"To make room set ALPACA_QUANTIZATION .*COG_MAX_CONCURRENCY.* machine with more memory",
    ):
        plan(small, 10**6)
    least = plan(small, 10**12).working_bytes + 5 * BLOCK_SIZE * small.kv_elements_per_token() * BF16.itemsize
    assert plan(small, least, memory_fraction=1.0).num_blocks == 5  # and one byte less is refused:
    with pytest.raises(NotEnoughSpace, match="no request fits"):
        plan(small, least - 1, memory_fraction=1.0)


def test_a_step_needs_more_with_more_tokens_and_rows(tmp_path):
    config = write_config(tmp_path, **SHAPES["7b"])
    assert working_bytes(config, BF16, num_tokens=2000, num_sampled=64) > working_bytes(
        config, BF16, num_tokens=1000, num_sampled=64
    )
    # Each row that is sampled has at least its logits in bfloat16 and in float32.
    more_rows = working_bytes(config, BF16, num_tokens=9, num_sampled=2) - working_bytes(
        config, BF16, num_tokens=9, num_sampled=1
    )
    assert more_rows >= 32000 * (2 + 4)


# The command --------------------------------------------------------------------------------------------------------


def run_main(monkeypatch, capsys, folder: Path, *flags: str) -> tuple[str, dict]:
    """What the command prints: its table and its last line, parsed."""
    monkeypatch.setattr(sys, "argv", ["plan", "--weights", str(folder), *flags])
    main()
    table, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return table, json.loads(last)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("name", SHAPES)
def test_cards_of_24_to_141_gb(tmp_path, monkeypatch, capsys, name, quantization):
    config = write_config(tmp_path, **SHAPES[name])
    weights = weights_bytes(config, BF16, quantization)
    before = 0
    for memory in (24, 40, 80, 141):
        flags = ("--memory", f"{memory}GB", "--quantization", quantization)
        if weights > memory * 10**9 - CUDA_CONTEXT_BYTES:
            assert (name, quantization, memory) == ("13b", "none", 24)
            with pytest.raises(NotEnoughSpace, match=r"take 26\.0 GB as bfloat16, none; 24GB is too small"):
                run_main(monkeypatch, capsys, tmp_path, *flags)
            continue
        _, found = run_main(monkeypatch, capsys, tmp_path, *flags)
        kv_bytes = found["num_blocks"] * BLOCK_SIZE * found["kv_bytes_per_token"]
        free = memory * 10**9 - weights - CUDA_CONTEXT_BYTES
        assert found["weights_bytes"] == weights
        assert found["working_bytes"] + kv_bytes <= 0.9 * free
        assert found["requests_at_once"]["2048"] == min(256, (found["num_blocks"] - 1) // (2048 // BLOCK_SIZE))
        assert found["num_blocks"] > before or before == 1 + 256 * config.max_context // BLOCK_SIZE
        before = found["num_blocks"]


def test_a_7b_on_80_gb(tmp_path, monkeypatch, capsys):
    """By hand: 80 - 13.48 of weights - 0.63 of CUDA is 65.89; 0.9 of it, less two steps of 0.45, is 58.4 GB."""
    write_config(tmp_path, **SHAPES["7b"])
    table, found = run_main(monkeypatch, capsys, tmp_path, "--memory", "80GB")
    assert found["memory_bytes"] == 80 * 10**9
    tokens = (found["num_blocks"] - 1) * BLOCK_SIZE
    assert tokens == pytest.approx((0.9 * 65.89e9 - found["working_bytes"]) / 2**19, rel=1e-3)
    assert 50 <= found["requests_at_once"]["2048"] == tokens // 2048 <= 56
    assert found["max_context"] == 2048
    assert f"{found['num_blocks']} blocks of 16 tokens, 0.524 MB a token" in table
    assert re.search(r"^weights +13\.48 GB$", table, re.MULTILINE)
    assert f"requests of   2048 tokens at once: {found['requests_at_once']['2048']}" in table


def test_flags_reach_the_plan(tmp_path, monkeypatch, capsys):
    write_config(tmp_path, **SHAPES["7b"])
    flags = ["--dtype", "float32", "--memory_fraction", "0.5", "--max_context", "512", "--concurrency", "4"]
    _, found = run_main(monkeypatch, capsys, tmp_path, "--memory", "80GB", *flags)
    assert found["weights_bytes"] == 4 * NUM_WEIGHTS["7b"]
    assert found["kv_bytes_per_token"] == 2**20
    assert (found["max_context"], found["max_running"]) == (512, 20)
    assert found["num_blocks"] == 1 + 20 * 512 // BLOCK_SIZE
    assert found["requests_at_once"] == {"256": 20, "512": 20}


def test_what_is_refused_fits_when_the_advice_is_taken(tmp_path, monkeypatch, capsys):
    write_config(tmp_path, **SHAPES["13b"])
    with pytest.raises(NotEnoughSpace, match=r"set ALPACA_QUANTIZATION to int8 or nf4"):
        run_main(monkeypatch, capsys, tmp_path, "--memory", "24GB")
    _, found = run_main(monkeypatch, capsys, tmp_path, "--memory", "24GB", "--quantization", "nf4")
    assert found["requests_at_once"]["2048"] >= 1
    with pytest.raises(NotEnoughSpace, match=r"GB are free after the weights, .* no request fits"):  # but the weights
        run_main(monkeypatch, capsys, tmp_path, "--memory", "27GB")


def test_advice_is_not_what_was_done_already(tmp_path, monkeypatch, capsys):
    write_config(tmp_path, **SHAPES["13b"])
    with pytest.raises(NotEnoughSpace, match=r"take 7\.8 GB as bfloat16, nf4; 6GB is too small") as refused:
        run_main(monkeypatch, capsys, tmp_path, "--memory", "6GB", "--quantization", "nf4")
    assert "quantiz" not in str(refused.value).lower().replace("quantization nf4", "")


def test_bad_input(tmp_path, monkeypatch, capsys):
    write_config(tmp_path, **SHAPES["7b"])
    with pytest.raises(InputError, match=r'expected a size such as "5GB" or "400MB", found \'much\''):
        run_main(monkeypatch, capsys, tmp_path, "--memory", "much")
    with pytest.raises(MissingInput, match=r"nothing/config\.json is missing"):
        run_main(monkeypatch, capsys, tmp_path / "nothing", "--memory", "80GB")
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(InputError, match="its model_type is 'opt', not llama"):
        run_main(monkeypatch, capsys, tmp_path / "opt", "--memory", "80GB")


@pytest.mark.slow
def test_the_command_itself(tmp_path, monkeypatch, capsys):
    write_config(tmp_path, **SHAPES["13b"])
    command = [sys.executable, "-m", "alpaca.serving.plan", "--weights", str(tmp_path), "--memory"]
    done = subprocess.run([*command, "80GB"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    *table, last = done.stdout.splitlines()
    assert json.loads(last)["weights_bytes"] == 2 * NUM_WEIGHTS["13b"]
    assert table[0].split() == ["weights", "26.03", "GB"]
    assert mistake_of([*command, "24GB"]).startswith("error: the weights take 26.0 GB")
    monkeypatch.setattr("sys.argv", [*command, "24GB"][2:])
    with pytest.raises(NotEnoughSpace, match=r"the weights take 26\.0 GB"):
        main()
    assert capsys.readouterr().out == ""
