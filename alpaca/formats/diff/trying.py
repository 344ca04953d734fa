"""Tests a recovered model with the test prompt of the original tool."""

from collections.abc import Mapping
from pathlib import Path

import torch

from alpaca.text.loading import load_tokenizer
from alpaca.text.prompts import alpaca_prompt

_TEST_INSTRUCTION = "List three technologies that make life easier."
_TEST_TOKENS = 100


def try_model(folder: Path, device: str, tensors: dict[str, torch.Tensor] | None, config: Mapping[str, object]) -> str:
    """The model's greedy answer to the original tool's test prompt, whose lines end in CR-LF.

    folder: of the tokenizer, and of the model where `tensors` is None.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    if tensors is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    else:
        model_config = AutoConfig.for_model(**config)
        kind, dtype = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)], next(iter(tensors.values())).dtype
        model = kind.from_pretrained(None, config=model_config, state_dict=tensors, dtype=dtype)
    tokenizer = load_tokenizer(folder)
    prompt = alpaca_prompt(_TEST_INSTRUCTION).replace("\n", "\r\n")
    ids = torch.tensor([tokenizer.prefix_ids + tokenizer.encode(prompt)], device=device)
    out = model.to(device).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_TEST_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.fill_id,
    )
    return f"Input: {prompt}\nCompletion: {tokenizer.decode(out[0, ids.shape[1] :].tolist())}"
