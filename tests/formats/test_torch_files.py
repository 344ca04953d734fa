"""Files of torch.save: a plain table of tensors is read, however it is wrapped; all else is called what it is."""

import pickle
import re
from pathlib import Path

import pytest
import torch

from alpaca.errors import InputError
from alpaca.formats.torch_files import read_tensors

TABLE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def read(file: Path, **options: bool) -> dict[str, torch.Tensor]:
    return read_tensors(file, expected="Meta checkpoint", **options)


def test_parameters_are_read_as_their_tensors(tmp_path: Path):
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in TABLE.items()}, tmp_path / "f")
    found = read(tmp_path / "f")
    assert found.keys() == TABLE.keys()
    for name, tensor in found.items():
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad
        assert torch.equal(tensor, TABLE[name])


def test_files_that_are_no_archives_are_read_whole_or_named(tmp_path: Path):
    torch.save(TABLE, tmp_path / "f", _use_new_zipfile_serialization=False)
    assert torch.equal(read(tmp_path / "f", reads_whole=True)["a"], TABLE["a"])
    with pytest.raises(InputError, match=r"is no zip archive but an older file .*: resave it .*torch\.save\("):
        read(tmp_path / "f")


@pytest.mark.parametrize("is_archive", [True, False])
def test_another_pickle_protocol_is_named(tmp_path: Path, is_archive: bool):
    torch.save(TABLE, tmp_path / "f", pickle_protocol=4, _use_new_zipfile_serialization=is_archive)
    with pytest.raises(InputError, match=r"was saved with pickle protocol 4, .*expected protocol 2: resave it"):
        read(tmp_path / "f", reads_whole=True)


def test_what_is_damaged_is_called_so(tmp_path: Path):
    torch.save(TABLE, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-1], b"no weights at all"):
        (tmp_path / "f").write_bytes(damaged)
        with pytest.raises(InputError, match=r"bytes\) is damaged, truncated or no Meta checkpoint; get it again"):
            read(tmp_path / "f")


def test_other_contents_are_refused_and_never_run(tmp_path: Path):
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(InputError, match="something else than a plain table of tensors; expected Meta checkpoint"):
        read(tmp_path / "list")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "trapped",))

    torch.save({"a": Trap()}, tmp_path / "f")
    (tmp_path / "plain").write_bytes(pickle.dumps({"a": Trap()}))
    for name in ("f", "plain"):
        with pytest.raises(InputError):
            read(tmp_path / name, reads_whole=True)
    assert not (tmp_path / "trapped").exists()


A = {"a.weight": torch.ones(2)}
UNWRAPPED = {
    "state_dict": (
        {"state_dict": A, "epoch": 3},
        "found 'state_dict' (a table of 1 tensors), 'epoch' (int); unwrap the model's table: "
        "torch.save(torch.load(OLD, map_location=\"cpu\", weights_only=True)['state_dict'], NEW)",
    ),
    "model after others": ({"ema": A, "model": A}, "weights_only=True)['model'], NEW)"),
    "a name of its own": ({"net": A}, "weights_only=True)['net'], NEW)"),
    "numbers beside tensors": (
        {**A, "step": 3, "lr": 0.1},
        "found 'step' (int), 'lr' (float), beside 1 tensors; keep the tensors alone: torch.save({name: value for name, "
        'value in torch.load(OLD, map_location="cpu", weights_only=True).items() if torch.is_tensor(value)}, NEW)',
    ),
    "many": ({f"key {number}": number for number in range(9)}, "'key 4' (int) and 4 more"),
    "a long key": ({"k" * 500: 1}, f"found '{'k' * 79}… (int)"),
    "a list": ([A], "found list"),
}


@pytest.mark.parametrize("kind", UNWRAPPED)
def test_keys_of_another_table_are_named_with_how_to_unwrap_it(kind: str, tmp_path: Path):
    content, message = UNWRAPPED[kind]
    torch.save(content, tmp_path / "old.bin")
    with pytest.raises(InputError, match=re.escape(message) + "$"):
        read_tensors(tmp_path / "old.bin", expected="PyTorch file")


@pytest.mark.parametrize("kind", ["state_dict", "numbers beside tensors"])
def test_the_told_line_makes_a_file_that_is_read(kind: str, tmp_path: Path):
    content, message = UNWRAPPED[kind]
    torch.save(content, tmp_path / "old.bin")
    line = message[message.index("torch.save") :]
    exec(line, {"torch": torch, "OLD": tmp_path / "old.bin", "NEW": tmp_path / "new.bin"})
    assert torch.equal(read_tensors(tmp_path / "new.bin", expected="PyTorch file")["a.weight"], A["a.weight"])
