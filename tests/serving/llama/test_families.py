"""Every family on the engine: transformers' logits in float64, and what it answers to each request alone."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from alpaca.formats.hf.adapters import open_adapter
from alpaca.formats.hf.quantization import quantize_parts
from alpaca.serving.engine import Generation
from alpaca.serving.hugging_face.shared_weights import as_transformers
from alpaca.serving.kernels.native import ops as native_ops
from alpaca.serving.llama.adapters import stacked_bytes, with_adapters
from alpaca.serving.llama.network import LlamaModel
from alpaca.serving.llama.weights import TAKEN
from tests.samples import sampled
from tests.serving.llama.families import COVERING, MODELS, longrope, save
from tests.serving.llama.test_llama import load, logits
from tests.serving.llama.test_llama_engine import make_engine, naive, naive_of_all, random_request, request, tokens
from tests.serving.llama.test_serving_adapters import adapted_logits, write_adapter

PROMPTS = [list(range(3, 70)), [5, 6, 7], list(range(110, 60, -1))]
LONGROPE = [name for name in MODELS if "longrope" in name]
# Fast tests take one family of each kind; `--all` takes every row.
FAMILIES = sampled(MODELS, *COVERING)


def expected_logits(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


# Logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.fast_rows(14)
def test_logits_are_transformers(tmp_path, name):
    expected = save(tmp_path, name)
    model = load(tmp_path)
    # Longer sequences turn otherwise where longrope is: they have a test of their own.
    prompts = [prompt[:60] for prompt in PROMPTS] if name in LONGROPE else PROMPTS
    for prompt, found in zip(prompts, logits(model, prompts, chunk=19), strict=True):
        wanted = expected_logits(expected, prompt)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)  # their tables and norms are float32


def test_every_family_that_is_taken_has_a_row():
    assert {model_type for model_type, _ in MODELS.values()} == {*TAKEN}


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] not in ("llama", "qwen2")])
def test_what_a_row_adds_changes_its_logits(tmp_path, name):
    """Or the equality above would show nothing: a LLaMA of the same tensors, as far as it has them, says otherwise."""
    model = load_with(tmp_path, name)
    plain = load_with(tmp_path / "plain", "llama")
    assert not torch.allclose(logits(model, PROMPTS[:1], chunk=200)[0], logits(plain, PROMPTS[:1], chunk=200)[0])


def load_with(folder: Path, name: str) -> LlamaModel:
    save(folder, name)
    return load(folder)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.5)])
@pytest.mark.fast_rows(2)
def test_narrower_types(tmp_path, name, dtype, atol):
    """In bfloat16 another expert may be chosen where two are nearly alike: there only the type is looked at."""
    expected = save(tmp_path, name, torch.float32)
    (found,) = logits(load(tmp_path, dtype), [PROMPTS[2]], chunk=9)
    wanted = expected_logits(expected, PROMPTS[2])
    assert found.dtype == dtype
    if name not in LONGROPE and not (dtype == torch.bfloat16 and MODELS[name][0] in ("mixtral", "qwen3_moe")):
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=atol * wanted.std().item())


@pytest.mark.usefixtures("two_threads")  # which share a layer's rows
@pytest.mark.parametrize("name", sampled(MODELS, *COVERING, "llama", "granite", "mixtral, window, all experts"))
@pytest.mark.fast_rows(2)
def test_layers_in_one_call_of_cpp(tmp_path, name):
    """The same bits as op by op where every op is in C++, and torch's numbers."""
    save(tmp_path, name, torch.float32)
    model = load(tmp_path, torch.float32, module=native_ops)
    if not native_ops.fits(head_width=model.config.head_width, block_size=16, dtype=torch.float32):
        pytest.skip("the C++ kernels are not built here, or do not take such heads")
    assert model.whole is not None
    found = logits(model, PROMPTS, chunk=19, size=16)
    by_torch = logits(load(tmp_path, torch.float32), PROMPTS, chunk=19)
    alone = [logits(model, [prompt], chunk=7, size=16)[0] for prompt in PROMPTS]
    model.__dict__["whole"] = None
    one_by_one = logits(model, PROMPTS, chunk=19, size=16)
    for at in range(len(PROMPTS)):
        has_torch_ops = model.layers[0].head_norms or model.config.residual_multiplier != 1 or model.config.num_experts
        if not has_torch_ops:
            assert torch.equal(found[at], one_by_one[at])
        torch.testing.assert_close(one_by_one[at], by_torch[at], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[at], by_torch[at], rtol=1e-3, atol=1e-3)
        assert torch.equal(found[at], alone[at]), "in other pieces, beside others: the same bits"


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.fast_rows(2)
def test_quantized_layers_give_what_transformers_gives_with_their_weights(tmp_path, name, quantization):
    sizes = dict(hidden_size=64, num_attention_heads=8, intermediate_size=128)
    expected = save(tmp_path, name, torch.float32, **sizes) if fits(name, sizes) else pytest.skip("own head width")
    for layer in expected.model.layers:
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 3:  # experts: gate and up of each are two matrices of the file
                halves = 2 if "gate_up" in name else 1
                for part in (part for expert in parameter.data for part in expert.chunk(halves)):
                    quantize(part, quantization)
            elif parameter.dim() == 2 and "mlp.gate." not in name:
                quantize(parameter.data, quantization)
    prompt = PROMPTS[0][:40]
    (found,) = logits(load(tmp_path, torch.float32, quantization), [prompt], chunk=9)
    torch.testing.assert_close(found, expected_logits(expected, prompt), rtol=1e-3, atol=2e-3)


