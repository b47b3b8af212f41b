"""Two processes on a CPU (gloo), under DDP, FSDP2 and DeepSpeed ZeRO, give the training of one process."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import write_prepared
from safetensors.torch import load_file
from test_trainer import ROOT, full_weights, losses, run

from peagle_hf import PeagleTrainingArguments
from peagle_hf.cli import COMMANDS, main
from peagle_hf.cli.parsing import flags
from peagle_hf.console import SHARED_COMMANDS
from peagle_hf.data import extract_share
from peagle_hf.data.cache_manifest import Manifest
from peagle_hf.data.cache_storage import cached_rows, row_path
from peagle_hf.data.dataset import HiddenStatesDataset
from peagle_hf.data.extract import ExtractArguments, extract
from peagle_hf.data.extract_share import Share, device_of, share_of
from peagle_hf.errors import PeagleError
from peagle_hf.model.compile import small_functions
from peagle_hf.training.checkpoints import newest_checkpoint
from peagle_hf.training.record import RunRecord
from peagle_hf.training.run import train
from peagle_hf.training.sharding import require_whole_weights

WORKERS = Path(__file__).parent / "workers"
EXAMPLES = ROOT / "examples" / "accelerate"


def settings(name, section):
    return yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())[section]


FSDP = {
    name.upper().replace("LAYER_CLS", "CLS"): str(value) for name, value in settings("fsdp2", "fsdp_config").items()
}
FSDP |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # as `accelerate launch` sets them


def zero(stage):
    """What `accelerate launch` sets for a DeepSpeed configuration, and that DeepSpeed is to use the CPU."""
    config = settings(f"zero{stage}", "deepspeed_config").items()
    names = {f"ACCELERATE_DEEPSPEED_{name.upper().removesuffix('_FLAG')}": str(value).lower() for name, value in config}
    return names | {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


PROGRAMS = {
    "ddp": (["-m", "peagle_hf"], {}),
    "fsdp2": ([str(WORKERS / "fsdp_on_cpu.py")], FSDP),
    "zero2": (["-m", "peagle_hf"], zero(2)),
    "zero3": (["-m", "peagle_hf"], zero(3)),
}
KINDS = ["ddp", "fsdp2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("zero2", "zero3"))]


def torchrun(program, *arguments, environment=None, processes=2, ends_well=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(
        [*command, *program, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode == 0) == ends_well, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout * ends_well + done.stderr


def launch(kind, train_flags, **changes):
    """Without `use_cpu`, which no user needs to give on a machine without an accelerator."""
    program, environment = PROGRAMS[kind]
    torchrun(program, "train", *flags({**train_flags, **changes, "use_cpu": None}), environment=environment)


def history(folder, metric):
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry[metric] for entry in log if metric in entry]


@pytest.mark.slow
@pytest.mark.parametrize("partitions", ["1", "3"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(train_flags, tmp_path, kind, partitions):
    """Rows that don't divide by two, so that a filler is needed; float32, relative 1e-5 in the losses.

    With AdamW: Muon's iteration runs in bfloat16, which makes more of what other sums leave in the last digits.
    """
    train_flags = {**train_flags, "optim": "adamw_torch_fused"}
    one = run(train_flags, gradient_accumulation_steps=2)
    assert len(one.train_dataset) % 2 == 1
    folder = tmp_path / "two"
    launch(kind, train_flags, output_dir=str(folder), sequence_partitions=partitions)
    assert history(folder / "1", "loss") == pytest.approx(losses(one), rel=1e-5)
    evaluations = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert history(folder / "1", "eval_loss") == pytest.approx(evaluations, rel=1e-5)
    ours, theirs = (Path(path) / "1" for path in (train_flags["output_dir"], folder))
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    assert load_file(ours / "model.safetensors").keys() == load_file(theirs / "model.safetensors").keys()
    expected, found = (full_weights(path) for path in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_two_processes_are_one_with_muon_too(train_flags, tmp_path):
    """To 5e-5 in the losses: its iteration runs in bfloat16."""
    one = run(train_flags, gradient_accumulation_steps=2)
    launch("ddp", train_flags, output_dir=str(tmp_path / "two"))
    assert history(tmp_path / "two" / "1", "loss") == pytest.approx(losses(one), rel=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["data_path", "hidden_states_path"])
def test_the_memory_report_of_several_processes_needs_neither_data_nor_states(train_flags, tmp_path, missing):
    given = {**train_flags, missing: str(tmp_path / "none"), "draft_vocab_size": 16, "memory_report": True}
    printed = torchrun(["-m", "peagle_hf"], "train", *flags({**given, "use_cpu": None}))
    assert printed.count("predicted peak") == 1
    assert printed.count("How long training takes isn't measured: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_equal_on_two_processes(train_flags, tmp_path, kind):
    folder = tmp_path / "two"
    launch(kind, train_flags, output_dir=str(folder))
    kept = tmp_path / "whole"
    (folder / "1").rename(kept)
    launch(kind, train_flags, output_dir=str(folder))
    assert history(folder / "1", "loss") == history(kept, "loss")
    expected, found = (full_weights(path) for path in (kept, folder / "1"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_processes_plan_once_and_log_once(train_flags, tmp_path):
    missing = {"on_missing": "generate", "hidden_states_path": str(tmp_path / "none"), "max_steps": 1, "use_cpu": None}
    command = ["train", *flags({**train_flags, **missing})]
    assert torchrun(["-m", "peagle_hf"], *command, "--dry-run").count("would take") == 1
    printed = torchrun(["-m", "peagle_hf"], *command)
    assert printed.count("The first layer starts from a linear fit") == 1
    assert printed.count("the verifier computes their hidden states") == 2  # of training, and of validation


def test_two_processes_resume_in_the_middle_of_a_later_epoch(train_flags, tmp_path):
    """The rows that follow are those of that epoch, not of the first."""
    folder, kept = tmp_path / "two", tmp_path / "whole"
    steps = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1}
    launch("ddp", train_flags, **steps)
    (folder / "1").rename(kept)
    shutil.rmtree(folder / "checkpoint-5")
    launch("ddp", train_flags, **steps)
    assert history(folder / "1", "loss") == history(kept, "loss")


@pytest.mark.slow
def test_a_run_goes_on_under_another_sharding_and_on_another_number_of_processes(train_flags, tmp_path):
    """FSDP2, DDP and one process go on from each other's checkpoints, in the middle of an epoch too, with AdamW."""
    common = {**train_flags, "optim": "adamw_torch_fused", "save_strategy": "steps", "save_steps": 2}
    common["lr_scheduler_type"] = "constant"  # so that the rate doesn't depend on the run's length
    whole = run(common, gradient_accumulation_steps=2)
    expected = losses(whole)

    def goes_on(name, earlier, kind):
        folder = tmp_path / name
        shutil.copytree(earlier, folder, symlinks=True)
        if kind == "one":
            return losses(train(replace_flags(common, output_dir=str(folder), gradient_accumulation_steps=2)))
        launch(kind, common, output_dir=str(folder))
        return history(newest_checkpoint(folder), "loss")

    begun = {kind: tmp_path / f"begun {kind}" for kind in ("fsdp2", "ddp")}
    for kind, folder in begun.items():
        launch(kind, common, output_dir=str(folder), max_steps=4)
    for kind, others in {"fsdp2": ("one", "ddp"), "ddp": ("one", "fsdp2")}.items():
        for other in others:
            assert goes_on(f"{kind} to {other}", begun[kind], other) == pytest.approx(expected, rel=1e-5)


