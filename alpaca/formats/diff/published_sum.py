"""The check that came with Stanford's 7B weight difference: all elements of the recovered model add up to a known sum.

The sum was published in April 2023 (tatsu-lab/stanford_alpaca, weight_diff.py) and taken over the state dict that
transformers 4.28 gave a LLaMA: with one `rotary_emb.inv_freq` table in each layer, which has not been saved since 4.31
(huggingface/transformers 95f96b45). The tables of a 7B model add 238.7, so a folder without them fails the check by
that much unless they are counted. float32 sums depend on the order, so it is that state dict's here.
"""

import re
from collections.abc import Mapping

import torch

from alpaca.architecture.rope import read_rope
from alpaca.architecture.tensors import LAYER, hf_name, is_rotary_table
from alpaca.errors import InputError
from alpaca.formats.hf.pickled import Weights

PUBLISHED_SUM = 50637.1836
TOLERANCE = 1e-2
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight)?")
_IN_LAYER = (
    *(LAYER[role].hf for role in ("query", "key", "value", "attention_out")), "self_attn.rotary_emb.inv_freq",
    *(LAYER[role].hf for role in ("gate", "down", "up", "attention_norm", "ffn_norm")),
)  # fmt: skip
_SIZES = {"num_hidden_layers", "hidden_size", "num_attention_heads"}
_AROUND = {hf_name("embedding"): -1, hf_name("norm"): 10**6, hf_name("head"): 10**6 + 1}


def check_published_sum(sums: Mapping[str, torch.Tensor], raw: Weights, diff: Weights, config: Mapping) -> float:
    """The sum that agrees with the published one; `sums`: of each recovered tensor, in float32.

    Where neither folder holds rotary tables it cannot be known in what precision its maker's were, so both are tried,
    and the sum without any. Raises InputError when none agrees.
    """
    totals = {label: float(_add({**sums, **tables})) for label, tables in _tables(raw, diff, config).items()}
    for total in totals.values():
        if abs(total - PUBLISHED_SUM) <= TOLERANCE:
            return total
    found = ", ".join(f"{total:.4f} {label}" for label, total in totals.items())
    raise InputError(
        f"the recovered tensors add up to {found}; published for Stanford's 7B diff is {PUBLISHED_SUM}, give or take "
        f"{TOLERANCE}. For that diff: one of {raw.path} and {diff.path} is damaged or another model, get both again. "
        "For any other diff this sum means nothing: pass --check_integrity_naively False"
    )


def _tables(raw: Weights, diff: Weights, config: Mapping) -> dict[str, dict[str, torch.Tensor]]:
    """Sums of the recovered rotary tables by name, one dictionary for each way in which they may have been saved."""
    in_raw, in_diff = set(filter(is_rotary_table, raw.names)), set(filter(is_rotary_table, diff.names))
    if config.get("model_type") != "llama" or not config.keys() >= _SIZES:
        return {"": {}}
    names = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(int(config["num_hidden_layers"]))]

    def recovered(name: str, computed: torch.Tensor) -> torch.Tensor:
        table = raw.tensor(name).float() if name in in_raw else computed
        return (diff.tensor(name).float() + table if name in in_diff else table).sum()

    table = rotary_table(config)
    precisions = {"with rotary tables": table, "with rotary tables of float16": table.half().float()}
    return {label: {n: recovered(n, t) for n in names} for label, t in precisions.items()} | {"without them": {}}


def rotary_table(config: Mapping) -> torch.Tensor:
    """A LLaMA layer's inverse frequencies [head width / 2]."""
    width = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    return 1.0 / (read_rope(config).theta ** (torch.arange(0, width, 2).float() / width))


def _add(sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(())
    for name in sorted(sums, key=_place):
        total = total + sums[name]
    return total


def _place(name: str) -> tuple[int, int]:
    """A tensor's place in the state dict of transformers 4.28; unknown tensors come last, in their own order."""
    if name in _AROUND:
        return _AROUND[name], 0
    match = _LAYER.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return int(match[1]), _IN_LAYER.index(match[2])
    return 10**6 + 2, 0
