"""Weights as folder or archive: nothing leaves its folder, nothing is half unpacked."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from alpaca.archives import open_weights, pack
from alpaca.errors import InputError, MissingInput


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_and_back(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "out")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "optimizer.bin").touch()
    opened = open_weights(str(pack(folder, tmp_path / "weights.tar")))
    assert files_of(opened) == files_of(llama_folder)
    assert open_weights(str(tmp_path / "weights.tar")) == opened


def test_a_folder_inside_the_archive_is_taken_too(llama_folder, tmp_path):
    with tarfile.open(tmp_path / "w.tar.gz", "w:gz") as tar:
        tar.add(llama_folder, arcname="llama-7b")
    assert files_of(open_weights(str(tmp_path / "w.tar.gz"))) == files_of(llama_folder)


def archive_of(tmp_path: Path, member: tarfile.TarInfo) -> str:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.addfile(member, io.BytesIO(b"x" * member.size))
    return str(tmp_path / "bad.tar")


@pytest.mark.parametrize("name", ["../config.json", "/tmp/config.json", "a/../../config.json", "a/b/c.json"])
def test_members_that_leave_their_folder(tmp_path, name):
    member = tarfile.TarInfo(name)
    member.size = 3
    with pytest.raises(InputError, match="no plain file of a model folder; nothing was unpacked"):
        open_weights(archive_of(tmp_path, member))
    assert not list((tmp_path / "tmp").rglob("*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices(tmp_path, kind):
    member = tarfile.TarInfo("config.json")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(InputError, match="no plain file of a model folder"):
        open_weights(archive_of(tmp_path, member))


def test_damaged_archives(llama_folder, tmp_path):
    archive = pack(llama_folder, tmp_path / "weights.tar")
    content = archive.read_bytes()
    for name, broken in (
        ("cut.tar", content[: len(content) // 2]),
        ("no.tar", b"hello" * 300),
        ("cut.tgz", b"\x1f\x8b\x08"),
    ):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InputError, match="is damaged or no tar archive"):
            open_weights(str(tmp_path / name))
    assert not list((tmp_path / "tmp").rglob("config.json"))


def test_what_is_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"download https://example\.com/w\.tar"):
        open_weights("https://example.com/w.tar")
    (tmp_path / "w.pth").touch()
    with pytest.raises(InputError, match="neither a folder nor an archive"):
        open_weights("w.pth")
    with pytest.raises(MissingInput, match=r"no model in nowhere \(found: no such folder\)\. COG_WEIGHTS must name"):
        open_weights("nowhere")
    with pytest.raises(MissingInput, match=r"no model in alpaca_out .*Fine-tune one first \(python train\.py"):
        open_weights(None)
