"""Folders of checkpoints: one layout, complete whatever kills the process, and whoever damages a file is found out."""

import builtins
import errno
import hashlib
import io
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from test_trainer import StopAt, full_weights, logged, losses, run, weights
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from peagle_hf import PeagleConfig, PeagleError, PeagleTrainer, PeagleTrainingArguments, VllmExportCallback
from peagle_hf.model.served_checkpoint import check_checkpoint
from peagle_hf.training.checkpoints import (
    checkpoints_by_step,
    epoch_folders,
    newest_checkpoint,
    recover,
    remains_of_run,
    resumable_folder,
)
from peagle_hf.training.run import build_datasets, build_drafter, train

FOUR_EPOCHS = {"num_train_epochs": 4, "save_total_limit": 2, "learning_rate": 3e-3}


class Killed(BaseException):
    """The process is gone: nothing that it would still do reaches the disk."""


class Killer:
    """Kills the process at its n-th change of the disk, so that this one and all later ones fail, cleaning up included.

    A file that is being written is left in half.
    """

    CHANGES = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "link", "symlink", "chmod")

    def __init__(self, monkeypatch, at):
        self.at, self.count = at, 0
        for name in self.CHANGES:
            monkeypatch.setattr(os, name, self.kills(getattr(os, name)))
        opened = self.opens(io.open)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(torch, "save", self.writes(torch.save, lambda content, path: path))
        for module, name in ((safetensors.torch, "save_file"), ("transformers.modeling_utils", "safe_save_file")):
            write = self.writes(save_file, lambda tensors, path, *_, **__: path)
            monkeypatch.setattr(*((module, name) if module is safetensors.torch else (f"{module}.{name}",)), write)

    def dies(self):
        self.count += 1
        if self.count > self.at:
            raise Killed
        return self.count == self.at

    def kills(self, change):
        def wrapped(*args, **kwargs):
            if self.dies():
                raise Killed
            return change(*args, **kwargs)

        return wrapped

    def opens(self, open_):
        def wrapped(path, mode="r", *args, **kwargs):
            if isinstance(path, int) or set(mode) <= set("rbt"):
                return open_(path, mode, *args, **kwargs)
            is_dying = self.dies()
            file = open_(path, mode, *args, **kwargs)
            if is_dying:
                file.close()
                raise Killed
            return file

        return wrapped

    def writes(self, write, path_of):
        def wrapped(*args, **kwargs):
            is_dying = self.dies()
            before, self.count = self.count, -(10**9)  # a call within this one doesn't count
            try:
                write(*args, **kwargs)
            finally:
                self.count = before
            if is_dying:
                os.truncate(path_of(*args), os.stat(path_of(*args)).st_size // 2)
                raise Killed

        return wrapped


def content(folder):
    """The digest of each file, but for the record, which has the time that training took."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "training.json"
    }


def visible(folder):
    return {name for name in os.listdir(folder) if not name.startswith(".")}


def leftovers(folder):
    return [name for name in os.listdir(folder) if name.startswith(".") and not name.startswith(".lock")]


def copies(folder, elsewhere):
    """A copy of hard links, as nothing is ever written into a file of a checkpoint."""
    return Path(shutil.copytree(folder, elsewhere, symlinks=True, copy_function=os.link))


def killed_at_each_change(monkeypatch, tmp_path, flags, step, callbacks=()):
    """Train, and at `step` save into copies of the output folder, killed at the first change, the second, and so on.

    Returns:
        The output folder just before, and those copies; the last is of a save that nothing interrupted.
    """
    save, before, found = PeagleTrainer._save_checkpoint, tmp_path / "before", []

    def save_often(trainer, model, trial):
        if trainer.state.global_step != step or found:
            return save(trainer, model, trial)
        output, export = Path(trainer.args.output_dir), trainer.export_callback
        copies(output, before)
        is_superseding = bool(trainer.current_run.superseded)
        while True:
            folder = copies(before, tmp_path / f"killed-{len(found)}")
            found.append(folder)
            trainer.args.output_dir, export.run_folder = str(folder), folder
            trainer.current_run.superseded = remains_of_run(folder) if is_superseding else []
            with monkeypatch.context() as patch:
                killer = Killer(patch, len(found))
                try:
                    save(trainer, model, trial)
                    export.on_save(trainer.args, trainer.state, trainer.control)
                except Killed:
                    continue
                assert killer.count < killer.at
            raise KeyboardInterrupt

    monkeypatch.setattr(PeagleTrainer, "_save_checkpoint", save_often)
    with pytest.raises(KeyboardInterrupt):
        run(flags, callbacks)
    monkeypatch.undo()
    return before, found


@pytest.mark.fault(
    "The process is killed at every rename, removal and write of a save that also removes an older checkpoint",
    "The checkpoint before is there, or the new one with the same bytes as if nothing had happened.",
)
def test_a_save_that_is_killed_at_any_change_leaves_the_old_or_the_new(train_flags, tmp_path, monkeypatch):
    flags = {**train_flags, **FOUR_EPOCHS, "metric_for_best_model": "loss"}
    before, killed = killed_at_each_change(monkeypatch, tmp_path, flags, step=15)
    old, new = content(before / "1"), content(killed[-1] / "2")
    assert sorted(path.name for path in epoch_folders(killed[-1])) == ["1", "2"]
    is_new = []
    for folder in killed:
        check_checkpoint(folder / "checkpoint_best")  # it is sound even before anything is tidied up
        recover(folder)
        newest = resumable_folder(newest_checkpoint(folder))
        assert content(newest) == (new if newest.name == "2" else old)
        is_new.append(newest.name == "2")
        assert leftovers(folder) == []
    assert is_new == sorted(is_new), "once it is there it stays"
    assert len(killed) > 30
    assert 5 < sum(is_new) < len(killed) - 10
    whole = run(train_flags, **FOUR_EPOCHS, output_dir=str(tmp_path / "whole"), metric_for_best_model="loss")
    for folder in (killed[is_new.index(True) - 1], killed[is_new.index(True)]):
        resumed = run(flags, resume=True, output_dir=str(folder))
        assert losses(resumed) == losses(whole)
        assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(resumed).items())
        assert visible(folder) == visible(tmp_path / "whole")
        assert os.readlink(folder / "checkpoint_best") == os.readlink(tmp_path / "whole" / "checkpoint_best")


@pytest.mark.fault(
    "A run with --no-resume is killed at every rename, removal and write of its first save",
    "All checkpoints of the earlier run are there, or the first of the new run and no other.",
)
@pytest.mark.parametrize("save_steps", [5, 2], ids=["of a name that the earlier run has too", "of another name"])
def test_a_new_run_takes_the_place_of_an_earlier_one_at_once(train_flags, tmp_path, monkeypatch, save_steps):
    run(train_flags)
    flags = {**train_flags, "resume": False, "learning_rate": 2e-3, "save_strategy": "steps", "save_steps": save_steps}
    before, killed = killed_at_each_change(monkeypatch, tmp_path, flags, step=save_steps)
    assert {"0", "1", "checkpoint_best", "config.yaml", "run.json", "training.png"} == visible(before)
    earlier = {name: content(before / name) for name in ("0", "1")}
    name = "0" if save_steps == 5 else "checkpoint-2"
    new = {name: content(killed[-1] / name)}
    assert new != earlier
    are_new = []
    for folder in killed:
        recover(folder)
        found = {path.name: content(path) for path in checkpoints_by_step(folder).values()}
        assert found in (earlier, new)
        are_new.append(found == new)
        if found == earlier:
            assert os.readlink(folder / "checkpoint_best") == os.readlink(before / "checkpoint_best")
            assert (folder / "training.png").exists()
        assert leftovers(folder) == []
    assert are_new == sorted(are_new)
    assert 5 < sum(are_new) < len(killed) - 10


@pytest.mark.fault(
    "The process is killed at every change while it puts superseded checkpoints back, or removes them",
    "The next start ends what this one began.",
)
@pytest.mark.parametrize("is_in_place", [False, True], ids=["the new one is missing", "the new one is in its place"])
@pytest.mark.parametrize("new", ["0", "checkpoint-2"])
def test_tidying_up_may_be_killed_too(tmp_path, monkeypatch, new, is_in_place):
    for number in range(100):
        folder = tmp_path / str(number)
        hidden = folder / f".superseded-by-{new}"
        for name in ("0", "1", "2"):
            (hidden / name).mkdir(parents=True)
            (hidden / name / TRAINER_STATE_NAME).write_text(json.dumps({"global_step": int(name), "run": "old"}))
        if is_in_place:
            (folder / new).mkdir()
            (folder / new / TRAINER_STATE_NAME).write_text(json.dumps({"global_step": 2, "run": "new"}))
        with monkeypatch.context() as patch:
            killer = Killer(patch, number + 1)
            with suppress(Killed):
                recover(folder)
        recover(folder)
        assert sorted(os.listdir(folder)) == ([new] if is_in_place else ["0", "1", "2"])
        states = [(path / TRAINER_STATE_NAME).read_text() for path in folder.iterdir()]
        assert all(("new" if is_in_place else "old") in state for state in states)
        if killer.count < killer.at:
            break
    assert number > 3


def test_no_resume_keeps_the_old_checkpoints_until_the_new_run_has_one(train_flags):
    train(PeagleTrainingArguments(**train_flags))
    output = Path(train_flags["output_dir"])
    before = {name: content(output / name) for name in ("0", "1")}
    arguments = (output / "config.yaml").read_text()
    with pytest.raises(KeyboardInterrupt):
        run({**train_flags, "resume": False}, [StopAt(4)])
    assert before == {name: content(output / name) for name in ("0", "1")}
    assert (output / "config.yaml").read_text() == arguments
    train(PeagleTrainingArguments(**{**train_flags, "resume": False, "num_train_epochs": 1}))
    assert visible(output) == {"0", "checkpoint_best", "config.yaml", "run.json", "training.png"}
    assert "num_train_epochs: 1" in (output / "config.yaml").read_text()


def test_a_step_is_saved_once_and_any_saved_step_may_be_the_best(train_flags):
    """Where `save_steps` meets an epoch's end there is the epoch's folder alone, with the validation of both."""
    saved = []

    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = run(train_flags, [Note()], **changes, metric_for_best_model="loss", load_best_model_at_end=True)
    output, names = Path(train_flags["output_dir"]), {5: "0", 10: "1"}
    assert saved == list(range(1, 11))
    found = checkpoints_by_step(output)
    assert {step: folder.name for step, folder in found.items()} == {
        step: names.get(step, f"checkpoint-{step}") for step in range(1, 11)
    }
    for folder in found.values():
        check_checkpoint(folder)
    scores = logged(trainer, "eval_loss")
    best = 1 + scores.index(min(scores))
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(found[best])
    assert os.readlink(output / "checkpoint_best") == found[best].name
    assert all(torch.equal(weights(trainer)[name], tensor) for name, tensor in full_weights(found[best]).items())
    assert "eval_loss" in json.loads((output / "0" / TRAINER_STATE_NAME).read_text())["log_history"][-1]


def test_rotation_counts_all_checkpoints_and_keeps_the_best_and_the_newest(train_flags):
    changes = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = run(train_flags, **changes, save_total_limit=3, metric_for_best_model="accuracy_0", num_train_epochs=3)
    found = checkpoints_by_step(train_flags["output_dir"])
    scores = dict(zip(range(2, 16, 2), logged(trainer, "eval_accuracy_0"), strict=False))
    best = max(scores, key=lambda step: (scores[step], -step))
    assert len(found) == 3
    assert {best, 15} <= found.keys()
    assert os.readlink(Path(train_flags["output_dir"]) / "checkpoint_best") == found[best].name


class Metric(TrainerCallback):
    """Sets the metric of some validations, after they are made and before the best is chosen."""

    def __init__(self, values):
        self.values = values

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        value = self.values.get(state.global_step, metrics["eval_loss"])
        for where in (metrics, state.log_history[-1]):
            if value is None:
                where.pop("eval_loss")
            else:
                where["eval_loss"] = value


@pytest.mark.fault("The metric of the first validation is NaN or infinite", "Another checkpoint is the best.")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_metric_that_is_no_finite_number_is_never_the_best(train_flags, value):
    run(train_flags, [Metric({5: value, 10: value, 15: 9.0})], num_train_epochs=3, metric_for_best_model="loss")
    assert os.readlink(Path(train_flags["output_dir"]) / "checkpoint_best") == "2"
    resumed = run(train_flags, resume=True, num_train_epochs=3, metric_for_best_model="loss")
    assert (resumed.state.best_global_step, resumed.state.best_metric) == (15, 9.0)


def test_several_validations_leave_the_arguments_as_they_are(train_flags):
    args = PeagleTrainingArguments(**train_flags)
    train_dataset, eval_dataset = build_datasets(args)
    for names in (["chats", "seen"], ["other", "chats"]):
        trainer = PeagleTrainer(
            build_drafter(args), args, train_dataset=train_dataset, eval_dataset=dict.fromkeys(names, eval_dataset)
        )
        assert args.metric_for_best_model == "acceptance_length"
        assert trainer.args.metric_for_best_model == f"{names[0]}_acceptance_length"


def test_another_run_never_mixes_with_the_checkpoints_of_a_folder(train_flags, tmp_path):
    run(train_flags)
    output, elsewhere = Path(train_flags["output_dir"]), {**train_flags, "output_dir": str(tmp_path / "elsewhere")}
    with pytest.raises(
        PeagleError, match=r"of the steps 10, which would pass for later ones .* step 5 in .*0\. Remove"
    ):
        run(train_flags, resume=str(output / "0"))
    with pytest.raises(PeagleError, match=r"of the steps 10, "):
        train(PeagleTrainingArguments(**train_flags, resume_from_checkpoint=str(output / "0")))
    run(elsewhere, num_train_epochs=1)
    with pytest.raises(PeagleError, match="elsewhere holds checkpoints of another run"):
        run(elsewhere, resume=str(output / "1"))
    assert [folder.name for folder in epoch_folders(output)] == ["0", "1"]
    third = {**train_flags, "output_dir": str(tmp_path / "third")}
    assert run(third, resume=str(output / "0")).state.global_step == 10


DAMAGED = {
    "optimizer_state_dict.pt": b"cut",
    "scheduler_state_dict.pt": None,
    "rng_state.pth": None,
    "trainer_state.json": b"{",
    "config.json": None,
    "model.safetensors": None,
    "full_precision/model.safetensors": b"cut",
    "full_precision": None,
    "run.json": None,
}
FLIPPED = ("rng_state.pth", "optimizer_state_dict.pt", "scheduler_state_dict.pt")


@pytest.mark.fault(
    "A file of the newest checkpoint is cut short or removed, each in turn",
    "The message names the file, and the checkpoint to go on from instead.",
)
def test_a_damaged_checkpoint_is_named_with_the_one_to_resume_from(train_flags, tmp_path):
    run(train_flags)
    output = Path(train_flags["output_dir"])
    for file, left in DAMAGED.items():
        folder = copies(output, tmp_path / file.replace("/", "-"))
        damaged = folder / "1" / file
        if damaged.is_dir():
            shutil.rmtree(damaged)
        else:
            damaged.unlink()
        if left is not None:
            damaged.write_bytes(left)
        with pytest.raises(PeagleError) as error:
            train(PeagleTrainingArguments(**{**train_flags, "output_dir": str(folder)}))
        assert str(damaged) in str(error.value), file
        assert f"emove {folder / '1'}" in str(error.value)
        if file != "trainer_state.json":
            assert f"training then goes on from {folder / '0'}" in str(error.value)
    shutil.rmtree(folder / "1")
    assert train(PeagleTrainingArguments(**{**train_flags, "output_dir": str(folder)})).state.global_step == 10
    for file in FLIPPED:
        path = output / "1" / file
        whole = path.read_bytes()
        place = whole.index(b"data.pkl") + 200  # within what is pickled, which has no rest that nobody reads
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(PeagleError, match=rf"{path} is damaged .*training then goes on from {output / '0'}"):
            run(train_flags, resume=True)
        path.write_bytes(whole)
    state = json.loads((output / "1" / "trainer_state.json").read_text())
    for damage in ({"log_histpry": []}, {"log_history": [{}]}):
        (output / "1" / "trainer_state.json").write_text(json.dumps(state | damage))
        with pytest.raises(PeagleError, match=rf"trainer_state.json is damaged.*Remove {output / '1'}"):
            run(train_flags, resume=True)
    (output / "1" / "trainer_state.json").write_text(json.dumps(state))
    (output / "7").mkdir()
    (output / "7" / "notes.txt").write_text("a folder of the user's own")
    assert list(checkpoints_by_step(output)) == [5, 10]


@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_saving_changes_no_loss(train_flags, tmp_path, kind):
    """The adapter has dropout, which draws from the global random state."""
    if kind == "adapter":
        run(train_flags, num_train_epochs=1)
        base = Path(train_flags["output_dir"]) / "0"
        train_flags |= {"from_pretrained": str(base), "lora_r": 4, "lora_dropout": 0.3}
    never = run(train_flags, save_strategy="no", eval_strategy="no", output_dir=str(tmp_path / "never"))
    often = run(
        train_flags, save_strategy="steps", save_steps=1, eval_strategy="no", output_dir=str(tmp_path / "often")
    )
    assert losses(often) == losses(never)
    assert all(torch.equal(weights(often)[name], tensor) for name, tensor in weights(never).items())


def test_a_checkpoint_exported_in_float32_holds_its_weights_once(train_flags, tmp_path):
    whole = run(train_flags, export_dtype="float32", output_dir=str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(train_flags, [StopAt(7)], export_dtype="float32")
    output = Path(train_flags["output_dir"])
    assert not (output / "0" / "full_precision").exists()
    assert load_file(output / "0" / "model.safetensors")["fc.weight"].dtype == torch.float32
    assert PeagleConfig.from_pretrained(output / "0").dtype == torch.float32
    assert losses(run(train_flags, resume=True, export_dtype="float32")) == losses(whole)


def test_a_folder_of_checkpoints_can_be_moved(train_flags, tmp_path, caplog):
    run(train_flags, num_train_epochs=1, load_best_model_at_end=True)
    moved = Path(train_flags["output_dir"]).rename(tmp_path / "moved")
    resumed = run(train_flags, resume=True, output_dir=str(moved), load_best_model_at_end=True)
    assert Path(resumed.state.best_model_checkpoint).parent == moved
    assert "does not exist anymore" not in caplog.text


def test_without_links_of_folders_the_best_is_a_copy(train_flags, monkeypatch, caplog):
    monkeypatch.setattr(os, "symlink", no_links)
    run(train_flags)
    output = Path(train_flags["output_dir"])
    best = output / "checkpoint_best"
    assert not best.is_symlink()
    assert content(best) in (content(output / "0"), content(output / "1"))
    assert "is a copy of" in caplog.text
    assert (
        run(train_flags, resume=str(best), num_train_epochs=3, output_dir=str(output) + "-more").state.global_step == 15
    )


def no_links(*args, **kwargs):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_trainer_without_the_callback_writes_the_same_folders(train_flags):
    args = PeagleTrainingArguments(**{**train_flags, "train_data_ratio": 1, "num_train_epochs": 1})
    trainer = PeagleTrainer(build_drafter(args), args, train_dataset=build_datasets(args)[0])
    trainer.train()
    output = Path(train_flags["output_dir"])
    assert os.readlink(output / "checkpoint_best") == "0"
    assert sum(isinstance(one, VllmExportCallback) for one in trainer.callback_handler.callbacks) == 1


def test_a_training_that_would_leave_nothing_is_refused(train_flags):
    with pytest.raises(PeagleError, match="--save-strategy no leaves nothing behind"):
        train(PeagleTrainingArguments(**train_flags, save_strategy="no"))
    assert not Path(train_flags["output_dir"]).exists()


def test_fewer_steps_than_the_checkpoint_has_train_no_further(train_flags, caplog):
    run(train_flags)
    caplog.set_level("INFO")
    trainer = train(PeagleTrainingArguments(**train_flags, max_steps=7))
    assert trainer.state.global_step == 10
    assert "Nothing is left to train: the checkpoint is of step 10" in caplog.text
    assert sorted(checkpoints_by_step(train_flags["output_dir"])) == [5, 10]


def test_the_best_of_a_run_that_ended_within_an_epoch_is_kept(train_flags):
    """A run of two steps is saved as epoch 0, and so is the end of the next run, which here is worse."""
    flags = {**train_flags, "metric_for_best_model": "loss", "greater_is_better": True}
    run(flags, max_steps=2)
    second = train(PeagleTrainingArguments(**{**flags, "max_steps": 4}))
    before, after = logged(second, "eval_loss")
    assert before > after
    folder = Path(train_flags["output_dir"])
    assert sorted(checkpoints_by_step(folder)) == [2, 4]
    assert json.loads((folder / "checkpoint_best" / TRAINER_STATE_NAME).read_text())["global_step"] == 2


def test_callbacks_may_be_added_when_a_training_is_resumed(train_flags):
    run(train_flags, num_train_epochs=1)
    args = PeagleTrainingArguments(**{**train_flags, "num_train_epochs": 2})
    train_dataset, eval_dataset = build_datasets(args)
    trainer = PeagleTrainer(build_drafter(args), args, None, train_dataset, eval_dataset)
    trainer.add_callback(EarlyStoppingCallback(9))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.stateful_callbacks["EarlyStoppingCallback"]


def test_a_second_call_of_train_takes_the_arguments_that_it_finds(train_flags):
    args = PeagleTrainingArguments(**{**train_flags, "num_train_epochs": 1, "lr_scheduler_type": "constant"})
    trainer = PeagleTrainer(build_drafter(args), args, None, *build_datasets(args))
    trainer.train()
    trainer.args.learning_rate, trainer.args.num_train_epochs = 1e-5, 2
    trainer.train(resume_from_checkpoint=True)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-5}
