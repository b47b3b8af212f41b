"""What people know of the Trainer, on drafters: searches, fresh models, callbacks, optimizers of their own."""

import json
import os
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from transformers import TrainerCallback, get_constant_schedule

from peagle_hf import (
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainer,
    PeagleTrainingArguments,
    VllmExportCallback,
    build_datasets,
    build_drafter,
)
from peagle_hf.model.served_checkpoint import check_checkpoint
from peagle_hf.training.losses import parse_loss


def make_trainer(train_flags, changes=(), callbacks=(), fresh=False, **options):
    """A trainer of one drafter or, if `fresh`, of a new one for each run."""
    args = PeagleTrainingArguments(**{**train_flags, **dict(changes)})
    train_dataset, eval_dataset = build_datasets(args)
    if fresh:
        options["model_init"] = lambda: build_drafter(args)
    elif "model_init" not in options:
        options["model"] = build_drafter(args)
    return PeagleTrainer(
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[VllmExportCallback(args.export_dtype), *callbacks],
        **options,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_model_init_gives_the_same_run_each_time(train_flags):
    expected = make_trainer(train_flags)
    expected.train()
    trainer = make_trainer(train_flags, fresh=True)
    for number in range(2):
        trainer.args.output_dir = f"{train_flags['output_dir']}-{number}"
        trainer.train()
        assert losses(trainer) == losses(expected)


def test_a_model_of_model_init_gets_what_the_arguments_say(train_flags):
    changes = {"loss_fn": "tv", "activation_checkpointing": True, "keep_attention": False, "max_steps": 1}
    trainer = make_trainer(train_flags, changes, fresh=True)
    trainer.train()
    assert trainer.distillation.loss_weights == parse_loss("tv")
    assert not any(layer.keep_attention for layer in trainer.model.layers)


class Remember(TrainerCallback):
    """Keeps the losses of each run."""

    def __init__(self):
        self.runs = []

    def on_train_end(self, args, state, control, **kwargs):
        self.runs.append([entry["loss"] for entry in state.log_history if "loss" in entry])


TRIALS = {
    2: {"learning_rate": 1e-5, "loss_fn": "kl_div", "down_sample_ratio": 0.9},
    3: {"learning_rate": 5e-3, "loss_fn": "ce", "down_sample_ratio": 0.5},
}


def search(train_flags, callbacks=(), changes=(), **options):
    """Try two values of K, each with a learning rate, a loss and a sampling of its own."""

    def space(trial):
        depths = trial.suggest_categorical("num_depths", list(TRIALS))
        return {"num_depths": depths, **TRIALS[depths]}

    def model_init(trial):
        args = PeagleTrainingArguments(**{**train_flags, **dict(changes)})
        return build_drafter(args if trial is None else replace(args, **space(trial)))

    trainer = make_trainer(train_flags, changes, callbacks, model_init=model_init)
    sampler = optuna.samplers.GridSampler({"num_depths": list(TRIALS)}, seed=0)
    return trainer.hyperparameter_search(space, n_trials=2, backend="optuna", sampler=sampler, **options)


def test_each_trial_of_a_search_is_the_run_that_its_arguments_describe(train_flags, tmp_path):
    remembered = Remember()
    best = search(train_flags, [remembered])
    output = Path(train_flags["output_dir"])
    found = {}
    for number, run in enumerate(remembered.runs):
        folder = output / f"run-{number}"
        depths = check_checkpoint(folder / "checkpoint_best").num_depths
        found[depths] = run
        name, history = "eval_acceptance_length", state_of(folder / "1")["log_history"]
        scores = [entry[name] for entry in history if name in entry]
        assert os.readlink(folder / "checkpoint_best") == str(scores.index(max(scores)))
        if depths == best.hyperparameters["num_depths"]:
            assert best.objective == scores[-1]
            assert best.run_id == str(number)
    assert sorted(path.name for path in output.iterdir()) == ["run-0", "run-1"]
    for depths, parameters in TRIALS.items():
        alone = make_trainer(
            train_flags, {**parameters, "num_depths": depths, "output_dir": str(tmp_path / str(depths))}
        )
        alone.train()
        assert found[depths] == losses(alone)


def state_of(epoch_folder):
    return json.loads((epoch_folder / "trainer_state.json").read_text())


def test_a_search_improves_the_metric_for_the_best_model_under_its_own_names(train_flags):
    best = search(
        train_flags,
        changes={"metric_for_best_model": "accuracy_0", "num_train_epochs": 3},
        hp_name=lambda trial: f"k{trial.params['num_depths']}",
    )
    output = Path(train_flags["output_dir"])
    scores = {}
    for depths in TRIALS:
        history = state_of(output / f"k{depths}" / "2")["log_history"]
        scores[depths] = [entry["eval_accuracy_0"] for entry in history if "eval_loss" in entry][-1]
    assert len(set(scores.values())) == 2
    assert best.objective == max(scores.values()) == scores[best.hyperparameters["num_depths"]]


def test_after_a_search_training_is_an_ordinary_run_again(train_flags):
    trainer = make_trainer(train_flags, {"max_steps": 1}, fresh=True)
    trainer.hyperparameter_search(lambda trial: {}, n_trials=1, backend="optuna")
    trainer.train()
    assert (Path(train_flags["output_dir"]) / "checkpoint_best" / "model.safetensors").exists()


def test_a_bad_value_in_a_search_is_named(train_flags):
    trainer = make_trainer(train_flags, fresh=True)
    with pytest.raises(PeagleError, match="no_such_loss"):
        trainer.hyperparameter_search(lambda trial: {"loss_fn": "no_such_loss"}, n_trials=1, backend="optuna")


def test_a_trial_is_held_to_the_rules_of_the_arguments(train_flags):
    for values, words in (
        ({"label_smoothing_factor": 0.1}, "--label-smoothing-factor can't be used here"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0 but must be above 0"),
    ):
        trainer = make_trainer(train_flags, fresh=True)
        with pytest.raises(PeagleError, match=words):
            trainer.hyperparameter_search(lambda trial, values=values: values, n_trials=1, backend="optuna")


def test_the_optimizer_of_a_trial_has_its_own_weight_decay(train_flags):
    for changes, decay in (({}, 0.0), ({"weight_decay": 0.3}, 0.3)):
        trainer = make_trainer(train_flags, {"max_steps": 1, "save_strategy": "no", **changes}, fresh=True)
        trainer.hyperparameter_search(lambda trial: {"optim": "adamw_torch"}, n_trials=1, backend="optuna")
        assert trainer.args.weight_decay == decay


def test_optimizer_and_schedule_may_be_given(train_flags):
    args = PeagleTrainingArguments(**train_flags)
    drafter = build_drafter(args)
    named = {name: parameter for name, parameter in drafter.named_parameters() if parameter.requires_grad}
    matrices = [parameter for parameter in named.values() if parameter.ndim == 2]
    others = [parameter for parameter in named.values() if parameter.ndim != 2]
    optimizer = torch.optim.RAdam([{"params": matrices, "lr": 2e-3}, {"params": others, "lr": 1e-4}])
    train_dataset, eval_dataset = build_datasets(args)
    trainer = PeagleTrainer(
        drafter,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        optimizers=(optimizer, get_constant_schedule(optimizer)),
    )
    trainer.train()
    assert {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry} == {2e-3}
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-4]
    assert len(optimizer.state) == len(named)


def test_warm_restarts_bring_the_rate_back_to_its_peak(train_flags):
    flags = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 3}', "max_steps": 6}
    trainer = make_trainer({**train_flags, **flags, "warmup_steps": 0, "eval_strategy": "no", "save_strategy": "no"})
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    peak = trainer.args.learning_rate
    assert rates == pytest.approx([peak, peak / 2] * 3)


