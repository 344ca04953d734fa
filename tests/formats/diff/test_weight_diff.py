"""Weight differences: every bit comes back, and the model that comes back answers as the tuned one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alpaca.errors import NotEnoughSpace
from alpaca.formats.diff import recovering
from alpaca.formats.diff.making import DiffConfig, make_diff
from alpaca.formats.diff.manifest import MANIFEST_NAME
from alpaca.formats.diff.recovering import RecoverConfig, recover
from alpaca.formats.diff.residual import RESIDUAL_NAME
from alpaca.formats.hf.folder import FLOAT_DTYPES
from alpaca.text.loading import load_tokenizer
from tests.formats.diff_sources import (
    Tensors,
    bits,
    load,
    read_all,
    recovered,
    rewrite,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# There and back ---------------------------------------------------------------------------------------------------


def cast_with_oddities(dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Every tensor in `dtype`, with infinities, minus zero, the smallest subnormal and NaN of two payloads in it."""
    odd = {torch.float32: [0x7F800000, 0xFF800000, 0x80000000, 1, 0x7FC00000, 0xFFC0BEEF],
           torch.float16: [0x7C00, 0xFC00, 0x8000, 1, 0x7E00, 0xFE77],
           torch.bfloat16: [0x7F80, 0xFF80, 0x8000, 1, 0x7FC0, 0xFFC7]}[dtype]  # fmt: skip

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.to(dtype).clone()
        wide = torch.tensor(odd, dtype=torch.int64).to(bits(changed).dtype)
        bits(changed).view(-1)[3 : 3 + len(odd)] = wide
        return changed

    return change


def without_residual(raw: Path, diff: Path, dtype: torch.dtype) -> Tensors:
    """raw + diff in float32, rounded: what the difference alone gives. [PAD] rows from the mean."""
    base, differences = read_all(raw), read_all(diff)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wide = base[name].float()
        base[name] = torch.cat([wide, wide.mean(dim=0, keepdim=True)])
    return {name: (base[name].float() + differences[name]).to(dtype) for name in differences}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES.values(), ids=FLOAT_DTYPES)
@pytest.mark.parametrize("max_shard_size", [5 * 10**9, 100_000])
@pytest.mark.fast_rows(2)
def test_every_bit_comes_back(tmp_path, llama_folder, trained, dtype, max_shard_size):
    tuned = rewrite(trained, tmp_path / "tuned", cast_with_oddities(dtype))
    target = DiffConfig(
        path_raw=llama_folder, path_tuned=tuned, path_diff=tmp_path / "diff", max_shard_size=max_shard_size
    )
    make_diff(target)
    back = recovered(llama_folder, tmp_path / "diff", tmp_path / "back", max_shard_size=max_shard_size)
    assert same_bits(back, read_all(tuned))
    assert not same_bits(without_residual(llama_folder, tmp_path / "diff", dtype), read_all(tuned))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tuned / name).read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((tuned / "config.json").read_text())


def test_the_difference_alone_loses_bits_of_a_trained_model(llama_folder, trained, made):
    alone, tuned = without_residual(llama_folder, made, torch.float32), read_all(trained)
    lost = sum(int((bits(alone[n]) != bits(tuned[n])).sum()) for n in tuned) / sum(t.numel() for t in tuned.values())
    assert 0.001 < lost < 0.5
    listed = sum(entry["residual"][2] for entry in json.loads((made / MANIFEST_NAME).read_text())["tensors"].values())
    assert listed >= lost * sum(t.numel() for t in tuned.values())
    assert (made / RESIDUAL_NAME).stat().st_size < 5 * listed


