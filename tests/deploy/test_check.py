"""script/check: a sound project is ready to push, and each way to spoil it is said before the push."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import torch
from transformers import LlamaForCausalLM

from alpaca.errors import InputError
from alpaca.files.archives import pack
from alpaca.formats.hf.adapters import open_adapter
from alpaca.serving.llama.adapters import largest_ranks, stacked_bytes
from alpaca.serving.llama.weights import read_llama
from deploy import check, check_weights
from deploy.image_files import IgnoreRules, list_image_files
from tests.conftest import ROOT
from tests.processes import mistake_of, run_command
from tests.serving.llama.test_llama import save_model
from tests.serving.llama.test_serving_adapters import ADAPTERS, write_adapter

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


def setting(line: str) -> Callable[[Path], None]:
    """Another entry of cog.yaml's environment; the last of a name holds."""
    return edit("cog.yaml", "predict:", f"  - {line}\npredict:")


def flat(key: str, value: str) -> Callable[[Path], None]:
    """A section of cog.yaml as one value."""

    def change(project: Path) -> None:
        text = (project / "cog.yaml").read_text()
        changed = re.sub(rf"^{key}:\n(  .*\n)+", f"{key}: {value}\n", text, flags=re.MULTILINE)
        assert changed != text
        (project / "cog.yaml").write_text(changed)

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
    "elsewhere": (setting("COG_WEIGHTS=../.."), r"weights: COG_WEIGHTS: \.\./\.\. is not in the image"),
    "nowhere": (setting("COG_WEIGHTS=weights/other"), r"weights: no model in weights/other \(COG_WEIGHTS\)"),
    "key twice": (
        edit("cog.yaml", "  gpu: true", "  gpu: true\n  gpu: false"),
        "build.gpu stands twice, in lines 2 and 3",
    ),
    "section twice": (
        edit("cog.yaml", "predict:", "environment: []\npredict:"),
        "environment stands twice, in lines 7 and",
    ),
    "no YAML": (edit("cog.yaml", "build:", "build: ["), "cog.yaml cannot be read"),
    "a text": (lambda project: (project / "cog.yaml").write_text("build"), "expected keys and values, found str"),
    "no cog.yaml": (lambda project: (project / "cog.yaml").unlink(), "cog.yaml cannot be read"),
    "torch nightly": (
        edit("requirements.txt", "torch==2.11.0", "torch==nightly"),
        "pins: .*torch==nightly is no version",
    ),
    "build is yes": (flat("build", "yes"), "cog.yaml: build: expected keys and values, found True"),
    "environment is a text": (flat("environment", "A=1"), "environment: expected a list, one - NAME=value"),
    "environment is a mapping": (flat("environment", "{A: 1}"), "environment: expected a list, one - NAME=value"),
    "variable without a value": (setting("HF_TOKEN"), "environment: expected NAME=value, found 'HF_TOKEN'"),
    "variable as a mapping": (setting("A: 1"), "environment: expected NAME=value, found {'A': 1}"),
    "predict.py missing": (lambda project: (project / "predict.py").unlink(), "predict: there is no predict.py"),
    "syntax error": (edit("predict.py", "class Predictor", "clas Predictor"), r"predict\.py is no Python: .*line \d+"),
    "not UTF-8": (lambda project: (project / "train.py").write_bytes(b"\xff"), r"train\.py is no Python"),
    "no run": (edit("predict.py", "async def run(", "async def ran("), r"predict\.py: there is no function run"),
    "name of an adapter": (setting("ALPACA_ADAPTERS=none=weights/x"), "environment: ALPACA_ADAPTERS: .*found 'none'"),
    "unknown precision": (setting("ALPACA_QUANTIZATION=int9"), "environment: ALPACA_QUANTIZATION must be one of"),
    "no number": (setting("COG_MAX_CONCURRENCY=many"), "environment: COG_MAX_CONCURRENCY must be a number"),
    "malformed pattern": (
        edit(".dockerignore", "unconverted-weights", "alpaca_out/["),
        r"image: .*pattern 'alpaca_out/\['",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_would_fail_is_said(name: str, project: Path):
    spoil, expected = SPOILT[name]
    if name == "no tokenizer":
        (project / "alpaca_out" / "tokenizer.json").unlink()
    spoil(project)
    assert re.search(expected, "\n".join(errors(project)))


def test_a_card_too_small_is_said(project: Path):
    assert re.search(
        "memory: 100MB: weights .* MB, and CUDA itself .* do not fit", "\n".join(errors(project, card="100MB"))
    )
    assert not errors(project, card="24GB")


def test_what_is_not_served_is_warned_of(project: Path):
    (project / "weights").mkdir()
    (project / "weights" / "consolidated.00.pth").write_bytes(b"x")
    assert "image: weights/consolidated.00.pth" in errors(project, "warning")[0]
    (project / "cog.yaml").write_text(
        (project / "cog.yaml").read_text().replace("environment:", "environment:\n  - COG_WEIGHTS=https://x/w.tar")
    )
    assert any("every start downloads it" in text for text in errors(project, "warning"))


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("optimizer.py", False),
        ("optimizer.pt", True),
        ("optimizer_state.bin", True),
        ("optimizer-00001.safetensors", True),
    ],
)
def test_code_is_no_weights_whatever_it_is_called(name: str, warned: bool, project: Path):
    (project / "alpaca" / "training").mkdir(parents=True)
    (project / "alpaca" / "training" / name).write_bytes(b"x")
    assert any(f"alpaca/training/{name}" in text for text in errors(project, "warning")) is warned


