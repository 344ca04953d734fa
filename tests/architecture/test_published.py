"""Published models, by the sizes in their own config.json: as many parameters as their publishers count."""

import pytest

from alpaca.architecture.description import ModelDescription
from alpaca.serving.llama.weights import supports

# model_type, hidden_size, layers, heads, key/value heads, intermediate_size, vocabulary, context; then the rest
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "intermediate_size", "vocab_size", "max_position_embeddings")  # fmt: skip
_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED = {
    "Qwen2.5-7B": (
        ("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072), {"sliding_window": 131072, "use_sliding_window": False},
        7_615_616_512,
    ),
    "Qwen3-8B": (
        ("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960), {"head_dim": 128, "sliding_window": None}, 8_190_735_360,
    ),
    "Mistral-7B-v0.1": (("mistral", 4096, 32, 32, 8, 14336, 32000, 32768), {"sliding_window": 4096}, 7_241_732_096),
    "Phi-3-mini-4k": (("phi3", 3072, 32, 32, 32, 8192, 32064, 4096), {"sliding_window": 2047}, 3_821_079_552),
    "Phi-4-mini": (
        ("phi3", 3072, 32, 24, 8, 8192, 200064, 131072),
        {"rope_scaling": _LONGROPE, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
         "sliding_window": 262144, "original_max_position_embeddings": 4096},
        3_836_021_760,
    ),
    "Gemma 2B": (
        ("gemma", 2048, 18, 8, 1, 16384, 256000, 8192), {"head_dim": 256, "hidden_act": "gelu"}, 2_506_172_416,
    ),
    "Gemma 2 9B": (("gemma2", 3584, 42, 16, 8, 14336, 256000, 8192), {"head_dim": 256}, 9_241_705_984),
    "Gemma 3 1B": (
        ("gemma3_text", 1152, 26, 4, 1, 6912, 262144, 32768), {"head_dim": 256, "sliding_window": 512}, 999_885_952,
    ),
    "SmolLM3-3B": (
        ("smollm3", 2048, 36, 16, 4, 11008, 128256, 65536), {"no_rope_layers": [1, 1, 1, 0] * 9}, 3_075_098_624,
    ),
    "OLMo 2 7B": (("olmo2", 4096, 32, 32, 32, 11008, 100352, 4096), {}, 7_298_617_344),
    "Mixtral 8x7B": (("mixtral", 4096, 32, 32, 8, 14336, 32000, 32768), {"num_local_experts": 8}, 46_702_792_704),
    "Qwen3-30B-A3B": (
        ("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, 40960),
        {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128}, 30_532_122_624,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    sizes, rest, expected = PUBLISHED[name]
    model = ModelDescription.from_config({**dict(zip(_SIZES, sizes, strict=True)), **rest})
    assert model.num_parameters == expected
    assert supports(model) is None


@pytest.mark.parametrize(
    ("name", "longest", "num_windowed"),
    [("Mistral-7B-v0.1", 4096, 32), ("Phi-3-mini-4k", 2047, 32), ("Gemma 2 9B", 0, 21), ("Gemma 3 1B", 0, 22),
     ("Qwen2.5-7B", 0, 0), ("Phi-4-mini", 0, 0)],
)  # fmt: skip
def test_published_windows(name, longest, num_windowed):
    sizes, rest, _ = PUBLISHED[name]
    model = ModelDescription.from_config({**dict(zip(_SIZES, sizes, strict=True)), **rest})
    assert model.longest_window == longest
    assert sum(map(bool, model.windows)) == num_windowed
