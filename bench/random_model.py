"""A random LLaMA to measure with: a folder of Hugging Face's, its tokenizer made up where Meta's is not at hand."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.errors import MissingInput
from alpaca.files.atomic import write_json
from alpaca.files.outputs import require_free_space
from alpaca.formats.hf.folder import SAFETENSORS_NAMES, TensorSpec
from alpaca.formats.hf.writing import write_weights
from alpaca.text.sentencepiece import SentencePieceTokenizer, write_llama_tokenizer
from bench.machine import DEVICE
from bench.provenance import find_real

VOCAB_SIZE = 32_000
CONTEXT = 2048


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a random LLaMA."""

    width: int
    num_layers: int
    num_heads: int
    ffn_width: int


SHAPES = {
    "tiny": Shape(width=64, num_layers=2, num_heads=2, ffn_width=128),  # nothing to measure
    "20m": Shape(width=256, num_layers=4, num_heads=8, ffn_width=688),
    "46m": Shape(width=512, num_layers=4, num_heads=8, ffn_width=1376),
    "7b": Shape(width=4096, num_layers=32, num_heads=32, ffn_width=11008),
    "7b-1": Shape(width=4096, num_layers=1, num_heads=32, ffn_width=11008),  # needs the kernels that 7b needs
}


@contextlib.contextmanager
def model_folder(weights: Path | None, shape: str, dtype: str) -> Iterator[Path]:
    """The given folder, or a random model that is removed in the end. Raises MissingInput."""
    if weights is not None:
        if not (weights / "config.json").is_file():
            raise MissingInput(f"no model at {weights}: no config.json; leave --weights out for a random one")
        yield weights
        return
    with tempfile.TemporaryDirectory(prefix="alpaca-bench-") as folder:
        write_random_llama(Path(folder), SHAPES[shape], getattr(torch, dtype))
        yield Path(folder)


def write_random_llama(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """A LLaMA whose logits vary by about 2, far from flat and far from overflow, with a vocabulary of 32,000."""
    write_llama_configs(folder, shape, dtype)
    specs = random_llama_specs(shape, dtype)
    require_free_space(folder, sum(spec.num_bytes for spec in specs))
    generator = torch.Generator(DEVICE).manual_seed(0)
    write_weights(folder, specs, lambda spec: [random_tensor(spec, shape, generator).cpu()], max_shard_size=5 * 10**9)


def write_hollow_llama(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """The same folder with a weights file that is one hole: no bytes on the disk, and zeros for whoever reads it.

    For runs that draw their weights on the device and want of the folder only names, shapes, configs and tokenizer.
    """
    write_llama_configs(folder, shape, dtype)
    entries: dict[str, dict[str, object]] = {}
    start = 0
    for spec in random_llama_specs(shape, dtype):
        offsets = [start, start + spec.num_bytes]
        entries[spec.name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(spec.shape), "data_offsets": offsets}
        start += spec.num_bytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + start)


def write_llama_configs(folder: Path, shape: Shape, dtype: torch.dtype) -> None:
    """config.json, generation_config.json and a tokenizer of 32,000 pieces."""
    from transformers import LlamaConfig  # takes seconds, and most who import this module want sizes only

    real_model = find_real("llama-tokenizer/tokenizer.model")
    model_file = real_model or write_synthetic_tokenizer(folder / "tokenizer.model")
    write_llama_tokenizer(model_file, folder, max_length=CONTEXT)
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    assert tokenizer.size == VOCAB_SIZE, tokenizer.size
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=shape.width, intermediate_size=shape.ffn_width,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_heads,
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-6, tie_word_embeddings=False, dtype=dtype,
        architectures=["LlamaForCausalLM"], **ids,
    )  # fmt: skip
    config.save_pretrained(folder)
    write_json(folder / "generation_config.json", ids)


def random_llama_specs(shape: Shape, dtype: torch.dtype) -> list[TensorSpec]:
    square, wide = (shape.width, shape.width), (shape.ffn_width, shape.width)
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, shape.width)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        sizes |= {f"{prefix}self_attn.{name}_proj.weight": square for name in "qkvo"}
        sizes |= {f"{prefix}mlp.{name}_proj.weight": wide for name in ("gate", "up")}
        sizes |= {f"{prefix}mlp.down_proj.weight": wide[::-1]}
        sizes |= {f"{prefix}{name}_layernorm.weight": (shape.width,) for name in ("input", "post_attention")}
    sizes |= {"model.norm.weight": (shape.width,), "lm_head.weight": (VOCAB_SIZE, shape.width)}
    return [TensorSpec(name=name, shape=size, dtype=dtype) for name, size in sizes.items()]


def random_tensor(spec: TensorSpec, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Normal, scaled so that variances stay near 1 through the layers; what is added to the stream, a little less.

    On the generator's device, of the dtype and shape of `spec`.
    """
    if "norm" in spec.name:
        return torch.ones(spec.shape, dtype=spec.dtype, device=generator.device)
    scale = {"embed_tokens": 1.0, "lm_head": 2 * shape.width**-0.5}.get(spec.name.split(".")[-2], spec.shape[1] ** -0.5)
    if "o_proj" in spec.name or "down_proj" in spec.name:
        scale /= (2 * shape.num_layers) ** 0.5
    values = torch.randn(spec.shape, generator=generator, device=generator.device)
    return values.mul_(scale).to(spec.dtype)


def write_synthetic_tokenizer(path: Path) -> Path:
    """A SentencePiece BPE model of 32,000 pieces for places without Meta's: bytes, letters, and words of a to z.

    A piece of more than one letter starts a word, so each is reached by adding its letters in order.
    """
    from sentencepiece import sentencepiece_model_pb2

    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [f"▁{letter}" for letter in letters]
    for word in words:  # grows behind itself: ▁a … ▁z, ▁aa … ▁zz, ▁aaa …
        if len(words) >= VOCAB_SIZE:
            break
        words += [word + letter for letter in letters]
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{value:02X}>", kinds.BYTE) for value in range(256)]
    plain = [(text, kinds.NORMAL) for text in ("▁", *letters)]
    pieces += [(word, kinds.NORMAL) for word in words[: VOCAB_SIZE - len(pieces) - len(plain)]] + plain
    proto = sentencepiece_model_pb2.ModelProto()
    for rank, (text, kind) in enumerate(pieces):
        proto.pieces.add(piece=text, score=-float(rank) if kind == kinds.NORMAL else 0.0, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, VOCAB_SIZE
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix = "identity", True
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    path.write_bytes(proto.SerializeToString())
    return path