# Adapters -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(project: Path) -> Path:
    """The model in weights/base, an adapter of it in alpaca_out, another in weights/second."""
    (project / "weights").mkdir()
    base = (project / "alpaca_out").rename(project / "weights" / "base")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    write_adapter(model, project / "alpaca_out", seed=0, base_name="weights/base", **ADAPTERS["alpaca-lora"])
    write_adapter(model, project / "weights" / "second", seed=1, base_name="/elsewhere/base", **ADAPTERS["all"])
    for folder in ("alpaca_out", "weights/second"):
        (project / folder / "README.md").unlink(missing_ok=True)
    return project


def name_base(project: Path, name: str | None, folder: str = "alpaca_out") -> None:
    file = project / folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))


@pytest.mark.parametrize("name", ["weights/base", "/src/weights/base", "./weights/../weights/base/"])
def test_an_adapter_whose_base_is_in_the_image_is_ready(name: str, adapted: Path):
    name_base(adapted, name)
    setting("ALPACA_ADAPTERS=second=weights/second,third=/src/weights/second")(adapted)  # of a base named elsewhere
    found = check.check(adapted, card="24GB")
    assert [one for one in found if one.level != "ok"] == []
    assert sum("LoRA adapter of" in one.text for one in found) == 3


def test_a_base_that_is_not_in_the_image_is_an_error(adapted: Path):
    name_base(adapted, str(adapted / "weights" / "base"))  # where it was trained: it is there, on this machine
    said = "\n".join(errors(adapted))
    assert f"the base model that alpaca_out names: {adapted}/weights/base is not in the image" in said
    assert "in the image it is /src/weights/base. Put that model" in said
    setting("ALPACA_BASE_MODEL=weights/base")(adapted)
    assert errors(adapted) == []
    name_base(adapted, None)
    assert errors(adapted) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ALPACA_BASE_MODEL=/mnt/base", "ALPACA_BASE_MODEL: /mnt/base is not in the image"),
        ("ALPACA_BASE_MODEL=weights/none", r"no model in weights/none \(ALPACA_BASE_MODEL\)"),
        ("ALPACA_BASE_MODEL=weights/second", "second is an adapter itself"),
        ("ALPACA_ADAPTERS=a=/mnt/a", "ALPACA_ADAPTERS: a: /mnt/a is not in the image"),
        ("ALPACA_ADAPTERS=a=weights/none", r"no model in weights/none \(ALPACA_ADAPTERS: a\)"),
        ("ALPACA_ADAPTERS=a=weights/base", "ALPACA_ADAPTERS: a=weights/base is no adapter"),
        ("ALPACA_ADAPTERS=a=weights/second,b=weights/none", r"no model in weights/none \(ALPACA_ADAPTERS: b\)"),
        ("ALPACA_ADAPTERS=a=weights/a.txt", "neither a folder nor an archive"),
    ],
)
@pytest.mark.fast_rows(2)
def test_what_the_environment_names_is_looked_at(line: str, message: str, adapted: Path):
    (adapted / "weights" / "a.txt").write_text("no archive")
    setting(line)(adapted)
    assert re.search(f"weights: .*{message}", "\n".join(errors(adapted)))


def test_an_adapter_left_out_of_the_image_or_of_another_model_is_an_error(adapted: Path):
    setting("ALPACA_ADAPTERS=second=weights/second")(adapted)
    edit(".dockerignore", "unconverted-weights", "weights/second/*.safetensors")(adapted)
    assert errors(adapted) == ["weights: .dockerignore keeps weights/second/adapter_model.safetensors out of the image"]
    edit(".dockerignore", "weights/second/*.safetensors", "nothing")(adapted)
    other = save_model(adapted / "other", torch.float32)
    write_adapter(other, adapted / "weights" / "second", seed=1, **ADAPTERS["all"])
    assert re.search(r"weights: adapter second .*another model's", "\n".join(errors(adapted)))


