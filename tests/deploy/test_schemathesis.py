"""schemathesis makes requests of our OpenAPI schema, valid and not, at the real server behind its gate.

It lives in an environment of its own, made once in `.bench/` from the pins of schemathesis.txt.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local_server import running_server
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PINS = ROOT / "tests" / "deploy" / "schemathesis.txt"
SECONDS = 60
CONTROL = {"prompt": "Name a bird.", "temperature": 0, "max_new_tokens": 12, "min_new_tokens": 12}
# What holds of every answer. Not asked for: that the schema lists each status (it has 200 alone, as Cog's own has), and
# that every valid request is taken (a prompt may be too long, an id is a folder's name).
CHECKS = "only_meant_answers,content_type_conformance,response_headers_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def program() -> Path:
    """The command of schemathesis."""
    folder = ROOT / ".bench" / "schemathesis"
    complete = folder / "complete"
    if not complete.exists() or complete.read_text() != PINS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", PINS]
        installed = subprocess.run(install, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"schemathesis cannot be installed here: {installed.stderr.splitlines()[-1:]}")
        complete.write_text(PINS.read_text())
    return folder / "bin" / "schemathesis"


def attack(program: Path, url: str, folder: Path, *excluded: str) -> int:
    """Let it try for a minute; how many requests it made. Fails where an answer is not as it must be."""
    command = [
        program, "run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", "200", "--max-time", str(SECONDS),
        "--seed", "1", "--request-timeout", "60", "--suppress-health-check", "all",
    ]  # fmt: skip
    for path in excluded:
        command += ["--exclude-path-regex", path]
    hooks = {"PYTHONPATH": str(Path(__file__).parent), "SCHEMATHESIS_HOOKS": "schemathesis_hooks"}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **hooks}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    generated = int(re.search(r"(\d+) generated", done.stdout)[1])
    print(f"\nschemathesis: {generated} requests")
    return generated


def test_predictions_of_all_shapes(program, llama_folder, tmp_path):
    flags = ["--weights", str(llama_folder), "--concurrency", "8", "--max_context", "256"]
    with running_server(flags, on_failure=print) as server:
        expected = server.predict(CONTROL)["output"]
        assert attack(program, server.url, tmp_path, "^/trainings") > 300
        assert server.predict(CONTROL)["output"] == expected
        health = server.request("/health-check")
        assert (health["status"], health["gate"]["restarts"], health["gate"]["running"]) == ("READY", 0, 0)


def test_trainings_of_all_shapes(program, tmp_path):
    """None comes to a training: what schemathesis makes up for data is no upload."""
    with running_server(["--train"], env={**os.environ, "TMPDIR": str(tmp_path)}, on_failure=print) as server:
        assert attack(program, server.url, tmp_path, "^/predictions") > 300
        health = server.request("/health-check")
        assert (health["status"], health["gate"]["restarts"], health["gate"]["running"]) == ("READY", 0, 0)
        assert list(tmp_path.glob("alpaca-training-*")) == []