def quantize(weight: torch.Tensor, quantization: str) -> None:
    """Put the values that a quantized layer multiplies by in a weight's place."""
    quantized = quantize_parts([weight], quantization=quantization, device=torch.device("cpu"))
    weight.copy_(quantized.dequantize(torch.float32))


def fits(name: str, sizes: dict[str, int]) -> bool:
    """Whether a row's longrope factors fit heads of 8 numbers: those of part of a head do not."""
    return "longrope" not in name or name.startswith("llama")


# The engine -------------------------------------------------------------------------------------------------------


def ask_at_once(model: LlamaModel, asked: list, **engine_options) -> list[list[list[int]]]:
    engine = make_engine(model, **engine_options)
    generations: list[Generation] = [engine.submit(one) for one in asked]
    found = [tokens(generation) for generation in generations]
    engine.close()
    assert engine._scheduler.pool.num_free == engine._scheduler.pool.capacity
    return found


_QUICK = {("qwen3, biases and windows", "in step"), ("gemma2", "graphs"), ("phi3, window and part of a head", "ahead")}


@pytest.mark.parametrize(
    ("name", "mode", "num_blocks"),
    [
        pytest.param(name, mode, num_blocks, marks=() if (name, mode) in _QUICK else pytest.mark.slow)
        for name in MODELS
        for mode, num_blocks in (("in step", 28), ("ahead", 28), ("graphs", 200))
    ],
)
@pytest.mark.fast_rows(1)
def test_any_interleaving_gives_what_naive_decoding_gives_alone(tmp_path, name, mode, num_blocks, one_thread):
    reference, chance = save(tmp_path, name), random.Random(f"{name}:{mode}")
    asked = [random_request(chance) for _ in range(6)]
    if name in LONGROPE:
        asked = [one for one in asked if len(one.prompt_ids) + one.max_new_tokens < 64]
    asked = [*asked, *asked[:2]]  # found in the cache
    found = ask_at_once(load(tmp_path), asked, mode=mode, num_blocks=num_blocks)
    assert found == naive_of_all(reference, asked, found)


