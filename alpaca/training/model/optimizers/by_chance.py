"""AdamW for weights and moments that may be bfloat16; each written value is rounded up or down by chance."""

import hashlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from alpaca.training.model.optimizers.rounding import Update, as_signed, update_parameter

STORAGE_DTYPES = (torch.bfloat16, torch.float32)


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
            state["step"] = torch.zeros(
                (), dtype=torch.float32
            )  # a tensor, as in torch's AdamW, since checkpoints hold tensors
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
            from alpaca.training.model.optimizers import triton_adamw

            triton_adamw.update_parameter(*own, update)
        else:
            update_parameter(*own, update)


def make_update(group: dict[str, object], *, step: int, first_element: int, keys: tuple[int, int]) -> Update:
    """The numbers of step `step` (counted from 1) for a parameter group."""
    learning_rate, (beta1, beta2) = float(group["lr"]), group["betas"]
    return Update(
        decay=1 - learning_rate * group["weight_decay"],
        first_share=1 - beta1,
        second_kept=beta2,
        second_share=1 - beta2,
        step_size=learning_rate / (1 - beta1**step),
        root_scale=1 / math.sqrt(1 - beta2**step),
        eps=group["eps"],
        first_element=as_signed(first_element),
        keys=keys,
    )


def make_keys(seed: int, step: int, number: int) -> tuple[int, int]:
    """Two int32 keys of the random bits that a parameter, known by its number, gets in a step."""
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def first_element(parameter: Tensor) -> int:
    """The index of a shard's first element in the whole parameter. FSDP2 cuts rows evenly; the last may be smaller."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            own_rows = math.ceil(rows / mesh.size(dimension))
            return min(mesh.get_local_rank(dimension) * own_rows, rows) * math.prod(parameter.shape[1:])
    return 0


def _own_row(tensor: Tensor) -> Tensor:
    """All elements that this process holds, as one row over the same memory (a gradient's row may be a copy)."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).view(-1)
