"""`check`: does it run on this card, and is it right? Tests, the real model's text, kernels, decoding, a LoRA step."""

import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.engine import Engine, complete_texts
from alpaca.serving.loading import load_engine
from alpaca.serving.request import PredictionInputs, make_request
from alpaca.serving.settings import ServerSettings
from bench.gpu.builds import BuildLog
from bench.gpu.child import Report
from bench.gpu.fine_tuning import train_row
from bench.gpu.model import hollow_folder, open_engine
from bench.gpu.samples import Sampler
from bench.gpu.scale import choose_scale, is_quick
from bench.machine import DEVICE
from bench.provenance import ROOT
from bench.rows import Row
from bench.ways import EngineWay

_REAL_VARIABLE = "ALPACA_REAL"
_BFLOAT16_TOKENS = 64
_KERNEL_TESTS = ("tests/serving/kernels/test_triton_ops.py", "tests/serving/kernels/test_triton_linear.py")
_MOST_NAMES = 20
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")


# Tests


def run_tests(report: Report) -> None:
    """The GPU tests, several pytests side by side: most of their time goes into Triton's compiler, one thread each."""
    shards = _quick_shards() if is_quick() else _shards()
    results: dict[str, dict[str, object]] = {}

    def run(name: str, arguments: Sequence[str]) -> None:
        counts = run_pytest(arguments)
        report.row(f"tests {name}", **counts)
        results[name] = counts
        report.row("tests", **add_up(results), shards_done=len(results), shards=len(shards))

    threads = [threading.Thread(target=run, args=shard) for shard in shards.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def add_up(results: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The counts of all shards; a failure where a test failed."""
    total = {kind: sum(one[kind] for one in results.values()) for kind in ("passed", "failed", "skipped")}
    names = [name for one in results.values() for name in one["failed_tests"]]
    return {**total, "failure": f"{total['failed']} failed: {', '.join(names)}"} if total["failed"] else total


def _shards() -> dict[str, list[str]]:
    """Of the kernels' own files all tests run on a GPU; of the others those marked gpu, file by file.

    Collecting all of them at once needs packages that may be missing.
    """
    ops, products = _KERNEL_TESTS
    shards = {
        "attention": [ops, "-k", "attention"],
        "other operations": [ops, "-k", "not attention"],
        "products, marked gpu": [products, "-m", "gpu"],
        "products": [products, "-m", "not gpu"],
    }
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(path.relative_to(ROOT))
        if name not in _KERNEL_TESTS and "bench" not in path.parts and "mark.gpu" in path.read_text(encoding="utf-8"):
            shards[path.stem] = [name, "-m", "gpu"]
    return shards


def _quick_shards() -> dict[str, list[str]]:
    return {"a file": ["tests/serving/test_settings.py"]}


def run_pytest(arguments: Sequence[str]) -> dict[str, object]:
    """Counts of one pytest, and the names of tests that failed; what it says goes to the log.

    Other plugins than the project's stay out: their warnings are errors here.
    """
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, file=sys.stderr, flush=True)
    counts = read_counts(done.stdout)
    if done.returncode not in (0, 5) and not counts["failed"]:  # 5: no test was selected
        counts["failed"] = 1  # it could not even collect them
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)[:_MOST_NAMES]
    return {**counts, "failed_tests": failed, "seconds": round(time.monotonic() - start, 1)}


def read_counts(output: str) -> dict[str, int]:
    """Passed, failed and skipped tests by pytest's last line; errors count as failed."""
    lines = [line for line in output.splitlines() if _COUNT.search(line)]
    found = {kind: int(number) for number, kind in _COUNT.findall(lines[-1])} if lines else {}
    failed = found.get("failed", 0) + found.get("error", 0) + found.get("errors", 0)
    return {"passed": found.get("passed", 0), "failed": failed, "skipped": found.get("skipped", 0)}


# The real model


def read_real_model(report: Report) -> None:
    """Whether the published text comes out, in float32 whole, in bfloat16 its first tokens."""
    names = ("real 260K float32", "real 260K bfloat16")
    if not os.environ.get(_REAL_VARIABLE):
        for name in names:
            report.row(name, left_out=f"not run: {_REAL_VARIABLE} is not set")
        return
    real = Path(os.environ[_REAL_VARIABLE]).resolve()
    with tempfile.TemporaryDirectory() as out:
        from convert.convert_llama_weights_to_hf import convert, parse_arguments

        inputs = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K"]
        folder = convert(parse_arguments([*inputs, "--output_dir", out]))
        expected = (real / "stories260k-greedy.txt").read_text(encoding="utf-8").rstrip("\n")
        report.attempt(names[0], lambda: _whole_text(folder, expected))
        report.attempt(names[1], lambda: _first_tokens(folder, expected))


def _whole_text(folder: Path, expected: str) -> dict[str, object]:
    text = _greedy_text(folder, "float32", num_tokens=256)
    return _compared(text, expected)


def _first_tokens(folder: Path, expected: str) -> dict[str, object]:
    """The text of the first tokens; a tie decided otherwise by bfloat16 ends what is alike, which the row says."""
    text = _greedy_text(folder, "bfloat16", num_tokens=_BFLOAT16_TOKENS)
    return {"num_tokens": _BFLOAT16_TOKENS, **_compared(text, expected[: len(text)])}


def _compared(text: str, expected: str) -> dict[str, object]:
    pairs = enumerate(zip(text, expected, strict=False))
    alike = next((at for at, (a, b) in pairs if a != b), min(len(text), len(expected)))
    return {"is_right": text == expected, "characters_alike": alike, "characters": len(expected)}


def _greedy_text(folder: Path, dtype: str, *, num_tokens: int) -> str:
    settings = ServerSettings(weights=str(folder), engine="llama", dtype=dtype, concurrency=2, memory_fraction=0.1)
    engine = load_engine(folder, settings)
    try:
        return greedy_text(engine, num_tokens=num_tokens)
    finally:
        engine.close()


def greedy_text(engine: Engine, *, num_tokens: int) -> str:
    """What follows an empty prompt (BOS alone)."""
    asked = PredictionInputs(prompt="", prompt_template="{prompt}", max_new_tokens=num_tokens, temperature=0)
    request = make_request(asked, engine.tokenizer, max_context=engine.max_context)
    generation = engine.submit(request)
    return next(complete_texts(generation, [CompletionText(engine.tokenizer, request.prompt_ids)]))


# Kernels


def build_engine_kernels(report: Report, quantization: str) -> None:
    """Every kernel that serving needs with this quantization: a model of one layer has those of all 32."""
    scale, name = choose_scale(), f"kernels {quantization}"
    if DEVICE != "cuda":
        report.row(name, left_out="not run: Triton builds kernels for a GPU alone, and there is none")
        return
    from alpaca.serving.kernels import triton_linear, triton_ops

    log = BuildLog()
    with report.guarded(name), hollow_folder(scale.one_layer, scale.dtype) as folder:
        engine, phases = open_engine(
            folder, dtype=scale.dtype, quantization=quantization, concurrency=16, memory_fraction=0.1
        )
        engine.close()
        tell_builds(report, name, log, [triton_ops, triton_linear], phases=phases)


def tell_builds(report: Report, name: str, log: BuildLog, modules: list[object], **more: Mapping[str, object]) -> None:
    """A row for each kernel, and one for all of them."""
    rows = list(log.rows(modules))
    for kernel_name, row in rows:
        report.row(kernel_name, of=name, **row)
    built = [row["build_s"] for _, row in rows if not row["from_cache"]]
    spilling = [kernel_name for kernel_name, row in rows if row["spills"]]
    report.row(
        name, num_kernels=len(rows), num_built=len(built), build_s=round(sum(built), 2), spilling=spilling, **more
    )


def build_other_kernels(report: Report) -> None:
    """Those of adapters and of the optimizer, at 7B's shapes."""
    name = "kernels adapters and optimizer"
    if DEVICE != "cuda":
        report.row(name, left_out="not run: Triton builds kernels for a GPU alone, and there is none")
        return
    from alpaca.serving.kernels import triton_low_rank
    from alpaca.training.model.optimizers import triton_adamw

    log = BuildLog()
    with report.guarded(name):
        for num_rows in (1, 128):
            _run_adapter(num_rows)
        _run_optimizer()
        torch.cuda.synchronize()
        tell_builds(report, name, log, [triton_low_rank, triton_adamw])


def _run_adapter(num_rows: int, *, width: int = 4096, rank: int = 8) -> None:
    from alpaca.serving.kernels.low_rank import AdapterRows, LowRankStack
    from alpaca.serving.kernels.triton_low_rank import add_low_rank

    made = {"dtype": torch.bfloat16, "device": DEVICE}
    a, b = torch.zeros(1, 3 * rank, width, **made), torch.zeros(1, 3 * width, rank, **made)
    stack = LowRankStack(a, b, [(part * width, width) for part in range(3)])
    slots = torch.ones(num_rows, dtype=torch.int32, device=DEVICE)
    add_low_rank(
        torch.zeros(num_rows, 3 * width, **made), torch.zeros(num_rows, width, **made), stack, AdapterRows(slots)
    )


def _run_optimizer() -> None:
    from alpaca.training.model.optimizers.by_chance import StochasticAdamW

    parameter = torch.nn.Parameter(torch.zeros(4096, 4096, dtype=torch.bfloat16, device=DEVICE))
    parameter.grad = torch.zeros_like(parameter)
    StochasticAdamW([parameter]).step()


# Decoding and training


def decode(report: Report) -> None:
    """Decoding on random weights, alone and 32 together, for some seconds each."""
    scale = choose_scale()
    with report.guarded("decode"), hollow_folder(scale.shape, scale.dtype) as folder:
        engine, phases = open_engine(folder, dtype=scale.dtype, concurrency=8, memory_fraction=0.6)
        report.row("engine start", phases_s=phases)
        sampler = Sampler(report, folder, EngineWay(engine), dtype=scale.dtype)
        for count, name in ((1, "decode 1"), (scale.many, "decode 32")):
            with report.guarded(name):
                _decode_for(sampler, name, count=count, seconds=scale.decode_s)
        engine.close()


def _decode_for(sampler: Sampler, name: str, *, count: int, seconds: float) -> None:
    """As many tokens as take `seconds`, by a short run before; a request's context is the most."""
    scale = choose_scale()
    short = Row(
        name=name, way="engine", num_requests=count, clients=count, prompt_tokens=(scale.prompt,) * 2,
        new_tokens=(scale.new,) * 2,
    )  # fmt: skip
    rate = sampler.take(short, rounds=1) / count
    most = scale.context - scale.prompt - 8
    new = max(scale.new, min(most, math.floor(rate * seconds)))
    sampler.take(sampler.with_new_tokens(short, new), rounds=1)


def take_lora_step(report: Report) -> None:
    """Two optimizer steps of LoRA; the second is told."""
    train_row(report, "lora", name="lora step", steps=2)


JOBS = {
    "tests": run_tests,
    "real": read_real_model,
    "kernels-none": lambda report: build_engine_kernels(report, "none"),
    "kernels-int8": lambda report: build_engine_kernels(report, "int8"),
    "kernels-nf4": lambda report: build_engine_kernels(report, "nf4"),
    "kernels-other": build_other_kernels,
    "decode": decode,
    "lora": take_lora_step,
}
