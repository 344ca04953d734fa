"""A head of which some tokens' rows are trained, on packed rows."""

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor


class TokenHead(TrainableTokensLayer):
    """PEFT's layer around a TargetHead: it gives losses where the head has targets.

    Only the trained rows are multiplied apart; PEFT makes a copy of the whole matrix, and a gradient of all its rows.
    """

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        head = self.base_layer
        if head.target_ids is None or self.disable_adapters or "default" not in active_adapters:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        places = torch.tensor(self.token_indices["default"], device=x.device)
        return head.find_losses(x, self.trainable_tokens_delta["default"], places)
