"""What a run leaves behind: metrics in the trackers, under stable names, curves as a PNG, and the `evaluate` module."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import evaluate
import pytest
import torch
from PIL import Image
from test_distributed import history, launch
from test_trainer import ROOT, StopAt, run
from test_trainer_features import search
from transformers import TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from peagle_hf import PeagleError, PeagleTrainingArguments
from peagle_hf.cli import main
from peagle_hf.cli.parsing import flags
from peagle_hf.data.dataset import HiddenStatesDataset
from peagle_hf.evaluation import acceptance_metric
from peagle_hf.serving.client import summarize
from peagle_hf.training import metrics
from peagle_hf.training.throughput import Throughput
from peagle_hf.training.time_left import TimeLeft

DEPTHS = range(3)
STEPS = 10
NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    *(f"accuracy_{depth}" for depth in DEPTHS),
    *(f"acceptance_{depth}" for depth in DEPTHS),
    "acceptance_length",
    "tokens_per_second",
    "loader_wait",
    "minutes_left",
}


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_log_has_the_documented_names(train_flags):
    trainer = run(train_flags)
    assert len(logs(trainer)) == STEPS
    for entry in logs(trainer):
        assert entry.keys() == NAMES | {"step"}
        assert 0 < entry["loader_wait"] < 1
    documented = (ROOT / "docs" / "training.md").read_text()
    for name in [*NAMES, "memory_gib"]:
        name = name if name[-1] not in "012" else f"{name[:-1]}d"
        assert f"`{name}`" in documented, name


EPOCH = {"num_train_epochs": 1, "logging_steps": 5, "eval_strategy": "no", "save_strategy": "no"}


def epoch_positions(trainer):
    rows = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return sum(batch["input_ids"].numel() for batch in rows)


def test_tokens_per_second_are_positions_by_wall_time(train_flags):
    """So positions over it are the time between logs: nearly all of what the Trainer says, less than the call took."""
    started = time.perf_counter()
    trainer = run(train_flags, **{**EPOCH, "num_train_epochs": 2})
    seconds = time.perf_counter() - started
    found = sum(epoch_positions(trainer) / entry["tokens_per_second"] for entry in logs(trainer))
    assert 0.7 * trainer.state.log_history[-1]["train_runtime"] < found < seconds


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def test_pace_is_that_of_the_time_since_the_last_log(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    pace = Throughput(torch.device("cpu"))
    for positions, wait, work in ((300, 1.0, 2.0), (500, 2.0, 3.0)):
        with pace.waiting():
            clock.now += wait
        clock.now += work
        pace.positions += positions
    # A second process at a tenth of the speed that waits twice as long.
    slower = torch.tensor([[0.1, 2.0, 1.0]])
    measured = pace.take(lambda row: torch.cat([row, row * slower]))
    assert measured == pytest.approx({"tokens_per_second": 110.0, "loader_wait": 3 / 8 * 1.5})
    clock.now += 4.0
    pace.positions += 8
    assert pace.take(lambda row: row) == {"tokens_per_second": 2.0, "loader_wait": 0.0}


class SlowRows(HiddenStatesDataset):
    """A dataset that takes a fifth of a second a row."""

    def __getitem__(self, key):
        time.sleep(0.2)
        return super().__getitem__(key)


@pytest.mark.parametrize("delay", [0, 2])
def test_minutes_left_count_steps_validations_and_saves_to_come(monkeypatch, delay):
    """Three epochs of 20 steps of 2 s, the first four and the tenth of which take longer.

    Before the first step there is a validation; each epoch, or each from the second on, ends with one on two data sets
    (30 s), and with a save (13 s).
    """
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    args = SimpleNamespace(
        world_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=1,
        eval_strategy=IntervalStrategy.EPOCH,
        eval_delay=delay,
        save_strategy=SaveStrategy.STEPS,
        save_steps=1 / 3,
    )
    drafter = torch.nn.Linear(2**14, 2**16, bias=False, device="meta")  # 2^30 weights: a checkpoint of 12 GiB
    trainer = type("Trainer", (), {"args": args, "eval_dataset": range(20), "model": drafter})()
    left, state, said = TimeLeft(trainer), TrainerState(max_steps=60, save_steps=20), []
    left.on_train_begin(args, state, None, train_dataloader=range(20))
    clock.now += 30
    left.on_evaluate(args, state, None)
    for step in range(1, 61):
        left.on_step_begin(args, state, None)
        clock.now += {1: 26, 2: 5, 3: 3, 4: 4, 10: 20}.get(step, 2)
        state.global_step = step
        left.on_step_end(args, state, None)
        logs = {"loss": 1.0}
        state.log_history.append({"step": step})
        left.on_log(args, state, None, logs=logs)
        assert state.log_history[-1]["minutes_left"] == logs["minutes_left"]
        said.append((clock.now, logs["minutes_left"] * 60))
        if step % 20 == 0:
            for seconds in (20, 10) if step >= 20 * delay else ():
                clock.now += seconds
                left.on_evaluate(args, state, None)
            clock.now += 12
            left.on_save(args, state, None)
            clock.now += 1
    for now, seconds in said:
        if now > 110:  # after step 11
            assert seconds == pytest.approx(clock.now - now, rel=0.1), now
    assert said[-1][1] == pytest.approx(43)


def test_a_slow_loader_shows(train_flags):
    trainer = run(train_flags, **EPOCH)
    (fast,) = logs(trainer)
    trainer.train_dataset.__class__ = SlowRows
    trainer.args.num_train_epochs = 2  # only the second epoch's five steps count for the time left
    trainer.train()
    slow = logs(trainer)[-1]
    waited = slow["loader_wait"] * epoch_positions(trainer) / slow["tokens_per_second"]
    assert waited >= 5 * 0.2
    assert fast["loader_wait"] < slow["loader_wait"] < 1
    assert trainer.time_left.step_seconds >= 0.2


@pytest.mark.slow
def test_two_processes_log_the_same_names(train_flags, tmp_path):
    folder = tmp_path / "two"
    launch("ddp", train_flags, output_dir=str(folder))
    for name in NAMES:
        assert len(history(folder / "1", name)) >= 6, name
    assert (folder / "training.png").exists()


def tensorboard_metrics(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.glob("checkpoints/runs/*/events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def trackio_metrics(folder):
    import sqlite3

    (path,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select metrics from metrics order by step").fetchall()
    return by_name(json.loads(row[0]) for row in rows)


def wandb_metrics(folder):
    """From its file of an offline run: protobuf records in the format of LevelDB's log, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, block, parts, entries = path.read_bytes(), 7, 32768, b"", []
    while place < len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # kinds of TensorFlow's record format: whole, last part
            record, parts = Record.FromString(parts), b""
            items = record.history.item
            entries.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return by_name(entries)


