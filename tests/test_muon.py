"""Muon: Newton-Schulz on Gram matrices is PyTorch's, one matrix or many, one process or two; and its states are."""

import copy
from pathlib import Path

import pytest
import torch
from test_distributed import WORKERS, torchrun
from torch import nn
from workers import muon_step

from peagle_hf.training import newton_schulz
from peagle_hf.training.muon import Muon, shares, stacks, step_bytes
from peagle_hf.training.newton_schulz import STEPS, multiplications, orthogonalize, symmetric_product

SHAPES = [(32, 32), (24, 72), (72, 24), (40, 30)]


def random_stack(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_the_formula(matrix: torch.Tensor) -> torch.Tensor:
    """As `torch.optim.Muon` documents it, in float64."""
    wide = matrix / matrix.norm()
    for a, b, c in STEPS:
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("panels", [1, 3])
def test_the_gram_form_is_the_formula(shape, panels, monkeypatch):
    monkeypatch.setattr(newton_schulz, "MIN_PANEL", 8)
    stack = random_stack(3, *shape)
    expected = torch.stack([by_the_formula(one.T).T if shape[0] > shape[1] else by_the_formula(one) for one in stack])
    for restart in (0, newton_schulz.RESTART):
        found = orthogonalize(stack, torch.float64, restart=restart, panels=panels)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    single = torch.cat([orthogonalize(one[None], torch.float64, panels=panels) for one in stack])
    torch.testing.assert_close(found, single, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    """From 0.004 of the Frobenius norm on they become 0.68 to 1.21: what the polynomial gives, not U V^T itself."""
    left, values, right = torch.linalg.svd(random_stack(*shape), full_matrices=False)
    values = torch.logspace(0, -2, len(values), dtype=torch.float64)
    found = orthogonalize(((left * values) @ right)[None], torch.float64)[0]
    turned = left.T @ found @ right.T
    assert turned.diagonal().min() > 0.68
    assert turned.diagonal().max() < 1.21
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-10)
    assert (found - left @ right).norm() / len(values) ** 0.5 < 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_gradients_of_any_size_fit_the_dtype(dtype, size):
    stack = random_stack(2, 48, 96)
    found = orthogonalize((size * stack).bfloat16(), dtype)
    expected = orthogonalize(stack, torch.float64)
    assert found.dtype == dtype
    assert (found - expected).norm() / expected.norm() < 0.01
    nothing = orthogonalize(torch.zeros(1, 4, 8), dtype)
    assert torch.equal(nothing, torch.zeros(1, 4, 8, dtype=dtype))


def test_a_symmetric_product_is_whole_whatever_its_panels(monkeypatch):
    monkeypatch.setattr(newton_schulz, "MIN_PANEL", 4)
    left = random_stack(2, 21, 30)
    added = left @ left.mT
    for panels in (1, 2, 5):
        found = symmetric_product(left, left.mT, panels, alpha=0.5, added=added, beta=2.0)
        torch.testing.assert_close(found, 2.5 * added)


def parameters_and_gradients(shapes, seed=0):
    parameters = [nn.Parameter(random_stack(*shape, seed=number).float()) for number, shape in enumerate(shapes)]
    for number, parameter in enumerate(parameters):
        parameter.grad = random_stack(*parameter.shape, seed=seed + 100 + number).float()
    return parameters


def set_gradients(parameters, seed):
    for number, parameter in enumerate(parameters):
        parameter.grad = random_stack(*parameter.shape, seed=1000 * seed + number).float()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_is_pytorchs(momentum):
    """To what bfloat16 leaves of PyTorch's own, 3 % of the update."""
    ours = parameters_and_gradients([*SHAPES, (24, 72)])
    theirs, before = copy.deepcopy(ours), copy.deepcopy(ours)
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": momentum}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(3):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
    for one, other, old in zip(ours, theirs, before, strict=True):
        assert (one - other).norm() < 0.03 * (other - old).norm()
        buffers = [
            optimizer.state[each]["momentum_buffer"] for optimizer, each in zip(optimizers, (one, other), strict=True)
        ]
        assert torch.equal(*buffers)


def test_it_goes_on_from_a_state_of_pytorchs_muon_and_back():
    """Checkpoints of versions that had PyTorch's."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.8}
    theirs = parameters_and_gradients(SHAPES)
    their_optimizer = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    their_optimizer.step()
    ours = copy.deepcopy(theirs)
    optimizer = Muon(ours, lr=1.0)
    optimizer.load_state_dict(copy.deepcopy(their_optimizer.state_dict()))
    before = copy.deepcopy(ours)
    for parameters, each in ((ours, optimizer), (theirs, their_optimizer)):
        set_gradients(parameters, 1)
        each.step()
    for one, other, old in zip(ours, theirs, before, strict=True):
        assert (one - other).norm() < 0.03 * (other - old).norm()
    their_optimizer.load_state_dict(optimizer.state_dict())
    their_optimizer.step()


def test_parameters_without_a_gradient_are_left_alone():
    parameters = parameters_and_gradients(SHAPES)
    parameters[1].grad = None
    before = parameters[1].detach().clone()
    Muon(parameters, lr=0.1, weight_decay=0.5).step()
    assert torch.equal(parameters[1], before)


@pytest.fixture(scope="module")
def one_process() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    weights, gradients = muon_step.weights_and_gradients()
    parameters = [nn.Parameter(weight) for weight in weights]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.1)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    found = [parameter.detach() for parameter in parameters]
    return found, [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]


@pytest.mark.parametrize("kind", ["copies", "shards"])
def test_two_processes_share_the_work_of_one(kind, one_process, tmp_path: Path):
    torchrun([str(WORKERS / "muon_step.py")], kind, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for found in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(*found)
    for found, expected in zip(first[:2], one_process, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert first[2] + second[2] == len(muon_step.SHAPES) * muon_step.STEPS


def test_shares_are_even_and_whole():
    shapes = [(4096, 12288)] * 13 + [(4096, 8192)] + [(4096, 4096)] * 7 + [(1024, 4096)] * 6
    for size in (1, 2, 4, 8, 30):
        found = shares(shapes, size)
        assert sorted(number for share in found for number in share) == list(range(len(shapes)))
        work = [sum(multiplications(*shapes[number]) for number in share) for share in found]
        if size <= 4:
            assert max(work) < 1.1 * sum(work) / size
    assert step_bytes(shapes, 4) > step_bytes(shapes)


def test_a_stack_has_one_shape_and_a_limit(monkeypatch):
    monkeypatch.setattr("peagle_hf.training.muon.STACK_ELEMENTS", 10)
    assert stacks([0, 1, 2, 4], [(2, 2), (4, 4), (2, 2), (2, 2), (2, 2)]) == [[0, 2], [4], [1]]
