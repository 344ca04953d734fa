"""AdamW whose weights and moments may be bfloat16: what it writes is rounded up or down by chance.

The neighbours of a bfloat16 weight of 0.02 lie 1.2e-4 from it, so rounding to the nearest would lose an update of 2e-5,
and each one after it. Rounded up with the probability that its distance from the lower neighbour says, a number keeps
its expectation: such updates move the weight once in six steps, on average by what they ask for.

The random bits are a hash of seed, step, parameter and element, so a resumed run draws what the uninterrupted one does
without any state, and a sharded parameter what the whole one does. `triton_adamw` has the same update, bit for bit, as
one kernel for GPUs.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

CHUNK_ELEMENTS = 1 << 16  # of a parameter in float32 at a time: they stay in a core's cache
STORAGE_DTYPES = (torch.bfloat16, torch.float32)
# An integer hash of little bias: Chris Wellons, "Prospecting for hash functions" (lowbias32).
FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B
# Of float32, without the sign: from the first on rounding up would leave the finite numbers; the second is infinity.
LAST_FINITE, INFINITY, QUIET = 0x7F7F0000, 0x7F800000, 0x00400000


@dataclass(frozen=True, kw_only=True)
class Update:
    """The numbers of one parameter's step, those with a sign as int32.

    decay: what a weight is multiplied by before.    step_size: the learning rate over the first moment's bias.
    root_scale: what the second moment's root is multiplied by, for its bias.    first_element: the number of the first
    one here in the whole parameter.    keys: of the random bits.
    """

    decay: float
    first_share: float
    second_kept: float
    second_share: float
    step_size: float
    root_scale: float
    eps: float
    first_element: int
    keys: tuple[int, int]


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, as torch.optim.AdamW has it, on float32 or bfloat16 parameters.

    Moments have their parameter's dtype; every element is computed in float32 and rounded when it is written. float32
    parameters are not rounded. Parameters may be sharded by rows (DTensor). Raises ValueError for other parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.dtype not in STORAGE_DTYPES or not parameter.is_contiguous():
                raise ValueError(
                    f"expected contiguous parameters in bfloat16 or float32, found {parameter.dtype} with strides "
                    f"{parameter.stride()} for shape {tuple(parameter.shape)}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        owned = ((group, parameter) for group in self.param_groups for parameter in group["params"])
        for number, (group, parameter) in enumerate(owned):
            if parameter.grad is not None:
                self._step(parameter, group, number)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, object], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # a tensor, as in torch's: checkpoints hold tensors
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        update = make_update(
            group,
            step=int(state["step"].item()),
            first_element=first_element(parameter),
            keys=make_keys(self._seed, int(state["step"].item()), number),
        )
        own = [_own_row(tensor) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        if own[0].is_cuda:
            from alpaca.training import triton_adamw

            triton_adamw.update_parameter(*own, update)
        else:
            update_parameter(*own, update)


def make_update(group: dict[str, object], *, step: int, first_element: int, keys: tuple[int, int]) -> Update:
    """The numbers of a step, counted from 1, by a parameter group's settings."""
    learning_rate, (beta1, beta2) = float(group["lr"]), group["betas"]
    return Update(
        decay=1 - learning_rate * group["weight_decay"],
        first_share=1 - beta1,
        second_kept=beta2,
        second_share=1 - beta2,
        step_size=learning_rate / (1 - beta1**step),
        root_scale=1 / math.sqrt(1 - beta2**step),
        eps=group["eps"],
        first_element=_signed(first_element),
        keys=keys,
    )


def make_keys(seed: int, step: int, number: int) -> tuple[int, int]:
    """Two keys (int32) of the random bits of a parameter, known by its number, in a step."""
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def first_element(parameter: Tensor) -> int:
    """The number of a shard's first element in the whole parameter; FSDP2 gives rows in equal parts, the last less."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            own_rows = math.ceil(rows / mesh.size(dimension))
            return min(mesh.get_local_rank(dimension) * own_rows, rows) * math.prod(parameter.shape[1:])
    return 0


def _own_row(tensor: Tensor) -> Tensor:
    """All elements that this process has, as one row that shares their memory; a gradient may be a copy."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).view(-1)


# The update in torch --------------------------------------------------------------------------------------------


def update_parameter(weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, update: Update) -> None:
    """One step of AdamW on rows of equal length, in place: weights and both moments in bfloat16 or float32."""
    for start in range(0, len(weights), CHUNK_ELEMENTS):
        part = slice(start, start + CHUNK_ELEMENTS)
        _update_chunk(weights[part], gradient[part], first[part], second[part], update, start)


def _update_chunk(weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, update: Update, start: int) -> None:
    """Products and sums each in an operation of its own: fused ones round once, and the kernel's are not."""
    g, m, v = gradient.float(), first.float(), second.float()
    m = m + (g - m) * update.first_share
    v = v * update.second_kept + g * g * update.second_share
    change = m / (v.sqrt() * update.root_scale + update.eps) * update.step_size
    w = weights.float() * update.decay - change
    if weights.dtype == torch.float32:
        draws = (None, None, None)
    else:
        draws = draw_bits(len(w), start + update.first_element, update.keys, device=weights.device)
    for target, value, own in zip((weights, first, second), (w, m, v), draws, strict=True):
        target.copy_(value if own is None else round_stochastically(value, own))


def round_stochastically(values: Tensor, draws: Tensor) -> Tensor:
    """float32 `values` as bfloat16: one of the two neighbours, which of them `draws` (int32 from 0 to 65535) decide.

    What bfloat16 can hold stays what it is. Finite values stay finite, infinities and NaNs what they are.
    """
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    rounded = bits + draws.masked_fill(magnitude >= LAST_FINITE, 0)
    rounded = torch.where(magnitude > INFINITY, bits | QUIET, rounded)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)


def draw_bits(
    num_elements: int, first: int, keys: tuple[int, int], *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers from 0 to 65535 (int32) for each element counted from `first`: of weight and moments."""
    index = torch.arange(num_elements, dtype=torch.int32, device=device) + _signed(first)
    outer = _mix(index ^ keys[0])
    inner = _mix(outer ^ keys[1])
    return inner & 0xFFFF, (inner >> 16) & 0xFFFF, (outer >> 16) & 0xFFFF


def _mix(bits: Tensor) -> Tensor:
    """The hash, on int32 whose products wrap around and whose shifts drop the sign."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * FIRST_FACTOR
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * _signed(SECOND_FACTOR)
    return bits ^ ((bits >> 16) & 0xFFFF)


def _signed(number: int) -> int:
    """The int32 with the lowest 32 bits of `number`."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
