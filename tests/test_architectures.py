"""Every kind of verifier: its cached states are its layers' outputs and give its own logits, and a drafter learns."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VISION, save_verifier
from safetensors.torch import load_file, save_file
from test_extract import LAYERS, VOCAB, own_states, save_prepared, tiny
from torch.nn.utils.rnn import pad_sequence

from peagle_hf import (
    CODDataCollator,
    ExtractArguments,
    HiddenStatesDataset,
    PeagleConfig,
    PeagleError,
    PeagleForSpeculation,
    VerifierHead,
    VerifierParts,
    extract,
    register_verifier,
)
from peagle_hf.data import extract_in_process
from peagle_hf.data.cache_storage import read_states
from peagle_hf.data.in_process_states import InProcessVerifier
from peagle_hf.training.objective import Objective
from peagle_hf.verifier import parts as target
from peagle_hf.verifier.loading import default_aux_layer_ids, load_verifier
from peagle_hf.verifier.parts import residual_streams

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 8}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
LONGCAT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "ffn_hidden_size": 24,
    "expert_ffn_hidden_size": 8,
    "moe_topk": 2,
    "zero_expert_num": 1,
}
MIXED_LAYERS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
ARCHITECTURES = {
    "llama": lambda: tiny("llama"),
    "llama-tied": lambda: tiny("llama", tie_word_embeddings=True),
    "llama4": lambda: tiny("llama4_text", intermediate_size_mlp=24, attention_chunk_size=8, **EXPERTS),
    "qwen2": lambda: tiny("qwen2", tie_word_embeddings=True),
    "qwen3": lambda: tiny("qwen3"),
    "qwen3-next": lambda: tiny("qwen3_next", shared_expert_intermediate_size=8, **EXPERTS, **LINEAR),
    "mistral": lambda: tiny("mistral", sliding_window=8),
    "gemma2": lambda: tiny("gemma2", final_logit_softcapping=2.0, sliding_window=8, layer_types=MIXED_LAYERS),
    "gemma3-text": lambda: tiny("gemma3_text", final_logit_softcapping=3.0, sliding_window=8, layer_types=MIXED_LAYERS),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=tiny("gemma3_text", sliding_window=8), vision_config=VISION, mm_tokens_per_image=1
    ),
    "gemma4-text": lambda: tiny("gemma4_text", final_logit_softcapping=3.0, sliding_window=8),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=tiny("mistral"), vision_config={"model_type": "pixtral", **VISION}, image_token_index=60
    ),
    "qwen3-vl": lambda: transformers.Qwen3VLConfig(
        text_config=tiny("qwen3_vl_text", rope_parameters={"rope_theta": 1e4, "mrope_section": [1, 1, 0]}).to_dict(),
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
    "phi": lambda: tiny("phi"),
    "phi3": lambda: tiny("phi3"),
    "phi3-partial-rotary": lambda: tiny("phi3", head_dim=8, partial_rotary_factor=0.5),
    "phi3-long": lambda: tiny(
        "phi3",
        partial_rotary_factor=0.5,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0],
            "long_factor": [2.0],
        },
    ),
    "gpt-oss": lambda: tiny("gpt_oss", sliding_window=8, layer_types=MIXED_LAYERS, **EXPERTS),
    "qwen3-moe": lambda: tiny("qwen3_moe", **EXPERTS),
    "mixtral": lambda: tiny("mixtral", **EXPERTS),
    "cohere": lambda: tiny("cohere", logit_scale=0.3),
    "granite": lambda: tiny("granite", logits_scaling=3.0),
    "minicpm3": lambda: tiny(
        "minicpm3",
        num_key_value_heads=4,
        dim_model_base=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
    ),
    "olmo2": lambda: tiny("olmo2"),
    "cohere2-moe": lambda: tiny("cohere2_moe", logit_scale=0.3, sliding_window=8, layer_types=MIXED_LAYERS, **EXPERTS),
    "gpt-neox": lambda: tiny("gpt_neox"),  # its head has another name in the file
    "nanochat": lambda: tiny("nanochat"),  # its final norm also norms the embeddings
    "lfm2": lambda: tiny("lfm2", layer_types=["conv", "full_attention"] * (LAYERS // 2), block_ff_dim=24),
    "nemotron-h": lambda: tiny(
        "nemotron_h",
        layers_block_type=["mamba", "attention", "moe", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=8,
        **EXPERTS,
    ),
}


def long_rope(border: int) -> transformers.PreTrainedConfig:
    """A Phi-3 whose texts of more than `border` tokens are rotated otherwise, from their first token on."""
    factors = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    rope = {"rope_type": "longrope", "rope_theta": 5e4, **factors}
    return tiny("phi3", original_max_position_embeddings=border, rope_parameters=rope)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_are_the_layers_outputs_and_give_the_verifiers_logits(
    name: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(extract_in_process, "pack_linear_layers", lambda module: None)
    close = partial(torch.testing.assert_close, **dict.fromkeys(("rtol", "atol"), 1e-4 if packed else 1e-5))
    folder = tmp_path / "verifier"
    model = save_verifier(folder, ARCHITECTURES[name]())
    rows = save_prepared(tmp_path / "data")
    arguments = {"model": str(folder), "preprocessed_data": str(tmp_path / "data")}
    report = extract(ExtractArguments(**arguments, dtype="float32", max_batch_tokens=64))
    head = VerifierHead.from_pretrained(folder)
    layer_ids = default_aux_layer_ids(LAYERS)
    assert report.manifest.aux_layer_ids == layer_ids
    # Batching makes no difference either, even where most of a row is padding.
    loaded = load_verifier(folder, torch.float32, "cpu")
    with torch.inference_mode():
        padded = residual_streams(loaded, layer_ids, pad_sequence(rows, batch_first=True), torch.float32)
    for row, token_ids in enumerate(rows):
        layers, logits = own_states(model, token_ids)
        cached = read_states(report.output, row)
        assert torch.equal(cached.token_ids, token_ids)
        wanted = torch.cat([layers[layer_id] for layer_id in layer_ids], dim=-1)
        close(cached.hidden_states, wanted)
        normed = head.normalize(cached.last_hidden_states)
        close(normed, layers[-1])
        close(head.logits(normed), logits)
        assert not torch.allclose(cached.last_hidden_states, layers[-1], atol=1e-2), "the last slot must not be normed"
        close(padded[row, : len(token_ids), :-1].flatten(1), wanted)
        close(padded[row, : len(token_ids), -1], cached.last_hidden_states)


def test_a_text_is_rotated_by_its_own_length_whatever_is_computed_beside_it(tmp_path: Path) -> None:
    folder, data = tmp_path / "verifier", tmp_path / "data"
    model = save_verifier(folder, long_rope(29))
    rows = save_prepared(data, (30, 29, 30, 28))
    report = extract(ExtractArguments(model=str(folder), preprocessed_data=str(data), dtype="float32"))
    online = InProcessVerifier(str(folder), default_aux_layer_ids(LAYERS), "cpu").states(rows, torch.float32)
    for row, token_ids in enumerate(rows):
        layers, _ = own_states(model, token_ids)
        wanted = torch.cat([layers[layer_id] for layer_id in default_aux_layer_ids(LAYERS)], dim=-1)
        torch.testing.assert_close(read_states(report.output, row).hidden_states, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(online[row][:, :-1].flatten(1), wanted, rtol=1e-4, atol=1e-4)
    config = PeagleConfig.from_verifier(str(folder), mask_token_id=VOCAB - 1)
    assert config.transformer_layer_config.rope_parameters == {"rope_type": "default", "rope_theta": 5e4}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            lambda: tiny(
                "gemma3n_text",
                layer_types=MIXED_LAYERS,
                num_kv_shared_layers=0,
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=4,
                intermediate_size=[24] * LAYERS,
                activation_sparsity_pattern=[0.0] * LAYERS,
                laurel_rank=4,
            ),
            r"read \(4, 1, 16, 16\), \(1, 16, 16\)",
        ),
        (lambda: tiny("longcat_flash", num_layers=LAYERS // 2, **LONGCAT), "but its 2 layers and the norm"),
    ],
    ids=["several streams", "layers of two"],
)
def test_layers_that_read_no_single_stream_are_refused(config: Any, found: str, tmp_path: Path) -> None:
    save_verifier(tmp_path / "verifier", config())
    save_prepared(tmp_path / "data")
    with pytest.raises(PeagleError, match=rf"can't be a verifier: .* its 4 layers .*{found}"):
        extract(ExtractArguments(model=str(tmp_path / "verifier"), preprocessed_data=str(tmp_path / "data")))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_drafter_of_the_verifiers_sizes_learns(name: str, tmp_path: Path) -> None:
    folder, data = tmp_path / "verifier", tmp_path / "data"
    save_verifier(folder, ARCHITECTURES[name]())
    save_prepared(data)
    extract(ExtractArguments(model=str(folder), preprocessed_data=str(data)))
    losses = two_losses(folder, data)
    assert 0 < losses[1] < losses[0] < float("inf")


def two_losses(folder: Path, data: Path) -> list[float]:
    """The loss of a new drafter before and after a small step on the same rows."""
    torch.manual_seed(0)
    config = PeagleConfig.from_verifier(str(folder), num_layers=1, num_depths=3, mask_token_id=VOCAB - 1)
    assert not {"partial_rotary_factor", "mrope_section"} & config.transformer_layer_config.rope_parameters.keys()
    drafter = PeagleForSpeculation(config)
    objective = Objective(drafter, drafter.load_verifier(str(folder)))
    batch = CODDataCollator.from_config(config)([HiddenStatesDataset(data, total_seq_len=128)[0]])
    optimizer = torch.optim.SGD([parameter for parameter in drafter.parameters() if parameter.requires_grad], lr=0.01)
    before = objective(drafter, batch).loss
    before.backward()
    torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
    optimizer.step()
    return [before.item(), objective(drafter, batch).loss.item()]


PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "verifiers.md"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_PARTS_OF", {})


@pytest.fixture
def gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the one in which the page's example runs."""
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2
    )
    save_verifier(Path("my-gpt2"), config)
    save_prepared(Path("out"))
    return Path("my-gpt2")


