"""A conversion that is killed or finds the disk full at any moment, and one of 13B's size within 1 GB of memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.formats.meta.test_convert_llama_weights_to_hf import MEMORY_PROBE
from tests.formats.meta_sources import PUBLISHED, published_shapes
from tests.processes import run_code

AT_EVERY_CHANGE = """
import errno, json, os, signal, sys, traceback
from tests.disk_events import is_change
from pathlib import Path
from alpaca.errors import NotEnoughSpace
from convert.convert_llama_weights_to_hf import convert, parse_arguments
import safetensors, sentencepiece, tokenizers  # what a run imports late, so that children need not

os.fsync = lambda descriptor: None  # a killed process needs none, and hundreds take long
out, mode, stride, flags = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
count, stop_at = 0, 0

def watch(event, args):
    global count
    if stop_at and is_change(event, args) and isinstance(args[0], (str, Path)) and str(args[0]).startswith(out):
        count += 1
        if count == stop_at:
            if mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if ".partial/" in str(args[0]) and event == "open":
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))

sys.addaudithook(watch)

def child(step, flags):
    global stop_at
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    stop_at = step
    try:
        convert(parse_arguments(flags))
        os._exit(0 if count < step else 9)
    except NotEnoughSpace:
        os._exit(7)
    except BaseException:
        os._exit(8)

def state():
    found = {}
    for name in ("llama-t", "tokenizer"):
        folder = Path(out) / name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        found[name] = {path.name: hash(path.read_bytes()) for path in files}
    return found

assert child(10**9, flags) == 0
whole, log = state(), []
for start in ("fresh", "again"):
    step = 1 - stride
    while True:
        step += stride
        if start == "fresh":
            os.system(f"rm -rf '{out}'")
        status = child(step, [*flags, "--overwrite"])
        between = state()
        repaired = child(10**9, [*flags, "--overwrite"])
        log.append([start, step, status, [between[n] in ({}, whole[n]) for n in whole],
                    [bool(between[n]) for n in whole], repaired, state() == whole, sorted(os.listdir(out))])
        if status == 0:
            break
print(json.dumps(log))
"""


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["kill", "full disk"])
def test_stopped_at_every_change_of_the_file_system(tmp_path, llama_3_1, mode, stride):
    """Wherever a run is killed, or finds the disk full, each folder is whole or not there, and a new run mends it.

    The old output goes only when the new one is whole: for a moment between two renames its name is free, and the next
    run (or the old folder under its other name) has it.
    """
    flags = ["--input_dir", str(tmp_path / "in"), "--model_size", "T", "--output_dir", str(tmp_path / "out")]
    done = run_code(AT_EVERY_CHANGE, str(tmp_path / "out"), mode, str(stride), *flags, timeout_s=300)
    assert done.returncode == 0, done.stderr
    log = json.loads(done.stdout.splitlines()[-1])
    assert len([entry for entry in log if entry[0] == "fresh"]) > 25 // stride
    stopped = 0
    for start, step, status, whole, present, repaired, mended, names in log:
        assert all(whole), f"{start}, change {step}: a folder is half written"
        assert (repaired, mended, names) == (0, True, ["llama-t", "tokenizer"]), f"{start}, change {step}"
        assert status in ({9, 0} if mode == "kill" else {7 << 8, 9 << 8, 0}), f"{start}, change {step}: {status}"
        if mode == "full disk" and start == "again":
            assert all(present), f"change {step}: the old output is gone"
        stopped += status not in (0, 9 << 8)
    assert stopped >= 15 // stride


def write_13b(folder: Path, tokenizer: Path, *, num_layers: int) -> Path:
    """LLaMA-13B's tensors in 2 shards, their values holes in the files: made in a second, no disk."""
    from torch.serialization import skip_data

    params = {**PUBLISHED["13B"][0], "n_layers": num_layers}
    shapes = published_shapes(params, 2, 1, 32000, 13824)
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(2):
        shard = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
        with skip_data():
            torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize(
    ("num_layers", "gigabytes"), [(1, 1.2), pytest.param(40, 26.0, marks=pytest.mark.slow)], ids=["1 layer", "whole"]
)
def test_13b_converts_within_one_gigabyte(tmp_path, real, num_layers, gigabytes):
    """Anonymous memory of the whole process, torch included; all 40 layers in the slow tier."""
    if shutil.disk_usage(tmp_path).free < (gigabytes + 5) * 1e9:
        pytest.skip(f"needs {gigabytes + 5:.0f} GB of disk")
    write_13b(tmp_path / "in" / "T", real / "llama-tokenizer" / "tokenizer.model", num_layers=num_layers)
    command = ["convert.convert_llama_weights_to_hf", "--input_dir", str(tmp_path / "in"), "--model_size", "T"]
    command += ["--output_dir", str(tmp_path / "out"), "--skip_checksums"]
    done = subprocess.run([sys.executable, "-c", MEMORY_PROBE, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "out" / "llama-t").glob("*.safetensors"))
    assert written > (gigabytes - 0.5) * 1e9
    peak = int(done.stdout.split()[-1]) * 1024
    print(f"\n13B, {num_layers} layers: {written / 1e9:.1f} GB written, {peak / 1e6:.0f} MB of anonymous memory")
    assert peak < 1e9
    shutil.rmtree(tmp_path / "out")