def test_an_optimizer_class_of_ones_own_resumes_exactly(train_flags, tmp_path):
    options = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 2e-3, "momentum_decay": 1e-3})}
    whole = make_trainer(train_flags, **options)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, torch.optim.NAdam)
    assert whole.record()["optimizer"] == "NAdam, given to the trainer"
    resumed = make_trainer(train_flags, {"output_dir": str(tmp_path / "resumed")}, **options)
    resumed.train(resume_from_checkpoint=str(Path(train_flags["output_dir"]) / "0"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("optimizer", ["adagrad", "rmsprop", "adamw_torch_fused"])
def test_other_optimizers_by_name_train(train_flags, optimizer):
    trainer = make_trainer(train_flags, {"optim": optimizer, "learning_rate": 3e-3, "num_train_epochs": 4})
    trainer.train()
    assert sum(losses(trainer)[-5:]) < 0.98 * sum(losses(trainer)[:5])


class EveryEvent(TrainerCallback):
    """Counts events, and stops after the third step."""

    def __init__(self):
        self.events = {}

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.events[name] = self.events.get(name, 0) + 1
        return super().__getattribute__(name)

    def on_step_end(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        assert isinstance(model, PeagleForSpeculation)
        assert optimizer is not None
        assert train_dataloader is not None
        control.should_training_stop = state.global_step == 3
        control.should_evaluate = control.should_save = control.should_training_stop


def test_callbacks_see_all_events_and_can_stop_the_run(train_flags):
    counting = EveryEvent()
    trainer = make_trainer(train_flags, {"eval_strategy": "no", "save_strategy": "no"}, [counting])
    trainer.train()
    assert trainer.state.global_step == 3
    assert (counting.events["on_step_end"], counting.events["on_evaluate"], counting.events["on_log"]) == (3, 1, 5)
    assert counting.events["on_train_begin"] == counting.events["on_train_end"] == 1
    assert (Path(train_flags["output_dir"]) / "0").is_dir()


class WithItsOwn(PeagleTrainer):
    """A subclass that makes its optimizer and its schedule."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD([one for one in self.model.parameters() if one.requires_grad], lr=0.1)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer or self.optimizer, 2)
        return self.lr_scheduler


def test_the_records_name_a_subclass_that_makes_its_optimizer(train_flags):
    args = PeagleTrainingArguments(**train_flags | {"num_train_epochs": 1})
    drafter, (train_dataset, eval_dataset) = build_drafter(args), build_datasets(args)
    trainer = WithItsOwn(drafter, args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train()
    assert trainer.record()["optimizer"] == "WithItsOwn.create_optimizer, WithItsOwn.create_scheduler"
    words = "the optimizer was WithItsOwn.create_optimizer, muon now"
    with pytest.raises(PeagleError, match=words):
        PeagleTrainer(drafter, args, None, train_dataset, eval_dataset).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["create_optimizer_and_scheduler", "_get_train_sampler"])
def test_a_method_that_would_never_be_called_is_refused(train_flags, name):
    args = PeagleTrainingArguments(**train_flags)
    trainer = type("Mine", (PeagleTrainer,), {name: lambda self, *_: None})
    with pytest.raises(PeagleError, match=f"Mine overrides {name}, which is never called"):
        trainer(build_drafter(args), args, train_dataset=build_datasets(args)[0])


@pytest.mark.fault("A tracker of --report-to isn't logged in", "Training ends; the tracker and its reason are named.")
def test_a_tracker_that_fails_is_named(train_flags, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    args = PeagleTrainingArguments(**train_flags | {"report_to": "wandb"})
    trainer = PeagleTrainer(build_drafter(args), args, None, *build_datasets(args))
    with pytest.raises(PeagleError, match=r"tracker wandb of --report-to failed: .*wandb login.*--report-to none"):
        trainer.train()
