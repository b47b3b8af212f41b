"""Products by oneDNN are those of PyTorch's own library, forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peagle_hf.products import fast_products

CPU = torch.device("cpu")


def outputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, rows, 24, generator=generator).to(dtype).requires_grad_()
    layers = [nn.Linear(24, 40, bias=bias, dtype=dtype) for bias in (True, False)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
    results = [layer(states) for layer in layers]
    wanted = [states, *(parameter for layer in layers for parameter in layer.parameters())]
    return [*results, *torch.autograd.grad(sum(result.square().sum() for result in results), wanted)]


@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_layers_and_their_gradients_are_the_same(rows: int, dtype: torch.dtype) -> None:
    plain = outputs(rows, dtype)
    with fast_products(CPU):
        fast = outputs(rows, dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)
    else:
        assert all(map(torch.equal, fast, plain))


def test_the_forward_and_the_backward_pass_both_use_the_operator() -> None:
    calls = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Spy(), fast_products(CPU):
        states, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
        F.linear(states, weight).sum().backward()
    assert calls.count(torch.ops.mkldnn._linear_pointwise.default) == 3
    assert torch.ops.aten.mm.default not in calls
    calls.clear()
    with torch.inference_mode(), Spy(), fast_products(CPU):
        nn.Linear(16, 4)(torch.randn(2, 8, 16))
    assert torch.ops.mkldnn._linear_pointwise.default in calls
    assert torch.ops.aten.linear.default not in calls
