"""SIGTERM, as of a cancelled job, at any change of the file system: no command leaves half a file, or a lock."""

import json
import random
from pathlib import Path

import pytest

from tests.formats.hf.test_merging import save_adapter
from tests.processes import run_code

AT_CHANGES = """
import importlib, json, os, signal, sys
from tests.disk_events import is_change
from alpaca.errors import run_command

jobs, folder = json.loads(sys.argv[1]), sys.argv[2]
modules = {job["module"]: importlib.import_module(job["module"]) for job in jobs}
import safetensors.torch, sentencepiece, tokenizers, alpaca.formats.gguf.export  # what a run imports late
count, stop_at = 0, 0

def watch(event, args):
    global count
    if stop_at and is_change(event, args) and str(args[0]).startswith(folder):
        count += 1
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

sys.addaudithook(watch)

def run(job, step):
    global stop_at
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    stop_at, sys.argv, status = step, [job["module"], *job["arguments"]], 0
    try:
        run_command(modules[job["module"]].main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    os._exit(status)

def names():
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, folders, files in os.walk(folder)
                  for name in folders + files)

for job in jobs:
    ended = []
    for step in job["steps"]:
        before = names()
        status = run(job, step)
        after = names()
        ended.append([step, status, sorted(set(after) ^ set(before))])
        if status == 0:
            break
    print(json.dumps([job["name"], ended, run(job, 0) if status else 0]))
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, llama_folder) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", llama_folder)


@pytest.mark.parametrize("num_kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_terminated_commands_leave_nothing(tmp_path, llama_3_1, llama_folder, trained, made, adapter, num_kills):
    out = tmp_path / "out"
    out.mkdir()
    base = ["--input_dir", str(llama_folder)]
    commands = {
        "convert": ("convert_llama_weights_to_hf", ["--input_dir", str(tmp_path / "in"), "--model_size", "T"]),
        "merge": ("export_hf_checkpoint", ["--base_model", str(llama_folder), "--adapter", str(adapter)]),
        "to Meta": ("export_state_dict_checkpoint", base),
        "gguf": ("export_gguf", base),
        "make_diff": ("weight_diff", ["make_diff", "--path_raw", str(llama_folder), "--path_tuned", str(trained)]),
        "recover": ("weight_diff", ["recover", "--path_raw", str(llama_folder), "--path_diff", str(made)]),
    }
    flags = {"gguf": "--output_file", "make_diff": "--path_diff", "recover": "--path_tuned"}
    rng = random.Random(0)
    jobs = []
    for name, (module, arguments) in commands.items():
        arguments = [*arguments, flags.get(name, "--output_dir"), str(out / name), "--overwrite"]
        steps = [1, *sorted(rng.sample(range(2, 60), num_kills - 1))]
        jobs.append({"name": name, "module": f"convert.{module}", "arguments": arguments, "steps": steps})
    done = run_code(AT_CHANGES, json.dumps(jobs), str(out), timeout_s=300)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, ended, finished = json.loads(line)
        assert ended[0][1] == 143, f"{name}: the first change is before the end"
        for step, status, changed in ended:
            assert status in (143, 0), f"{name}, change {step}"
            half = [path for path in changed if any(part.startswith(".") for part in Path(path).parts)]
            assert half == [], f"{name}, change {step}"
        assert finished == 0, f"{name} runs to its end afterwards"
    assert len(done.stdout.splitlines()) == len(jobs)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
