"""Where a figure comes from is told on any machine."""

import subprocess

import pytest
import torch

from alpaca.evaluation import provenance as evaluation_provenance
from bench import provenance


def test_commit_outside_of_a_repository_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation_provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() == "unknown"


def test_commit_without_git_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == "unknown"


@pytest.mark.parametrize(("changed", "expected"), [("", "abc"), (" M file", "abc-dirty")])
def test_commit_says_whether_the_tree_differs(monkeypatch, changed, expected):
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 0, stdout="abc\n" if "rev-parse" in command else changed)

    monkeypatch.setattr(subprocess, "run", run)
    assert provenance.commit() == expected


def test_gpu_driver(tmp_path):
    file = tmp_path / "version"
    assert provenance.gpu_driver(file) == "unknown"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\n")
    assert provenance.gpu_driver(file) == "570.124.06"


def test_hardware_names_the_gpu(monkeypatch):
    assert provenance.gpu() == {} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    hardware = provenance.provenance("serve", ("torch",))["hardware"]
    assert (hardware["gpu"], hardware["cuda"]) == ("NVIDIA H100", "12.8")


def test_real_inputs_are_those_of_the_variable_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("ALPACA_REAL", raising=False)
    assert provenance.find_real("x.json") is None
    monkeypatch.setenv("ALPACA_REAL", str(tmp_path))
    assert provenance.find_real("x.json") is None
    (tmp_path / "x.json").touch()
    assert provenance.find_real("x.json") == tmp_path / "x.json"
