"""`peagle-hf run`: steps in order, finished ones skipped, bad ones found before any starts; the import direction."""

import ast
import errno
import json
import os
import re
import shutil
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_staleness import fine_tune

from peagle_hf import PeagleError, VllmExportCallback, cli
from peagle_hf.cli.parsing import parse_arguments, read_yaml
from peagle_hf.data.prepare import PrepareArguments

PACKAGE = Path(cli.__file__).parent


@pytest.fixture
def pipeline(train_flags, tiny_verifier, tmp_path):
    """A pipeline over ready-made tokens, without the vLLM step."""
    chats = tmp_path / "chats.jsonl"
    rows = [
        {"input_ids": [4 + (5 * row + step) % 80 for step in range(20)], "loss_mask": [0] * 6 + [1] * 14}
        for row in range(12)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "data")
    return {
        "output": str(tmp_path),
        "prepare": {"model": str(tiny_verifier), "data": [str(chats)], "output": data},
        "extract": {"model": str(tiny_verifier), "preprocessed_data": data},
        "train": {**train_flags, "data_path": data, "epochs": 1},
    }


def run(tmp_path, content):
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content))
    cli.main(["run", str(path)])


def test_steps_run_in_order_and_finished_ones_are_skipped(pipeline, tmp_path, caplog):
    del pipeline["train"]["num_train_epochs"]
    pipeline["prepare"]["weights"] = []
    caplog.set_level("INFO")
    run(tmp_path, pipeline)
    assert (tmp_path / "checkpoints" / "checkpoint_best" / "model.safetensors").exists()
    assert list(json.loads((tmp_path / "pipeline.json").read_text())) == ["prepare", "extract", "train"]

    caplog.clear()
    run(tmp_path, pipeline)
    assert [message for message in caplog.messages if message.endswith("finished earlier.")] == [
        "prepare: finished earlier.",
        "extract: finished earlier.",
        "train: finished earlier.",
    ]

    caplog.clear()
    pipeline["train"] |= {"num-train-epochs": 2, "epochs": None, "report-to": pipeline["train"].pop("report_to")}
    run(tmp_path, pipeline)
    assert [message for message in caplog.messages if message.endswith("finished earlier.")] == [
        "prepare: finished earlier.",
        "extract: finished earlier.",
    ]
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_finished_training_does_not_pass_for_another_one(pipeline, tmp_path, capsys):
    run(tmp_path, pipeline)
    best = tmp_path / "checkpoints" / "checkpoint_best" / "model.safetensors"
    pipeline["train"]["learning_rate"] = 5e-4
    refused(pipeline, tmp_path, capsys, "learning_rate changed since train was finished")
    before = best.read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    run(tmp_path, pipeline)
    assert best.read_bytes() != before

    pipeline["prepare"]["seq_length"] = 16
    for section, key in (("prepare", "output"), ("extract", "preprocessed_data"), ("train", "data_path")):
        pipeline[section][key] = str(tmp_path / "shorter")
    for _ in range(2):
        refused(pipeline, tmp_path, capsys, "the prepared dataset, the hidden states changed since train was finished")


def test_a_file_of_settings_that_changed_is_noticed_wherever_it_lies(pipeline, tmp_path, capsys, caplog):
    """Of the Trainer's, and of token counts; the same settings written into the pipeline count as arguments."""
    settings, counts = tmp_path / "settings.json", tmp_path / "counts" / "counts.pt"
    settings.write_text(json.dumps({"non_blocking": True}))
    pipeline["prepare"]["token_freq_path"] = str(counts)
    pipeline["train"]["accelerator_config"] = str(settings)
    run(tmp_path, pipeline)
    (tmp_path / "moved").mkdir()
    settings = settings.rename(tmp_path / "moved" / "settings.json")
    pipeline["train"]["accelerator_config"] = str(settings)
    counts.unlink()
    caplog.set_level("INFO")
    run(tmp_path, pipeline)
    assert "prepare: again, because counts.pt is missing." in caplog.messages
    assert counts.exists()
    settings.write_text(json.dumps({"non_blocking": False}))
    refused(pipeline, tmp_path, capsys, "the file of accelerator_config changed since train was finished")
    pipeline["train"]["accelerator_config"] = {"non_blocking": True}
    refused(pipeline, tmp_path, capsys, "accelerator_config, the file of accelerator_config changed since")


