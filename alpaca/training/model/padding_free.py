"""Examples laid end to end in one row, without padding: attention that stays inside each, and a head on targets alone.

The recipe's batches stay as they are; only the padding goes. transformers' models allow it in two places: an attention
function that is registered by name, and `logits_to_keep` with the wanted positions.

Legend: N packed tokens, R target positions, H heads, K key/value heads, d head width, V vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from alpaca.data.batching import PackedBatch
from alpaca.training.model.head_loss import sum_target_losses
from alpaca.training.model.wide_products import multiply_wide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "alpaca_packed"
CHUNK_LOGITS = 32 << 20  # so many elements of logits exist at a time: 128 MB in float32
# Chunks of a frozen head are smaller, since no gradient of its weight is added up for each. They stay above 32 MiB in
# float32, because a CPU's heap keeps smaller blocks.
FROZEN_CHUNK_LOGITS = 9 << 20


class Packing:
    """Where packed examples begin and end, for all layers of a pass.

    It is an object because torch.compile guards every number of a list that it sees, and would compile each layer anew
    for each micro-batch. It does not look into this object.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        self._ends: Tensor | None = None

    def ends_on(self, device: torch.device) -> Tensor:
        """0 and the end of each example, int32 on the device. They are copied there once, not in every layer."""
        if self._ends is None or self._ends.device != device:
            self._ends = torch.tensor([0, *self.lengths]).cumsum(0).to(device=device, dtype=torch.int32)
        return self._ends


# Keys of configs by which a family changes attention's scores or the head's logits, and the value that changes nothing.
# Packed rows have another attention, and their head gives losses at once.
_CHANGES_SCORES = {
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1,
    "lm_head_multiplier": 1,
}  # fmt: skip


def enable(model: "PreTrainedModel") -> bool:
    """Let `sum_packed_losses` run on the model.

    False for one whose attention cannot be replaced (BLOOM), or that changes scores or logits on their way (Gemma 2).
    """
    head, config = model.get_output_embeddings(), model.config
    if not getattr(model, "_supports_attention_backend", False) or type(head) is not nn.Linear:
        return False
    if any(getattr(config, key, usual) not in (usual, None) for key, usual in _CHANGES_SCORES.items()):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend_within_examples)
    AttentionMaskInterface.register(ATTENTION, _no_mask)
    model.set_attn_implementation(ATTENTION)
    head.__class__ = TargetHead
    head.target_ids, head.smoothing, head.sums, head.is_wide = None, 0.0, False, False
    return True


def keep_out_of_graphs() -> None:
    """Keep the attention out of compiled layers: it depends on the lengths, which always differ."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, torch.compiler.disable(attend_within_examples))


def chunk_rows(vocab_size: int, *, trained: bool) -> int:
    """The number of positions whose logits exist at the same time."""
    return max(1, (CHUNK_LOGITS if trained else FROZEN_CHUNK_LOGITS) // vocab_size)


def widen_head(model: "PreTrainedModel") -> None:
    """Have the head multiply in float32: see `wide_products`."""
    for head in _target_heads(model):
        head.is_wide = True


def is_enabled(model: "PreTrainedModel") -> bool:
    return bool(_target_heads(model))


def _target_heads(model: "PreTrainedModel") -> "list[TargetHead]":
    """The head; both of them, where an adapter trains a copy of it."""
    head = model.get_output_embeddings()
    if isinstance(head, TargetHead):
        return [head]
    return [module for module in head.modules() if isinstance(module, TargetHead)] if head is not None else []


def sum_packed_losses(model: nn.Module, batch: PackedBatch, *, bf16: bool, smoothing: float = 0.0) -> Tensor:
    """The summed cross entropy (float32 scalar) of a batch's target tokens, differentiable once.

    smoothing: the share of each target's weight that is spread over the whole vocabulary.
    """
    return _head_losses(model, batch, bf16=bf16, smoothing=smoothing, sums=True).sum()


def packed_losses(model: nn.Module, batch: PackedBatch, *, bf16: bool) -> Tensor:
    """The cross entropies (float32 [R]) of a batch's target tokens, differentiable."""
    return _head_losses(model, batch, bf16=bf16, smoothing=0.0, sums=False)


