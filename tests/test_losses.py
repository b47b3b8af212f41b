"""The chunked loss against the plain formula with whole logits."""

import pytest
import torch
from torch.nn import functional as F

from peagle_hf import losses

N, U, H, V = 37, 11, 8, 23


def inputs(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, head = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator)
    teacher, teacher_head = torch.randn(U, H, generator=generator), torch.randn(V, H, generator=generator)
    target = torch.randint(0, U, (N,), generator=generator).sort().values
    student, head = student.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return student, head, teacher.to(dtype), lambda states: F.linear(states, teacher_head.to(dtype)), target


def plain(student, head, teacher, teacher_logits, target):
    log_p = F.log_softmax(teacher_logits(teacher).float(), -1)[target]
    log_q = F.log_softmax(F.linear(student, head).float(), -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


@pytest.mark.parametrize("chunk_elements", [1, 5 * V, 1 << 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_equal_the_plain_formula(monkeypatch, chunk_elements, dtype, tolerance):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk_elements)
    student, head, *rest = inputs(dtype)
    expected = plain(student, head, *rest)
    expected_grads = torch.autograd.grad(expected * 0.3, [student, head])
    loss, student_top, teacher_top = losses.kl_divergence(student, head, *rest)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for grad, expected_grad in zip(torch.autograd.grad(loss * 0.3, [student, head]), expected_grads, strict=True):
        assert ((grad - expected_grad).float().norm() / expected_grad.float().norm()).item() < tolerance
    assert torch.equal(student_top, F.linear(student, head).argmax(-1))
    assert torch.equal(teacher_top, rest[1](rest[0]).argmax(-1))


def test_a_frozen_head_gets_no_gradient():
    student, head, *rest = inputs(torch.float32)
    head = head.detach()
    loss, _, _ = losses.kl_divergence(student, head, *rest)
    loss.backward()
    assert head.grad is None
    assert student.grad is not None


def test_without_gradients_nothing_is_formed():
    student, head, *rest = inputs(torch.float32)
    with torch.no_grad():
        loss, _, _ = losses.kl_divergence(student, head, *rest)
    torch.testing.assert_close(loss, plain(student, head, *rest).detach(), rtol=1e-5, atol=1e-5)
    assert not loss.requires_grad


def test_no_row_to_learn_gives_zero():
    student, head, teacher, teacher_logits, target = inputs(torch.float32)
    loss, _, _ = losses.kl_divergence(student[:0], head, teacher[:0], teacher_logits, target[:0])
    assert loss.item() == 0
