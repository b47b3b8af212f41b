"""Every argument of the Trainer works, is refused by name, or is named where it does nothing."""

import copy
import inspect
import itertools
import multiprocessing
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, get_constant_schedule
from transformers.training_args import OptimizerNames

from peagle_hf import (
    CODDataCollator,
    EvaluateArguments,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainer,
    PeagleTrainingArguments,
    PrepareArguments,
    VllmExportCallback,
    build_datasets,
    build_drafter,
)
from peagle_hf.arguments import default_of, flag_of
from peagle_hf.cli import main
from peagle_hf.training import loader_workers as loading
from peagle_hf.training.argument_rules import CONTRADICTIONS, NEEDS, REFUSED, REFUSED_PARAMETERS, WORKS, has_bfloat16
from peagle_hf.training.time_left import planned_steps
from peagle_hf.training.trainer_checks import check_metric

LATER = {"activation_checkpointing", "activation_checkpointing_kwargs"}
"""Arguments that the Trainer has from transformers 5.23 on."""


def make(**changes):
    return PeagleTrainingArguments(**{"use_cpu": True, "report_to": "none", **changes})


def test_every_argument_and_parameter_of_the_trainer_is_in_one_table():
    names = {field.name for field in fields(TrainingArguments)}
    assert names - WORKS - set(REFUSED) == set()
    assert WORKS | set(REFUSED) <= names | LATER
    assert not WORKS & set(REFUSED)
    parameters = set(inspect.signature(Trainer.__init__).parameters)
    taken = set(inspect.signature(PeagleTrainer.__init__).parameters) - {"refused"}
    assert parameters - taken == set(REFUSED_PARAMETERS)


REFUSED_VALUES = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "liger_kernel_config": {"rms_norm": True},
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "label_names": ["targets"],
    "eval_accumulation_steps": 1,
    "include_for_metrics": ["inputs"],
    "parallelism_config": {"tp_size": 2},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused_by_name(name):
    (field,) = (one for one in fields(TrainingArguments) if one.name == name)
    value = REFUSED_VALUES.get(name, not default_of(field))
    with pytest.raises(PeagleError, match=f"{flag_of(name)} can't be used here: "):
        make(**{name: value})


@pytest.mark.fault("a transformers with an argument that is not in the table", "The argument is refused by name.")
def test_an_argument_that_only_a_later_trainer_has_is_refused(monkeypatch):
    monkeypatch.setattr("peagle_hf.training.argument_rules.WORKS", WORKS - {"torch_empty_cache_steps"})
    make()
    with pytest.raises(PeagleError, match="--torch-empty-cache-steps can't be used here: it is new"):
        make(torch_empty_cache_steps=3)


