"""Weights as folder or archive: nothing leaves its folder, nothing is half unpacked."""

import contextlib
import gzip
import hashlib
import io
import re
import shutil
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from alpaca.errors import InputError, MissingInput
from alpaca.files.archives import pack
from alpaca.files.places import choose_base, open_weights


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("ALPACA_CACHE", raising=False)
    (tmp_path / "tmp").mkdir()


def unpacked(tmp_path: Path) -> list[Path]:
    """Files in the temporary folder, other than locks."""
    return [path for path in (tmp_path / "tmp").rglob("*") if path.is_file() and not path.name.endswith(".waiting")]


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
    assert not unpacked(tmp_path)


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
        with pytest.raises(InputError, match="is damaged or no archive"):
            open_weights(str(tmp_path / name))
    assert not unpacked(tmp_path)


def test_adapters_are_weights_too(llama_folder, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(llama_folder / name, folder)
    assert open_weights(str(folder)) == folder
    assert files_of(open_weights(str(pack(folder, tmp_path / "adapter.tar")))) == files_of(folder)


def write_zip(path: Path, folder: Path, *, top: str = "llama-7b/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(top, "")
        for file in folder.iterdir():
            opened.write(file, top + file.name)
        opened.writestr("__MACOSX/llama-7b/._config.json", "x")
        opened.writestr(top + ".DS_Store", "x")
    return path


def test_zip_archives(llama_folder, tmp_path):
    opened = open_weights(str(write_zip(tmp_path / "w.zip", llama_folder)))
    assert files_of(opened) == files_of(llama_folder)


def zip_info(name: str, *, mode: int = 0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (zip_info("../config.json"), "no plain file of a model folder"),
        (zip_info("/config.json"), "no plain file of a model folder"),
        (zip_info("a/b/config.json"), "no plain file of a model folder"),
        (zip_info("tokenizer.model", mode=0o120777), r"'tokenizer.model' \(a link or device\)"),
        (zip_info("other/config.json"), "files of the same name or of another folder"),
    ],
)
def test_bad_zip_members(tmp_path, info, message):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as opened:
        opened.writestr("config.json", "{}")
        opened.writestr(info, "x")
    with pytest.raises(InputError, match=f"{message}.*; nothing was unpacked"):
        open_weights(str(tmp_path / "bad.zip"))
    assert not unpacked(tmp_path)


def test_encrypted_and_damaged_zips(llama_folder, tmp_path):
    content = write_zip(tmp_path / "w.zip", llama_folder).read_bytes()
    central = content.index(b"PK\x01\x02")
    locked = bytearray(content)
    for header in re.finditer(b"PK\x01\x02", content):
        locked[header.start() + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(InputError, match="encrypted"):
        open_weights(str(tmp_path / "locked.zip"))
    flipped = bytearray(content)
    flipped[central // 2] ^= 255
    for name, broken in (("cut.zip", content[: len(content) // 2]), ("flipped.zip", bytes(flipped))):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(InputError, match="is damaged or no"):
            open_weights(str(tmp_path / name))
    assert not unpacked(tmp_path)


def tar_of(path: Path, files: list[tuple[str, bytes]], *, mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("second", ["config.json", "./config.json", "checkpoint-7/model.safetensors", "a/config.json"])
def test_files_that_would_meet(tmp_path, second):
    archive = tar_of(tmp_path / "two.tar", [("config.json", b"{}"), (second, b"x")])
    with pytest.raises(InputError, match=f"'{second}' beside files of the same name or of another folder"):
        open_weights(archive)
    assert not unpacked(tmp_path)


def test_bombs(tmp_path, monkeypatch):
    tar_of(tmp_path / "zeros.tgz", [("config.json", b"{}"), ("model.safetensors", bytes(120_000_000))], mode="w:gz")
    many = tar_of(tmp_path / "many.tar", [(f"{number}.json", b"") for number in range(2_001)])
    claims = tarfile.TarInfo("model.safetensors")
    claims.size = 10**15
    (tmp_path / "claims.tar").write_bytes(claims.tobuf())
    for name in ("zeros.tgz", many, "claims.tar"):
        with pytest.raises(
            InputError, match=r"more than 2,000 files or 0\.1 GB, 20 times its size; nothing was unpacked"
        ):
            open_weights(str(tmp_path / name))
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 10**10
    (tmp_path / "name.tgz").write_bytes(gzip.compress(name.tobuf(tarfile.GNU_FORMAT)))
    with pytest.raises(InputError, match=r"a header of 10,000,000,\d+ bytes"):
        open_weights(str(tmp_path / "name.tgz"))
    sparse = tarfile.TarInfo("config.json")
    sparse.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (5 * 10**7)  # its size with the holes
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:512]))
    (tmp_path / "holes.tar").write_bytes(bytes(block) + bytes(1024))
    with pytest.raises(InputError, match="a file with holes"):
        open_weights(str(tmp_path / "holes.tar"))
    assert not unpacked(tmp_path)


# Headers that tarfile and zipfile do not expect -----------------------------------------------------------------

CONFIG = b"{}".ljust(512, b"\0")
END = bytes(1024)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header; a negative size is written as GNU tar writes what octal digits cannot say."""
    info = tarfile.TarInfo(name)
    info.size, info.type = max(0, size), kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size < 0:
        block[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(name: str, value: str, kind: bytes = tarfile.XHDTYPE) -> bytes:
    rest = f" {name}={value}\n".encode()
    length = len(rest) + 2 if len(rest) < 98 else len(rest) + 3
    record = f"{length}".encode() + rest
    assert len(record) == length
    return header("pax", len(record), kind) + record.ljust(-(-len(record) // 512) * 512, b"\0")


LONG_NAME = header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"abcd".ljust(512, b"\0")
GOOD_FILE = header("config.json", 2) + CONFIG
BAD_TARS = {
    "a folder of negative size": (header("d/", -(10**13), tarfile.DIRTYPE) + GOOD_FILE, r"'d/' of -10,000,000,000,000"),
    "a file of negative size": (header("config.json", -1) + CONFIG, "'config.json' of -1 bytes; nothing was unpacked"),
    "pax negative": (pax("size", "-5") + GOOD_FILE, "'config.json' of -5 bytes; nothing was unpacked"),
    "pax for all": (
        pax("size", "2", tarfile.XGLTYPE) + header("config.json", 8 * 10**9) + CONFIG,
        "damaged or no archive: a file that ends at byte 8,000,00",
    ),
    "long names": (LONG_NAME * 3_000 + GOOD_FILE, "damaged or no archive: hundreds of headers in a row"),
    "pax headers": (pax("path", "a") * 3_000 + GOOD_FILE, "damaged or no archive: hundreds of headers in a row"),
    "sparse map": (pax("GNU.sparse.map", "1,x") + GOOD_FILE, "damaged or no archive: invalid literal"),
    "sparse size": (pax("GNU.sparse.size", "x") + GOOD_FILE, "damaged or no archive: invalid literal"),
    "a name too long": (GOOD_FILE + pax("path", "x" * 300) + GOOD_FILE, r"'x{80}'… of 300 characters, which cannot be"),
    "a NUL": (GOOD_FILE + pax("path", "a\0b") + GOOD_FILE, r"'a\\x00b', which cannot be a file's name; nothing"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_tar_headers_nobody_expects(tmp_path, name):
    content, message = BAD_TARS[name]
    (tmp_path / "w.tar").write_bytes(content + END)
    with pytest.raises(InputError, match=message):
        open_weights(str(tmp_path / "w.tar"))
    assert not unpacked(tmp_path)


def test_a_negative_size_makes_no_room_for_a_bomb(tmp_path):
    size = 130 << 20
    content = header("d/", -(10**13), tarfile.DIRTYPE) + header("d/config.json", 2) + CONFIG
    (tmp_path / "w.tgz").write_bytes(gzip.compress(content + header("d/model.safetensors", size) + bytes(size) + END))
    with pytest.raises(InputError, match="nothing was unpacked"):
        open_weights(str(tmp_path / "w.tgz"))
    assert not unpacked(tmp_path)


BAD_ZIPS = {  # at this byte of the first entry in the directory, these
    "version 9.9": (6, b"\x63", "damaged or no archive: zip file version 9.9"),
    "patch": (8, b"\x20", r"'config.json' \(a patch of another file\)"),
    "strong encryption": (8, b"\x40", r"'config.json' \(encrypted\)"),
    "no UTF-8": (46, b"\xff", "damaged or no archive: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("name", BAD_ZIPS)
def test_zip_headers_nobody_expects(tmp_path, name):
    place, value, message = BAD_ZIPS[name]
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as opened:
        opened.writestr("config.json", "{}")
    content = bytearray((tmp_path / "w.zip").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 9] |= 8 * (name == "no UTF-8")
    content[entry + place : entry + place + 1] = value
    (tmp_path / "w.zip").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_weights(str(tmp_path / "w.zip"))
    assert not unpacked(tmp_path)


def test_a_zip_that_lacks_bytes_in_its_middle(tmp_path):
    """Its first file would start before its first byte."""
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as opened:
        opened.writestr("config.json", "{}")
    content = bytearray((tmp_path / "w.zip").read_bytes())
    del content[36:40]
    (tmp_path / "w.zip").write_bytes(content)
    with pytest.raises(InputError, match="damaged or no archive"):
        open_weights(str(tmp_path / "w.zip"))
    assert not unpacked(tmp_path)


def test_an_archive_without_a_model(tmp_path):
    archive = tar_of(tmp_path / "w.tar", [("readme.json", b"{}")])
    with pytest.raises(MissingInput, match=r"expected config\.json or adapter_config\.json, found readme\.json"):
        open_weights(archive)
    assert not unpacked(tmp_path)


# Addresses --------------------------------------------------------------------------------------------------------


class _Files(SimpleHTTPRequestHandler):
    asked = 0

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        type(self).asked += 1
        with contextlib.suppress(OSError):  # who only wants to know the version goes away
            super().do_GET()


@pytest.fixture
def site(tmp_path):
    """The address of tmp_path/site, and the handler class that counts."""
    (tmp_path / "site").mkdir()
    handler = type("Files", (_Files,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "site"))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["w.tar", "w.tgz", "w.zip", "download"])
def test_addresses_are_fetched_once(llama_folder, tmp_path, site, name):
    url, handler = site
    if name == "w.zip":
        write_zip(tmp_path / "site" / name, llama_folder)
    else:
        with tarfile.open(tmp_path / "site" / name, "w:gz" if name == "w.tgz" else "w") as tar:
            tar.add(llama_folder, arcname="model")
    digest = hashlib.sha256((tmp_path / "site" / name).read_bytes()).hexdigest()
    opened = open_weights(f"{url}/{name}?id=5")
    assert files_of(opened) == files_of(llama_folder)
    kept = {path.parent for path in unpacked(tmp_path)}
    assert kept == {opened}, "the archive itself is gone"
    assert handler.asked == 2, "for the version, and for the file"
    assert open_weights(f"{url}/{name}?id=5") == opened
    assert handler.asked == 3, "for the version"
    checked = open_weights(f"{url}/{name}#sha256={digest}")
    assert open_weights(f"{url}/{name}?other#sha256={digest}") == checked
    assert handler.asked == 4, "for the file"


def test_a_bad_archive_at_an_address(tmp_path, site):
    url, _ = site
    tar_of(tmp_path / "site" / "w.tar", [("../config.json", b"{}")])
    with pytest.raises(InputError, match="no plain file of a model folder"):
        open_weights(f"{url}/w.tar")
    (tmp_path / "site" / "page").write_text("<html>")
    with pytest.raises(InputError, match="is damaged or no archive"):
        open_weights(f"{url}/page")
    assert not unpacked(tmp_path)


# What a client may name -------------------------------------------------------------------------------------------


def test_clients_choose_names_not_paths(tmp_path):
    choose = partial(choose_base, allowed="tiny=/models/tiny, https://host/w.tar?a=b,/models/plain", root=tmp_path)
    assert choose("weights/llama-7b") == str(tmp_path / "weights" / "llama-7b")
    assert choose("./alpaca_out/x.tar") == str(tmp_path / "alpaca_out" / "x.tar")
    assert choose(str(tmp_path / "weights" / "x")) == str(tmp_path / "weights" / "x")
    assert choose("tiny") == "/models/tiny"
    assert choose("/models/plain") == "/models/plain"
    assert choose("https://host/w.tar?a=b") == "https://host/w.tar?a=b"
    for refused in (
        "/etc", "../weights", "weights/../../etc", "weights", ".", "", "/models/tiny", "/models/plain/../x",
        "https://host/w.tar", "file:///etc", "http://169.254.169.254/latest", "weights/../predict.py", "yahma/llama-7b",
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"such names: tiny\), found .*ALPACA_BASE_MODELS=NAME=PATH_OR_ADDRESS"):
            choose(refused)
    for refused in (
        "weights/a\0b",
        "weights/\ud800",
        "weights/" + "a" * 300,
        "weights/" + "é" * 200,
        "weights/a" * 999,
    ):
        with pytest.raises(InputError, match=r"found 'weights/.*ALPACA_BASE_MODELS=NAME=PATH_OR_ADDRESS") as caught:
            choose(refused)
        assert len(str(caught.value).encode()) < 600, "without errors of the encoding, and not all of a long name"


def test_a_client_is_not_told_what_a_folder_holds(tmp_path):
    (tmp_path / "private.txt").touch()
    with pytest.raises(MissingInput, match=r"found: private\.txt, tmp\)"):
        open_weights(str(tmp_path))
    with pytest.raises(MissingInput, match=f"no model in {tmp_path}. model must name a folder") as caught:
        open_weights(str(tmp_path), named="model", lists=False)
    assert "private" not in str(caught.value)


def test_what_is_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected an http or https address, found the scheme 's3'"):
        open_weights("s3://bucket/w.tar")
    (tmp_path / "w.pth").touch()
    with pytest.raises(InputError, match="neither a folder nor an archive"):
        open_weights("w.pth")
    with pytest.raises(MissingInput, match=r"no model in nowhere \(found: no such folder\)\. COG_WEIGHTS must name"):
        open_weights("nowhere")
    with pytest.raises(MissingInput, match=r"no model in alpaca_out .*Fine-tune one first \(python train\.py"):
        open_weights(None)
