"""The drafter: parity with speculators 0.9.0, a checkpoint's exact contents, Auto classes, equal forms of a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, DynamicCache

from peagle_hf import CODDataCollator, PeagleConfig, PeagleError, PeagleForSpeculation, VerifierHead
from peagle_hf.model import layers
from peagle_hf.model.served_checkpoint import check_checkpoint
from peagle_hf.training import losses
from peagle_hf.training.objective import Objective

FEED_FORWARD = layers.PeagleLayer.feed_forward
FIXTURE = Path(__file__).parent / "fixtures" / "speculators_0.9.0_peagle"
LAYER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def make_config(model_type="llama", layer=(), **fields):
    return PeagleConfig(
        **{
            "transformer_layer_config": {"model_type": model_type, **LAYER, **dict(layer)},
            "speculators_config": {"verifier": {"name_or_path": "org/verifier", "architectures": ["LlamaForCausalLM"]}},
            "draft_vocab_size": 40,
            "mask_token_id": 3,
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
            "num_depths": 3,
            **fields,
        }
    )


def make_pair(config, seed=0, **options):
    """A drafter and its objective, with a verifier's head of random numbers."""
    torch.manual_seed(seed)
    drafter = PeagleForSpeculation(config)
    head = VerifierHead(nn.RMSNorm(config.hidden_size, eps=1e-6), torch.randn(config.vocab_size, config.hidden_size))
    drafter.set_trained(False, torch.float32)
    return drafter, Objective(drafter, head, **options)


def make_drafter(config, seed=0):
    return make_pair(config, seed)[0]


def make_batch(config, lengths=(17, 23), seed=0):
    documents = make_documents(config, lengths, seed)
    return CODDataCollator.from_config(config)([{"epoch": 0, "documents": documents}])


def test_loss_and_gradients_equal_those_of_speculators():
    """Given speculators' rows, its loss (whose denominator has 1e-5 added) and every gradient, to 1e-5 relative."""
    drafter = PeagleForSpeculation.from_pretrained(FIXTURE).train()
    verifier, batch, grads = (load_file(FIXTURE / f"{name}.safetensors") for name in ("verifier", "batch", "grads"))
    norm = nn.RMSNorm(64, eps=1e-5)
    norm.weight.data = verifier["verifier_norm.weight"]
    drafter.set_trained(False, torch.float32)
    objective = Objective(drafter, VerifierHead(norm, verifier["verifier_lm_head.weight"]))

    length = batch["input_ids"].shape[1]
    anchors, depths = batch["anchor_pos"], batch["depth"]
    order = torch.cat([torch.arange(length), length + (anchors * 10 + depths)[length:].argsort()])
    anchors, depths = anchors[order], depths[order]
    targets = anchors + depths
    learnt = batch["loss_mask"][0, targets] == 1
    trained_slots = learnt.nonzero().flatten()
    trained_slots = trained_slots[targets[trained_slots].argsort(stable=True)]
    positions, index = targets[trained_slots].unique(return_inverse=True)
    inputs = {
        "input_ids": batch["input_ids"],
        "hidden_states": batch["hidden_states"],
        "anchors": anchors[None],
        "depths": depths[None],
        "document_ids": batch["document_ids"],
        "position_ids": targets[None],
        "labels": torch.where(learnt, 0, -100)[None],
        "trained_slots": trained_slots[None],
        "target_states": batch["verifier_last_hidden_states"][:, positions],
        "target_index": index[None],
    }
    output = objective(drafter, inputs, num_items_in_batch=trained_slots.numel() + 1e-5)
    expected = json.loads((FIXTURE / "expected.json").read_text())
    assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    learnt_by_depth = [expected["metrics"][f"position_{depth}_acc_total"] for depth in range(4)]
    assert output.counters[0, :4].tolist() == learnt_by_depth
    output.loss.backward()
    trained = {name: parameter.grad for name, parameter in drafter.named_parameters() if parameter.grad is not None}
    assert trained.keys() == grads.keys()
    for name, grad in grads.items():
        assert ((trained[name] - grad).norm() / grad.norm()).item() < 1e-5, name