GIVEN = {
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_modules_to_save": ["norm"],
    "token_freq_path": "freq.pt",
    "vllm_endpoint": "http://localhost:9/v1",
    "on_generate": "cache",
    "verifier_device": "cpu",
    "server_hidden_states_path": "states",
    "request_timeout": 3.0,
    "max_retries": 1,
    "memory_budget": 3.0,
    "keep_attention": False,
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "logging_steps": 3,
    "eval_steps": 3,
    "save_steps": 3,
    "eval_delay": 1,
    "eval_on_start": True,
    "metric_for_best_model": "loss",
    "dpace_alpha": 0.3,
    "save_total_limit": 1,
    "save_only_model": True,
    "warmup_steps": 3,
    "optim_target_modules": "all-linear",
    "hub_strategy": "end",
    "run_name": "run",
    "project": "mine",
    "trackio_space_id": "me/space",
    "trackio_bucket_id": "me/bucket",
    "trackio_static_space_id": "me/static",
    "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "spawn",
    "fsdp_config": {"version": 2},
}
WITHOUT = {
    "logging_steps": {"logging_strategy": "epoch"},
    **{name: {"train_data_ratio": 1.0} for name in ("eval_delay", "eval_on_start", "metric_for_best_model")},
    "dpace_alpha": {"per_position_loss_weight": "uniform"},
    **{name: {"save_strategy": "no"} for name in ("save_total_limit", "save_only_model")},
    "warmup_steps": {"lr_scheduler_type": "constant"},
}
WITH = {
    "lora_alpha": {"lora_r": 4, "from_pretrained": "drafter"},
    "token_freq_path": {"draft_vocab_size": 9},
    "vllm_endpoint": {"on_missing": "generate"},
    "request_timeout": {"on_missing": "generate", "vllm_endpoint": "http://localhost:9/v1"},
    "verifier_device": {"on_missing": "generate"},
    "memory_budget": {"sequence_partitions": "auto"},
    "keep_attention": {"activation_checkpointing": True},
    "dpace_alpha": {},
    "eval_steps": {"eval_strategy": "steps"},
    "save_steps": {"save_strategy": "steps"},
    "optim_target_modules": {"optim": "galore_adamw"},
    "hub_strategy": {"push_to_hub": True},
    "run_name": {"report_to": "tensorboard"},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize("name", [name for names, *_ in NEEDS for name in names])
def test_what_has_no_effect_is_named(name, caplog):
    make(**WITHOUT.get(name, {}))
    assert f"{flag_of(name)} " not in caplog.text
    make(**{name: GIVEN[name]}, **WITHOUT.get(name, {}))
    assert re.search(f"{flag_of(name)} .* has no effect without", caplog.text)


@pytest.mark.parametrize("name", WITH)
def test_what_does_something_passes(name, monkeypatch):
    monkeypatch.setattr("peagle_hf.training.arguments.check_tracker", lambda name: None)
    args = make(**{name: GIVEN[name]}, **WITH[name])
    assert getattr(args, name) == GIVEN[name]
    replace(args)  # derived values are derived anew


BAD = [
    {"max_steps": 0},
    {"sequence_partitions": "half"},
    {"remove_unused_columns": True},
    {"lora_r": 4},
    {"lora_r": 4, "from_pretrained": "drafter", "train_head": True},
    {"fp16": True, "bf16": True},
    {"ddp_backend": "gloo"},
    {"memory_report": True, "dry_run": True},
    {"resume": False, "resume_from_checkpoint": "checkpoint-3"},
    {"train_data_ratio": 1.0, "eval_strategy": "steps"},
    {"save_strategy": "best", "eval_strategy": "no"},
    {"down_sample_ratio": 0.3, "down_sample_ratio_min": 0.4},
]


@pytest.mark.fault("two arguments contradict each other", "Training is refused with both flags before it starts.")
def test_contradictions_are_named():
    for (_, message), changes in zip(CONTRADICTIONS, BAD, strict=True):
        with pytest.raises(PeagleError) as refused:
            make(**changes)
        assert str(refused.value) == message.format(args=make_unchecked(changes))
        assert all(flag_of(name) in str(refused.value) for name in changes if name != "from_pretrained")
    make(down_sample_ratio=0.1, down_sample_ratio_min=0.1)


def make_unchecked(changes):
    class Values(dict):
        __getattr__ = dict.__getitem__

    return Values({**{field.name: default_of(field) for field in fields(PeagleTrainingArguments)}, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp16": True}, "--fp16 needs a GPU"),
        ({"tf32": True}, "tf32"),
        ({"include_num_input_tokens_seen": "non_padding"}, "--include-num-input-tokens-seen is 'non_padding'"),
        ({"debug": "tpu_metrics_debug"}, "--debug tpu_metrics_debug"),
        ({"debug": "everything"}, "everything"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
            "every_n_layers",
        ),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"every_n_layers": 2}'}, "every_n_layers"),
        ({"accelerator_config": {"split_batches": True}}, "--accelerator-config sets split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "sets dispatch_batches"),
        ({"accelerator_config": {"even_batches": False}}, "sets even_batches"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "sets gradient_accumulation_kwargs",
        ),
        ({"accelerator_config": {"fast": True}}, "fast"),
        ({"accelerator_config": "/nowhere/accelerator.json"}, "/nowhere/accelerator.json"),
        ({"torch_compile_backend": "gcc"}, "--torch-compile-backend is 'gcc'.*inductor"),
        ({"torch_compile_mode": "fast"}, "--torch-compile-mode fast.*max-autotune"),
        ({"torch_compile_mode": "max-autotune", "torch_compile_backend": "aot_eager"}, "other backends have none"),
        ({"dataloader_multiprocessing_context": "threads", "dataloader_num_workers": 1}, "'threads'.*spawn"),
        ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, "adamw_torch takes no momentum=0.9"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,momnetum=1"}, "sgd takes no momnetum=1"),
        ({"optim": "sgd", "optim_args": "momentum"}, "unpack"),
        ({"optim": "sgd", "adam_beta2": 0.9}, "sgd takes no --adam-beta2"),
        ({"optim": "adafactor", "adam_epsilon": 1e-4}, "adafactor takes no --adam-epsilon"),
        ({"optim": "galore_adamw"}, "--optim-target-modules"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"deepspeed": "/nowhere.json", "optim": "adamw_torch"}, "/nowhere.json"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
        ({"eval_strategy": "sometimes"}, "sometimes"),
        ({"save_strategy": "steps", "save_steps": 2.5}, "save_steps"),
        ({"load_best_model_at_end": True, "train_data_ratio": 1.0}, "load_best_model_at_end"),
        ({"on_missing": "generate", "verifier_device": "gpu"}, "--verifier-device gpu can't be used"),
        ({"learning_rate": "1e-4"}, "--learning-rate is '1e-4' but must be a number"),  # as YAML 1.1 reads 1e-4
        ({"linear_start": "false"}, "--linear-start is 'false' but must be True or False"),
        ({"per_position_loss_weight": "D-PACE"}, "-weight is 'D-PACE' but must be one of dpace, uniform"),
        ({"on_generate": "keep"}, "--on-generate is 'keep' but must be one of cache, delete"),
        ({"max_steps": "4"}, "--max-steps is '4' but must be a whole number"),
        ({"total_seq_len": 64.0}, "--total-seq-len is 64.0 but must be a whole number"),
        ({"target_layer_ids": ["1", "2"]}, "--target-layer-ids is '1' but must be a whole number"),
    ],
    ids=str,
)
def test_values_that_would_be_ignored_or_break_later_are_refused(changes, words):
    with pytest.raises(PeagleError, match=words):
        make(**changes)


def test_commands_want_numbers_too_and_take_a_single_one_without_its_list():
    with pytest.raises(PeagleError, match="--max-samples is '3' but must be a whole number"):
        PrepareArguments(model="m", data="d", output="o", max_samples="3")
    arguments = EvaluateArguments(model="m", suite="s", output="o", concurrency=4, temperature=0)
    assert (arguments.concurrency, arguments.temperature) == ([4], [0])


@pytest.mark.fault("accelerate launch asks for a precision that the device lacks", "It is refused, not replaced.")
def test_launched_precision_is_that_of_the_run(monkeypatch):
    assert make().bf16 is False
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make().bf16 is True
    assert make(bf16=False).bf16 is False
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(PeagleError, match="--fp16 needs a GPU"):
        make()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(PeagleError, match="asks for fp8"):
        make()


def supports(own, including_emulation=True):
    """As `torch.cuda.is_bf16_supported` on a GPU of which `own` says whether it has bfloat16 itself."""
    return own or including_emulation


def test_bfloat16_is_the_default_on_gpus_that_have_it_only(monkeypatch):
    assert has_bfloat16() is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for own in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=own: including_emulation or own
        )
        assert has_bfloat16() is own