def test_a_checkpoint_to_resume_from_that_changed_is_noticed(pipeline, tmp_path, capsys, caplog):
    """One of another folder; the run's own are among its outputs, and training itself removes old ones."""
    run(tmp_path, pipeline)
    shutil.move(tmp_path / "checkpoints", tmp_path / "earlier")
    shutil.rmtree(tmp_path / "earlier" / "1")
    pipeline["train"]["resume_from_checkpoint"] = str(tmp_path / "earlier" / "0")
    run(tmp_path, pipeline | {"output": str(tmp_path / "second")})
    caplog.set_level("INFO")
    run(tmp_path, pipeline | {"output": str(tmp_path / "second")})
    assert "train: finished earlier." in caplog.messages
    (tmp_path / "earlier" / "0" / "optimizer_state_dict.pt").write_bytes(b"of another training")
    words = "the checkpoint to resume from changed since train was finished"
    refused(pipeline | {"output": str(tmp_path / "second")}, tmp_path, capsys, words)

    pipeline["train"] |= {"resume_from_checkpoint": None, "output_dir": str(tmp_path / "own"), "save_strategy": "steps"}
    pipeline["train"]["save_steps"] = 1
    run(tmp_path, pipeline | {"output": str(tmp_path / "third")})
    shutil.rmtree(tmp_path / "own" / "1")
    own = sorted((tmp_path / "own").glob("checkpoint-*"))[-1]
    pipeline["train"] |= {"resume_from_checkpoint": str(own), "save_total_limit": 1}
    run(tmp_path, pipeline | {"output": str(tmp_path / "fourth")})
    assert not own.exists()
    caplog.clear()
    run(tmp_path, pipeline | {"output": str(tmp_path / "fourth")})
    assert "train: finished earlier." in caplog.messages


def refused(pipeline, tmp_path, capsys, words):
    with pytest.raises(SystemExit):
        run(tmp_path, pipeline)
    assert words in capsys.readouterr().err


def test_a_step_that_only_says_what_it_would_do_is_not_finished(pipeline, tmp_path, capsys, caplog):
    """And it ends the pipeline, as the next step would miss its output; a record of a finished step stays."""
    caplog.set_level("INFO")
    pipeline["prepare"]["dry_run"] = True
    run(tmp_path, pipeline)
    assert "would read 12 conversations" in capsys.readouterr().out
    assert "prepare: not done, because of dry_run; the pipeline ends here." in caplog.messages
    assert not (tmp_path / "pipeline.json").exists()
    del pipeline["prepare"]["dry_run"]
    run(tmp_path, pipeline)
    before = (tmp_path / "pipeline.json").read_text()
    pipeline["train"]["memory_report"] = True
    run(tmp_path, pipeline)
    assert (tmp_path / "pipeline.json").read_text() == before


@pytest.mark.fault("All is done in a folder that can only be read", "The command says so; else it names the folder")
def test_finished_work_is_found_where_nothing_can_be_written(pipeline, tmp_path, tiny_verifier, monkeypatch, caplog):
    run(tmp_path, pipeline)
    data = tmp_path / "data"
    chats = str(tmp_path / "answers.jsonl")
    asked = ["regenerate", "--model", str(with_template(tiny_verifier, tmp_path)), "--prompts", chats]
    (tmp_path / "answers.jsonl").write_text(json.dumps({"turns": ["w1 w2"]}) + "\n")
    asked += ["--output", str(tmp_path / "out" / "answered.jsonl"), "--max-new-tokens", "4", "--max-repetition", "1"]
    cli.main(asked)
    for name in (".manifest.json.0123abcd.tmp", ".peagle-0123456789abcdef.client"):  # what killed processes left
        (data / "hidden_states" / name).touch()
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    caplog.set_level("INFO")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("peagle_hf.files._acquired", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    unlink = os.unlink
    refuse_here = lambda path, **how: refuse() if tmp_path in Path(path).parents else unlink(path, **how)  # noqa: E731
    monkeypatch.setattr(os, "unlink", refuse_here)
    cli.main(["run", str(tmp_path / "pipeline.yaml")])
    cli.main(asked)
    cli.main(["extract", "--preprocessed-data", str(data)])
    training = ["train", str(tmp_path / "checkpoints" / "config.yaml")]
    cli.main(training)
    assert "train: finished earlier." in caplog.messages
    assert any(
        re.search(r"checkpoints/\d is complete: its last step is (\d+), .* at step \1\.", m) for m in caplog.messages
    )
    assert f"{tmp_path / 'out' / 'answered.jsonl'} is complete already." in caplog.messages
    assert "12 of 12 samples are cached; 0 are to be extracted." in caplog.messages
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before
    for others in (["--num-depths", "2"], ["--loss-fn", "tv"], ["--epochs", "9"], ["--no-resume"]):
        with pytest.raises(SystemExit):
            cli.main([*training, *others])
    os.remove(data / "hidden_states" / "hs_3.safetensors")
    os.remove(tmp_path / "out" / "answered.jsonl")
    for command in (["extract", "--preprocessed-data", str(data)], asked):
        with pytest.raises(SystemExit):
            cli.main(command)


def with_template(tiny_verifier, tmp_path):
    """The tiny verifier with a chat template."""
    folder = Path(shutil.copytree(tiny_verifier, tmp_path / "chatting"))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    return folder


def test_a_training_that_was_begun_anew_and_cut_off_goes_on(pipeline, tmp_path, monkeypatch, caplog):
    pipeline["train"]["epochs"] = 2
    run(tmp_path, pipeline)
    pipeline["train"]["learning_rate"] = 5e-4
    shutil.rmtree(tmp_path / "checkpoints")
    monkeypatch.setattr(VllmExportCallback, "on_epoch_begin", cut_off, raising=False)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, pipeline)
    assert stopped.value.code == 130
    monkeypatch.undo()
    caplog.set_level("INFO")
    run(tmp_path, pipeline)
    assert any(message.startswith("Resuming from") for message in caplog.messages)


