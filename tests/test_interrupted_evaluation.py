"""An evaluation that was killed measures only what is missing; what changed or is damaged is named."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from peagle_hf import EvaluateArguments, PeagleError, evaluate
from peagle_hf.arguments import command_text
from peagle_hf.evaluation.runs import Run
from peagle_hf.evaluation.task import FINISHED_RUNS
from peagle_hf.serving.environment import installed_vllm

ROWS = [{"question_id": number, "turns": [f"a b c {'d ' * number}", "e f"]} for number in range(6)]


def requests_of(*loads: int) -> int:
    """Requests of runs with so many chats at a time: as many to warm up, and two turns of each prompt."""
    return sum(load + 2 * len(ROWS) for load in loads)


A_ROUND = requests_of(1, 2)
TIMES = ("recommended", "second", "speed", "break_even", "latency", "interval", "command")


@pytest.fixture
def suite(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def arguments(drafter, suite, tmp_path, server, baseline):
    def arguments(**changes) -> EvaluateArguments:
        fields = {"model": str(drafter), "suite": [str(suite)], "output": str(tmp_path / "out"), "max_tokens": 20}
        fields |= {"endpoint": server.url, "baseline_endpoint": baseline.url, "concurrency": [1, 2], "rounds": 2}
        return EvaluateArguments(**{**fields, **changes})

    return arguments


def without_times(report):
    """The report without what depends on the clock."""
    if isinstance(report, dict):
        return {name: without_times(value) for name, value in report.items() if not any(word in name for word in TIMES)}
    return [without_times(value) for value in report] if isinstance(report, list) else report


@pytest.mark.fault(
    "An evaluation is killed between two of its runs",
    "The rerun asks only for what is missing and gives the same report.",
)
def test_a_killed_evaluation_asks_only_what_is_missing_and_gives_the_same_report(
    arguments, server, baseline, tmp_path, caplog
):
    """It is killed in the fifth of eight runs: four are finished and aren't asked again."""
    template = tmp_path / "template.jinja"  # with this template w5 begins a thought
    template.write_text(
        "{% for m in messages %}{{ 'w5 ' + m.reasoning + ' w7 ' if m.reasoning else '' }}{{ m.content }} {% endfor %}"
    )
    thinking = {"chat_template": str(template)}
    command = [sys.executable, "-m", "peagle_hf", *shlex.split(command_text(arguments(**thinking), "evaluate"))[1:]]
    process = None

    def kill(message: str) -> None:
        if process is not None and len(baseline.requests) == A_ROUND + 3:
            os.kill(process.pid, signal.SIGKILL)

    baseline.chat_fault = kill
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
    assert process.wait(120) == -signal.SIGKILL
    process = None
    journal = tmp_path / "out" / FINISHED_RUNS
    assert len(journal.read_bytes().splitlines()) == 1 + 4
    assert not (tmp_path / "out" / "evaluation.json").exists()
    with open(journal, "a") as file:  # what a process killed while writing leaves
        file.write('{"name": "round 2, 1 at a time')

    moved = (tmp_path / "out").rename(tmp_path / "moved")
    for one in (server, baseline):
        one.requests.clear()
    caplog.set_level(logging.INFO, logger="peagle_hf")
    report = evaluate(arguments(output=str(moved), **thinking))
    assert "Read 4 finished runs of an interrupted command" in caplog.text
    assert len(baseline.requests) == A_ROUND
    assert len(server.requests) == 1 + A_ROUND  # one more request finds out how the server counts
    assert not (moved / FINISHED_RUNS).exists()
    assert without_times(report) == without_times(evaluate(arguments(output=str(tmp_path / "whole"), **thinking)))
    assert report["by_segment"]["reasoning"]["num_drafts"] > 0
    assert report["intervals"].keys() > {"acceptance_length", "speed_up"}


def interrupt(arguments, server, requests: int = A_ROUND + 3) -> None:
    """Fail in the third run of the server with the drafter."""
    server.requests.clear()
    server.chat_fault = lambda message: "400" if len(server.requests) > requests else None
    with pytest.raises(PeagleError, match="the prompt is too long"):
        evaluate(arguments)
    time.sleep(0.3)  # requests that were sent at the same time fail too
    server.chat_fault = lambda message: None
    server.requests.clear()


@pytest.mark.fault(
    "An evaluation is rerun with other settings", "The log names each change, and everything is measured again."
)
def test_what_changed_is_named_and_all_is_measured_anew(arguments, server, suite, caplog, monkeypatch):
    monkeypatch.setattr("peagle_hf.evaluation.benchmark._illustrate", lambda report, output: None)  # drawing takes long
    interrupt(arguments(), server)
    evaluate(arguments(rounds=1))  # the number of rounds may change: the first is there
    assert len(server.requests) == 1
    interrupt(arguments(), server)
    caplog.clear()
    evaluate(arguments(rounds=1, max_tokens=9))
    assert "Everything is measured again, without " in caplog.text
    assert "max_tokens is 9 and was 20" in caplog.text
    assert len(server.requests) == 1 + A_ROUND
    interrupt(arguments(), server)
    suite.write_text(suite.read_text().replace("a b c", "a b"))
    caplog.clear()
    evaluate(arguments(rounds=1))
    assert "prompts is 6, sha256" in caplog.text


