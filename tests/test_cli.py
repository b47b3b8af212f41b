"""The command line: help, flags, YAML files, messages and exit codes, for every command."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from enum import EnumMeta
from pathlib import Path

import pytest
import yaml

from peagle_hf import PeagleError, PeagleTrainingArguments
from peagle_hf.arguments import Arguments, check_ranges, command_text, config_path, config_text, write_config
from peagle_hf.cli import COMMANDS, main
from peagle_hf.cli.parsing import GENERAL, TRAINER, CommandParser, flags, parse_arguments, read_yaml
from peagle_hf.cli.speculators import COUNTERPARTS, counterpart
from peagle_hf.data.extract import ExtractArguments
from peagle_hf.data.prepare import PrepareArguments
from peagle_hf.evaluation.arguments import EvaluateArguments
from peagle_hf.serving.launch import LaunchArguments

PROGRAM = [str(Path(sys.executable).with_name("peagle-hf"))]
VALUES = {int: "3", float: "0.5", str: "word"}


def printed(capsys, *argv, code=0):
    """What a command line prints before it ends with a code."""
    try:
        main(list(argv))
        ended = 0
    except SystemExit as stopped:
        ended = stopped.code
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out + captured.err


def parser_of(name):
    return CommandParser(COMMANDS[name].load()[1], COMMANDS[name].positional, prog=f"peagle-hf {name}")


def test_help_shows_a_default_of_zero(capsys):
    """0 equals False, whose flags show no default."""
    text = " ".join(printed(capsys, "help", "regenerate").split())
    assert "Seed of all sampling. (default: 0)" in text
    assert "0 is greedy. (default: 0.0)" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_each_flag_once_in_groups_with_examples_that_parse(name, capsys):
    text = printed(capsys, name, "--help")
    assert printed(capsys, "help", name) == text
    everything = printed(capsys, name, "--help-all") if name == "train" else text
    assert (f"{TRAINER}:" in everything) is (name == "train")
    assert f"{TRAINER}:" not in text
    assert "(default: None)" not in everything
    assert "(default: False)" not in everything
    assert name != "train" or "--gradient-checkpointing The older name of --activation-checkpointing." in " ".join(
        text.split()
    )
    for action in parser_of(name)._actions:
        # Python 3.14 does this when an argument is added, so that a bare % ends every command there.
        assert action.help == argparse.SUPPRESS or action.help % (vars(action) | {"prog": "peagle-hf"})
        shown = [option for option in action.option_strings if option.startswith("--")]
        lines = [
            line[2:].partition("  ")[0].replace(",", "").split()
            for line in everything.splitlines()
            if line.startswith("  -")
        ]
        if not action.dest.startswith(("fsdp", "deepspeed")):
            spelling = shown[-1].replace("_", "-")
            assert sum(spelling in words for words in lines) == 1, f"{spelling} of {name}"
        assert not any("_" in word for words in lines for word in words if word.startswith("--"))
    for one in fields(COMMANDS[name].load()[1]):
        if one.default is MISSING and one.default_factory is MISSING and one.name not in COMMANDS[name].positional:
            place = everything.index(f"--{one.name.replace('_', '-')}")
            assert "(required)" in everything[place : place + 1200]
    assert ("--help-all" in text) is (name == "train"), "the other commands have no more to show"
    for example in COMMANDS[name].examples:
        program, *argv = example.split()
        assert program == name
        assert example in text
        if not example.startswith("run "):  # the file of `run` is an example, too
            printed(capsys, *argv_before_rest([program, *argv]), "--print-config")


def argv_before_rest(argv):
    return argv[: argv.index("--")] if "--" in argv else argv


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_parsed(name):
    """Every spelling of every flag, with a value of its kind, sets its field."""
    parser = parser_of(name)
    for action in parser._actions:
        if action.dest in ("help", "help_all", "quiet", "verbose", "print_config", "parallelism_config"):
            continue
        word = str(next(iter(action.choices))) if action.choices else VALUES.get(action.type, "true")
        word = '{"a": 1}' if action.type is json.loads else word
        word = next(iter(action.type)).value if isinstance(action.type, EnumMeta) else word
        for option in action.option_strings:
            for argv in ([option, word], [f"{option}={word}"]) if action.nargs != 0 else ([option],):
                ((dest, complete),) = parser._split(argv)
                namespace, left = argparse.ArgumentParser.parse_known_args(bare(parser), [complete])
                assert (dest, left) == (action.dest, [])
                assert getattr(namespace, dest) not in (None, []) or action.type is not str


def bare(parser):
    """The parser with nothing required."""
    for action in parser._actions:
        action.required = False
    return parser


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_stands_in_one_group(name):
    arguments = COMMANDS[name].load()[1]
    named = [one for names in arguments.GROUPS.values() for one in names]
    assert len(named) == len(set(named))
    known = {one.name for one in fields(arguments) if one.init}
    if name == "train":
        own = set(PeagleTrainingArguments.__annotations__) & known
        hidden = {
            "activation_checkpointing_kwargs",
            "log_level",
            "dataloader_pin_memory",
            "logging_nan_inf_filter",
            "remove_unused_columns",
        }
        assert own - set(named) <= hidden | {"ddp_broadcast_buffers", "ddp_find_unused_parameters"}
    else:
        assert set(named) == known
        assert issubclass(arguments, Arguments)


def test_the_overview_imports_neither_torch_nor_transformers_and_answers_at_once():
    code = (
        "import sys; sys.argv = ['peagle-hf', '--help']; from peagle_hf.cli import main; main(); "
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules), 'a heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    before = os.times().children_user + os.times().children_system
    for argv in (["--help"], ["--version"], []):
        done = subprocess.run([*PROGRAM, *argv], capture_output=True, text=True, timeout=120, check=True)
    assert "transformers 5." in subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True).stdout
    assert os.times().children_user + os.times().children_system - before < 4  # seconds of CPU time for four


def test_importing_the_package_registers_the_auto_classes():
    code = (
        "import sys, peagle_hf; from transformers import CONFIG_MAPPING, AutoModel; "
        "assert CONFIG_MAPPING['speculators'].__name__ == 'PeagleConfig'; "
        "assert AutoModel._model_mapping[peagle_hf.PeagleConfig] is peagle_hf.PeagleForSpeculation"
    )
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


MIGRATION = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
COMMAND_OF = {"prepare-data": "prepare", "generate-offline-data": "extract", "regenerate-responses": "regenerate"}


@pytest.mark.parametrize(
    "theirs", ["prepare-data", "launch_vllm.py", "generate-offline-data", "train", "regenerate-responses"]
)
def test_flags_of_speculators_are_explained_as_in_the_guide(theirs):
    """Each of the guide's rows is a flag of the command, or what its message says; every flag it names exists."""
    [section] = re.findall(rf"^## {theirs}\b.*?\n(.*?)(?=^## )", MIGRATION, re.M | re.S)
    parser = parser_of(COMMAND_OF.get(theirs, theirs.removesuffix(".py").replace("_", "-")))
    for row in re.findall(r"^\| `--.*$", section, re.M):
        names, here, *_ = row.strip("| ").split(" | ")
        names_there = re.findall(r"`(--[\w*-]+)`", names)
        known = {name for name in names_there if name in parser._option_string_actions}
        if "**same**" in here:
            assert known == {*names_there}, row
            continue
        listed, whole = re.findall(r"`(.+?)`", here), here.replace("`", "")
        others = listed if len(listed) == len(names_there) > 1 else [whole] * len(names_there)
        for flag, other in zip(names_there, others, strict=True):
            if flag in known:
                assert flag == other
                continue
            assert counterpart(flag) == other, row
            assert other in parser._suggestion(flag), row
            if other.startswith("--"):
                assert parser._option_string_actions.keys() >= {*re.findall(r"--[\w-]+", other)}