@pytest.mark.slow
def test_blocks_behind_every_layers_window_are_freed(tmp_path):
    """A long answer holds little, others take what it gives back, and what is remembered of it is still found."""
    reference, model = save(tmp_path, "mistral"), load(tmp_path)
    assert model.config.longest_window == 9
    engine, most = make_engine(model, num_blocks=20), []
    pool, launch = engine._scheduler.pool, engine._runner.launch

    def watch(scheduled):
        most.append(pool.num_used)
        return launch(scheduled)

    engine._runner.launch = watch
    asked = request(prompt_ids=(5, 6, 7), max_new_tokens=70, min_new_tokens=70)
    found = tokens(engine.submit(asked))
    assert found == naive(reference, asked, found)
    assert max(most) == 3  # blocks of 4 hold the 9 tokens that the next one sees
    again = request(prompt_ids=(5, 6, 7, *found[0][:40]), max_new_tokens=9)
    generation = engine.submit(again)
    assert tokens(generation) == naive(reference, again)
    assert generation.metrics()["cached_tokens"] > 0
    longer_than_the_cache = request(prompt_ids=tuple(3 + i * 7 % 110 for i in range(100)), max_new_tokens=8)
    assert tokens(engine.submit(longer_than_the_cache)) == naive(reference, longer_than_the_cache)
    many = [request(prompt_ids=tuple(range(i, i + 30)), max_new_tokens=30) for i in range(3, 9)]
    generations = [engine.submit(one) for one in many]
    answers = [tokens(generation) for generation in generations]
    assert answers == naive_of_all(reference, many, answers)
    engine.close()
    assert pool.num_free == pool.capacity


@pytest.mark.parametrize("name", sampled(LONGROPE, "phi3, longrope"))
def test_a_longrope_answer_turns_anew_where_it_grows_long(tmp_path, name):
    """Answers that stay within the old context, end at it, cross it, and begin beyond it; some of one prompt."""
    reference = save(tmp_path, name)
    assert longrope(2)["original_max_position_embeddings"] == 64
    prompts = [tuple(range(3, 40)), tuple(range(3, 40)), tuple(range(5, 67)), tuple(range(9, 73)), tuple(range(4, 84))]
    asked = [
        request(prompt_ids=prompt, max_new_tokens=new, min_new_tokens=new, n=2, temperature=0.9, seed=new)
        for prompt, new in zip(prompts, (27, 40, 6, 5, 4), strict=True)
    ]
    expected = [naive(reference, one) for one in asked]
    for mode in ("in step", "ahead"):
        assert ask_at_once(load(tmp_path), asked, mode=mode, num_blocks=40) == expected


# Adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", [*FAMILIES, "qwen2"])
@pytest.mark.fast_rows(3)
def test_adapters_give_pefts_logits(tmp_path, name, use_dora, one_thread):
    base = save(tmp_path / "base", name)
    targets = ["q_proj", "v_proj", "o_proj"] if base.config.model_type in ("mixtral", "qwen3_moe") else "all-linear"
    folder = write_adapter(
        base, tmp_path / "adapter", seed=1, r=4, lora_alpha=8, target_modules=targets, use_dora=use_dora
    )
    adapters = {"one": open_adapter(folder)}
    model = with_adapters(load(tmp_path / "base"), adapters)
    assert stacked_bytes(adapters, model.config, model.dtype) == model.adapters.num_bytes
    prompt = PROMPTS[0][:40]
    found, plain = adapted_logits(model, prompt), expected_logits(base, prompt)
    expected = expected_logits(PeftModel.from_pretrained(base, folder).eval(), prompt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


# Beam search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if name in COVERING[:4] or name in ("gemma3", "qwen2")])
def test_beam_search_shares_the_weights(tmp_path, monkeypatch: pytest.MonkeyPatch, name):
    monkeypatch.setattr("alpaca.serving.kernels.linear.make_packed", lambda *weight: None)
    expected = save(tmp_path, name, torch.float32)
    model = load(tmp_path, torch.float32)
    shared = as_transformers(model, tmp_path)
    shared.set_attn_implementation("eager")
    torch.testing.assert_close(
        expected_logits(shared, PROMPTS[1]), expected_logits(expected, PROMPTS[1]), rtol=1e-6, atol=1e-6
    )
    key = next(
        name
        for name in shared.state_dict()
        if "layers.1" in name and name.endswith(("k_proj.weight", "qkv_proj.weight"))
    )
    shares: Callable[[torch.Tensor], int] = lambda tensor: tensor.untyped_storage().data_ptr()  # noqa: E731
    assert shares(shared.state_dict()[key]) == shares(model.layers[1].qkv.product.weight)
