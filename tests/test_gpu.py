"""On a GPU: FlexAttention against SDPA, and mixed precision against float32."""

import pytest
import torch
from test_modeling import make_batch, make_config, make_drafter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3}


def step(attention, autocast=False, window=None):
    layer = SIZES | ({"sliding_window": window, "layer_types": ["sliding_attention"] * 3} if window else {})
    config = make_config("llama", layer)
    drafter = make_drafter(config).cuda().train()
    drafter.set_attn_implementation(attention)
    assert drafter.config._attn_implementation == attention
    batch = {name: tensor.cuda() for name, tensor in make_batch(config, (90, 57, 33)).items()}
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        output = drafter(**batch)
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