def test_every_explained_flag_stands_in_the_guide():
    assert [flag for flag in COUNTERPARTS if f"`{flag}`" not in MIGRATION] == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["prepar"], "Did you mean prepare?"),
        (["train", "--learning-rte", "1"], "unknown flag --learning-rte. Did you mean --learning-rate?"),
        (["train", "--learning_rte=1"], "Did you mean --learning-rate?"),
        (["train", "--num-workers", "4"], "speculators has this flag; here it is --dataloader-num-workers."),
        (["train", "--muon-lr", "1"], "here it is --optim."),
        (["train", "--checkpoint-freq=1"], "here it is --save-strategy steps --save-steps N."),
        (["train", "--save-best"], "here it is not needed, so leave it out."),
        (["evaluate", "--checkpoint-freq=1"], "`peagle-hf evaluate --help` lists all"),
        (["extract", "--bogus-thing"], "`peagle-hf extract --help` lists all"),
        (["train", "--num-layers", "many"], "invalid int value: 'many'"),
        (["train", "--num-layers"], "expected one argument"),
        (["prepare", "--model", "m", "--data", "a", "b", "--output", "o", "left"], "unexpected argument 'left'"),
        (["launch-vllm", "--hidden-states-path", "x"], "required: MODEL"),
        (["cache", "show", "folder"], "invalid choice: 'show'"),
        (["train", "--loss-fn", '{"kl_div": }'], "--loss-fn is not valid JSON"),
        (["train", "--optim-args"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_line(argv, words, capsys):
    text = printed(capsys, *argv, code=2)
    assert words in text
    if argv[0] in COMMANDS:
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["MODEL", "--hidden-states-path", "x", "--trust-remote-code", "--target-layer-ids", "1", "2"],
        ["--hidden-states-path", "x", "MODEL", "--trust-remote-code", "--target-layer-ids", "1", "2"],
        ["--hidden-states-path", "x", "--trust-remote-code", "MODEL", "--target-layer-ids", "1", "2"],
        ["--hidden-states-path", "x", "--trust-remote-code", "true", "--target-layer-ids", "1", "2", "MODEL"],
        ["--hidden_states_path=x", "--target_layer_ids", "1", "--target-layer-ids=2", "--trust-remote-code", "MODEL"],
        ["--verifier", "MODEL", "--trust_remote_code=yes", "--target-layer-ids", "1", "2", "--hidden-states-path=x"],
    ],
)
def test_the_model_may_stand_anywhere(argv):
    parsed = parse_arguments(LaunchArguments, argv, positional=("model",))
    assert (parsed.model, parsed.target_layer_ids, parsed.trust_remote_code) == ("MODEL", [1, 2], True)


