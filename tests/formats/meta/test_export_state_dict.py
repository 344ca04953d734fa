"""Meta's checkpoint from a Hugging Face folder: there and back bit for bit, read as Meta reads it, or not there."""

import hashlib
import json
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.formats.hf.folder import TensorSpec, WeightsFolder
from alpaca.formats.meta import layout, sharding, to_hf
from alpaca.formats.meta import params as meta_params
from alpaca.formats.meta.from_hf import export
from alpaca.formats.meta.torch_zip import TensorFileWriter
from convert import convert_llama_weights_to_hf
from convert.export_state_dict_checkpoint import parse_arguments
from tests.formats.hf.saved_sources import save_quantized
from tests.formats.hf.test_export_hf import contents, damage_end, lose_shard, only, peak_of, save_large
from tests.formats.hf.test_merging import merged_by_peft, save_adapter
from tests.processes import mistake_of, run_code, run_command
from tests.tiny import TinyLlama, split_for_rank, train_tokenizer, write_meta

IDS = [1, 5, 260, 300, 17, 17, 301, 9]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


def convert_back(meta: Path, out: Path, *more: str) -> Path:
    arguments = ["--input_dir", str(meta.parent), "--model_size", meta.name, "--output_dir", str(out), *more]
    return to_hf.convert(convert_llama_weights_to_hf.parse_arguments(arguments))


def run(source: Path, target: Path, *more: str) -> Path:
    return export(parse_arguments(["--input_dir", str(source), "--output_dir", str(target), *more]))


def read_shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    """As Meta's reference code does."""
    return [torch.load(file, map_location="cpu") for file in sorted(folder.glob("*.pth"))]


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def make_meta(folder: Path, tokenizer_model: Path, *, num_shards: int = 1, **sizes) -> TinyLlama:
    from sentencepiece import SentencePieceProcessor

    model = TinyLlama(vocab_size=SentencePieceProcessor(model_file=str(tokenizer_model)).get_piece_size(), **sizes)
    write_meta(folder, model.tensors(), model.params(), num_shards=num_shards)
    shutil.copy(tokenizer_model, folder.parent / "tokenizer.model")
    return model


@pytest.fixture
def hf(tmp_path: Path, tokenizer_model: Path) -> Path:
    """A converted LLaMA with grouped heads, alone in tmp_path/work."""
    make_meta(tmp_path / "in" / "T", tokenizer_model, n_kv_heads=4)
    shutil.move(convert_back(tmp_path / "in" / "T", tmp_path / "out"), tmp_path / "work" / "hf")
    return tmp_path / "work" / "hf"


def add_row(hf: Path) -> None:
    """What full fine-tuning leaves: `[PAD]` as one more row of both tables, and in the tokenizer's files."""
    from alpaca.text.loading import load_tokenizer

    tensors = load_file(hf / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name].float().mean(0, keepdim=True).half()])
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    edit_config(hf, vocab_size=len(tensors["lm_head.weight"]))
    tokenizer = load_tokenizer(hf)
    assert tokenizer.add_pad_token()
    tokenizer.save(hf)


def edit_config(hf: Path, **values: object) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, **values}))


