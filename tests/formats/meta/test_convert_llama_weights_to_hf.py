"""Conversion: the converted model computes what Meta's does, weights arrive bit for bit, and every error is clear."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alpaca.errors import InputError, MissingInput, NotEnoughSpace, OutputExists
from alpaca.files.atomic import replaced_folder
from alpaca.formats.hf.folder import WeightsFolder
from alpaca.formats.meta.to_hf import convert
from convert.convert_llama_weights_to_hf import parse_arguments
from tests.conftest import ROOT
from tests.processes import end_while_writing, mistake_of, run_code
from tests.tiny import TinyLlama, split_for_rank, train_tokenizer, write_checklist, write_meta


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vocab_size(tokenizer_model: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(tokenizer_model)).get_piece_size()


@pytest.fixture
def tiny(tmp_path: Path, tokenizer_model: Path, vocab_size: int) -> TinyLlama:
    """A one-shard checkpoint at tmp_path/in/T."""
    model = TinyLlama(vocab_size=vocab_size)
    write_meta(tmp_path / "in" / "T", model.tensors(), model.params())
    shutil.copy(tokenizer_model, tmp_path / "in" / "tokenizer.model")
    return model


def run(tmp_path: Path, *flags: str) -> Path:
    base = ["--input_dir", str(tmp_path / "in"), "--model_size", "T", "--output_dir", str(tmp_path / "out")]
    return convert(parse_arguments([*base, *flags]))


def hf_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model(torch.tensor([ids])).logits[0].detach()


# What arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "sizes", [{}, {"n_kv_heads": 8, "n_heads": 16, "dim": 128}, {"rope_theta": 1e6, "norm_eps": 1e-3}]
)
@pytest.mark.fast_rows(3)
def test_logits_equal_metas_forward(tmp_path, tokenizer_model, vocab_size, num_shards, sizes):
    model = TinyLlama(vocab_size=vocab_size - vocab_size % 8, **sizes)
    tensors = model.tensors()
    write_meta(tmp_path / "in" / "T", tensors, model.params(), num_shards=num_shards)
    train_tokenizer(tmp_path / "in", vocab_size=model.vocab_size)
    folder = run(tmp_path)
    ids = [1, 5, 260, 300, 17, 17, 301, 9]
    torch.testing.assert_close(hf_logits(folder, ids), model.forward(tensors, ids), rtol=1e-6, atol=1e-5)


def test_any_number_of_shards_gives_the_same_bytes(tmp_path, tiny):
    whole = run(tmp_path)
    for num_shards in (2, 4, 8):
        shutil.rmtree(tmp_path / "in" / "T")
        write_meta(tmp_path / "in" / "T", tiny.tensors(), tiny.params(), num_shards=num_shards)
        split = run(tmp_path, "--output_dir", str(tmp_path / f"out{num_shards}"))
        assert (split / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_embedding_split_on_its_rows_is_read_from_the_shapes(tmp_path, tiny):
    whole = run(tmp_path)
    for rank, name in enumerate(["consolidated.00.pth", "consolidated.01.pth"]):
        shard = {key: split_for_rank(key, tensor, rank, 2) for key, tensor in tiny.tensors().items()}
        shard["tok_embeddings.weight"] = tiny.tensors()["tok_embeddings.weight"].chunk(2, dim=0)[rank].clone()
        torch.save(shard, tmp_path / "in" / "T" / name)
    split = run(tmp_path, "--skip_checksums", "--output_dir", str(tmp_path / "rows"))
    assert (split / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_weights_arrive_bit_for_bit_and_config_is_the_checkpoints(tmp_path, tiny):
    folder = run(tmp_path)
    written, source = load_file(folder / "model.safetensors"), tiny.tensors()
    same = {"model.layers.1.mlp.gate_proj.weight": "layers.1.feed_forward.w1.weight",
            "model.layers.1.mlp.up_proj.weight": "layers.1.feed_forward.w3.weight",
            "model.embed_tokens.weight": "tok_embeddings.weight", "lm_head.weight": "output.weight"}  # fmt: skip
    for hf_name, meta_name in same.items():
        assert written[hf_name].dtype == torch.float16
        assert torch.equal(written[hf_name], source[meta_name])
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert (config["vocab_size"], config["intermediate_size"]) == (tiny.vocab_size, tiny.ffn)
    assert (config["max_position_embeddings"], config["rms_norm_eps"]) == (2048, tiny.norm_eps)
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_on_request_is_the_checkpoints_value_rounded_once(tmp_path, tiny, dtype):
    name = str(dtype).removeprefix("torch.")
    half = load_file(run(tmp_path) / "model.safetensors")
    cast = load_file(run(tmp_path, "--dtype", name, "--output_dir", str(tmp_path / name)) / "model.safetensors")
    assert {key: tensor.dtype for key, tensor in cast.items()} == dict.fromkeys(half, dtype)
    assert all(torch.equal(cast[key], half[key].to(dtype)) for key in half)


def test_ffn_multiplier_and_context_come_from_params(tmp_path, tiny):
    tensors = tiny.tensors()
    wide = 208  # int(1.2 * int(8 * 64 / 3)) = 204, rounded up to a multiple of 16
    for layer in range(tiny.n_layers):
        for name, shape in (("w1", (wide, 64)), ("w2", (64, wide)), ("w3", (wide, 64))):
            tensors[f"layers.{layer}.feed_forward.{name}.weight"] = torch.ones(shape, dtype=torch.float16)
    write_meta(
        tmp_path / "in" / "T", tensors, tiny.params(ffn_dim_multiplier=1.2, max_seq_len=777, vocab_size=tiny.vocab_size)
    )
    config = json.loads((run(tmp_path) / "config.json").read_text())
    assert (config["intermediate_size"], config["max_position_embeddings"]) == (wide, 777)


def test_sharded_output_loads_and_says_its_sizes(tmp_path, tiny):
    whole = load_file(run(tmp_path) / "model.safetensors")
    folder = run(tmp_path, "--max_shard_size", "60KB", "--output_dir", str(tmp_path / "cut"))
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 70_000 or len(load_file(file)) == 1 for file in files)
    parts = WeightsFolder(folder)
    assert set(parts.names) == set(whole)
    assert all(torch.equal(parts.tensor(name), whole[name]) for name in whole)
    assert torch.isfinite(hf_logits(folder, [1, 2, 3])).all()


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_real_model_gives_its_published_text(tmp_path, real, num_shards):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = real / "unconverted-weights"
    tensors = torch.load(source / "260K" / "consolidated.00.pth", weights_only=True)
    params = json.loads((source / "260K" / "params.json").read_text())
    if num_shards == 1:
        shutil.copytree(source / "260K", tmp_path / "in" / "T")
    else:
        write_meta(tmp_path / "in" / "T", tensors, params, num_shards=num_shards)
    shutil.copy(source / "tokenizer.model", tmp_path / "in")
    folder = run(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=256, do_sample=False)
    text = (real / "stories260k-greedy.txt").read_text().rstrip("\n")
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text


# What is refused --------------------------------------------------------------------------------------------------


def nothing_was_written(tmp_path: Path) -> bool:
    return not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*"))


def test_damaged_file_is_named_and_nothing_written(tmp_path, tiny):
    shard = tmp_path / "in" / "T" / "consolidated.00.pth"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"consolidated\.00\.pth: md5 \w+, the checklist says"):
        run(tmp_path)
    assert nothing_was_written(tmp_path)
    run(tmp_path, "--skip_checksums")


def test_damaged_tokenizer_is_named(tmp_path, tiny):
    (tmp_path / "in" / "tokenizer_checklist.chk").write_text("0" * 32 + "  tokenizer.model\n")
    with pytest.raises(InputError, match=r"tokenizer\.model: md5"):
        run(tmp_path)


def test_checklist_naming_a_missing_file(tmp_path, tiny):
    with open(tmp_path / "in" / "T" / "checklist.chk", "a") as file:
        file.write("0" * 32 + "  consolidated.01.pth\n")
    with pytest.raises(MissingInput, match=r"consolidated\.01\.pth, which is missing; found: .*consolidated\.00\.pth"):
        run(tmp_path)


def test_unreadable_checklist(tmp_path, tiny):
    (tmp_path / "in" / "T" / "checklist.chk").write_text("not a checksum\n")
    with pytest.raises(InputError, match="line 1: expected an md5 and a file name"):
        run(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_pickle_without_a_checklist(tmp_path, tiny, keep):
    shard = tmp_path / "in" / "T" / "consolidated.00.pth"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    (tmp_path / "in" / "T" / "checklist.chk").unlink()
    with pytest.raises(InputError, match=r"consolidated\.00\.pth .* is damaged, truncated or no Meta checkpoint"):
        run(tmp_path)
    assert nothing_was_written(tmp_path)


def test_pickle_with_code_is_not_run(tmp_path, tiny):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"norm.weight": Trap()}, tmp_path / "in" / "T" / "consolidated.00.pth")
    with pytest.raises(InputError, match="no Meta checkpoint"):
        run(tmp_path, "--skip_checksums")
    assert not (tmp_path / "trapped").exists()


def test_something_else_than_tensors(tmp_path, tiny):
    torch.save({"model": tiny.tensors(), "step": 3}, tmp_path / "in" / "T" / "consolidated.00.pth")
    with pytest.raises(InputError, match="something else than a plain table of tensors"):
        run(tmp_path, "--skip_checksums")


def test_missing_folder_says_what_is_there(tmp_path, tiny):
    with pytest.raises(MissingInput, match=r"no folder .*13B; found in .*: T, tokenizer\.model"):
        run(tmp_path, "--model_size", "13B")


def test_model_size_is_a_name_not_a_path(tmp_path, tiny):
    with pytest.raises(InputError, match=r"names a folder in --input_dir, such as 7B; found '\.\./in/T'"):
        run(tmp_path, "--model_size", "../in/T")


def test_context_must_be_a_number(tmp_path, tiny):
    write_meta(tmp_path / "in" / "T", tiny.tensors(), tiny.params(max_seq_len="long"))
    with pytest.raises(InputError, match="expected a positive number for 'max_seq_len', found 'long'"):
        run(tmp_path)
    with pytest.raises(SystemExit):
        parse_arguments(["--model_size", "T", "--max_position_embeddings", "-5"])


def test_missing_params(tmp_path, tiny):
    (tmp_path / "in" / "T" / "params.json").unlink()
    with pytest.raises(MissingInput, match=r"params\.json is missing"):
        run(tmp_path, "--skip_checksums")


def test_missing_shards(tmp_path, tiny):
    for file in (tmp_path / "in" / "T").iterdir():
        file.unlink()
    with pytest.raises(MissingInput, match=r"no consolidated\.\*\.pth in .*T; found: nothing"):
        run(tmp_path)
    write_meta(tmp_path / "in" / "T", tiny.tensors(), tiny.params(), num_shards=4)
    (tmp_path / "in" / "T" / "consolidated.01.pth").unlink()
    with pytest.raises(MissingInput, match=r"lacks consolidated\.01\.pth; found: .*consolidated\.02\.pth"):
        run(tmp_path)


def test_too_few_shards_are_guessed_from_the_shapes(tmp_path, tiny):
    write_meta(tmp_path / "in" / "T", tiny.tensors(), tiny.params(), num_shards=4)
    for rank in (2, 3):
        (tmp_path / "in" / "T" / f"consolidated.{rank:02d}.pth").unlink()
    with pytest.raises(InputError, match=r"is this 2 of 4 shards\? Put all consolidated"):
        run(tmp_path, "--skip_checksums")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, r"tok_embeddings\.weight' is \(\d+, 64\) in each of 1 shards; with dim 32 .* 32 columns"),
        ({"multiple_of": 256}, r"w1\.weight' \(256, 64\), the tensor is \(176, 64\)"),
        ({"vocab_size": 999}, r"tok_embeddings\.weight' \(999, 64\), the tensor is \(\d+, 64\)"),
        ({"n_layers": 3}, r"no tensor 'layers\.2\.attention\.wq\.weight'"),
        ({"n_layers": 1}, r"n_layers 1, but the checkpoint also holds 'layers\.1"),
        ({"n_kv_heads": 4}, r"wk\.weight' \(32, 64\), the tensor is \(64, 64\); does n_kv_heads"),
        ({"n_heads": 4}, r"rope\.freqs' \(8,\), the tensor is \(4,\)"),
        ({"norm_eps": "1e-5"}, "expected a positive number for 'norm_eps', found '1e-5'"),
        ({"use_scaled_rope": "yes"}, "expected true or false for 'use_scaled_rope', found 'yes'"),
        ({"n_heads": 7}, "must be an even multiple of n_heads 7"),
        ({"n_heads": "8"}, "expected a positive number for 'n_heads', found '8'"),
        ({"dim": None}, "expected a positive number for 'dim', found None"),
    ],
)  # fmt: skip
def test_params_that_contradict_the_tensors(tmp_path, tiny, changes, message):
    write_meta(tmp_path / "in" / "T", tiny.tensors(), tiny.params(**changes))
    with pytest.raises(InputError, match=message):
        run(tmp_path)
    assert nothing_was_written(tmp_path)


def test_unknown_tensors_are_not_dropped(tmp_path, tiny):
    tensors = {**tiny.tensors(), "vision.weight": torch.zeros(2)}
    write_meta(tmp_path / "in" / "T", tensors, tiny.params())
    with pytest.raises(InputError, match=r"tensors that LLaMA does not have: 'vision.weight'"):
        run(tmp_path)


def test_older_place_of_the_rotary_table_is_skipped(tmp_path, tiny):
    tensors = tiny.tensors()
    table = tensors.pop("rope.freqs")
    tensors |= {f"layers.{layer}.attention.inner_attention.rope.freqs": table for layer in range(tiny.n_layers)}
    write_meta(tmp_path / "in" / "T", tensors, tiny.params())
    assert not [name for name in WeightsFolder(run(tmp_path)).names if "freq" in name]


def test_tokenizer_missing_wrong_or_no_tokenizer(tmp_path, tiny):
    file = tmp_path / "in" / "tokenizer.model"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(MissingInput, match=r"no tokenizer\.model in"):
        run(tmp_path)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        run(tmp_path)
    train_tokenizer(tmp_path / "in", vocab_size=340)
    with pytest.raises(InputError, match=r"has 340 tokens, the checkpoint's embedding \d+ rows"):
        run(tmp_path)
    (tmp_path / "in" / "T" / "tokenizer.model").write_bytes(content)  # in the size folder it wins
    run(tmp_path)


def test_hugging_face_folder_instead_of_metas(tmp_path, tiny):
    folder = run(tmp_path)
    shutil.rmtree(tmp_path / "in" / "T")
    shutil.copytree(folder, tmp_path / "in" / "T")
    with pytest.raises(InputError, match=r"holds a Hugging Face model .* already, nothing needs converting"):
        run(tmp_path, "--overwrite")


def test_not_enough_disk_is_said_before_writing(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(NotEnoughSpace, match=r"needs 0\.02 GB and its disk has 0\.00 GB free"):
        run(tmp_path)
    assert nothing_was_written(tmp_path)


def test_disk_that_runs_full_leaves_the_old_output(tmp_path, tiny, monkeypatch):
    folder = run(tmp_path)
    before = (folder / "model.safetensors").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alpaca.formats.hf.writing._write_piece", full)
    with pytest.raises(NotEnoughSpace, match="the disk ran full"):
        run(tmp_path, "--overwrite")
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["llama-t", "tokenizer"]


def test_existing_output_needs_overwrite(tmp_path, tiny):
    folder = run(tmp_path)
    with pytest.raises(OutputExists, match="pass --overwrite"):
        run(tmp_path)
    (folder / "stale").touch()
    run(tmp_path, "--overwrite")
    assert not (folder / "stale").exists()


def test_no_input_is_overwritten(tmp_path, tiny):
    source = tmp_path / "dl" / "llama-t"
    shutil.copytree(tmp_path / "in" / "T", source)
    shutil.copy(tmp_path / "in" / "tokenizer.model", source)
    before = {path: path.read_bytes() for path in (tmp_path / "dl").rglob("*") if path.is_file()}
    refused = r"the output .*dl/llama-t is, or holds, what is read from: the checkpoint \("
    for place in (["--input_dir", str(source)], ["--input_dir", str(tmp_path / "dl"), "--model_size", "llama-t"]):
        with pytest.raises(InputError, match=refused):
            convert(parse_arguments([*place, "--output_dir", str(tmp_path / "dl"), "--overwrite"]))
    tokenizer = source.rename(tmp_path / "dl" / "tokenizer")
    with pytest.raises(InputError, match=r"dl/tokenizer is, or holds, what is read from: the checkpoint \("):
        convert(parse_arguments(["--input_dir", str(tokenizer), "--output_dir", str(tmp_path / "dl"), "--overwrite"]))
    found = {path.name: path.read_bytes() for path in (tmp_path / "dl").rglob("*") if path.is_file()}
    assert found == {path.name: content for path, content in before.items()}


def test_the_checkpoint_may_lie_beside_the_output(tmp_path, tiny):
    flags = ["--input_dir", str(tmp_path / "in"), "--model_size", "T", "--output_dir", str(tmp_path / "in")]
    for more in ([], ["--overwrite"]):
        assert (convert(parse_arguments([*flags, *more])) / "config.json").is_file()


def test_another_models_tokenizer_is_not_replaced_silently(tmp_path, tiny):
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    train_tokenizer(tmp_path / "out" / "tokenizer", vocab_size=340)
    with pytest.raises(OutputExists, match="another model's"):
        run(tmp_path)
    run(tmp_path, "--overwrite")
    assert (tmp_path / "out/tokenizer/tokenizer.model").read_bytes() == (tmp_path / "in/tokenizer.model").read_bytes()


@pytest.mark.parametrize("text", ["5", "2GiB", "1.5 MB"])
def test_sizes(text):
    assert parse_arguments(["--model_size", "T", "--max_shard_size", text]).max_shard_size in (5, 2**31, 1_500_000)


@pytest.mark.parametrize("text", ["5XB", "many", "-3GB", "0"])
def test_bad_sizes(text):
    with pytest.raises(InputError, match="expected a size such as"):
        parse_arguments(["--model_size", "T", f"--max_shard_size={text}"])


# The command as a process -----------------------------------------------------------------------------------------


def command(tmp_path: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "convert.convert_llama_weights_to_hf", "--input_dir", str(tmp_path / "in"),
        "--model_size", "T", "--output_dir", str(tmp_path / "out"), *flags,
    ]  # fmt: skip


def test_command_says_what_it_does_and_a_mistake_is_one_line(tmp_path, tiny):
    good = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0
    assert "wrote" in good.stdout
    assert "B/s" in good.stderr  # progress in bytes, with its rate
    assert "exists already; pass --overwrite" in mistake_of(command(tmp_path))


SLOW_WRITER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from alpaca.formats.hf import writing
write = writing._write_piece
writing._write_piece = lambda *args: (time.sleep(0.2), write(*args))[1]
sys.argv = sys.argv[1:]
from convert import convert_llama_weights_to_hf as command
command.run_command(command.main)
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing_half_written_and_can_be_repeated(tmp_path, tiny, signal_number):
    partial = tmp_path / "out" / ".llama-t.partial" / "model.safetensors"
    ended = end_while_writing(partial, signal_number, SLOW_WRITER, *command(tmp_path)[2:])
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out" / "llama-t").exists()
    folder = run(tmp_path)
    assert set(WeightsFolder(folder).names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["llama-t", "tokenizer"]


def test_second_writer_is_refused(tmp_path, tiny):
    with replaced_folder(tmp_path / "out" / "llama-t"), pytest.raises(OutputExists, match="another process is writing"):
        run(tmp_path)


def test_killed_between_the_renames_the_old_output_comes_back(tmp_path, tiny):
    folder = run(tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    folder.rename(folder.with_name(".llama-t.replaced"))
    with pytest.raises(OutputExists, match="exists already"):
        run(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == before


MEMORY_PROBE = """
import re, sys, threading, time
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
import torch
imported = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
from convert import convert_llama_weights_to_hf as command
command.main()
print("kib", imported, peak)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, tokenizer_model, vocab_size) -> tuple[Path, int]:
    """A checkpoint of 2 shards, more than 200 MB in all, and the bytes of its largest tensor."""
    folder = tmp_path_factory.mktemp("large")
    sizes = TinyLlama(vocab_size=vocab_size, dim=1024, n_layers=1, n_heads=16, n_kv_heads=16, multiple_of=256)
    model = replace(sizes, n_layers=8)
    layer = {name: tensor for name, tensor in sizes.tensors().items() if name.startswith("layers.0.")}
    tensors = {name: tensor for name, tensor in sizes.tensors().items() if name not in layer}
    for number in range(model.n_layers):
        tensors |= {name.replace("layers.0.", f"layers.{number}."): tensor for name, tensor in layer.items()}
    write_meta(folder / "in" / "T", tensors, model.params(), num_shards=2)
    assert sum(tensor.nbytes for tensor in tensors.values()) > 200e6
    shutil.copy(tokenizer_model, folder / "in" / "tokenizer.model")
    return folder, max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("dtype", "growth"), [("auto", 1), ("float32", 2)])
def test_memory_stays_at_the_largest_tensor(large, dtype, growth):
    folder, largest = large
    flags = ["--dtype", dtype, "--skip_checksums", "--overwrite"]
    done = run_code(MEMORY_PROBE, *command(folder, *flags)[2:])
    assert done.returncode == 0, done.stderr
    imported, peak = (int(kib) * 1024 for kib in done.stdout.split()[-2:])
    assert peak - imported < growth * largest + 40e6


def test_checklist_written_by_the_tests_is_metas_format(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    write_checklist(tmp_path, [tmp_path / "a.pth"])
    assert (tmp_path / "checklist.chk").read_text() == "9dd4e461268c8034f5c8564e155c67a6  a.pth\n"