def replace_flags(train_flags, **changes):
    return PeagleTrainingArguments(**{**train_flags, **changes})


@pytest.mark.slow
def test_accumulation_batch_size_and_processes_are_interchangeable(train_flags, tmp_path):
    """8 x 1, 1 x 8 and 2 processes x 4 rows a step, all in float32 (losses 1e-5, weights 1e-3 relative)."""
    common = {"max_steps": 3, "total_seq_len": 32, "eval_strategy": "no", "optim": "adamw_torch_fused"}
    assert len(HiddenStatesDataset(train_flags["data_path"], total_seq_len=32)) > 8
    accumulated = run(train_flags, **common, gradient_accumulation_steps=8)
    batched = run(train_flags, **common, per_device_train_batch_size=8, output_dir=str(tmp_path / "batched"))
    launch("ddp", train_flags, **common, gradient_accumulation_steps=4, output_dir=str(tmp_path / "processes"))
    assert losses(batched) == pytest.approx(losses(accumulated), rel=1e-5)
    last = max(int(path.name) for path in (tmp_path / "processes").iterdir() if path.name.isdecimal())
    assert history(tmp_path / "processes" / str(last), "loss") == pytest.approx(losses(accumulated), rel=1e-5)
    expected = accumulated.model.state_dict()
    torch.testing.assert_close(batched.model.state_dict(), expected, rtol=1e-3, atol=1e-5)
    found = full_weights(tmp_path / "processes" / str(last))
    torch.testing.assert_close(found, {name: expected[name] for name in found}, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("fsdp2", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
        pytest.param("zero3", {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"}, marks=pytest.mark.slow),
    ],
)
def test_shards_in_checkpoints_are_refused_before_training(train_flags, kind, changes):
    program, environment = PROGRAMS[kind]
    printed = torchrun(program, "train", *flags(train_flags), environment=environment | changes, ends_well=False)
    assert "peagle-hf train: Checkpoints would hold shards of the weights" in printed
    assert "FULL_STATE_DICT" in printed
    assert not Path(train_flags["output_dir"]).exists()


@pytest.mark.parametrize(
    ("version", "changes", "words"),
    [(2, {"save_on_each_node": True}, "--save-on-each-node would save empty ones"), (1, {}, "Set fsdp_version to 2")],
)
def test_what_needs_whole_weights_is_refused_under_fsdp(version, changes, words):
    plugin = SimpleNamespace(fsdp_version=version, state_dict_type="FULL_STATE_DICT")
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        args=SimpleNamespace(**{"save_on_each_node": False, "optim": "muon"} | changes),
        is_fsdp_enabled=True,
        own_optimizer=None,
    )
    with pytest.raises(PeagleError, match=words):
        require_whole_weights(trainer)


@pytest.mark.parametrize("partitions", ["1", "4"])
def test_gradients_are_reduced_once_a_step(train_flags, partitions):
    changes = {"sequence_partitions": partitions, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    changes |= {"eval_strategy": "no"}
    printed = torchrun([str(WORKERS / "count_reductions.py")], json.dumps({**train_flags, **changes}))
    steps, reductions = json.loads(printed.split("COUNTS ")[1].splitlines()[0])
    assert steps == reductions == 4


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in SHARED_COMMANDS])
def test_commands_that_are_one_process_refuse_to_be_several(command, monkeypatch, capsys):
    """On every rank, before anything is read or written."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        main([command])
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"peagle-hf {command}: torchrun or accelerate has started 2 processes")


def extraction(data, output):
    return ["extract", *flags({"preprocessed_data": str(data), "output": str(output)})]


def launched(data, output, *more, **options):
    return torchrun(["-m", "peagle_hf"], *extraction(data, output), *more, **options)


@pytest.fixture
def prepared(tiny_verifier, tmp_path):
    folder = write_prepared(tmp_path / "data", [12 + index for index in range(20)])
    (folder / "prepare.json").write_text(json.dumps({"model": str(tiny_verifier)}))
    return folder


@pytest.mark.fault("One of two processes of an extraction is killed.", "The other ends, and a rerun makes the rest.")
def test_processes_of_torchrun_share_an_extraction(prepared, tmp_path, capfd):
    """The files are those of one process; the manifest is completed by both; what one rank says is said once."""
    one, two = tmp_path / "one", tmp_path / "two"
    extract(ExtractArguments(preprocessed_data=str(prepared), output=str(one), max_batch_tokens=8))
    killed = {"RANK_THAT_IS_KILLED": "1", "FILES_BEFORE": "4"}
    batches = ("--max-batch-tokens", "8")
    worker = [str(WORKERS / "killed_extraction.py")]
    torchrun(worker, *extraction(prepared, two), *batches, environment=killed, ends_well=False)
    kept = {row: row_path(two, row).stat().st_mtime_ns for row in cached_rows(two)}
    assert 4 <= len(kept) < 20
    capfd.readouterr()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "peagle_hf"]
    done = subprocess.run(
        [*command, *extraction(prepared, two), *batches],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert done.stderr.count("samples are cached") == 1
    assert f"{len(kept)} of 20 samples are cached; {20 - len(kept)} are to be extracted by 2 processes" in done.stderr
    assert {row: row_path(two, row).stat().st_mtime_ns for row in kept} == kept
    for row in range(20):
        assert row_path(one, row).read_bytes() == row_path(two, row).read_bytes()
    assert Manifest.read(one) == Manifest.read(two)
    assert not list(two.glob(".*"))


@pytest.mark.parametrize(
    ("flags_given", "environment", "said"),
    [
        ({"rank": 0}, {"RANK": "1"}, "--rank is 0, but the launcher .* has started this process with RANK 1"),
        ({"world_size": 4}, {"RANK": "0"}, "--world-size is 4, but the launcher .* with WORLD_SIZE 2"),
    ],
)
def test_flags_that_contradict_the_launcher_are_refused(monkeypatch, flags_given, environment, said):
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(extract_share, "connect_on_cpu", lambda timeout: None)
    with pytest.raises(PeagleError, match=said):
        share_of(ExtractArguments(**flags_given))


def test_a_launcher_of_one_process_leaves_the_share_to_the_flags(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert share_of(ExtractArguments(rank=2, world_size=3)) == Share(2, 3)
    assert share_of(ExtractArguments()) == Share()


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    share = Share(5, 8, is_launched=True)
    assert device_of(None, share) == device_of("cuda", share) == "cuda:1"
    assert (device_of("cuda:0", share), device_of("cpu", share), device_of(None, Share())) == ("cuda:0", "cpu", "cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(PeagleError, match=r"it has 2 GPUs\. Start one process for each GPU"):
        device_of(None, share)


CONFIGURATIONS = {
    "ddp": None,
    "fsdp2": "FSDP divides a drafter among GPUs; on CPUs each process would hold all of it",
    "zero2": None,
    "zero3": None,
}


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))]
)
def test_each_configuration_of_the_examples_trains_on_cpus_or_says_why_not(train_flags, name):
    """Without --use-cpu, in two processes that know each other."""
    command = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / f"{name}.yaml", "--num_processes", "2"]
    given = flags({**train_flags, "use_cpu": None, "bf16": None, "max_steps": 1, "optim": "adamw_torch"})
    done = subprocess.run(
        [sys.executable, *command, "-m", "peagle_hf", "train", *given],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    refused = CONFIGURATIONS[name]
    if refused is None:
        assert done.returncode == 0, done.stderr[-3000:]
        record = RunRecord.read(train_flags["output_dir"])
        assert record.processes == 2
        assert record.sharding == ("none" if name == "ddp" else f"ZeRO-{name[-1]} of 2 processes")
        assert record.precision == "bfloat16"
    else:
        assert done.returncode == 1
        assert f"peagle-hf train: {refused}" in done.stderr
        assert not Path(train_flags["output_dir"]).exists()


FAILING = {
    "data": "Process 1 on .* has failed, so that all processes end: the disk of this machine is gone",
    "step": "the disk of this machine is gone",
    "ends": "Another process of this run has ended",
    "hangs": r"didn't answer within the time that is allowed \(in training --ddp-timeout, in seconds\)",
}


@pytest.mark.parametrize("fault", FAILING)
@pytest.mark.fault("One of two processes fails, ends without a word, or hangs.", "The others end, and say why.")
def test_a_process_that_fails_takes_the_others_down_with_a_reason(train_flags, fault):
    """Seen without torchrun, which would end the others by itself on one machine, but not on another one."""
    started = time.monotonic()
    processes, port = [], free_port()
    for rank in range(2):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    WORKERS / "one_rank_fails.py",
                    fault,
                    "train",
                    *flags(train_flags),
                    "--ddp-timeout",
                    "20",
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    printed = processes[0].communicate(timeout=120)[0]
    assert processes[0].returncode == 1, printed[-3000:]
    assert re.search(FAILING[fault] if fault != "step" else FAILING["ends"], printed), printed[-3000:]
    assert "Traceback" not in printed
    assert time.monotonic() - started < 100
    processes[1].kill()
    processes[1].wait()


@pytest.mark.fault("A machine doesn't see the output folder when a run is resumed.", "All processes end and say so.")
@pytest.mark.fault("Two processes start anew beside a finished run, with --no-resume.", "Both do, and train once.")
def test_the_first_process_decides_what_is_resumed(train_flags):
    launch("ddp", train_flags, max_steps=1)
    worker = [str(WORKERS / "one_rank_fails.py"), "checkpoint"]
    printed = torchrun(worker, "train", *flags({**train_flags, "max_steps": 2}), ends_well=False)
    assert re.search(r"Process 1 on .* has failed, so that all processes end: The first process goes on from", printed)
    assert "name one on a disk that all machines share" in printed
    launch("ddp", train_flags, max_steps=1, resume=False, seed=7)
    record = RunRecord.read(train_flags["output_dir"])
    assert (record.processes, record.arguments["seed"]) == (2, 7)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_ddp_leaves_small_compiled_functions_whole():
    """PyTorch would cut them at each weight of more than a mebibyte, and compile every piece."""
    graphs = []

    def compiler(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    class FeedForward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(512, 1024), torch.nn.Linear(1024, 512)
            self.run = torch.compile(lambda states: states + self.down(self.up(states).relu()), backend=compiler)

        def forward(self, states):
            with small_functions():
                return self.run(states)

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(FeedForward())(torch.zeros(1, 512)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 1
