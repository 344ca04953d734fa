"""The original tools' ways, which our converters are measured against: whole models in memory, by Hugging Face's code.

    python -m bench.convert_originals merge --base BASE --adapter ADAPTER --output OUTPUT

merge and to_meta go as alpaca-lora's export_hf_checkpoint and export_state_dict_checkpoint, make_diff and recover as
Stanford Alpaca's weight_diff, with transformers and PEFT of today. `adapter` makes a LoRA adapter to merge.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

_RANK = 8
_LAYER_NAMES = {  # Hugging Face's -> Meta's
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OUTER_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}


def make_adapter(base: Path, adapter: Path) -> None:
    """A random LoRA adapter of rank 8 on the four attention projections, as alpaca-lora's."""
    config = LoraConfig(r=_RANK, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(load(base, torch.float16), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(adapter)


def merge(base: Path, adapter: Path, output: Path) -> None:
    merged(base, adapter).save_pretrained(output, max_shard_size="400MB")


def to_meta(base: Path, adapter: Path, output: Path) -> None:
    model = merged(base, adapter)
    tensors = {meta_name(name): tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}
    for name, tensor in tensors.items():
        if ".wq." in name or ".wk." in name:
            tensors[name] = adjacent_pairs(tensor, model.config.hidden_size // model.config.num_attention_heads)
    torch.save(tensors, output / "consolidated.00.pth")
    config = model.config
    params = {"dim": config.hidden_size, "n_heads": config.num_attention_heads, "n_layers": config.num_hidden_layers,
              "multiple_of": 256, "norm_eps": config.rms_norm_eps, "vocab_size": -1}  # fmt: skip
    (output / "params.json").write_text(json.dumps(params))


@torch.inference_mode()
def difference(first: Path, second: Path, output: Path, *, sign: int) -> None:
    """first + sign * second in float32, both models held whole."""
    model, other = load(first, torch.float32), load(second, torch.float32)
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.add_(theirs[name], alpha=sign)
    if sign > 0:  # recover adds all values up to compare them with the published sum
        print("sum", sum(tensor.sum().item() for tensor in model.state_dict().values()))
    model.save_pretrained(output)


def merged(base: Path, adapter: Path) -> LlamaForCausalLM:
    return PeftModel.from_pretrained(load(base, torch.float16), adapter).merge_and_unload()


def load(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def meta_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.weight"
    _, _, layer, kind = stem.split(".", 3)
    return f"layers.{layer}.{_LAYER_NAMES[kind]}.weight"


def adjacent_pairs(weight: torch.Tensor, head_width: int) -> torch.Tensor:
    rows, width = weight.shape
    return weight.view(rows // head_width, 2, head_width // 2, width).transpose(1, 2).reshape(rows, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["adapter", "merge", "to_meta", "make_diff", "recover"])
    for name in ("--base", "--adapter", "--tuned", "--diff", "--output"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    if options.way == "adapter":
        make_adapter(options.base, options.output)
    elif options.way == "make_diff":
        difference(options.tuned, options.base, options.output, sign=-1)
    elif options.way == "recover":
        difference(options.base, options.diff, options.output, sign=1)
    else:
        {"merge": merge, "to_meta": to_meta}[options.way](options.base, options.adapter, options.output)


if __name__ == "__main__":
    main()
