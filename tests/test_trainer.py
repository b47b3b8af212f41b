"""A run of the Trainer: metrics, epoch folders, the link to the best, resuming, and one path for CLI, YAML, example."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_staleness import fine_tune
from transformers import EarlyStoppingCallback, TrainerCallback

from peagle_hf import (
    PeagleConfig,
    PeagleError,
    PeagleForSpeculation,
    PeagleTrainer,
    PeagleTrainingArguments,
    VllmExportCallback,
    start_linearly,
)
from peagle_hf.cli import main
from peagle_hf.cli.parsing import flags
from peagle_hf.data.extract import ExtractArguments, extract
from peagle_hf.data.partition import partition_every_slot
from peagle_hf.data.prepare import PrepareArguments, prepare
from peagle_hf.evaluation.acceptance import count
from peagle_hf.training.checkpoints import checkpoints_by_step, epoch_folders
from peagle_hf.training.metrics import summarize
from peagle_hf.training.run import build_datasets, build_drafter, build_trainer, train
from peagle_hf.verifier.head import load_embedding

ROOT = Path(__file__).parents[1]


def run(train_flags, callbacks=(), resume=None, **changes):
    trainer = build_trainer(PeagleTrainingArguments(**{**train_flags, **changes}), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_new_run_beside_an_earlier_one_is_refused(train_flags):
    run(train_flags, num_train_epochs=1)
    best = Path(train_flags["output_dir"]) / "checkpoint_best" / "model.safetensors"
    before = best.read_bytes()
    with pytest.raises(PeagleError, match=r"of an earlier run.*resume_from_checkpoint=True.*another output_dir"):
        run(train_flags, num_train_epochs=1, seed=1)
    assert best.read_bytes() == before


def test_prediction_drops_no_row_either(train_flags):
    trainer = run(train_flags, max_steps=1)
    found, expected = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval").metrics, trainer.evaluate()
    same = [name for name in expected if "runtime" not in name and "per_second" not in name and name != "epoch"]
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}


def test_of_several_validations_the_first_makes_the_best(train_flags):
    args = PeagleTrainingArguments(**train_flags)
    train_dataset, eval_dataset = build_datasets(args)
    trainer = PeagleTrainer(
        build_drafter(args),
        args,
        train_dataset=train_dataset,
        eval_dataset={"chats": eval_dataset, "seen": train_dataset},
        callbacks=[VllmExportCallback()],
    )
    trainer.train()
    assert trainer.state.best_metric == max(logged(trainer, "eval_chats_acceptance_length"))
    assert len(logged(trainer, "eval_seen_acceptance_length")) == 2


@pytest.mark.fault("a drafter whose verifier was never loaded", "Training is refused and names load_verifier.")
def test_a_drafter_that_is_not_ready_is_refused(train_flags):
    """Its embeddings and head would be random numbers, or be trained although the arguments say otherwise."""
    args = PeagleTrainingArguments(**train_flags, eval_strategy="no")
    drafter = PeagleForSpeculation(PeagleConfig.from_verifier(args.verifier_name_or_path, num_layers=1))
    with pytest.raises(PeagleError, match="load_verifier"):
        PeagleTrainer(drafter, args, train_dataset=build_datasets(args)[0])


def test_a_saved_model_has_the_records_of_its_training(train_flags, tmp_path):
    trainer = run(train_flags, max_steps=1, save_strategy="no")
    trainer.save_model(str(tmp_path / "saved"))
    record = json.loads((tmp_path / "saved" / "training.json").read_text())
    assert record["steps"] == 1
    assert (tmp_path / "saved" / "run.json").exists()


def test_the_mode_of_the_objective_is_the_drafters(train_flags):
    """DeepSpeed's engine stays in training mode when the drafter within is set to evaluation."""
    trainer = run(train_flags, max_steps=1, save_strategy="no")
    batch = trainer.eval_collator([trainer.eval_dataset[0]])

    class Wrapper(torch.nn.Module):
        def __init__(self, drafter):
            super().__init__()
            self.drafter = drafter

        def forward(self, **inputs):
            return self.drafter(**inputs)

    wrapped = Wrapper(trainer.model)
    trainer.model.eval()
    assert wrapped.training
    with torch.no_grad():
        assert trainer.distillation(wrapped, batch).outcomes is not None