def test_speculators_checkpoint_loads_by_auto_class_and_saves_the_same_tensors(tmp_path):
    (tmp_path / "in").mkdir()
    config = json.loads((FIXTURE / "config.json").read_text())
    assert "model_type" not in config
    drafter = PeagleForSpeculation.from_pretrained(FIXTURE)
    drafter.save_pretrained(tmp_path / "out")
    saved, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(FIXTURE / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(("draft_vocab_size", "fc_norm"), [(40, False), (96, True)])
def test_save_then_auto_load_gives_equal_outputs(tmp_path, model_type, draft_vocab_size, fc_norm):
    layer = {"fc_norm": True} if fc_norm else {}
    config = make_config(model_type, layer, draft_vocab_size=draft_vocab_size, norm_before_residual=False)
    drafter = make_drafter(config).eval()
    for norm in drafter.fc_norm.parameters():
        nn.init.normal_(norm, 1.0)
    drafter.save_pretrained(tmp_path)
    check_checkpoint(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["transformer_layer_config"].get("fc_norm", False) is fc_norm
    assert {f"fc_norm.{state}.weight" for state in range(3) if fc_norm} == {
        name for name in load_file(tmp_path / "model.safetensors") if name.startswith("fc_norm")
    }
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, PeagleForSpeculation)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PeagleConfig)
    batch = make_batch(config)
    for name in ("labels", "trained_slots", "target_states", "target_index"):
        del batch[name]
    assert torch.equal(drafter(**batch).logits, loaded.eval()(**batch).logits)


def test_norms_of_single_states_are_those_of_a_plain_computation():
    """A drafter without norms that is given normed states does the same, in a step and in decoding."""
    config = make_config(layer={"fc_norm": True})
    drafter, plain = make_drafter(config).eval(), make_drafter(make_config()).eval()
    weights = torch.randn(3, config.hidden_size)
    for norm, weight in zip(drafter.fc_norm, weights, strict=True):
        norm.weight.data = weight

    def normed(states):
        parts = states.unflatten(-1, (3, config.hidden_size))
        eps = config.transformer_layer_config.rms_norm_eps
        return (parts / (parts.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights).flatten(-2)

    plain.load_state_dict(
        {name: tensor for name, tensor in drafter.state_dict().items() if not name.startswith("fc_norm")}
    )
    plain.mask_hidden.data = normed(drafter.mask_hidden.data)
    batch = make_batch(config)
    for name in ("labels", "trained_slots", "target_states", "target_index"):
        del batch[name]
    expected = plain(**{**batch, "hidden_states": normed(batch["hidden_states"])}).logits
    torch.testing.assert_close(drafter(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    tokens, states = batch["input_ids"][:, :9], batch["hidden_states"][:, :9]
    mask = torch.ones_like(tokens).bool()
    expected = plain.draft(tokens, normed(states), mask, 3, DynamicCache())
    torch.testing.assert_close(drafter.draft(tokens, states, mask, 3, DynamicCache()), expected, rtol=1e-4, atol=1e-5)


def layer_names(index, qwen3):
    names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    names += ["input_layernorm", "post_attention_layernorm"] + ["hidden_norm"] * (index == 0)
    names += ["self_attn.q_norm", "self_attn.k_norm"] * qwen3
    return {f"layers.{index}.{name}.weight" for name in names}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_checkpoint_has_exactly_the_golden_tensors_and_fields(tmp_path, model_type):
    drafter = make_drafter(make_config(model_type))
    drafter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    golden = {"embed_tokens.weight", "fc.weight", "norm.weight", "lm_head.weight", "mask_hidden", "d2t", "t2d"}
    golden |= layer_names(0, model_type == "qwen3") | layer_names(1, model_type == "qwen3")
    assert tensors.keys() == golden
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["layers.1.self_attn.q_proj.weight"].shape == (32, 32)
    assert tensors["fc.weight"].shape == (32, 96)
    assert tensors["mask_hidden"].shape == (1, 1, 96)
    assert tensors["lm_head.weight"].shape == (40, 32)
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert tensors["t2d"].sum() == 40
    config = json.loads((tmp_path / "config.json").read_text())
    golden_fields = {
        "architectures": ["PeagleForSpeculation"],
        "model_type": "speculators",
        "speculators_model_type": "peagle",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "peagle",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": "org/verifier", "architectures": ["LlamaForCausalLM"]},
        },
        "draft_vocab_size": 40,
        "mask_token_id": 3,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "norm_before_residual": True,
        "norm_before_fc": False,
        "embed_requires_grad": True,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "num_depths": 3,
        "down_sample_ratio": 0.7,
        "down_sample_ratio_min": 0.2,
        "max_anchors": None,
    }
    assert {name: config[name] for name in golden_fields} == golden_fields
    assert config.keys() - golden_fields.keys() == {"transformer_layer_config", "transformers_version", "dtype"}
    assert config["transformer_layer_config"]["model_type"] == model_type


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 5])
def test_one_packed_step_equals_documents_one_by_one(model_type, num_layers, window):
    layer = {"num_hidden_layers": num_layers}
    if window:
        layer |= {
            "sliding_window": window,
            "layer_types": ["sliding_attention"] * num_layers,
            "use_sliding_window": True,
        }
    config = make_config(model_type, layer)
    drafter, objective = make_pair(config)
    packed = objective(drafter, make_batch(config, (17, 23)))
    rows, loss = 0, 0.0
    counters = torch.zeros_like(packed.counters)
    for index in (0, 1):
        drafter, objective = make_pair(config)
        documents = make_documents(config, (17, 23))
        batch = CODDataCollator.from_config(config)([{"epoch": 0, "documents": [documents[index]]}])
        output = objective(drafter, batch)
        rows += batch["trained_slots"].numel()
        loss += output.loss.item() * batch["trained_slots"].numel()
        counters += output.counters
    assert packed.loss.item() == pytest.approx(loss / rows, rel=1e-5)
    assert torch.equal(packed.counters, counters)


