"""Products by oneDNN are those of PyTorch's own library, forward and backward."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peagle_hf.products import fast_products, pack_linear_layers

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


@torch.inference_mode()
def test_packed_layers_give_the_same_and_are_not_held_twice() -> None:
    layers = nn.Sequential(nn.Linear(24, 40), nn.Sequential(nn.GELU(), nn.Linear(40, 8, bias=False)), nn.LayerNorm(8))
    other = nn.Sequential(nn.Linear(24, 40, dtype=torch.float64))
    states, weight = torch.randn(2, 9, 24), layers[0].weight.clone()
    wanted, given_up = layers(states), weakref.ref(layers[0].weight)
    pack_linear_layers(layers)
    pack_linear_layers(other)
    torch.testing.assert_close(layers(states), wanted, rtol=1e-5, atol=1e-5)
    assert layers(states[:, :0]).shape == (2, 0, 8)
    assert layers[0]._packed.is_mkldnn
    assert layers[1][1]._packed.is_mkldnn
    assert given_up() is None
    assert torch.equal(layers[0].weight, weight)
    assert type(other[0]) is nn.Linear
