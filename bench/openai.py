"""What OpenAI's API costs in front of a server, in one run on the same weights: rate lost, and time to the first token.

    python -m bench.openai                 a random LLaMA of 46 M parameters; under a minute on a CPU
    python -m bench.openai --shape 7b --dtype bfloat16        on a GPU

predictions:  streams of /predictions, through the gate.
details:      the same with `details`, which the endpoint asks for.
openai:       the same completions streamed by `script/serve --openai_port`.

Every way takes its turn in each of --rounds rounds, another first each time, on prompts that no other round has. Rates
are tokens of --clients streams over seconds, clients in a process of their own; ratios are medians of the rounds'. The
first token is of one client alone, --singles times a round. On a CPU the endpoint, the gate and the clients take their
time from the model's cores. The last line is one JSON object.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from alpaca.errors import run_command
from alpaca.files.atomic import write_json
from alpaca.serving.settings import DTYPES
from alpaca.text.loading import load_tokenizer
from alpaca.text.prompts import RAW_TEMPLATE
from bench.load import Load, Plan, run_apart
from bench.machine import DEVICE, describe_device
from bench.provenance import provenance
from bench.random_model import SHAPES, model_folder
from bench.rows import Prompts, Row
from deploy.local_server import LocalServer, running_server

PACKAGES = ("torch", "uvicorn", "prometheus_client")
WAYS = ("predictions", "details", "openai")
_CLIENTS_TIMEOUT_S = 120.0
_SHORT = 4  # tokens of an answer whose first is timed


def main() -> None:
    options = parse_flags()
    origin = {**provenance("openai", PACKAGES), "device": describe_device()}
    with model_folder(None, options.shape, options.dtype) as folder:
        prompts = Prompts(load_tokenizer(folder))
        flags = ["--weights", str(folder), "--dtype", options.dtype, "--openai_port", "0"]
        with running_server(flags, on_failure=print) as server:
            figures = measure(options, server, folder.name, prompts)
    result = {**origin, "settings": vars(options) | {"output": None}, "figures": figures}
    if options.output:
        write_json(options.output, result)
    print(json.dumps(result))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="46m")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--singles", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write the JSON object here, too")
    return parser.parse_args()


def measure(options: argparse.Namespace, server: LocalServer, model: str, prompts: Prompts) -> dict[str, Any]:
    """Medians of each way, and what the last two lose against the first."""
    addresses = {"predictions": server.url, "details": server.url, "openai": server.wait_for_openai()}
    many = _row(options.clients, options.clients, options.prompt_tokens, options.new_tokens)
    one = _row(1, options.singles, options.prompt_tokens, _SHORT)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    firsts: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):  # the first warms up
        for way in (*WAYS[number % len(WAYS) :], *WAYS[: number % len(WAYS)]):
            streams = _run(addresses[way], way, many, model, prompts, f"{way}{number}")
            singles = _run(addresses[way], way, one, model, prompts, f"{way}{number}")
            if number:
                rates[way].append(streams.num_tokens / streams.seconds)
                firsts[way].append(statistics.median(reply.first_output_s for reply in singles.replies))
    return {way: _figures(rates, firsts, way) for way in WAYS}


def _figures(rates: dict[str, list[float]], firsts: dict[str, list[float]], way: str) -> dict[str, float]:
    """share: of the rate of plain predictions.   added_ms: to their first token."""
    shares = [own / plain for own, plain in zip(rates[way], rates["predictions"], strict=True)]
    added = [own - plain for own, plain in zip(firsts[way], firsts["predictions"], strict=True)]
    return {
        "tokens_per_second": round(statistics.median(rates[way]), 1),
        "share": round(statistics.median(shares), 4),
        "first_token_ms": round(1000 * statistics.median(firsts[way]), 2),
        "added_ms": round(1000 * statistics.median(added), 2),
    }


def _row(clients: int, num_requests: int, prompt_tokens: int, new_tokens: int) -> Row:
    return Row(
        name=f"openai {clients}", way="stream", num_requests=num_requests, clients=clients,
        prompt_tokens=(prompt_tokens, prompt_tokens), new_tokens=(new_tokens, new_tokens),
    )  # fmt: skip


def _run(url: str, way: str, row: Row, model: str, prompts: Prompts, seed: str) -> Load:
    """One round of one way; the clients have a process of their own."""
    inputs = []
    for values in prompts.inputs(row, seed):
        if way == "openai":
            asked = {"model": model, "prompt": values.prompt, "max_tokens": row.new_tokens[1], "temperature": 0}
        else:
            asked = {"prompt": values.prompt, "prompt_template": RAW_TEMPLATE, "max_new_tokens": row.new_tokens[1]}
            asked |= {"temperature": 0, "details": way == "details"}
        inputs.append(asked)
    plan = Plan(inputs=inputs, clients=row.clients, api="openai" if way == "openai" else "cog")
    return run_apart(url, plan, timeout_s=_CLIENTS_TIMEOUT_S)


if __name__ == "__main__":
    run_command(main)