def test_a_second_training_keeps_the_objective_of_the_drafter(train_flags):
    """It isn't compared with the head again, which may be in shards by then."""
    trainer = run(train_flags, max_steps=1)
    before = trainer.distillation
    trainer.args.max_steps, trainer.args.depth_loss_decay = 2, 0.5
    with pytest.raises(PeagleError, match="depth-loss-decay"):
        trainer.train(resume_from_checkpoint=True)
    trainer.args.depth_loss_decay = 1.0
    trainer.train(resume_from_checkpoint=True)
    assert trainer.distillation is before


def test_a_drafter_of_other_layers_than_the_caches_is_refused(train_flags):
    args = PeagleTrainingArguments(**train_flags)
    dataset, _ = build_datasets(args)
    config = PeagleConfig.from_verifier(args.verifier_name_or_path, num_layers=1, target_layer_ids=[1, 5, 6])
    drafter = PeagleForSpeculation(config)
    drafter.load_verifier(args.verifier_name_or_path)
    words = r"of the layers \[2, 3, 4\], but the drafter reads \[1, 5, 6\]"
    with pytest.raises(PeagleError, match=words):
        start_linearly(drafter, dataset)
    with pytest.raises(PeagleError, match=words):
        PeagleTrainer(drafter, args, train_dataset=dataset, eval_dataset=dataset).train()


def test_no_checkpoint_is_saved_where_none_is_wanted(train_flags):
    run(train_flags, save_strategy="no", num_train_epochs=1)
    assert checkpoints_by_step(train_flags["output_dir"]) == {}


def test_a_checkpoint_of_the_model_only_is_not_resumed_from(train_flags):
    run(train_flags, num_train_epochs=1, save_only_model=True)
    with pytest.raises(PeagleError, match="without optimizer and schedule"):
        train(PeagleTrainingArguments(**train_flags))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"remove_unused_columns": True}, "must stay False"),
        ({"optim_args": "momentum=0.9"}, "for the Trainer's own optimizers"),
        ({"sequence_partitions": 0}, "Give a number of parts"),
        ({"dpace_alpha": 0.0}, "--dpace-alpha is 0.0 but must be above 0"),
        ({"dpace_alpha": 1.5}, "--dpace-alpha"),
    ],
)
def test_arguments_that_would_break_or_do_nothing_are_refused(changes, words):
    with pytest.raises(PeagleError, match=words):
        PeagleTrainingArguments(use_cpu=True, **changes)
    assert PeagleTrainingArguments(use_cpu=True, sequence_partitions=4).sequence_partitions == "4"


@pytest.mark.parametrize("head", [{}, {"train_head": True}], ids=str)
def test_row_weights_are_in_the_training_loss_alone(train_flags, tmp_path, head):
    """The first step's loss depends on them, validation before it doesn't, and the record says which they were."""
    common = {"max_steps": 1, "eval_on_start": True, "save_strategy": "no", **head}
    changes = {"even": {"per_position_loss_weight": "uniform"}, "default": {}, "flat": {"dpace_alpha": 1.0}}
    runs = {name: run(train_flags, **common, **own, output_dir=str(tmp_path / name)) for name, own in changes.items()}
    validated = [logged(trainer, "eval_loss")[0] for trainer in runs.values()]
    assert validated == [validated[0]] * 3
    assert len({losses(trainer)[0] for trainer in runs.values()}) == 3
    assert {name: trainer.record()["dpace_alpha"] for name, trainer in runs.items()} == {
        "even": None,
        "default": 0.5,
        "flat": 1.0,
    }


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def losses(trainer):
    return logged(trainer, "loss")


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def full_weights(folder):
    """What training goes on from, of a checkpoint that is served in fewer bits."""
    return load_file(folder / "full_precision" / "model.safetensors")


