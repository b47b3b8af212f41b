"""On a GPU: FlexAttention against SDPA, and mixed precision against float32."""

import time
from functools import partial

import pytest
import torch
from conftest import write_answers
from test_initialization import new_drafter, widen
from test_modeling import make_batch, make_config, make_pair
from test_trainer import losses as logged_losses
from test_trainer import run
from torch import nn
from torch.utils.checkpoint import checkpoint

from peagle_hf import HiddenStatesDataset, start_linearly
from peagle_hf.model import attention
from peagle_hf.model.drafter import PeagleLayer
from peagle_hf.training import losses
from peagle_hf.training.throughput import Throughput

FIND = attention.find_rectangles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3}


def step(attention, autocast=False, window=None, lengths=(90, 57, 33)):
    layer = SIZES | ({"sliding_window": window, "layer_types": ["sliding_attention"] * 3} if window else {})
    config = make_config("llama", layer)
    drafter, objective = make_pair(config)
    drafter.cuda().train()
    drafter.set_attn_implementation(attention)
    assert drafter.config._attn_implementation == attention
    batch = {
        name: value.cuda() if torch.is_tensor(value) else value for name, value in make_batch(config, lengths).items()
    }
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        output = objective(drafter, batch)
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in drafter.named_parameters() if parameter.grad is not None}
    return output, grads


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("window", [None, 20])
def test_flex_attention_gives_the_loss_and_gradients_of_sdpa(window):
    torch.backends.cuda.matmul.allow_tf32 = False
    (flex, flex_grads), (sdpa, sdpa_grads) = step("flex_attention", window=window), step("sdpa", window=window)
    assert flex.loss.item() == pytest.approx(sdpa.loss.item(), rel=1e-4)
    assert torch.equal(flex.counters, sdpa.counters)
    assert flex_grads.keys() == sdpa_grads.keys()
    assert max(relative(grad, sdpa_grads[name]) for name, grad in flex_grads.items()) < 5e-3


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_mixed_precision_stays_near_float32(attention):
    (mixed, mixed_grads), (full, full_grads) = step(attention, autocast=True), step("sdpa")
    assert mixed.loss.dtype == torch.float32
    assert mixed.loss.item() == pytest.approx(full.loss.item(), rel=2e-2)
    assert max(relative(grad, full_grads[name]) for name, grad in mixed_grads.items()) < 0.1


def test_batches_of_all_sizes_are_computed_by_the_same_kernels(monkeypatch):
    """Compiling again takes seconds, and under DDP all processes wait."""
    monkeypatch.setitem(SIZES, "hidden_size", 1024)
    num_tokens = make_config("llama", SIZES).draft_vocab_size
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cuda", 7 * num_tokens)  # the last chunk of a batch has 1 to 7 slots
    for lengths in ((300, 200), (150,)):
        step("flex_attention", lengths=lengths)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((90, 57, 33), (700,), (257, 129), (20,), (5,), (3000, 2900, 2800)):
            step("flex_attention", lengths=lengths)


def test_rectangles_stay_near_float32(monkeypatch):
    monkeypatch.setattr(attention, "STRIPE", 256)
    monkeypatch.setattr(attention, "KEY_UNIT", 128)
    monkeypatch.setitem(SIZES, "head_dim", 64)
    found = []
    monkeypatch.setattr(attention, "find_rectangles", lambda spans: found.append(FIND(spans)) or found[-1])
    lengths = (1500, 90)
    (mixed, mixed_grads), (full, full_grads) = (
        step("flex_attention", autocast=True, lengths=lengths),
        step("sdpa", lengths=lengths),
    )
    if torch.cuda.get_device_capability() >= (9, 0):
        assert sum(map(len, found)) > 6
    assert mixed.loss.item() == pytest.approx(full.loss.item(), rel=2e-2)
    assert max(relative(grad, full_grads[name]) for name, grad in mixed_grads.items()) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [100, 4096, 151936])
