"""Nothing is lost: resumed = uninterrupted, whole or absent, and what is final is what was trained."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.files import atomic
from alpaca.files.locks import locked
from alpaca.text.loading import load_tokenizer
from alpaca.training import loop
from alpaca.training.checkpoints import digests, final, loading, saving, state
from alpaca.training.checkpoints.loading import find_checkpoint
from alpaca.training.checkpoints.state import list_checkpoints
from alpaca.training.configuration.config import TrainConfig, make_config
from alpaca.training.distributed import World
from alpaca.training.loop import TrainingStopped, train
from tests.conftest import ROOT
from tests.samples import sampled
from tests.training.conftest import SETTINGS, command, flags
from tests.training.test_loop import history
from tests.training.worker import fill_disk

Configure = Callable[..., TrainConfig]
ALONE = World(rank=0, num_processes=1, device=torch.device("cpu"))


class Crash(Exception):
    """Not an error of ours: the end of a run at any moment."""


def crash_after(step: int) -> Callable[[dict], None]:
    def on_step(entry: dict) -> None:
        if entry["step"] == step:
            raise Crash("crashed on purpose")

    return on_step


def without_rates(folder: Path) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in log]


def assert_same_run(left: Path, right: Path) -> None:
    """Bit for bit: the log and the bytes of the weights."""
    assert without_rates(left) == without_rates(right)
    assert (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


# Resumed = uninterrupted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", sampled(["tiny_llama", "tiny_opt"], "tiny_opt"))  # which has dropout, too
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    base: str, configure: Configure, tmp_path: Path, request: pytest.FixtureRequest
):
    values = {
        "model_name_or_path": str(request.getfixturevalue(base)),
        "save_steps": 4,
        "logging_steps": 3,
        "val_set_size": 4,
        "max_steps": 12,
    }
    values |= {"eval_strategy": "steps", "eval_steps": 5, "weight_decay": 0.1}
    whole = train(configure(output_dir=str(tmp_path / "whole"), **values))
    config = configure(output_dir=str(tmp_path / "resumed"), **values)
    with pytest.raises(Crash, match="on purpose"):
        train(config, on_step=crash_after(6))
    with pytest.raises(Crash, match="on purpose"):
        train(dataclasses.replace(config, resume_from_checkpoint="auto"), on_step=crash_after(11))
    assert [folder.name for folder in list_checkpoints(tmp_path / "resumed")] == ["checkpoint-8"]
    resumed = train(dataclasses.replace(config, resume_from_checkpoint="auto"))
    assert_same_run(whole, resumed)


@pytest.mark.slow
def test_dropout_goes_on_where_it_was(
    configure: Configure, tiny_opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The test above must be able to fail: with another random state it does."""
    config = configure(model_name_or_path=str(tiny_opt), max_steps=6, save_steps=4)
    whole = history(train(config))
    monkeypatch.setattr(loading, "_restore_random_state", lambda *arguments: None)
    again = dataclasses.replace(config, resume_from_checkpoint=f"{config.output_dir}/checkpoint-4")
    resumed = history(train(again))
    assert resumed[:4] == whole[:4]
    assert resumed[4] != whole[4]


@pytest.mark.slow
def test_killed_then_terminated_then_finished(configure: Configure, tmp_path: Path):
    """kill -9 after a checkpoint, SIGTERM in the next run, the third ends: the weights are the uninterrupted ones."""
    values = {"num_train_epochs": 14, "save_steps": 10}
    whole = train(configure(output_dir=str(tmp_path / "whole"), **values))
    config = configure(output_dir=str(tmp_path / "killed"), **values)
    output_dir = Path(config.output_dir)
    killed = start(config)
    wait_until(lambda: list_checkpoints(output_dir))
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    first = int(list_checkpoints(output_dir)[0].name.partition("-")[2])
    config = dataclasses.replace(config, resume_from_checkpoint="auto")
    terminated = start(config)
    said = read_until(terminated, "train:")
    terminated.send_signal(signal.SIGTERM)
    said += terminated.communicate(timeout=60)[1]
    assert terminated.returncode == 128 + signal.SIGTERM, said
    assert "resumed from" in said
    assert "go on with --resume_from_checkpoint auto" in said
    assert "Traceback" not in said
    assert int(list_checkpoints(output_dir)[0].name.partition("-")[2]) > first
    assert_same_run(whole, train(config))


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [7, 1])  # 1: it is killed while it saves
def test_killed_at_any_moment(save_steps: int, configure: Configure, tmp_path: Path):
    values = {"num_train_epochs": 40 if save_steps > 1 else 16, "save_steps": save_steps}
    whole = train(configure(output_dir=str(tmp_path / "whole"), **values))
    config = configure(output_dir=str(tmp_path / "killed"), resume_from_checkpoint="auto", **values)
    for delay_s in torch.rand(12, generator=torch.Generator().manual_seed(0)).tolist():
        process = start(config)
        read_until(process, "train:")
        time.sleep(delay_s)
        process.kill()
        process.communicate()
    assert_same_run(whole, train(config))