class StopAt(TrainerCallback):
    """Break off in the middle, as a kill would, without any orderly ending."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_folders_hold_what_vllm_and_a_resume_need(train_flags):
    trainer = run(train_flags)
    output = Path(train_flags["output_dir"])
    assert [folder.name for folder in epoch_folders(output)] == ["0", "1"]
    for number in "01":
        folder = output / number
        wanted = {
            *("config.json", "model.safetensors", "optimizer_state_dict.pt", "scheduler_state_dict.pt"),
            *("full_precision", "trainer_state.json", "rng_state.pth", "training.json", "run.json"),
        }
        assert {path.name for path in folder.iterdir()} == wanted
        assert os.listdir(folder / "full_precision") == ["model.safetensors"]
        for place in (folder, folder / "full_precision"):  # whoever may read one file may read the other
            assert (place / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
        assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        full = full_weights(folder)
        assert full["fc.weight"].dtype == torch.float32
    assert all(torch.equal(full[name], tensor) for name, tensor in weights(trainer).items())
    link = output / "checkpoint_best"
    assert link.is_symlink()
    lengths = logged(trainer, "eval_acceptance_length")
    assert os.readlink(link) == str(lengths.index(max(lengths)))


def test_learning_lowers_the_loss_and_logs_by_depth(train_flags):
    trainer = run(train_flags, num_train_epochs=12, learning_rate=3e-3)
    found = losses(trainer)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert {f"accuracy_{depth}" for depth in range(3)} | {f"acceptance_{depth}" for depth in range(3)} <= log.keys()
    assert log["acceptance_length"] == pytest.approx(1 + sum(log[f"acceptance_{depth}"] for depth in range(3)))


SPOILING = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "per_position_loss_weight": "uniform"}
"""The loss is lowest in a later epoch than that of the highest acceptance length, which is not the last."""


def best_epochs(trainer):
    """By acceptance length, and by loss."""
    lengths, evaluated = logged(trainer, "eval_acceptance_length"), logged(trainer, "eval_loss")
    return lengths.index(max(lengths)), evaluated.index(min(evaluated))


@pytest.mark.parametrize("changes", [{}, {"metric_for_best_model": "loss"}], ids=str)
def test_the_best_has_the_longest_acceptance_unless_told_otherwise(train_flags, changes):
    trainer = run(train_flags, num_train_epochs=3, **SPOILING, **changes)
    by_length, by_loss = best_epochs(trainer)
    assert by_length < by_loss
    best = by_loss if changes else by_length
    assert os.readlink(Path(train_flags["output_dir"]) / "checkpoint_best") == str(best)
    assert trainer.state.best_global_step == 5 * (best + 1)


@pytest.mark.parametrize("limit", [None, 1])
def test_resuming_by_another_metric_compares_no_numbers_of_two_kinds(train_flags, limit, caplog):
    """The loss of the earlier run is no acceptance length; where the best is removed it's the best of the others."""
    changes = {**SPOILING, "load_best_model_at_end": True, "save_total_limit": limit}
    run(train_flags, num_train_epochs=3, metric_for_best_model="loss", **changes)
    kept = [int(folder.name) for folder in epoch_folders(train_flags["output_dir"])]
    trainer = run(train_flags, resume=True, num_train_epochs=4, **changes)
    lengths = logged(trainer, "eval_acceptance_length")
    best = max([*kept, 3], key=lambda epoch: (lengths[epoch], -epoch))
    assert trainer.state.best_metric == lengths[best]
    link = Path(train_flags["output_dir"]) / "checkpoint_best"
    assert os.readlink(link) == str(best)
    loaded = full_weights(link)
    assert all(torch.equal(weights(trainer)[name], tensor) for name, tensor in loaded.items())
    caplog.set_level("INFO")
    run(train_flags, resume=True, num_train_epochs=4, **changes)
    assert "Nothing is left to train: the checkpoint is of step 20, and these arguments end at step 20." in caplog.text


def test_schedules_that_follow_the_metric_know_which_way_is_better(train_flags):
    follow = {**train_flags, "lr_scheduler_type": "reduce_lr_on_plateau"}
    assert PeagleTrainingArguments(**follow).lr_scheduler_kwargs == {"mode": "max"}
    assert PeagleTrainingArguments(**follow, metric_for_best_model="loss").lr_scheduler_kwargs == {"mode": "min"}
    told = PeagleTrainingArguments(**follow, lr_scheduler_kwargs={"mode": "min", "patience": 3})
    assert told.lr_scheduler_kwargs == {"mode": "min", "patience": 3}


def test_evaluation_loss_is_the_mean_over_rows_however_they_are_batched(train_flags):
    one = run(train_flags, max_steps=1).evaluate()
    elsewhere = train_flags["output_dir"] + "-of-two"
    many = run(train_flags, max_steps=1, output_dir=elsewhere, per_device_eval_batch_size=2).evaluate()
    assert one["eval_loss"] == pytest.approx(many["eval_loss"], rel=1e-5)
    assert one["eval_acceptance_length"] == many["eval_acceptance_length"]