# There and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"n_kv_heads": 4}, {"rope_theta": 1e6, "norm_eps": 1e-3}, {"dim": 96, "n_heads": 8, "multiple_of": 32}],
)
@pytest.mark.fast_rows(4)
def test_metas_checkpoint_comes_back_tensor_for_tensor(num_shards: int, sizes: dict, tokenizer_model, tmp_path: Path):
    model = make_meta(tmp_path / "in" / "T", tokenizer_model, **sizes)
    hf = convert_back(tmp_path / "in" / "T", tmp_path / "hf")
    folder = run(hf, tmp_path / "back" / "T", "--num_shards", str(num_shards))
    shards = read_shards(folder)
    assert len(shards) == num_shards
    whole, heads = model.tensors(), model.n_kv_heads
    for rank, shard in enumerate(shards):
        expected = {name: split_for_rank(name, tensor, rank, num_shards) for name, tensor in whole.items()}
        for name in expected:
            if num_shards > heads and (".wk." in name or ".wv." in name):
                expected[name] = whole[name].chunk(heads)[rank * heads // num_shards]
        assert same_tensors(shard, expected)
    meant, params = model.params(), json.loads((folder / "params.json").read_text())
    ffn = [layout.ffn_width(model.dim, p["multiple_of"], p.get("ffn_dim_multiplier")) for p in (meant, params)]
    assert ffn == [model.ffn] * 2
    assert {k: v for k, v in params.items() if k != "multiple_of"} == {
        k: v for k, v in meant.items() if k != "multiple_of"
    }
    back = convert_back(folder, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.model", "tokenizer.json"):
        assert (back / name).read_bytes() == (hf / name).read_bytes(), name


def test_the_real_model_comes_back(real: Path, tmp_path: Path):
    meta = real / "unconverted-weights" / "260K"
    hf = convert_back(meta, tmp_path / "hf")
    source = torch.load(meta / "consolidated.00.pth")
    for num_shards in (1, 2, 4):
        folder = run(hf, tmp_path / f"back{num_shards}", "--num_shards", str(num_shards))
        for rank, shard in enumerate(read_shards(folder)):
            assert {name for name in source if "rope" not in name} == {name for name in shard if "rope" not in name}
            for name in shard.keys() & source.keys():
                assert torch.equal(shard[name], split_for_rank(name, source[name], rank, num_shards)), name
        back = convert_back(folder, tmp_path / f"again{num_shards}")
        assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_metas_own_forward_on_what_was_written(hf: Path, tokenizer_model: Path):
    """The independent model of the tests computes with the files what transformers does with the folder."""
    folder = run(hf, hf.parent / "ckpt")
    tensors, params = read_shards(folder)[0], json.loads((folder / "params.json").read_text())
    rows = len(tensors["tok_embeddings.weight"])
    model = TinyLlama(
        vocab_size=rows, dim=params["dim"], n_layers=params["n_layers"], n_heads=params["n_heads"],
        n_kv_heads=params["n_kv_heads"], multiple_of=params["multiple_of"], norm_eps=params["norm_eps"],
    )  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float64)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(model.forward(tensors, IDS), expected.detach(), rtol=1e-6, atol=1e-5)


def test_files_are_as_meta_ships_them(hf: Path):
    folder = run(hf, hf.parent / "ckpt", "--num_shards", "2")
    names = ["checklist.chk", "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model",
             "tokenizer_checklist.chk"]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == names
    for checklist, files in (("checklist.chk", names[1:4]), ("tokenizer_checklist.chk", names[4:5])):
        lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}" for name in files]
        assert (folder / checklist).read_text().splitlines() == lines
    assert json.loads((folder / "params.json").read_text())["vocab_size"] == -1


