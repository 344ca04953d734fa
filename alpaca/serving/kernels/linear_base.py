"""What every linear layer of the engine is, and the plain one, which all others must equal.

Legend: N rows (packed tokens), I input width, O output width.
"""

from abc import ABC, abstractmethod

import torch


class Linear(ABC):
    """x [N, I] -> x W^T [N, O], plus `bias` [O] where there is one. `num_bytes` is what both occupy on their device."""

    in_features: int
    out_features: int
    num_bytes: int
    bias: torch.Tensor | None = None

    @property
    def product(self) -> "Linear":
        """The layer without its bias."""
        return self

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[N, I] -> [N, O], in the dtype of x."""


class PlainLinear(Linear):
    """The whole weight [O, I], multiplied by torch: every device and dtype, and the twin of the other kinds."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class Biased(Linear):
    """Another layer of any kind, whose outputs get a bias [O] added."""

    def __init__(self, product: Linear, bias: torch.Tensor) -> None:
        self._product, self.bias = product, bias
        self.in_features, self.out_features = product.in_features, product.out_features
        self.num_bytes = product.num_bytes + bias.nbytes

    @property
    def product(self) -> Linear:
        return self._product

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self._product, PlainLinear):  # added before the product is rounded
            return torch.nn.functional.linear(x, self._product.weight, self.bias)
        return self._product(x).add_(self.bias)


def products_agree(layer: Linear, twin: PlainLinear) -> bool:
    """Whether two layers agree on 3 random rows, up to rounding. Leaves the global random generator alone."""
    x = torch.randn(3, twin.in_features, generator=torch.Generator().manual_seed(0)).to(twin.weight.dtype)
    return is_close(layer(x), twin(x))


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two products differ by no more than the rounding of `found`'s dtype. False if one is not finite."""
    if found.shape != expected.shape:
        return False
    largest = expected.float().abs().amax().item()
    return bool((found.float() - expected.float()).abs().amax() <= 64 * torch.finfo(found.dtype).eps * largest)
