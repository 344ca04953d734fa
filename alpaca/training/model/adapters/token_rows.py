"""An embedding and a head of which some tokens' rows are trained; PEFT's layers, without the copies they make.

PEFT puts the rows into a copy of the whole matrix in each pass, and has a gradient of all its rows. Here only the
trained rows are looked up and multiplied apart: in an embedding always, in a head where it gives losses of packed rows.
"""

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor


class TokenTable(TrainableTokensLayer):
    """An embedding, whose results are those of PEFT bit for bit. The ids are in ascending order."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or "default" not in active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        output, rows = self.base_layer(x), self.trainable_tokens_delta["default"]
        ids = torch.tensor(self.token_indices["default"], device=x.device)
        places = torch.searchsorted(ids, x).clamp(max=len(ids) - 1)
        scale = self._get_embed_scale()
        own = torch.nn.functional.embedding(places, rows.to(output.dtype))
        own = own if scale is None else own * scale.to(own.dtype)
        return torch.where((ids[places] == x)[..., None], own, output)


class TokenHead(TrainableTokensLayer):
    """A TargetHead: losses where it has targets."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        head = self.base_layer
        if head.target_ids is None or self.disable_adapters or "default" not in active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        places = torch.tensor(self.token_indices["default"], device=x.device)
        return head.find_losses(x, self.trainable_tokens_delta["default"], places)