def test_evaluation_drops_no_row(train_flags):
    """Its metrics are those of offline acceptance on the same rows, here in several parts, whatever COD's ratios."""
    trainer = run(train_flags, max_steps=1, num_depths=8)
    evaluated = trainer.evaluate()
    counters, by_context, expected_by_method = count(trainer.model, trainer.distillation, trainer.eval_dataset)
    assert expected_by_method == {}  # only a SamplingObjective has these expectations
    expected = summarize(torch.cat([counters[:2], by_context.sum(0)]))
    assert {name: evaluated[f"eval_{name}"] for name in expected} == expected
    assert evaluated["eval_anchor_acceptance_length"] == summarize(counters)["acceptance_length"]
    packed = [trainer.eval_dataset[number] for number in range(len(trainer.eval_dataset))]
    assert len(partition_every_slot(trainer.eval_collator(packed))) > 1
    # The reply's first token isn't learnt.
    runs = [int(document["loss_mask"].sum()) - 1 for row in packed for document in row["documents"]]
    assert counters[0].tolist() == [sum(max(0, learnt - depth) for learnt in runs) for depth in range(8)]
    trainer.eval_collator = replace(trainer.eval_collator, down_sample_ratio=0.1, down_sample_ratio_min=0.0, seed=5)
    assert trainer.evaluate()["eval_loss"] == evaluated["eval_loss"]


@pytest.mark.parametrize("source", ["0", "checkpoint_best", True])
def test_resume_is_bit_equal(train_flags, tmp_path, source):
    whole = run(train_flags)
    with pytest.raises(KeyboardInterrupt):
        run(train_flags, [StopAt(7)], output_dir=str(tmp_path / "cut"))
    resume = source if source is True else str(tmp_path / "cut" / source)
    resumed = run(train_flags, resume=resume, output_dir=str(tmp_path / "cut"))
    assert resumed.state.global_step == whole.state.global_step == 10
    assert losses(resumed) == losses(whole)
    ours = weights(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights(resumed).items())
    assert [folder.name for folder in epoch_folders(tmp_path / "cut")] == ["0", "1"]


@pytest.mark.parametrize("changes", [{}, {"max_steps": 9}, {"dataloader_num_workers": 2}], ids=str)
def test_resume_in_the_middle_of_an_epoch_is_bit_equal(train_flags, tmp_path, changes):
    whole = run(train_flags, **changes)
    cut = {"output_dir": str(tmp_path / "cut"), "save_strategy": "steps", "save_steps": 3, **changes}
    with pytest.raises(KeyboardInterrupt):
        run(train_flags, [StopAt(8)], **cut)
    resumed = run(train_flags, resume=True, **cut)
    assert resumed.state.global_step == changes.get("max_steps", 10)
    assert losses(resumed) == losses(whole)
    ours = weights(whole)
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights(resumed).items())


def test_max_steps_in_the_middle_of_an_epoch_writes_its_folder(train_flags):
    run(train_flags, max_steps=7)
    assert [folder.name for folder in epoch_folders(train_flags["output_dir"])] == ["0", "1"]


def test_save_total_limit_keeps_best_and_last(train_flags):
    trainer = run(train_flags, num_train_epochs=5, save_total_limit=2, **SPOILING)
    output = Path(train_flags["output_dir"])
    best = str(best_epochs(trainer)[0])
    assert [folder.name for folder in epoch_folders(output)] == [best, "4"]
    assert os.readlink(output / "checkpoint_best") == best


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_model_is_loaded_at_the_end(train_flags, limit):
    """At a rate that spoils the drafter the last epoch isn't the best; `checkpoint_best` is what is loaded."""
    trainer = run(train_flags, num_train_epochs=3, load_best_model_at_end=True, save_total_limit=limit, **SPOILING)
    output = Path(train_flags["output_dir"])
    number = best_epochs(trainer)[0]
    assert number < 2
    assert trainer.state.best_model_checkpoint == str(output / str(number))
    assert os.readlink(output / "checkpoint_best") == str(number)
    best = full_weights(output / "checkpoint_best")
    last = full_weights(output / "2")
    assert all(torch.equal(weights(trainer)[name], tensor) for name, tensor in best.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in best.items())
    assert [folder.name for folder in epoch_folders(output)] == ([str(number), "2"] if limit else ["0", "1", "2"])
    assert trainer.evaluate()["eval_loss"] == logged(trainer, "eval_loss")[number]