def make_documents(config, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "sample_id": index,
            "input_ids": torch.randint(0, config.vocab_size, (length,), generator=generator),
            "loss_mask": torch.arange(length) > length // 3,
            "hidden_states": torch.randn(length, 3 * config.hidden_size, generator=generator),
            "target_states": torch.randn(length - length // 3 - 2, config.hidden_size, generator=generator),
        }
        for index, length in enumerate(lengths)
    ]


def test_evaluation_counts_a_target_outside_the_draft_vocabulary_as_rejected():
    config = make_config(draft_vocab_size=40)
    drafter, objective = make_pair(config)
    head = objective.verifier_head
    head.weight[:40] *= 1e-3  # all of the verifier's own choices now lie outside the 40 drafted tokens
    objective, batch = Objective(drafter, head), make_batch(config)
    modes = (nn.Module.train, nn.Module.eval)
    correct = [objective(mode(drafter), batch).counters[1].sum().item() for mode in modes]
    assert correct[1] == 0


@pytest.mark.parametrize("keep_attention", [True, False])
def test_activation_checkpointing_changes_no_gradient(monkeypatch, keep_attention):
    monkeypatch.setattr(layers, "RECOMPUTED_SLOTS", 16)
    config = make_config()
    batch = make_batch(config)
    grads, calls = [], []
    for checkpointing in (False, True):
        drafter, objective = make_pair(config)
        drafter.train()
        for layer in drafter.layers:
            layer.keep_attention = keep_attention
        if checkpointing:
            # transformers 5.23 renamed the method.
            enable = getattr(drafter, "activation_checkpointing_enable", None) or drafter.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        counted = [0]
        monkeypatch.setattr(
            layers.PeagleLayer,
            "feed_forward",
            lambda *args, count=counted: (count.__setitem__(0, count[0] + 1), FEED_FORWARD(*args))[1],
        )
        objective(drafter, batch).loss.backward()
        grads.append({name: p.grad for name, p in drafter.named_parameters() if p.grad is not None})
        calls.append(counted[0])
    assert calls[1] > calls[0]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_what_is_frozen_has_the_verifiers_dtype_and_is_one_tensor_with_its_head():
    config = make_config(embed_requires_grad=False)
    drafter, objective = make_pair(config)
    head = objective.verifier_head.to(torch.bfloat16)
    with torch.no_grad():
        drafter.lm_head.weight.copy_(head.weight[drafter.draft_token_ids])
    drafter.set_trained(False, torch.bfloat16)
    objective = Objective(drafter, head)
    assert drafter.lm_head.weight.dtype == drafter.embed_tokens.weight.dtype == torch.bfloat16
    objective(drafter, make_batch(config))
    assert objective.draft_head.weight.data_ptr() == drafter.lm_head.weight.data_ptr()

    drafter.set_trained(True, torch.bfloat16)
    objective = Objective(drafter, head)
    objective(drafter, make_batch(config)).loss.backward()
    assert drafter.lm_head.weight.grad.norm() > 0
    assert objective.draft_head.weight.data_ptr() != drafter.lm_head.weight.data_ptr()