def test_the_example_of_an_adapter_runs(gpt2: Path, registry: None) -> None:
    declare, use = PYTHON.findall(PAGE.read_text())
    short = "num_layers=1, mask_token_id=60, num_train_epochs=1, use_cpu=True, bf16=False, report_to='none', "
    namespace: dict[str, Any] = {}
    exec(declare, namespace)
    exec(use.replace("TrainingArguments(", f"TrainingArguments({short}"), namespace)
    assert Path("out/checkpoints/checkpoint_best/model.safetensors").exists()


def test_an_adapter_is_as_exact_as_a_known_architecture(gpt2: Path, registry: None) -> None:
    """Also where the checkpoint leaves out the base model's prefix, as GPT-2's on the hub does, and its tied head."""
    exec(PYTHON.findall(PAGE.read_text())[0], {})
    report = extract(ExtractArguments(model=str(gpt2), preprocessed_data="out", dtype="float32"))
    model = load_verifier(gpt2, torch.float32, "cpu")
    tensors = load_file(gpt2 / "model.safetensors")
    for names in (tensors, {name.removeprefix("transformer."): tensor.clone() for name, tensor in tensors.items()}):
        save_file(names, gpt2 / "model.safetensors", metadata={"format": "pt"})
        head = VerifierHead.from_pretrained(gpt2)
        for row in range(2):
            cached = read_states(report.output, row)
            layers, logits = own_states(model, cached.token_ids)
            torch.testing.assert_close(cached.hidden_states, torch.cat(layers[1:4], dim=-1), rtol=1e-5, atol=1e-5)
            found = head.logits(head.normalize(cached.last_hidden_states))
            torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