def cut_off(self, args, state, control, **kwargs):
    if state.epoch >= 1:
        raise KeyboardInterrupt


def data_changed(pipeline, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(chats.read_text().replace("[4, 5,", "[7, 5,"))


def verifier_changed(pipeline, tmp_path):
    fine_tune(Path(pipeline["extract"]["model"]))


def tokens_of_another_dataset(pipeline, tmp_path):
    torch.save({5: 3}, tmp_path / "data" / "token_freq.pt")


def a_state_cut_off(pipeline, tmp_path):
    path = tmp_path / "data" / "hidden_states" / "hs_3.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def states_removed(pipeline, tmp_path):
    shutil.rmtree(tmp_path / "data" / "hidden_states")


def weights_edited(pipeline, tmp_path):
    path = tmp_path / "checkpoints" / "checkpoint_best" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def checkpoints_removed(pipeline, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints")


AGAIN = {
    data_changed: ("prepare: again, because the data changed.", "the content of .*chats.jsonl has changed"),
    verifier_changed: ("extract: again, because the verifier changed.", "other weights or another configuration"),
    tokens_of_another_dataset: ("prepare: again, because ", None),
    a_state_cut_off: ("extract: again, because hidden_states/hs_*.safetensors changed.", None),
    states_removed: ("extract: again, because hidden_states/hs_*.safetensors is missing.", None),
    weights_edited: (None, r"model.safetensors changed since train was finished"),
    checkpoints_removed: ("train: again, because ", None),
}


@pytest.mark.fault("an input or output of a finished pipeline changes", "run names it, and does or refuses the step")
@pytest.mark.parametrize("change", AGAIN)
def test_a_finished_step_is_done_again_when_something_changed(
    pipeline, tmp_path, tiny_verifier, caplog, capsys, change
):
    verifier = shutil.copytree(tiny_verifier, tmp_path / "verifier")
    pipeline["prepare"]["model"] = pipeline["extract"]["model"] = str(verifier)
    pipeline["train"] |= {"verifier_name_or_path": str(verifier), "num_train_epochs": None, "report_to": "none"}
    run(tmp_path, pipeline)
    weights = (tmp_path / "checkpoints" / "checkpoint_best" / "model.safetensors").read_bytes()
    caplog.set_level("INFO")
    log, refusal = AGAIN[change]
    change(pipeline, tmp_path)
    for _ in range(2 if refusal else 1):  # a second try is refused as well
        caplog.clear()
        if refusal:
            with pytest.raises(SystemExit):
                run(tmp_path, pipeline)
            assert re.search(refusal, capsys.readouterr().err)
        else:
            run(tmp_path, pipeline)
        if refusal is None or _ == 0:
            assert log is None or any(message.startswith(log) for message in caplog.messages), caplog.messages
    if refusal is None:
        assert (tmp_path / "checkpoints" / "checkpoint_best" / "model.safetensors").read_bytes() == weights
        caplog.clear()
        run(tmp_path, pipeline)
        assert sum(message.endswith("finished earlier.") for message in caplog.messages) == 3


def test_the_data_of_a_named_split_are_compared_too(pipeline, tmp_path, caplog):
    (tmp_path / "folder").mkdir()
    chats = shutil.move(tmp_path / "chats.jsonl", tmp_path / "folder" / "train.jsonl")
    only = {"output": pipeline["output"], "prepare": pipeline["prepare"] | {"data": [f"{tmp_path}/folder:train"]}}
    run(tmp_path, only)
    chats.write_text(chats.read_text().replace("[4, 5,", "[5, 5,"))
    with pytest.raises(SystemExit):  # prepare keeps a dataset unless it is told to overwrite it
        run(tmp_path, only)
    caplog.set_level("INFO")
    only["prepare"]["overwrite"] = True
    run(tmp_path, only)
    assert "prepare: again, because" in caplog.text


def test_a_training_that_went_on_by_hand_leaves_the_pipeline_usable(pipeline, tmp_path, caplog):
    pipeline["train"] |= {"num_train_epochs": 1, "save_total_limit": 3}
    pipeline["train"].pop("epochs", None)
    run(tmp_path, pipeline)
    best = tmp_path / "checkpoints" / "checkpoint_best"
    shutil.copytree(tmp_path / "checkpoints" / "0", tmp_path / "checkpoints" / "1")
    best.unlink()
    best.symlink_to("1")
    run(tmp_path, pipeline)


def test_a_pipeline_that_is_moved_is_finished_there_too(pipeline, tmp_path, tiny_verifier, caplog, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copytree(tiny_verifier, old / "verifier")
    shutil.move(tmp_path / "chats.jsonl", old)
    pipeline |= {
        "output": ".",
        "prepare": {"model": "verifier", "data": ["chats.jsonl"], "output": "data"},
        "extract": {"model": "verifier", "preprocessed_data": "data"},
    }
    pipeline["train"] |= {"verifier_name_or_path": "verifier", "data_path": "data", "output_dir": "checkpoints"}
    monkeypatch.chdir(old)
    run(old, pipeline)
    monkeypatch.chdir(tmp_path)
    old.rename(new)
    monkeypatch.chdir(new)
    caplog.set_level("INFO")
    run(new, pipeline)
    assert sum(message.endswith("finished earlier.") for message in caplog.messages) == 3


def test_flags_take_the_place_of_a_files_list(tmp_path):
    path = tmp_path / "prepare.yaml"
    path.write_text(yaml.safe_dump({"model": "a", "data": ["one.jsonl", "two.jsonl"], "seq-length": 64, "output": "o"}))
    parsed = parse_arguments(PrepareArguments, [str(path), "--data", "output", "--seq_length=32"])
    assert (parsed.data, parsed.seq_length, parsed.output) == (["output"], 32, "o")
    assert parse_arguments(PrepareArguments, [str(path)]).data == ["one.jsonl", "two.jsonl"]


def test_a_step_that_failed_is_done_again(pipeline, tmp_path):
    del pipeline["train"]["num_train_epochs"]
    broken = {**pipeline, "extract": {**pipeline["extract"], "model": str(tmp_path / "nowhere")}}
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, broken)
    assert stopped.value.code == 1
    assert list(json.loads((tmp_path / "pipeline.json").read_text())) == ["prepare"]
    run(tmp_path, pipeline)
    assert list(json.loads((tmp_path / "pipeline.json").read_text())) == ["prepare", "extract", "train"]


@pytest.mark.parametrize(
    ("change", "word"), [({"trane": {}}, "unknown key trane"), ({"train": {"num_layrs": 2}}, "unknown key num_layrs")]
)
def test_bad_arguments_stop_the_pipeline_before_its_first_step(pipeline, tmp_path, change, word, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, {**pipeline, **change})
    assert word in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("text", "words"), [(None, "no file"), ("a: [", "not valid YAML"), ("- a", "must hold a mapping")]
)
def test_a_yaml_file_that_can_not_be_read_is_named(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PeagleError, match=words) as refused:
        read_yaml(path)
    assert str(path) in str(refused.value)


def test_imports_run_one_way():
    """No two modules import each other, not even by way of others or within a function."""
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    imports = {
        name: {
            ".".join([*name.split(".")[: -node.level], *node.module.split(".")])
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level and node.module
        }
        for name, tree in modules.items()
    }
    TopologicalSorter(imports).prepare()  # raises CycleError


def test_examples_import_only_the_package_of_the_project():
    for path in (PACKAGE.parent / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("peagle_hf.")]