@pytest.mark.parametrize("metric", ["loss", "acceptance_length"])
def test_early_stopping_ends_where_nothing_improves(train_flags, metric):
    trainer = run(train_flags, [EarlyStoppingCallback(2)], num_train_epochs=9, metric_for_best_model=metric, **SPOILING)
    found = logged(trainer, f"eval_{metric}")
    best = found.index(min(found) if metric == "loss" else max(found))
    assert len(found) == best + 3 < 9
    assert os.readlink(Path(train_flags["output_dir"]) / "checkpoint_best") == str(best)
    assert epoch_folders(train_flags["output_dir"])[-1].name == str(best + 2)


def test_without_validation_the_last_is_linked(train_flags):
    run(train_flags, train_data_ratio=1)
    assert os.readlink(Path(train_flags["output_dir"]) / "checkpoint_best") == "1"


def test_weights_of_a_served_checkpoint_are_trained_in_float32(train_flags, tmp_path):
    run(train_flags, num_train_epochs=1)
    changes = {"output_dir": str(tmp_path / "more"), "train_data_ratio": 1}
    args = PeagleTrainingArguments(**{**train_flags, **changes})
    drafter = PeagleForSpeculation.from_pretrained(Path(train_flags["output_dir"]) / "checkpoint_best")
    assert drafter.mask_hidden.dtype == torch.bfloat16
    drafter.load_verifier(args.verifier_name_or_path, initialize=False, dtype=torch.float32)
    PeagleTrainer(drafter, args)
    assert {weight.dtype for weight in drafter.parameters() if weight.requires_grad} == {torch.float32}


def test_a_seed_of_the_data_changes_the_order_of_rows_alone(train_flags):
    def rows(**changes):
        args = PeagleTrainingArguments(**{**train_flags, "train_data_ratio": 1, **changes})
        trainer = PeagleTrainer(build_drafter(args), args, train_dataset=build_datasets(args)[0])
        return [request.number for request in trainer.get_train_dataloader().batch_sampler.sampler]

    assert rows() == rows(data_seed=42)
    assert sorted(rows()) == sorted(rows(data_seed=7))
    assert rows() != rows(data_seed=7)


def test_from_pretrained_continues_from_the_weights_with_other_depths(train_flags, tmp_path):
    run(train_flags)
    best = str(Path(train_flags["output_dir"]) / "checkpoint_best")
    args = PeagleTrainingArguments(
        **{**train_flags, "output_dir": str(tmp_path / "more"), "from_pretrained": best, "num_depths": 2}
    )
    drafter = build_drafter(args)
    saved = PeagleForSpeculation.from_pretrained(best, dtype=torch.float32).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in drafter.state_dict().items())
    assert drafter.config.speculators_config["proposal_methods"][0]["speculative_tokens"] == 2


@pytest.fixture
def cli_flags(train_flags, tmp_path):
    """The same run under the flag names of speculators."""
    names = {"output_dir": "save_path", "num_train_epochs": "epochs", "logging_steps": "log_freq"}
    return lambda folder: {
        **{names.get(name, name): value for name, value in train_flags.items()},
        "save_path": str(tmp_path / folder),
        "lr": 1e-3,
        "scheduler_type": "linear",
    }


def losses_in(folder):
    state = json.loads((folder / "1" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_cli_yaml_example_and_python_give_the_same_losses(train_flags, cli_flags, tmp_path):
    python = losses(run(train_flags, learning_rate=1e-3, lr_scheduler_type="linear"))
    assert len(python) == 10
    main(["train", *[flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags(cli_flags("cli"))]])
    assert losses_in(tmp_path / "cli") == python
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**cli_flags("yaml"), "lr": 9.0}))
    main(["train", str(tmp_path / "train.yaml"), "--lr", "1e-3"])
    assert losses_in(tmp_path / "yaml") == python
    command = [sys.executable, str(ROOT / "examples" / "train.py"), *flags(cli_flags("example"))]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert losses_in(tmp_path / "example") == python