def test_another_loss_is_another_number():
    config = make_config()
    batch, values = make_batch(config), set()
    for name in losses.DIVERGENCES:
        drafter, objective = make_pair(config, loss_fn=name)
        values.add(objective(drafter, batch).loss.item())
    assert len(values) == len(losses.DIVERGENCES)


def test_verifier_never_enters_state_dict_or_parameters():
    drafter, objective = make_pair(make_config())
    objective(drafter, make_batch(drafter.config))
    names = [*drafter.state_dict(), *(name for name, _ in drafter.named_parameters())]
    assert not [name for name in names if "verifier" in name or "draft_head" in name]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"speculators_model_type": "eagle3"}, "eagle3"),
        ({"mask_token_id": 96}, "mask_token_id 96"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"draft_vocab_size": 97}, "draft_vocab_size 97"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}, "[1, 1, 2]"),
        ({"fc_norm": True}, "fc_norm belongs into transformer_layer_config"),
        ({"layer": {"fc_norm": True}, "norm_before_fc": True}, "norm_before_fc and fc_norm"),
        ({"norm_output": True}, "norm_output"),
        ({"target_hidden_size": 64}, "target_hidden_size 64"),
        ({"num_depths": 0}, "num_depths 0"),
        ({"down_sample_ratio": 1.5}, "down_sample_ratio 1.5"),
        ({"model_type": "gpt2"}, "gpt2"),
        (
            {"layer": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}},
            "partial_rotary_factor 0.5",
        ),
    ],
)
def test_a_configuration_that_can_not_be_is_refused_by_name(fields, named):
    with pytest.raises(PeagleError, match=named.replace("[", r"\[")):
        make_config(fields.pop("model_type", "llama"), **fields)


def test_another_verifiers_head_is_refused():
    drafter = make_drafter(make_config())
    with pytest.raises(PeagleError, match=r"\(50, 32\).*\(96, 32\)"):
        Objective(drafter, VerifierHead(nn.RMSNorm(32), torch.randn(50, 32)))


def test_the_vocabulary_stays_the_verifiers():
    drafter = make_drafter(make_config())
    size = drafter.config.vocab_size
    assert drafter.resize_token_embeddings(size) is drafter.embed_tokens
    for changes in ({"new_num_tokens": size + 8}, {"pad_to_multiple_of": 64}):
        with pytest.raises(PeagleError, match=f"vocabulary of its verifier, {size} tokens"):
            drafter.resize_token_embeddings(**changes)
    assert drafter.embed_tokens.num_embeddings == size


def test_the_folder_of_another_model_is_named_as_such(tiny_verifier):
    with pytest.raises(PeagleError, match="of a llama model, not of a drafter"):
        PeagleForSpeculation.from_pretrained(tiny_verifier)


def test_import_is_light():
    code = (
        "import sys, peagle_hf; heavy = {'vllm', 'openai', 'datasets', 'peft', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_configuration_needs_no_arguments_and_only_a_saved_one_must_be_complete(tmp_path):
    config = PeagleConfig()
    assert (config.num_depths, config.verifier_name_or_path) == (8, None)
    with torch.device("meta"):
        assert len(PeagleForSpeculation(config).layers) == 4
    config.num_depths = 5  # the proposal is written as it is when the configuration is saved
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert not config.differences(AutoConfig.from_pretrained(tmp_path))
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(PeagleError, match=r"speculators_config\.verifier\.name_or_path is missing"):
        check_checkpoint(tmp_path)
    del fields["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(PeagleError, match=r"config\.json lacks mask_token_id"):
        PeagleConfig.from_pretrained(tmp_path)
