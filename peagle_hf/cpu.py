"""Speed on a CPU: matrix products of float32 tensors by oneDNN instead of MKL, and memory that stays allocated.

oneDNN takes half of MKL's time on AMD's processors, forward and backward. Both round alike, but sum in another
order. On other devices, in other dtypes, and in a PyTorch without oneDNN's operators, everything here is PyTorch's own.
"""

import ctypes
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HAS_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
_HAS_PACKING = _HAS_LINEAR and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def available_cores() -> int:
    """Number of cores that this process may use; on macOS and Windows all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: states [..., K], weight [N, K] and bias [N] give [..., N]."""
    if states.is_cpu and _is_suited(states, weight, bias) and not torch.is_autocast_enabled("cpu"):
        result: Tensor = _Linear.apply(states, weight, bias)
        return result
    return F.linear(states, weight, bias)


def use_onednn(module: nn.Module) -> None:
    """Replace a module's linear layers by `OneDnnLinear`; their parameters stay the same objects under the same names.

    Args:
        module: its descendants of the exact type `nn.Linear` are replaced, those of an adapter included.
    """
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and _HAS_LINEAR:
                setattr(parent, name, OneDnnLinear(layer))


def pack_linear_layers(module: nn.Module) -> None:
    """Reorder the weights of a module's float32 linear layers on a CPU once, if they don't change any more.

    The new order is that in which oneDNN reads them; `linear` would reorder them at each product. It replaces the
    usual weight, so no memory is needed; `weight` returns a copy in the usual order. Layers with a forward of their
    own, as some quantised ones have, stay as they are.
    """
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is not nn.Linear or "forward" in vars(layer):
                continue
            if _HAS_PACKING and _is_suited(layer.weight, layer.bias):
                setattr(parent, name, _PackedLinear(layer))


class OneDnnLinear(nn.Linear):
    """A linear layer that calls `linear`, with the parameters of another layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, states: Tensor) -> Tensor:
        return linear(states, self.weight, self.bias)


class _PackedLinear(nn.Module):
    """A linear layer whose weight is stored in the order in which oneDNN reads it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("_packed", torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach(), False)

    @property
    def weight(self) -> Tensor:
        return self._packed.to_dense()  # type: ignore[operator]

    def forward(self, states: Tensor) -> Tensor:
        return _product(states, self._packed, self.bias)


class _Linear(torch.autograd.Function):
    """Linear layer by oneDNN, forward and backward."""

    @staticmethod
    def forward(ctx, states, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(states, weight)
        return _product(states, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        states, weight = ctx.saved_tensors
        states_needed, weight_needed, bias_needed = ctx.needs_input_grad
        grad_RN, states_RK = grad.reshape(-1, grad.shape[-1]), states.reshape(-1, states.shape[-1])
        return (
            _product(grad_RN, weight.T).view(states.shape) if states_needed else None,
            _product(grad_RN.T, states_RK.T) if weight_needed else None,
            grad_RN.sum(0) if bias_needed else None,
        )


def _is_suited(*tensors: Tensor | None) -> bool:
    return _HAS_LINEAR and all(
        tensor is None or (tensor.dtype == torch.float32 and tensor.is_cpu and tensor.numel()) for tensor in tensors
    )


# PyTorch's compiler accepts oneDNN's operator only with constant weights. It calls an operator of our own as it is.
@torch.library.custom_op("peagle_hf::onednn_product", mutates_args=())
def _product(states: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    operator: Any = torch.ops.mkldnn._linear_pointwise
    product: Tensor = operator(states, weight_NK, bias_N, "none", [], "")
    return product


@_product.register_fake
def _(states: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return states.new_empty((*states.shape[:-1], weight_NK.shape[0]))


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed instead of giving it back to the kernel, which clears it each time.

    This is for large tensors on a CPU under Linux's glibc, where it makes a training step about 10 % faster. Elsewhere
    it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # the numbers of these parameters in malloc.h
        for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
            mallopt(parameter, value)