@pytest.mark.parametrize(
    ("change", "loads"),
    [({"concurrency": [1, 2, 3]}, [3]), ({"concurrency": [2]}, []), ({"temperature": [0, 0.5]}, [1, 2])],
)
def test_another_list_of_loads_or_temperatures_keeps_the_runs_that_it_has_too(
    arguments, server, change, loads, caplog, monkeypatch
):
    monkeypatch.setattr("peagle_hf.evaluation.benchmark._illustrate", lambda report, output: None)  # takes long
    interrupt(arguments(), server)  # after both loads of the first round
    report = evaluate(arguments(rounds=1, **change))
    assert "Everything is measured again" not in caplog.text
    assert len(server.requests) == 1 + requests_of(*loads)  # one finds out how the server counts
    assert [one["concurrency"] for one in report["by_concurrency"]] == change.get("concurrency", [1, 2])


@pytest.mark.fault(
    "The drafter's weights change between an evaluation and its rerun", "Nothing of the old measurement is used."
)
def test_other_weights_are_measured_anew(arguments, server, drafter, tmp_path, caplog):
    """`checkpoint_best` led elsewhere when the evaluation was started again."""
    best = tmp_path / "checkpoint_best"
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(drafter / "model.safetensors")
        config = json.loads((drafter / "config.json").read_text()) | {"note": number}
        (folder / "config.json").write_text(json.dumps(config))
    best.symlink_to("1")
    interrupt(arguments(model=str(best)), server)
    best.unlink()
    best.symlink_to("2")

    def move(message: str) -> None:  # the link moves again during the evaluation
        link = tmp_path / f"link of thread {threading.get_ident()}"
        link.symlink_to("1")
        link.replace(best)

    server.chat_fault = move
    report = evaluate(arguments(model=str(best), rounds=1))
    assert "drafters is ['config" in caplog.text
    assert report["drafter"] == str(tmp_path / "2")
    assert report["drafter_link"] == str(best)
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert f"{tmp_path / '2'}, the folder that {best} linked to at the start" in page


@pytest.mark.fault("The journal of an evaluation is damaged", "An error names the file and says to remove it.")
@pytest.mark.parametrize("damage", ["{", "[]", '{"settings": 1}', '{"settings": {}}\n{"name": "x"}', b"\xff\xfe"])
def test_a_damaged_journal_is_named_with_the_remedy(arguments, tmp_path, damage):
    path = tmp_path / "out" / FINISHED_RUNS
    path.parent.mkdir()
    path.write_bytes((damage.encode() if isinstance(damage, str) else damage) + b"\n")
    with pytest.raises(PeagleError, match=r"evaluation\.journal.* is damaged .*Remove it and run the same command"):
        evaluate(arguments())


def test_vllm_in_process_does_only_what_is_missing(arguments, monkeypatch, capsys, caplog):
    """vLLM dies in the second round after one of two runs with the drafter; each round has a seed of its own."""
    pytest.importorskip("vllm")
    asked, dies, given_flags = [], True, ["--quantization", "fp8"]

    class FakeProcess:
        def __init__(self, engine, environment, log, what, flags):
            self.seed, self.what = engine["seed"], what
            assert flags == given_flags

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait_until_ready(self):
            pass

        def run(self, job):
            for index, (temperature, concurrency) in enumerate(job.conditions):
                assert temperature == 0.7
                if dies and (self.seed, self.what, concurrency) == (8, "with the drafter", 2):
                    raise PeagleError("vLLM failed")
                asked.append((self.seed, self.what, concurrency, job.answers and job.answers[index][0][0]))
                fields = {"token_ids": [1, 2, 3], "seconds": 1.0, "text": f"{self.seed} {concurrency}"}
                fields |= {"drafting": [2, 2, 1, 1]} if job.answers else {}
                chats = [[fields] * len(prompt.turns) for prompt in job.prompts]
                runner = "first" if job.answers else "second"
                run = Run.of({"concurrency": concurrency, "chats": chats, "seconds": 2.0})
                yield run, MEASURED_ON | {"model_runner": runner}

    monkeypatch.setattr("peagle_hf.evaluation.in_processes.VllmProcess", FakeProcess)
    samples_rightly = replace(installed_vllm(), samples_wrongly_on_cpu=False)
    monkeypatch.setattr("peagle_hf.evaluation.in_processes.installed_vllm", lambda: samples_rightly)
    here = {"endpoint": None, "baseline_endpoint": None, "seed": 7, "temperature": 0.7, "num_speculative_tokens": [1]}
    here |= {"vllm_args": given_flags}
    with pytest.raises(PeagleError, match="vLLM failed"):
        evaluate(arguments(**here))
    assert len(asked) == 7
    dies = False
    asked.clear()
    report = evaluate(arguments(**here))
    assert asked == [(8, "with the drafter", 2, "8 2")]
    assert report["versions"] == MEASURED_ON["versions"]
    assert report["num_drafts"] == 2 * 2 * 2 * len(ROWS)  # sampled: two rounds of two turns count
    assert report["model_runner"] == {"without": "second", "with a drafter": "first"}
    assert "the second without, the first with a drafter" in capsys.readouterr().out

    dies = True
    with pytest.raises(PeagleError, match="vLLM failed"):
        evaluate(arguments(**here))
    dies = False
    asked.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # with other threads the speed differs
    evaluate(arguments(**here))
    assert len(asked) == 8
    assert "OMP_NUM_THREADS is 7 and was" in caplog.text


MEASURED_ON = {"dtype": "float32", "device": "CPU", "versions": {"vllm": "0.32.0"}}
