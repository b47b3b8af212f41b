"""LoRA on a trained drafter: train, save with `mask_hidden`, load, merge, export."""

import copy
import os
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from test_modeling import make_batch, make_config, make_drafter, make_pair
from test_trainer import StopAt, losses, run
from transformers import LlamaForCausalLM

from peagle_hf import (
    PeagleConfig,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainer,
    PeagleTrainingArguments,
    build_datasets,
    build_drafter,
)
from peagle_hf.training.adapters import MASK_HIDDEN, add_adapter, load_adapter, merge_adapter, save_adapter


@pytest.fixture
def trained(train_flags):
    """A drafter to adapt, and the flags that adapt it."""
    run(train_flags, num_train_epochs=1, export_dtype="float32")
    base = Path(train_flags["output_dir"]) / "0"
    changes = {"from_pretrained": str(base), "output_dir": train_flags["output_dir"] + "_lora", "lora_r": 4}
    return base, {**train_flags, **changes}


def test_an_adapter_learns_saves_and_exports(trained):
    base, adapter_flags = trained
    trainer = run(
        {**adapter_flags, "export_dtype": "float32"},
        num_train_epochs=8,
        learning_rate=5e-3,
        lora_modules_to_save=["norm"],
    )
    found = losses(trainer)
    assert sum(found[-5:]) < 0.95 * sum(found[:5])
    trained_names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert MASK_HIDDEN in trained_names
    assert all("lora_" in name or "modules_to_save" in name or name == MASK_HIDDEN for name in trained_names)
    folder = Path(adapter_flags["output_dir"]) / "7"
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert sorted(os.listdir(folder / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    for name in ("mask_hidden", "norm.weight", "fc.weight", "layers.1.mlp.up_proj.weight"):
        assert not torch.equal(before[name], after[name]), name
    for name in ("embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
    plain = PeagleForSpeculation(PeagleConfig.from_pretrained(base))
    plain.load_state_dict(before)
    merged = merge_adapter(load_adapter(plain, folder / "adapter")).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in after.items())
    restored = PeagleForSpeculation(PeagleConfig.from_pretrained(base))
    restored.load_state_dict(before)
    PeftModel.from_pretrained(restored, str(folder / "adapter"))
    assert torch.equal(restored.mask_hidden, after["mask_hidden"])


def test_an_adapter_of_peft_alone_is_saved_with_mask_hidden(trained, tmp_path):
    """A `PeftModel` that the user has made, without `add_adapter`."""
    _, adapter_flags = trained
    trainer = run(adapter_flags, max_steps=1)
    drafter = trainer.model.merge_and_unload()
    plain = get_peft_model(drafter, LoraConfig(r=2, target_modules=["o_proj"]))
    other = PeagleTrainer(plain, trainer.args, train_dataset=trainer.train_dataset, eval_dataset=trainer.eval_dataset)
    other.save_model(str(tmp_path))
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")[MASK_HIDDEN], drafter.mask_hidden)


def test_resuming_an_adapter_is_bit_equal(trained, tmp_path):
    _, adapter_flags = trained
    whole = run(adapter_flags)
    half = {**adapter_flags, "output_dir": str(tmp_path / "half")}
    with pytest.raises(KeyboardInterrupt):
        run(half, [StopAt(7)], save_strategy="steps", save_steps=4)
    resumed = run(half, save_strategy="steps", save_steps=4, resume=str(tmp_path / "half" / "0"))
    assert losses(resumed) == losses(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in resumed.model.state_dict().items())


def test_an_adapter_of_another_drafter_is_refused(trained, tmp_path):
    base, _ = trained
    config = PeagleConfig.from_pretrained(base)
    save_adapter(add_adapter(PeagleForSpeculation(config), LoraConfig(target_modules="all-linear")), tmp_path / "a")
    load_adapter(PeagleForSpeculation(config), tmp_path / "a")
    fields = config.to_dict()
    for changes in ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, {"intermediate_size": 48}):
        other = PeagleConfig.from_dict(
            {**fields, "transformer_layer_config": {**fields["transformer_layer_config"], **changes}}
        )
        with pytest.raises(PeagleError, match=f"{tmp_path / 'a'} is not one for this drafter"):
            load_adapter(PeagleForSpeculation(other), tmp_path / "a")
    with pytest.raises(PeagleError, match=r"adapter_model\.safetensors"):
        load_adapter(PeagleForSpeculation(config), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "lm_head"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]}),
        LoHaConfig(target_modules=["q_proj", "lm_head"]),
    ],
)
def test_an_adapter_on_the_output_of_the_head_is_refused_with_what_to_do(config):
    with pytest.raises(PeagleError, match=r"lm_head.*modules_to_save"):
        add_adapter(make_drafter(make_config()), config)


def test_an_adapter_of_peft_alone_on_the_head_is_refused_by_the_trainer(train_flags):
    drafter = build_drafter(PeagleTrainingArguments(**train_flags))
    with pytest.raises(PeagleError, match=r"lm_head.*modules_to_save"):
        PeagleTrainer(
            get_peft_model(drafter, LoraConfig(target_modules=["lm_head"])),
            PeagleTrainingArguments(**train_flags, eval_strategy="no", metric_for_best_model=None),
        )