def test_an_archive_of_an_adapter_is_looked_into(adapted: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALPACA_CACHE", str(adapted.parent / "cache"))
    pack(adapted / "weights" / "second", adapted / "weights" / "second.tar")
    setting("ALPACA_ADAPTERS=second=weights/second.tar")(adapted)
    assert errors(adapted) == []
    (text,) = errors(adapted, "warning")  # nor is it among what is not served
    assert "weights/second.tar is an archive, unpacked at every start: put the folder" in text
    edit(".dockerignore", "unconverted-weights", "weights/*.tar")(adapted)
    assert errors(adapted) == ["weights: .dockerignore keeps weights/second.tar out of the image"]


def test_training_on_a_quantized_base_is_remembered(adapted: Path):
    (adapted / "alpaca_out" / "train_config.json").write_text(json.dumps({"base_quantization": "nf4"}))
    assert "set ALPACA_QUANTIZATION=nf4" in errors(adapted, "warning")[0]
    setting("ALPACA_QUANTIZATION=nf4")(adapted)
    assert errors(adapted, "warning") == []


def test_the_memory_plan_counts_adapters(adapted: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    plan = check_weights.plan_memory
    monkeypatch.setattr(
        check_weights, "plan_memory", lambda *args, **named: asked.append(named) or plan(*args, **named)
    )
    check.check(adapted, card="24GB")
    setting("ALPACA_ADAPTERS=second=weights/second")(adapted)
    found = check.check(adapted, card="24GB")
    config = read_llama(adapted / "weights" / "base")
    adapters = {"default": open_adapter(adapted / "alpaca_out"), "second": open_adapter(adapted / "weights" / "second")}
    size = stacked_bytes(adapters, config, torch.bfloat16)
    assert (asked[1]["adapter_bytes"], asked[1]["num_ranks"]) == (size, largest_ranks(adapters))
    assert asked[0]["adapter_bytes"] < size
    assert asked[0]["free_bytes"] - asked[1]["free_bytes"] == size - asked[0]["adapter_bytes"]
    assert any(", adapters 0." in one.text for one in found if one.topic == "memory")


# The image's files --------------------------------------------------------------------------------------------------


def test_layers(project: Path):
    (project / "alpaca_out" / "big.safetensors").write_bytes(bytes(11_000_000))
    (project / "big.bin").write_bytes(bytes(11_000_000))  # beside predict.py
    separate = {str(file.path): file.is_separate for file in list_image_files(project)}
    assert (separate["alpaca_out/big.safetensors"], separate["big.bin"]) == (True, False)
    assert not any(part in path for path in separate for part in (".cog/", "tests/"))


@pytest.mark.parametrize(
    ("pattern", "path", "ignored"),
    [
        ("a\\[", "a[", True),
        ("[a-c]x", "bx", True),
        ("[^a-c]x", "bx", False),
        ("a]", "a]", True),
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


@pytest.mark.parametrize("pattern", ["a[", "a[]", "[a-]", "[-a]", "a\\", "[^]", "!", "[z-a]", "[a]]["])
def test_a_pattern_that_docker_cannot_read_is_refused(pattern: str):
    with pytest.raises(InputError, match="Docker cannot read the pattern"):
        IgnoreRules([pattern])


def test_the_command_is_for_ci():
    command = [sys.executable, "-m", "deploy.check", "--json", "--card"]
    done = run_command([*command, "24GB"])
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["passed"] else 1), done.stderr
    assert {"level", "topic", "text"} == found["findings"][0].keys()
    assert isinstance(found["passed"], bool)
    assert "expected a size" in mistake_of([*command, "big"])


@pytest.mark.parametrize("name", ["no cog.yaml", "torch nightly", "build is yes", "predict.py missing", "syntax error"])
def test_what_is_broken_is_json_too(name: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    spoil, expected = SPOILT[name]
    spoil(project)
    monkeypatch.setattr(check, "ROOT", project)
    monkeypatch.setattr(sys, "argv", ["check", "--json"])
    with pytest.raises(SystemExit, match="True"):
        check.main()
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    assert any(re.search(expected, f"{one['topic']}: {one['text']}") for one in found["findings"])


def test_a_schema_that_cannot_be_made_is_a_finding(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.schema.build_schema", lambda: 1 / 0)
    assert errors(project) == ["schema: the schema cannot be made: ZeroDivisionError: division by zero"]
