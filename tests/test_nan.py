"""NaN and infinity end a training by the step and samples that brought them, and are never saved."""

import math
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainer import run
from test_trainer_arguments import trainer_of
from transformers import Trainer

from peagle_hf import PeagleError, PeagleTrainer, PeagleTrainingArguments
from peagle_hf.data.collator import CODDataCollator
from peagle_hf.files import save_file
from peagle_hf.training.checkpoints import checkpoints_by_step
from peagle_hf.training.run import train


def poison(monkeypatch, step, value, what):
    """At a step make the loss, or one gradient, a number that isn't finite."""
    compute_loss, backward = PeagleTrainer.compute_loss, Trainer.training_step

    def loss_of(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return loss * value if self.state.global_step + 1 == step else loss

    def gradient_of(self, model, *args):
        loss = backward(self, model, *args)
        if self.state.global_step + 1 == step:
            next(iter(model.parameters())).grad.view(-1)[0] = value
        return loss

    if what == "loss":
        monkeypatch.setattr(PeagleTrainer, "compute_loss", loss_of)
    else:
        monkeypatch.setattr(Trainer, "training_step", gradient_of)


@pytest.mark.parametrize(
    ("what", "value", "logging_steps"),
    [
        pytest.param(
            "loss",
            math.nan,
            1,
            marks=pytest.mark.fault("The loss of a step is NaN", "Training ends with the step and its samples."),
        ),
        pytest.param(
            "gradient",
            math.inf,
            100,
            marks=pytest.mark.fault(
                "A gradient is infinite, and nothing is logged", "The next save ends training with the step."
            ),
        ),
    ],
)
def test_a_step_that_is_not_finite_ends_training_by_name(train_flags, monkeypatch, what, value, logging_steps):
    poison(monkeypatch, 7, value, what)
    with pytest.raises(PeagleError, match=rf"ended at step 7, whose {what} is not a finite number") as error:
        run(train_flags, logging_steps=logging_steps)
    output = Path(train_flags["output_dir"])
    assert f"the newest checkpoint is {output / '0'}" in str(error.value)
    assert list(checkpoints_by_step(output)) == [5]
    assert all(tensor.isfinite().all() for tensor in load_file(output / "0" / "model.safetensors").values())


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}], ids=str)
def test_the_samples_of_a_step_are_named(train_flags, monkeypatch, changes):
    """Those that the collator was given for it."""
    batches, given = {}, {}
    collate, step = CODDataCollator.__call__, PeagleTrainer.training_step

    def note_rows(self, features):
        batch = collate(self, features)
        rows = {document["sample_id"] for one in features for document in one["documents"]}
        batches[batch["input_ids"].data_ptr()] = batch, rows
        return batch

    def note_step(self, model, inputs, num_items):
        given.setdefault(self.state.global_step + 1, set()).update(batches[inputs["input_ids"].data_ptr()][1])
        return step(self, model, inputs, num_items)

    monkeypatch.setattr(CODDataCollator, "__call__", note_rows)
    monkeypatch.setattr(PeagleTrainer, "training_step", note_step)
    poison(monkeypatch, 4, math.nan, "gradient")
    with pytest.raises(PeagleError, match="gradient is not a finite number") as error:
        run(train_flags, **changes, num_train_epochs=4)
    named = re.search(r"the samples ([\d, ]+) of", str(error.value))[1]
    assert set(map(int, named.split(", "))) == given[4]


@pytest.mark.fault("Validation gives a loss that is NaN", "Training ends, and the step isn't saved.")
def test_a_validation_that_is_not_finite_ends_training(train_flags, monkeypatch):
    step = PeagleTrainer.prediction_step

    def nan_from_the_second_epoch(self, *args, **kwargs):
        if self.state.global_step == 10:
            self.validation.loss += math.nan
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PeagleTrainer, "prediction_step", nan_from_the_second_epoch)
    with pytest.raises(PeagleError, match=r"ended at the validation of step 10, whose loss is not .* is .*/0\."):
        run(train_flags)
    assert list(checkpoints_by_step(train_flags["output_dir"])) == [5]


@pytest.mark.fault("A cached file holds one NaN", "Training ends with the number of the row.")
@pytest.mark.parametrize("slot", [0, -1], ids=["that the drafter reads", "that it learns from"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_cached_row_that_is_not_finite_is_named(train_flags, tmp_path, slot, workers):
    data = Path(shutil.copytree(train_flags["data_path"], tmp_path / "data"))
    path = data / "hidden_states" / "hs_7.safetensors"
    tensors = load_file(path)
    tensors["hidden_states"][10, slot, 3] = math.nan
    save_file(tensors, path)
    flags = {**train_flags, "data_path": str(data), "linear_start": False, "dataloader_num_workers": workers}
    with pytest.raises(PeagleError, match=r"ow 7 of .*data.*NaN or infinite values"):
        train(PeagleTrainingArguments(**flags))


def test_the_scaler_of_float16_tries_infinities_in_peace(train_flags, monkeypatch):
    """Without a GPU there is no scaler, so only the rule is tried: gradients aren't judged in float16."""
    poison(monkeypatch, 1, math.inf, "gradient")
    trainer = trainer_of(train_flags, {"max_steps": 1, "eval_strategy": "no"})
    trainer.args.fp16 = True
    trainer.train()
    assert trainer.current_run.nan_check.first_bad() is None
