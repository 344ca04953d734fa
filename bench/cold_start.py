"""From the start of a process to its first token, with the weights in the page cache.

    python -m bench.cold_start --weights DIR     (without it: bench.serve's random model)

server:    script/serve, a health report of READY, and a streamed request's first output at the client.
engine:    the engine alone in a fresh Python: import, load, one token.
baseline:  a fresh Python that imports torch and transformers, calls from_pretrained and generates one token.

The three take turns, --rounds times, after one round that is not counted (unless --warm); medians are reported.
Seconds run from the spawn. Phases are what the line "ready: name 1.2 s, …" says, which the server logs and the
children print. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from alpaca.errors import InputError, run_command
from alpaca.serving.settings import ServerSettings
from bench.load import predict
from bench.machine import DEVICE, describe_device
from bench.provenance import ROOT, provenance
from bench.random_model import SHAPES, model_folder
from bench.serve_report import median
from bench.targets import Target, rounded
from deploy.local_server import LocalServer, stop_children_on_sigterm

_READY_LINE = re.compile(r"ready: (.*)")
_PHASE = re.compile(r"([a-z][a-z ]*) (\d+\.\d+) s\b")
_TIMEOUT_S = 300
WAYS = ("server", "engine", "baseline")

BASELINE = """
import sys, time
start = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
imported = time.perf_counter()
folder, device, dtype = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map={"": device})
loaded = time.perf_counter()
prompt = torch.tensor([[1, 1]], device=device)
token = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)[0, -1].item()
done = time.perf_counter()
print(f"ready: imports {imported - start:.3f} s, weights {loaded - imported:.3f} s, token {done - loaded:.3f} s")
print("first token", token, flush=True)
"""

ENGINE = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from alpaca.serving.housekeeping import Phases
from alpaca.serving.request import PredictionInputs, make_request
from alpaca.serving.settings import ServerSettings
from alpaca.serving.loading import load_engine
imported = time.perf_counter()
folder, _, dtype, engine = sys.argv[1:5]
phases = Phases()
engine = load_engine(Path(folder), ServerSettings(weights=folder, dtype=dtype, engine=engine), phases)
loaded = time.perf_counter()
asked = PredictionInputs(prompt="Hello", prompt_template="{prompt}", max_new_tokens=1, min_new_tokens=1, temperature=0)
events = engine.submit(make_request(asked, engine.tokenizer, max_context=engine.max_context)).events()
token = next(events).token_id
done = time.perf_counter()
print(f"ready: imports {imported - start:.3f} s, {phases}, token {done - loaded:.3f} s")
print("first token", token, flush=True)
list(events)
engine.close()
"""


@dataclass(kw_only=True)
class Start:
    """Seconds since the spawn, and what the phases are said to have taken."""

    first_token_s: float
    ready_s: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


def main() -> None:
    options = parse_flags()
    origin = {**provenance("cold_start", ("torch", "transformers")), "device": describe_device()}
    stop_children_on_sigterm()
    starts: dict[str, list[Start]] = {name: [] for name in WAYS}
    failures: dict[str, str] = {}
    with model_folder(options.weights, options.shape, options.dtype) as folder:
        try:
            measure(options, folder, starts, failures)
        finally:  # whoever is told to end tells what there is
            report(options, starts, failures, origin)


def parse_flags() -> argparse.Namespace:
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a model folder; left out: a random LLaMA")
    parser.add_argument("--shape", choices=SHAPES, default="46m", help="of the random model")
    parser.add_argument("--engine", default="auto", help="the server's ALPACA_ENGINE")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=dtype)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="all is in the page cache already: count the first round")
    options = parser.parse_args()
    ServerSettings(engine=options.engine)  # raises InputError for another name
    if options.rounds < 1:
        raise InputError(f"--rounds must be 1 or more; found {options.rounds}")
    return options


def measure(
    options: argparse.Namespace, folder: Path, starts: dict[str, list[Start]], failures: dict[str, str]
) -> None:
    """Fill in the starts of each way, and why a way has none (any more)."""
    arguments = [str(folder.absolute()), DEVICE, options.dtype, options.engine]
    ways: dict[str, Callable[[], Start]] = {
        "server": lambda: start_server(folder, options.engine, options.dtype),
        "engine": lambda: start_script(ENGINE, arguments),
        "baseline": lambda: start_script(BASELINE, arguments),
    }
    assert tuple(ways) == WAYS
    for number in range(1 if options.warm else 0, options.rounds + 1):
        for name in [name for name in ways if name not in failures]:
            try:
                start = ways[name]()
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"[-2000:]
                continue
            print(f"round {number}  {name:9}{start.first_token_s:7.2f} s  {start.phases}", file=sys.stderr, flush=True)
            if number:  # the first one warms the page cache and Python's
                starts[name].append(start)


