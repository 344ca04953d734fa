"""GGUF export as a command: adapters are merged, mistakes are named, and no run leaves half a file."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alpaca.errors import InputError, MissingInput, MissingPackage, NotEnoughSpace, NumbersOverflow, OutputExists
from alpaca.files.locks import locked
from alpaca.formats.gguf import writer
from alpaca.formats.gguf.export import export
from convert.export_gguf import parse_arguments
from tests.disk_events import watch_disk
from tests.formats.gguf_models import change_config, change_tensors, run, tensors_of, value, write_model
from tests.processes import end_while_writing, mistake_of, run_code, run_command

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m")


def nothing_is_left(folder: Path) -> bool:
    return not [path for path in folder.parent.iterdir() if "gguf" in path.name]


# Adapters -----------------------------------------------------------------------------------------------------


def save_adapter(folder: Path, target: Path, **values: object) -> torch.nn.Module:
    """A random LoRA adapter of a model, saved by PEFT; PEFT's own merge of it is returned."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False, **values)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(target)
    return model.merge_and_unload()


@pytest.mark.parametrize("values", [{}, {"use_dora": True}])
def test_adapter_is_merged_as_peft_does(folder, tmp_path, values):
    merged = save_adapter(folder, tmp_path / "a", **values)
    merged.save_pretrained(tmp_path / "merged")
    for file in ("tokenizer.model", "config.json"):
        shutil.copy(folder / file, tmp_path / "merged")
    ours = run(folder, tmp_path / "ours.gguf", "--outtype", "f32", "--adapter", str(tmp_path / "a"))
    found, pefts = tensors_of(ours), tensors_of(run(tmp_path / "merged", tmp_path / "p.gguf", "--outtype", "f32"))
    plain = tensors_of(run(folder, tmp_path / "plain.gguf", "--outtype", "f32"))
    for name, tensor in pefts.items():
        np.testing.assert_allclose(found[name], tensor, atol=2e-6)
    changed = {name.split(".")[2] for name in found if not np.array_equal(found[name], plain[name])}
    assert changed == {"attn_q", "attn_k", "ffn_down"}
    assert value(ours, "general.name") == "a"