def mlflow_metrics(folder):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }


def by_name(entries):
    """Values by metric, with the step that the Trainer logs beside them."""
    found = {}
    for entry in entries:
        for name, value in entry.items():
            found.setdefault(name, []).append((entry.get("train/global_step"), value))
    return found


TRACKERS = {
    "tensorboard": (tensorboard_metrics, "train/", "eval/", {}),
    "trackio": (trackio_metrics, "train/", "eval/", {"TRACKIO_DIR": "trackio", "HF_HUB_OFFLINE": "1"}),
    "wandb": (wandb_metrics, "train/", "eval/", {"WANDB_MODE": "offline", "WANDB_DIR": ".", "WANDB_SILENT": "true"}),
    "mlflow": (mlflow_metrics, "", "eval_", {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_gets_every_metric(train_flags, tmp_path, tracker):
    """A whole run of the command, as trackers keep state in the process; then what the tracker has written."""
    pytest.importorskip(tracker)
    read, train_prefix, eval_prefix, variables = TRACKERS[tracker]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), **variables}
    command = [sys.executable, "-m", "peagle_hf", "train", *flags({**train_flags, "report_to": tracker})]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = read(tmp_path)
    state = tmp_path / "checkpoints" / "1" / "trainer_state.json"
    logged = json.loads(state.read_text())["log_history"]
    names = {f"{train_prefix}{name}": name for name in NAMES - {"epoch"}}
    names |= {f"{eval_prefix}{name}": f"eval_{name}" for name in ("loss", "acceptance_length", "acceptance_0")}
    for theirs, ours in names.items():
        expected = [(entry["step"], entry[ours]) for entry in logged if ours in entry]
        assert len(expected) in (STEPS, 2)
        assert [step for step, _ in found[theirs]] == [step for step, _ in expected]
        values = [value for _, value in found[theirs]]
        assert values == pytest.approx([value for _, value in expected], rel=1e-5), theirs


@pytest.mark.parametrize(
    ("tracker", "message"),
    [("swanlab", "report_to names swanlab.*pip install swanlab"), ("tensorbord", "'tensorbord'.*none of.*tensorboard")],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_starts(train_flags, tracker, message, capsys):
    with pytest.raises(PeagleError, match=message):
        PeagleTrainingArguments(**{**train_flags, "report_to": ["tensorboard", tracker]})
    with pytest.raises(SystemExit) as stopped:
        main(["train", *flags({**train_flags, "report_to": tracker})])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("peagle-hf train: report_to names")
    assert not Path(train_flags["output_dir"]).exists()


def drawn(monkeypatch):
    """What is drawn from now on, by label, and still drawn."""
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot

    def remember(axes, x, y, **style):
        lines.setdefault(style["label"], []).append(list(zip(x, y, strict=True)))
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", remember)
    return lines


def labels(monkeypatch):
    """The labels of the vertical axes that are drawn from now on, and still drawn."""
    from matplotlib.axes import Axes

    found, set_label = [], Axes.set_ylabel
    monkeypatch.setattr(Axes, "set_ylabel", lambda axes, label: (found.append(label), set_label(axes, label))[1])
    return found


def test_a_single_value_is_drawn_as_a_point(tmp_path, monkeypatch):
    """A line of one point has no length, so it isn't seen without a marker."""
    from matplotlib.axes import Axes

    markers, plot = {}, Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda axes, x, y, **style: (markers.update({len(x): style["marker"]}), plot(axes, x, y, **style))[1],
    )
    metrics.draw(
        [{"step": 1, "loss": 2.0}, {"step": 2, "acceptance_length": 1.1}, {"step": 3, "acceptance_length": 1.2}],
        tmp_path / "one.png",
    )
    assert (markers[1], markers[2]) == (".", None)


def test_curves_are_those_of_the_log(train_flags, tmp_path, monkeypatch):
    trainer = run(train_flags)
    folder = Path(train_flags["output_dir"])
    with Image.open(folder / "training.png") as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").tobytes())) > 10
    lines, named = drawn(monkeypatch), labels(monkeypatch)
    metrics.draw(trainer.state.log_history, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (folder / "training.png").read_bytes()

    def points(name):
        return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]

    assert named[0] == "Loss (training: weighted, validation: not)"  # two numbers in one panel
    assert lines["training"] == [points("loss"), points("acceptance_length")]
    assert lines["validation"] == [points("eval_loss"), points("eval_acceptance_length")]
    assert len(points("eval_loss")) == 2
    for depth in DEPTHS:
        assert lines[f"depth {depth}"] == [points(f"eval_acceptance_{depth}")]


def test_a_run_without_validation_draws_the_depths_of_training(train_flags, monkeypatch):
    lines = drawn(monkeypatch)
    trainer = run(train_flags, train_data_ratio=1, num_train_epochs=1)
    assert lines["validation"][-2:] == [[], []]
    assert [value for _, value in lines["depth 2"][-1]] == [entry["acceptance_2"] for entry in logs(trainer)]


def test_a_resumed_run_draws_the_whole_history(train_flags, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(train_flags, [StopAt(7)])
    lines = drawn(monkeypatch)
    run(train_flags, resume=True)
    assert [step for step, _ in lines["training"][-1]] == list(range(1, STEPS + 1))


def test_each_trial_of_a_search_has_its_own_curves(train_flags):
    search(train_flags)
    folder = Path(train_flags["output_dir"])
    pictures = [(folder / name / "training.png").read_bytes() for name in ("run-0", "run-1")]
    assert pictures[0] != pictures[1]
    assert not (folder / "training.png").exists()


@pytest.fixture
def acceptance(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return evaluate.load(acceptance_metric.__file__, cache_dir=str(tmp_path))


def test_the_evaluate_module_gives_what_evaluation_and_training_count(acceptance):
    accepted = [3, 0, 1, 4, 2, 2, 0, 4]
    found = acceptance.compute(predictions=accepted, references=[4] * 8)
    by_position = [6, 5, 3, 2]
    assert found == summarize([[8, 32, 16, *by_position]])
    counters = torch.tensor([[8] * 4, by_position, [8, *by_position[:-1]], by_position])
    trained = metrics.summarize(counters)
    assert found["acceptance_length"] == pytest.approx(trained["acceptance_length"])
    rates = [trained[f"acceptance_{depth}"] for depth in range(4)]
    assert found["per_position_acceptance"] == pytest.approx(rates)
    assert found["acceptance_rate"] == 0.5


def test_the_evaluate_module_takes_batches_and_drafts_of_different_lengths(acceptance):
    acceptance.add_batch(predictions=[1, 2], references=[3, 2])
    acceptance.add(prediction=3, reference=3)
    found = acceptance.compute()
    assert found["acceptance_rate"] == 6 / 8
    assert found["per_position_acceptance"] == [1, 2 / 3, 1 / 3]


@pytest.mark.parametrize("accepted", [3, -1])
def test_more_accepted_than_drafted_is_an_error(acceptance, accepted):
    with pytest.raises(PeagleError, match=rf"Draft 1 has {accepted} accepted of 2"):
        acceptance.compute(predictions=[1, accepted], references=[2, 2])


def test_no_drafts_are_no_acceptance(acceptance):
    assert acceptance.compute(predictions=[], references=[])["acceptance_length"] == 1.0
