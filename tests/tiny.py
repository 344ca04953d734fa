"""Tiny models and tokenizers for the tests, and an independent LLaMA after Meta's description.

Nothing here uses the project's code: it is what the project's code is held against.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

TEXT = """
Below is an instruction that describes a task. Write a response that appropriately completes the request.
An alpaca is a domesticated animal of South America kept for its wool. Name three colours. Red, green, blue.
What is the capital of Peru? Lima. สวัสดีครับ ประเทศไทย 🦙 ¿Dónde está la biblioteca? 0123456789
"""


def train_tokenizer(folder: Path, *, vocab_size: int = 400) -> Path:
    """A SentencePiece model of Meta's kind (BPE, byte fallback, no normalisation) at folder/tokenizer.model."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    words = TEXT.split()
    sentences = [" ".join(words[i : i + 9]) for i in range(len(words))] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


@dataclass(frozen=True, kw_only=True)
class TinyLlama:
    """The sizes of a tiny LLaMA, as params.json names them."""

    vocab_size: int
    dim: int = 64
    n_layers: int = 2
    n_heads: int = 8
    n_kv_heads: int = 8
    multiple_of: int = 16
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def ffn(self) -> int:
        return -(-(8 * self.dim // 3) // self.multiple_of) * self.multiple_of

    def tensors(self, *, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
        """Random weights under Meta's names."""
        generator = torch.Generator().manual_seed(seed)
        dim, kv = self.dim, self.n_kv_heads * (self.dim // self.n_heads)

        def random(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

        tensors = {"tok_embeddings.weight": random(self.vocab_size, dim) * 4}
        for layer in range(self.n_layers):
            tensors |= {
                f"layers.{layer}.attention.wq.weight": random(dim, dim) * 2,
                f"layers.{layer}.attention.wk.weight": random(kv, dim) * 2,
                f"layers.{layer}.attention.wv.weight": random(kv, dim),
                f"layers.{layer}.attention.wo.weight": random(dim, dim),
                f"layers.{layer}.feed_forward.w1.weight": random(self.ffn, dim),
                f"layers.{layer}.feed_forward.w2.weight": random(dim, self.ffn),
                f"layers.{layer}.feed_forward.w3.weight": random(self.ffn, dim),
                f"layers.{layer}.attention_norm.weight": 1 + random(1, dim)[0],
                f"layers.{layer}.ffn_norm.weight": 1 + random(1, dim)[0],
            }
        frequencies = 1.0 / self.rope_theta ** (torch.arange(0, dim // self.n_heads, 2) / (dim // self.n_heads))
        return {
            **tensors,
            "norm.weight": 1 + random(1, dim)[0],
            "output.weight": random(self.vocab_size, dim) * 4,
            "rope.freqs": frequencies.to(dtype),
        }

    def forward(self, tensors: dict[str, torch.Tensor], ids: list[int], dtype=torch.float64) -> torch.Tensor:
        """Logits [T, V] of Meta's model: complex rotary embedding of adjacent pairs, plain softmax attention."""
        w = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        x, positions, head_dim = w["tok_embeddings.weight"][ids], torch.arange(len(ids)), self.dim // self.n_heads
        angles = torch.outer(positions.double(), self.rope_theta ** -(torch.arange(0, head_dim, 2).double() / head_dim))
        turn = torch.polar(torch.ones_like(angles), angles)
        causal = torch.full((len(ids), len(ids)), float("-inf"), dtype=dtype).triu(1)

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm_eps) * weight

        def rotate(x: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
            return torch.view_as_real(pairs * turn[:, None]).flatten(2).to(dtype)

        for layer in range(self.n_layers):
            p = f"layers.{layer}."
            h = norm(x, w[p + "attention_norm.weight"])
            q, k, v = (
                (h @ w[p + f"attention.{name}.weight"].T).view(len(ids), -1, head_dim) for name in ("wq", "wk", "wv")
            )
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (rotate(k), v))
            scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / head_dim**0.5 + causal
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(ids), -1)
            x = x + mixed @ w[p + "attention.wo.weight"].T
            h = norm(x, w[p + "ffn_norm.weight"])
            gate = torch.nn.functional.silu(h @ w[p + "feed_forward.w1.weight"].T)
            x = x + (gate * (h @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
        return norm(x, w["norm.weight"]) @ w["output.weight"].T

    def params(self, **changes: object) -> dict[str, object]:
        """params.json as LLaMA 1 has it; n_kv_heads only where heads are grouped."""
        params: dict[str, object] = {
            "dim": self.dim, "multiple_of": self.multiple_of, "n_heads": self.n_heads, "n_layers": self.n_layers,
            "norm_eps": self.norm_eps, "vocab_size": -1,
        }  # fmt: skip
        if self.n_kv_heads != self.n_heads:
            params["n_kv_heads"] = self.n_kv_heads
        if self.rope_theta != 10000.0:
            params["rope_theta"] = self.rope_theta
        return {**params, **changes}


def split_for_rank(name: str, tensor: torch.Tensor, rank: int, num_shards: int) -> torch.Tensor:
    """What model-parallel rank `rank` holds of a tensor: rows, columns, or all of it."""
    if any(part in name for part in (".wq.", ".wk.", ".wv.", ".w1.", ".w3.", "output.")):
        return tensor.chunk(num_shards, dim=0)[rank].clone()
    if any(part in name for part in (".wo.", ".w2.", "tok_embeddings.")):
        return tensor.chunk(num_shards, dim=1)[rank].clone()
    return tensor.clone()


def write_meta(
    folder: Path, tensors: dict[str, torch.Tensor], params: dict[str, object], *, num_shards: int = 1
) -> Path:
    """A checkpoint folder as Meta ships it, checklist included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for rank in range(num_shards):
        shard = {name: split_for_rank(name, tensor, rank, num_shards) for name, tensor in tensors.items()}
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    write_checklist(folder, sorted(folder.iterdir()))
    return folder


def write_checklist(folder: Path, files: Iterable[Path]) -> None:
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files if path.suffix != ".chk"]
    (folder / "checklist.chk").write_text("".join(lines))