def test_adapters_own_tokenizer_is_taken(folder, tmp_path):
    save_adapter(folder, tmp_path / "a")
    change_config(folder, vocab_size=420)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = load_file(folder / "model.safetensors")[name]
        change_tensors(folder, **{name.replace(".", "__"): torch.cat([table, table[: 420 - len(table)]])})
    shutil.copy(folder / "tokenizer.model", tmp_path / "a")
    (tmp_path / "a" / "added_tokens.json").write_text(json.dumps({"[PAD]": 419}))
    (tmp_path / "a" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    reader = run(folder, tmp_path / "m.gguf", "--adapter", str(tmp_path / "a"))
    assert value(reader, "tokenizer.ggml.padding_token_id") == 419


def test_adapters_folder_alone_finds_its_base(folder, tmp_path):
    save_adapter(folder, tmp_path / "a")  # whose adapter_config.json names the base
    run(folder, tmp_path / "both.gguf", "--adapter", str(tmp_path / "a"))
    run(tmp_path / "a", tmp_path / "alone.gguf")
    assert (tmp_path / "alone.gguf").read_bytes() == (tmp_path / "both.gguf").read_bytes()


def test_merged_values_are_rounded_once(tmp_path):
    """From a bfloat16 base to float16: not by way of bfloat16, and the norms stay as they are."""
    folder = write_model(tmp_path / "m", dtype=torch.bfloat16)
    save_adapter(folder, tmp_path / "a")
    wide = tensors_of(run(folder, tmp_path / "w.gguf", "--adapter", str(tmp_path / "a"), "--outtype", "f32"))
    half = tensors_of(run(folder, tmp_path / "h.gguf", "--adapter", str(tmp_path / "a")))
    for name, tensor in wide.items():
        expected = tensor if tensor.ndim == 1 else tensor.astype(np.float16).astype(np.float32)
        assert np.array_equal(half[name], expected), name
    query = torch.from_numpy(wide["blk.0.attn_q.weight"].copy())
    assert not torch.equal(query, query.bfloat16().float())


def test_base_quantization_is_merged_into(folder, tmp_path):
    save_adapter(folder, tmp_path / "a")
    (tmp_path / "a" / "train_config.json").write_text(json.dumps({"base_quantization": "nf4"}))
    flags = ["--outtype", "f32", "--adapter", str(tmp_path / "a")]
    recorded = tensors_of(run(folder, tmp_path / "r.gguf", *flags))
    named = tensors_of(run(folder, tmp_path / "n.gguf", *flags, "--base_quantization", "nf4"))
    whole = tensors_of(run(folder, tmp_path / "w.gguf", *flags, "--base_quantization", "none"))
    up = "blk.0.ffn_up.weight"  # not adapted, but trained around as it was quantized
    assert all(np.array_equal(recorded[name], named[name]) for name in named)
    assert 0.001 < np.abs(named[up] - whole[up]).mean() / np.abs(whole[up]).mean() < 0.2


def test_adapter_in_the_wrong_place(folder, tmp_path):
    save_adapter(folder, tmp_path / "a")
    with pytest.raises(InputError, match="is a LoRA adapter, no"):
        run(tmp_path / "a", tmp_path / "m.gguf", "--adapter", str(tmp_path / "a"))
    with pytest.raises(MissingInput, match=r"--adapter .* has no adapter_config\.json; found there: config\.json"):
        run(folder, tmp_path / "m.gguf", "--adapter", str(folder))


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, r"its model_type is 'bloom', not llama"),
        ({"model_type": "opt"}, r"its model_type is 'opt', not llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama.cpp's LLaMA computes silu"),
        ({"quantization_config": {"quant_method": "exl2"}}, "was saved quantized by exl2, which is not read here"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not one of default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, r"rope type 'linear' needs a number above 0 for 'factor'; found None"),
        ({"num_attention_heads": 3}, r"num_attention_heads to be a multiple of num_key_value_heads, found 3 and 2"),
        ({"intermediate_size": 97}, r"mlp\.gate_proj\.weight is \[96, 64\], config\.json makes it \[97, 64\]"),
        ({"num_hidden_layers": 3}, r"lacks weights of its model: model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"holds weights of layer 1 \(counted from 0\), and its config"),
        ({"vocab_size": 9}, r"model\.embed_tokens\.weight is \[\d+, 64\], config\.json makes it \[9, 64\]"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_exported(folder, tmp_path, changes, message):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "m.gguf")
    assert nothing_is_left(folder)


def test_missing_sizes_weights_and_folders(folder, tmp_path):
    with pytest.raises(MissingInput, match=r"config\.json is missing|no folder"):
        run(tmp_path / "none", tmp_path / "m.gguf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "intermediate_size"}))
    with pytest.raises(InputError, match=r"config\.json: 'intermediate_size' is missing"):
        run(folder, tmp_path / "m.gguf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"no model\*\.safetensors or pytorch_model\*\.bin in"):
        run(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("number", "outtype", "message"),
    [
        (1e5, "f16", r"blk\.1\.ffn_up\.weight holds 100000, more than f16 can; pass --outtype bf16 or f32"),
        (-1e7, "q8_0", "holds 1e.07, more than q8_0 can; pass --outtype bf16 or f32"),
        (3.4e38, "bf16", "more than bf16 can"),
        (float("nan"), "f32", "holds infinity or NaN: the model is damaged"),
        (float("inf"), "f16", "holds infinity or NaN: the model is damaged"),
        (float("nan"), "q8_0", "holds infinity or NaN: the model is damaged"),
    ],
)
def test_values_that_the_type_cannot_hold(folder, tmp_path, number, outtype, message):
    weight = load_file(folder / "model.safetensors")[WEIGHT]
    weight[7, 3] = number
    change_tensors(folder, **{WEIGHT.replace(".", "__"): weight})
    with pytest.raises(NumbersOverflow, match=message):
        run(folder, tmp_path / "m.gguf", "--outtype", outtype)
    assert nothing_is_left(folder)


def test_largest_float16_is_no_overflow(folder, tmp_path):
    weight = load_file(folder / "model.safetensors")[WEIGHT]
    weight[7, 3] = 65519  # rounds down to the largest, 65504
    change_tensors(folder, **{WEIGHT.replace(".", "__"): weight})
    assert tensors_of(run(folder, tmp_path / "m.gguf"))["blk.1.ffn_up.weight"][7, 3] == 65504


def test_without_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match=r"need the package gguf .*pip install gguf=="):
        export(parse_arguments(["--input_dir", str(folder), "--output_file", str(tmp_path / "m.gguf")]))


# The file -------------------------------------------------------------------------------------------------------


def test_existing_output_needs_overwrite(folder, tmp_path):
    target = tmp_path / "m.gguf"
    target.write_text("old")
    with pytest.raises(OutputExists, match="pass --overwrite"):
        run(folder, target)
    assert target.read_text() == "old"
    run(folder, target, "--overwrite")
    with pytest.raises(InputError, match=r"is a folder, expected a file's name"):
        run(folder, tmp_path)


def test_no_input_is_overwritten(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        with pytest.raises(InputError, match=r"the output .* is, or holds, what is read from: --input_dir \("):
            run(base, base / name, "--overwrite")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    run(base, base / "model.gguf")
    run(base, base / "model.gguf", "--overwrite")  # nobody's input


def test_a_tokenizer_model_that_is_none_is_not_passed_over(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"tokenizer\.model \(7 bytes\) is neither a SentencePiece model"):
        run(base, tmp_path / "m.gguf")


def test_second_writer_is_refused(folder, tmp_path):
    with locked(tmp_path / "m.gguf"), pytest.raises(OutputExists, match="another process is writing"):
        run(folder, tmp_path / "m.gguf")


def test_not_enough_disk_is_said_before_writing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(NotEnoughSpace, match=r"needs 0\.07 GB and its disk has 0\.00 GB free"):
        run(folder, tmp_path / "m.gguf")


def test_disk_that_runs_full_leaves_the_old_output(folder, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_text("old")

    def full(placed):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "encoded_blocks", full)
    with pytest.raises(NotEnoughSpace, match="the disk ran full"):
        run(folder, tmp_path / "m.gguf", "--overwrite")
    assert (tmp_path / "m.gguf").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.gguf"]


def test_damage_on_the_way_to_the_disk_is_found(folder, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_text("old")
    size = (
        tmp_path / "m" / "model.safetensors"
    ).stat().st_size // 2  # within the GGUF file's tensors, of half the size
    fsync = os.fsync

    def flip(descriptor: int) -> None:
        path = f"/proc/self/fd/{descriptor}"
        with open(path, "r+b") as file:
            file.seek(size - 1000)
            byte = file.read(1)[0]
            file.seek(size - 1000)
            file.write(bytes([byte ^ 1]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(InputError, match=r"reads back otherwise than it was written \(\S+weight\)"):
        run(folder, tmp_path / "m.gguf", "--overwrite")
    assert (tmp_path / "m.gguf").read_text() == "old"


def test_the_file_is_on_the_disk_before_it_takes_its_name(folder, tmp_path, monkeypatch):
    events = watch_disk(tmp_path, monkeypatch)
    run(folder, tmp_path / "m.gguf")
    assert events == [("fsync", ".m.gguf.partial"), ("rename", "m.gguf"), ("fsync", ".")]


@pytest.mark.parametrize("key", ["tokenizer.ggml.scores", "llama.rope.freq_base", "general.name"])
def test_metadata_is_read_back_too(folder, tmp_path, monkeypatch, key):
    get_field = gguf.GGUFReader.get_field
    other = {"tokenizer.ggml.scores": [0.5], "llama.rope.freq_base": 1.0, "general.name": "x"}[key]

    class Field:
        def contents(self):
            return other

    monkeypatch.setattr(gguf.GGUFReader, "get_field", lambda self, k: Field() if k == key else get_field(self, k))
    with pytest.raises(InputError, match=rf"reads back otherwise than it was written \({key}\)"):
        run(folder, tmp_path / "m.gguf")


# The command as a process -----------------------------------------------------------------------------------------


def command(folder: Path, target: Path, *flags: str) -> list[str]:
    module = [sys.executable, "-m", "convert.export_gguf"]
    return [*module, "--input_dir", str(folder), "--output_file", str(target), *flags]


def test_command_says_what_it_does_and_a_mistake_is_one_line(folder, tmp_path):
    good = run_command(command(folder, tmp_path / "m.gguf"))
    assert good.returncode == 0, good.stderr
    assert "wrote" in good.stdout
    assert "exporting" in good.stderr
    assert "verifying" in good.stderr
    assert "exists already; pass --overwrite" in mistake_of(command(folder, tmp_path / "m.gguf"))


SLOW_WRITER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from alpaca.formats.gguf import writer
from convert import export_gguf as command
blocks = writer.encoded_blocks
def slow(placed):
    time.sleep(0.2)
    yield from blocks(placed)
writer.encoded_blocks = slow
sys.argv = sys.argv[1:]
command.run_command(command.main)
"""


@pytest.mark.parametrize(
    "signal_number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_leaves_no_output_and_can_be_repeated(folder, tmp_path, signal_number):
    partial = tmp_path / ".m.gguf.partial"
    ended = end_while_writing(partial, signal_number, SLOW_WRITER, *command(folder, tmp_path / "m.gguf")[2:])
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "m.gguf").exists()
    run(folder, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.gguf"]


MEMORY_PROBE = """
import re, sys, threading, time
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
from convert import export_gguf as command
imported = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
command.main()
print("kib", imported, peak)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 2816, "num_attention_heads": 16}
    folder = write_model(tmp_path_factory.mktemp("large"), dtype=torch.bfloat16, **sizes)
    assert (folder / "model.safetensors").stat().st_size > 85e6
    return folder


@pytest.mark.parametrize(
    "outtype", ["q8_0", pytest.param("f16", marks=pytest.mark.slow), pytest.param("f32", marks=pytest.mark.slow)]
)
def test_memory_is_a_few_blocks_of_rows(large, tmp_path, outtype):
    done = run_code(MEMORY_PROBE, *command(large, tmp_path / "m.gguf", "--outtype", outtype)[2:])
    assert done.returncode == 0, done.stderr
    imported, peak = (int(kib) * 1024 for kib in done.stdout.split()[-2:])
    assert peak - imported < 40e6