def test_help_shows_defaults_of_0_and_the_order_of_the_groups(capsys):
    shown = printed(capsys, "train", "--help")
    places = [shown.index(f"  {flag}") for flag in ("--verifier-name-or-path", "--data-path", "--output-dir")]
    assert places == sorted(places)
    assert "Seed of all sampling. (default: 0)" in " ".join(printed(capsys, "regenerate", "--help").split())


def test_a_repeated_list_flag_extends_and_takes_the_place_of_the_default():
    needed = ["--model", "m", "--output", "o"]
    parsed = parse_arguments(EvaluateArguments, [*needed, "--suite", "a", "b", "--prompts", "c"])
    assert (parsed.suite, parsed.concurrency) == (["a", "b", "c"], [16])
    parsed = parse_arguments(EvaluateArguments, [*needed, "--suite", "a", "--concurrency", "1", "--concurrency=4"])
    assert parsed.concurrency == [1, 4]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("prepare", ["--verifier", "--data-path"]),
        ("regenerate", ["--verifier"]),
        ("extract", ["--verifier", "--data-path"]),
        ("launch-vllm", ["--verifier"]),
        ("data", ["--verifier", "--data-path"]),
        ("cache", ["--data-path"]),
        ("train", ["--verifier", "--data-path"]),
        ("serve", ["--verifier", "--drafter"]),
        ("acceptance", ["--verifier", "--drafter", "--data-path"]),
        ("evaluate", ["--verifier", "--drafter"]),
        ("push", ["--verifier", "--drafter"]),
    ],
)
def test_one_name_for_one_thing(name, flags):
    parser = parser_of(name)
    assert all(parser.field_of(flag) for flag in flags)


YAML = """
no_norm_before_residual: true
lr: 2e-3
no-linear-start: false
eval_strategy: no
report_to: [tensorboard, wandb]
scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-5}
epochs: ~
output_dir: ~/there
num-layers: 2
use_cpu: true
"""


