"""A run knows what it is made from: what a resume may change takes effect, what it may not is refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import short_run
from safetensors.torch import load_file, save_file
from test_trainer import logged, losses, run, weights

from peagle_hf import PeagleError, PeagleTrainingArguments
from peagle_hf.files import locked_folder
from peagle_hf.training.checkpoints import checkpoints_by_step, newest_checkpoint
from peagle_hf.training.record import RUN_RECORD, RunRecord
from peagle_hf.training.resume_rules import (
    BY_CONTENT,
    EQUIVALENT,
    FREE,
    ON_RESUME,
    REFUSED,
    changes_between,
    check_resume,
)
from peagle_hf.training.run import build_datasets, train


def again(train_flags, **changes):
    return train(PeagleTrainingArguments(**{**train_flags, **changes}))


def test_every_argument_is_free_refused_or_equivalent():
    """Also of a later transformers: a new argument must be put into the table."""
    names = {one.name for one in fields(PeagleTrainingArguments)}
    assert not names - ON_RESUME.keys(), "put these into resume_rules.ON_RESUME"
    assert set(ON_RESUME.values()) == {FREE, REFUSED, BY_CONTENT, EQUIVALENT}


@pytest.fixture(scope="module")
def finished(tiny_verifier, tiny_data, tmp_path_factory):
    """The flags of a run of an epoch."""
    flags = short_run(tiny_verifier, tiny_data, tmp_path_factory.mktemp("finished"))
    flags |= {"num_layers": 1, "num_train_epochs": 1}
    again(flags)
    return flags


def record_of(flags):
    return RunRecord.read(newest_checkpoint(flags["output_dir"]))


def test_the_record_is_in_the_output_folder_and_in_each_checkpoint(finished):
    record = record_of(finished)
    assert record == RunRecord.read(finished["output_dir"])
    assert record.rows_per_step == record.processes == 1
    assert record.device in ("CPU, 1 thread", f"CPU, {torch.get_num_threads()} threads")
    assert record.device != "CPU, 1 threads"
    assert record.samples.startswith("16 (")
    assert record.validation_samples.startswith("4 (")
    assert record.start == "new"
    assert record.optimizer == "muon"
    assert [group["lr"] for group in record.optimizer_settings] == [1e-3] * 3
    assert record.schedule["class"] == "LambdaLR"
    text = (Path(finished["output_dir"]) / RUN_RECORD).read_text()
    assert str(Path(finished["output_dir"]).parent) not in text.replace(finished["verifier_name_or_path"], "")
    assert all(json.loads(text)["arguments"][name] is not None for name in ("seed", "total_seq_len", "loss_fn"))


def test_the_record_is_written_before_the_first_step(train_flags, monkeypatch):
    def no_step(*args, **kwargs):
        assert RunRecord.read(train_flags["output_dir"]).optimizer_settings
        raise KeyboardInterrupt

    monkeypatch.setattr("peagle_hf.training.trainer.PeagleTrainer.training_step", no_step)
    with pytest.raises(KeyboardInterrupt):
        run(train_flags)


OTHERS = {
    "seed": ({"seed": 7}, r"--seed was 42, is 7"),
    "ratio": ({"train_data_ratio": 0.7}, r"--train-data-ratio was 0\.8, is 0\.7"),
    "length": ({"total_seq_len": 48}, r"--total-seq-len was 64, is 48"),
    "loss": ({"loss_fn": "tv"}, r"--loss-fn was kl_div, is tv"),
    "decay": ({"depth_loss_decay": 0.5}, r"--depth-loss-decay was 1, is 0\.5"),
    "optimizer": ({"optim": "adamw_torch"}, r"--optim was muon, is adamw_torch"),
    "head": ({"train_head": True}, r"--train-head was False, is True"),
    "embeddings": ({"embed_requires_grad": False}, r"embed_requires_grad"),
    "depths": ({"num_depths": 2}, r"num_depths \(there 3, here 2\)"),
    "precision": ({"bf16": True}, r"--bf16 was False, is True"),
    "accumulation": (
        {"gradient_accumulation_steps": 2},
        r"there were 1 packed sequence a step \(processes: 1 .* there are 2 packed sequences a step .*"
        r"with --gradient-accumulation-steps 1 each step has the same ones",
    ),
}


@pytest.mark.parametrize(("changes", "words"), OTHERS.values(), ids=OTHERS)
@pytest.mark.fault("A run is resumed with another argument that must stay.", "It is refused with both values.")
def test_another_run_is_refused_and_nothing_is_touched(finished, changes, words):
    before = {path: path.stat().st_mtime_ns for path in Path(finished["output_dir"]).rglob("*.safetensors")}
    with pytest.raises(PeagleError, match=words) as raised:
        again(finished, num_train_epochs=2, **changes)
    assert "--no-resume" in str(raised.value)
    assert before == {path: path.stat().st_mtime_ns for path in Path(finished["output_dir"]).rglob("*.safetensors")}


@pytest.mark.fault("One token of the prepared data is another when a run is resumed.", "The samples are refused.")
@pytest.mark.parametrize("what", ["data", "vocabulary", "drafter"])
def test_other_contents_under_the_same_paths_are_refused(finished, tiny_data, tmp_path, what):
    from datasets import load_from_disk

    changes, words = {}, "the draft vocabulary was"
    if what == "data":
        copy = tmp_path / "data"
        shutil.copytree(tiny_data, copy)
        rows = load_from_disk(str(tiny_data)).with_format(None).to_dict()
        rows["loss_mask"][3][-1] = 1 - rows["loss_mask"][3][-1]
        from datasets import Dataset

        Dataset.from_dict(rows).save_to_disk(str(tmp_path / "new"))
        for path in copy.glob("*.arrow"):
            path.unlink()
        shutil.copytree(tmp_path / "new", copy, dirs_exist_ok=True)
        changes = {"data_path": str(copy)}
        words = "the prepared samples were"
    elif what == "vocabulary":
        torch.save({token: 100 - token for token in range(96)}, tmp_path / "other.pt")
        changes = {"token_freq_path": str(tmp_path / "other.pt")}
    else:
        shutil.copytree(Path(finished["output_dir"]) / "0", tmp_path / "drafter")
        changes = {"from_pretrained": str(tmp_path / "drafter"), "draft_vocab_size": None, "num_layers": 4}
        words = r"the drafter of --from-pretrained was new, config"
    with pytest.raises(PeagleError, match=words):
        again(finished, num_train_epochs=2, **changes)


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_a_new_rate_and_schedule_take_effect(train_flags, caplog, optim):
    caplog.set_level("INFO")
    common = {**train_flags, "optim": optim}
    again(common, num_train_epochs=1)
    step = max(checkpoints_by_step(train_flags["output_dir"]))
    changes = {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "weight_decay": 0.1, "adam_beta2": 0.9}
    trainer = again(common, num_train_epochs=2, **changes)
    assert "learning_rate 0.001 -> 1e-05, lr_scheduler_type cosine -> constant" in caplog.text
    assert "num_train_epochs 1 -> 2" in caplog.text
    assert logged(trainer, "learning_rate")[-step:] == [1e-5] * step
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == [group["initial_lr"] for group in groups] == [1e-5] * len(groups)
    assert groups[0]["weight_decay"] == 0.1
    assert all(group["betas"] == (0.9, 0.9) for group in groups if "betas" in group)
    assert all(state["step"] == 2 * step for state in trainer.optimizer.state.values() if "step" in state)
    record = record_of(train_flags)
    assert record.arguments["learning_rate"] == 1e-5
    assert record.changes[0]["step"] == step
    assert record.changes[0]["learning_rate"] == [1e-3, 1e-5]


def test_more_epochs_go_on_at_the_rate_of_the_longer_schedule(train_flags):
    """Not with a first step at the end of the shorter one, where the rate was 0."""
    again(train_flags, num_train_epochs=1)
    step = max(checkpoints_by_step(train_flags["output_dir"]))
    resumed = logged(again(train_flags, num_train_epochs=2), "learning_rate")
    whole = logged(run(train_flags, output_dir=f"{train_flags['output_dir']} whole"), "learning_rate")
    assert resumed[step:] == whole[step:]
    assert resumed[:step] != whole[:step]


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "cosine"])
def test_a_schedule_of_another_kind_takes_over(train_flags, name):
    kinds = ["reduce_lr_on_plateau", "cosine"]
    again(train_flags, num_train_epochs=1, lr_scheduler_type=name)
    step = max(checkpoints_by_step(train_flags["output_dir"]))
    other = kinds[1 - kinds.index(name)]
    trainer = again(train_flags, num_train_epochs=2, lr_scheduler_type=other, learning_rate=5e-4)
    rate = logged(trainer, "learning_rate")[step]
    assert rate == (5e-4 if other == "reduce_lr_on_plateau" else pytest.approx(2.5e-4, rel=0.35))


def test_an_optimizer_of_ones_own_goes_on_with_its_new_settings(train_flags):
    from peagle_hf import PeagleTrainer
    from peagle_hf.training.run import build_drafter

    def train_with(cls, resume, epochs, **settings):
        args = PeagleTrainingArguments(**{**train_flags, "num_train_epochs": epochs})
        drafter, (train_dataset, eval_dataset) = build_drafter(args), build_datasets(args)
        optimizer = cls([one for one in drafter.parameters() if one.requires_grad], **settings)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        trainer = PeagleTrainer(
            drafter, args, train_dataset=train_dataset, eval_dataset=eval_dataset, optimizers=(optimizer, schedule)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    step = train_with(torch.optim.SGD, None, 1, lr=0.1, momentum=0.9).state.global_step
    same = train_with(torch.optim.SGD, True, 2, lr=0.1, momentum=0.9)
    assert logged(same, "learning_rate")[step] == pytest.approx(0.1 * 0.9**step)
    other = train_with(torch.optim.SGD, True, 3, lr=0.01, momentum=0.5)
    assert logged(other, "learning_rate")[2 * step] == 0.01
    assert other.optimizer.param_groups[0]["momentum"] == 0.5
    with pytest.raises(PeagleError, match="the optimizer was SGD, AdamW now"):
        train_with(torch.optim.AdamW, True, 4, lr=0.1)


def test_accumulation_and_batch_size_are_interchangeable_on_a_resume(train_flags, caplog):
    """The same samples in the same steps, in the middle of an epoch too (losses to 1e-5, with AdamW)."""
    caplog.set_level("INFO")
    common = {**train_flags, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    whole = run(common, gradient_accumulation_steps=2, output_dir=f"{train_flags['output_dir']} whole")
    again(common, gradient_accumulation_steps=2)
    for step, folder in checkpoints_by_step(train_flags["output_dir"]).items():
        if step > 2:
            shutil.rmtree(folder)
    for folder in Path(train_flags["output_dir"]).glob("[0-9]*"):
        shutil.rmtree(folder, ignore_errors=True)
    resumed = again(common, per_device_train_batch_size=2)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert "gradient_accumulation_steps 2 -> 1" in caplog.text


def test_draws_and_left_out_rows_depend_on_how_a_step_is_divided(finished):
    now = record_of(finished)
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    before = replace(now, rows_per_step=2, processes=1, arguments={**now.arguments, **halves})
    two = replace(now, rows_per_step=2, processes=2)
    assert changes_between(before, two)[1] == []
    for name, value in {"lora_dropout": 0.1, "dataloader_drop_last": True}.items():
        both = [replace(one, arguments={**one.arguments, name: value}) for one in (before, two)]
        (refused,) = changes_between(*both)[1]
        assert "processes: 1" in refused
        assert "processes: 2" in refused


@pytest.mark.parametrize(
    ("before", "now", "is_refused"),
    [
        ("none", "FSDP2", False),
        ("FSDP2", "none", False),
        ("ZeRO-2 of 2 processes", "none", True),
        ("none", "ZeRO-3 of 2 processes", True),
        ("ZeRO-2 of 2 processes", "ZeRO-2 of 4 processes", True),
    ],
)
def test_shards_of_an_optimizer_are_refused_under_another_sharding(finished, before, now, is_refused):
    def shown(sharding: str) -> str:
        return "whole" if sharding == "none" else f"divided by {sharding}"

    record = record_of(finished)
    _, refused = changes_between(replace(record, sharding=before), replace(record, sharding=now))
    assert bool(refused) == is_refused
    assert not refused or f"were {shown(before)}, would be {shown(now)} now" in refused[0]


def test_a_moved_run_goes_on_and_knows_its_data(finished, tiny_verifier, tmp_path, monkeypatch):
    """Data, cache, verifier and checkpoints are moved together and named by relative paths from elsewhere."""
    tree = tmp_path / "tree"
    shutil.copytree(finished["data_path"], tree / "data")
    shutil.copytree(tiny_verifier, tree / "verifier")
    paths = {"data_path": "data", "verifier_name_or_path": "verifier", "output_dir": "checkpoints"}
    before = {**finished, **{name: str(tree / path) for name, path in paths.items()}}
    again(before)
    os.rename(tree, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    trainer = again({**finished, **paths}, num_train_epochs=2)
    assert trainer.state.global_step == 2 * min(checkpoints_by_step("checkpoints"))
    whole = run(finished, num_train_epochs=2, output_dir=str(tmp_path / "whole"))
    assert losses(trainer)[:1] == losses(whole)[:1]
    assert record_of({"output_dir": "checkpoints"}).arguments["data_path"] == os.path.join("..", "data")
    assert str(tmp_path) not in (Path("checkpoints") / RUN_RECORD).read_text()
    shutil.copytree(newest_checkpoint("checkpoints"), tmp_path / "copied")
    assert RunRecord.read(tmp_path / "copied").samples == record_of(finished).samples


@pytest.mark.fault("The verifier's weights are others when a run is resumed.", "They are refused.")
def test_another_verifier_under_the_same_path_is_refused(finished, tiny_verifier, tmp_path):
    verifier = tmp_path / "verifier"
    shutil.copytree(tiny_verifier, verifier)
    data = tmp_path / "data"
    shutil.copytree(finished["data_path"], data)
    (data / "hidden_states" / "manifest.json").unlink()  # the manifest's check would refuse it first
    flags = {
        **finished,
        "verifier_name_or_path": str(verifier),
        "data_path": str(data),
        "output_dir": str(tmp_path / "ck"),
    }
    again(flags)
    tensors = load_file(verifier / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, verifier / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeagleError, match="the verifier's weights were config"):
        again(flags, num_train_epochs=2)


@pytest.mark.fault("The optimizer's file is that of another model.", "One paragraph names the file.")
def test_states_of_another_optimizer_are_named(finished, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished["output_dir"], folder, symlinks=True)
    newest = newest_checkpoint(folder)
    path = next(path for path in newest.iterdir() if path.name.startswith("optimizer"))
    path.unlink()
    torch.save(torch.optim.SGD([torch.zeros(2)]).state_dict(), path)
    with pytest.raises(PeagleError, match=rf"The optimizer's states in {path} are those of other parameters"):
        again({**finished, "output_dir": str(folder)}, num_train_epochs=2)


@pytest.mark.fault("run.json is truncated.", "One paragraph names it and what to do.")
def test_a_damaged_record_is_named(finished, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished["output_dir"], folder, symlinks=True)
    path = newest_checkpoint(folder) / RUN_RECORD
    path.unlink()
    path.write_text('{"arguments": ')
    with pytest.raises(PeagleError, match=rf"{path} is damaged.*--no-resume"):
        again({**finished, "output_dir": str(folder)}, num_train_epochs=2)


HOLDER = (
    "import sys, time; from peagle_hf.files import locked_folder\n"
    "with locked_folder(sys.argv[1], ''):\n print('held', flush=True); time.sleep(600)"
)


@pytest.mark.fault("Two trainings write one folder, before the first checkpoint.", "The second is refused at once.")
@pytest.mark.fault("A training is killed with SIGKILL.", "The lock that it leaves is no obstacle.")
def test_a_second_training_in_a_folder_is_refused_and_a_dead_ones_lock_is_not_in_the_way(train_flags, tmp_path):
    folder = train_flags["output_dir"]
    first = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    words = rf"{folder} is being written by another process \(process {first.pid} on .*\)\. Wait .*another --save-path"
    with pytest.raises(PeagleError, match=words):
        again(train_flags, data_path=str(tmp_path / "not read"))
    with pytest.raises(PeagleError, match=words):
        run(train_flags)
    assert not [name for name in os.listdir(folder) if not name.startswith(".")]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert weights(again(train_flags, num_train_epochs=1))


@pytest.mark.fault("The disk has no file locks.", "A file with host and process id stands for the lock.")
def test_without_file_locks_a_named_holder_stands_for_them(tmp_path, monkeypatch):
    import errno

    import filelock

    def no_locks(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    script = HOLDER.replace("import sys", "import errno, filelock, sys").replace(
        "with",
        "def no(*a, **k): raise OSError(errno.ENOLCK, 'No locks available')\nfilelock.FileLock.acquire = no\nwith",
        1,
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    assert first.stdout.readline() == b"held\n"
    with (
        pytest.raises(PeagleError, match=rf"process {first.pid} on .*\)\. Name another"),
        locked_folder(tmp_path, "Name another."),
    ):
        pass
    first.kill()
    first.wait()
    with locked_folder(tmp_path, "Name another."), locked_folder(tmp_path, "Held already."):
        pass


def test_an_argument_that_one_side_does_not_know_is_not_compared(finished):
    record = record_of(finished)
    before = replace(record, arguments={name: value for name, value in record.arguments.items() if name != "seed"})
    assert changes_between(before, replace(record, arguments={**record.arguments, "seed": 1}))[1] == []
    later = replace(record, arguments={**record.arguments, "of_a_later_transformers": 2})
    earlier = replace(record, arguments={**record.arguments, "of_a_later_transformers": 1})
    with pytest.raises(PeagleError, match=r"--of-a-later-transformers was 1, is 2"):
        check_resume(Path("0"), earlier, later, 5)
