"""The C++ kernels give what torch's operations give, in any mixture of sequences; torch's stand in for them."""

import logging
from collections.abc import Iterator

import pytest
import torch

from alpaca.serving.kernels import ops
from alpaca.serving.kernels.native import library
from alpaca.serving.kernels.native import ops as native
from alpaca.serving.kernels.ops import AttentionBatch

if library.load() is None:
    pytest.skip("the C++ kernels are not built here", allow_module_level=True)

BLOCK = native.BLOCK_SIZE
HEADS = ((8, 8, 64), (8, 2, 32), (12, 1, 16), (32, 8, 128), (6, 3, 16), (71, 1, 64))  # queries, keys, width
STEPS = {
    "decoding": ([1, 1, 1], [5, 700, 16]),
    "prompts": ([40, 3, 17], [0, 0, 0]),
    "mixed": ([1, 33, 2, 1], [300, 250, 0, 31]),
    "alone": ([1], [523]),
}


def make_step(queries: list[int], past: list[int], heads: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """q [N, H, d], caches [B, BLOCK, K, d] with NaN where no sequence has anything, tables, lengths and starts."""
    generator = torch.Generator().manual_seed(sum(queries) + sum(past))
    num_heads, num_kv_heads, width = heads
    lengths = [new + old for new, old in zip(queries, past, strict=True)]
    counts = [-(-length // BLOCK) for length in lengths]
    free = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
    tables = torch.full((len(queries), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    keys = torch.full((sum(counts) + 1, BLOCK, num_kv_heads, width), torch.nan)
    values = keys.clone()
    for s, length in enumerate(lengths):
        for block in range(counts[s]):
            tables[s, block] = next(free)
            used = min(BLOCK, length - block * BLOCK)
            for cache in (keys, values):
                cache[tables[s, block], :used] = torch.randn(used, num_kv_heads, width, generator=generator)
    q = torch.randn(sum(queries), num_heads, width, generator=generator)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return q, keys, values, tables, torch.tensor(lengths, dtype=torch.int32), starts


def make_batch(tables: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor) -> AttentionBatch:
    return AttentionBatch(tables, lengths, starts, int(starts.diff().max()), int(lengths.max()))


def laid_out(cache: torch.Tensor) -> torch.Tensor:
    """A cache [B, BLOCK, K, d] as the C++ kernels keep it."""
    return cache.transpose(1, 2).contiguous().view(cache.shape)


def attend(module, step: tuple[torch.Tensor, ...], **options) -> torch.Tensor:
    q, keys, values, *rest = step
    if module is native:
        keys, values = laid_out(keys), laid_out(values)
    return module.paged_attention(q, keys, values, make_batch(*rest), q.shape[2] ** -0.5, **options)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_attention_is_torchs(name, heads):
    step = make_step(*STEPS[name], heads)
    for window, softcap in ((0, 0.0), (37, 0.0), (1, 0.0), (0, 5.0), (300, 30.0)):
        expected = attend(ops, step, window=window, softcap=softcap)
        found = attend(native, step, window=window, softcap=softcap)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("heads", HEADS[:3], ids=str)
def test_attention_has_the_same_bits_alone(heads):
    q, keys, values, tables, lengths, starts = make_step(*STEPS["mixed"], heads)
    together = attend(native, (q, keys, values, tables, lengths, starts))
    for s in range(len(lengths)):
        for first, last in ((0, int(starts[s + 1] - starts[s])), (0, 1)):  # all of a sequence's queries, and one by one
            rows = slice(int(starts[s]) + first, int(starts[s]) + last)
            length = lengths[s : s + 1] - (int(starts[s + 1]) - rows.stop)
            own = (q[rows], keys, values, tables[s : s + 1], length, torch.tensor([0, last - first], dtype=torch.int32))
            assert torch.equal(attend(native, own), together[rows])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_and_stays_at_home(poison):
    step = make_step([1, 4], [20, 30], (4, 2, 16))
    expected = attend(native, step)
    step[0][0, 1] = poison  # a query of the first sequence
    found = attend(native, step)
    assert found[0, 1].isnan().all()
    assert torch.equal(found[1:], expected[1:])


@pytest.mark.parametrize("turned", [16, 8, 0])
def test_rotation_and_storing_are_torchs(turned):
    generator = torch.Generator().manual_seed(0)
    for num_rows in (1, 3, 40):
        caches = [torch.zeros(20, BLOCK, 2, 16) for _ in range(4)]
        qkv, table = torch.randn(num_rows, 8 * 16, generator=generator), torch.randn(90, turned, generator=generator)
        positions = torch.randint(0, 90, (num_rows,), generator=generator)
        slots = torch.randperm(20 * BLOCK, generator=generator)[:num_rows]
        expected = ops.rotate_and_store(qkv, table, positions, slots, *caches[:2])
        found = native.rotate_and_store(qkv, table, positions, slots, *caches[2:])
        torch.testing.assert_close(found, expected)
        for cache, twin in zip(caches[2:], caches[:2], strict=True):
            torch.testing.assert_close(cache, laid_out(twin))


@pytest.mark.parametrize("width", [64, 1376, 70])
def test_norms_and_gates_are_torchs(width):
    torch.manual_seed(width)
    x, residual, weight = torch.randn(5, width), torch.randn(5, width), torch.rand(width)
    torch.testing.assert_close(native.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
    torch.testing.assert_close(
        native.add_rms_norm(x, residual, weight, 1e-5), ops.add_rms_norm(x, residual, weight, 1e-5)
    )
    gate_up = torch.randn(5, 2 * width) * torch.tensor([1e-3, 1.0, 10.0, 50.0, 300.0])[:, None]
    torch.testing.assert_close(native.silu_mul(gate_up), ops.silu_mul(gate_up), rtol=1e-5, atol=1e-6)
    for is_exact in (
        (True, False) if width % 16 == 0 else ()
    ):  # torch's own in float32 cancels where the gate is far below 0
        expected = ops.gelu_mul(gate_up.double(), is_exact=is_exact).float()
        torch.testing.assert_close(native.gelu_mul(gate_up, is_exact=is_exact), expected, rtol=1e-5, atol=1e-5)


# Building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Iterator[None]:
    """As on a machine that has built nothing yet."""
    monkeypatch.setattr(library, "_BUILT", tmp_path / "built")
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
def test_without_a_working_compiler_torch_is_used_and_the_log_says_so(fresh, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING):
        assert library.load() is None
        assert not native.fits(head_width=64, block_size=BLOCK, dtype=torch.float32)
    assert [record.message for record in caplog.records if "torch's own operations are used" in record.message]


@pytest.mark.slow
def test_a_build_is_kept(fresh, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        first = library.load()
        library.load.cache_clear()
        second = library.load()
    assert first is not None
    assert second is not None
    assert len([record for record in caplog.records if "building" in record.message]) == 1
    assert [path.suffix for path in (tmp_path / "built").iterdir()] == [".so"]


def test_blocks_of_another_size_are_refused():
    cache = torch.zeros(4, 8, 2, 16)
    batch = make_batch(
        torch.ones(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.tensor([0, 1]).int()
    )
    with pytest.raises(ValueError, match="blocks of 16 tokens; found 8"):
        native.paged_attention(torch.zeros(1, 2, 16), cache, cache, batch, 1.0)
    with pytest.raises(ValueError, match="blocks of 16 tokens; found 8"):
        native.rotate_and_store(
            torch.zeros(1, 96), torch.zeros(4, 16), torch.zeros(1).long(), torch.zeros(1).long(), cache, cache
        )


def test_only_what_the_kernels_take_fits():
    assert native.fits(head_width=64, block_size=BLOCK, dtype=torch.float32)
    for other in (dict(head_width=20), dict(block_size=4), dict(dtype=torch.float64), dict(dtype=torch.bfloat16)):
        assert not native.fits(**{"head_width": 64, "block_size": BLOCK, "dtype": torch.float32, **other})