def test_a_yaml_file_says_what_flags_say(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "train.yaml"
    path.write_text(YAML)
    args = parse_arguments(PeagleTrainingArguments, [str(path), "--num-layers", "3", "--data-path", "~/data"])
    assert (args.norm_before_residual, args.linear_start) == (False, True)
    assert (args.learning_rate, args.num_train_epochs, args.num_layers) == (2e-3, 5.0, 3)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert (args.output_dir, args.data_path) == (f"{tmp_path}/there", f"{tmp_path}/data")
    assert (args.eval_strategy, args.report_to) == ("no", ["tensorboard", "wandb"])
    assert not list(tmp_path.glob("~*"))
    as_json = tmp_path / "train.json"
    as_json.write_text(json.dumps({"lr": 1e-5, "num_layers": 2, "use_cpu": True, "draft_arch": None}, indent=4))
    args = parse_arguments(PeagleTrainingArguments, [str(as_json)])
    assert (args.learning_rate, args.num_layers, args.draft_arch) == (1e-5, 2, None)


@pytest.mark.fault("A YAML file of arguments is damaged", "An error names the file and the line.")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a", "must hold a mapping"),
        (b"", "must hold a mapping"),
        (b"a: [", "not valid YAML"),
        (b"lr: 1\nlr: 2", "the key 'lr' appears twice"),
        (b"1: 2", "the key 1"),
        ("größe: 1".encode("latin-1"), "not UTF-8 text (byte 2)"),
        (None, "no file"),
        ("folder", "is a folder"),
    ],
)
def test_a_yaml_file_that_can_not_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "broken.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(PeagleError, match=words.replace("(", r"\(").replace(")", r"\)")) as refused:
        read_yaml(path)
    assert str(path) in str(refused.value)


def test_a_damaged_json_file_is_not_called_yaml(tmp_path):
    (tmp_path / "broken.json").write_text('{"lr": ')
    with pytest.raises(PeagleError, match=r"broken\.json is not valid JSON.* line 1"):
        read_yaml(tmp_path / "broken.json")


@pytest.mark.fault("A YAML file holds a value of the wrong kind", "An error names the file, the field and the value.")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("num_layrs: 2", "unknown key num_layrs. Did you mean num_layers?"),
        ("num_workers: 2", "unknown key num_workers. speculators has this flag; here it is dataloader_num_workers."),
        ("no_linear_start: 3", "no_linear_start is a switch"),
        ("num_layers: [1, 2]", "num_layers takes one value"),
        ("target_layer_ids: [2, null, 4]", "target_layer_ids has an empty item"),
        ("num_layers: two", "invalid int value"),
        ("save_path: ''", "--output-dir is empty"),
    ],
)
def test_a_bad_value_in_a_yaml_file_is_named(tmp_path, content, words, capsys):
    path = tmp_path / "train.yaml"
    path.write_text(content)
    text = printed(capsys, "train", str(path), code=1 if "is empty" in words else 2)
    assert words in text


