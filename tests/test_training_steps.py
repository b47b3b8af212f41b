"""What each step of a training does: order of rows, counters between logs, the optimizer's options, the decay."""

import pytest
from test_modeling import make_batch, make_config, make_pair
from test_trainer_arguments import trainer_of

from peagle_hf import HiddenStatesDataset, PeagleError, PeagleTrainer, PeagleTrainingArguments, build_datasets
from peagle_hf.training.metrics import COUNTERS, is_metric, metric_names, summarize


def test_each_epoch_has_an_order_of_its_own(train_flags, monkeypatch):
    asked, get = [], HiddenStatesDataset.__getitem__

    def remember(self, request):
        asked.append(request)
        return get(self, request)

    monkeypatch.setattr(HiddenStatesDataset, "__getitem__", remember)
    trainer = trainer_of(train_flags, {"max_steps": -1, "num_train_epochs": 3, "train_data_ratio": 1.0})
    asked.clear()
    trainer.train()
    size = len(trainer.train_dataset)
    orders = [tuple(one.number for one in asked if one.epoch == epoch) for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(size))] * 3
    assert len(set(orders)) == 3
    assert [one.epoch for one in asked] == sorted(one.epoch for one in asked)


class Counting(PeagleTrainer):
    """Keeps the counters of each pass."""

    counted: list

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.counted.append(outputs.counters.clone())
        return (loss, outputs) if return_outputs else loss


def test_each_log_counts_the_steps_since_the_last_one(train_flags, monkeypatch):
    monkeypatch.setattr("test_trainer_arguments.PeagleTrainer", Counting)
    trainer = trainer_of(train_flags, {"max_steps": 6, "logging_steps": 2, "train_data_ratio": 1.0})
    trainer.counted = []
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for number, entry in enumerate(logs):
        expected = summarize(sum(trainer.counted[2 * number : 2 * number + 2]))
        assert {name: entry[name] for name in expected} == expected
    assert trainer.current_run.counters.shape == (len(COUNTERS), 3)
    assert not trainer.current_run.counters.any()
    assert trainer.current_run.throughput.positions == 0


def test_each_validation_counts_its_own_rows(train_flags):
    trainer = trainer_of(train_flags, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True})
    alone = trainer_of(train_flags)
    first, second = trainer.eval_dataset, trainer.train_dataset
    found = [trainer.evaluate(), trainer.evaluate(second), trainer.evaluate(), trainer.evaluate({"x": second})]
    expected = {name: value for name, value in alone.evaluate(second).items() if is_metric(name.removeprefix("eval_"))}
    assert expected == {name: found[1][name] for name in expected}
    assert {name: found[3][name.replace("eval_", "eval_x_")] for name in expected} == expected
    assert {name: found[2][name] for name in expected} == {name: found[0][name] for name in expected} != expected
    assert len(first) != len(second)


def test_workers_that_persist_do_not_validate_a_later_trial_with_the_depths_of_an_earlier_one(train_flags):
    trainer = trainer_of(train_flags, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True})
    loader = trainer.get_eval_dataloader()
    assert trainer.get_eval_dataloader() is loader
    assert loader.collate_fn.num_depths == 3
    trainer.model.config.num_depths = 2
    trainer.configure_model()
    assert trainer.get_eval_dataloader().collate_fn.num_depths == 2


def test_validation_drops_no_row_of_a_batch_that_is_not_full(train_flags):
    whole = trainer_of(train_flags).evaluate()
    found = trainer_of(train_flags, {"dataloader_drop_last": True, "per_device_eval_batch_size": 3}).evaluate()
    assert found["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)
    assert found["eval_acceptance_length"] == whole["eval_acceptance_length"]


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_the_optimizer_has_the_options_of_the_arguments(train_flags, optim):
    options = {"weight_decay": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3}
    optimizer = trainer_of(train_flags, {"optim": optim, "learning_rate": 0.125, **options}).create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    adam = [group for group in optimizer.param_groups if "betas" in group]
    assert {(*group["betas"], group["eps"]) for group in adam} == {(0.5, 0.6, 1e-3)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25, 0.0}
    for group in optimizer.param_groups:
        if group["weight_decay"] != 0.0:
            assert any(parameter.ndim == 2 for parameter in group["params"])
        elif optim != "muon":
            assert all(parameter.ndim != 2 for parameter in group["params"])
    assert (len(adam) < len(optimizer.param_groups)) is (optim == "muon")


@pytest.mark.fault("no weight of the drafter is to be trained", "Training is refused before its first step.")
def test_nothing_to_train_is_refused(train_flags):
    trainer = trainer_of(train_flags)
    trainer.model.requires_grad_(False)
    with pytest.raises(PeagleError, match="No weight of the drafter"):
        trainer.create_optimizer()


def test_the_decay_weighs_each_depth_by_its_power():
    """The loss is a polynomial of the decay whose coefficients are the depths' shares; of degree 2 with K 3."""
    config = make_config(num_depths=3)
    batch = make_batch(config, (90, 40))

    def loss(decay):
        drafter, objective = make_pair(config, depth_loss_decay=decay)
        return objective(drafter.train(), batch).loss.double().item()

    at = {decay: loss(decay) for decay in (1e-9, 0.5, 1.0, 2.0)}
    first = at[1e-9]
    third = 2 * (at[1.0] - first) - 4 * (at[0.5] - first)
    second = at[1.0] - first - third
    assert min(first, second, third) > 0.01
    assert at[2.0] == pytest.approx(first + 2 * second + 4 * third, rel=1e-4)
    drafter, objective = make_pair(config, depth_loss_decay=2.0)
    plain = objective(drafter.eval(), batch).loss.item()
    assert plain == pytest.approx(at[1.0], rel=1e-5)


def test_the_decay_of_the_arguments_is_that_of_the_steps(train_flags):
    losses = []
    for decay in (1.0, 0.5):
        trainer = trainer_of(train_flags, {"depth_loss_decay": decay, "max_steps": 1})
        trainer.train()
        assert trainer.distillation.depth_loss_decay == decay
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", ["acceptance", "accuracy", "anchor", "loss"])
def test_a_validation_may_have_the_name_of_a_metric(train_flags, name):
    args = PeagleTrainingArguments(**{**train_flags, "max_steps": 2})
    train_dataset, eval_dataset = build_datasets(args)
    trainer = trainer_of(train_flags, eval_dataset={name: eval_dataset, "other": train_dataset})
    trainer.train()
    assert trainer.args.metric_for_best_model == f"{name}_acceptance_length"
    assert trainer.state.best_metric == trainer.state.log_history[-3][f"eval_{name}_acceptance_length"]
    named = trainer_of(
        train_flags, {"metric_for_best_model": "other_loss"}, eval_dataset={name: eval_dataset, "other": train_dataset}
    )
    assert named.args.metric_for_best_model == "other_loss"


def test_the_arguments_of_the_user_stay_as_they_are(train_flags):
    args = PeagleTrainingArguments(**train_flags)
    train_dataset, eval_dataset = build_datasets(args)
    given = {"train_dataset": train_dataset, "eval_dataset": {"chats": eval_dataset}}
    model = trainer_of(train_flags).model
    assert PeagleTrainer(model, args, **given).args.metric_for_best_model == "chats_acceptance_length"
    assert args.metric_for_best_model == "acceptance_length"


def test_metrics_are_known_by_their_names():
    assert all(map(is_metric, metric_names(9)))
    assert not any(map(is_metric, ("", "f1", "acceptance", "chats_loss", "accuracy_x", "acceptance_length_2")))
