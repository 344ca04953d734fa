"""Make a tiny LLaMA checkpoint in Meta's layout, with a SentencePiece tokenizer of its own: the demo's raw material.

python script/tiny_checkpoint.py --output_dir .demo/unconverted-weights
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from sentencepiece import SentencePieceTrainer  # noqa: E402

from alpaca.architecture.description import ModelDescription  # noqa: E402
from alpaca.data.records import read_examples  # noqa: E402
from alpaca.files.atomic import replaced_folder  # noqa: E402
from alpaca.formats.meta import checkpoint as meta_files  # noqa: E402
from alpaca.formats.meta import layout  # noqa: E402
from alpaca.text.prompts import alpaca_prompt  # noqa: E402

SIZE = "tiny"
SHAPE = layout.describe(
    width=128, num_layers=4, num_heads=4, num_kv_heads=4, ffn_width=352, vocab_size=1000, norm_eps=1e-6, rope_theta=1e4
)
_MULTIPLE_OF = 32


def train_tokenizer(folder: Path, data_path: Path, vocab_size: int) -> None:
    """tokenizer.model of Meta's kind (BPE, byte fallback, digits split, text untouched) from a data set's own words."""
    texts = [alpaca_prompt(e.instruction, e.input) + e.output for e in read_examples(data_path)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def random_tensors(shape: ModelDescription, *, seed: int) -> dict[str, torch.Tensor]:
    """Weights as a model has them before training: normal, 0.02 wide; norms at one; float16, as Meta's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place in layout.placements(shape):
        weight = (
            torch.randn(place.shape, generator=generator) * 0.02 if len(place.shape) > 1 else torch.ones(place.shape)
        )
        tensors[place.meta_name] = weight.half()
    return tensors


def params_of(shape: ModelDescription) -> dict[str, object]:
    """params.json of LLaMA 1: the vocabulary is -1."""
    return {
        "dim": shape.width,
        "multiple_of": _MULTIPLE_OF,
        "n_heads": shape.num_heads,
        "n_layers": shape.num_layers,
        "norm_eps": shape.norm_eps,
        "vocab_size": -1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny checkpoint in Meta's layout.")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets tiny/ and tokenizer.model")
    parser.add_argument(
        "--data_path", type=Path, default=ROOT / "alpaca/data/sample.json", help="words of the tokenizer"
    )
    options = parser.parse_args()
    with replaced_folder(options.output_dir, overwrite=True) as folder:
        train_tokenizer(folder, options.data_path, SHAPE.vocab_size)
        (folder / SIZE).mkdir()
        meta_files.write_checkpoint(folder / SIZE, [random_tensors(SHAPE, seed=0)], params_of(SHAPE))
    total = sum(torch.Size(place.shape).numel() for place in layout.placements(SHAPE))
    print(json.dumps({"folder": str(options.output_dir / SIZE), "parameters": total}))


if __name__ == "__main__":
    main()