@pytest.mark.parametrize("rope", [{"factor": 32.0}, {"factor": 8.0}, {"factor": 16.0, "high_freq_factor": 2.0}])
def test_tied_embeddings_and_llama_3s_rope(rope: dict[str, float], hf: Path):
    tensors = load_file(hf / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 500000.0, **rope}  # fmt: skip
    edit_config(hf, tie_word_embeddings=True, rope_parameters=scaling, rope_theta=500000.0)
    folder = run(hf, hf.parent / "ckpt")
    params, written = json.loads((folder / "params.json").read_text()), read_shards(folder)[0]
    assert torch.equal(written["output.weight"], tensors["model.embed_tokens.weight"])
    assert not torch.equal(written["output.weight"], head)
    assert (params["use_scaled_rope"], params["rope_theta"]) == (True, 500000.0)
    assert ("rope_scaling_factor" in params) == (rope["factor"] != 32.0)
    back = convert_back(folder, hf.parent / "again")
    config = json.loads((back / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"] == scaling
    assert same_tensors(load_file(back / "model.safetensors"), tensors)


@pytest.mark.parametrize("kind", ["gptq", "compressed w8a8"])
def test_weights_that_were_saved_quantized_are_exported_whole(kind: str, hf: Path):
    expected = save_quantized(hf, hf.parent / "saved", kind)
    back = convert_back(run(hf.parent / "saved", hf.parent / "ckpt", "--dtype", "float32"), hf.parent / "again")
    found = load_file(back / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in expected.items())


def test_dtype_and_pickled_folders(hf: Path):
    before = load_file(hf / "model.safetensors")
    torch.save(before, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    shard = read_shards(run(hf, hf.parent / "ckpt", "--dtype", "bfloat16"))[0]
    assert {tensor.dtype for tensor in shard.values()} == {torch.bfloat16}
    assert torch.equal(shard["output.weight"], before["lm_head.weight"].to(torch.bfloat16))


# Added tokens and adapters --------------------------------------------------------------------------------------


def test_rows_of_added_tokens_are_left_out_and_said_or_kept(hf: Path, capsys: pytest.CaptureFixture):
    plain = read_shards(run(hf, hf.parent / "plain"))[0]
    rows = len(plain["output.weight"])
    assert "left out" not in capsys.readouterr().out
    add_row(hf)
    cut = run(hf, hf.parent / "cut")
    assert same_tensors(read_shards(cut)[0], plain)
    assert f"left out: 1 embedding rows from id {rows} on" in capsys.readouterr().out
    assert json.loads((cut / "params.json").read_text())["vocab_size"] == -1
    kept = run(hf, hf.parent / "kept", "--keep_added_tokens")
    assert json.loads((kept / "params.json").read_text())["vocab_size"] == rows + 1
    assert torch.equal(read_shards(kept)[0]["output.weight"], load_file(hf / "model.safetensors")["lm_head.weight"])
    with pytest.raises(
        InputError, match=rf"'output.weight' \({rows + 1}, 64\) cannot be split over 2 .* choose another"
    ):
        run(hf, hf.parent / "two", "--keep_added_tokens", "--num_shards", "2")


@pytest.mark.parametrize("way", ["--adapter", "its folder"])
def test_an_adapter_is_merged_on_the_way(way: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    adapter = save_adapter(hf.parent / "adapter", hf)
    flags = ["--adapter", str(adapter)] if way == "--adapter" else []
    folder = run(hf if flags else adapter, hf.parent / "ckpt", *flags, "--num_shards", "2")
    assert "merging: LoRA adapter of" in capsys.readouterr().out
    merged = load_file(convert_back(folder, tmp_path / "again") / "model.safetensors")
    expected = merged_by_peft(hf, adapter)
    for name, tensor in merged.items():
        assert torch.allclose(tensor.float(), expected[name], rtol=2**-11 + 1e-6, atol=2**-24), name
    shutil.rmtree(adapter)
    save_adapter(adapter, hf, std=1e-9)
    with pytest.raises(InputError, match="changes none of the 14 weights"):
        run(hf, hf.parent / "nothing", "--adapter", str(adapter))
    assert not (hf.parent / "nothing").exists()


# Params ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "ffn", "numbers"),
    [
        (4096, 11008, (256, None)), (5120, 13824, (256, None)), (6656, 17920, (256, None)), (8192, 22016, (256, None)),
        (8192, 28672, (4096, 1.3)), (4096, 14336, (1024, 1.3)), (16384, 53248, (4096, 1.2)), (2048, 8192, (256, 1.5)),
        (3072, 8192, (256, 1.0)),
    ],
)  # fmt: skip
def test_metas_own_numbers_for_its_sizes(width: int, ffn: int, numbers: tuple[int, float | None]):
    assert meta_params.find_ffn_numbers(width, ffn) == numbers
    assert layout.ffn_width(width, *numbers) == ffn


def test_any_feed_forward_width_has_numbers():
    for width in (64, 96, 288, 2560):
        for ffn in range(1, 4 * width, 7):
            assert layout.ffn_width(width, *meta_params.find_ffn_numbers(width, ffn)) == ffn, (width, ffn)


LOW_2 = {  # Meta's code has 1 for low_freq_factor, and no place to say another
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"model_type": "mistral"}, "its model_type is 'mistral', not llama"),
        ({"attention_bias": True}, "has attention_bias, which Meta's LLaMA has not"),
        ({"hidden_act": "gelu"}, "has hidden_act gelu"),
        ({"head_dim": 16}, r"8 heads \(4 for keys and values\) of 16 do not make the hidden_size 64"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "its rope type 'yarn' is not one of"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "needs a number above 0 for 'low_freq_factor'"),
        ({"rope_parameters": LOW_2}, "cannot have the rope"),
        ({"hidden_size": "many"}, "expected a whole number from 1 to .* for 'hidden_size', found 'many'"),
        ({"quantization_config": {"bits": 4}}, "was saved quantized by an unnamed method, .* take the model"),
        ({"num_hidden_layers": 3}, r"lacks weights of its model: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, r"holds weights of layer 1 \(counted from 0\), and its config.json says that"),
        ({"intermediate_size": 128}, r"gate_proj.weight is \[176, 64\], config.json makes it \[128"),
    ],
)  # fmt: skip
def test_models_that_meta_has_not_are_refused(values: dict[str, object], text: str, hf: Path):
    edit_config(hf, **values)
    with pytest.raises(InputError, match=text):
        run(hf, hf.parent / "ckpt")
    assert only(hf.parent, "hf")


def test_the_usual_number_of_shards():
    sizes = {"7B": (4096, 32, 1), "13B": (5120, 40, 2), "30B": (6656, 60, 4), "65B": (8192, 80, 8)}
    for width, num_layers, num_shards in sizes.values():
        shape = layout.describe(width=width, num_layers=num_layers, num_heads=64, num_kv_heads=64, ffn_width=1,
                                  vocab_size=1, norm_eps=1e-5, rope_theta=1e4)  # fmt: skip
        assert meta_params.usual_shards(shape) == num_shards


# The file format ------------------------------------------------------------------------------------------------


def test_the_file_is_a_torch_file_and_a_sound_archive(tmp_path: Path):
    tensors = {"a": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 3, 4)}
    tensors["d"] = torch.ones(1).double()
    specs = [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]
    with TensorFileWriter(tmp_path / "consolidated.00.pth", specs) as file:
        for tensor in tensors.values():
            file.write(tensor)
    for mmap in (False, True):
        for weights_only in (False, True):
            found = torch.load(tmp_path / "consolidated.00.pth", mmap=mmap, weights_only=weights_only)
            assert same_tensors(found, tensors)
            assert list(found) == list(tensors)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth") as archive:
        assert archive.testzip() is None
    torch.save(tensors, tmp_path / "theirs.pth")
    with zipfile.ZipFile(tmp_path / "theirs.pth") as theirs, zipfile.ZipFile(tmp_path / "consolidated.00.pth") as ours:
        same = {name: theirs.read(f"theirs/{name}") for name in ("data/0", "data/3", "version", "byteorder")}
        assert {name: ours.read(f"consolidated.00/{name}") for name in same} == same
    content = (tmp_path / "consolidated.00.pth").read_bytes()
    assert content.index(tensors["a"].numpy().tobytes()) % 64 == 0


