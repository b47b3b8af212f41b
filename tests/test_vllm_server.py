"""A real vLLM server, started by `peagle-hf launch-vllm`: what it extracts, what becomes of it, and training on it."""

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import AUX, VllmServer, ended, write_prepared
from safetensors.torch import load_file

from peagle_hf import PeagleError, PeagleTrainingArguments, train
from peagle_hf.data.cache_storage import cached_rows, row_path
from peagle_hf.data.endpoint_folder import SERVER_RECORD
from peagle_hf.data.extract import ExtractArguments, extract

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LENGTHS = [40, 9, 120, 33, 300, 57, 12, 200]


class Launched(VllmServer):
    """A server of hidden states as a user starts it."""

    def __init__(self, model: Path, folder: Path, log: Path, dtype: str = "float32", *flags: str):
        self.model, self.folder = model, folder
        flags = ["--dtype", dtype, "--max-model-len", "400", *flags]
        command = ["peagle_hf", "launch-vllm", str(model), "--hidden-states-path", str(folder), "--"]
        super().__init__(command, flags, log)

    def start(self) -> None:
        super().start()
        deadline = time.monotonic() + 10
        while not (self.folder / SERVER_RECORD).exists():
            assert time.monotonic() < deadline, "the server answers, and there is no record"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory, servable_verifier) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("served") / "hidden states"
    with Launched(servable_verifier, folder, folder.parent / "vllm.log") as launched:
        yield launched


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("data") / "with spaces", LENGTHS)


@pytest.fixture(scope="module")
def embedded(servable_verifier, data, tmp_path_factory) -> Path:
    """The same rows from transformers, in float32."""
    output = tmp_path_factory.mktemp("embedded")
    flags = {"preprocessed_data": str(data), "target_layer_ids": AUX, "dtype": "float32"}
    return extract(ExtractArguments(model=str(servable_verifier), output=str(output), **flags)).output


@pytest.fixture
def arguments(server, data, tmp_path) -> ExtractArguments:
    return ExtractArguments(
        preprocessed_data=str(data),
        output=str(tmp_path / "out put"),
        endpoint=server.url,
        server_hidden_states_path=str(server.folder),
        target_layer_ids=AUX,
        dtype="float32",
        concurrency=4,
        request_timeout=30,
    )


def largest_difference(one: Path, other: Path, same_dtype: bool = True) -> float:
    """Over all rows and layers, relative to the layer's largest value."""
    differences = []
    for row in range(len(LENGTHS)):
        ours, theirs = load_file(row_path(one, row)), load_file(row_path(other, row))
        assert torch.equal(ours["token_ids"], theirs["token_ids"])
        assert not same_dtype or ours["hidden_states"].dtype == theirs["hidden_states"].dtype
        states, wanted = ours["hidden_states"].float(), theirs["hidden_states"].float()
        differences.append(((states - wanted).abs().amax((0, 2)) / wanted.abs().amax((0, 2))).max())
    return float(torch.stack(differences).max())


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {SERVER_RECORD}


def test_the_server_gives_the_states_that_transformers_gives(arguments, server, embedded, data, tmp_path):
    report = extract(arguments)
    assert report.num_tokens == sum(LENGTHS)
    assert largest_difference(report.output, embedded) < 1e-4
    assert left_behind(server.folder) == set()
    assert extract(replace(arguments, validate_outputs=True)).num_kept == len(LENGTHS)

    half = replace(arguments, dtype="bfloat16", output=str(tmp_path / "half"))
    alone = ExtractArguments(str(server.model), str(data), str(tmp_path / "alone"), target_layer_ids=AUX)
    assert largest_difference(extract(half).output, extract(alone).output) <= 2**-7, "one step of bfloat16"


