"""script/check: a sound project is ready to push, and each way to spoil it is said before the push."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import check
import pytest
from image_files import IgnoreRules, list_image_files

from tests.conftest import ROOT

CODE = ("cog.yaml", "requirements.txt", ".dockerignore", "predict.py", "train.py")


@pytest.fixture
def project(tmp_path: Path, llama_folder: Path) -> Path:
    """The files that decide, with a model in alpaca_out."""
    for name in CODE:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(llama_folder, tmp_path / "alpaca_out")
    return tmp_path


def errors(project: Path, level: str = "error", **options: str) -> list[str]:
    return [f"{found.topic}: {found.text}" for found in check.check(project, **options) if found.level == level]


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(project: Path) -> None:
        text = (project / name).read_text()
        assert old in text
        (project / name).write_text(text.replace(old, new, 1))

    return change


def test_a_sound_project_is_ready(project: Path):
    found = check.check(project, card="24GB")
    assert [one for one in found if one.level != "ok"] == []
    assert {one.topic for one in found} == {"cog.yaml", "pins", "schema", "image", "weights", "memory"}


def test_this_project_lacks_only_weights():
    # A developer's alpaca_out or COG_WEIGHTS may be there: only what is committed is judged.
    assert [text for text in errors(ROOT) if not text.startswith(("weights:", "image:"))] == []


def cut_a_file(project: Path) -> None:
    file = project / "alpaca_out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def claim_more_layers(project: Path) -> None:
    file = project / "alpaca_out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 9}))


def link_to_elsewhere(project: Path) -> None:
    file = project / "alpaca_out" / "config.json"
    file.rename(project / "elsewhere.json5")
    file.symlink_to(project / "elsewhere.json5")


SPOILT = {
    "unknown key": (edit("cog.yaml", "gpu: true", "gpus: true"), "cog.yaml: .* unknown key build.gpus"),
    "version is a number": (edit("cog.yaml", '"3.12"', "3.10"), "python_version must be a quoted text"),
    "forbidden variable": (edit("cog.yaml", "HF_HUB_OFFLINE=1", "CUDA_VISIBLE_DEVICES=0"), "refuses to set CUDA_"),
    "both spellings": (edit("cog.yaml", "train: train", "run: predict.py:Predictor\ntrain: train"), "run and predict"),
    "no such file": (edit("cog.yaml", "predict.py:Predictor", "serve.py:Predictor"), "there is no serve.py"),
    "no such class": (edit("cog.yaml", "predict.py:Predictor", "predict.py:Other"), "predict.py has no Other"),
    "loose pin": (edit("requirements.txt", "numpy==", "numpy>="), "pins: .*'numpy>=.*no exact pin"),
    "marker": (edit("requirements.txt", "numpy==2.4.6", "numpy==2.4.6; python_version<'4'"), "no exact pin"),
    "no torch": (edit("requirements.txt", "torch==2.11.0\n", ""), "has no torch"),
    "constant bound": (
        edit("predict.py", "ge=1, le=5", "ge=1, le=MOST"),
        "predict.py: n: le must be a literal",
    ),
    "required by position": (edit("predict.py", "n: int = Input(default=1", "n: int = Input(1"), "makes it required"),
    "no type": (edit("predict.py", "seed: int | None =", "seed ="), "seed has no type"),
    "description over lines": (
        edit("predict.py", 'description="Number of completions"', 'description="Number "\n"of"'),
        "n: description must be one text",
    ),
    "no weights": (lambda project: shutil.rmtree(project / "alpaca_out"), "weights: no model in alpaca_out"),
    "weights kept out": (edit(".dockerignore", "unconverted-weights", "alpaca_out/*.safetensors"), "keeps alpaca_out/"),
    "damaged": (cut_a_file, "weights: .*damaged"),
    "incomplete": (claim_more_layers, "weights: .*lacks weights"),
    "no tokenizer": (lambda project: (project / "alpaca_out" / "tokenizer.model").unlink(), "weights: .*tokenizer"),
    "a link": (link_to_elsewhere, "config.json is a link"),
    "elsewhere": (edit("cog.yaml", "environment:", "environment:\n  - COG_WEIGHTS=../.."), "weights: no model in"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_would_fail_is_said(name: str, project: Path):
    spoil, expected = SPOILT[name]
    if name == "no tokenizer":
        (project / "alpaca_out" / "tokenizer.json").unlink()
    spoil(project)
    assert re.search(expected, "\n".join(errors(project)))


def test_a_card_too_small_is_said(project: Path):
    assert re.search("memory: 100MB: the weights take .* MB and CUDA itself", "\n".join(errors(project, card="100MB")))
    assert not errors(project, card="24GB")


def test_what_is_not_served_is_warned_of(project: Path):
    (project / "weights").mkdir()
    (project / "weights" / "consolidated.00.pth").write_bytes(b"x")
    assert "image: weights/consolidated.00.pth" in errors(project, "warning")[0]
    (project / "cog.yaml").write_text(
        (project / "cog.yaml").read_text().replace("environment:", "environment:\n  - COG_WEIGHTS=https://x/w.tar")
    )
    assert any("every start downloads it" in text for text in errors(project, "warning"))


def test_layers(project: Path):
    (project / "alpaca_out" / "big.safetensors").write_bytes(bytes(11_000_000))
    (project / "big.bin").write_bytes(bytes(11_000_000))  # beside predict.py
    separate = {str(file.path): file.is_separate for file in list_image_files(project)}
    assert (separate["alpaca_out/big.safetensors"], separate["big.bin"]) == (True, False)
    assert not any(part in path for path in separate for part in (".cog/", "tests/"))


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("a", "a", True),
        ("a", "a/b/c", True),
        ("a", "b/a", False),
        ("/a/", "a/x", True),
        ("./a", "a", True),
        ("*.json", "x.json", True),
        ("*.json", "a/x.json", False),
        ("/*.json", "x.json", True),
        ("**/*.json", "a/b/x.json", True),
        ("**/*.json", "x.json", True),
        ("**/runs", "a/runs/events", True),
        ("a/**", "a/b/c", True),
        ("a/**/z", "a/z", True),
        ("a/**/z", "a/b/c/z", True),
        ("a/?.py", "a/x.py", True),
        ("a/?.py", "a/xy.py", False),
        ("[ab].txt", "b.txt", True),
        ("[ab].txt", "c.txt", False),
        ("**/.*.partial", "w/.model.partial", True),
        ("a.b", "axb", False),
        ("# a", "# a", False),
    ],
)
def test_ignore_rules(pattern: str, path: str, ignored: bool):
    assert IgnoreRules([pattern]).ignores(PurePosixPath(path)) is ignored


def test_the_last_rule_decides():
    rules = IgnoreRules(["weights", "!weights/llama-7b", "**/*.tmp"])
    assert rules.ignores(PurePosixPath("weights/other/x"))
    assert not rules.ignores(PurePosixPath("weights/llama-7b/config.json"))
    assert rules.ignores(PurePosixPath("weights/llama-7b/a.tmp"))


def test_the_command_is_for_ci(tmp_path: Path):
    command = [sys.executable, "script/check.py", "--json", "--card", "24GB"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["passed"] else 1), done.stderr
    assert {"level", "topic", "text"} == found["findings"][0].keys()
    wrong = subprocess.run([*command[:2], "--card", "big"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "expected a size" in wrong.stderr
