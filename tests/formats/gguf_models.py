"""Small Hugging Face LLaMAs for the tests of GGUF export, and what gguf's own reader finds in a file."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from alpaca.formats.gguf.export import export
from alpaca.formats.hf.folder import read_description
from convert.export_gguf import parse_arguments
from tests.tiny import TEXT, train_tokenizer

LLAMA_3_PATTERN = (  # as Llama 3's tokenizer.json has it
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def run(folder: Path, target: Path, *flags: str):
    """Export and read back with gguf's own reader."""
    import gguf

    export(parse_arguments(["--input_dir", str(folder), "--output_file", str(target), *flags]))
    return gguf.GGUFReader(target)


def tensors_of(reader) -> dict[str, np.ndarray]:
    """Every tensor as float32."""
    import gguf

    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


def types_of(reader) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def value(reader, key: str):
    found = reader.get_field(key)
    return None if found is None else found.contents()


def write_model(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A random LLaMA in Hugging Face format with a trained tokenizer, its config changed as told."""
    tokenizer = train_tokenizer(folder)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": num_pieces(tokenizer),
        "max_position_embeddings": 256, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in read_description(folder).tensor_shapes().items():
        random = torch.randn(size, generator=generator)
        tensors[name] = (1 + random / 10 if "norm" in name else random * size[-1] ** -0.5).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


def num_pieces(tokenizer: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def write_byte_level(folder: Path, kind: str = "llama-bpe", *, pattern: str = LLAMA_3_PATTERN) -> list[str]:
    """A byte-level tokenizer trained on a few words, in place of the folder's own; its tokens in order.

    kind: llama.cpp's name for it. The vocabulary holds a word, the last to be merged, that no merge makes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    first = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    }.get(kind, [pre_tokenizers.Split(Regex(pattern), behavior="isolated")])
    use_regex = kind in ("gpt-2", "smollm")
    steps = [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet))
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    bos = backend.token_to_id(special[0])
    around = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], bos)])
    backend.post_processor = around
    written = json.loads(backend.to_str())
    whole = [merge for merge in written["model"]["merges"] if "".join(merge).replace("Ġ", "") in TEXT.split()]
    written["model"]["merges"].remove(whole[-1])
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(written))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    vocabulary = backend.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)
