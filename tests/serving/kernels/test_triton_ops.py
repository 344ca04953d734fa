"""The kernels equal the twins in `ops`: on a GPU as they are, elsewhere in Triton's interpreter.

tests/triton_interpreter.py says how it is come by. It takes milliseconds for each program of a launch, so steps are as
small as the claim allows.
"""

from dataclasses import replace

import pytest
import torch

from alpaca.serving.kernels import ops
from alpaca.serving.kernels.ops import AttentionBatch
from tests.serving.kernels.test_ops import EPS, STEPS, Paged, build_step, forget_before, naive_attention, random
from tests.triton_interpreter import DEVICE, INTERPRETED, need_kernels

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def kernels(monkeypatch):
    """The module, where this process can run it."""
    need_kernels(monkeypatch)
    from alpaca.serving.kernels import triton_ops

    return triton_ops


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.is_contiguous()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.cpu().double(), expected.cpu().double(), rtol=tolerance, atol=tolerance)


def check_attention(kernels, step: Paged, *, scale: float = 0.3, num_splits: int | None = None) -> None:
    moved = step.to(DEVICE)
    caches = moved.key_cache, moved.value_cache
    found = kernels.paged_attention(moved.q, *caches, moved.batch, scale, num_splits=num_splits)
    check(found, naive_attention(step, scale), step.q.dtype)


class Compiled:
    """Stands for a kernel: what would be launched is compiled for an H100, down to machine code."""

    def __init__(self, kernel, name: str, compiled: list[str]) -> None:
        self.kernel = kernel
        self.name = name
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]):
        return self.compile

    def compile(self, *args, num_warps: int, num_stages: int = 3, **constants) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        names = self.kernel.arg_names
        given = dict(zip(names, args, strict=False))
        assert {*given, *constants} == set(names)
        pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
                    torch.int64: "*i64"}  # fmt: skip
        kinds = {int: "i32", float: "fp32"}
        signature = {name: kinds.get(type(value)) or pointers[value.dtype] for name, value in given.items()}
        aligned = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor) or value % 16 == 0]
        source = triton.compiler.ASTSource(
            self.kernel,
            signature | dict.fromkeys(constants, "constexpr"),
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        options = dict(num_warps=num_warps, num_stages=num_stages)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 227 * 1024
        self.compiled.append(self.name)


@pytest.fixture
def compiling(monkeypatch, tmp_path):
    """The module with launches that compile only, and the names of the kernels that did: this needs no GPU."""
    if INTERPRETED:
        pytest.skip("run outside the interpreter")
    from alpaca.serving.kernels import triton_ops

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled: list[str] = []
    for name in [name for name in vars(triton_ops) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_ops, name, Compiled(getattr(triton_ops, name), name, compiled))
    return triton_ops, compiled


# A compilation takes a second: fast tests have each branch of the kernels in one of them.
DECODE, MIXED = pytest.param([1, 1], id="decode"), pytest.param([1, 9], id="mixed")
SLOW_DECODE = pytest.param([1, 1], id="decode", marks=pytest.mark.slow)
SLOW_MIXED = pytest.param([1, 9], id="mixed", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "num_splits", "queries"),
    [
        pytest.param(*values, *queries.values, id=f"{values}-{queries.id}", marks=queries.marks)
        for values, both in (
            (((4, 4), 128, torch.bfloat16, 1), (DECODE, MIXED)),
            (((4, 1), 128, torch.bfloat16, 4), (DECODE, SLOW_MIXED)),
            (((3, 1), 80, torch.float16, 1), (SLOW_DECODE, MIXED)),
            (((2, 2), 256, torch.bfloat16, 1), (SLOW_DECODE, SLOW_MIXED)),  # with windows and caps below
            (((2, 1), 8, torch.float32, 2), (DECODE, SLOW_MIXED)),
        )
        for queries in both
    ],
)
@pytest.mark.fast_rows(1)
def test_attention_compiles_for_an_h100(compiling, queries, heads, width, dtype, num_splits):
    kernels, compiled = compiling
    step = build_step([20, 33], queries, heads=heads, width=width, dtype=dtype)
    kernels.paged_attention(step.q, step.key_cache, step.value_cache, step.batch, 0.3, num_splits=num_splits)
    assert compiled == ["_attention_kernel", *["_combine_kernel"] * (num_splits > 1)]


