"""Each operation equals the slow obvious way in float64; batched equals alone."""

from dataclasses import dataclass

import pytest
import torch

from alpaca.serving.kernels import ops

EPS = 1e-5
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCES)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal; the same seed gives the same numbers, rounded to the type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """The type is kept, and the numbers are float64's, but for the type's rounding."""
    assert found.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


@dataclass(frozen=True)
class Paged:
    """Queries, caches and batch of one step."""

    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    batch: ops.AttentionBatch

    def to(self, device: str) -> "Paged":
        batch = self.batch
        tensors = (batch.block_tables.to(device), batch.seq_lens.to(device), batch.query_starts.to(device))
        moved = ops.AttentionBatch(*tensors, batch.max_query_len, batch.max_seq_len)
        return Paged(self.q.to(device), self.key_cache.to(device), self.value_cache.to(device), moved)


def build_step(
    lengths: list[int],
    queries: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float64,
    num_shared_blocks: int = 0,
    spare_rows: int = 0,
) -> Paged:
    """A step over scrambled blocks; every slot that no sequence owns is NaN, every table entry past an end nonsense."""
    num_blocks = [-(-length // block_size) for length in lengths]
    table_width = max(*num_blocks, 1) + 2
    free = (torch.randperm(sum(num_blocks) + 1, generator=torch.Generator().manual_seed(9)) + 1).tolist()
    tables = torch.full((len(lengths), table_width), 2**31 - 1, dtype=torch.int32)
    for s, count in enumerate(num_blocks):
        shared = min(num_shared_blocks, count) if s else 0
        tables[s, :shared] = tables[0, :shared]
        tables[s, shared:count] = torch.tensor([free.pop() for _ in range(count - shared)], dtype=torch.int32)
    keys = torch.full((sum(num_blocks) + 2, block_size, heads[1], width), torch.nan, dtype=dtype)
    values, fresh = keys.clone(), random(2, *keys.shape, seed=3, dtype=dtype)
    for s, length in enumerate(lengths):
        for token in range(length):
            place = int(tables[s, token // block_size]), token % block_size
            keys[place], values[place] = fresh[0][place], fresh[1][place]
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    q = random(sum(queries) + spare_rows, heads[0], width, seed=4, dtype=dtype)
    batch = ops.AttentionBatch(tables, torch.tensor(lengths).int(), starts, max(queries), max(lengths))
    return Paged(q, keys, values, batch)


def naive_attention(step: Paged, scale: float, *, window: int = 0, softcap: float = 0.0) -> torch.Tensor:
    """One query and one head after the other, over keys collected one by one, in float64."""
    num_heads = step.q.shape[1]
    block_size, num_kv_heads = step.key_cache.shape[1:3]
    expected = torch.zeros(step.q.shape, dtype=torch.float64)
    starts = step.batch.query_starts.tolist()
    for s, length in enumerate(step.batch.seq_lens.tolist()):
        places = [(int(step.batch.block_tables[s, i // block_size]), i % block_size) for i in range(length)]
        for row in range(starts[s], starts[s + 1]):
            seen = places[: max(length - (starts[s + 1] - 1 - row), 0)]
            seen = seen[-window:] if window else seen
            for head in range(num_heads if seen else 0):
                kv_head = head // (num_heads // num_kv_heads)
                keys = torch.stack([step.key_cache[place][kv_head] for place in seen]).double()
                values = torch.stack([step.value_cache[place][kv_head] for place in seen]).double()
                scores = keys @ step.q[row, head].double() * scale
                scores = (scores / softcap).tanh() * softcap if softcap else scores
                weights = (scores - scores.max()).exp()
                expected[row, head] = (weights / weights.sum()) @ values
    return expected


def forget_before(step: Paged, window: int) -> Paged:
    """The same step once blocks that no query of it can see are another sequence's, with NaN in them."""
    keys, values = step.key_cache.clone(), step.value_cache.clone()
    size, starts = keys.shape[1], step.batch.query_starts.tolist()
    held: set[int] = set()
    behind: set[int] = set()
    for s, length in enumerate(step.batch.seq_lens.tolist()):
        first = max(length - (starts[s + 1] - starts[s]) - window + 1, 0) // size
        blocks = step.batch.block_tables[s, : -(-length // size)].tolist()
        behind |= {*blocks[:first]}
        held |= {*blocks[first:]}
    for block in behind - held:
        keys[block], values[block] = torch.nan, torch.nan
    return Paged(step.q, keys, values, step.batch)


STEPS = {
    "one sequence decodes": dict(lengths=[21], queries=[1]),
    "equal lengths": dict(lengths=[18, 18, 18], queries=[1, 1, 1]),
    "unequal lengths": dict(lengths=[1, 33, 16, 17, 50], queries=[1] * 5),
    "shared blocks": dict(lengths=[40, 37, 48], queries=[1, 1, 5], num_shared_blocks=2),
    "prefill": dict(lengths=[19], queries=[19]),
    "prefill of two": dict(lengths=[19, 32], queries=[19, 32]),
    "chunk from the middle": dict(lengths=[45], queries=[20]),
    "decode and prefill": dict(lengths=[30, 20, 7, 41], queries=[1, 20, 1, 9]),
    "padding rows": dict(lengths=[0, 20, 0, 9, 0], queries=[1, 1, 0, 1, 1]),
    "rows of no sequence": dict(lengths=[20, 9, 0], queries=[1, 1, 0], spare_rows=3),
    "only padding": dict(lengths=[0, 0], queries=[1, 1]),
    "blocks of 8": dict(lengths=[23, 8, 31], queries=[1, 8, 3], block_size=8),
}


# Norms and activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_rms_norm_divides_by_the_root_mean_square(dtype, rows):
    x, weight = random(rows, 48, dtype=dtype) * 3, random(48, seed=1, dtype=dtype)
    expected = [[v * w / (sum(u * u for u in row) / 48 + EPS) ** 0.5 for v, w in zip(row, weight.tolist(), strict=True)]
                for row in x.tolist()]  # fmt: skip
    check(ops.rms_norm(x, weight, EPS), torch.tensor(expected, dtype=torch.float64), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_as_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = random(9, 512, dtype=dtype) * 3, random(512, seed=1, dtype=dtype)
    module = LlamaRMSNorm(512, EPS).to(dtype)
    module.weight.data = weight
    assert torch.equal(ops.rms_norm(x, weight, EPS), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_the_sum_and_its_norm(dtype):
    x, residual, weight = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(5, 32), (5, 32), (32,)]))
    before = x.clone(), residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(x + residual, weight, EPS))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_gates_the_second_half(dtype):
    gate_up = random(6, 34, dtype=dtype) * 4
    before, wide = gate_up.clone(), gate_up.double()
    check(ops.silu_mul(gate_up), wide[:, :17] / (1 + (-wide[:, :17]).exp()) * wide[:, 17:], dtype)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_exact", [True, False])
def test_gelu_mul_gates_the_second_half(dtype, is_exact):
    gate_up = random(6, 34, dtype=dtype) * 4
    before, (gate, up) = gate_up.clone(), gate_up.double().chunk(2, -1)
    inner = torch.erf(gate * 0.5**0.5) if is_exact else torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    check(ops.gelu_mul(gate_up, is_exact=is_exact), gate * (1 + inner) / 2 * up, dtype)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_weight_scales_before_the_rounding_as_gemmas(dtype):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    x, weight = random(9, 512, dtype=dtype) * 3, random(512, seed=1, dtype=dtype)
    module = Gemma2RMSNorm(512, EPS).to(dtype)
    module.weight.data = weight
    assert torch.equal(ops.rms_norm(x, 1 + weight.float(), EPS), module(x))
    qkv = random(9, 700, dtype=dtype)
    expected = torch.cat([qkv[:, :100], module(qkv[:, 100:612]), qkv[:, 612:]], dim=1)
    assert torch.equal(ops.norm_heads(qkv, (1 + weight.float())[None], EPS, first=100), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_groups", [1, 3])
def test_norm_heads_norms_each_group_by_itself(dtype, num_groups):
    qkv, weight = random(5, 60, dtype=dtype), random(num_groups, 16, seed=1, dtype=dtype)
    expected = qkv.double()
    for group in range(num_groups):
        columns = slice(4 + 16 * group, 20 + 16 * group)
        expected[:, columns] = ops.rms_norm(qkv[:, columns], weight[group], EPS).double()
    found = ops.norm_heads(qkv, weight, EPS, first=4)
    assert found is qkv
    check(found, expected, dtype)


# Rotary embedding and the cache's writes


@pytest.mark.parametrize("turned", [0, 6, 16])
def test_only_the_first_part_of_a_head_turns(turned):
    qkv, positions, slots = random(5, 8 * 16), torch.tensor([0, 39, 7, 7, 12]), torch.arange(5)
    angles = random(40, turned // 2, seed=1)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    caches = torch.zeros(2, 1, 8, 2, 16, dtype=torch.float64)
    found = ops.rotate_and_store(qkv, cos_sin, positions, slots, *caches)
    parts = torch.zeros(2, 1, 8, 2, turned, dtype=torch.float64)
    heads = qkv.view(5, 8, 16)
    expected = heads.clone()
    if turned:
        narrow = heads[:, :, :turned].flatten(1)
        expected[:, :4, :turned] = ops.rotate_and_store(narrow, cos_sin, positions, slots, *parts)
        expected[:, 4:6, :turned] = parts[0, 0, :5]
    assert torch.equal(found, expected[:, :4])
    assert torch.equal(caches[0, 0, :5], expected[:, 4:6])
    assert torch.equal(caches[1, 0, :5], heads[:, 6:])


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 8), (3, 1, 80)])
def test_rotate_and_store_is_a_rotation_in_each_plane(dtype, table_dtype, heads, kv_heads, width):
    num_tokens, block_size, half = 5, 8, width // 2
    qkv = random(num_tokens, (heads + 2 * kv_heads) * width, dtype=dtype)
    angles = random(40, half, seed=1)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).to(table_dtype)
    positions, slot_mapping = torch.tensor([0, 39, 7, 7, 12]), torch.tensor([8, 31, 9, 23, 16])
    caches = [random(4, block_size, kv_heads, width, seed=seed, dtype=dtype) for seed in (2, 3)]
    before = [cache.clone() for cache in caches]
    q = ops.rotate_and_store(qkv, cos_sin, positions, slot_mapping, *caches)

    planes = qkv.double().view(num_tokens, -1, 2, half)[:, : heads + kv_heads].transpose(2, 3).contiguous()
    turns = torch.polar(torch.ones(()).double(), angles[positions])[:, None]
    turned = torch.view_as_real(torch.view_as_complex(planes) * turns).transpose(2, 3).reshape(num_tokens, -1, width)
    narrow = torch.float32 if table_dtype == torch.float32 and dtype == torch.float64 else dtype
    assert q.dtype == dtype
    check(q.to(narrow), turned[:, :heads], narrow)
    values = qkv.view(num_tokens, -1, width)[:, heads + kv_heads :]
    for cache, old, new in zip(caches, before, [turned[:, heads:], values.double()], strict=True):
        expected = old.double()
        for token, slot in enumerate(slot_mapping.tolist()):
            expected[slot // block_size, slot % block_size] = new[token]
        assert cache.dtype == dtype
        check(cache.to(narrow), expected, narrow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rotation_is_transformers(dtype):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
    qkv, positions = random(7, 12 * 16, dtype=dtype), torch.tensor([3, 0, 60, 9, 10, 11, 1])
    cos, sin = LlamaRotaryEmbedding(config)(random(1, dtype=dtype), positions[None])
    every_cos, every_sin = LlamaRotaryEmbedding(config)(random(1, dtype=dtype), torch.arange(64)[None])
    q, k, _ = (part.view(1, 7, 4, 16).transpose(1, 2) for part in qkv.split(64, dim=-1))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    caches = torch.zeros(2, 1, 16, 4, 16, dtype=dtype)
    cos_sin = torch.cat([every_cos[0, :, :8], every_sin[0, :, :8]], dim=-1)
    found = ops.rotate_and_store(qkv, cos_sin, positions, torch.arange(7), caches[0], caches[1])
    check(found, expected[0][0].transpose(0, 1), dtype)
    check(caches[0][0, :7], expected[1][0].transpose(0, 1), dtype)


def test_padding_tokens_may_share_a_slot():
    qkv, cos_sin = random(4, 3 * 16), torch.cat([torch.ones(1, 8), torch.zeros(1, 8)], dim=-1)
    caches = torch.zeros(2, 2, 8, 1, 16, dtype=torch.float64)
    slot_mapping = torch.tensor([3, 3, 3, 9])
    ops.rotate_and_store(qkv, cos_sin, torch.zeros(4, dtype=torch.int64), slot_mapping, caches[0], caches[1])
    assert torch.equal(caches[1][1, 1, 0], qkv[3, 32:])
    assert any(torch.equal(caches[1][0, 3, 0], qkv[i, 32:]) for i in range(3))
    assert caches[:, 0, :3].abs().max() == 0


# Attention


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.fast_rows(9)
def test_attention_is_naive_attention(name, heads):
    step = build_step(**STEPS[name], heads=heads)
    check(ops.paged_attention(step.q, step.key_cache, step.value_cache, step.batch, 0.3),
          naive_attention(step, 0.3), torch.float64)  # fmt: skip


@pytest.mark.parametrize("window", [1, 7, 16, 30, 100])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.fast_rows(15)
def test_attention_in_a_window_is_naive_attention(name, window):
    """What lies behind the window is never read: it may be anything."""
    step = build_step(**STEPS[name])
    expected = naive_attention(step, 0.3, window=window)
    step = forget_before(step, window)
    caches = step.key_cache, step.value_cache
    check(ops.paged_attention(step.q, *caches, step.batch, 0.3, window=window), expected, torch.float64)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("name", STEPS)
def test_capped_attention_is_naive_attention(name, window):
    step = build_step(**STEPS[name])
    caches = step.key_cache, step.value_cache
    found = ops.paged_attention(step.q, *caches, step.batch, 1.3, window=window, softcap=2.0)
    check(found, naive_attention(step, 1.3, window=window, softcap=2.0), torch.float64)


def test_one_batch_serves_layers_with_and_without_windows():
    step = build_step([30, 20, 7], [1, 5, 1])
    for window in (0, 5, 0, 9, 5):
        found = ops.paged_attention(step.q, step.key_cache, step.value_cache, step.batch, 0.3, window=window)
        check(found, naive_attention(step, 0.3, window=window), torch.float64)


@pytest.mark.parametrize("width", [8, 32, 64, 80, 96, 128, 256])
def test_attention_of_any_head_width(width):
    step = build_step([20, 9, 33], [1, 9, 4], width=width)
    check(ops.paged_attention(step.q, step.key_cache, step.value_cache, step.batch, width**-0.5),
          naive_attention(step, width**-0.5), torch.float64)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["unequal lengths", "decode and prefill", "padding rows"])
def test_attention_keeps_the_type(name, dtype):
    step = build_step(**STEPS[name], dtype=dtype)
    check(ops.paged_attention(step.q, step.key_cache, step.value_cache, step.batch, 0.25),
          naive_attention(step, 0.25), dtype)  # fmt: skip


def test_attention_takes_queries_as_rotate_and_store_returns_them():
    step = build_step([20, 9, 33], [1, 9, 4])
    strided = torch.cat([step.q, step.q], dim=1)[:, : step.q.shape[1]]
    caches = step.key_cache, step.value_cache
    assert not strided.is_contiguous()
    assert torch.equal(ops.paged_attention(strided, *caches, step.batch, 0.3),
                       ops.paged_attention(step.q, *caches, step.batch, 0.3))  # fmt: skip


@pytest.mark.parametrize("limits", [(1, 1), (5000, 1 << 20), (1 << 20, 2500)])
def test_attention_in_groups_is_attention_at_once(monkeypatch, limits):
    step = build_step([3, 50, 17, 49, 2, 18, 33], [1, 1, 1, 1, 1, 1, 5])
    expected = naive_attention(step, 0.3)
    monkeypatch.setattr(ops, "_MOST_GATHERED_BYTES", limits[0])
    monkeypatch.setattr(ops, "_MOST_PADDING_BYTES", limits[1])
    found = ops.paged_attention(step.q, step.key_cache, step.value_cache, step.batch, 0.3)
    check(found, expected, torch.float64)
    pieces = ops._split_into_pieces(step.batch, 11, step.key_cache)
    assert len(pieces) > 2
    assert sum(piece.num_sequences for piece in pieces) == 7


@pytest.mark.parametrize("name", ["one sequence decodes", "unequal lengths", "prefill", "chunk from the middle"])
def test_attention_that_fits_one_call_copies_no_queries(name):
    step = build_step(**STEPS[name])
    (piece,) = ops._split_into_pieces(step.batch, step.q.shape[0], step.key_cache)
    assert piece.rows is None


def test_batched_is_alone():
    lengths, queries = [30, 20, 7, 41, 12, 30], [1, 20, 1, 9, 1, 1]
    step = build_step(lengths, queries)
    together = ops.paged_attention(step.q, step.key_cache, step.value_cache, step.batch, 0.3)
    for s, rows in enumerate(torch.arange(sum(queries)).split(queries)):
        batch = ops.AttentionBatch(
            step.batch.block_tables[s : s + 1], step.batch.seq_lens[s : s + 1],
            torch.tensor([0, queries[s]]).int(), queries[s], lengths[s],
        )  # fmt: skip
        alone = ops.paged_attention(step.q[rows], step.key_cache, step.value_cache, batch, 0.3)
        torch.testing.assert_close(together[rows], alone, rtol=1e-13, atol=1e-13)


def test_one_batch_serves_many_layers():
    step = build_step([30, 20, 7], [1, 5, 1])
    for layer in range(3):
        keys, values = step.key_cache + layer, step.value_cache * (layer + 1)
        expected = naive_attention(Paged(step.q, keys, values, step.batch), 0.3)
        check(ops.paged_attention(step.q, keys, values, step.batch, 0.3), expected, torch.float64)