@pytest.mark.parametrize(
    ("workers", "method"),
    [
        (2, "fork"),
        pytest.param(1, "forkserver", marks=pytest.mark.slow),
        pytest.param(1, "spawn", marks=pytest.mark.slow),
    ],
)
def test_loader_workers_change_no_loss(train_flags, tmp_path, workers, method):
    expected = losses(run(train_flags))
    options = {"dataloader_num_workers": workers, "dataloader_multiprocessing_context": method}
    assert losses(run(train_flags, output_dir=str(tmp_path / "w"), **options)) == expected


def test_accumulation_gives_the_loss_of_the_larger_batch(train_flags, tmp_path):
    """One optimizer step over the same rows: 1 x 2 and 2 x 1 agree to float32 rounding (relative 1e-5 in the loss).

    The weights agree less, as Muon's iteration runs in bfloat16; the test after this one has the exact comparison.
    """
    large = run(train_flags, per_device_train_batch_size=2, max_steps=1)
    small = run(train_flags, gradient_accumulation_steps=2, max_steps=1, output_dir=str(tmp_path / "a"))
    assert losses(small) == pytest.approx(losses(large), rel=1e-5)
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_packing_batches_and_accumulation_change_no_step(train_flags, tmp_path, precision):
    """All documents in one step, in rows of two lengths, one by one or in batches.

    In float64 losses agree to 2e-7 and weights to 1e-8, as logged losses and norms are float32 even then; in float32
    all agree to 1e-5.
    """

    common = {"train_data_ratio": 1, "save_strategy": "no", "max_steps": 1, "lr_scheduler_type": "constant"}
    common |= {"optim": "sgd", "learning_rate": 0.1}

    def step(name, **changes):
        args = PeagleTrainingArguments(
            **{**train_flags, **common, **changes, "output_dir": str(tmp_path / name)},
        )
        drafter = build_drafter(args).to(precision)
        drafter.load_verifier(args.verifier_name_or_path, initialize=False, dtype=precision)
        trainer = PeagleTrainer(drafter, args, train_dataset=build_datasets(args)[0])
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps >= len(trainer.train_dataset)
        trainer.train()
        return losses(trainer), weights(trainer)

    expected_loss, expected = step("whole", total_seq_len=600)
    loss_tolerance, tolerance = (1e-5, 1e-5) if precision == torch.float32 else (2e-7, 1e-8)
    for name, changes in {
        "accumulated": {"total_seq_len": 32, "gradient_accumulation_steps": 20},
        "batched": {"total_seq_len": 64, "per_device_train_batch_size": 20},
        "both": {"total_seq_len": 100, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 5},
        "parts": {"total_seq_len": 600, "sequence_partitions": "3"},
    }.items():
        loss, found = step(name, **changes)
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance), name
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True, "keep_attention": False},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_saving_memory_or_compiling_changes_no_loss(train_flags, tmp_path, changes):
    train_flags |= {"max_steps": 2, "eval_strategy": "no"}
    expected = run(train_flags)
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters
    compiled.clear()
    found = run(train_flags, output_dir=str(tmp_path / "other"), **changes)
    assert (compiled["stats"]["unique_graphs"] >= 5) is ("torch_compile" in changes)
    checkpointing = "torch_compile" not in changes
    assert all(layer.gradient_checkpointing is checkpointing for layer in found.model.layers)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    saved, wanted = (
        load_file(Path(trainer.args.output_dir) / "0" / "model.safetensors") for trainer in (found, expected)
    )
    assert saved.keys() == wanted.keys()


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd", "adamw_torch"])
def test_optimizers_of_the_trainer_lower_the_loss(train_flags, optimizer):
    rate = 0.3 if optimizer == "sgd" else 3e-3
    found = losses(run(train_flags, optim=optimizer, learning_rate=rate, num_train_epochs=6))
    assert sum(found[-5:]) < 0.95 * sum(found[:5])


def test_frozen_embeddings_stay_the_verifiers(train_flags):
    trainer = run(train_flags, embed_requires_grad=False, max_steps=3)
    embedding = load_embedding(train_flags["verifier_name_or_path"], torch.float32)
    assert torch.equal(trainer.model.embed_tokens.weight, embedding)
    assert "embed_tokens.weight" not in {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_unknown_yaml_key_and_flag_are_errors(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("num_layrs: 2\n")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "bad.yaml")])
    assert stopped.value.code != 0
    assert "unknown key num_layrs. Did you mean num_layers?" in capsys.readouterr().err