def test_without_an_adapter_the_error_says_to_write_one(gpt2: Path, registry: None) -> None:
    with pytest.raises(PeagleError, match=r"GPT2LMHeadModel.*register_verifier\('gpt2', …\).*how-to/verifiers\.md"):
        extract(ExtractArguments(model=str(gpt2), preprocessed_data="out"))
    register_verifier("gpt2", lambda model: VerifierParts(model.model, model.h, model.norm, model.lm_head))
    with pytest.raises(PeagleError, match="has no attribute 'model'"):
        VerifierHead.from_pretrained(gpt2)


@pytest.mark.parametrize("wrong", [{"logit_scale": 0.5}, {"logit_softcap": 3.0}], ids=str)
def test_logits_that_do_not_follow_from_the_parts_stop_the_extraction(
    gpt2: Path, registry: None, wrong: dict[str, float]
) -> None:
    register_verifier(
        "gpt2",
        lambda model: VerifierParts(
            model.transformer, model.transformer.h, model.transformer.ln_f, model.lm_head, **wrong
        ),
    )
    with pytest.raises(PeagleError, match="The logits of GPT2LMHeadModel are not what"):
        extract(ExtractArguments(model=str(gpt2), preprocessed_data="out"))
    assert not list(Path("out/hidden_states").glob("*.safetensors"))


REMOTE_CODE = """
from transformers import GPT2Config, GPT2LMHeadModel


class OwnConfig(GPT2Config):
    model_type = "own-verifier"


class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_a_verifier_that_comes_with_code_needs_trust_and_the_same_adapter(
    gpt2: Path, registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (gpt2 / "own.py").write_text(REMOTE_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"model_type": "own-verifier", "auto_map": classes}))
    arguments = ExtractArguments(model=str(gpt2), preprocessed_data="out", dtype="float32")
    with pytest.raises(PeagleError, match="trust_remote_code"):
        extract(arguments)
    trusted = replace(arguments, trust_remote_code=True)
    with pytest.raises(PeagleError, match="register_verifier\\('own-verifier'"):
        extract(trusted)
    namespace: dict[str, Any] = {}
    exec(PYTHON.findall(PAGE.read_text())[0], namespace)
    register_verifier("own-verifier", namespace["gpt2_parts"])
    assert extract(trusted).num_rows == 6
    assert VerifierHead.from_pretrained(gpt2, trust_remote_code=True).weight.shape == (VOCAB, 16)
