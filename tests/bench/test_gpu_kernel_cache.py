"""Built kernels travel from one machine to the next: whole, to the same card only, and never out of their folder."""

import io
import json
import tarfile

import pytest

from alpaca.errors import InputError
from bench.gpu import kernel_cache
from bench.gpu.kernel_cache import MANIFEST, pack, unpack

KEY = {"device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0"}


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A folder with two kernels and what is not one, packed in parts of 300 bytes."""
    monkeypatch.setattr(kernel_cache, "PART_BYTES", 300)
    kernels = tmp_path / "kernels"
    own = kernels / "triton" / "abc"
    own.mkdir(parents=True)
    (own / "attention.cubin").write_bytes(bytes(range(256)) * 4)
    (own / "__grp__attention.json").write_text(
        json.dumps({"child_paths": {"attention.cubin": str(own / "attention.cubin"), "other": "/else/where"}})
    )
    (kernels / "inductor").mkdir()
    (kernels / "inductor" / "graph.so").write_bytes(b"code")
    (kernels / "inductor" / "graph.so").chmod(0o755)
    (own / "tmp.pid_7_x").mkdir()
    (own / "tmp.pid_7_x" / "half").write_bytes(b"half written")
    (own / "lock").touch()
    out = tmp_path / "out"
    out.mkdir()
    pack(kernels, out, KEY)
    return kernels, out


def test_what_is_packed_comes_out_in_parts_and_where_it_is_put(packed, tmp_path):
    kernels, out = packed
    parts = sorted(out.glob("kernel-cache-*"))
    assert len(parts) > 1
    assert max(part.stat().st_size for part in parts) <= 300
    moved = tmp_path / "other" / "kernels"
    assert unpack(out, moved, KEY).startswith("unpacked: 3 files, ")
    found = {str(path.relative_to(moved)) for path in moved.rglob("*") if path.is_file()}
    assert found == {"triton/abc/attention.cubin", "triton/abc/__grp__attention.json", "inductor/graph.so"}
    cubin = moved / "triton" / "abc" / "attention.cubin"
    assert cubin.read_bytes() == (kernels / "triton" / "abc" / "attention.cubin").read_bytes()
    group = json.loads((moved / "triton" / "abc" / "__grp__attention.json").read_text())
    assert group == {"child_paths": {"attention.cubin": str(cubin), "other": "/else/where"}}
    assert (moved / "inductor" / "graph.so").stat().st_mode & 0o777 == 0o755


def test_packing_again_leaves_the_new_parts_alone(packed):
    kernels, out = packed
    before = {path.name for path in out.glob("kernel-cache-*")}
    (kernels / "triton" / "abc" / "norm.cubin").write_bytes(b"more")
    done = pack(kernels, out, KEY)
    after = {path.name for path in out.glob("kernel-cache-*")}
    assert done["packed_files"] == 4
    assert not before & after
    assert len(after) == done["parts"]


def test_an_empty_folder_leaves_nothing(tmp_path):
    assert pack(tmp_path / "nowhere", tmp_path, KEY) == {"packed_files": 0}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["device", "torch", "triton"])
def test_a_cache_of_something_else_is_ignored(packed, tmp_path, name):
    said = unpack(packed[1], tmp_path / "to", {**KEY, name: "another"})
    assert said == f"ignored: it is of {name} {KEY[name]!r} and here 'another'"
    assert not (tmp_path / "to").exists()


def test_a_damaged_part_is_refused_and_what_was_there_stays(packed, tmp_path):
    kernels, out = packed
    part = sorted(out.glob("kernel-cache-*"))[1]
    part.write_bytes(bytes(len(part.read_bytes())))
    with pytest.raises(InputError, match="does not have the SHA-256 its manifest says"):
        unpack(out, kernels, KEY)
    assert (kernels / "triton" / "abc" / "attention.cubin").is_file()
    part.unlink()
    with pytest.raises(InputError, match=r"expected a file of .* bytes; copy the whole folder again"):
        unpack(out, kernels, KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../../etc/passwd"}, "expected parts of at most"),
        ({"num_bytes": 1 << 30}, "expected parts of at most"),
        ({"sha256": None, "num_bytes": "many"}, "is no manifest of a kernel cache"),
    ],
)
def test_a_manifest_that_asks_for_something_else_is_refused(packed, tmp_path, change, message):
    path = packed[1] / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["parts"][0] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        unpack(packed[1], tmp_path / "to", KEY)


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "bad",
    [member("../out"), member("/tmp/out"), member("a/../../out"), member("link", tarfile.SYMTYPE, "/etc/passwd"),
     member("hard", tarfile.LNKTYPE, "x"), member("pipe", tarfile.FIFOTYPE)],
    ids=lambda info: info.name,
)  # fmt: skip
def test_members_that_are_no_file_below_the_folder_are_refused(tmp_path, monkeypatch, bad):
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as archive:
        archive.addfile(bad)
    monkeypatch.setattr(kernel_cache, "_tar", lambda folder, files: memory.getvalue())
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "x").touch()
    pack(tmp_path / "kernels", tmp_path, KEY)
    with pytest.raises(InputError, match="is no file below its folder; refused"):
        unpack(tmp_path, tmp_path / "to", KEY)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("kernel")} == set()


def test_a_folder_without_a_cache_says_so(tmp_path):
    with pytest.raises(InputError, match=r"holds no kernel-cache\.json"):
        unpack(tmp_path, tmp_path / "to", KEY)
