"""The structures of the C++ kernels as Python fills them: the same fields in the same order as in the headers."""

import ctypes

import torch

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # of weights, as linear.h numbers them


def address(tensor: torch.Tensor | None) -> int | None:
    """A tensor's first element; None for none. Whoever uses it keeps the tensor."""
    return None if tensor is None else tensor.data_ptr()


class WeightFields(ctypes.Structure):
    """`Weight` of linear.h."""

    _fields_ = (
        ("kind", _INT), ("width", _INT), ("depth", _INT), ("packed", _POINTER), ("scales", _POINTER),
        ("bias", _POINTER),
    )  # fmt: skip


class ExpertsFields(ctypes.Structure):
    """`Experts` of experts.h."""

    _fields_ = (
        ("router", WeightFields), ("gate_up", ctypes.POINTER(WeightFields)), ("down", ctypes.POINTER(WeightFields)),
        ("number", _INT), ("per_row", _INT), ("normalizes", _INT),
    )  # fmt: skip


class HeadNormFields(ctypes.Structure):
    """`HeadNorm` of pointwise.h."""

    _fields_ = (("first", _INT), ("groups", _INT), ("width", _INT), ("weight", _POINTER))


class LayerFields(ctypes.Structure):
    """`Layer` of network.h."""

    _fields_ = (
        ("input_norm", _POINTER), ("ffn_norm", _POINTER), ("attention_post_norm", _POINTER),
        ("ffn_post_norm", _POINTER), ("qkv", WeightFields), ("attention_out", WeightFields), ("gate_up", WeightFields),
        ("down", WeightFields), ("experts", ExpertsFields), ("head_norms", HeadNormFields * 2),
        ("num_head_norms", _INT), ("rotary", _POINTER), ("turned", _INT), ("window", _INT),
    )  # fmt: skip


class ModelFields(ctypes.Structure):
    """`Model` of network.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerFields)), ("norm", _POINTER), ("num_layers", _INT), ("width", _INT),
        ("num_heads", _INT), ("num_kv_heads", _INT), ("head_width", _INT), ("activation", _INT), ("eps", _FLOAT),
        ("scale", _FLOAT), ("softcap", _FLOAT), ("residual_multiplier", _FLOAT),
    )  # fmt: skip


class StepFields(ctypes.Structure):
    """`Step` of network.h."""

    _fields_ = (
        ("stream", _POINTER), ("out", _POINTER), ("keys", _POINTER), ("values", _POINTER), ("positions", _POINTER),
        ("slots", _POINTER), ("tables", _POINTER), ("lengths", _POINTER), ("starts", _POINTER), ("num_rows", _INT),
        ("num_sequences", _INT), ("table_stride", _INT), ("room", _POINTER),
    )  # fmt: skip