@pytest.mark.slow
def test_files_above_4_gigabytes(tmp_path: Path):
    """Sizes and offsets beyond 32 bits. One block of rows is all that is in memory."""
    rows, width = 2**17, 2**14
    specs = [TensorSpec(name=name, shape=(rows if name == "a" else 3, width), dtype=torch.float16) for name in "ab"]
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    with TensorFileWriter(tmp_path / "x.pth", specs) as file:
        file.write(torch.ones(1, width, dtype=torch.float16).expand(rows, width))
        file.write(torch.full((3, width), 2.0))
    found = torch.load(tmp_path / "x.pth", mmap=True, weights_only=True)
    assert found["a"].shape == (rows, width)
    assert float(found["a"][-1].float().mean()) == 1.0
    assert float(found["b"].float().mean()) == 2.0
    (tmp_path / "x.pth").unlink()


# Refused, interrupted -------------------------------------------------------------------------------------------


def shrink_head(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-8].clone()
    save_file(tensors, hf / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (damage_end, InputError, r"model.safetensors is damaged or not a safetensors file"),
        (lose_shard, MissingInput, r"names files that are not there: model-00002-of-00002.safetensors"),
        (shrink_head, InputError, r"lm_head.weight is \[\d+, 64\], config.json makes it \[\d+, 64\]"),
        (lambda hf: (hf / "config.json").unlink(), MissingInput, r"config.json is missing; found there: generation"),
        (lambda hf: (hf / "tokenizer.model").unlink(), MissingInput, r"no tokenizer.model .*: Meta's code reads no"),
        (
            lambda hf: (hf / "tokenizer.model").write_text("no"),
            InputError,
            r"is neither a SentencePiece model .* nor a",
        ),
    ],
)
def test_damaged_models_are_refused_before_anything_is_written(damage, error, text: str, hf: Path):
    damage(hf)
    with pytest.raises(error, match=text):
        run(hf, hf.parent / "ckpt")
    assert only(hf.parent, "hf")


def test_another_models_tokenizer_is_refused(hf: Path, real: Path):
    with pytest.raises(InputError, match=r"has 32000 tokens, the embedding of .*hf \d+ rows: this is another model's"):
        run(hf, hf.parent / "ckpt", "--tokenizer_model", str(real / "llama-tokenizer" / "tokenizer.model"))
    with pytest.raises(MissingInput, match="no file nowhere; --tokenizer_model names"):
        run(hf, hf.parent / "ckpt", "--tokenizer_model", "nowhere")


def test_shards_that_do_not_divide_and_outputs_that_exist(hf: Path):
    with pytest.raises(InputError, match=r"cannot be split over 3 shards on axis \d; choose another --num_shards"):
        run(hf, hf.parent / "ckpt", "--num_shards", "3")
    with pytest.raises(SystemExit):
        parse_arguments(["--output_dir", "x", "--num_shards", "0"])
    before = contents(hf)
    for output in (hf, hf.parent):
        with pytest.raises(InputError, match=r"the output .* is, or holds, what is read from: --input_dir \("):
            run(hf, output, "--overwrite")
    (hf.parent / "tokens").mkdir()
    tokenizer = shutil.copy(hf / "tokenizer.model", hf.parent / "tokens")
    with pytest.raises(InputError, match=r"tokens is, or holds, what is read from: the tokenizer \("):
        run(hf, hf.parent / "tokens", "--tokenizer_model", str(tokenizer), "--overwrite")
    assert contents(hf) == before
    run(hf, hf.parent / "ckpt")
    with pytest.raises(OutputExists, match="ckpt exists already; pass --overwrite"):
        run(hf, hf.parent / "ckpt")


