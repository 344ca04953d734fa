"""Several processes on the CPU (gloo), sharded with FSDP2: they do what one does."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from alpaca.errors import InputError
from alpaca.training.checkpoints.state import list_checkpoints
from alpaca.training.configuration.config import TrainConfig, config_json
from alpaca.training.distributed import World, clip_gradients, keeps_gradients_whole
from alpaca.training.loop import train
from tests.conftest import ROOT
from tests.processes import Finished, run_ranks
from tests.training.checkpoints.test_checkpoint import assert_same_run
from tests.training.conftest import flags
from tests.training.test_loop import history, largest_difference

Configure = Callable[..., TrainConfig]


def train_in_processes(
    num_processes: int, configs: list[dict], tmp_path: Path, *, on_machine: int | None = None
) -> Finished:
    """Train configurations one after the other in `num_processes`.

    on_machine: how many of them are to think that they share a machine.
    """
    jobs = tmp_path / f"jobs-{num_processes}.json"
    jobs.write_text(json.dumps(configs))
    return run_ranks(
        "tests.training.worker", str(jobs), num_processes=num_processes, on_machine=on_machine or num_processes
    )


@pytest.fixture(scope="session")
def opt_without_dropout(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(tiny_opt, tmp_path_factory.mktemp("base") / "opt-plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.0}))
    return folder


def assert_equal_to_rounding(left: Path, right: Path) -> None:
    for key in ("loss", "eval_loss"):
        assert history(left, key) == pytest.approx(history(right, key), abs=2e-5)
    assert history(left, "grad_norm") == pytest.approx(history(right, "grad_norm"), rel=1e-4)
    assert largest_difference(left, right) < 1e-5
    assert (left / "config.json").read_text() == (right / "config.json").read_text()


@pytest.mark.parametrize(
    "names",
    [
        ("token", "uneven", "reduced every time"),
        pytest.param(("micro-batch, clipped", "tied", "hybrid, offload"), marks=pytest.mark.slow),
    ],
    ids=["sharded", "otherwise"],
)
def test_two_processes_train_what_one_does(
    names: tuple[str, ...], configure: Configure, opt_without_dropout: Path, tmp_path: Path
):
    common = {"learning_rate": 2e-4, "val_set_size": 5, "eval_strategy": "epoch", "max_steps": 3}
    small = {"per_device_train_batch_size": 2}
    runs = {
        "token": {"fsdp": "full_shard auto_wrap", "max_steps": 5},
        "micro-batch, clipped": {"loss_average": "micro_batch", "max_grad_norm": 0.01},
        "uneven": {"per_device_train_batch_size": 3, "gradient_checkpointing": True, "fsdp": "shard_grad_op auto_wrap"},
        "tied": {"model_name_or_path": str(opt_without_dropout), "weight_decay": 0.1},
        "hybrid, offload": {"fsdp": "hybrid_shard auto_wrap offload", "save_dtype": "bfloat16", **small},
        "reduced every time": small,
    }
    extra = {"reduced every time": {"free_memory": 0, "largest_gathered": str(tmp_path / "gathered")}}
    many = {name: configure(**{**common, **runs[name]}, output_dir=str(tmp_path / "two" / name)) for name in names}
    finished = train_in_processes(2, [{**config_json(c), **extra.get(n, {})} for n, c in many.items()], tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name, config in many.items():
        alone = train(dataclasses.replace(config, output_dir=str(tmp_path / "one" / name)))
        if "save_dtype" in runs[name]:  # bfloat16 may round either way
            assert history(alone) == pytest.approx(history(Path(config.output_dir)), abs=2e-5)
            assert largest_difference(alone, Path(config.output_dir)) < 0.02
        else:
            assert_equal_to_rounding(Path(config.output_dir), alone)
    if "tied" in names:
        AutoModelForCausalLM.from_pretrained(many["tied"].output_dir)
    for rank in range(2 if "reduced every time" in names else 0):
        # The final model is never gathered: one tensor at a time, the largest no more than once.
        most, largest = json.loads((tmp_path / f"gathered.{rank}").read_text())
        assert most == largest == 481 * 48 * 4


@pytest.mark.slow
def test_three_processes_and_another_number_resumes(configure: Configure, tmp_path: Path):
    """Also with fewer examples than processes in the last micro-step, and a set smaller than the global batch."""
    values = {"learning_rate": 2e-4, "save_steps": 4, "max_steps": 7}
    alone = train(configure(output_dir=str(tmp_path / "alone"), **values))
    resumed = configure(
        output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(alone / "checkpoint-4"), **values
    )
    three = configure(output_dir=str(tmp_path / "three"), per_device_train_batch_size=1, **values)
    small = configure(output_dir=str(tmp_path / "small"), global_batch_size=64, **{**values, "max_steps": 2})
    jobs = [config_json(config) for config in (three, resumed, small)]
    finished = train_in_processes(3, jobs, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_equal_to_rounding(Path(three.output_dir), alone)
    assert_equal_to_rounding(Path(resumed.output_dir), alone)
    assert_equal_to_rounding(Path(small.output_dir), train(dataclasses.replace(small, output_dir=str(tmp_path / "s1"))))
    back = configure(
        output_dir=str(tmp_path / "back"), resume_from_checkpoint=str(Path(three.output_dir) / "checkpoint-4"), **values
    )
    assert_equal_to_rounding(train(back), alone)


def test_a_process_that_breaks_leaves_the_last_checkpoint(configure: Configure, tmp_path: Path):
    config = configure(num_train_epochs=500, save_steps=3, save_total_limit=1)
    finished = train_in_processes(2, [{**config_json(config), "crash_after": 5}], tmp_path)
    assert finished.returncode != 0
    assert "this process broke" in finished.stderr
    names = {path.name for path in Path(config.output_dir).iterdir()}
    assert "checkpoint-3" in names
    assert "config.json" not in names


@pytest.mark.parametrize(
    "names", [("__1_0.distcp",), pytest.param(("__0_0.distcp", "random-1.pt"), marks=pytest.mark.slow)], ids=" ".join
)
def test_checkpoints_of_two_processes_are_checked_by_both(names: tuple[str, ...], configure: Configure, tmp_path: Path):
    """A flipped bit in either's files; and a disk that is full for one is said by both, the checkpoint before good."""
    values = {"learning_rate": 2e-4, "save_steps": 2, "save_total_limit": 9, "max_steps": 5}
    whole = configure(output_dir=str(tmp_path / "whole"), **values)
    jobs = [config_json(whole)]
    for name in names:
        config = configure(output_dir=str(tmp_path / name), resume_from_checkpoint="auto", **values)
        jobs.append({**config_json(config), "copy_from": whole.output_dir, "flip": f"checkpoint-4/{name}"})
    full = configure(output_dir=str(tmp_path / "full"), **{**values, "save_total_limit": 1})
    jobs.append({**config_json(full), "full_disk": 1, "error": str(tmp_path / "error")})
    finished = train_in_processes(2, jobs, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for job in jobs[1:-1]:
        damaged = Path(job["output_dir"]) / job["flip"]
        assert f"skipped a damaged checkpoint: {damaged}: expected SHA-256" in finished.stderr
        assert_same_run(Path(job["output_dir"]), Path(whole.output_dir))
        state = json.loads((damaged.parent / "trainer_state.json").read_text())
        assert sorted(state["files"]) == [".metadata", "__0_0.distcp", "__1_0.distcp", "random-0.pt", "random-1.pt"]
    for rank in range(2):
        said = (tmp_path / f"error.{rank}").read_text()
        assert said.startswith("NotEnoughSpace: the disk ran full while")
        assert "checkpoint-2 is untouched" in said
    assert [path.name for path in Path(full.output_dir).glob("*checkpoint*")] == ["checkpoint-2"]


# Several machines, as several launchers on this one ---------------------------------------------------------------


def start_nodes(arguments: list[str], *, folders: list[Path], rendezvous: str) -> list[subprocess.Popen[str]]:
    """train.py on two machines of one process each, by their own torchruns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = {
        "static": ["--master_addr=127.0.0.1", f"--master_port={port}"],
        "c10d": ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=alpaca"],
    }[rendezvous]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
             f"--node_rank={number}", *how, str(ROOT / "train.py"), *arguments],
            cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for number, folder in enumerate(folders)
    ]  # fmt: skip


def wait_for(nodes: list[subprocess.Popen[str]], *, timeout_s: float = 120) -> list[str]:
    """What each machine said, once all have ended."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        try:
            return list(pool.map(lambda node: node.communicate(timeout=timeout_s)[1], nodes))
        finally:
            for node in nodes:
                node.kill()


@pytest.mark.slow
def test_two_machines_train_what_one_process_does(configure: Configure, tmp_path: Path):
    config = configure(
        learning_rate=2e-4, max_steps=6, fsdp="hybrid_shard auto_wrap", save_steps=4, global_batch_size=128
    )
    nodes = start_nodes(flags(config), folders=[tmp_path, tmp_path], rendezvous="static")
    said = wait_for(nodes)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "global batch 128: 2 processes × 4 × 16 = 128" in said[0]
    assert "hybrid shard: 2 copies of the model, each sharded over the 1 processes of a machine" in said[0]
    assert "done: " in said[0]
    assert "global batch" not in said[1]
    assert "done: " not in said[1]
    alone = train(dataclasses.replace(config, output_dir=str(tmp_path / "alone")))
    assert_equal_to_rounding(Path(config.output_dir), alone)
    again = dataclasses.replace(config, resume_from_checkpoint="auto", output_dir=str(tmp_path / "again"))
    shutil.copytree(Path(config.output_dir) / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    assert_equal_to_rounding(train(again), alone)


@pytest.mark.slow
def test_two_machines_stop_and_go_on_together(configure: Configure, tmp_path: Path):
    """SIGTERM to the second machine's torchrun: both save and end, and go on later to the uninterrupted weights."""
    config = configure(num_train_epochs=30, resume_from_checkpoint="auto", save_steps=20)
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    folders, output_dir = [tmp_path, tmp_path], Path(config.output_dir)
    said = wait_for(start_nodes(flags(whole), folders=folders, rendezvous="c10d"))
    assert any("done: " in text for text in said), said
    nodes = start_nodes(flags(config), folders=folders, rendezvous="c10d")
    end = time.monotonic() + 60
    while not list_checkpoints(output_dir):
        assert time.monotonic() < end
        time.sleep(0.01)
    nodes[1].send_signal(signal.SIGTERM)
    said = wait_for(nodes)
    assert all(node.returncode for node in nodes), said
    assert any("go on with --resume_from_checkpoint auto" in text for text in said), said
    assert int(list_checkpoints(output_dir)[0].name.partition("-")[2]) % 20  # not one by --save_steps
    wait_for(start_nodes(flags(config), folders=folders, rendezvous="c10d"))
    assert history(output_dir) == history(Path(whole.output_dir))
    assert largest_difference(output_dir, Path(whole.output_dir)) == 0


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_told_at_once(configure: Configure, tmp_path: Path):
    config = configure(output_dir="alpaca_out")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    said = wait_for(start_nodes(flags(config), folders=folders, rendezvous="static"))
    assert "does not see what the first process wrote to alpaca_out: several machines need" in said[0]
    assert "Loading weights" not in said[0]


@pytest.mark.slow
def test_four_processes_on_two_machines_shard_inside_each(configure: Configure, tmp_path: Path):
    """As one launch with two processes to a machine, which the environment of each process says."""
    values = {"learning_rate": 2e-4, "max_steps": 4, "per_device_train_batch_size": 1, "save_steps": 2}
    runs = [
        configure(output_dir=str(tmp_path / word), fsdp=f"{word} auto_wrap", **values)
        for word in ("hybrid_shard", "hybrid_shard_zero2")
    ]
    jobs = [config_json(runs[0]), {**config_json(runs[1]), "free_memory": 0}]
    finished = train_in_processes(4, jobs, tmp_path, on_machine=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    alone = train(configure(output_dir=str(tmp_path / "alone"), **values))
    for config in runs:
        assert_equal_to_rounding(Path(config.output_dir), alone)


# Pieces -----------------------------------------------------------------------------------------------------------


def test_whole_gradients_are_kept_where_they_fit():
    assert keeps_gradients_whole(7_000_000_000, 80_000_000_000)  # 28 GB of 80
    assert not keeps_gradients_whole(7_000_000_000, 50_000_000_000)
    assert keeps_gradients_whole(4_000_000, 1_000_000_000)  # an adapter's
    assert not keeps_gradients_whole(1, -1)


def test_an_error_of_one_process_is_one_of_all():
    world = World(rank=0, num_processes=1, device=torch.device("cpu"))
    assert world.run_in_all(lambda: 3) == 3
    with pytest.raises(InputError, match="mine"):
        world.run_in_all(lambda: raise_error(InputError("mine")))


def raise_error(error: Exception) -> None:
    raise error


def test_gradients_are_clipped_as_torch_does():
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        (model(torch.ones(2, 3)) ** 2).sum().backward()
    norm = clip_gradients(models[0], 0.5)
    assert norm == torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.5).item()
    assert torch.equal(models[0].weight.grad, models[1].weight.grad)
    before = models[0].weight.grad.clone()
    assert clip_gradients(models[0], 0) == pytest.approx(0.5, abs=1e-5)
    assert torch.equal(models[0].weight.grad, before)


def test_one_process_sums_by_itself():
    assert World(rank=0, num_processes=1, device=torch.device("cpu")).sum([1.5, 2.0]) == [1.5, 2.0]
