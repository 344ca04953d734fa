"""Weight differences as a command: disks, outputs, flags, a killed process, and memory."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alpaca.errors import InputError, NotEnoughSpace, OutputExists
from alpaca.files.atomic import replaced_folder
from alpaca.formats.diff.making import DiffConfig, make_diff
from alpaca.formats.diff.manifest import MANIFEST_NAME
from alpaca.formats.diff.recovering import RecoverConfig, recover
from alpaca.formats.diff.residual import RESIDUAL_NAME, ResidualWriter
from convert.weight_diff import parse_arguments
from tests.conftest import ROOT
from tests.formats.diff_sources import (
    both_commands,
    read_all,
    recovered,
    same_bits,
)
from tests.processes import mistake_of, run_command, running_code

pytestmark = pytest.mark.usefixtures("one_thread")


# Disks and outputs ------------------------------------------------------------------------------------------------


def test_not_enough_disk_is_said_before_writing(tmp_path, llama_folder, trained, made, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    for run in both_commands(tmp_path, llama_folder, trained, made):
        with pytest.raises(NotEnoughSpace, match=r"needs 0\.02 GB and its disk has 0\.00 GB free"):
            run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["weights", "residual"])
def test_disk_that_runs_full_leaves_the_old_output(tmp_path, llama_folder, trained, made, monkeypatch, where):
    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ("new", "back"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    if where == "weights":
        monkeypatch.setattr("alpaca.formats.hf.writing._write_piece", full)
    else:
        monkeypatch.setattr(ResidualWriter, "add", full)
    with pytest.raises(NotEnoughSpace, match="the disk ran full"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "new", overwrite=True))
    if where == "weights":
        with pytest.raises(NotEnoughSpace, match="the disk ran full"):
            recovered(llama_folder, made, tmp_path / "back", overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["back", "new", "old", "old"]


def test_what_the_disk_changes_is_found(tmp_path, llama_folder, trained, made, monkeypatch):
    from alpaca.formats.hf import writing

    write = writing._write_piece

    def rot(file, piece, dtype, progress):
        return write(file, torch.where(torch.arange(len(piece)) == 7, 0, piece).to(dtype), dtype, progress)

    monkeypatch.setattr(writing, "_write_piece", rot)
    with pytest.raises(InputError, match=r"the diff cannot be read back as written: is the disk failing\?"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "diff"))
    with pytest.raises(InputError, match="cannot be read back as written"):
        recovered(llama_folder, made, tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_existing_output_needs_overwrite(tmp_path, llama_folder, trained, made):
    for name in ("new", "back"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").touch()
    for run in both_commands(tmp_path, llama_folder, trained, made):
        with pytest.raises(OutputExists, match="pass --overwrite"):
            run()
    make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "new", overwrite=True))
    recovered(llama_folder, made, tmp_path / "back", overwrite=True)
    assert not list(tmp_path.rglob("stale"))
    assert [file.read_bytes() for file in sorted(made.iterdir())] == [
        file.read_bytes() for file in sorted((tmp_path / "new").iterdir())
    ]  # a diff is the same bytes each time


def test_no_input_is_overwritten(tmp_path, llama_folder, trained, made):
    for name, source in (("raw", llama_folder), ("tuned", trained), ("diff", made)):
        shutil.copytree(source, tmp_path / "all" / name)
    raw, tuned, diff = (tmp_path / "all" / name for name in ("raw", "tuned", "diff"))
    before = read_tree(tmp_path)
    for target in (tuned, raw, tmp_path / "all"):
        with pytest.raises(InputError, match=r"the output .* is, or holds, what is read from: --path_(raw|tuned) \("):
            make_diff(DiffConfig(path_raw=raw, path_tuned=tuned, path_diff=target, overwrite=True))
    for target in (diff, raw, tmp_path / "all"):
        with pytest.raises(InputError, match=r"the output .* is, or holds, what is read from: --path_(raw|diff) \("):
            recovered(raw, diff, target, overwrite=True)
    with pytest.raises(InputError, match="--path_raw and --path_tuned are the same folder"):
        make_diff(DiffConfig(path_raw=raw, path_tuned=raw, path_diff=tmp_path / "new"))
    assert read_tree(tmp_path) == before


def read_tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_output_below_a_file_is_refused(tmp_path, llama_folder, trained):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"the output .*file/x would lie in .*file, which is a file; choose another"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "file" / "x"))
    with pytest.raises(InputError, match=r"the output .*file is a file, expected a folder's name"):
        make_diff(DiffConfig(path_raw=llama_folder, path_tuned=trained, path_diff=tmp_path / "file", overwrite=True))
    assert read_tree(tmp_path) == {tmp_path / "file": b"kept"}


def test_second_writer_is_refused(tmp_path, llama_folder, trained, made):
    for name, run in zip(("new", "back"), both_commands(tmp_path, llama_folder, trained, made), strict=True):
        with replaced_folder(tmp_path / name), pytest.raises(OutputExists, match="another process is writing"):
            run()


# The command as a process -----------------------------------------------------------------------------------------


def test_flags_are_spelt_as_the_originals(tmp_path):
    spaced = [
        "recover",
        "--path_raw",
        "r",
        "--path_diff",
        "d",
        "--path_tuned",
        "t",
        "--check_integrity_naively",
        "False",
    ]
    joined = ["recover", "--path_raw=r", "--path-diff=d", "--path_tuned=t", "--check_integrity_naively=false"]
    expected = RecoverConfig(
        path_raw=Path("r"), path_diff=Path("d"), path_tuned=Path("t"), check_integrity_naively=False
    )
    assert parse_arguments(spaced) == parse_arguments(joined) == expected
    base = ["recover", "--path_raw=r", "--path_diff=d"]
    tests = {flag: parse_arguments([*base, *flag]).test_inference for flag in [
        (), ("--test_inference",), ("--test_inference", "True"), ("--test_inference=False",), ("--test-inference", "0"),
    ]}  # fmt: skip
    assert list(tests.values()) == [None, True, True, False, False]
    assert parse_arguments([*base, "--device", "cuda"]).device == "cuda"
    made = parse_arguments(["make_diff", "--path_raw=r", "--path_tuned=t", "--path_diff=d", "--max_shard_size=1GB"])
    assert made == DiffConfig(path_raw=Path("r"), path_tuned=Path("t"), path_diff=Path("d"), max_shard_size=10**9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: task"),
        (["undo"], "invalid choice: 'undo'"),
        (["recover", "--path_raw=r"], "required: --path_diff"),
        (["make_diff", "--path_raw=r", "--path_diff=d"], "required: --path_tuned"),
        (["recover", "--path_raw=r", "--path_diff=d", "--test_inference", "maybe"], "expected True or False, found 'm"),
        (["recover", "--path_raw=r", "--path_diff=d", "--device=tpu"], "expected cpu, cuda or cuda:N, found 'tpu'"),
    ],
)
def test_bad_command_lines(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(tmp_path, llama_folder, made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda is asked for and no GPU is there"):
        recovered(llama_folder, made, tmp_path / "back", test_inference=True, device="cuda")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "convert.weight_diff", *map(str, arguments)]


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)


def test_command_says_what_it_does_and_a_mistake_is_one_line(tmp_path, llama_folder, trained):
    diff, back = tmp_path / "diff", tmp_path / "back"
    make = run_command(command("make_diff", "--path_raw", llama_folder, f"--path_tuned={trained}", "--path_diff", diff))
    assert make.returncode == 0, make.stderr
    assert f"wrote {diff} in" in make.stdout
    assert re.search(r"diff_residual\.dat holds what float32 lost: \d+ elements \([\d.]+ %\)", make.stderr)
    arguments = ["--path_raw", llama_folder, "--path_diff", diff, "--path_tuned", back, "--test_inference", "False"]
    good = run_command(command("recover", *arguments))
    assert good.returncode == 0, good.stderr
    for step in ("checking the raw model", "adding", "verifying"):
        assert re.search(rf"{step}: 100%.*B/s", good.stderr)
    assert same_bits(read_all(back), read_all(trained))
    assert "exists already; pass --overwrite" in mistake_of(command("recover", *arguments))


STOPPED = """
import sys, time
from importlib import import_module
from convert import weight_diff
module, name, calls = import_module("alpaca." + sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
original, count = getattr(module, name), 0
def stop(*args, **options):
    global count
    count += 1
    if count == calls:
        print("here", flush=True)
        time.sleep(60)
    return original(*args, **options)
setattr(module, name, stop)
weight_diff.run_command(weight_diff.main)
"""
STAGES = {  # command, module, function in which it is stopped, at which call
    "writing the diff": ("make_diff", "formats.hf.writing", "_write_piece", 9),
    "copying files": ("make_diff", "formats.diff.making", "copy_small_files", 1),
    "before the manifest": ("make_diff", "formats.diff.making", "write_manifest", 1),
    "proving": ("make_diff", "formats.diff.arithmetic", "TensorResidual", 5),
    "renaming the diff": ("make_diff", "files.atomic", "fsync", 3),
    "checking": ("recover", "formats.diff.manifest", "sha256", 4),
    "writing the model": ("recover", "formats.hf.writing", "_write_piece", 9),
    "verifying": ("recover", "formats.diff.recovering", "differing", 1),
    "renaming the model": ("recover", "files.atomic", "fsync", 3),
}
QUICK_STAGES = ("writing the diff", "verifying")


@pytest.mark.parametrize(
    ("stage", "signal_number"),
    [(name, signal.SIGKILL) if name in QUICK_STAGES else pytest.param(name, signal.SIGKILL, marks=pytest.mark.slow)
     for name in STAGES]
    + [pytest.param(name, number, marks=pytest.mark.slow) for name in QUICK_STAGES
       for number in (signal.SIGINT, signal.SIGTERM)],
)  # fmt: skip
def test_killed_at_any_stage_it_can_be_run_again(tmp_path, llama_folder, trained, made, stage, signal_number):
    task, *stop = STAGES[stage]
    target = tmp_path / "out"
    inputs = {"make_diff": ("--path_tuned", trained, "--path_diff", target),
              "recover": ("--path_diff", made, "--path_tuned", target, "--test_inference=False")}  # fmt: skip
    arguments = [task, "--path_raw", llama_folder, *inputs[task]]
    with running_code(STOPPED, *map(str, [*stop, *arguments])) as running:
        deadline = time.monotonic() + 30
        while not running.stdout.read_text() and time.monotonic() < deadline:
            time.sleep(0.005)
        ended = running.end_by(signal_number)
    assert ended.stdout == "here\n"
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert not target.exists()
    config = parse_arguments(list(map(str, arguments)))
    make_diff(config) if isinstance(config, DiffConfig) else recover(config)
    assert same_bits(read_all(target), read_all(made if task == "make_diff" else trained))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Size -------------------------------------------------------------------------------------------------------------

MEMORY_PROBE = """
import re, sys, threading, time
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
import torch
imported = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from convert import weight_diff as command
command.main()
print("kib", imported, peak)
"""


def write_large(folder: Path, source: Path, *, rows: int, dtype: torch.dtype, seed: int) -> int:
    """A folder of random weights with the source's small files; the bytes of the largest tensor in float32."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "torch_dtype": "float16", "model_type": "x"}))
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (rows, 1024), **{f"layer{i}": (4096, 1024) for i in range(32)}}
    tensors = {name: (torch.randn(*shape, generator=generator) / 30).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return rows * 1024 * 4


@pytest.mark.slow
def test_memory_stays_at_the_largest_tensor(tmp_path, llama_folder):
    write_large(tmp_path / "raw", llama_folder, rows=32000, dtype=torch.float16, seed=1)
    largest = write_large(tmp_path / "tuned", llama_folder, rows=32001, dtype=torch.float32, seed=2)
    assert (tmp_path / "tuned" / "model.safetensors").stat().st_size > 600e6
    raw, diff = ("--path_raw", tmp_path / "raw"), ("--path_diff", tmp_path / "diff")
    back = ("--path_tuned", tmp_path / "back", "--overwrite", "--test_inference=False")
    for arguments in (
        ("make_diff", *raw, "--path_tuned", tmp_path / "tuned", *diff),
        ("recover", *raw, *diff, *back),
        ("recover", *raw, *diff, *back, "--check_integrity_naively=False"),
    ):
        if arguments[-1] == "--check_integrity_naively=False":  # as an old diff
            (tmp_path / "diff" / MANIFEST_NAME).unlink()
            (tmp_path / "diff" / RESIDUAL_NAME).unlink()
        start = time.monotonic()
        done = run([sys.executable, "-c", MEMORY_PROBE, *map(str, arguments)])
        assert done.returncode == 0, done.stderr
        imported, peak = (int(kib) * 1024 for kib in done.stdout.split()[-2:])
        print(arguments[0], f"{(peak - imported) / 1e6:.0f} MB over torch, {time.monotonic() - start:.1f} s")
        assert peak - imported < 2 * largest + 160e6  # 300 MB, of which torch itself takes 140
