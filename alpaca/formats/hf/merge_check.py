"""Checks that a merged folder computes the same as its base with the adapter unmerged, by transformers and PEFT."""

import gc
import importlib.util
import logging
from pathlib import Path

import torch

from alpaca.errors import InputError, NotEnoughSpace
from alpaca.formats.hf.loading import load_causal_lm
from alpaca.formats.hf.merging import MergedWeights
from alpaca.formats.hf.quantization import keep_trainable_on_cpu, require_readable_on_cpu
from alpaca.memory import free_memory
from alpaca.text.tokenizer import Tokenizer

PROBE_TEXT = "The alpaca is a domesticated animal of South America. Its wool is used for blankets, sweaters and hats."
_MOST_TOKENS = 32  # any model's context takes them
_SPARE_BYTES = 2 << 30  # libraries, activations, logits
# Of the largest logit: what rounding the merged weights once may move. Small models showed up to 0.75 % in float16.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_INT8_TOLERANCE = 1e-1  # bitsandbytes rounds what goes into an 8-bit layer, too


def compare_logits(folder: Path, merged: MergedWeights, tokenizer: Tokenizer, *, when: str) -> str:
    """Compare, where `when` ("auto", "always", "never") and memory allow; a line that says the outcome.

    Raises InputError where they differ by more than the dtype's rounding, NotEnoughSpace where "always" cannot be.
    """
    if when == "never":
        return "logits not compared: --check_logits never"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = _why_not(merged, device)
    if reason and when == "always":
        raise NotEnoughSpace(f"--check_logits always: {reason}; use auto or never")
    if reason:
        return f"logits not compared: {reason}"
    # On importing bitsandbytes it asks for a package that would only make CPUs faster: no part of the outcome.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    ids = [*tokenizer.prefix_ids, *tokenizer.encode(PROBE_TEXT)][:_MOST_TOKENS]
    unmerged, base = _unmerged_logits(merged, ids, device)
    found = _merged_logits(folder, ids, device)
    scale, effect = float(unmerged.abs().max()), float((unmerged - base).abs().max())
    difference = float((found - unmerged).abs().max())
    allowed = _tolerance(merged) * scale
    if not difference <= allowed:
        raise InputError(
            f"the merged model's logits differ by {difference:.3g} from PEFT's unmerged ones (allowed {allowed:.3g}; "
            f"the adapter moves them by {effect:.3g}): nothing was kept. Is --base_quantization what the adapter was "
            f"trained on (now {merged.quantization})?"
        )
    weak = "; that is no more than rounding: try --dtype float32" if effect <= 2 * difference else ""
    return (
        f"logits of {len(ids)} tokens: merged and unmerged differ by {difference:.3g} (allowed {allowed:.3g}, largest "
        f"{scale:.3g}); the adapter moves them by {effect:.3g}{weak}"
    )


def _why_not(merged: MergedWeights, device: torch.device) -> str:
    """Why logits cannot be compared here; "" where they can."""
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if merged.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes")
    if missing:
        return f"needs {' and '.join(missing)}"
    stored = sum(spec.num_bytes for spec in merged.specs())
    float32 = sum(spec.num_bytes // spec.dtype.itemsize * 4 for spec in merged.specs())
    needed = float32 + stored + _SPARE_BYTES
    free = free_memory(device)
    if needed > free:
        return f"it takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return ""


def _tolerance(merged: MergedWeights) -> float:
    if merged.quantization == "int8":
        return _INT8_TOLERANCE
    dtypes = {spec.dtype for spec in merged.specs()} | {merged.rounded_to}
    return max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def _unmerged_logits(merged: MergedWeights, ids: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits of the base with PEFT's adapter, and of the base alone."""
    from peft import PeftModel

    quantization = merged.quantized_to
    device_map = {"": str(device)} if quantization != "none" else None
    model, _ = load_causal_lm(
        merged.path,
        dtype=merged.rounded_to or torch.float32,
        quantization=quantization,
        device_map=device_map,
        unpacks=True,
    )
    if merged.num_added_rows:
        rows = model.get_input_embeddings().num_embeddings + merged.num_added_rows
        model.resize_token_embeddings(rows, mean_resizing=False)
    if quantization == "nf4" and device.type == "cpu":
        require_readable_on_cpu(model)
        keep_trainable_on_cpu(model)
    adapted = PeftModel.from_pretrained(model, str(merged.adapter.path))
    if quantization == "none":
        adapted.to(device)
    unmerged = _logits(adapted, ids, device)
    with adapted.disable_adapter():
        base = _logits(adapted, ids, device)
    del adapted, model
    gc.collect()
    return unmerged, base


def _merged_logits(folder: Path, ids: list[int], device: torch.device) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device), ids, device)


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: list[int], device: torch.device) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
