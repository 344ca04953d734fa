"""bitsandbytes' AdamW with moments of 8 bits: a code of 256 values for each, a float32 scale for 256 of them."""

from collections.abc import Sequence
from typing import Any

from bitsandbytes.optim import AdamW

WHOLE = "whole_moments"  # groups that say so have float32 moments


class EightBitAdamW(AdamW):
    """The class that transformers' Trainer takes for `adamw_8bit`, with float32 moments for embeddings as there.

    The Trainer says that to a manager which all optimizers of a process share, by places in their lists of parameters;
    here a group says it. Tensors of fewer than 4,096 elements have float32 moments, too.
    """

    def __init__(self, groups: Sequence[dict[str, object]], *, is_paged: bool, **values: Any) -> None:
        super().__init__(groups, **values, optim_bits=8, is_paged=is_paged)

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config = super().get_config(gindex, pindex, group)
        return {**config, "optim_bits": 32 if group.get(WHOLE) else 8}  # whatever others told the manager

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state. Paged moments become paged again: bitsandbytes itself would put them into the GPU's memory."""
        super().load_state_dict(state_dict, move_to_device)
        for parameter, state in self.state.items() if self.is_paged else ():
            for name in ("state1", "state2"):
                buffer = self.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = buffer.copy_(state[name])