@pytest.mark.parametrize(
    ("cores", "processes", "free_gib", "num_workers"),
    [
        (16, 1, 100, 4),
        (16, 8, 100, 2),
        (4, 8, 100, 1),
        (2, 1, 100, 2),
        (16, 1, 0.06, 0),
        (16, 8, 24.1, 2),
        (16, 8, 23.9, 0),
    ],
)
def test_samples_are_read_ahead_on_a_gpu_as_far_as_cores_and_shared_memory_allow(
    monkeypatch, caplog, tmp_path, cores, processes, free_gib, num_workers
):
    args = make(total_seq_len=4096)
    assert args.dataloader_num_workers == 0
    args.use_cpu = False
    monkeypatch.setattr(loading, "available_cores", lambda: cores)
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(loading, "disk_usage", lambda path: SimpleNamespace(free=free_gib * 2**30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loading.loader_workers(args) == num_workers
    assert ("--shm-size" in caplog.text) == (num_workers == 0)
    # Batches of the validation wait in the same memory as those of the training.
    args.per_device_eval_batch_size = 4
    fits = free_gib >= 5 * 3 * processes * min(4, max(1, cores // processes)) * 4096 * loading.LARGEST_STATES / 2**30
    assert bool(loading.loader_workers(args)) == fits
    args.eval_strategy = "no"
    args.per_device_train_batch_size = 5
    assert bool(loading.loader_workers(args)) == fits


def test_samples_are_read_ahead_only_by_processes_that_are_forked(monkeypatch):
    args = make(total_seq_len=64)
    args.use_cpu = False
    for platform, default, chosen, is_forked in (
        ("linux", "fork", None, True),
        ("linux", "forkserver", None, True),  # Python 3.14
        ("linux", "forkserver", "forkserver", True),  # the same, after a progress bar has used multiprocessing
        ("linux", "forkserver", "spawn", False),
        ("linux", "fork", "forkserver", False),  # by multiprocessing.set_start_method
        ("darwin", "spawn", None, False),
        ("darwin", "spawn", "fork", True),
    ):
        monkeypatch.setattr(loading.sys, "platform", platform)
        monkeypatch.setattr(loading, "get_start_method", lambda allow_none, chosen=chosen: chosen)
        monkeypatch.setattr(loading, "get_all_start_methods", lambda default=default: [default, "others"])
        assert bool(loading.loader_workers(args)) == is_forked, (platform, default, chosen)
    args.dataloader_multiprocessing_context = "spawn"
    assert loading.loader_workers(args) == 0


def test_workers_are_forked_where_python_would_start_them_anew(train_flags, monkeypatch):
    """As on Linux from Python 3.14 on, where each worker would import everything again, a user's script included."""
    expected = trainer_of(train_flags)
    expected.train()
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_default_context", multiprocessing.get_context("forkserver")
    )
    monkeypatch.setattr(loading, "get_all_start_methods", lambda: ["forkserver", "fork", "spawn"])
    assert multiprocessing.get_context().get_start_method() == "forkserver"
    trainer = trainer_of(train_flags, {"dataloader_num_workers": 1})
    assert trainer.get_train_dataloader().multiprocessing_context.get_start_method() == "fork"
    assert trainer.get_eval_dataloader().multiprocessing_context.get_start_method() == "fork"
    trainer.train()
    for name, tensor in state(expected).items():
        assert torch.equal(state(trainer)[name], tensor), name


def trainer_of(train_flags, changes=(), **options):
    args = PeagleTrainingArguments(**{**train_flags, "max_steps": 2, "save_strategy": "no", **dict(changes)})
    train_dataset, eval_dataset = build_datasets(args)
    given = {"model": build_drafter(args), "train_dataset": train_dataset, "eval_dataset": eval_dataset, **options}
    return PeagleTrainer(args=args, **given)


def test_what_is_given_beside_the_arguments_is_checked_before_training(train_flags):
    args = PeagleTrainingArguments(**train_flags)
    weights = list(build_drafter(args).parameters())
    ours, others = torch.optim.SGD(weights, 0.1), torch.optim.SGD(weights[:1], 0.1)
    for given, words in (
        ({"args": TrainingArguments(train_flags["output_dir"])}, "takes PeagleTrainingArguments, not TrainingArg"),
        ({"model": train_flags["data_path"]}, "trains a PeagleForSpeculation, not a str"),
        ({"processing_class": "Qwen/Qwen3-8B"}, "processing_class is 'Qwen/Qwen3-8B', which can't be saved"),
        ({"optimizers": (ours, None), "model": build_drafter(args)}, "none of the weights of the model"),
        ({"optimizers": (None, get_constant_schedule(ours))}, "rates of another optimizer"),
        ({"optimizers": (ours, get_constant_schedule(others))}, "rates of another optimizer"),
    ):
        with pytest.raises(PeagleError, match=words):
            PeagleTrainer(**{"args": args, **given})
    with pytest.raises(PeagleError, match=r"draws 5 depths, .* num_depths 3"):
        trainer_of(train_flags, data_collator=CODDataCollator(num_depths=5))


def test_a_validation_that_there_is_not_is_named(train_flags):
    trainer = trainer_of(train_flags)
    with pytest.raises(PeagleError, match="no eval_dataset called 'chats'"):
        trainer.evaluate("chats")
    with pytest.raises(PeagleError, match="NoneType"):
        trainer.predict(None)
    trainer.eval_dataset = {"code": trainer.eval_dataset}
    with pytest.raises(PeagleError, match=r"called 'chats'\. Names that there are: code"):
        trainer.evaluate("chats")
    assert trainer.evaluate("code")["eval_loss"] > 0


class OwnLoader(PeagleTrainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, collate_fn=self.data_collator)


def test_a_loader_that_knows_no_epochs_is_refused(train_flags):
    args = PeagleTrainingArguments(**train_flags, max_steps=1)
    train_dataset, eval_dataset = build_datasets(args)
    with pytest.raises(PeagleError, match="same slots in each epoch"):
        OwnLoader(build_drafter(args), args, train_dataset=train_dataset, eval_dataset=eval_dataset).train()


@pytest.mark.parametrize("callback", [VllmExportCallback, VllmExportCallback(), VllmExportCallback("float16")])
def test_weights_are_exported_as_the_arguments_or_the_callback_say(train_flags, callback):
    changes = {"save_strategy": "epoch", "max_steps": 1, "export_dtype": "float32"}
    trainer = trainer_of(train_flags, changes, callbacks=[callback])
    trainer.train()
    folder = f"{train_flags['output_dir']}/checkpoint_best"
    wanted = torch.float16 if getattr(callback, "dtype", None) == torch.float16 else torch.float32
    assert PeagleForSpeculation.from_pretrained(folder).fc.weight.dtype == wanted
    assert sum(isinstance(one, VllmExportCallback) for one in trainer.callback_handler.callbacks) == 1
    trainer.remove_callback(VllmExportCallback)
    with pytest.raises(PeagleError, match=r"VllmExportCallback, .* was removed"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", [*REFUSED_PARAMETERS, "colour"])
def test_parameters_of_the_trainer_that_can_not_be_taken_are_refused(train_flags, name):
    with pytest.raises(PeagleError, match=f"can't be given {name}: "):
        PeagleTrainer(**{name: print})


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat({})


@pytest.mark.fault("a data set of another kind is given to the trainer", "It is refused with what to give instead.")
def test_data_sets_and_models_of_other_kinds_are_refused(train_flags):
    args = PeagleTrainingArguments(**train_flags)
    dataset, _ = build_datasets(args)
    trainer = trainer_of(train_flags)
    samples = [dataset[0]]
    for other in (Subset(dataset, [0]), ConcatDataset([dataset]), Endless(), samples):
        for given in ({"train_dataset": other}, {"eval_dataset": other}, {"eval_dataset": {"other": other}}):
            with pytest.raises(PeagleError, match=rf"A {type(other).__name__} can't be trained.*rows"):
                PeagleTrainer(trainer.model, args, **{"train_dataset": dataset, **given})
        with pytest.raises(PeagleError, match=rf"A {type(other).__name__} can't"):
            trainer.predict(other)
    with pytest.raises(PeagleError, match="not a Linear"):
        PeagleTrainer(nn.Linear(2, 2), args, train_dataset=dataset, eval_dataset=dataset)


def test_attention_that_a_drafter_does_not_have_is_refused(train_flags):
    drafter = build_drafter(PeagleTrainingArguments(**train_flags))
    with pytest.raises(PeagleError, match=r"no attention called 'eager'.*sdpa, flex"):
        drafter.set_attn_implementation("eager")
    drafter.config._attn_implementation = "eager"
    with pytest.raises(PeagleError, match="'eager'"):
        type(drafter)(drafter.config)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        drafter.set_attn_implementation("flash_attention_2")


def state(trainer):
    return copy.deepcopy(trainer.model.state_dict())


def test_arguments_that_change_the_steps_do_so(train_flags):
    """Each run against the first one: what the argument is for is what differs."""
    plain = trainer_of(train_flags)
    plain.train()
    for changes in (
        {"max_grad_norm": 0.05},
        {"data_seed": 5},
        {"bf16": True},
        {"weight_decay": 0.5},
        {"warmup_steps": 2},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_kwargs": {"num_cycles": 1}},
    ):
        trainer = trainer_of(train_flags, changes)
        trainer.train()
        found, expected = state(trainer), state(plain)
        assert any(not torch.equal(found[name], expected[name]) for name in found), changes


def test_arguments_that_change_no_step_change_none(train_flags):
    plain = trainer_of(train_flags)
    plain.train()
    counted = {"include_num_input_tokens_seen": "all", "skip_memory_metrics": False, "logging_first_step": True}
    for changes in (
        {
            "full_determinism": True,
            "torch_empty_cache_steps": 1,
            "debug": "underflow_overflow",
            **counted,
            "logging_nan_inf_filter": True,
            "eval_on_start": True,
            "save_on_each_node": True,
        },
        {
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
            "dataloader_prefetch_factor": 3,
            "dataloader_multiprocessing_context": "spawn",
            "accelerator_config": {"non_blocking": True},
            "tf32": False,
            "ddp_bucket_cap_mb": 1,
            "ddp_timeout": 60,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True, "offload": False},
        },
    ):
        trainer = trainer_of(train_flags, changes)
        trainer.train()
        for name, tensor in state(plain).items():
            assert torch.equal(state(trainer)[name], tensor), (changes, name)
        if "skip_memory_metrics" in changes:
            assert trainer.state.num_input_tokens_seen > 0
            assert "train_mem_cpu_alloc_delta" in trainer.state.log_history[-1]
    torch.use_deterministic_algorithms(False)


def test_clipping_is_off_at_0(train_flags):
    unclipped, clipped = (trainer_of(train_flags, {"max_grad_norm": norm}) for norm in (0, 1e9))
    for trainer in (unclipped, clipped):
        trainer.train()
    for name, tensor in state(clipped).items():
        assert torch.equal(state(unclipped)[name], tensor), name


def test_early_stopping_keeps_its_patience_over_a_resume(train_flags):
    """Validation gives the same each time; three times are enough, of which the second part counts the last one."""
    changes = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 10,
        "learning_rate": 1e-12,
        "optim": "sgd",
        "restore_callback_states_from_checkpoint": True,
        "load_best_model_at_end": True,
    }
    half = trainer_of(train_flags, {**changes, "max_steps": 6}, callbacks=[EarlyStoppingCallback(3)])
    half.train()
    assert half.state.global_step == 6
    whole = trainer_of(train_flags, changes, callbacks=[EarlyStoppingCallback(3)])
    whole.train(resume_from_checkpoint=True)
    assert whole.state.global_step == 8


def test_the_command_line_refuses_in_one_paragraph(train_flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data-path", train_flags["data_path"], "--compute-something"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data-path", train_flags["data_path"], "--lora-r", "4", "--use-cpu"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("peagle-hf train: --lora-r adapts a trained drafter: name it with --from-pretrained.")


OWN = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
"""Optimizers that need nothing but PyTorch and transformers."""


@pytest.mark.parametrize("optimizer", [name.value for name in OptimizerNames])
def test_every_optimizer_is_taken_or_refused_before_anything_is_loaded(optimizer):
    target = {"optim_target_modules": "all-linear"} if optimizer.startswith(("galore", "apollo")) else {}
    try:
        taken = make(optim=optimizer, **target).optim == optimizer
    except PeagleError:
        taken = False
    assert taken or optimizer not in OWN


def test_an_empty_collection_of_validations_is_refused():
    with pytest.raises(PeagleError, match="holds no data set to validate on"):
        check_metric(make(), 3, {})
    check_metric(make(eval_strategy="no"), 3, {})


@pytest.mark.parametrize(("drops", "steps"), [(False, (4, 2)), (True, (2, 1))])
def test_planned_steps_are_those_of_the_training(train_flags, drops, steps):
    """Five packed sequences, three a step."""
    args = PeagleTrainingArguments(**train_flags, per_device_train_batch_size=3, dataloader_drop_last=drops)
    trainer = PeagleTrainer(build_drafter(args), args, None, *build_datasets(args))
    assert planned_steps(args, len(trainer.train_dataset)) == steps
    assert len(trainer.get_train_dataloader()) == steps[1]


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {"optim": "adamw_torch"}),
        ({}, {"metric_for_best_model": "loss"}),
        ({"train_data_ratio": 1.0}, {"train_data_ratio": 0.5}),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "cosine"}),
        ({}, {"lora_r": 4, "from_pretrained": "drafter"}),
        ({"vllm_endpoint": "http://a/v1", "on_missing": "generate"}, {"on_missing": "raise", "vllm_endpoint": None}),
        ({"activation_checkpointing": True}, {"activation_checkpointing": None}),
        ({"sequence_partitions": "2", "lr_scheduler_kwargs": '{"num_cycles": 2}'}, {"learning_rate": 1e-4}),
    ],
)
def test_changed_arguments_are_those_that_are_made_at_once(train_flags, given, changed):
    """By `as_given`, which has nothing that was derived from the values before."""
    given = {**train_flags, **given}
    again = PeagleTrainingArguments(**PeagleTrainingArguments(**given).as_given | changed)
    assert again.to_dict() == PeagleTrainingArguments(**given | changed).to_dict()