def test_the_longest_row_that_the_server_takes_is_known_before_it_is_asked(arguments, tmp_path):
    long = write_prepared(tmp_path / "long", [20, 400])
    with pytest.raises(PeagleError, match=r"longest sample has 400 tokens.* takes 399 at most"):
        extract(replace(arguments, preprocessed_data=str(long)))
    assert cached_rows(arguments.output) == set()
    fitting = write_prepared(tmp_path / "fitting", [20, 399])
    assert extract(replace(arguments, preprocessed_data=str(fitting))).num_tokens == 419


def test_other_layers_than_the_servers_are_refused(arguments, server):
    with pytest.raises(PeagleError, match=r"extracts the layers \[2, 3, 4, 7\], wanted are \[1, 2, 3, 7\]"):
        extract(replace(arguments, target_layer_ids=[1, 2, 3]))
    record = server.folder / SERVER_RECORD
    record.rename(record.with_suffix(".away"))
    try:
        with pytest.raises(PeagleError, match=r"\[\d+, 4, 128\] .* wanted are the layers \[1, 2, 7\] of size 128"):
            extract(replace(arguments, target_layer_ids=[1, 2]))
    finally:
        record.with_suffix(".away").rename(record)
    assert cached_rows(arguments.output) == set()


def test_a_client_that_is_killed_goes_on_where_it_was(arguments, server, data, embedded):
    command = [sys.executable, "-m", "peagle_hf", "extract", "--preprocessed-data", str(data), "--concurrency", "1"]
    command += ["--endpoint", server.url, "--output", arguments.output, "--dtype", "float32"]
    command += ["--server-hidden-states-path", str(server.folder)]
    with subprocess.Popen(command) as process:
        while len(cached_rows(arguments.output)) < 2:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert 2 <= len(cached_rows(arguments.output)) < len(LENGTHS)
    report = extract(replace(arguments, validate_outputs=True))
    assert (report.made_again, cached_rows(report.output)) == ({}, set(range(len(LENGTHS))))
    assert largest_difference(report.output, embedded) < 1e-4


def test_a_server_that_hangs_is_given_up_and_asked_again_by_a_rerun(arguments, server, embedded):
    server.api_server.suspend()
    try:
        with pytest.raises(PeagleError, match="timed out"):
            extract(replace(arguments, request_timeout=0.5, max_retries=0, max_consecutive_errors=2))
    finally:
        server.api_server.resume()
    assert largest_difference(extract(arguments).output, embedded) < 1e-4


def test_online_training_is_that_on_a_cache_of_the_same_server(arguments, server, train_flags, data, tmp_path):
    cache = extract(replace(arguments, dtype="bfloat16")).output
    flags = train_flags | {
        "verifier_name_or_path": str(server.model),
        "data_path": str(data),
        "total_seq_len": 400,
        "draft_vocab_size": None,
        "num_train_epochs": 2,
        "target_layer_ids": AUX,
    }
    online = {"on_missing": "generate", "vllm_endpoint": server.url, "server_hidden_states_path": str(server.folder)}
    online |= {"hidden_states_path": str(tmp_path / "none"), "output_dir": str(tmp_path / "online")}

    def losses(**others: object) -> list[float]:
        history = train(PeagleTrainingArguments(**(flags | others))).state.log_history
        return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]

    # The server's own float32 sums depend on what it computes at the same time.
    assert losses(**online) == pytest.approx(losses(hidden_states_path=str(cache)), rel=1e-3)
    assert left_behind(server.folder) == set()


def test_a_server_that_is_killed_and_started_again(arguments, server, embedded):
    server.api_server.kill()
    with pytest.raises(PeagleError, match=r"asked for its model|consecutive samples failed"):
        extract(replace(arguments, max_retries=0, max_consecutive_errors=2))
    assert server.process.wait(60) == 1, "launch-vllm says that vLLM failed"
    assert ended(server.tree)
    server.start()
    assert largest_difference(extract(arguments).output, embedded) < 1e-4


def test_an_interrupt_leaves_no_process(server):
    assert server.tree
    assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
    assert ended(server.tree)
    assert left_behind(server.folder) == set()
    assert not (server.folder / SERVER_RECORD).exists()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{server.url}/models", timeout=5)
