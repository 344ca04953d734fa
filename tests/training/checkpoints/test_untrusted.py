"""A checkpoint from somebody else is data: what torch would run is refused, what torch saved is read alike."""

import io
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from alpaca.errors import InputError
from alpaca.training.checkpoints import loading
from alpaca.training.checkpoints.state import quiet_alone
from alpaca.training.checkpoints.untrusted import DataOnlyPlanner, DataOnlyReader, _IndexUnpickler

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool)


def tensors(fill: int) -> dict[str, torch.Tensor]:
    return {str(dtype): torch.arange(6).reshape(2, 3).mul(fill).to(dtype) for dtype in DTYPES}


def state(fill: int = 1) -> dict[str, dict]:
    """As a run's: tensors, and numbers and texts of the optimizer."""
    groups = [{"lr": 0.5 * fill, "betas": (0.9, 0.5), "fused": None, "name": "a" * fill, "params": [0, 1]}]
    return {"model": tensors(fill), "optimizer": {"state": {"x": tensors(fill)}, "param_groups": groups}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with quiet_alone():
        dcp.save(state(2), checkpoint_id=tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1"


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


class Runs:
    """What unpickles to a folder: harmless, and seen if it was run."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def test_what_torch_saves_is_read_as_torch_reads_it(folder):
    own, torchs = state(0), state(0)
    loading._load_in_place(own, DataOnlyReader(folder, names(folder)))
    with quiet_alone():
        dcp.load(torchs, checkpoint_id=folder)
    assert equal(own, state(2))
    assert equal(own, torchs)


def test_only_classes_that_hold_values_are_looked_up(folder):
    found = set()

    def listen(event: str, arguments: tuple) -> None:
        if listening and event == "pickle.find_class":
            found.add(arguments)

    listening = True
    sys.addaudithook(listen)  # which stays until the process ends
    loading._load_in_place(state(0), DataOnlyReader(folder, names(folder)))
    listening = False
    assert {module for module, _ in found} <= {
        "torch", "torch.serialization", "torch._utils", "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem", "pathlib", "collections",
    }  # fmt: skip
    assert ("torch.distributed.checkpoint.metadata", "Metadata") in found


@pytest.mark.parametrize("place", ["whole", "inside"])
def test_an_index_that_would_run_something_is_refused(folder, tmp_path, place):
    ran = tmp_path / "ran"
    index = Runs(ran)
    if place == "inside":
        index = pickle.loads((folder / ".metadata").read_bytes())
        index.planner_data = {"x": Runs(ran)}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(
        InputError, match=r"cannot be resumed from: .*names posix.mkdir, which no checkpoint's index has"
    ):
        loading._load_in_place(state(), DataOnlyReader(folder, names(folder)))
    assert not ran.exists()


def test_an_index_that_would_change_a_class_is_refused(folder):
    changing = b"cpathlib\nPosixPath\n(N}S'changed'\nI1\nstb."
    (folder / ".metadata").write_bytes(changing)
    with pytest.raises(InputError, match="gives a state to a type"):
        loading._load_in_place(state(), DataOnlyReader(folder, names(folder)))
    assert not hasattr(type(folder), "changed")


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_is_read_whichever_python_wrote_it(folder, module):
    """3.13 pickles it under the second name, which older ones cannot import."""
    assert _IndexUnpickler(io.BytesIO(f"c{module}\nPosixPath\n(S'a'\ntR.".encode())).load() == Path("a")


def test_a_value_that_would_run_something_is_refused(folder, tmp_path):
    value = io.BytesIO()
    torch.save(Runs(tmp_path / "ran"), value)
    value.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"weights_only|Weights only"):
        DataOnlyPlanner().load_bytes(None, value)
    assert not (tmp_path / "ran").exists()


def test_files_outside_the_folder_are_not_read(folder, tmp_path):
    index = pickle.loads((folder / ".metadata").read_bytes())
    (tmp_path / "other").write_bytes((folder / "__0_0.distcp").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../other"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(InputError, match=r"refers to files that are not the checkpoint's: \.\./other"):
        loading._load_in_place(state(), DataOnlyReader(folder, names(folder)))


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({})[:-1]])
def test_what_is_no_index_is_said(folder, content):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(InputError, match="is no index of a checkpoint"):
        loading._load_in_place(state(), DataOnlyReader(folder, names(folder)))
