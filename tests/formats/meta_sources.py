"""Checkpoints of every release's kind, made for the tests: tiny ones with all values, the published sizes as shapes.

Nothing here uses the project's code but the command that is tested.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alpaca.formats.meta.to_hf import convert
from convert.convert_llama_weights_to_hf import parse_arguments
from tests.tiny import write_checklist

NUM_RANKS = 400
HEADS, KV_HEADS, DIM, LAYERS = 8, 4, 128, 2


@dataclass(frozen=True, kw_only=True)
class Family:
    """One release's shape in small: its params.json beyond the sizes, and how it is split.

    embedding_axis: Meta's embedding is split on its width (1), Llama 3's on its vocabulary (0).
    head: "own", "missing" (the embedding is meant), or "copy" of the embedding.
    rope_factor: what the release scales long waves by; 1 is not at all.
    """

    params: dict[str, object]
    embedding_axis: int = 0
    has_tiktoken: bool = True
    head: str = "own"
    rope_factor: float = 1.0
    context: int = 131072
    kv_heads: int = KV_HEADS
    ffn: int = 384
    shards: tuple[int, ...] = field(default=(1, 2, 4, 8))


LLAMA_3 = {"rope_theta": 500000.0, "norm_eps": 1e-5, "multiple_of": 128, "n_kv_heads": KV_HEADS, "vocab_size": 656}
FAMILIES = {
    "LLaMA 2 70B": Family(
        params={"n_kv_heads": KV_HEADS, "multiple_of": 64, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5,
                "vocab_size": -1},
        embedding_axis=1, has_tiktoken=False, context=2048, ffn=448,  # the context by its published sizes only
    ),
    "Code Llama": Family(
        params={"rope_theta": 1000000, "multiple_of": 128, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5},
        embedding_axis=1, has_tiktoken=False, context=16384, kv_heads=HEADS,
    ),
    "Llama 3": Family(params=LLAMA_3, context=8192),
    "Llama 3.1": Family(params={**LLAMA_3, "use_scaled_rope": True}, rope_factor=8.0),
    "Llama 3.2": Family(params={**LLAMA_3, "use_scaled_rope": True}, rope_factor=32.0, head="missing"),
    "Llama 3.2, head kept": Family(
        params={**LLAMA_3, "use_scaled_rope": True}, rope_factor=32.0, head="copy", shards=(1, 4)
    ),
}  # fmt: skip


def random_model(family: Family, vocab_size: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole model's tensors under Meta's names, bfloat16."""
    chance = torch.Generator().manual_seed(seed)
    kv = family.kv_heads * (DIM // HEADS)

    def random(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=chance) * scale * columns**-0.5).bfloat16()

    tensors = {"tok_embeddings.weight": random(vocab_size, DIM, 4)}
    for i in range(LAYERS):
        attention, ffn = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
        tensors |= {
            attention + "wq.weight": random(DIM, DIM, 3), attention + "wk.weight": random(kv, DIM, 3),
            attention + "wv.weight": random(kv, DIM), attention + "wo.weight": random(DIM, DIM),
            ffn + "w1.weight": random(family.ffn, DIM), ffn + "w2.weight": random(DIM, family.ffn),
            ffn + "w3.weight": random(family.ffn, DIM),
            f"layers.{i}.attention_norm.weight": 1 + random(1, DIM)[0],
            f"layers.{i}.ffn_norm.weight": 1 + random(1, DIM)[0],
        }  # fmt: skip
    tensors["norm.weight"] = 1 + random(1, DIM)[0]
    head = {"own": random(vocab_size, DIM, 4), "copy": tensors["tok_embeddings.weight"].clone()}
    return tensors if family.head == "missing" else {**tensors, "output.weight": head[family.head]}


