"""Merged folders: what PEFT computes unmerged, from folders as they are shared, whole or not there at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.formats.hf.export import export
from alpaca.formats.hf.folder import WeightsFolder, fingerprint
from alpaca.text.chat.trained_prompt import read_trained_prompt, write_trained_prompt
from convert.export_hf_checkpoint import parse_arguments
from tests.conftest import ROOT
from tests.formats.hf.test_merging import ALL, edit_config, logits, save_adapter, save_base, with_bitsandbytes
from tests.processes import mistake_of, run_code, run_command
from tests.tiny import TinyLlama, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def add_tokenizer(folder: Path, tokenizer_model: Path) -> Path:
    from alpaca.text.sentencepiece import write_llama_tokenizer

    write_llama_tokenizer(tokenizer_model, folder)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """base/ and adapter/ of a LLaMA in float16."""
    folder = tmp_path_factory.mktemp("shared")
    add_tokenizer(save_base(folder / "base", "llama", torch.float16, vocab_size=420), tokenizer_model)
    save_adapter(folder / "adapter", folder / "base")
    return folder


@pytest.fixture
def work(shared: Path, tmp_path: Path) -> Path:
    """A copy of both, to damage."""
    return shutil.copytree(shared, tmp_path / "work")


def flags(work: Path, *more: str) -> list[str]:
    return ["--base_model", str(work / "base"), "--adapter", str(work / "adapter"), "--output_dir",
            str(work / "merged"), "--check_logits", "never", *more]  # fmt: skip


def run(work: Path, *more: str) -> Path:
    return export(parse_arguments(flags(work, *more)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def only(work: Path, *names: str) -> bool:
    return sorted(path.name for path in work.iterdir()) == sorted(names)


# What is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("values", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora"])
@pytest.mark.fast_rows(2)
def test_transformers_loads_what_peft_computes_unmerged(
    kind: str, values: dict[str, object], tokenizer_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    base = add_tokenizer(save_base(tmp_path / "base", kind, vocab_size=420), tokenizer_model)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=ALL[kind], **values)
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    folder = run(tmp_path, "--check_logits", "always")
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.allclose(logits(model), logits(unmerged), atol=1e-4)
    said = capsys.readouterr().out
    assert re.search(r"weights changed by \d", said)
    assert re.search(r"merged and unmerged differ by \S+e-0[5-9] .*; the adapter moves them by", said)
    assert (
        AutoTokenizer.from_pretrained(folder)("Hello").input_ids
        == AutoTokenizer.from_pretrained(base)("Hello").input_ids
    )


@pytest.mark.parametrize(("flag", "dtype"), [("auto", torch.float16), ("float32", torch.float32)])
def test_dtype_and_files(flag: str, dtype: torch.dtype, work: Path):
    folder = run(work, "--dtype", flag, "--max_shard_size", "50KB")
    specs = WeightsFolder(folder).specs()
    assert {spec.dtype for spec in specs} == {dtype}
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32),
                                      work / "adapter").merge_and_unload().state_dict()  # fmt: skip
    written = WeightsFolder(folder)
    for spec in specs:  # rounded once: float32's are not float16's
        assert torch.allclose(written.tensor(spec.name).float(), exact[spec.name], atol=2e-6,
                              rtol=torch.finfo(dtype).eps / 2 + 1e-6), spec.name  # fmt: skip


@with_bitsandbytes
def test_a_4_bit_base_is_recognised_and_the_wrong_one_is_noticed(work: Path, capsys: pytest.CaptureFixture):
    (work / "adapter" / "train_config.json").write_text(json.dumps({"base_quantization": "nf4", "bf16": False}))
    with torch.compiler.set_stance("force_eager"):
        run(work, "--check_logits", "always")
        assert "taken as nf4 has it, as in training" in capsys.readouterr().out
        by_hand = contents(run(work, "--overwrite", "--base_quantization", "none"))
    recorded = contents(run(work, "--overwrite"))
    assert recorded["model.safetensors"] != by_hand["model.safetensors"]


def test_a_merge_that_is_not_the_unmerged_model_is_not_kept(work: Path, monkeypatch: pytest.MonkeyPatch):
    from alpaca.formats.hf.merging import MergedWeights

    real = MergedWeights._changed
    monkeypatch.setattr(MergedWeights, "_changed", lambda self, name, rows, start: rows + 3 * (
        real(self, name, rows, start) - rows))  # fmt: skip
    with pytest.raises(InputError, match=r"logits differ by .* from PEFT's unmerged ones .*: nothing was kept"):
        run(work, "--check_logits", "auto")
    assert only(work, "adapter", "base")


def test_an_effect_that_rounding_hides_is_said(work: Path, capsys: pytest.CaptureFixture):
    shutil.rmtree(work / "adapter")
    save_adapter(work / "adapter", work / "base", std=2e-5)
    run(work, "--check_logits", "always")
    assert "that is no more than rounding: try --dtype float32" in capsys.readouterr().out
    run(work, "--check_logits", "always", "--dtype", "float32", "--overwrite")
    assert "no more than rounding" not in capsys.readouterr().out


def test_memory_decides_whether_logits_are_compared(work: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr("alpaca.formats.hf.merge_check.free_memory", lambda device: 10**9)
    run(work, "--check_logits", "auto")
    assert re.search(r"logits not compared: it takes 2\.\d GB of memory, 1\.0 GB are free", capsys.readouterr().out)
    with pytest.raises(NotEnoughSpace, match=r"--check_logits always: it takes .*; use auto or never"):
        run(work, "--check_logits", "always", "--overwrite")


def test_where_the_base_comes_from(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    own, other = work / "base", shutil.copytree(work / "base", work / "other")
    edit_config(work / "adapter", base_model_name_or_path=str(own))
    rest = ["--adapter", str(work / "adapter"), "--output_dir", str(work / "merged"), "--overwrite",
            "--check_logits", "never"]  # fmt: skip

    def said(*more: str) -> str:
        export(parse_arguments([*rest, *more]))
        return capsys.readouterr().out

    assert f"; base: {own}, named by the adapter\n" in said()
    assert f"; base: {other}, named by --base_model (the adapter names {own})\n" in said("--base_model", str(other))
    assert f"; base: {own}, named by --base_model\n" in said("--base_model", f"{own}/")
    monkeypatch.setenv("BASE_MODEL", str(other))
    assert f"; base: {other}, named by the environment's BASE_MODEL (the adapter names {own})\n" in said()
    assert f"; base: {own}, named by --base_model\n" in said("--base_model", str(own))


def test_a_base_that_is_not_there(work: Path, monkeypatch: pytest.MonkeyPatch):
    rest = ["--adapter", str(work / "adapter"), "--output_dir", str(work / "merged"), "--overwrite"]
    monkeypatch.setenv("BASE_MODEL", "from/environment")
    where = re.escape(str(Path.cwd()))
    expected = (
        rf"no base model at {where}/from/environment, which the environment's BASE_MODEL names: give its folder by "
    )
    with pytest.raises(
        MissingInput, match=rf"{expected}--base_model\. Nor could from/environment be had from the Hugg"
    ):
        export(parse_arguments(rest))
    with pytest.raises(MissingInput, match=rf"no base model at {where}/nowhere, which --base_model names"):
        export(parse_arguments([*rest, "--base_model", "./nowhere"]))
    edit_config(work / "adapter", base_model_name_or_path=None)
    monkeypatch.delenv("BASE_MODEL")
    with pytest.raises(MissingInput, match="does not say what its base model is: name its folder by --base_model"):
        export(parse_arguments(rest))


# Refused --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_changes_nothing_leaves_nothing(work: Path):
    shutil.rmtree(work / "adapter")
    save_adapter(work / "adapter", work / "base", std=0.0)
    with pytest.raises(InputError, match="changes nothing: every lora_B is zero"):
        run(work)
    shutil.rmtree(work / "adapter")
    save_adapter(work / "adapter", work / "base", std=1e-9)
    with pytest.raises(InputError, match=r"smaller than torch.float16 can tell"):
        run(work)
    assert only(work, "adapter", "base")
    assert run(work, "--dtype", "float32")


def test_tokenizers(work: Path, tokenizer_model: Path):
    for path in (work / "base").glob("*token*.*"):
        path.rename(work / "adapter" / path.name)  # where train.py puts it
    assert (run(work) / "tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    (work / "adapter" / "added_tokens.json").write_text(json.dumps({"<x>": 439}))
    with pytest.raises(InputError, match=r"the tokenizer in .*adapter has 440 tokens, the merged embedding 420 rows"):
        run(work, "--overwrite")
    for path in (work / "adapter").glob("*token*.*"):
        path.unlink()
    with pytest.raises(MissingInput, match=r"no tokenizer in .*adapter or .*base; found: README.md, adapter_config"):
        run(work, "--overwrite")


@pytest.mark.parametrize(
    ("own", "bases", "expected"),
    [("chat", None, "chat"), ("chat", "{prompt}", "chat"), (None, "{prompt}", "{prompt}"), (None, None, None)],
)
def test_a_merged_model_is_asked_as_its_adapter_was_trained(own, bases, expected, work: Path):
    for name, prompt in (("adapter", own), ("base", bases)):
        if prompt is not None:
            write_trained_prompt(work / name, prompt)
    assert read_trained_prompt(export(parse_arguments(flags(work)))) == expected


def test_a_tokenizer_model_cut_short_is_not_passed_over(work: Path):
    file = work / "base" / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        InputError, match=r"base/tokenizer\.model \(\d+ bytes\) is neither a SentencePiece model .* nor a"
    ):
        run(work)
    assert only(work, "adapter", "base")


def test_another_base_of_the_same_shapes(work: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    (work / "adapter" / "train_config.json").write_text(json.dumps({"base_fingerprint": fingerprint(work / "base")}))
    other = shutil.copytree(work / "base", work / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, other / "model.safetensors")
    rest = ["--adapter", str(work / "adapter"), "--output_dir", str(work / "merged"), "--check_logits", "never"]
    monkeypatch.setenv("BASE_MODEL", str(other))
    with pytest.raises(InputError, match=r"other is not the model that .* was trained on \(.*base\).* by --base_model"):
        export(parse_arguments(rest))
    export(parse_arguments([*rest, "--base_model", str(other)]))
    assert "Going on, since it was named" in caplog.text


def damage_end(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shrink_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:96].clone()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (damage_end, InputError, r"model.safetensors is damaged or not a safetensors file"),
        (lose_shard, MissingInput, r"names files that are not there: model-00002-of-00002.safetensors"),
        (shrink_layer, InputError, r"1.mlp.up_proj.weight as a float matrix \[128, 64\]; .* \[96, 64\]"),
        (lambda folder: (folder / "config.json").unlink(), MissingInput, r"no config.json in .*base \(found: gener"),
    ],
)
def test_damaged_bases_are_refused_before_anything_is_written(damage, error, text: str, work: Path):
    damage(work / "base")
    with pytest.raises(error, match=text):
        run(work)
    assert only(work, "adapter", "base")


def test_the_output_is_no_input(work: Path):
    before = [contents(work / name) for name in ("base", "adapter")]
    for output, flag in (("base", "--base_model"), ("adapter", "--adapter"), (".", "--base_model")):
        with pytest.raises(InputError, match=rf"the output .* is, or holds, what is read from: {flag} \("):
            run(work, "--output_dir", str(work / output), "--overwrite")
    assert [contents(work / name) for name in ("base", "adapter")] == before
    run(work)
    with pytest.raises(OutputExists, match="merged exists already; pass --overwrite"):
        run(work)


def test_a_full_disk_leaves_the_old_output(work: Path, monkeypatch: pytest.MonkeyPatch):
    before = contents(run(work))
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(NotEnoughSpace, match=r"needs 0\.02 GB and its disk has 0\.00 GB free"):
        run(work, "--overwrite")
    monkeypatch.setattr(shutil, "disk_usage", real)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alpaca.formats.hf.writing._write_piece", full)
    with pytest.raises(NotEnoughSpace, match=r"the disk ran full while .*merged was written"):
        run(work, "--overwrite")
    assert contents(work / "merged") == before
    assert only(work, "adapter", "base", "merged")


# The command as a process ---------------------------------------------------------------------------------------

KILLED = """
import os, pathlib, signal, sys
from alpaca.formats.hf import export, writing
import convert.export_hf_checkpoint as command
def die(*args, **values):
    os.kill(os.getpid(), signal.SIGKILL)