@pytest.mark.parametrize("raw_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_any_bits_come_back(tmp_path, llama_folder, monkeypatch, raw_dtype, dtype):
    for module in ("residual", "arithmetic"):
        monkeypatch.setattr(f"alpaca.formats.diff.{module}.blocks", small_blocks)
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int, dtype: str) -> torch.Tensor:
        kind = FLOAT_DTYPES[dtype]
        wide = (*shape[:-1], shape[-1] * kind.itemsize)
        return torch.randint(0, 256, wide, generator=generator, dtype=torch.uint8).view(kind)

    shapes = {"a": (40, 7), "b": (65,), "empty": (0, 3), "c": (1, 2, 3)}
    for folder, kind, rows in (("raw", raw_dtype, 9), ("tuned", dtype, 12)):
        shutil.copytree(llama_folder, tmp_path / folder)
        (tmp_path / folder / "config.json").write_text(json.dumps({"vocab_size": rows, "torch_dtype": kind}))
        tensors = {name: noise(*shape, dtype=kind) for name, shape in {**shapes, "rows": (rows, 30)}.items()}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    make_diff(DiffConfig(path_raw=tmp_path / "raw", path_tuned=tmp_path / "tuned", path_diff=tmp_path / "diff"))
    back = recovered(tmp_path / "raw", tmp_path / "diff", tmp_path / "back")
    assert same_bits(back, read_all(tmp_path / "tuned"))


def small_blocks(num_elements: int):
    return ((i, start, min(start + 64, num_elements)) for i, start in enumerate(range(0, num_elements, 64)))


def test_other_dtype_is_the_tuned_value_rounded(tmp_path, llama_folder, trained, made):
    back = recovered(llama_folder, made, tmp_path / "back", dtype="bfloat16")
    assert same_bits(back, {name: tensor.bfloat16() for name, tensor in read_all(trained).items()})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_without_a_target_nothing_is_written(tmp_path, llama_folder, made):
    before = sorted(tmp_path.rglob("*"))
    assert recover(RecoverConfig(path_raw=llama_folder, path_diff=made, test_inference=False)) is None
    assert sorted(tmp_path.rglob("*")) == before


# The model answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.slow
def test_recovered_model_answers_as_the_tuned_one(tmp_path, llama_folder, trained, made, capsys, is_written):
    target = tmp_path / "back" if is_written else None
    recover(RecoverConfig(path_raw=llama_folder, path_diff=made, path_tuned=target, test_inference=True))
    tokenizer = load_tokenizer(trained)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\r\n\r\n### Instruction:\r\nList three technologies that make life easier.\r\n\r\n### Response:"
    )
    ids = torch.tensor([tokenizer.prefix_ids + tokenizer.encode(prompt)])
    out = load(trained).generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=tokenizer.pad_id)
    answer = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    assert capsys.readouterr().out == f"Input: {prompt}\nCompletion: {answer}\n"


def test_real_model_comes_back_with_its_published_text(tmp_path, real):
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments as parse

    source = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K"]
    tuned = convert(parse([*source, "--output_dir", str(tmp_path / "converted")]))
    generator = torch.Generator().manual_seed(5)
    raw = rewrite(
        tuned, tmp_path / "raw", lambda n, t: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(torch.float16)
    )
    make_diff(DiffConfig(path_raw=raw, path_tuned=tuned, path_diff=tmp_path / "diff"))
    assert same_bits(recovered(raw, tmp_path / "diff", tmp_path / "back"), read_all(tuned))
    ids = load(tmp_path / "back").generate(torch.tensor([[1]]), max_new_tokens=256, do_sample=False)
    text = load_tokenizer(tmp_path / "back").decode(ids[0].tolist())
    assert text == (real / "stories260k-greedy.txt").read_text().rstrip("\n")


def test_model_that_memory_cannot_hold_is_recovered_and_not_tried(tmp_path, llama_folder, made, monkeypatch, caplog):
    monkeypatch.setattr(recovering, "free_memory", lambda device: 10**6)
    recovered(llama_folder, made, tmp_path / "back", test_inference=None)
    assert "needs 1.1 GB of memory and 0.0 GB are free: it is recovered and checked, but not tried" in caplog.text
    with pytest.raises(NotEnoughSpace, match="pass --test_inference False"):
        recovered(llama_folder, made, tmp_path / "other", test_inference=True)
    assert not (tmp_path / "other").exists()