def test_values_that_read_back_as_others_are_noticed(hf: Path, monkeypatch: pytest.MonkeyPatch):
    real = sharding.metas_order
    monkeypatch.setattr(sharding, "metas_order", lambda place, whole: real(place, whole).flip(0))
    with pytest.raises(InputError, match=r"tok_embeddings.weight reads back as other values"):
        run(hf, hf.parent / "ckpt")
    assert only(hf.parent, "hf")


def test_a_full_disk_leaves_the_old_output(hf: Path, monkeypatch: pytest.MonkeyPatch):
    before, real = contents(run(hf, hf.parent / "ckpt")), shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(NotEnoughSpace, match=r"needs 0\.02 GB and its disk has 0\.00 GB free"):
        run(hf, hf.parent / "ckpt", "--overwrite")
    monkeypatch.setattr(shutil, "disk_usage", real)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFileWriter, "write", full)
    with pytest.raises(NotEnoughSpace, match=r"the disk ran full while .*ckpt was written"):
        run(hf, hf.parent / "ckpt", "--overwrite")
    assert contents(hf.parent / "ckpt") == before
    assert only(hf.parent, "hf", "ckpt")


KILLED = """
import os, pathlib, signal, sys
from alpaca.formats.meta import from_hf
import convert.export_state_dict_checkpoint as command
def die(*args, **values):
    os.kill(os.getpid(), signal.SIGKILL)
stage = sys.argv.pop(1)
if stage == "writing": from_hf.sharding.shard_part = die
if stage == "checksums": from_hf.meta_files.write_checklist = die
if stage == "verifying": from_hf._verify = die
if stage == "renaming": pathlib.Path.rename = die
command.run_command(command.main)
"""


@pytest.mark.parametrize(
    ("stage", "old"), [("writing", True), ("checksums", False), ("verifying", False), ("renaming", True)]
)
def test_killed_at_any_stage_it_can_be_run_again(stage: str, old: bool, hf: Path):
    clean, target = contents(run(hf, hf.parent / "clean", "--num_shards", "2")), hf.parent / "ckpt"
    if old:
        target.mkdir()
        (target / "old").write_text("old")
    flags = ["--input_dir", str(hf), "--output_dir", str(target), "--num_shards", "2", "--overwrite"]
    died = run_code(KILLED, stage, *flags)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert contents(target) == {"old": b"old"} if old else not target.exists()
    assert contents(export(parse_arguments(flags))) == clean  # to the byte: nothing in the files is of the moment
    assert only(hf.parent, "clean", "ckpt", "hf")


def test_command_says_what_it_does_and_a_mistake_is_one_line(hf: Path):
    command = [sys.executable, "-m", "convert.export_state_dict_checkpoint", "--input_dir", str(hf), "--output_dir",
               str(hf.parent / "ckpt")]  # fmt: skip
    good = run_command(command)
    assert good.returncode == 0, good.stderr
    assert re.search(r"hf: 1 shard, \d+ tokens", good.stdout)
    assert re.search(r"wrote .*ckpt in \d", good.stdout)
    assert "B/s" in good.stderr
    assert "exists already; pass --overwrite" in mistake_of(command)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", ["1", "4"])
def test_memory_does_not_depend_on_the_models_size(num_shards: str, tokenizer_model: Path, tmp_path: Path):
    base, largest = save_large(tmp_path / "base", tokenizer_model)
    flags = ["--input_dir", str(base), "--output_dir", str(tmp_path / "ckpt"), "--num_shards", num_shards]
    assert peak_of("convert.export_state_dict_checkpoint", *flags) < 2 * largest + 300e6
    assert (
        sum(spec.num_bytes for spec in WeightsFolder(base).specs())
        < sum(file.stat().st_size for file in (tmp_path / "ckpt").glob("*.pth")) + 10**6
    )


def test_llama_3_goes_there_and_back_with_its_tokenizer(llama_3_1, tmp_path: Path):
    meta, tensors, tokenizer = llama_3_1
    hf = convert_back(meta, tmp_path / "hf")
    back = run(hf, tmp_path / "ckpt")
    assert (back / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert same_tensors(read_shards(back)[0], tensors)