stage = sys.argv.pop(1)
if stage == "writing": writing._write_piece = die
if stage == "between files": writing.write_json = export.write_json = die
if stage == "comparing": export.compare_logits = die
if stage == "renaming": pathlib.Path.rename = die
command.run_command(command.main)
"""


@pytest.mark.parametrize(
    ("stage", "old"), [("writing", True), ("between files", False), ("comparing", False), ("renaming", True)]
)
def test_killed_at_any_stage_it_can_be_run_again(stage: str, old: bool, work: Path):
    clean = contents(run(work, "--output_dir", str(work / "clean")))
    if old:
        (work / "merged").mkdir()
        (work / "merged" / "old").write_text("old")
    died = run_code(KILLED, stage, *flags(work, "--overwrite"))
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert contents(work / "merged") == {"old": b"old"} if old else not (work / "merged").exists()
    assert contents(run(work, "--overwrite")) == clean
    assert only(work, "adapter", "base", "clean", "merged")


def command(work: Path) -> list[str]:
    return [sys.executable, "-m", "convert.export_hf_checkpoint", *flags(work), "--check_logits", "always"]


def test_command_says_what_it_does_and_a_mistake_is_one_line(work: Path):
    good = run_command(command(work))
    assert good.returncode == 0, good.stderr
    assert "differ by" in good.stdout
    assert "LoRA adapter of" in good.stdout
    assert re.search(r"wrote .*merged in \d", good.stdout)
    assert "B/s" in good.stderr
    assert "exists already; pass --overwrite" in mistake_of(command(work))


@pytest.mark.slow
def test_no_library_speaks_where_the_command_starts_anew(work: Path):
    """bitsandbytes asks for a package on CPUs with AVX-512."""
    done = subprocess.run(command(work), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "differ by" in done.stdout
    assert "pip install" not in done.stderr


MEMORY_PROBE = """
import re, sys, threading, time
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
import importlib
command = importlib.import_module(sys.argv.pop(1))
command.main()
print("kib", peak)
"""


def peak_of(module: str, *arguments: str) -> int:
    """Largest anonymous memory of a command, its imports included, in bytes."""
    script = [sys.executable, "-c", MEMORY_PROBE, module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


def save_large(folder: Path, tokenizer_model: Path) -> tuple[Path, int]:
    """A LLaMA of about 600 MB in float16, and the bytes of its largest tensor."""
    sizes = TinyLlama(vocab_size=400, dim=1024, n_layers=25, n_heads=16, n_kv_heads=16, multiple_of=256)
    save_base(folder, "llama", torch.float16, vocab_size=400, hidden_size=1024, intermediate_size=sizes.ffn,
              num_hidden_layers=25, num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    specs = WeightsFolder(add_tokenizer(folder, tokenizer_model)).specs()
    assert sum(spec.num_bytes for spec in specs) > 580e6
    return folder, max(spec.num_bytes for spec in specs)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_memory_does_not_depend_on_the_models_size(quantization: str, tokenizer_model: Path, tmp_path: Path):
    base, largest = save_large(tmp_path / "base", tokenizer_model)
    save_adapter(tmp_path / "adapter", base)
    peak = peak_of("convert.export_hf_checkpoint", *flags(tmp_path, "--base_quantization", quantization))
    assert peak < 2 * largest + 300e6
