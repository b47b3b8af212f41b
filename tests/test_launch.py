"""Launching vLLM's servers: their command lines, their record, and that none of their processes outlives us."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from conftest import AUX, HIDDEN, LAYERS, ended
from fake_vllm import FakeVllm

from peagle_hf import EvaluateArguments, PeagleError, cli, evaluate
from peagle_hf.data.endpoint_folder import write_server_record
from peagle_hf.serving import supervisor
from peagle_hf.serving.address import Address
from peagle_hf.serving.launch import LaunchArguments, ServeArguments, launch, serve, server_command

pytestmark = pytest.mark.timeout(120)

SLOTS = [*AUX, LAYERS]


@pytest.fixture
def output(tmp_path) -> Path:
    folder = tmp_path / "hidden states"
    folder.mkdir()
    return folder


@pytest.fixture
def server(output, tiny_verifier):
    with FakeVllm(output, str(tiny_verifier), SLOTS, HIDDEN) as fake:
        yield fake


def launch_arguments(model: Path, folder: Path, **others) -> LaunchArguments:
    arguments = LaunchArguments(str(model), str(folder), **others)
    arguments.vllm_args = ["--port", "8000"]
    return arguments


def option(command: list[str], name: str) -> dict:
    return json.loads(command[command.index(name) + 1])


def test_the_server_command_on_a_gpu_and_on_a_cpu(tiny_verifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, slots = server_command(launch_arguments(tiny_verifier, Path("a b")), on_cpu=False)
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tiny_verifier)]
    assert command[-2:] == ["--port", "8000"]
    config = option(command, "--speculative-config")["draft_model_config"]["hf_config"]
    assert config["eagle_aux_hidden_state_layer_ids"] == slots == [2, 3, 4, 7]
    connector = option(command, "--kv-transfer-config")
    assert connector["kv_connector"] == "ExampleHiddenStatesConnector"
    assert connector["kv_connector_extra_config"]["shared_storage_path"] == str(tmp_path / "a b")
    on_cpu, _ = server_command(launch_arguments(tiny_verifier, Path("a b")), on_cpu=True)
    assert option(on_cpu, "--kv-transfer-config")["kv_connector_module_path"] == "peagle_cpu_connector"


def test_the_last_layer_is_always_extracted(tiny_verifier, tmp_path):
    def slots(**others) -> list[int]:
        return server_command(launch_arguments(tiny_verifier, tmp_path, **others), on_cpu=True)[1]

    assert slots(target_layer_ids=[1, 3]) == [1, 3, 7]
    assert slots(target_layer_ids=[1, 3, 7]) == [1, 3, 7]
    assert slots(target_layer_ids=[1, 3, 7], include_last_layer=False) == [1, 3, 7]
    for is_dry in (False, True):
        with pytest.raises(PeagleError, match="that end with 7"):
            slots(target_layer_ids=[1, 3], include_last_layer=False, dry_run=is_dry)
    with pytest.raises(PeagleError, match=r"in 0 \.\. 7"):
        slots(target_layer_ids=[1, 9])


def test_the_tutorials_command_line_is_printed_for_a_shell(tiny_verifier, tmp_path, capfd):
    pytest.importorskip("vllm")
    python = tmp_path / "python with vllm"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    folder = tmp_path / "a b"
    flags = ["--hidden-states-path", str(folder), "--dry-run", "--vllm-python", str(python)]
    cli.main(["launch-vllm", str(tiny_verifier), *flags, "--", "--data-parallel-size", "2", "--port", "8000"])
    line = capfd.readouterr().out.strip()
    shown = subprocess.run(["sh", "-c", f'set -- {line}; printf "%s\\n" "$@"'], capture_output=True, text=True)
    words = shown.stdout.splitlines()
    assert words[0] == "env"
    assert str(python) in words
    assert words[-4:] == ["--data-parallel-size", "2", "--port", "8000"]
    assert not folder.exists()


def test_a_dry_run_needs_neither_vllm_nor_with_all_layers_named_the_verifier(tiny_verifier, drafter, tmp_path, capfd):
    python = ["--vllm-python", str(tmp_path / "no python"), "--dry-run"]
    flags = ["--hidden-states-path", str(tmp_path / "states"), *python]

    def printed(*words: str) -> list[str]:
        cli.main([*words, "--", "--port", "8001", "--api-key", "SECRET", "--otlp-traces-endpoint", "http://u:SECRET@h"])
        shown = capfd.readouterr()
        assert "SECRET" not in shown.out + shown.err
        (line,) = shown.out.splitlines()
        assert line.endswith("--port 8001 --api-key '***' --otlp-traces-endpoint http://h")
        return shlex.split(line)

    layers = ["--target-layer-ids", "1", "3", "9", "--no-include-last-layer"]
    words = printed("launch-vllm", "no/such", *flags, *layers)
    config = option(words, "--speculative-config")["draft_model_config"]["hf_config"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 9]
    words = printed("launch-vllm", str(tiny_verifier), *flags)
    assert option(words, "--kv-transfer-config")["kv_connector"] == "ExampleHiddenStatesConnector", "as on a GPU"
    assert str(tmp_path / "no python") in printed("serve", str(drafter), *python)
    assert not (tmp_path / "states").exists()


@pytest.mark.fault("vLLM is not installed", "The command says how to install it, and that --dry-run works without it.")
def test_a_python_without_vllm_is_refused(tiny_verifier, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "no module named torch" >&2\nexit 1\n')
    python.chmod(0o755)
    with pytest.raises(SystemExit):
        cli.main(
            ["launch-vllm", str(tiny_verifier), "--hidden-states-path", str(tmp_path), "--vllm-python", str(python)]
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ""}, "--model is empty"),
        ({"hidden_states_path": ""}, "--hidden-states-path is empty"),
        ({"target_layer_ids": [-1, 2]}, "at least 0"),
        ({"target_layer_ids": [2, 2]}, "distinct"),
    ],
)
def test_impossible_values_of_a_launch_are_refused(changes, words):
    with pytest.raises(PeagleError, match=words):
        LaunchArguments(**{"model": "m", "hidden_states_path": "f", **changes})


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", ""])
def test_a_port_that_is_none_is_refused(tiny_verifier, drafter, tmp_path, port):
    for arguments, run in (
        (launch_arguments(tiny_verifier, tmp_path / "states"), launch),
        (ServeArguments(str(drafter)), serve),
    ):
        arguments.vllm_args = [f"--port={port}"]
        with pytest.raises(PeagleError, match="must be a number from 1 to 65535"):
            run(arguments)


def test_where_vllm_will_answer_is_read_from_its_flags(tmp_path):
    (tmp_path / "vllm.yaml").write_text("port: 9\nhost: 127.0.0.1\n")
    assert Address.of([]) == Address("", 8000)
    assert Address.of(["--port", "1", "--host=::1", "--ssl-certfile", "c"]) == Address("::1", 1, uses_tls=True)
    assert Address.of(["--config", str(tmp_path / "vllm.yaml"), "--host", "h"]) == Address("h", 9)
    assert not Address.of(["--headless", "--port", "5"]).is_tcp


# The life of a server, with a stand-in for vLLM


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """A package `vllm` for child processes, whose server behaves as its first flag says."""
    root = tmp_path / "stand in"
    server = root / "vllm" / "entrypoints" / "openai" / "api_server.py"
    server.parent.mkdir(parents=True)
    (root / "vllm" / "__init__.py").write_text("from vllm.tree import LLM\n")
    (root / "vllm" / "tree.py").write_text(TREE)
    server.write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", str(root), prepend=os.pathsep)
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setenv("TREE", str(tmp_path / "tree"))
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr("peagle_hf.serving.launch.POLL_SECONDS", 0.05)
    return tmp_path / "tree"


TREE = """
import os, signal, subprocess, sys, time

