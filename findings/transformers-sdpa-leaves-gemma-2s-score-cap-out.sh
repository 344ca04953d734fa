#!/usr/bin/env bash
# transformers 5.17.0: Gemma 2 by the attention that is chosen by default computes another model, without a warning.
#
# Behaviour: Gemma 2 bounds attention's scores: cap * tanh(score / cap), with `attn_logit_softcapping` (50 in the
# published models). torch's scaled_dot_product_attention has no such bound. The "sdpa" attention takes the setting and
# ignores it, and "sdpa" is what AutoModel chooses for Gemma 2 (VaultGemma, too). With "eager" the bound is applied. How
# far the two lie apart depends on how large the scores are: here the cap is low, so that they are far apart. What fine-
# tunes or evaluates Gemma 2 with the defaults, with a cache or without, works on the unbounded model.
#
# Output seen with Python 3.11, torch 2.13.0 (CPU), on 2026-11-28:
#   chosen by default: sdpa
#   default against eager, in standard deviations of the logits: 2.71
#   default against eager without any cap: 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 transformers==5.17.0
HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PY'
import copy

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, attn_logit_softcapping=2.0, query_pre_attn_scalar=1, initializer_range=0.3,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
model = Gemma2ForCausalLM(config).double().eval()
chosen, tokens = model.config._attn_implementation, torch.arange(3, 43)[None]
without_cap = copy.deepcopy(config)
without_cap.attn_logit_softcapping = None
uncapped = Gemma2ForCausalLM(without_cap).double().eval()
uncapped.load_state_dict(model.state_dict())
with torch.inference_mode():
    default = model(tokens).logits
    model.set_attn_implementation("eager")
    capped = model(tokens).logits
    uncapped.set_attn_implementation("eager")
    plain = uncapped(tokens).logits
apart, same = ((default - other).abs().max().item() / capped.std().item() for other in (capped, plain))
print("chosen by default:", chosen)
print(f"default against eager, in standard deviations of the logits: {apart:.2f}")
print(f"default against eager without any cap: {same:.2f}")
assert chosen == "sdpa" and apart > 1 and same < 1e-4, (chosen, apart, same)
PY