# The ways -------------------------------------------------------------------------------------------------------


def start_server(folder: Path, engine: str, dtype: str, *, env: dict[str, str] | None = None) -> Start:
    """Spawn to READY (asked for every 50 ms), then to the first output of a stream. `env`: None for this process's."""
    inputs = {"prompt": "Hello", "prompt_template": "{prompt}", "temperature": 0}
    inputs |= {"max_new_tokens": 8, "min_new_tokens": 8}
    begin = time.monotonic()
    server = LocalServer(["--weights", str(folder.absolute()), "--engine", engine, "--dtype", dtype], env=env)
    try:
        server.wait_until("READY", timeout_s=_TIMEOUT_S)
        ready_s = time.monotonic() - begin
        asked = predict(server.url, inputs, stream=True, start=begin)
        reply = asyncio.run(asyncio.wait_for(asked, _TIMEOUT_S))
    except asyncio.TimeoutError:
        raise RuntimeError(f"the server sent no whole answer within {_TIMEOUT_S} s") from None
    finally:
        server.stop()
    if reply.first_output_s is None:
        raise RuntimeError("the stream held no output event")
    first_token_s = reply.started_s + reply.first_output_s
    return Start(ready_s=ready_s, first_token_s=first_token_s, phases=read_phases(server.log_text()))


def start_script(source: str, arguments: list[str], *, env: dict[str, str] | None = None) -> Start:
    """Spawn a Python until it says that it has its first token. `env`: its variables; None for this process's."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    limit = threading.Timer(_TIMEOUT_S, process.kill)
    limit.daemon = True  # it keeps nobody who is told to end
    limit.start()
    lines, first_token_s = [], None
    with process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("first token"):
                first_token_s = time.monotonic() - begin
    limit.cancel()
    if first_token_s is None or process.returncode:
        taken = time.monotonic() - begin
        raise RuntimeError(f"it ended with status {process.returncode} after {taken:.0f} s: {''.join(lines)[-1500:]}")
    return Start(first_token_s=first_token_s, phases=read_phases("".join(lines)))


def read_phases(log: str) -> dict[str, float]:
    """Name and seconds of each phase in the line "ready: …", whatever a logger put in front."""
    found = [match[1] for line in log.splitlines() if (match := _READY_LINE.search(line))]
    return {name.strip(): float(seconds) for text in found for name, seconds in _PHASE.findall(text)}


# The report -----------------------------------------------------------------------------------------------------


def report(
    options: argparse.Namespace, starts: dict[str, list[Start]], failures: dict[str, str], origin: dict[str, object]
) -> None:
    figures: dict[str, object] = {name: way_figures(values) for name, values in starts.items() if values}
    for name, values in starts.items():
        if values:
            text = "  ".join(f"{key} {value}" for key, value in figures[name].items() if key != "rounds_s")
            print(f"{name:9} {text}")
        else:
            print(f"{name:9} {failures.get(name, 'not measured').splitlines()[0]}")
    first = {name: median([start.first_token_s for start in values]) for name, values in starts.items()}
    ratio = first["server"] / first["baseline"] if first["server"] and first["baseline"] else None
    most = 20.0 if DEVICE == "cuda" else None
    target = Target(label="server: start to first token, s", value=first["server"], most=most)
    print(target.line())
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    everything = {"bench": "cold_start", "config": config, **figures, "server_over_baseline": rounded(ratio)}
    everything["targets"] = [target.as_json()]
    print(json.dumps({**everything, "failures": failures, **origin}))


def way_figures(starts: list[Start]) -> dict[str, object]:
    ready = [start.ready_s for start in starts if start.ready_s is not None]
    names = dict.fromkeys(name for start in starts for name in start.phases)
    phases = {
        name: rounded(statistics.median(start.phases[name] for start in starts if name in start.phases))
        for name in names
    }
    return {
        "first_token_s": rounded(median([start.first_token_s for start in starts])),
        "ready_s": rounded(median(ready)),
        "phases_s": phases,
        "rounds_s": [rounded(start.first_token_s) for start in starts],
    }


if __name__ == "__main__":
    run_command(main)