def grow():
    "Two processes that ignore SIGTERM, the second in a group of its own; their ids go to a file."
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import os, time; os.setpgrp(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    with open(os.environ["TREE"] + ".part", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename(os.environ["TREE"] + ".part", os.environ["TREE"])

class LLM:
    def __init__(self, **arguments):
        grow()
        time.sleep(60)
"""
SERVER = """
import http.server, os, sys, time
from vllm.tree import grow

if "--fail" in sys.argv:
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists(os.environ["TREE"] + ".ready") else 503)
        self.end_headers()
    def log_message(self, *arguments): ...

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
grow()
server.serve_forever()
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def when(condition: Callable[[], bool], action: Callable[[], object]) -> Iterator[None]:
    """Do something from another thread as soon as a condition holds; fail if it never does."""
    done = []

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        done.append(condition())
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert done == [True]


def test_the_record_is_there_from_when_the_server_answers_until_it_ends(stand_in, tiny_verifier, output):
    arguments = launch_arguments(tiny_verifier, output)
    arguments.vllm_args = ["--port", str(free_port()), "--host", "127.0.0.1"]
    record = output / "server.json"
    write_server_record(output, "another", [1, 2, LAYERS], "localhost:9")  # the server of this record is gone
    before = record.read_text()
    seen = []

    def look_and_stop() -> None:
        seen.append(record.read_text())
        os.kill(os.getpid(), signal.SIGHUP)

    def answers() -> bool:
        if stand_in.exists() and not seen:
            time.sleep(0.3)  # the server listens, but isn't ready
            seen.append(record.read_text())
            Path(f"{stand_in}.ready").touch()
        return len(seen) == 1 and record.read_text() != before

    with when(answers, look_and_stop), pytest.raises(SystemExit) as stopped:
        launch(arguments)
    assert stopped.value.code == 128 + signal.SIGHUP
    assert seen[0] == before
    assert json.loads(seen[1])["layer_ids"] == [2, 3, 4, LAYERS]
    assert not record.exists()
    assert ended([int(number) for number in stand_in.read_text().split()])


@pytest.mark.fault(
    "A second server is launched at the port of one that runs",
    "The launch fails, and the record of the first server stays.",
)
def test_a_launch_that_fails_leaves_the_record_of_the_server_that_runs(stand_in, tiny_verifier, output, server):
    arguments = launch_arguments(tiny_verifier, output, target_layer_ids=[1, 2, 3])
    name = f"127.0.0.1:{server.port}"
    write_server_record(output, str(tiny_verifier), SLOTS, name)
    record = (output / "server.json").read_text()
    arguments.vllm_args = ["--port", str(server.port)]
    with pytest.raises(PeagleError, match=f"Another program already listens at port {server.port}"):
        launch(arguments)
    arguments.vllm_args = ["--port", str(free_port())]
    with pytest.raises(PeagleError, match=rf"server {name} writes to .* too, and extracts the layers \[2, 3, 4, 7\]"):
        launch(arguments)
    arguments = launch_arguments(tiny_verifier, output, target_layer_ids=AUX)
    arguments.vllm_args = ["--port", str(free_port()), "--fail"]
    with pytest.raises(PeagleError, match="vLLM ended with status 3"):
        launch(arguments)
    assert (output / "server.json").read_text() == record
    assert not stand_in.exists()


@pytest.mark.fault("Another program answers at the port while vLLM loads", "It does not count as the server.")
def test_an_answer_from_another_program_at_the_port_is_no_sign_of_the_server(stand_in, server):
    address = Address("127.0.0.1", server.port)
    assert address.is_answered_by(os.getsid(0))
    assert not address.is_answered_by(os.getsid(0) + 1)
    assert not Address("127.0.0.1", free_port()).is_answered_by(os.getsid(0))


@pytest.mark.fault("SIGTERM to `serve` or `evaluate`", "No process of vLLM is left.")
@pytest.mark.parametrize("command", ["serve", "evaluate"])
def test_a_signal_to_serve_or_evaluate_leaves_no_process_of_vllm(stand_in, drafter, tmp_path, command):
    if command == "serve":
        arguments = ServeArguments(str(drafter))
        arguments.vllm_args = ["--port", str(free_port())]
        run = partial(serve, arguments)
    else:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps({"question_id": 1, "category": "a", "turns": ["w9"]}) + "\n")
        run = partial(evaluate, EvaluateArguments(str(drafter), suite=[str(prompts)], output=str(tmp_path / "out")))
    handler = signal.getsignal(signal.SIGTERM)
    with (
        when(stand_in.exists, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(SystemExit) as stopped,
    ):
        run()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    assert ended([int(number) for number in stand_in.read_text().split()])


PARENT = """
import os, signal, sys, time
from peagle_hf.serving import supervisor

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
supervisor.GRACE_SECONDS = 0.3
with supervisor.supervised([sys.executable, "-c", "from vllm import LLM; LLM()"], os.environ) as process:
    while not os.path.exists(os.environ["TREE"]):
        time.sleep(0.02)
    print(process.pid, flush=True)
    if sys.argv[1] == "an exception":
        raise ValueError
    process.wait()
"""


@pytest.mark.fault(
    "The command that started vLLM is killed with SIGKILL, and its guard process too", "vLLM ends with it."
)
@pytest.mark.parametrize(
    "cause",
    [
        "SIGKILL",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("SIGINT", "the guard is killed", "an exception")),
    ],
)
def test_however_the_parent_ends_so_does_the_program(stand_in, cause):
    command = [sys.executable, "-c", PARENT, cause]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        guard = int(process.stdout.readline())
        if cause == "the guard is killed":
            os.kill(guard, signal.SIGKILL)
        elif cause != "an exception":
            process.send_signal(getattr(signal, cause))
        assert (process.wait(30) == 0) == (cause == "the guard is killed")
        assert ended([guard, *(int(number) for number in stand_in.read_text().split())])


def test_the_status_of_the_program_is_passed_on(monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.3)

    def status(code: str) -> int:
        with supervisor.supervised([sys.executable, "-S", "-c", code], os.environ) as process:
            return process.wait(30)

    assert status("raise SystemExit(7)") == 7
    assert status("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 128 + signal.SIGKILL
    with supervisor.supervised(["/no/such program"], os.environ, stderr=subprocess.DEVNULL) as process:
        assert process.wait(30) == 127