def test_speculator_type_other_than_peagle_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--speculator-type", "eagle3"])
    assert "peagle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 96}, "mask_token_id 96 is outside the vocabulary of 96"),
        ({"draft_vocab_size": 97}, "97"),
        ({"draft_vocab_size": 0}, "--draft-vocab-size is 0"),
        ({"token_freq_path": "/nowhere/token_freq.pt"}, "/nowhere/token_freq.pt"),
        ({"train_data_ratio": 1.5}, "--train-data-ratio is 1.5"),
        ({"target_layer_ids": [1, 2, 3]}, r"\[2, 3, 4\].*\[1, 2, 3\]"),
        ({"data_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_arguments_are_named(train_flags, changes, message):
    with pytest.raises(PeagleError, match=message):
        train(PeagleTrainingArguments(**{**train_flags, **changes}))


def test_the_verifier_is_that_of_the_cache_unless_one_is_named(train_flags, tmp_path):
    named = train(PeagleTrainingArguments(**train_flags, max_steps=2))
    data = shutil.copytree(train_flags["data_path"], tmp_path / "data")
    flags = {**train_flags, "verifier_name_or_path": None, "data_path": str(data), "output_dir": str(tmp_path / "un")}
    assert losses(train(PeagleTrainingArguments(**flags, max_steps=2))) == losses(named)
    (data / "hidden_states" / "manifest.json").unlink()
    (data / "prepare.json").unlink(missing_ok=True)
    with pytest.raises(PeagleError, match="No verifier is named"):
        train(PeagleTrainingArguments(**flags, resume=False))


def test_one_process_with_several_gpus_is_refused_before_any_work(train_flags, monkeypatch):
    monkeypatch.setattr(PeagleTrainingArguments, "n_gpu", 2)
    with pytest.raises(PeagleError, match=r"2 GPUs are visible to one process.*accelerate launch"):
        PeagleTrainingArguments(**train_flags)
    PeagleTrainingArguments(**train_flags, memory_report=True)


def test_a_cache_of_another_verifier_is_refused_by_both_names(train_flags, tmp_path, tiny_verifier):
    other = shutil.copytree(tiny_verifier, tmp_path / "other-verifier")
    fine_tune(other)
    with pytest.raises(PeagleError, match=f"{tiny_verifier}.*other-verifier"):
        train(PeagleTrainingArguments(**{**train_flags, "verifier_name_or_path": str(other)}))


def test_a_folder_that_can_not_be_resumed_from_is_named(train_flags, tmp_path):
    with pytest.raises(PeagleError, match=str(tmp_path)):
        run(train_flags, resume=str(tmp_path))


def test_resuming_another_configuration_names_the_fields(train_flags):
    run(train_flags, num_train_epochs=1)
    with pytest.raises(PeagleError, match=r"down_sample_ratio \(there 0.7, here 0.5\).*--save-path"):
        run(train_flags, resume=True, down_sample_ratio=0.5)
    with pytest.raises(PeagleError, match=r"transformer_layer_config.num_hidden_layers \(there 2, here 1\)"):
        run(train_flags, resume=True, num_layers=1)


def test_cli_prints_one_paragraph_and_fails(train_flags, capsys, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data-path", "/nowhere", "--verifier-name-or-path", train_flags["verifier_name_or_path"]])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    *log_lines, error = error.splitlines()
    assert not any(line.startswith("peagle-hf") for line in log_lines)
    assert error.startswith("peagle-hf train: ")
    assert "Traceback" not in error


def test_data_in_which_nothing_can_be_learnt_are_refused(train_flags, tiny_verifier, tmp_path):
    """The only assistant token of each row is the first of its answer."""
    rows = [{"input_ids": [3, 5, 6, 7 + index], "loss_mask": [0, 0, 0, 1]} for index in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "data")
    prepare(PrepareArguments(model=str(tiny_verifier), data=[str(tmp_path / "rows.jsonl")], output=data))
    extract(ExtractArguments(model=str(tiny_verifier), preprocessed_data=data))
    with pytest.raises(PeagleError, match=r"None of the \d+ samples of .* has a token to train on"):
        train(PeagleTrainingArguments(**{**train_flags, "data_path": data}))
