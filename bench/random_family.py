"""A random model of 40 to 60 million parameters of a family that the engine computes, with its real number of tokens.

    python -m bench.random_family gemma2 /tmp/gemma2 && python -m bench.serve --weights /tmp/gemma2

Its tokenizer is the random LLaMA's: the rows beyond its 32,000 tokens are computed, and never chosen.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca.errors import run_command
from alpaca.text.sentencepiece import write_llama_tokenizer
from bench.provenance import find_real
from bench.random_model import CONTEXT, write_synthetic_tokenizer

_SMALL = dict(
    num_hidden_layers=4, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# Vocabularies are those of the published models; widths are what leaves 40 to 60 million parameters.
SIZES: dict[str, dict[str, object]] = {
    "mistral": dict(vocab_size=32_768, hidden_size=512, intermediate_size=1376, heads=(8, 2), sliding_window=512),
    "ministral": dict(vocab_size=131_072, hidden_size=192, intermediate_size=640, heads=(6, 2), sliding_window=512),
    "qwen2": dict(vocab_size=151_936, hidden_size=256, intermediate_size=688, heads=(8, 2), tie_word_embeddings=True),
    "qwen3": dict(vocab_size=151_936, hidden_size=256, intermediate_size=688, heads=(8, 2), tie_word_embeddings=True),
    "phi3": dict(vocab_size=32_064, hidden_size=512, intermediate_size=1376, heads=(8, 8)),
    "gemma": dict(vocab_size=256_000, hidden_size=160, intermediate_size=640, heads=(4, 1)),
    "gemma2": dict(vocab_size=256_000, hidden_size=160, intermediate_size=640, heads=(4, 2), sliding_window=512),
    "gemma3_text": dict(vocab_size=262_144, hidden_size=160, intermediate_size=640, heads=(4, 1), sliding_window=512),
    "smollm3": dict(vocab_size=128_256, hidden_size=320, intermediate_size=1024, heads=(8, 2)),
    "granite": dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, heads=(9, 3), tie_word_embeddings=True),
    "olmo2": dict(vocab_size=100_352, hidden_size=256, intermediate_size=688, heads=(8, 8)),
    "exaone4": dict(vocab_size=102_400, hidden_size=384, intermediate_size=1024, heads=(8, 2), sliding_window=512,
                    tie_word_embeddings=True),
    "mixtral": dict(vocab_size=32_000, hidden_size=384, intermediate_size=768, heads=(8, 2)),
    "qwen3_moe": dict(vocab_size=151_936, hidden_size=192, intermediate_size=512, heads=(6, 2), num_experts=40,
                      num_experts_per_tok=4, moe_intermediate_size=128, tie_word_embeddings=True),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=SIZES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write_random_family(options.folder, options.family)


def make_config(family: str):
    """transformers' config of one of SIZES."""
    sizes = dict(SIZES[family])
    heads, kv_heads = sizes.pop("heads")
    head_dim = sizes["hidden_size"] // heads
    return AutoConfig.for_model(
        family, **_SMALL, **sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )


def write_random_family(folder: Path, family: str) -> None:
    """The model in float32 and its tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config(family)).save_pretrained(folder)
    model_file = find_real("llama-tokenizer/tokenizer.model") or write_synthetic_tokenizer(folder / "tokenizer.model")
    write_llama_tokenizer(model_file, folder, max_length=CONTEXT)


if __name__ == "__main__":
    run_command(main)
