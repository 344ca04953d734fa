"""PEFT's linear layer with an adapter that starts with a part of the base: see starts.py."""

from typing import Any

from peft.tuners.lora import Linear
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear


class StartedLinear(Linear):
    """W x + s B A x, as PEFT computes it, - s B0 A0 x.

    Dropout, before A alone, leaves the subtracted part as it is, which in PEFT is a part of the base's weight.
    """

    start_a: Parameter  # A0 [r, I]
    start_b: Parameter  # B0 [O, r]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = super().forward(x, *args, **kwargs)
        if self.disable_adapters or "default" not in self.active_adapters:
            return result
        x = self._cast_input_dtype(x, self.start_a.dtype)
        return result - (linear(linear(x, self.start_a), self.start_b) * self.scaling["default"]).to(result.dtype)