@pytest.mark.parametrize("queries", [DECODE, MIXED])
@pytest.mark.parametrize(
    ("window", "softcap"), [(9, 50.0), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((9, 0.0), (0, 50.0)))]
)
@pytest.mark.slow
def test_windows_and_caps_compile_for_an_h100(compiling, queries, window, softcap):
    kernels, compiled = compiling
    step = build_step([20, 33], queries, heads=(4, 2), width=256, dtype=torch.bfloat16)
    caches = step.key_cache, step.value_cache
    kernels.paged_attention(step.q, *caches, step.batch, 0.3, num_splits=2, window=window, softcap=softcap)
    assert compiled == ["_attention_kernel", "_combine_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_small_kernels_compile_for_an_h100(compiling, dtype):
    kernels, compiled = compiling
    x, weight = torch.zeros(2, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    kernels.rms_norm(x, weight, EPS)
    kernels.add_rms_norm(x, x, weight, EPS)
    kernels.silu_mul(x)
    for is_exact in (True, False):
        kernels.gelu_mul(x, is_exact=is_exact)
    for scales in (torch.zeros(3, 128, dtype=dtype), torch.zeros(1, 1000)):
        kernels.norm_heads(x, scales, EPS, first=16)
    kernels.rms_norm(x, weight.float(), EPS)
    caches, places = torch.zeros(2, 2, 16, 2, 80, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    for turned in (80, 32, 0):
        kernels.rotate_and_store(torch.zeros(2, 8 * 80, dtype=dtype), torch.zeros(9, turned), places, places, *caches)
    norms, gates = ["_rms_norm_kernel"] * 2, ["_silu_mul_kernel", *["_gelu_mul_kernel"] * 2]
    assert compiled[:5] == norms + gates
    assert compiled[5:] == ["_norm_heads_kernel"] * 2 + ["_rms_norm_kernel"] + ["_rotate_and_store_kernel"] * 3


# Norms and activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 512), (3, 80)])
def test_rms_norm_is_its_twin(kernels, dtype, rows, width):
    x, weight = random(rows, width, dtype=dtype) * 3, random(width, seed=1, dtype=dtype)
    check(kernels.rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS), ops.rms_norm(x, weight, EPS), dtype)


def test_rms_norm_takes_rows_apart(kernels):
    x, weight = random(4, 3 * 64, dtype=torch.float32)[:, 64:128], random(64, seed=1, dtype=torch.float32)
    check(kernels.rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS), ops.rms_norm(x, weight, EPS), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_its_twin(kernels, dtype):
    x, residual, weight = (random(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(5, 96), (5, 96), (96,)]))
    found = kernels.add_rms_norm(x.to(DEVICE), residual.to(DEVICE), weight.to(DEVICE), EPS)
    expected = ops.add_rms_norm(x, residual, weight, EPS)
    check(found[0], expected[0], dtype)
    check(found[1], expected[1], dtype)
    if not INTERPRETED:
        assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 1100])
def test_silu_mul_is_its_twin(kernels, dtype, width):
    gate_up = random(3, 2 * width, dtype=dtype) * 4
    check(kernels.silu_mul(gate_up.to(DEVICE)), ops.silu_mul(gate_up), dtype)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_mul_is_its_twin(kernels, dtype, is_exact):
    gate_up = random(3, 2 * 300, dtype=dtype) * 2
    check(kernels.gelu_mul(gate_up.to(DEVICE), is_exact=is_exact), ops.gelu_mul(gate_up, is_exact=is_exact), dtype)


