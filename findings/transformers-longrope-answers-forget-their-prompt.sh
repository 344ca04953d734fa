#!/usr/bin/env bash
# transformers 5.17.0: `generate` of a Phi-3 with longrope forgets the prompt once an answer crosses the old context.
#
# Behaviour: At `original_max_position_embeddings` tokens the model switches from its short to its long factors, and
# Phi3ForCausalLM drops the cache, whose keys were turned by the short ones. But the inputs of that step are cut to the
# newest token all the same, before the dropped cache is looked at, and no new cache is kept. So from there on every
# step sees one token and nothing before it: the answer is a function of the newest token alone, with no warning.
# `use_cache=False` and a plain forward pass over all tokens agree with each other and go on rightly. Every cached long-
# context answer of Phi-3, 3.5 and 4-mini that begins below 4,096 tokens and ends above is concerned.
#
# Output seen with Python 3.11, torch 2.13.0 (CPU), on 2026-11-28:
#   plain forward passes agree with use_cache=False: True
#   with the cache equal up to token 40 of 64: True
#   steps after the crossing that saw more than one token: 0 of 23
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 transformers==5.17.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/env/bin/python" - <<'PY'
import torch
from transformers import Phi3Config, Phi3ForCausalLM

OLD, PROMPT, NEW = 100, 60, 64
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=400, original_max_position_embeddings=OLD, sliding_window=None,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.5,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": OLD,
        "short_factor": [1.0] * 8, "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
    },
)
model = Phi3ForCausalLM(config).double().eval()
prompt = torch.arange(3, 3 + PROMPT)[None]
options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
ids = prompt
with torch.inference_mode():
    for _ in range(NEW):
        scores = model(ids, use_cache=False).logits[:, -1]
        scores[:, 2] = -torch.inf  # no end, as min_new_tokens has it
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    without = model.generate(prompt, use_cache=False, **options)[0, PROMPT:].tolist()
    seen, forward = [], model.forward

    def watched(*given, **named):
        cache = named.get("past_key_values")
        seen.append(named["input_ids"].shape[1] + (0 if cache is None else cache.get_seq_length()))
        return forward(*given, **named)

    model.forward = watched
    cached = model.generate(prompt, **options)[0, PROMPT:].tolist()
plain = ids[0, PROMPT:].tolist()
equal = next(i for i in range(NEW) if cached[i] != plain[i])
after = seen[OLD - PROMPT + 1 :]
print("plain forward passes agree with use_cache=False:", plain == without)
print(f"with the cache equal up to token {OLD - PROMPT} of {NEW}:", equal >= OLD - PROMPT)
print("steps after the crossing that saw more than one token:", sum(n > 1 for n in after), "of", len(after))
assert plain == without and OLD - PROMPT <= equal < NEW and set(after) == {1}, (equal, seen)
PY
