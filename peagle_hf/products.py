"""Matrix products of float32 tensors on a CPU, by oneDNN instead of MKL."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_MM, _ADDMM, _LINEAR = (getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "linear"))


def fast_products(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, float32 products on a CPU take half of MKL's time on AMD's processors, forward and backward.

    The operator is the one that PyTorch's compiler takes; both libraries round alike, but sum in another order. On
    other devices, and in a PyTorch without the operator, nothing changes.
    """
    is_of_use = device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return _OneDnnProducts() if is_of_use else nullcontext()


def pack_linear_layers(module: nn.Module) -> None:
    """Make a module's float32 linear layers on a CPU fast for good, where their weights don't change any more.

    They are put into the order in which oneDNN reads them, which `fast_products` does at each product, at the price of
    looking at each operator. A layer's usual weight is given up, so no memory is needed; who asks for `weight` gets a
    copy in the usual order. In a PyTorch without the operators, nothing changes.
    """
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and _is_suited(layer.weight, layer.bias):
                setattr(parent, name, _PackedLinear(layer))


class _PackedLinear(nn.Module):
    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("_packed", torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach(), False)

    @property
    def weight(self) -> Tensor:
        return self._packed.to_dense()  # type: ignore[operator]

    def forward(self, states: Tensor) -> Tensor:
        return _linear(states, self._packed, self.bias)  # type: ignore[arg-type]


class _OneDnnProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not types and not kwargs:
            if func is _MM and _is_suited(*args):
                return _linear(args[0], args[1].T)
            if func is _ADDMM and args[0].dim() == 1 and _is_suited(*args):
                return _linear(args[1], args[2].T, args[0])
            if func is _LINEAR and _is_suited(*args):  # whole in inference mode
                return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_suited(*tensors: Tensor | None) -> bool:
    return all(
        tensor is None or (tensor.dtype == torch.float32 and tensor.is_cpu and tensor.numel()) for tensor in tensors
    )


def _linear(states: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight_NK, bias_N, "none", [], "")
    return product
