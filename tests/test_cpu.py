"""Products by oneDNN are those of PyTorch's own library, forward and backward."""

import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peagle_hf.cpu import linear, pack_linear_layers, use_onednn
from peagle_hf.model.compile import FOR_ALL_SIZES, fuse_on_gpu


def outputs(rows: int, dtype: torch.dtype, fast: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, rows, 24, generator=generator).to(dtype).requires_grad_()
    layers = nn.ModuleList(nn.Linear(24, 40, bias=bias, dtype=dtype) for bias in (True, False))
    for parameter in layers.parameters():
        nn.init.normal_(parameter, generator=generator)
    wanted = [states, *layers.parameters()]
    if fast:
        use_onednn(layers)
    results = [layer(states) for layer in layers]
    return [*results, *torch.autograd.grad(sum(result.square().sum() for result in results), wanted)]


@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_layers_and_their_gradients_are_the_same(rows: int, dtype: torch.dtype) -> None:
    plain, fast = outputs(rows, dtype, fast=False), outputs(rows, dtype, fast=True)
    if dtype == torch.float32:
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)
    else:
        assert all(map(torch.equal, fast, plain))


class Spy(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def test_layers_keep_their_parameters_and_use_the_operator_in_both_passes() -> None:
    layers = nn.Sequential(nn.Linear(16, 4), nn.Sequential(nn.Linear(4, 4, bias=False)), nn.LayerNorm(4)).eval()
    before = dict(layers.named_parameters())
    use_onednn(layers)
    after = dict(layers.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(module.training for module in layers.modules())
    with Spy() as spy:
        layers(torch.randn(2, 8, 16, requires_grad=True)).sum().backward()
    assert spy.calls[torch.ops.peagle_hf.onednn_product.default] == 6
    assert not spy.calls[torch.ops.aten.mm.default] + spy.calls[torch.ops.aten.addmm.default]


@pytest.mark.slow
def test_the_compiler_takes_the_layers_whole() -> None:
    layers = nn.Sequential(nn.Linear(16, 4), nn.GELU(), nn.Linear(4, 4, bias=False))
    use_onednn(layers)
    states = torch.randn(8, 16)
    layers(states).sum().backward()
    expected = [parameter.grad.clone() for parameter in layers.parameters()]
    layers.zero_grad()
    torch.compile(layers, fullgraph=True)(states).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in layers.parameters()], expected)


def test_autocast_decides_the_precision_where_it_is_on() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 8), torch.randn(4, 8)).dtype == torch.bfloat16


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


def test_a_function_for_a_gpu_is_compiled_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of 1, which the compiler takes for a constant, is left uncompiled."""
    real_compile, options_seen = torch.compile, []

    def compile_here(function, options):  # type: ignore[no-untyped-def]
        options_seen.append(options)
        return real_compile(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_here)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    squares = fuse_on_gpu(dynamic_dim=0)(lambda states, more: (states * more).sum(-1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (5, 300, 1, 2, 8192):
            states = torch.randn(size, 4)
            torch.testing.assert_close(squares(states, states), states.square().sum(-1))
    assert options_seen == [{FOR_ALL_SIZES: True}]
    assert FOR_ALL_SIZES in torch._inductor.list_options()