def _head_losses(model: nn.Module, batch: PackedBatch, *, bf16: bool, smoothing: float, sums: bool) -> Tensor:
    heads = _target_heads(model)
    for head in heads:
        head.target_ids, head.smoothing, head.sums = batch.target_ids, smoothing, sums
    try:
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                logits_to_keep=batch.target_positions,
                use_cache=False,
                packing=Packing(batch.lengths),
            )
    finally:
        for head in heads:
            head.target_ids = None
    return outputs.logits.flatten()  # TargetHead gives losses in place of logits


class TargetHead(nn.Linear):
    """The output layer; where `target_ids` are set it gives their cross entropies instead of logits.

    Logits are computed a chunk of rows at a time, so they never all exist. Where only the losses' sum is wanted
    (`sums`) their gradient comes with them; else they are computed again for it. The layer is called and sharded like
    the one it replaces.

    is_wide: whether a bfloat16 head multiplies in float32.
    """

    target_ids: Tensor | None
    smoothing: float
    sums: bool
    is_wide: bool

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, R, D] -> [1, R, 1] losses in float32, or [1, 1, 1] their sum, or [..., V] logits."""
        if self.target_ids is None:
            return multiply_wide(hidden, self.weight, self.bias) if self.is_wide else super().forward(hidden)
        if not self.sums:
            return self.find_losses(hidden)
        rows, weight = (hidden[0].float(), self.weight.float()) if self.is_wide else (hidden[0], self.weight)
        return sum_target_losses(rows, weight, self.bias, self.target_ids, self.smoothing)[None, None, None]

    def find_losses(self, hidden: Tensor, trained: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """The losses [1, R, 1]. trained: rows [K, D] that stand in for those at `places` [K] of the weight."""
        num_rows = chunk_rows(self.out_features, trained=self.weight.requires_grad)
        own = (self.weight, self.bias, trained, places)
        multiply = multiply_wide if self.is_wide else linear
        losses = [
            checkpoint(_losses, multiply, rows, *own, ids, self.smoothing, use_reentrant=False)
            for rows, ids in zip(hidden[0].split(num_rows), self.target_ids.split(num_rows), strict=True)
        ]
        return torch.cat(losses)[None, :, None] if losses else hidden.new_zeros(1, 0, 1)


def _losses(
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trained: Tensor | None,
    places: Tensor | None,
    ids: Tensor,
    smoothing: float,
) -> Tensor:
    logits = multiply(hidden, weight, bias).float()
    if trained is not None:
        logits = logits.index_copy(-1, places, linear(hidden, trained).float())
    return cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing)


def attend_within_examples(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention of packed examples: query [1, H, N, d], key and value [1, K, N, d] -> [1, N, H, d].

    The signature is transformers' for attention functions. With a window a query sees so many keys, its own included.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotated queries and keys are float32
    if query.device.type == "cuda" and query.dtype != torch.float32 and not dropout:
        return _attend_on_gpu(query, key, value, packing, scaling, sliding_window), None
    dtype = value.dtype
    if dtype == torch.bfloat16 and not query.is_cuda and not torch.is_autocast_enabled(query.device.type):
        # On a CPU torch 2.13 keeps a bfloat16 kernel of 1.6 MB for every length it has seen, so compute in float32.
        query, key, value = query.float(), key.float(), value.float()
    parts = [tensor.split(packing.lengths, dim=2) for tensor in (query, key, value)]
    options = dict(scale=scaling, dropout_p=dropout, enable_gqa=query.shape[1] != key.shape[1])
    mixed = [
        scaled_dot_product_attention(*one, **_mask_of(length, sliding_window, query.device), **options)
        for length, one in zip(packing.lengths, zip(*parts, strict=True), strict=True)
    ]
    return torch.cat(mixed, dim=2).transpose(1, 2).to(dtype), None


def _mask_of(length: int, window: int | None, device: torch.device) -> dict[str, object]:
    """How torch's attention is told what an example's queries see."""
    if window is None or length <= window:
        return {"is_causal": True}
    return {"attn_mask": torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)}


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, window: int | None
) -> Tensor:
    """torch's variable-length flash attention. In torch 2.11 it has no grouped heads, and causal is a window."""
    from torch.nn.attention.varlen import varlen_attn

    group = query.shape[1] // key.shape[1]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if group > 1:
        k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
    ends, longest = packing.ends_on(q.device), packing.longest
    seen = (-1 if window is None else window - 1, 0)  # tokens before a query, and after it
    return varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=seen)[None]


def _no_mask(*args: object, **kwargs: object) -> None:
    """No mask is needed: the attention function knows the examples' lengths."""
