"""`peagle-hf run`: steps in order, finished ones skipped, bad ones found before any starts; the import direction."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import yaml

from peagle_hf import PeagleError, VllmExportCallback, cli
from peagle_hf.arguments import parse_arguments, read_yaml
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
        refused(pipeline, tmp_path, capsys, "an earlier step changed since train was finished")


def refused(pipeline, tmp_path, capsys, words):
    with pytest.raises(SystemExit):
        run(tmp_path, pipeline)
    assert words in capsys.readouterr().err


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


LAYERS = [
    {"errors"},
    {"console", "files"},
    {"arguments", "bootstrap"},
    {"target", "cod", "fusion", "kernels", "metrics", "optimizer", "products", "report"},
    {"configuration_peagle", "attention", "losses"},
    {"modeling_peagle"},
    {"adapters", "data.cache", "data.chats", "data.collator", "data.partition", "generation", "memory", "serving"},
    {"data.endpoint", "data.prepare", "data.prompts", "model_card", "pace", "vllm_plugin.peagle_cpu_connector"},
    {"data.chat_models", "data.dataset", "data.journal"},
    {"client", "data.cache_command", "data.extract", "data.inspection", "data.regenerate"},
    {"callbacks", "linear_start", "training_args", "vllm_process"},
    {"continuing", "evaluation", "hub", "launch", "offline"},
    {"acceptance_metric", "chat", "trainer"},
    {"training"},
    {"cli"},
    {"pipeline"},
]


def test_imports_point_down():
    """A module imports modules of lower layers only; the lazy front (`__init__`, `__main__`) stands above all."""
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert modules.keys() == level.keys()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                parents = name.split(".")[: -node.level]
                imported = ".".join([*parents, *([node.module] if node.module else [])])
                if imported:
                    assert level[imported] < level[name], f"{name} imports {imported}"


def test_examples_import_only_the_package_of_the_project():
    for path in (PACKAGE.parent / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("peagle_hf.")]