@pytest.mark.parametrize("section", ["train: 3", "train: [a]", "train: words", "train:"])
def test_a_section_of_a_pipeline_that_is_no_mapping_is_named(tmp_path, section, capsys):
    path = tmp_path / "pipeline.yaml"
    path.write_text(f"output: {tmp_path}\n{section}\n")
    text = printed(capsys, "run", str(path), code=2 if section in ("train:", "train: [a]") else 1)
    assert "train" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "argv"),
    [
        (PrepareArguments, ["--model", "a b", "--data", "x:y", "ü.jsonl", "--seq-length", "64", "--overwrite"]),
        (ExtractArguments, ["--model", "m", "--target-layer-ids", "0", "3", "--storage", "fp8"]),
        (PeagleTrainingArguments, ["--verifier", "m", "--lr", "2e-3", "--no-linear-start", "--use-cpu", "true"]),
        (
            PeagleTrainingArguments,
            [
                "--use-cpu",
                "--loss-fn",
                '{"tv": 1.0}',
                "--report-to",
                "none",
                "--save-strategy",
                "no",
                "--save-path",
                "i't",
            ],
        ),
        (
            PeagleTrainingArguments,
            ["--use-cpu", "--scheduler-type", "cosine_with_min_lr", "--lr-scheduler-kwargs", '{"min_lr": 0.1}'],
        ),
        (
            PeagleTrainingArguments,
            ["--use-cpu", "--optim", "adamw_torch", "--train-data-ratio", "1", "--seed", "3"],
        ),
    ],
)
def test_config_yaml_is_read_back(arguments, argv, tmp_path, capsys):
    parsed = parse_arguments(arguments, argv)
    path = config_path(tmp_path, "some")
    write_config(parsed, path, "some")
    again = parse_arguments(arguments, [str(path)])
    assert config_text(again) == config_text(parsed)
    for one in fields(arguments):
        if one.init and one.name != "accelerator_config":
            assert getattr(again, one.name) == getattr(parsed, one.name), one.name
    with pytest.raises(SystemExit):
        parse_arguments(arguments, [*argv, "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(path.read_text())
    assert path.name == "config.yaml"
    assert config_path(tmp_path, "some") == path
    assert config_path(tmp_path, "other").name == "other.yaml"


@pytest.mark.parametrize("name", ["plan", "launch-vllm", "serve", "evaluate"])
def test_vllms_flags_stand_after_the_dashes_or_in_a_list_of_a_file(name, tmp_path, capsys):
    """Word by word, whatever they look like; those of the command line replace those of the file."""
    needed = {"launch-vllm": ["--hidden-states-path", "h"], "evaluate": ["--suite", "s", "--output", "o"]}
    argv = [name, "--model", "m", *needed.get(name, [])]
    words = ["--a", "b\nc", "--d=", "-O3", "", "--overrides", '{"a": "b c"}', "--api-key", "secret"]
    shown = yaml.safe_load(printed(capsys, *argv, "--print-config", "--", *words))
    assert shown["vllm_args"] == [*words[:-1], "***"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(shown))
    again = [name, str(path), "--print-config"]
    assert yaml.safe_load(printed(capsys, *again)) == shown
    assert yaml.safe_load(printed(capsys, *again, "--"))["vllm_args"] == shown["vllm_args"]
    assert yaml.safe_load(printed(capsys, *again, "--", "--seed", "1"))["vllm_args"] == ["--seed", "1"]
    assert "lists all; flags of vLLM stand after --." in printed(capsys, *argv, "--port", "8000", code=2)
    path.write_text(yaml.safe_dump({**shown, "vllm_args": "--tensor-parallel-size 2"}))
    assert 'an item of its own: ["--tensor-parallel-size", "2"]' in printed(capsys, *again, code=1)


def test_a_command_line_ends_with_vllms_flags_without_passwords():
    arguments = EvaluateArguments("m", ["s"], "o", vllm_args=["--tensor-parallel-size", "2", "--hf-token", "secret"])
    line = "peagle-hf evaluate --model m --suite s --output o -- --tensor-parallel-size 2 --hf-token '***'"
    assert command_text(arguments, "evaluate") == line


def test_numbers_out_of_range_are_refused_by_flag():
    class Values:
        few, none, many, nothing = 0, None, [1, -1], float("nan")

    check_ranges(Values, {"none": (1, 2), "few": (0, 1)})
    for name, value in (("few", "0"), ("many", "-1"), ("nothing", "nan")):
        with pytest.raises(PeagleError, match=f"--{name} is {value} but must be at least 1"):
            check_ranges(Values, {name: (1, float("inf"))})


def ended(function, monkeypatch, capsys):
    """The exit code and the lines of a command that does something else."""
    from peagle_hf.data import prepare

    monkeypatch.setattr(prepare, "prepare", function)
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--model", "m", "--data", "d"])
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()


def raising(error):
    def function(arguments):
        raise error

    return function


def test_what_ends_a_command_is_one_paragraph_and_an_exit_code(monkeypatch, capsys):
    code, lines = ended(raising(PeagleError("The row 3 is wrong.")), monkeypatch, capsys)
    assert (code, lines) == (1, ["peagle-hf prepare: The row 3 is wrong."])
    code, lines = ended(raising(KeyboardInterrupt()), monkeypatch, capsys)
    assert code == 130
    assert len(lines) == 1
    code, lines = ended(raising(MemoryError("CUDA out of memory.")), monkeypatch, capsys)
    assert code == 1
    assert "--sequence-partitions auto" in lines[0]

    code, (line,) = ended(raising(KeyError("f1")), monkeypatch, capsys)
    assert code == 1
    assert "unexpected error: KeyError: 'f1'" in line
    log = Path(next(word.rstrip(";") for word in line.split() if word.rstrip(";").endswith(".log")))
    content = log.read_text()
    assert "Traceback" in content
    assert "transformers 5." in content
    assert "prepare --model m --data d" in content
    log.unlink()


@pytest.mark.fault(
    "SIGINT, SIGTERM or SIGHUP to a command", "It ends with exit code 130, 143 or 129 and leaves nothing half written."
)
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_signals_end_a_process_with_their_codes(tmp_path):
    """A real process that waits, as each command does; no traceback, and what it would clean up is cleaned up."""
    code = (
        "import sys, time, pathlib\n"
        "from peagle_hf.console import command_line\n"
        "with command_line('program'):\n"
        "    try:\n"
        "        pathlib.Path(sys.argv[1]).write_text('here')\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        pathlib.Path(sys.argv[1]).unlink()\n"
    )
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        mark = tmp_path / "mark"
        process = subprocess.Popen([sys.executable, "-c", code, str(mark)], stderr=subprocess.PIPE, text=True)
        while not mark.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == expected
        assert not mark.exists()
        assert len(error.strip().splitlines()) == 1


@pytest.mark.fault("A second Ctrl-C while a command ends after the first", "It ends at once, without a traceback.")
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_interrupt_ends_the_process_at_once():
    """Python has much to do at its end, such as waiting for threads, and it is too late to catch anything then."""
    code = (
        "import atexit, signal, time\n"
        "from peagle_hf.console import command_line\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "atexit.register(time.sleep, 60)\n"
        "with command_line('program'):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    said = [process.stderr.readline() for _ in range(2)]
    assert said[1].startswith("program: interrupted."), said
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -signal.SIGINT


@pytest.mark.fault("The program that reads the output ends", "The command ends quietly with exit code 141.")
@pytest.mark.parametrize("words", ["train --help-all", "--help", "--version"])
def test_a_closed_pipe_ends_a_command_quietly(words):
    command = f"{PROGRAM[0]} {words} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # argparse itself takes no notice of a closed pipe


@pytest.mark.fault("A standard stream is closed", "The command does its work all the same.")
@pytest.mark.skipif(os.name != "posix", reason="a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_obstacle(closed, tmp_path):
    code = (
        "import pathlib, sys\n"
        "from peagle_hf.console import command_line\n"
        "with command_line('program'):\n"
        "    print('done', file=sys.stdout)\n"
        "    print('done', file=sys.stderr)\n"
        "    pathlib.Path(sys.argv[1]).write_text('whole')\n"
    )
    shell = ["bash", "-c", f'"$0" "$@" {closed}', sys.executable, "-c", code, str(tmp_path / "file")]
    assert subprocess.run(shell, timeout=300).returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.fault("The disk of a log is full", "One paragraph says so.")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_output_that_finds_no_space_is_no_defect():
    code = "from peagle_hf.console import command_line\nwith command_line('program'):\n    print('done')\n"
    shell = ["bash", "-c", '"$0" "$@" >/dev/full', sys.executable, "-c", code]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=300)
    assert done.stderr.startswith(
        "program: No space is left on the disk of what is written or printed. Free some space"
    )
    assert done.returncode == 1


def test_general_flags_are_said_once():
    assert GENERAL not in {title for name in COMMANDS for title in getattr(COMMANDS[name].load()[1], "GROUPS", {})}


def test_dry_runs_say_what_would_happen_and_write_nothing(tiny_verifier, train_flags, tmp_path, capsys):
    chats = tmp_path / "chats.jsonl"
    rows = [{"input_ids": [4 + row, *range(5, 24)], "loss_mask": [0] * 6 + [1] * 14} for row in range(12)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, model = str(tmp_path / "data"), str(tiny_verifier)
    prepare = ["prepare", "--model", model, "--data", str(chats), "--output", data]
    text = printed(capsys, *prepare, "--dry-run")
    assert f"would read 12 conversations of {chats}" in text
    assert f"would write {data}" in text
    assert not Path(data).exists()
    main(prepare)
    assert "would be kept as it is" in printed(capsys, *prepare, "--dry-run")

    text = printed(capsys, "extract", "--data-path", data, "--dry-run")  # the verifier is that of prepare.json
    assert f"would run {model}" in text
    assert "would make 12 of 12 samples, 240 tokens" in text
    assert not (Path(data) / "hidden_states").exists()
    main(["extract", "--data-path", data, "--quiet"])
    assert "would make 0 of 12 samples" in printed(capsys, "extract", "--data-path", data, "--dry-run")

    training = {**train_flags, "data_path": data, "verifier_name_or_path": None, "total_seq_len": 40}
    text = printed(capsys, "train", *flags(training), "--dry-run")
    assert "would train on 9 samples in 5 packed sequences of 40 positions and validate on 3 in 2" in text
    assert "would take 10 steps, 5 an epoch" in text
    assert not Path(train_flags["output_dir"]).exists()
    main(["train", *flags(training)])
    state = json.loads((Path(train_flags["output_dir"]) / "1/trainer_state.json").read_text())
    assert state["global_step"] == 10
    assert "would go on from" in printed(capsys, "train", *flags(training), "--dry-run")


def test_the_example_says_errors_in_one_paragraph(train_flags):
    example = str(Path(__file__).parents[1] / "examples" / "train.py")
    argv = [sys.executable, example, *flags({**train_flags, "data_path": "nowhere"})]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: nowhere")


@pytest.mark.fault("The record of a pipeline is damaged", "An error names the file and what to do.")
@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '"words"', '{"extract": "x"}', '{"extract": {}}'),
        '{"extract": {"arguments": {}, "read": {}, "written": null}}',
    ],
)
def test_a_damaged_record_of_a_pipeline_is_named(tmp_path, content, capsys):
    (tmp_path / "pipeline.json").write_text(content)
    (tmp_path / "pipeline.yaml").write_text(f"output: {tmp_path}\nextract: {{model: m, preprocessed_data: d}}\n")
    text = printed(capsys, "run", str(tmp_path / "pipeline.yaml"), code=1)
    assert f"{tmp_path}/pipeline.json is damaged" in text
    assert "Remove it" in text


def test_wrong_paths_and_devices_are_named_with_what_to_do(tmp_path, tiny_verifier, tiny_data, monkeypatch, capsys):
    (file := tmp_path / "notes.txt").write_text("mine")
    extract = ["extract", "--model", str(tiny_verifier), "--preprocessed-data", str(tiny_data)]
    for argv, message in [
        (["extract", "--preprocessed-data", "nowhere"], "nowhere is not a prepared dataset"),
        (["train", "--data-path", "nowhere", "--save-path", str(tmp_path)], "nowhere is not a prepared dataset"),
        ([*extract, "--output", str(file)], "notes.txt is a file, and hidden states are kept in a folder"),
        ([*extract, "--device", "nothing"], "--device nothing can't be used"),
        (["cache", "verify", str(tiny_data.parent)], "holds no hidden states"),
        (["acceptance", "--model", "m", "--data-path", "d", "--output", str(tmp_path)], "is a folder. Name a JSON"),
        (["data", "template", str(tiny_data), "--model", str(tiny_verifier)], "leave out"),
    ]:
        assert message in printed(capsys, *argv, code=1)
    assert file.read_text() == "mine"
    message = printed(
        capsys, "cache", "convert", str(tiny_data / "hidden_states"), str(file), "--storage", "fp8", code=1
    )
    assert "notes.txt is a file" in message

    missing = FileNotFoundError(2, "No such file or directory", "/gone/x")
    code, (line,) = ended(raising(missing), monkeypatch, capsys)
    assert code == 1
    assert "prepare: /gone/x can't be read or written: No such file or directory. Check that path" in line
    Path(next(word.rstrip(";") for word in line.split() if word.rstrip(";").endswith(".log"))).unlink()


def test_messages_about_flags_name_them_once_and_the_wrong_value(capsys):
    assert "--target-layer-ids: invalid int value: 'a'" in printed(capsys, "extract", "--target-layer-ids", "a", code=2)
    assert "--model/--drafter, --repo-id\n" in printed(capsys, "push", code=2)
    argv = ["--model", "m", "--data", "d", "--chat-template", "{% if x %}", "--output", "out"]
    assert parse_arguments(PrepareArguments, argv).chat_template == "{% if x %}"
    assert "not valid JSON" in printed(capsys, "prepare", *argv, "--chat-template-kwargs", "{a}", code=2)