def test_adapters_that_could_not_be_trained_saved_or_merged_are_refused(train_flags, tmp_path):
    config = {"r": 2, "target_modules": ["q_proj"]}
    with pytest.raises(PeagleError, match="task_type 'CAUSAL_LM'"):
        add_adapter(make_drafter(make_config()), LoraConfig(**config, task_type="CAUSAL_LM"))
    with pytest.raises(PeagleError, match="AdaLoRA"):
        add_adapter(make_drafter(make_config()), AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    args = PeagleTrainingArguments(**train_flags, eval_strategy="no", metric_for_best_model=None)
    inserted = build_drafter(args)
    # As the drafter's own add_adapter does, which in transformers 5.24 wants a newer PEFT than the one of the tests.
    inject_adapter_in_model(LoraConfig(**config), inserted)
    inserted._hf_peft_config_loaded = True
    named = get_peft_model(build_drafter(args), LoraConfig(**config), adapter_name="code")
    task = get_peft_model(build_drafter(args), LoraConfig(**config, task_type="FEATURE_EXTRACTION"))
    for model, words in ((inserted, "add_adapter"), (named, "the adapters code, "), (task, "Leave task_type out")):
        with pytest.raises(PeagleError, match=words):
            PeagleTrainer(model, args)
    with pytest.raises(PeagleError, match="the adapters code, "):
        save_adapter(named, tmp_path)


def test_virtual_tokens_are_refused():
    with pytest.raises(PeagleError, match="PromptTuningConfig"):
        add_adapter(make_drafter(make_config()), PromptTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (LoraConfig(target_modules="all-linear"), "fc.lora_B"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head.modules_to_save"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "embed_tokens.lora_embedding_B"),
        (LoraConfig(target_modules=["q_proj"], target_parameters=["lm_head.weight"]), "lm_head.lora_B"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "embed_tokens.token_adapter"),
        (LoHaConfig(target_modules=["q_proj", "fc"]), "fc.hada_w2_a"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "q_proj.ia3_l"),
    ],
)
def test_kinds_of_adapters_are_trained_saved_loaded_and_merged(config, trained, tmp_path):
    drafter, objective = make_pair(make_config())
    model = add_adapter(drafter, config)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    for _ in range(2):  # one of the two factors of an adapter is 0 at first
        optimizer.zero_grad()
        objective(model.train(), make_batch(drafter.config)).loss.backward()
        optimizer.step()
    assert any(trained in name and parameter.grad.any() for name, parameter in parameters.items())
    save_adapter(model, tmp_path)
    frozen = load_adapter(make_drafter(make_config()), tmp_path)
    assert not [name for name, parameter in frozen.named_parameters() if parameter.requires_grad]
    merged = merge_adapter(frozen).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in merge_adapter(model).state_dict().items())
    going_on = load_adapter(make_drafter(make_config()), tmp_path, is_trainable=True)
    assert {name for name, parameter in going_on.named_parameters() if parameter.requires_grad} == parameters.keys()


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (LoHaConfig(r=2, target_modules=["fc"]), LoHaConfig(r=2, alpha=3, target_modules=["fc"])),
        (
            IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
        ),
    ],
    ids=["LoHa", "IA3"],
)
def test_other_kinds_of_adapters_are_trained_and_resumed_by_the_trainer(config, other, trained, tiny_verifier):
    base, adapter_flags = trained
    flags = {**adapter_flags, "lora_r": None, "optim": "adamw_torch"}

    def train_with(config, epochs, **resuming):
        drafter = PeagleForSpeculation.from_pretrained(base, dtype=torch.float32)
        drafter.load_verifier(str(tiny_verifier), initialize=False)
        args = PeagleTrainingArguments(**{**flags, "num_train_epochs": epochs})
        train_dataset, eval_dataset = build_datasets(args)
        trainer = PeagleTrainer(
            add_adapter(drafter, config), args, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        trainer.train(**resuming)
        return trainer.state.global_step

    steps = train_with(copy.deepcopy(config), 1)
    assert train_with(config, 2, resume_from_checkpoint=True) == 2 * steps
    with pytest.raises(PeagleError, match="the adapter was"):
        train_with(other, 3, resume_from_checkpoint=True)


def test_modules_to_save_that_the_drafter_lacks_are_refused():
    for name in ("lm_heads", "input_norm"):  # the last one is there, but has no weights
        with pytest.raises(PeagleError, match=rf"names {name}, .* lm_head, .*norm"):
            add_adapter(make_drafter(make_config()), LoraConfig(r=2, modules_to_save=["norm", name]))


def test_merging_neither_changes_an_adapter_nor_warns_of_its_name(recwarn):
    model = add_adapter(make_drafter(make_config()), LoraConfig(r=2, target_modules=["fc"]))
    model.peft_config["default"].base_model_name_or_path = "checkpoints/0"
    merge_adapter(model)
    assert model.peft_config["default"].base_model_name_or_path == "checkpoints/0"
    assert not [one for one in recwarn if "base_model_name_or_path" in str(one.message)]


def test_a_head_that_an_adapter_trains_does_not_become_its_own_teacher(trained, tiny_verifier):
    _, adapter_flags = trained
    before = LlamaForCausalLM.from_pretrained(tiny_verifier).lm_head.weight
    trainer = run(adapter_flags, lora_modules_to_save=["lm_head"], learning_rate=1e-2)
    drafter, objective = trainer.model.get_base_model(), trainer.distillation
    head = drafter.lm_head.modules_to_save["default"].weight
    taught = objective.verifier_head.restrict(drafter.draft_token_ids).weight
    assert torch.equal(taught, before[drafter.draft_token_ids])
    assert torch.equal(objective.draft_head.weight, taught)
    assert not torch.equal(head, taught)


def test_an_adapter_wants_a_drafter_to_adapt(train_flags):
    with pytest.raises(PeagleError, match="--from-pretrained"):
        PeagleTrainingArguments(**train_flags, lora_r=4)
    with pytest.raises(PeagleError, match="--lora-modules-to-save"):
        PeagleTrainingArguments(**train_flags, from_pretrained="a", lora_r=4, train_head=True)
