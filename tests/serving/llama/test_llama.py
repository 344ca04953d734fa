"""The network gives transformers' logits for every kind of LLaMA, however its tokens are packed and paged."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig as TransformersConfig
from transformers import LlamaForCausalLM

from alpaca.architecture.rope import Rope
from alpaca.errors import UnsupportedModel
from alpaca.formats.hf.folder import WeightsFolder
from alpaca.serving.kernels import ops
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.step import StepFields
from alpaca.serving.llama.weights import load_llama, read_llama

CPU = torch.device("cpu")
_IN_ATTENTION = ("block_tables", "seq_lens", "query_starts")
SMALL = dict(
    vocab_size=120, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=80,
    max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip
KINDS = {
    "LLaMA 1": {},
    "grouped heads": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1, "rope_theta": 1e6},
    "own head width": {"head_dim": 16, "num_key_value_heads": 3},
    "tied embeddings": {"tie_word_embeddings": True},
    "Llama 3.2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "large epsilon": {"rms_norm_eps": 0.1},
}


def save_model(folder: Path, dtype: torch.dtype = torch.float64, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(TransformersConfig(**{**SMALL, **changes})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def load(
    folder: Path, dtype: torch.dtype = torch.float64, quantization: str = "none", *, module: ModuleType = ops
) -> LlamaModel:
    config = read_llama(folder)
    return load_llama(
        WeightsFolder(folder), config, device=CPU, dtype=dtype, quantization=quantization,
        num_positions=config.max_context, ops=module,
    )  # fmt: skip


def logits(model: LlamaModel, prompts: list[list[int]], *, chunk: int, size: int = 4) -> list[torch.Tensor]:
    """Each prompt's logits [T, V], computed `chunk` tokens of every prompt a step, in scattered blocks of `size`."""
    per_sequence = 64
    cache = KeyValueCache(model.config, num_blocks=200, block_size=size, dtype=model.dtype, device=model.device)
    tables = torch.randperm(199, generator=torch.Generator().manual_seed(0))[: len(prompts) * per_sequence] + 1
    tables = tables.view(len(prompts), per_sequence)[:, :64].int()
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk):
        parts = [(s, prompt[start : start + chunk]) for s, prompt in enumerate(prompts) if len(prompt) > start]
        rows = [s for s, _ in parts]
        lengths = torch.tensor([len(ids) for _, ids in parts])
        positions = torch.cat([torch.arange(start, start + length) for length in lengths])
        owner = torch.repeat_interleave(torch.tensor(rows), lengths)
        seq_lens = (start + lengths).int()
        step = StepFields(
            token_ids=torch.tensor([i for _, ids in parts for i in ids]),
            positions=positions,
            slot_mapping=tables[owner, positions // size].long() * size + positions % size,
            adapter_indices=torch.zeros(len(positions), dtype=torch.int32),
            state_rows=torch.tensor(rows) + 1,
            seq_lens=seq_lens,
            query_lens=lengths.int(),
        )
        attention = AttentionBatch(
            tables[rows], seq_lens, torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
            int(lengths.max()), int(start + lengths.max()),
        )  # fmt: skip
        step = StepFields(**{name: values.to(model.device) for name, values in vars(step).items()})
        attention = replace(attention, **{name: getattr(attention, name).to(model.device) for name in _IN_ATTENTION})
        with torch.inference_mode():
            out = model.logits(model.forward(step.token_ids, step, attention, cache))
        for s, piece in zip(rows, out.split(lengths.tolist()), strict=True):
            found[s].append(piece)
    return [torch.cat(pieces) for pieces in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast_rows(2)
def test_logits_are_transformers(tmp_path, kind):
    expected = save_model(tmp_path, **KINDS[kind])
    model = load(tmp_path)
    prompts = [list(range(3, 100)), [5, 6, 7], list(range(110, 40, -1))]
    for chunk in (1, 7, 200):
        for prompt, found in zip(prompts, logits(model, prompts, chunk=chunk), strict=True):
            with torch.inference_mode():
                wanted = expected(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # the rotary table is float32 in both


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-4), (torch.bfloat16, 0.3)])
def test_narrower_types(tmp_path, dtype, atol):
    expected = save_model(tmp_path, torch.float32, num_key_value_heads=2)
    model = load(tmp_path, dtype)
    prompt = list(range(3, 60))
    with torch.inference_mode():
        wanted = expected(torch.tensor([prompt])).logits[0]
    (found,) = logits(model, [prompt], chunk=9)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=atol)


def test_old_and_new_spellings_of_the_rotary_parameters(tmp_path):
    save_model(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    new = read_llama(tmp_path)
    values.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps({**values, "rope_theta": 10000.0, "rope_scaling": None}))
    assert read_llama(tmp_path) == new
    old = {"type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps({**values, "rope_theta": 5.0, "rope_scaling": old}))
    assert read_llama(tmp_path).rope == Rope(kind="linear", theta=5.0, numbers={"factor": 2.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "opt"}, "its model_type is 'opt', not llama or mistral"),
        ({"is_causal": False}, "its is_causal asks for what this engine does not compute"),
        ({"hidden_act": "relu"}, "activation is 'relu'; this engine computes silu, gelu"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not one of default, linear, llama3"),
        (
            {"model_type": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.4},
            "its partial_rotary_factor turns 3 numbers of a head; expected pairs",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "its use_bidirectional_attention asks for"),
        ({"quantization_config": {"quant_method": "hqq"}}, "was saved quantized by hqq, which is not read here"),
    ],
)
def test_models_it_does_not_know(tmp_path, change, message):
    save_model(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UnsupportedModel, match=message):
        read_llama(tmp_path)


def test_loading_reports_every_byte_and_reads_little_ahead(tmp_path, monkeypatch):
    save_model(tmp_path)
    weights = WeightsFolder(tmp_path)
    config = read_llama(tmp_path)
    monkeypatch.setattr("alpaca.serving.llama.weights._MOST_READ_AHEAD", 20_000)
    seen: list[int] = []
    model = load_llama(
        weights, config, device=CPU, dtype=torch.float64, quantization="none", num_positions=8, ops=ops,
        progress=seen.append,
    )  # fmt: skip
    assert sum(seen) == sum(spec.num_bytes for spec in weights.specs()) == model.num_bytes
