"""Have a model write new instruction data, in the way the Alpaca data was made.

    python -m alpaca.data.generate_instruction generate_instruction_following_data \\
        --output_dir generated --num_instructions_to_generate 1000 --model_name MODEL

Prompts show a few seed tasks and ask for more; what comes back is parsed, filtered and compared with all there is. The
service is OpenAI-compatible (OPENAI_API_KEY, OPENAI_BASE_URL), or this project's own server (--endpoint). The same
command goes on where it was stopped or killed. OUTPUT_DIR/regen.json is what train.py takes as --data_path.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

from alpaca.data.example import Example
from alpaca.data.generation.journal import JOURNAL, REGEN, Journal
from alpaca.data.generation.prompts import NUM_TASKS, SEED_TASKS, STOP, encode_prompt, make_prompt, read_seed_tasks
from alpaca.data.generation.run import Ending, Generation, GenerationConfig, SignalReceived, list_counts, say
from alpaca.data.generation.services import (
    Client,
    CogClient,
    OpenAIClient,
    Sampling,
    count_tokens_roughly,
    plain_address,
)
from alpaca.errors import InputError, ServiceFailed, run_command
from alpaca.files.atomic import write_json
from alpaca.files.locks import locked

COMMAND = "generate_instruction_following_data"
_ASSUMED_SHARE = 0.5  # of the blocks that are accepted, for the estimate before the first request


def parse_flags(arguments: list[str]) -> GenerationConfig:
    """The flags, checked. Raises InputError."""
    parser = argparse.ArgumentParser(
        prog="python -m alpaca.data.generate_instruction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", nargs="?", choices=[COMMAND], default=COMMAND, help="as the original has it; may be left out")
    add("--output_dir", type=Path, default=Path(), help="gets the journal, regen.json and its provenance")
    add("--num_instructions_to_generate", type=int, default=100, help="records in regen.json at the end")
    add("--model_name", default="", help="the service's name of the model; for --endpoint only noted down")
    add("--seed_tasks_path", type=Path, default=SEED_TASKS, help="JSON lines in Self-Instruct's format")
    add("--num_prompt_instructions", type=int, default=3, help="seed tasks that a prompt shows")
    add("--request_batch_size", type=int, default=5, help="requests under way at a time")
    add("--temperature", type=float, default=1.0)
    add("--top_p", type=float, default=1.0)
    add("--num_cpus", type=int, help="not needed: the comparison with the pool takes no processes")
    add("--endpoint", help="http://HOST:PORT/predictions of this project's server, instead of an OpenAI-compatible one")
    add("--api", choices=["auto", "chat", "completions"], default="auto", help="auto: by the model's name")
    add("--max_tokens", type=int, default=3072, help="of a completion")
    add("--seed", type=int, default=42, help="which seed tasks each prompt shows")
    add("--max_requests", type=int, help="end after this many requests of this run, failed ones included")
    add("--max_tokens_total", type=int, help="end before the output folder has cost more tokens, over all runs")
    add("--price_in", type=float, help="per million tokens of prompts, for the cost shown")
    add("--price_out", type=float, help="per million tokens of completions")
    add("--timeout_s", type=float, default=600.0, help="for one request")
    add("--max_attempts", type=int, default=8, help="for one prompt, before the command gives up")
    add("--max_fruitless", type=int, default=30, help="give up when this many completions in a row bring nothing")
    add("--original_filters", action="store_true", help="accept empty outputs and merged tasks, as the original does")
    add("--dry_run", action="store_true", help="show the first prompt and an estimate of tokens and cost; ask nothing")
    values = vars(parser.parse_args(arguments))
    del values["command"]
    return _check(GenerationConfig(**values))


def _check(config: GenerationConfig) -> GenerationConfig:
    at_least = {
        "num_instructions_to_generate": 1, "request_batch_size": 1, "max_tokens": 64, "seed": 0, "max_requests": 1,
        "max_tokens_total": 1, "price_in": 0, "price_out": 0, "max_attempts": 1, "max_fruitless": 1,
        "temperature": 0, "timeout_s": 0.001, "top_p": 0.001,
    }  # fmt: skip
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name} {value}: expected {least} or more")
    if config.top_p > 1:
        raise InputError(f"--top_p {config.top_p}: expected a share from 0 to 1")
    if not config.model_name and not config.endpoint and not config.dry_run:
        raise InputError("--model_name is missing: the service's name of the model to ask")
    return config


def main() -> None:
    config = parse_flags(sys.argv[1:])
    tasks = read_seed_tasks(config.seed_tasks_path)
    make_prompt(tasks, number=0, num_prompt_instructions=config.num_prompt_instructions, seed=config.seed)  # checks
    if config.dry_run:
        print(describe_dry_run(config, tasks))
        return
    client = make_client(config, say=say)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(config.output_dir / JOURNAL), Journal(config.output_dir) as journal:
        _write_config(config, client)
        ending = Generation(config, tasks, client, journal).run()
        journal.write_data()
        say(describe_end(config, journal, ending))
    if isinstance(ending, ServiceFailed):
        raise ending
    if isinstance(ending, SignalReceived):
        sys.exit(128 + ending.number)


def make_client(config: GenerationConfig, *, say: Callable[[str], object]) -> Client:
    """The service that the flags and the environment name."""
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, stop=STOP, seed=config.seed)
    if config.endpoint:
        return CogClient(config.endpoint, sampling, model=config.model_name, timeout_s=config.timeout_s)
    return OpenAIClient(
        config.model_name, sampling, api=config.api, environment=os.environ, timeout_s=config.timeout_s, say=say
    )


def _write_config(config: GenerationConfig, client: Client) -> None:
    values = {**dataclasses.asdict(config), "endpoint": client.endpoint}
    paths = {name: str(value) for name, value in values.items() if isinstance(value, Path)}
    write_json(config.output_dir / "generation.json", {**values, **paths})


# What a person reads ---------------------------------------------------------------------------------------------


def describe_end(config: GenerationConfig, journal: Journal, ending: Ending) -> str:
    """The last words of a run: what there is, what it took, and how to go on."""
    state = journal.state
    lines = [
        f"{len(state.accepted):,} of {config.num_instructions_to_generate:,} tasks; "
        f"rejected: {list_counts(state.rejected)}",
        f"{len(state.answered):,} completions: {state.prompt_tokens:,} tokens of prompts and "
        f"{state.output_tokens:,} of completions{_cost(config, state.prompt_tokens, state.output_tokens)}",
    ]
    if state.accepted:
        lines.append(f"written: {config.output_dir / REGEN}")
    if ending is not None and not isinstance(ending, ServiceFailed):
        lines.append(f"ended early: {ending}; the same command goes on")
    return "\n".join(lines)


def _cost(config: GenerationConfig, prompt_tokens: int, output_tokens: int) -> str:
    """The price of some tokens in words; nothing where no price was given."""
    if config.price_in is None and config.price_out is None:
        return ""
    cost = (prompt_tokens * (config.price_in or 0) + output_tokens * (config.price_out or 0)) / 1e6
    return f", at the prices given {cost:,.2f}"


def describe_dry_run(config: GenerationConfig, tasks: list[Example]) -> str:
    """The first prompt, and what a run would come to."""
    shown = config.num_prompt_instructions
    prompt = make_prompt(tasks, number=0, num_prompt_instructions=shown, seed=config.seed)
    num_blocks = max(1, NUM_TASKS - 1 - shown)
    head = count_tokens_roughly(encode_prompt([]))
    per_task = (sum(count_tokens_roughly(encode_prompt([task])) for task in tasks) - head * len(tasks)) / len(tasks)
    num_requests = -(-config.num_instructions_to_generate // max(1, int(num_blocks * _ASSUMED_SHARE)))
    prompt_tokens = round(num_requests * (head + shown * per_task))
    output_tokens = round(num_requests * min(num_blocks * per_task, config.max_tokens))
    most = num_requests * config.max_tokens
    no_price = "; pass --price_in and --price_out (per million tokens) for the cost"
    return "\n".join([
        prompt,
        "-" * 40,
        f"service: {plain_address(config.endpoint) if config.endpoint else 'OpenAI-compatible'}; nothing was asked",
        f"estimate for {config.num_instructions_to_generate:,} tasks: {num_requests:,} requests, if half of the "
        f"{num_blocks} tasks that each is asked for are accepted",
        f"tokens, at 4 letters each: {prompt_tokens:,} of prompts and {output_tokens:,} of completions"
        f"{_cost(config, prompt_tokens, output_tokens) or no_price}",
        f"most that these requests can come to: {most:,} tokens of completions{_cost(config, prompt_tokens, most)}",
    ])  # fmt: skip


if __name__ == "__main__":
    run_command(main)