def start(config: TrainConfig) -> subprocess.Popen[str]:
    threads = str(torch.get_num_threads())  # sums depend on their number in the last bit
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    return subprocess.Popen(command(flags(config)), stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def wait_until(done: Callable[[], object], *, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    said = ""
    while text not in said:
        letter = process.stderr.read(1)
        assert letter, said
        said += letter
    return said


# When checkpoints are written ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_by_steps_with_a_limit(configure: Configure):
    folder = train(configure(save_steps=2, save_total_limit=2, max_steps=7))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6", "checkpoint-4"]


@pytest.mark.slow
def test_by_epoch_by_time_or_not_at_all(configure: Configure, tmp_path: Path):
    def names(**values: object) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        few = {"global_batch_size": 20, "num_train_epochs": 2, "save_total_limit": 99}
        folder = train(configure(output_dir=str(folder), **few, **values))
        return [path.name for path in list_checkpoints(folder)]

    assert names(save_strategy="epoch") == ["checkpoint-4", "checkpoint-2"]
    assert len(names(save_minutes=1e-12)) == 4
    assert names(save_minutes=1e-12, save_strategy="no") == []
    assert names(save_minutes=0) == []


@pytest.mark.slow
def test_half_written_and_damaged_checkpoints_are_passed_over(configure: Configure, caplog: pytest.LogCaptureFixture):
    config = configure(save_steps=4, save_total_limit=9)
    folder = train(config)
    shutil.copytree(folder / "checkpoint-12", folder / ".checkpoint-13.partial")
    (folder / ".checkpoint-13.lock").touch()
    shutil.copytree(folder / "checkpoint-12", folder / "checkpoint-14")
    (folder / "checkpoint-14" / "trainer_state.json").unlink()
    shard = folder / "checkpoint-12" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert find_checkpoint(folder, "auto", world=ALONE) == folder / "checkpoint-8"
    assert "skipped a damaged checkpoint" in caplog.text
    assert "expected" in caplog.text
    with pytest.raises(InputError, match=r"__0_0.distcp: expected \d+ bytes, found \d+"):
        find_checkpoint(folder, str(folder / "checkpoint-12"), world=ALONE)
    with pytest.raises(MissingInput, match=r"no checkpoint at .*checkpoint-99; in .*checkpoint-4"):
        find_checkpoint(folder, str(folder / "checkpoint-99"), world=ALONE)
    train(dataclasses.replace(config, resume_from_checkpoint="auto"))
    assert not list(folder.glob(".checkpoint*"))


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run of 9 steps with its checkpoints 4 and 8: the configuration, and the folder."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    values = {"model_name_or_path": str(tiny_llama), "data_path": str(records), "output_dir": str(folder)}
    config = make_config({**values, **SETTINGS, "max_steps": 9, "save_steps": 4, "save_total_limit": 9})
    return config, train(config)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "random-0.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["first bit", "a bit in the middle", "last bit", "truncated", "empty", "missing"])
@pytest.mark.fast_rows(6)
def test_a_damaged_checkpoint_is_skipped_with_the_file_named(
    name: str, damage: str, saved: tuple[TrainConfig, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out = tmp_path / "out"
    for folder in list_checkpoints(saved[1]):
        shutil.copytree(folder, out / folder.name)
    assert find_checkpoint(out, "auto", world=ALONE) == out / "checkpoint-8"
    path = out / "checkpoint-8" / name
    size = path.stat().st_size
    if damage in ("truncated", "empty"):
        os.truncate(path, size - 1 if damage == "truncated" else 0)
        if (name, damage) == ("trainer_state.json", "truncated"):  # of a final newline nothing depends
            os.truncate(path, size - 2)
    elif damage == "missing":
        path.unlink()
    else:
        flip_bit(path, {"f": 0, "a": size // 2, "l": size - 3}[damage[0]])
    assert find_checkpoint(out, "auto", world=ALONE) == out / "checkpoint-4"
    assert f"skipped a damaged checkpoint: {path}" in caplog.text
    with pytest.raises((InputError, MissingInput), match=re.escape(str(path))):
        find_checkpoint(out, str(path.parent), world=ALONE)


def test_no_flipped_bit_in_the_state_goes_unnoticed(saved: tuple[TrainConfig, Path], tmp_path: Path):
    path = tmp_path / "trainer_state.json"
    shutil.copy(saved[1] / "checkpoint-4" / path.name, path)
    before, content = state.read_state(tmp_path), path.read_bytes()
    noticed = 0
    for position in range(0, len(content), 7):
        flip_bit(path, position)
        try:
            assert state.read_state(tmp_path) == before  # white space, or a letter of the digest's own name
        except InputError:
            noticed += 1
        path.write_bytes(content)
    assert noticed > len(content) // 7 // 2


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(saved: tuple[TrainConfig, Path], tmp_path: Path):
    """And the damaged one neither counts among those kept nor stays."""
    out = tmp_path / "out"
    for folder in list_checkpoints(saved[1]):
        shutil.copytree(folder, out / folder.name)
    flip_bit(out / "checkpoint-8" / "__0_0.distcp", 5000)
    again = dataclasses.replace(saved[0], output_dir=str(out), resume_from_checkpoint="auto")
    seen: list[list[str]] = []
    again = dataclasses.replace(again, save_steps=3, save_total_limit=2)
    train(again, on_step=lambda entry: seen.append([folder.name for folder in list_checkpoints(out)]))
    assert seen == [["checkpoint-8", "checkpoint-4"]] * 2 + [["checkpoint-6", "checkpoint-4"]] * 3
    assert_same_run(out, saved[1])


def test_what_the_disk_does_not_give_back_is_no_checkpoint(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    config, real = configure(save_steps=4), saving._read_back

    def read_back(folder: Path, files: dict) -> None:
        if folder.name == ".checkpoint-8.partial":
            flip_bit(folder / "__0_0.distcp", 5000)
        real(folder, files)

    monkeypatch.setattr(saving, "_read_back", read_back)
    with pytest.raises(InputError, match=r"__0_0.distcp: expected SHA-256 .*: the disk does not give back what was"):
        train(config)
    assert [path.name for path in Path(config.output_dir).glob("*checkpoint*")] == ["checkpoint-4"]


STAGES = (
    (saving, "_open_aside"), (saving, "_read_back"), (saving, "_write_state"), (digests, "_digest_file"),
    (saving, "_remove_oldest"), (atomic, "fsync"),
)  # fmt: skip


@pytest.mark.slow
def test_killed_at_any_stage_of_saving(saved: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch):
    """What a kill would leave at each stage, between the renames too, is copied; each copy goes on to the same end."""
    config = dataclasses.replace(saved[0], output_dir=str(tmp_path / "out"), save_total_limit=1)
    left: list[Path] = []

    def leave(stage: str) -> None:
        if list_checkpoints(tmp_path / "out"):
            left.append(shutil.copytree(tmp_path / "out", tmp_path / f"{len(left)}-{stage}"))

    def watch(owner: object, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: (leave(name), real(*given, **named))[1])

    for owner, name in STAGES:
        watch(owner, name)
    watch(Path, "rename")
    train(config)
    monkeypatch.undo()
    stages = {folder.name.partition("-")[2] for folder in left}
    assert stages == {name for _, name in STAGES} | {"rename"}
    newest = [int(list_checkpoints(folder)[0].name.partition("-")[2]) for folder in left]
    assert set(newest) == {4, 8}
    for stage in sorted(stages):  # one of each goes on
        folder = next(folder for folder in left if folder.name.endswith(stage))
        again = dataclasses.replace(saved[0], output_dir=str(folder), resume_from_checkpoint="auto")
        assert_same_run(train(again), saved[1])
    for folder in left:  # all could
        shutil.rmtree(folder / ".checkpoint-8.partial", ignore_errors=True)
        assert find_checkpoint(folder, "auto", world=ALONE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2000k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs more rights")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("seen_coming", [True, False])
@pytest.mark.fast_rows(1)
def test_a_disk_that_runs_full_costs_nothing(seen_coming: bool, configure: Configure, small_disk: Path, monkeypatch):
    """Room for one checkpoint, not for two. Before any of it is written, or in the middle of a file."""
    if not seen_coming:
        monkeypatch.setattr(saving, "require_free_space", lambda folder, num_bytes: None)
    config = configure(save_steps=4, output_dir=str(small_disk / "out"))
    text = "needs 0.00 GB and its disk" if seen_coming else "ran full .* checkpoint-4 is untouched: --resume_from"
    with pytest.raises(NotEnoughSpace, match=text):
        train(config)
    assert [path.name for path in Path(config.output_dir).glob("*checkpoint*")] == ["checkpoint-4"]
    assert find_checkpoint(Path(config.output_dir), "auto", world=ALONE)


@pytest.mark.slow
def test_a_disk_that_runs_full_late_in_a_file(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    """The same without a mount, late in a file."""
    config, real = configure(save_steps=2, max_steps=5), digests._HashedStream.write
    monkeypatch.setattr(digests._HashedStream, "write", fill_disk(real, after_bytes=500_000))
    with pytest.raises(NotEnoughSpace, match=r"ran full while .*checkpoint-4 was written; free some space\. "):
        train(config)
    assert [path.name for path in Path(config.output_dir).glob("*checkpoint*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert history(train(dataclasses.replace(config, resume_from_checkpoint="auto")), "step") == list(range(1, 6))


def test_a_folder_that_cannot_be_written_to_is_said_before_the_model_is_loaded(configure: Configure, monkeypatch):
    monkeypatch.setattr("alpaca.training.run.load_model", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"--output_dir /proc/alpaca cannot be written to: .*; choose another folder"):
        train(configure(output_dir="/proc/alpaca"))


def test_nothing_to_resume_starts_anew_and_says_so(configure: Configure, caplog: pytest.LogCaptureFixture):
    folder = train(configure(resume_from_checkpoint="auto", max_steps=1))
    assert "no whole checkpoint" in caplog.text
    assert len(history(folder)) == 1


@pytest.mark.slow
def test_a_failed_save_leaves_the_old_checkpoint(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    config, real = configure(save_steps=4), saving._write_state

    def fail(trainee, folder, files):
        if trainee.progress.step == 8:
            raise OSError("disk on fire")
        real(trainee, folder, files)

    monkeypatch.setattr(saving, "_write_state", fail)
    with pytest.raises(InputError, match=r"could not be written: disk on fire; mend that\. checkpoint-4 is untouched"):
        train(config)
    assert [path.name for path in Path(config.output_dir).iterdir() if "checkpoint" in path.name] == ["checkpoint-4"]
    assert find_checkpoint(Path(config.output_dir), "auto", world=ALONE).name == "checkpoint-4"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"learning_rate": 5e-4}, "learning_rate was 0.001 and is 0.0005"),
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"global_batch_size": 4}, "global_batch_size was 8 and is 4"),
        ({"num_train_epochs": 4}, "steps was 15 and is 20"),
        ({"model_max_length": 200}, "data was '40 examples, sha256 [0-9a-f]{16}' and is "),
    ],
)
@pytest.mark.fast_rows(1)
def test_another_configuration_is_refused(changed: dict, text: str, configure: Configure):
    config = configure(save_steps=1, max_steps=-1)
    with pytest.raises(Crash, match="on purpose"):
        train(config, on_step=crash_after(2))
    with pytest.raises(InputError, match=f"belongs to another run: .*{text}"):
        train(dataclasses.replace(config, resume_from_checkpoint="auto", **changed))


def test_a_mean_of_means_needs_its_micro_batches(configure: Configure):
    config = configure(save_steps=1, max_steps=2, loss_average="micro_batch")
    train(config)
    with pytest.raises(InputError, match="micro_batch_size was 4 and is 2"):
        train(dataclasses.replace(config, resume_from_checkpoint="auto", per_device_train_batch_size=2))


@pytest.mark.slow
def test_other_micro_batches_may_resume(configure: Configure):
    config = configure(save_steps=2, max_steps=5)
    with pytest.raises(Crash, match="on purpose"):
        train(config, on_step=crash_after(3))
    folder = train(dataclasses.replace(config, resume_from_checkpoint="auto", per_device_train_batch_size=2))
    assert history(folder, "step") == list(range(1, 6))


# The output folder ----------------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_not_overwritten(configure: Configure, tmp_path: Path):
    config = configure(max_steps=1, save_steps=1)
    folder = train(config)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(OutputExists, match=r"is not empty .*--resume_from_checkpoint auto, replace it by --overwrite"):
        train(config)
    (tmp_path / "file").touch()
    with pytest.raises(OutputExists, match="is a file"):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "file")))
    train(dataclasses.replace(config, overwrite_output_dir=True, max_steps=2, save_steps=99))
    assert not list_checkpoints(folder)  # those of the first run are not this one's
    assert (folder / "model.safetensors").read_bytes() != before


def test_overwriting_leaves_nothing_of_the_other_model(
    configure: Configure, tiny_llama: Path, tiny_opt: Path, tmp_path: Path
):
    values = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "save_strategy": "no"}
    train(configure(model_name_or_path=str(tiny_llama), **values))
    train(configure(model_name_or_path=str(tiny_opt), overwrite_output_dir=True, **values))
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    texts = ["Below is", " two  spaces"]
    assert load_tokenizer(tmp_path / "out").encode_batch(texts) == load_tokenizer(tiny_opt).encode_batch(texts)


def test_two_runs_do_not_write_the_same_output(configure: Configure, tmp_path: Path):
    with locked(tmp_path / "out"), pytest.raises(OutputExists, match="another process is writing"):
        train(configure(output_dir=str(tmp_path / "out")))


def test_resuming_without_a_checkpoint_does_not_replace_a_finished_model(configure: Configure, tmp_path: Path):
    config = configure(output_dir=str(tmp_path / "out"), max_steps=1, save_strategy="no")
    train(config)
    with pytest.raises(OutputExists, match="is not empty"):
        train(dataclasses.replace(config, resume_from_checkpoint="auto"))


def test_the_base_model_is_not_overwritten(configure: Configure, tiny_llama: Path):
    with pytest.raises(InputError, match="--output_dir is also --model_name_or_path"):
        train(configure(output_dir=str(tiny_llama), overwrite_output_dir=True))


def test_inputs_where_checkpoints_go_are_not_removed(configure: Configure, tiny_llama: Path, tmp_path: Path):
    base = shutil.copytree(tiny_llama, tmp_path / "out" / "checkpoint-500")  # of another trainer
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        with pytest.raises(InputError, match=rf"is, or holds, what is read from: --{name} \(.*checkpoint-500"):
            train(configure(**{name: str(base)}, output_dir=str(tmp_path / "out"), overwrite_output_dir=True))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_stopping_without_checkpoints_saves_none(configure: Configure):
    config = configure(save_strategy="no")
    with pytest.raises(TrainingStopped, match="nothing was saved"):
        train(config, should_stop=lambda: True)
    assert not list_checkpoints(Path(config.output_dir))


def test_a_mistake_leaves_no_trace_that_blocks_the_next_try(configure: Configure, tmp_path: Path):
    with pytest.raises(MissingInput, match=r"missing\.json"):
        train(configure(data_path=str(tmp_path / "missing.json")))
    with pytest.raises(MissingInput, match=r"no model at .*missing"):
        train(configure(model_name_or_path=str(tmp_path / "missing")))
    train(configure(max_steps=1))


# The final model ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("charts")
@pytest.mark.slow
def test_the_final_folder_is_what_was_trained(configure: Configure, tiny_llama: Path, tmp_path: Path, monkeypatch):
    half = shutil.copytree(tiny_llama, tmp_path / "half")
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).save_pretrained(half)
    kept = {}
    monkeypatch.setattr(
        loop, "finish", lambda run, *, real=loop.finish, **given: (kept.update(run=run), real(run, **given))
    )
    folder = train(configure(model_name_or_path=str(half), max_steps=3, save_steps=2))
    exact = train(
        configure(model_name_or_path=str(half), max_steps=3, save_dtype="float32", output_dir=str(tmp_path / "exact"))
    )
    trained = dict(kept["run"].trainee.model.state_dict())
    for output, dtype in ((folder, torch.float16), (exact, torch.float32)):
        tensors = load_file(output / "model.safetensors")
        assert tensors.keys() == trained.keys()
        assert all(torch.equal(tensors[name], trained[name].to(dtype)) for name in tensors)
        config = json.loads((output / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(dtype)[6:]
        assert (config["vocab_size"], config["pad_token_id"], config["use_cache"]) == (481, 480, True)
        assert config["architectures"] == ["LlamaForCausalLM"]
        model = AutoModelForCausalLM.from_pretrained(output)
        assert model.dtype == dtype
        assert not model.generation_config.do_sample
        assert len(AutoTokenizer.from_pretrained(output)) == load_tokenizer(output).size == 481
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-2", "config.json", "generation_config.json", "loss.png", "model.safetensors", "report.html",
        "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "train_config.json",
        "trainer_state.json",
    }  # fmt: skip


def test_tied_weights_are_saved_once(configure: Configure, tiny_opt: Path):
    folder = train(configure(model_name_or_path=str(tiny_opt), max_steps=2))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, tensors["model.decoder.embed_tokens.weight"])
    assert load_tokenizer(folder).encode("Hello") == load_tokenizer(tiny_opt).encode("Hello")


def test_several_files_replace_one_and_the_other_way_round(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    config = configure(max_steps=1, overwrite_output_dir=True)
    folder = train(config)
    whole = load_file(folder / "model.safetensors")
    monkeypatch.setattr(final, "MAX_SHARD_BYTES", 100_000)
    train(config)
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.items())
    monkeypatch.undo()
    train(config)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_damaged_final_file_is_caught_before_it_replaces_anything(what: str, configure: Configure, monkeypatch):
    config = configure(max_steps=2, save_steps=1)
    folder = train(config)
    before, real = read_files(folder), final._write_final_weights

    def damage(model, specs, aside: Path, world) -> None:
        real(model, specs, aside, world)
        content = bytearray((aside / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (aside / "model.safetensors").write_bytes(content)

    if what == "weights":
        monkeypatch.setattr(final, "_write_final_weights", damage)
    else:
        monkeypatch.setattr(final, "load_tokenizer", lambda folder: load_tokenizer(config.model_name_or_path))
    with pytest.raises(InputError, match=r"is not what is in memory \((lm_head.weight|the tokenizer)\)"):
        train(dataclasses.replace(config, resume_from_checkpoint=str(folder / "checkpoint-2")))
    assert read_files(folder) == before


def read_files(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "train_config.json"]
    return {path.name: path.read_bytes() for path in files}


def test_too_small_a_disk_is_said_before_training(configure: Configure, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    steps: list[dict] = []
    with pytest.raises(NotEnoughSpace, match=r"needs 0.00 GB and its disk has 0.00 GB free"):
        train(configure(), on_step=steps.append)
    assert not steps


def test_a_stop_after_the_last_step_can_still_finish(configure: Configure, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    config = configure(max_steps=2)
    answers = iter([False, True])
    with pytest.raises(TrainingStopped, match="stopped after step 2 of 2"):
        train(config, should_stop=lambda: next(answers))
    folder = train(dataclasses.replace(config, resume_from_checkpoint="auto"))
    assert history(folder, "step") == [1, 2]
    assert "done: " in caplog.text
