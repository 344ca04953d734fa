"""What bench.kernels measures: each operation of the engine at its shapes in the model, with the ways to do it.

Legend: N rows (packed tokens), I and O input and output width, S sequences, L their length, H query heads, K key/value
heads, d head width. Nothing is allocated before a case is measured, and all is let go when its group is through.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import ModuleType

import torch
from torch.nn import functional

from alpaca.formats.hf.quantization import Int8Weight, Nf4Weight, quantize_parts
from alpaca.serving.kernels import cpu_linear, linear, ops
from alpaca.serving.kernels.linear_base import PlainLinear
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.planning import BLOCK_SIZE
from bench.random_model import CONTEXT, SHAPES, VOCAB_SIZE, Shape
from bench.stopwatch import Call

HEAD_WIDTHS = {"7b": 128, "46m": 64}
EPS = 1e-6
_KERNEL_ROWS = 64  # the most our quantised kernels take
_ROTATED_BYTES = {"cuda": 240 << 20, "cpu": 64 << 20}  # several times a GPU's second-level cache (50 to 60 MB)
_MOST_COPIES = 64
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest value


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of doing one operation. `make` gives the calls; `error_of` a result's distance from what is right."""

    operation: str
    way: str
    setting: dict[str, int | str]
    make: Callable[[], list[Call]]
    error_of: Callable[[object], float]
    tolerance: float
    num_bytes: int  # the least that must be read and written
    num_operations: int = 0  # of floating point; 0: none to speak of
    is_chosen: bool = False  # what the engine does today
    is_ceiling: bool = False  # on keys laid out contiguously, which the engine's are not


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shapes of one run."""

    device: str
    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    num_rows: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]  # H, K, d
    sequences: tuple[tuple[int, int], ...]  # S, L
    prefills: tuple[tuple[int, int], ...]  # new tokens, cached ones before them
    small_rows: tuple[int, ...]
    sampled_rows: tuple[int, ...]
    vocab_size: int = VOCAB_SIZE

    def layers(self) -> dict[str, tuple[int, int]]:
        """O and I of each matrix product."""
        width, ffn = self.shape.width, self.shape.ffn_width
        return {
            "qkv": (3 * width, width), "out": (width, width), "gate_up": (2 * ffn, width), "down": (width, ffn),
            "head": (self.vocab_size, width),
        }  # fmt: skip

    def kernels(self, name: str) -> ModuleType | None:
        """Our Triton kernels, on a GPU."""
        if self.device != "cuda":
            return None
        return importlib.import_module(f"alpaca.serving.{name}")


def make_plan(device: str, shape: str, *, quick: bool = False) -> Plan:
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    if quick:
        tiny = Shape(width=128, num_layers=2, num_heads=2, ffn_width=192)
        return Plan(
            device=device, shape=tiny, dtypes=dtypes, num_rows=(1, 3), heads=((2, 1, 64),), sequences=((2, 40),),
            prefills=((9, 0), (9, 20)), small_rows=(3,), sampled_rows=(2,), vocab_size=500,
        )  # fmt: skip
    model, width = SHAPES[shape], HEAD_WIDTHS[shape]
    heads = ((model.num_heads, model.num_heads, width), (model.num_heads, model.num_heads // 4, width))
    rows = (1, 2, 4, 8, 16, 32, 64, 256)
    if device == "cuda":
        sequences = ((1, 512), (1, 2048), (8, 1024), (32, 512), (32, 1280), (64, 1024))
        prefills, small = ((256, 0), (1024, 0), (256, 1024), (1024, 1024)), (1, 8, 32, 64, 256, 1024)
    else:
        sequences, prefills, small = ((1, 128), (1, 512), (8, 256)), ((128, 0), (128, 256)), (1, 8, 32, 128)
    return Plan(
        device=device, shape=model, dtypes=dtypes, num_rows=rows, heads=heads, sequences=sequences, prefills=prefills,
        small_rows=small, sampled_rows=(1, 8, 32, 64),
    )  # fmt: skip


def num_copies(plan: Plan, num_bytes: int) -> int:
    return min(max(math.ceil(_ROTATED_BYTES[plan.device] / num_bytes), 1), _MOST_COPIES)


def random(plan: Plan, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=plan.device).mul_(scale)


def relative_error(expected: Callable[[], torch.Tensor], found: object) -> float:
    """The largest difference over the largest value; NaN stays NaN, and another shape is no result."""
    right = expected()
    if found.shape != right.shape:
        raise ValueError(f"expected a result of shape {tuple(right.shape)}, found {tuple(found.shape)}")
    return ((found.float() - right.float()).abs().max() / right.float().abs().max()).item()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Linear layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LinearWay:
    """`make(weight)` gives the layer on a weight of its own."""

    name: str
    make: Callable[[torch.Tensor | Int8Weight | Nf4Weight], Callable[[torch.Tensor], torch.Tensor]]
    chosen_up_to: float  # rows
    chosen_from: int = 0
    most_rows: float = math.inf
    tolerance_factor: float = 1.0


def linear_cases(plan: Plan) -> Iterator[Case]:
    for dtype in plan.dtypes:
        for layer, (num_outputs, width) in plan.layers().items():
            # The engine never quantises the head; on a GPU there is time to see whether that would pay.
            for kind in ("none",) if layer == "head" and plan.device == "cpu" else ("none", "int8", "nf4"):
                yield from _linear_cases(plan, layer, num_outputs, width, kind, dtype)


def _linear_cases(
    plan: Plan, layer: str, num_outputs: int, width: int, kind: str, dtype: torch.dtype
) -> Iterator[Case]:
    @cache
    def rows() -> torch.Tensor:
        return random(plan, max(plan.num_rows), width, dtype=dtype)

    @cache
    def weight() -> torch.Tensor | Int8Weight | Nf4Weight:
        whole = random(plan, num_outputs, width, dtype=dtype, scale=width**-0.5)
        return whole if kind == "none" else quantize_parts([whole], quantization=kind, device=whole.device)

    @cache
    def products() -> torch.Tensor:
        exact = weight().float() if kind == "none" else weight().dequantize(torch.float32)
        return rows().float() @ exact.T

    weight_bytes = _weight_bytes(num_outputs, width, kind, dtype)
    for way in linear_ways(plan, kind, width, dtype):

        @cache
        def copies(way: LinearWay = way) -> list[Callable[[torch.Tensor], torch.Tensor]]:
            return [way.make(_clone(weight())) for _ in range(num_copies(plan, weight_bytes))]

        for n in plan.num_rows:
            if n <= way.most_rows:
                yield Case(
                    operation="linear",
                    way=way.name,
                    setting={"layer": layer, "format": kind, "dtype": name_of(dtype), "rows": n},
                    make=lambda n=n, copies=copies: [partial(copy, rows()[:n].contiguous()) for copy in copies()],
                    error_of=partial(relative_error, lambda n=n: products()[:n]),
                    tolerance=_TOLERANCES[dtype] * way.tolerance_factor,
                    num_bytes=weight_bytes + n * (width + num_outputs) * dtype.itemsize,
                    num_operations=2 * n * width * num_outputs,
                    is_chosen=way.chosen_from <= n <= way.chosen_up_to,
                )


def _weight_bytes(num_outputs: int, width: int, kind: str, dtype: torch.dtype) -> int:
    if kind == "int8":
        return num_outputs * (width + 4)
    return num_outputs * width * dtype.itemsize if kind == "none" else num_outputs * width * 9 // 16


def _clone(weight: torch.Tensor | Int8Weight | Nf4Weight) -> torch.Tensor | Int8Weight | Nf4Weight:
    if isinstance(weight, torch.Tensor):
        return weight.clone()
    tensors = {name: value.clone() for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(weight, **tensors)


def linear_ways(plan: Plan, kind: str, width: int, dtype: torch.dtype) -> list[LinearWay]:
    """The ways of one format; which of them alpaca/serving/kernels/linear.py takes is told by the numbers of rows."""
    kernels = plan.kernels("triton_linear")
    plain = LinearWay(name="plain", make=PlainLinear, chosen_up_to=math.inf if kernels else -1)
    if kind == "none":
        native = LinearWay(name="native", make=cpu_linear.NativeLinear, chosen_up_to=math.inf)
        packed = LinearWay(name="packed", make=cpu_linear.PackedLinear, chosen_up_to=-1)
        ways = {native: cpu_linear.load() is not None, packed: _onednn_packs(dtype)}
        return [plain, *([] if kernels else [way for way, is_there in ways.items() if is_there])]
    by_blocks = linear._multiply_by_row_blocks
    if kernels is None:
        few = linear._FEW_ROWS_CPU if kind == "int8" and dtype == torch.bfloat16 else 0
        blocks = LinearWay(
            name="dequantised", chosen_up_to=math.inf, chosen_from=few + 1, make=lambda w: partial(by_blocks, weight=w)
        )
        fused = LinearWay(name="fused", make=_make_fused, chosen_up_to=few)
        return [fused, blocks] if few else [blocks]
    multiply, dequantize = (getattr(kernels, f"{verb}_{kind}") for verb in ("multiply", "dequantize"))
    few = linear._FEW_ROWS_CUDA if kind == "int8" or width % 64 == 0 else 0
    ways = [
        LinearWay(
            name="kernel", make=lambda w: partial(multiply, weight=w), chosen_up_to=few,
            most_rows=_KERNEL_ROWS if few else 0,
        ),
        LinearWay(
            name="dequantised", make=lambda w: partial(by_blocks, weight=w, dequantize=dequantize),
            chosen_up_to=math.inf, chosen_from=few + 1,
        ),
    ]  # fmt: skip
    if importlib.util.find_spec("bitsandbytes"):
        # It quantises the codes' values anew, which changes few of them, and in int8 the activations, too.
        ways.append(
            LinearWay(name="bitsandbytes", make=make_bitsandbytes, chosen_up_to=-1, tolerance_factor=4)
        )  # fmt: skip
    return ways


@cache
def _onednn_packs(dtype: torch.dtype) -> bool:
    """Not bfloat16 on a CPU without AVX-512."""
    try:
        cpu_linear.PackedLinear(torch.zeros(16, 16, dtype=dtype))
    except RuntimeError:
        return False
    return True


def _make_fused(weight: Int8Weight) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = linear.Int8Linear(weight)
    if not layer._is_fused:
        raise RuntimeError("torch's product of bfloat16 and int8 does not take this shape on this CPU")
    return layer._multiply_fused


def make_bitsandbytes(weight: Int8Weight | Nf4Weight) -> Callable[[torch.Tensor], torch.Tensor]:
    """bitsandbytes' layer, as transformers sets it up for inference."""
    import bitsandbytes as bnb

    values = weight.dequantize(torch.bfloat16)
    num_outputs, width = weight.shape
    if isinstance(weight, Int8Weight):
        layer = bnb.nn.Linear8bitLt(width, num_outputs, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(values.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(width, num_outputs, bias=False, compute_dtype=values.dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(values.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(values.device).eval()


# Attention --------------------------------------------------------------------------------------------------------


Heads = tuple[int, int, int]  # H, K, d


class PagedInputs:
    """Queries, and keys and values of the same lengths several times over, in blocks that lie scattered."""

    def __init__(
        self, plan: Plan, heads: Heads, num_sequences: int, length: int, *, num_new: int, dtype: torch.dtype
    ) -> None:
        num_heads, self.num_kv_heads, self.width = heads
        self.length, self.num_new, self.scale = length, num_new, self.width**-0.5
        per_sequence = math.ceil(length / BLOCK_SIZE)
        copies = num_copies(plan, 2 * num_sequences * length * self.num_kv_heads * self.width * dtype.itemsize)
        num_blocks = copies * num_sequences * per_sequence
        shape = (num_blocks + 1, BLOCK_SIZE, self.num_kv_heads, self.width)
        self.keys, self.values = (random(plan, *shape, dtype=dtype) for _ in range(2))
        self.q = random(plan, num_sequences * num_new, num_heads, self.width, dtype=dtype)
        # Decoding is captured with a bound on the length, and tables that wide: the bound chooses the splits.
        bound = max(CONTEXT, length) if num_new == 1 else length
        tables = torch.zeros(
            copies, num_sequences, math.ceil(bound / BLOCK_SIZE), dtype=torch.int32, device=plan.device
        )
        scattered = torch.randperm(num_blocks, device=plan.device).view(copies, num_sequences, per_sequence) + 1
        tables[:, :, :per_sequence] = scattered
        lengths = torch.full((num_sequences,), length, dtype=torch.int32, device=plan.device)
        starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=plan.device) * num_new
        self.batches = [AttentionBatch(table, lengths, starts, num_new, bound) for table in tables]

    def contiguous(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one copy, [S, L, K, d] each."""
        blocks = self.batches[at].block_tables[:, : math.ceil(self.length / BLOCK_SIZE)].long()
        return self.keys[blocks].flatten(1, 2)[:, : self.length], self.values[blocks].flatten(1, 2)[:, : self.length]

    @cached_property
    def expected(self) -> torch.Tensor:
        """The naive way in float32, of the first copy. [S * num_new, H, d]."""
        keys, values = self.contiguous(0)
        queries = self.q.view(len(keys), self.num_new, *self.q.shape[1:])
        last = torch.arange(self.length - self.num_new, self.length, device=self.q.device)
        seen = torch.arange(self.length, device=self.q.device) <= last[:, None]
        return torch.cat([self._naive(*one, seen) for one in zip(queries, keys, values, strict=True)])

    def _naive(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        grouped = q.float().unflatten(1, (self.num_kv_heads, -1))
        scores = torch.einsum("nkgd,lkd->kgnl", grouped, keys.float()) * self.scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return torch.einsum("kgnl,lkd->nkgd", weights, values.float()).flatten(1, 2)


def attention_cases(plan: Plan) -> Iterator[Case]:
    """Decoding (one query each), then prefills of one sequence."""
    steps = [("decode", count, length, 1) for count, length in plan.sequences]
    steps += [("prefill", 1, new + cached, new) for new, cached in plan.prefills]
    for dtype in plan.dtypes:
        for heads in plan.heads:
            for name, count, length, num_new in steps:
                yield from _attention_cases(plan, name, heads, count, length, num_new, dtype)


def _attention_cases(
    plan: Plan, name: str, heads: Heads, count: int, length: int, num_new: int, dtype: torch.dtype
) -> Iterator[Case]:
    made = cache(lambda: PagedInputs(plan, heads, count, length, num_new=num_new, dtype=dtype))
    num_heads, num_kv_heads, width = heads
    ways: dict[str, Callable[[PagedInputs, int], Call]] = {}
    if kernels := plan.kernels("triton_ops"):
        attend = kernels.paged_attention
        for splits in (None, 1, 2, 4, 8, 16) if num_new == 1 else (None,):
            way = "triton" if splits is None else f"triton {splits} splits"
            ways[way] = partial(_paged_call, partial(attend, num_splits=splits))
    ways["torch"] = partial(_paged_call, ops.paged_attention)
    ways["sdpa"] = _sdpa_call
    if kernels and num_new > 1:
        ways["varlen"] = _varlen_call
    setting = {"heads": f"{num_heads}/{num_kv_heads}/{width}", "dtype": name_of(dtype)}
    setting |= {"sequences": count, "length": length} if num_new == 1 else {"new": num_new, "cached": length - num_new}
    num_seen = count * (num_new * (length - num_new) + num_new * (num_new + 1) // 2)
    kv_bytes = 2 * count * length * num_kv_heads * width * dtype.itemsize
    for way, make_call in ways.items():
        yield Case(
            operation=name,
            way=way,
            setting=setting,
            make=lambda make_call=make_call: [make_call(made(), at) for at in range(len(made().batches))],
            error_of=partial(relative_error, lambda: made().expected),
            tolerance=_TOLERANCES[dtype],
            num_bytes=kv_bytes + 2 * count * num_new * num_heads * width * dtype.itemsize,
            num_operations=4 * num_heads * width * num_seen,
            is_chosen=way == ("triton" if kernels else "torch"),
            is_ceiling=way in ("sdpa", "varlen"),
        )


def _paged_call(attend: Callable[..., torch.Tensor], inputs: PagedInputs, at: int) -> Call:
    return partial(attend, inputs.q, inputs.keys, inputs.values, inputs.batches[at], inputs.scale)


def _sdpa_call(inputs: PagedInputs, at: int) -> Call:
    """torch's own attention on contiguous keys; in a prefill on keys repeated for each head of their group."""
    from torch.nn.attention.bias import causal_lower_right

    keys, values = (side.transpose(1, 2).contiguous() for side in inputs.contiguous(at))
    group = inputs.q.shape[1] // inputs.num_kv_heads
    queries = inputs.q.view(keys.shape[0], inputs.num_new, -1, inputs.width).transpose(1, 2)
    attend = partial(functional.scaled_dot_product_attention, scale=inputs.scale)
    if inputs.num_new == 1:
        return lambda: attend(queries, keys, values, enable_gqa=group > 1).flatten(0, 2).view(inputs.q.shape)
    keys, values = (side.repeat_interleave(group, dim=1) for side in (keys, values))
    mask = causal_lower_right(inputs.num_new, inputs.length)
    return lambda: attend(queries, keys, values, attn_mask=mask)[0].transpose(0, 1)


def _varlen_call(inputs: PagedInputs, at: int) -> Call:
    """torch's FlashAttention of packed sequences; how it is told to be causal changed between releases."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = inputs.q.shape[1] != inputs.num_kv_heads
    keys, values = (side[0].contiguous() for side in inputs.contiguous(at))
    starts = inputs.batches[at].query_starts
    key_starts = starts // inputs.num_new * inputs.length
    return lambda: varlen_attn(inputs.q, keys, values, starts, key_starts, inputs.num_new, inputs.length, **options)


# Norms, rotary embedding, activation ------------------------------------------------------------------------------


def small_cases(plan: Plan) -> Iterator[Case]:
    """Their inputs were just written by the operation before, and are still in the cache, as in the model."""
    makers = (_rms_norm, _add_rms_norm, _norm_heads, _rotate_and_store, _silu_mul, _gelu_mul)
    modules = {"torch": ops}
    if kernels := plan.kernels("triton_ops"):
        modules = {"triton": kernels, "torch": ops}
    for dtype in plan.dtypes:
        for maker in makers:
            for n in plan.small_rows:
                made = cache(partial(maker, plan, n, dtype))
                for way, module in modules.items():
                    yield Case(
                        operation=maker.__name__.removeprefix("_"),
                        way=way,
                        setting={"dtype": name_of(dtype), "rows": n},
                        make=lambda made=made, module=module: [partial(made().call, module)],
                        error_of=lambda found, made=made: made().error_of(found),
                        tolerance=_TOLERANCES[dtype],
                        num_bytes=_small_bytes(plan, maker.__name__) * n * dtype.itemsize,
                        is_chosen=way == next(iter(modules)),
                    )


@dataclass(frozen=True)
class Small:
    """A call of one of the modules' functions, and what is right."""

    call: Callable[[ModuleType], object]
    expected: tuple[torch.Tensor, ...]
    also_written: tuple[torch.Tensor, ...] = field(default=())

    def error_of(self, found: object) -> float:
        results = (*(found if isinstance(found, tuple) else (found,)), *self.also_written)
        errors = [relative_error(lambda one=one: one, two) for one, two in zip(self.expected, results, strict=True)]
        return max(errors) if not any(map(math.isnan, errors)) else math.nan


def _small_bytes(plan: Plan, name: str) -> int:
    """Elements read and written for each row."""
    width, ffn = plan.shape.width, plan.shape.ffn_width
    least = {"_rms_norm": 2, "_add_rms_norm": 4, "_norm_heads": 4, "_rotate_and_store": 6}
    return least[name] * width if name in least else 3 * ffn


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.float()


def _rms_norm(plan: Plan, n: int, dtype: torch.dtype) -> Small:
    x, weight = random(plan, n, plan.shape.width, dtype=dtype), random(plan, plan.shape.width, dtype=dtype)
    return Small(lambda module: module.rms_norm(x, weight, EPS), (_normed(x.float(), weight),))


def _add_rms_norm(plan: Plan, n: int, dtype: torch.dtype) -> Small:
    x, residual = (random(plan, n, plan.shape.width, dtype=dtype) for _ in range(2))
    weight = random(plan, plan.shape.width, dtype=dtype)
    total = (x.float() + residual.float()).to(dtype).float()
    return Small(lambda module: module.add_rms_norm(x, residual, weight, EPS), (_normed(total, weight), total))


def _norm_heads(plan: Plan, n: int, dtype: torch.dtype) -> Small:
    """Queries and keys, as many heads of each. In place: with scales of 1 another call changes nothing."""
    num_groups, width = 2 * plan.shape.num_heads, plan.shape.width // plan.shape.num_heads
    qkv, weight = random(plan, n, 3 * plan.shape.width, dtype=dtype), torch.ones(num_groups, width, device=plan.device)
    heads = qkv[:, : num_groups * width].float().unflatten(1, (num_groups, width))
    expected = torch.cat([_normed(heads, weight).flatten(1), qkv[:, num_groups * width :].float()], dim=1)
    return Small(lambda module: module.norm_heads(qkv, weight.to(dtype), EPS), (expected,))


def _gelu_mul(plan: Plan, n: int, dtype: torch.dtype) -> Small:
    """By tanh, as Gemma has it."""
    gate_up = random(plan, n, 2 * plan.shape.ffn_width, dtype=dtype)
    gate, up = gate_up.float().chunk(2, -1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    return Small(lambda module: module.gelu_mul(gate_up, is_exact=False), (expected,))


def _silu_mul(plan: Plan, n: int, dtype: torch.dtype) -> Small:
    gate_up = random(plan, n, 2 * plan.shape.ffn_width, dtype=dtype)
    gate, up = gate_up.float().chunk(2, -1)
    return Small(lambda module: module.silu_mul(gate_up), (gate / (1 + (-gate).exp()) * up,))


def _rotate_and_store(plan: Plan, n: int, dtype: torch.dtype) -> Small:
    """As many key heads as query heads; the keys' and values' own rows of the caches are looked at, too."""
    num_heads = plan.shape.num_heads
    d = plan.shape.width // num_heads
    qkv = random(plan, n, 3 * plan.shape.width, dtype=dtype)
    angles = torch.rand(CONTEXT, d // 2, device=plan.device) * 6
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.randperm(CONTEXT, device=plan.device)[:n]
    num_blocks = math.ceil(n / BLOCK_SIZE) + 1
    empty = torch.full((num_blocks, BLOCK_SIZE, num_heads, d), math.nan, dtype=dtype, device=plan.device)
    caches = (empty, empty.clone())
    flat_keys, flat_values = (one.view(-1, num_heads, d)[BLOCK_SIZE : BLOCK_SIZE + n] for one in caches)
    slot_mapping = torch.arange(BLOCK_SIZE, BLOCK_SIZE + n, device=plan.device)
    q, k, v = qkv.float().view(n, 3, num_heads, d).unbind(1)
    cos, sin = table[positions][:, None].chunk(2, -1)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def call(module: ModuleType) -> torch.Tensor:
        return module.rotate_and_store(qkv, table, positions, slot_mapping, *caches)

    return Small(call, (rotated(q), rotated(k), v), (flat_keys, flat_values))
