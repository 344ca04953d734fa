"""The adapters' benchmark runs each case and says how it was taken."""

import json

import pytest

from bench import adapters
from bench.random_model import SHAPES, Shape


@pytest.mark.slow
def test_every_case_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "20m", Shape(width=32, num_layers=1, num_heads=2, ffn_width=64))
    flags = ["--shape", "20m", "--clients", "4", "--prompt_tokens", "8", "--new_tokens", "4", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["bench.adapters", *flags])
    adapters.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["cases"]) == ["plain", "none", "one", "four"]
    assert found["cases"]["none"]["of_none"] == 1
    assert found["adapter_share"] == 0.425  # 8 * (4 * 64 + 3 * 96) / (4 * 32 * 32 + 3 * 32 * 64) = 4352 / 10240
    assert all(case["tokens_per_second"] > 0 for case in found["cases"].values())
    assert (found["rank"], found["clients"]) == (8, 4)
    assert {"hardware", "versions", "commit", "command", "device"} <= found.keys()
