"""Folders written here, read by programs that know the old rotary keys alone, each in an environment of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca.architecture.rope import read_rope, spell_for_all

pytestmark = pytest.mark.slow
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SIZES = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 8,
    "num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
}  # fmt: skip
SPELLINGS = {
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "new llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA_3}},
    "old linear": {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "both": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 900.0},
    },
}
TRANSFORMERS = """
import sys, json
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
print(json.dumps([config.rope_theta, config.rope_scaling]))
"""
MLX = """
import sys, json
from mlx_lm.models.llama import ModelArgs
config = ModelArgs.from_dict(json.load(open(sys.argv[1] + "/config.json")))
print(json.dumps([config.rope_theta, config.rope_scaling]))
"""
PROGRAMS = {
    "transformers 4.46": (["transformers==4.46.3"], TRANSFORMERS),
    "transformers 4.57": (["transformers==4.57.6"], TRANSFORMERS),
    "mlx-lm": (["mlx-lm", "mlx[cpu]"], MLX),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A Python that has the program, and the script to run by it."""
    packages, script = PROGRAMS[request.param]
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{packages} cannot be installed here: {installed.stderr.splitlines()[-1:]}")
    return python, script


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_old_keys_say_the_same_settings(spelling: str, program: tuple[Path, str], tmp_path: Path):
    config = {**SIZES, **SPELLINGS[spelling]}
    (tmp_path / "config.json").write_text(json.dumps(spell_for_all(config)))
    python, script = program
    done = subprocess.run([python, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theta, scaling = json.loads(done.stdout.splitlines()[-1])
    expected = read_rope(config)
    assert theta == expected.theta
    assert (scaling or {}).get("rope_type", "default") == expected.kind
    assert {name: (scaling or {}).get(name) for name in expected.numbers} == expected.numbers