@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize(("num_groups", "width"), [(3, 16), (1, 80)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_heads_and_of_wide_weights_are_their_twins(kernels, dtype, num_groups, width, is_wide):
    weight = random(num_groups, width, seed=1, dtype=torch.float32 if is_wide else dtype)
    qkv = random(4, 300, dtype=dtype)
    expected = ops.norm_heads(qkv.clone(), weight, EPS, first=32)
    check(kernels.norm_heads(qkv.to(DEVICE, copy=True), weight.to(DEVICE), EPS, first=32), expected, dtype)
    x = qkv[:, :width].contiguous()
    check(kernels.rms_norm(x.to(DEVICE), weight[0].to(DEVICE), EPS), ops.rms_norm(x, weight[0], EPS), dtype)


# Rotary embedding and the cache's writes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "turned"),
    [(4, 4, 16, 16), (6, 2, 8, 8), (9, 3, 80, 80), (6, 2, 16, 12), (6, 2, 80, 20), (4, 1, 16, 0)],
)
def test_rotate_and_store_is_its_twin(kernels, dtype, heads, kv_heads, width, turned):
    qkv = random(5, (heads + 2 * kv_heads) * width, dtype=dtype)
    angles = random(40, turned // 2, seed=1)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    positions, slot_mapping = torch.tensor([0, 39, 7, 7, 12]), torch.tensor([8, 31, 9, 23, 16])
    caches = random(2, 4, 8, kv_heads, width, seed=2, dtype=dtype)
    written = caches.to(DEVICE, copy=True)
    inputs = (tensor.to(DEVICE) for tensor in (qkv, cos_sin, positions, slot_mapping))
    expected = ops.rotate_and_store(qkv, cos_sin, positions, slot_mapping, *caches)
    check(kernels.rotate_and_store(*inputs, *written), expected, dtype)
    check(written, caches, dtype)
    assert torch.equal(written[1].cpu(), caches[1])


def test_padding_tokens_may_share_a_slot(kernels):
    qkv, cos_sin = random(4, 3 * 16, dtype=torch.float32), torch.zeros(1, 16)
    caches = torch.zeros(2, 2, 8, 1, 16, device=DEVICE)
    slot_mapping = torch.tensor([3, 3, 3, 9], device=DEVICE)
    positions = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    kernels.rotate_and_store(qkv.to(DEVICE), cos_sin.to(DEVICE), positions, slot_mapping, *caches)
    assert torch.equal(caches[1, 1, 1, 0].cpu(), qkv[3, 32:])
    assert caches[:, 0, :3].abs().max() == 0
    assert caches[:, 0, 4:].abs().max() == 0


# Attention


_SPLIT_LIKE_OTHERS = (
    "one sequence decodes", "equal lengths", "prefill", "prefill of two", "chunk from the middle",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "num_splits"),
    [
        *((name, 1) for name in STEPS),
        *(pytest.param(name, 3, marks=pytest.mark.slow if name in _SPLIT_LIKE_OTHERS else ()) for name in STEPS),
    ],
)
def test_attention_is_naive_attention(kernels, name, num_splits):
    step = build_step(**STEPS[name], dtype=torch.float32)
    check_attention(kernels, step, num_splits=num_splits)


@pytest.mark.parametrize(("window", "softcap", "num_splits"), [(1, 0.0, 1), (20, 0.0, 3), (7, 2.0, 1), (0, 2.0, 3)])
@pytest.mark.fast_rows(2)
def test_windows_and_caps_are_naive_attention(kernels, num_splits, window, softcap):
    """What lies behind the window is never read: it may be anything."""
    for lengths, queries in (([1, 33, 16, 50], [1] * 4), ([30, 60, 7], [1, 25, 3])):
        step = build_step(lengths, queries, heads=(3, 1), dtype=torch.float32, spare_rows=2)
        expected = naive_attention(step, 0.9, window=window, softcap=softcap)
        moved = (forget_before(step, window) if window else step).to(DEVICE)
        caches = moved.key_cache, moved.value_cache
        options = dict(window=window, softcap=softcap, num_splits=num_splits)
        check(kernels.paged_attention(moved.q, *caches, moved.batch, 0.9, **options), expected, torch.float32)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 32])
