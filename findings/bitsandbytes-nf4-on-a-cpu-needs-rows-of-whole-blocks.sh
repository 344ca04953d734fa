#!/usr/bin/env bash
# bitsandbytes 0.50.2: on a CPU `dequantize_4bit` gives other numbers where a row is no whole number of blocks.
#
# Behaviour: quantize_4bit cuts a matrix into blocks of `blocksize` values (64) over its flattened elements, so that a
# block may reach from one row into the next. On a CPU dequantize_4bit does not undo that for widths of 32, 96 or 16:
# errors as large as the weights, without a word. The 4 bits and the scales that quantize_4bit wrote are right: the
# formula with them gives the rounding error alone. Models whose layers' inputs are a multiple of 64 wide never meet it;
# small heads (an o_proj that reads 4 heads of 8) and tests with tiny models do, and whoever takes the CPU's result as
# the truth corrects the right code to the wrong.
#
# Output seen with Python 3.11, torch 2.13.0 (CPU), on 2026-11-28; the largest errors of a standard normal matrix:
#   width 64: the formula 0.44, dequantize_4bit 0.44
#   width 96: the formula 0.45, dequantize_4bit 2.27
#   width 32: the formula 0.42, dequantize_4bit 2.11
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.13.0 bitsandbytes==0.50.2
"$folder/env/bin/python" - <<'PY'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

for width in (64, 96, 32):
    weight = torch.randn(256, width, generator=torch.Generator().manual_seed(width))
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    formula = (state.code[nibbles].view(-1, 64) * state.absmax[:, None]).view(256, width)
    found = dequantize_4bit(packed, state)
    errors = [(one - weight).abs().max().item() for one in (formula, found)]
    print(f"width {width}: the formula {errors[0]:.2f}, dequantize_4bit {errors[1]:.2f}")
    assert errors[0] < 0.6, errors
    assert (errors[1] > 2 * errors[0]) == bool(width % 64), errors
PY