def test_row_statistics_are_logsumexp_and_argmax(dtype, size):
    from peagle_hf.model.kernels import row_statistics

    logits = torch.randn(33, size, device="cuda").mul_(5).to(dtype)
    logits[0, 7] = logits[0, 50] = 100  # equal maxima: the first counts
    norm, top = row_statistics(logits)
    torch.testing.assert_close(norm, logits.float().logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.gather(1, top[:, None])[:, 0], logits.amax(1))
    assert top[0] == 7


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_compiled_losses_equal_uncompiled_ones(name):
    from test_losses import inputs, plain

    student, head, teacher, _, target = inputs(torch.float32)
    student, head = (tensor.detach().cuda().requires_grad_() for tensor in (student, head))
    teacher_head = torch.randn(head.shape, device="cuda")
    rest = (teacher.cuda(), lambda states: states @ teacher_head.T, target.cuda())
    loss, _, _ = losses.distillation_loss(student, head, *rest, {name: 1.0})
    expected = plain(name, student, head, *rest)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads, expected_grads = (torch.autograd.grad(value, [student, head]) for value in (loss, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep_attention", [True, False])
def test_checkpointing_changes_nothing_on_the_fast_path(monkeypatch, keep_attention):
    monkeypatch.setattr(attention, "STRIPE", 256)
    monkeypatch.setattr(attention, "KEY_UNIT", 128)
    monkeypatch.setitem(SIZES, "head_dim", 64)
    (_, plain_grads) = step("flex_attention", autocast=True, lengths=(1500,))
    monkeypatch.setattr(PeagleLayer, "keep_attention", keep_attention)
    monkeypatch.setattr(PeagleLayer, "gradient_checkpointing", True)
    monkeypatch.setattr(
        PeagleLayer,
        "_gradient_checkpointing_func",
        staticmethod(partial(checkpoint, use_reentrant=False)),
        raising=False,
    )
    (_, grads) = step("flex_attention", autocast=True, lengths=(1500,))
    assert max(relative(grad, plain_grads[name]) for name, grad in grads.items()) < 0.02


def test_a_linear_start_on_the_gpu_is_that_of_the_cpu(tiny_verifier, tiny_data):
    dataset, starts = HiddenStatesDataset(tiny_data, total_seq_len=64), []
    for device in ("cpu", "cuda"):
        drafter = new_drafter(tiny_verifier).to(device)
        attention = drafter.layers[0].self_attn
        for projection in (attention.v_proj, attention.o_proj):
            nn.init.zeros_(projection.weight)  # the signs of the factors differ between libraries
        start_linearly(drafter, dataset)
        groups = attention.q_proj.out_features // attention.v_proj.out_features
        values = attention.v_proj.weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, dim=0)
        embedding = attention.o_proj.weight @ values.flatten(0, 1)
        starts.append((drafter.fc.weight.detach().cpu(), embedding.detach().cpu()))
    torch.testing.assert_close(*starts, rtol=1e-3, atol=1e-4)


def test_a_trainer_takes_flex_attention_and_learns(servable_verifier, tmp_path):
    flags = write_answers(tmp_path, servable_verifier, 24) | {"use_cpu": False, "bf16": True, "logging_steps": 1}
    trainer = run(flags, num_depths=3, num_train_epochs=2, eval_strategy="no")
    assert trainer.model.config._attn_implementation == "flex_attention"
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cuda"}
    first, *_, last = logged_losses(trainer)
    assert last < 0.5 * first


def test_loader_wait_is_that_of_the_gpu():
    """Loading in the shadow of a kernel is free, loading that the GPU has to wait for isn't."""
    device = torch.device("cuda", torch.cuda.current_device())
    square = torch.rand(8192, 8192, device=device)
    for kernels, low, high in ((100, 0.0, 0.2), (0, 0.8, 1.0)):
        (square @ square).sum().item()
        pace = Throughput(device)
        for _ in range(kernels):
            square @ square
        with pace.waiting():
            time.sleep(0.2 if kernels == 0 else 0.02)
        measured = pace.take(lambda row: row)
        assert low <= measured["loader_wait"] <= high
        assert measured["memory_gib"] >= 0.25


def test_what_is_measured_does_not_pile_up_and_takes_nothing_from_others():
    """Without any log; the peak that somebody else measures stays theirs."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(1 << 28, dtype=torch.uint8, device=device)
    peak = torch.cuda.max_memory_allocated(device)
    pace = Throughput(device)
    for _ in range(50):
        with pace.waiting():
            time.sleep(0.002)
        torch.cuda.synchronize()
    assert len(pace._waits) <= 2
    assert 0.05 <= pace.take(lambda row: row)["loader_wait"] <= 1
    assert torch.cuda.max_memory_allocated(device) >= peak


def test_a_linear_start_needs_little_more_than_its_matrix(tiny_verifier, tiny_data, monkeypatch):
    drafter, dataset = new_drafter(tiny_verifier), HiddenStatesDataset(tiny_data, total_seq_len=600)
    size, width = drafter.config.hidden_size, 8192
    drafter.fc = nn.Linear(width, size, bias=False)
    drafter.cuda()
    widen(monkeypatch, torch.randn(3 * size, width))
    torch.linalg.cholesky(torch.eye(64, dtype=torch.float64, device="cuda"))  # takes the libraries' memory
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start_linearly(drafter, dataset)
    matrix = 8 * (width + size) * (width + 2 * size)
    assert matrix < torch.cuda.max_memory_allocated() - before < 1.2 * matrix


@pytest.mark.parametrize("changes", [{"full_determinism": True}, {"fp16": True}, {"tf32": True}], ids=str)
def test_precision_and_determinism_are_those_that_are_asked_for(servable_verifier, tmp_path, changes):
    flags = write_answers(tmp_path, servable_verifier, 24) | {"use_cpu": False, "logging_steps": 1, "max_steps": 6}
    flags["bf16"] = None  # train chooses the precision
    trainer = run(flags, num_depths=3, eval_strategy="no", **changes)
    assert trainer.accelerator.mixed_precision == ("fp16" if "fp16" in changes else "bf16")
    assert all(loss == loss for loss in logged_losses(trainer))
    assert torch.are_deterministic_algorithms_enabled() is ("full_determinism" in changes)
    torch.use_deterministic_algorithms(False)