@pytest.mark.fast_rows(2)
def test_attention_over_several_blocks_of_keys(kernels, num_splits):
    step = build_step([150, 64, 1], [1, 1, 1], heads=(2, 1), dtype=torch.float32)
    check_attention(kernels, step, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.fast_rows(1)
def test_prefill_over_several_tiles(kernels, num_splits):
    """Of 21 queries: a step's first sequence has two whole ones and part of a third."""
    step = build_step([70, 40, 3, 23], [45, 1, 3, 22], heads=(3, 1), dtype=torch.float32, spare_rows=2)
    check_attention(kernels, step, num_splits=num_splits)


def test_tiles_are_found_among_more_sequences_than_one_look_takes(kernels):
    """A look takes 128. Most sequences have no query in the step: their programs end early."""
    queries = [1, 2, *[0] * 124, 1, 1, 1, 0, 0, 1, 2]
    step = build_step([2] * len(queries), queries, heads=(1, 1), width=8, dtype=torch.float32)
    check_attention(kernels, step)


# Tests above have heads of 16. A width of 8 or 80 is padded, and above 64 tiles have fewer rows.
_LIKE_OTHERS = [pytest.param(width, marks=pytest.mark.slow) for width in (32, 64, 96)]


@pytest.mark.parametrize("width", [8, 80, 128, 256, *_LIKE_OTHERS])
@pytest.mark.fast_rows(2)
def test_attention_of_any_head_width(kernels, width):
    for queries in ([1, 1], [1, 9]):
        step = build_step([20, 33], queries, width=width, dtype=torch.float32)
        check_attention(kernels, step, scale=width**-0.5)


_WIDE_GROUPS = [pytest.param(heads, marks=pytest.mark.slow) for heads in ((24, 1), (48, 2), (71, 1))]


@pytest.mark.parametrize("heads", [(4, 4), (3, 1), (16, 1), (10, 2), *_WIDE_GROUPS], ids=str)
@pytest.mark.fast_rows(2)
def test_attention_of_any_group(kernels, heads):
    for queries in ([1, 1], [1, 3 if heads[0] < 16 else 2]):
        step = build_step([20, 33], queries, heads=heads, dtype=torch.float32)
        check_attention(kernels, step, num_splits=2)


@pytest.mark.parametrize(
    ("name", "num_splits"),
    [
        ("unequal lengths", 1),
        ("decode and prefill", 2),
        pytest.param("unequal lengths", 2, marks=pytest.mark.slow),
        pytest.param("decode and prefill", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.fast_rows(1)
def test_attention_in_narrow_types(kernels, dtype, name, num_splits):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter's tl.dot multiplies bfloat16's bits as integers")
    check_attention(kernels, build_step(**STEPS[name], dtype=dtype), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.fast_rows(1)
def test_one_batch_follows_its_tensors(kernels, num_splits):
    """What a captured graph replays: the same launch, other lengths, tables and padding."""
    steps = [build_step(lengths, queries, dtype=torch.float32) for lengths, queries in
             [([70, 30, 20], [1, 1, 1]), ([7, 69, 0], [1, 1, 1]), ([60, 0, 0], [1, 0, 0])]]  # fmt: skip
    batch = steps[0].to(DEVICE).batch
    for step in steps:
        for name in ("block_tables", "seq_lens", "query_starts"):
            kept, given = getattr(batch, name), getattr(step.batch, name)
            kept[tuple(map(slice, given.shape))] = given.to(DEVICE)
        q = random(3, 4, 16, seed=4, dtype=torch.float32)
        moved = Paged(q, step.key_cache, step.value_cache, step.batch).to(DEVICE)
        found = kernels.paged_attention(moved.q, moved.key_cache, moved.value_cache, batch, 0.3, num_splits=num_splits)
        check(found, naive_attention(replace(step, q=q), 0.3), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_captured_graph_follows_its_tensors(kernels):
    long, short = (build_step(lengths, [1] * 3, heads=(8, 8), width=128, dtype=torch.bfloat16).to(DEVICE)
                   for lengths in ([700, 90, 300], [9, 650, 500]))  # fmt: skip
    bound = replace(long.batch, max_seq_len=2048)
    shape = max(long.key_cache.shape, short.key_cache.shape)
    keys, values = random(2, *shape, seed=7, dtype=torch.bfloat16).to(DEVICE)
    q = long.q
    kernels.paged_attention(q, keys, values, bound, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.paged_attention(q, keys, values, bound, 0.1)
    for step in (long, short, long):
        columns = step.batch.block_tables.shape[1]
        bound.block_tables[:, :columns] = step.batch.block_tables
        bound.seq_lens.copy_(step.batch.seq_lens)
        graph.replay()
        check(found, naive_attention(Paged(q, keys, values, bound).to("cpu"), 0.1), torch.bfloat16)


@pytest.mark.parametrize(
    ("num_programs", "max_seq_len", "expected"),
    [(32, 2048, 16), (32 * 64, 2048, 1), (8, 2048, 16), (8, 8192, 32), (8 * 16, 8192, 4), (1, 100, 1), (1, 300, 2)],
)
def test_splits_fill_an_h100_and_no_more(kernels, num_programs, max_seq_len, expected):
    assert kernels.choose_num_splits(num_programs, max_seq_len, 132) == expected


def test_batch_bounds_need_not_be_reached(kernels):
    step = build_step([20, 9, 33], [1, 9, 4], heads=(1, 1), dtype=torch.float32)
    batch = step.batch
    tensors = batch.block_tables, batch.seq_lens, batch.query_starts
    bounded = replace(step, batch=AttentionBatch(*tensors, max_query_len=64, max_seq_len=1000))
    check_attention(kernels, bounded)
