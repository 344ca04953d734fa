"""Start the real Cog server on this machine: schema written, environment right, then the runtime behind its gate.

With --bare this process becomes `python -m cog.server.http` (exec), as in Cog's image.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from alpaca.errors import InputError, run_command
from alpaca.files.network.addresses import is_address, parse_address, split_list
from alpaca.serving.settings import ServerSettings, parse_adapters, setting_type
from deploy import schema
from deploy.gate.rules import Rules
from deploy.listening import port

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse host, port, mode, and a flag for each server setting; settings not given are taken from the environment."""
    parser = argparse.ArgumentParser(prog="script/serve", description="Serve the model over HTTP with Cog's runtime.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=port, default=5000, help="0 picks a free one and prints it (default: 5000)")
    parser.add_argument("--train", action="store_true", help="serve /trainings instead of /predictions")
    parser.add_argument(
        "--upload_url",
        help="http(s) address below which a training's archive is PUT, instead of returned in the answer",
    )
    parser.add_argument(
        "--openai_port", type=port, metavar="PORT", help="OpenAI's API beside the gate, on this port: docs/openai.md"
    )
    parser.add_argument("--bare", action="store_true", help="Cog's runtime alone, without the gate in front of it")
    parser.add_argument(
        "--allowed_hosts",
        help="names under which clients reach this server, separated by commas, beside localhost and addresses in "
        "numbers [ALPACA_ALLOWED_HOSTS]",
    )
    parser.add_argument(
        "--webhooks",
        help="addresses that webhooks may go to, separated by commas; https://host/folder/ stands for all below it "
        "[ALPACA_WEBHOOKS]",
    )
    for item in dataclasses.fields(ServerSettings):
        text = f"{item.metadata['help']} [{item.metadata['variable']}]"
        parser.add_argument(f"--{item.name}", type=setting_type(item), choices=item.metadata["choices"], help=text)
    return parser.parse_args(arguments)


def runtime_environment(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, str]:
    """The variables the runtime and the Predictor read. Raises InputError for a bad setting."""
    made = {"LOG_FORMAT": "console", "HF_HUB_OFFLINE": "1", **environment}
    made.setdefault("COG_MAX_CONCURRENCY", str(ServerSettings.concurrency))
    caller = Path(environment.get("ALPACA_CALLER", "."))
    options.weights, options.base_model = (_seen_from(caller, path) for path in (options.weights, options.base_model))
    if options.adapters:
        places = parse_adapters(options.adapters).items()
        options.adapters = ",".join(f"{name}={_seen_from(caller, place)}" for name, place in places)
    for item in dataclasses.fields(ServerSettings):
        if (value := getattr(options, item.name)) is not None:
            made[item.metadata["variable"]] = str(value)
    ServerSettings.from_environment(made)
    if options.upload_url:
        made["ALPACA_UPLOAD_URL"] = options.upload_url  # for train.py: the runtime keeps its own to itself
    made["PORT"] = str(options.port)
    made["COG_PREDICT_TYPE_STUB"] = schema.PREDICTOR
    made["COG_TRAIN_TYPE_STUB"] = schema.TRAINER
    # The runtime starts its worker as `python`, which must be this environment's.
    made["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), made.get("PATH", os.defpath)])
    return made


def _seen_from(caller: Path, path: str | None) -> str | None:
    """A flag's path as the runtime, which works in another folder, finds it; an address as it stands."""
    return path if not path or "://" in path else str((caller / path).absolute())


def runtime_command(options: argparse.Namespace) -> list[str]:
    """Cog's runtime, but for its address. Raises InputError for a wrong upload address, or one without trainings."""
    command = [sys.executable, "-m", "cog.server.http"]
    if options.train:
        command += ["--x-mode", "train"]
    if options.upload_url:
        if not options.train or not options.upload_url.startswith(("http://", "https://")):
            raise InputError(
                "--upload_url: expected an http or https address, and --train beside it, found "
                f"{'another scheme' if options.train else 'no --train'}; predictions return no files"
            )
        try:
            parse_address(options.upload_url)
        except InputError as error:
            raise InputError(f"--upload_url: {error}") from error
        command += ["--upload-url", options.upload_url]
    return command


def gate_rules(options: argparse.Namespace, environment: dict[str, str]) -> Rules:
    """What the gate lets in. Raises InputError for a webhook's address that is none.

    Keys are taken from ALPACA_API_KEYS alone: a command line is read by everybody on the machine.
    """
    webhooks = split_list(options.webhooks or environment.get("ALPACA_WEBHOOKS", ""))
    for address in webhooks:
        parse_address(address)
    return Rules(
        hosts=split_list(options.allowed_hosts or environment.get("ALPACA_ALLOWED_HOSTS", "")),
        keys=split_list(environment.get("ALPACA_API_KEYS", "")),
        webhooks=webhooks,
        serves_training=options.train,
    )


def endpoint_command(options: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """OpenAI's API for this server, but for its address; none where it is not asked for. Raises InputError.

    environment: the runtime's, from which the endpoint takes keys, adapters and concurrency. It sends the gate a key.
    """
    if options.openai_port is None:
        return []
    if options.bare or options.train:
        raise InputError("--openai_port goes with predictions through the gate: leave --bare and --train out")
    keys = split_list(environment.get("ALPACA_API_KEYS", ""))
    if keys:
        environment.setdefault("ALPACA_SERVER_TOKEN", keys[0])
    command = [sys.executable, "-m", "web.openai", "--host", options.host, "--port", str(options.openai_port)]
    command += ["--model_name", _model_name(environment.get("COG_WEIGHTS") or "alpaca_out")]
    if options.allowed_hosts:
        command += ["--allowed_hosts", options.allowed_hosts]
    return command


def _model_name(weights: str) -> str:
    """What clients of OpenAI's API call the model: the last part of its path. What is secret in an address is not."""
    return parse_address(weights).label if is_address(weights) else Path(weights).name


def main() -> None:
    options = parse_arguments()
    command = runtime_command(options)
    environment = runtime_environment(options, dict(os.environ))
    rules = gate_rules(options, environment)
    endpoint = endpoint_command(options, environment)
    os.chdir(ROOT)
    schema.write_schema()
    if options.bare:
        os.execve(sys.executable, [*command, "--host", options.host], environment)
    from deploy.gate.main import serve

    sys.exit(serve(command, environment, rules, host=options.host, port=options.port, companion=endpoint))


if __name__ == "__main__":
    run_command(main)