def split(family: Family, tensors: dict[str, torch.Tensor], num_shards: int) -> list[dict[str, torch.Tensor]]:
    """What each model-parallel rank holds; more ranks than key/value heads hold each head several times."""

    def part(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        if "norm" in name:
            return tensor.clone()
        if ".wk." in name or ".wv." in name:
            pieces = min(num_shards, family.kv_heads)
            return tensor.chunk(pieces)[rank * pieces // num_shards].clone()
        by_columns = ".wo." in name or ".w2." in name or ("tok_emb" in name and family.embedding_axis == 1)
        return tensor.chunk(num_shards, dim=int(by_columns))[rank].clone()

    return [{name: part(name, tensor, rank) for name, tensor in tensors.items()} for rank in range(num_shards)]


def write(folder: Path, family: Family, shards: list[dict[str, torch.Tensor]], tokenizer: Path, **changes) -> Path:
    """A folder as Meta ships it."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS}
    (folder / "params.json").write_text(json.dumps({**sizes, **family.params, **changes}))
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    shutil.copy(tokenizer, folder / "tokenizer.model")
    write_checklist(folder, sorted(folder.iterdir()))
    return folder


def run(base: Path, *flags: str, source: Path | None = None) -> Path:
    return convert(
        parse_arguments(["--input_dir", str(source or base / "in"), "--output_dir", str(base / "out"), *flags])
    )


# The published sizes ----------------------------------------------------------------------------------------------

# params.json of the release, shards, embedding axis; then intermediate size, context, rope factor of Meta's config.json
OLD = {"multiple_of": 256, "vocab_size": -1}
NEW = {"vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0, "n_kv_heads": 8}
SCALED = {**NEW, "use_scaled_rope": True}
PUBLISHED = {
    "7B": ({"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, **OLD}, 1, 1, 32000, 11008, 2048, None),
    "13B": ({"dim": 5120, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-6, **OLD}, 2, 1, 32000, 13824, 2048, None),
    "30B": ({"dim": 6656, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-6, **OLD}, 4, 1, 32000, 17920, 2048, None),
    "65B": ({"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5, **OLD}, 8, 1, 32000, 22016, 2048, None),
    "llama-2-7b": (
        {"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, **OLD}, 1, 1, 32000, 11008, 4096, None
    ),
    "llama-2-13b": (
        {"dim": 5120, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5, **OLD}, 2, 1, 32000, 13824, 4096, None
    ),
    "llama-2-70b": (
        {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1,
         "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 8, 1, 32000, 28672, 4096, None
    ),
    "CodeLlama-7b": (
        {"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "rope_theta": 1000000, "multiple_of": 256,
         "ffn_dim_multiplier": 1.0}, 1, 1, 32016, 11008, 16384, None
    ),
    "CodeLlama-34b": (
        {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 48, "norm_eps": 1e-5, "rope_theta": 1000000,
         "multiple_of": 256, "ffn_dim_multiplier": 1.0}, 4, 1, 32000, 22016, 16384, None
    ),
    "Meta-Llama-3-8B": (
        {"dim": 4096, "n_heads": 32, "n_layers": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **NEW},
        1, 0, 128256, 14336, 8192, None
    ),
    "Meta-Llama-3-70B": (
        {"dim": 8192, "n_heads": 64, "n_layers": 80, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, **NEW},
        8, 0, 128256, 28672, 8192, None
    ),
    "Llama3.1-8B": (
        {"dim": 4096, "n_heads": 32, "n_layers": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **SCALED},
        1, 0, 128256, 14336, 131072, 8.0
    ),
    "Llama3.1-405B-MP8": (
        {"dim": 16384, "n_heads": 128, "n_layers": 126, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, **SCALED},
        8, 0, 128256, 53248, 131072, 8.0
    ),
    "Llama3.1-405B-MP16": (
        {"dim": 16384, "n_heads": 128, "n_layers": 126, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, **SCALED},
        16, 0, 128256, 53248, 131072, 8.0
    ),
    "Llama3.2-1B": (
        {"dim": 2048, "n_heads": 32, "n_layers": 16, "multiple_of": 256, "ffn_dim_multiplier": 1.5, **SCALED},
        1, 0, 128256, 8192, 131072, 32.0
    ),
    "Llama3.2-3B": (
        {"dim": 3072, "n_heads": 24, "n_layers": 28, "multiple_of": 256, "ffn_dim_multiplier": 1.0, **SCALED},
        1, 0, 128256, 8192, 131072, 32.0
    ),
}  # fmt: skip


def published_shapes(params: dict, num_shards: int, axis: int, vocab_size: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """What one shard holds, from the sizes in Meta's config.json rather than from params.json's formula."""
    dim, n = params["dim"], num_shards
    kv_heads = params.get("n_kv_heads", params["n_heads"])
    kv = max(kv_heads // n, 1) * (dim // params["n_heads"])
    shapes = {"norm.weight": (dim,), "output.weight": (vocab_size // n, dim)}
    shapes["tok_embeddings.weight"] = (vocab_size // n, dim) if axis == 0 else (vocab_size, dim // n)
    for i in range(params["n_layers"]):
        attention, ffns = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        shapes |= {
            f"{attention}.wq.weight": (dim // n, dim), f"{attention}.wk.weight": (kv, dim),
            f"{attention}.wv.weight": (kv, dim), f"{attention}.wo.weight": (dim, dim // n),
            f"{ffns}.w1.weight": (ffn // n, dim), f"{ffns}.w2.weight": (dim, ffn // n),
            f"{ffns}.w3.weight": (ffn // n, dim), f"{attention}_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }  # fmt: skip
    return shapes
