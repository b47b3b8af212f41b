"""Extraction from a server and online training, with a small HTTP server that fails in every way that is known of."""

import base64
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import AUX, HIDDEN, LAYERS, write_prepared
from fake_vllm import NOT_VLLM, FakeVllm, FakeWritingVllm, states_of
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from peagle_hf import PeagleError, PeagleTrainingArguments, cli, train
from peagle_hf.cli.parsing import flags
from peagle_hf.data.cache_manifest import Manifest
from peagle_hf.data.cache_storage import cached_rows, check_file, row_path
from peagle_hf.data.collator import CODDataCollator
from peagle_hf.data.dataset import HiddenStatesDataset
from peagle_hf.data.endpoint import Server, concurrently, endpoint_urls
from peagle_hf.data.endpoint_folder import OwnRequests, remove_unwanted, write_server_record
from peagle_hf.data.endpoint_states import Endpoint
from peagle_hf.data.errors import EndpointError, RefusedEndpointError, RowError
from peagle_hf.data.extract import ExtractArguments, extract
from peagle_hf.data.prepared_dataset import load_prepared, split_rows
from peagle_hf.hub.card import model_card
from peagle_hf.training.checkpoints import checkpoints_by_step
from peagle_hf.training.run import build_datasets

LENGTHS = [9, 30, 20, 29, 12, 19]
SLOTS = [*AUX, LAYERS]
RECORDS = {"manifest.json", "failed.json", "server.json", "config.yaml"}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_prepared(tmp_path / "data with spaces", LENGTHS)


@pytest.fixture
def tokens(data) -> list[list[int]]:
    return load_prepared(data).with_format(None)["input_ids"][:]


@pytest.fixture
def output(data) -> Path:
    folder = data / "hidden_states"
    folder.mkdir()
    return folder


@pytest.fixture
def server(output, tiny_verifier):
    with FakeVllm(output, str(tiny_verifier), SLOTS, HIDDEN) as fake:
        yield fake


@pytest.fixture
def arguments(server, data) -> ExtractArguments:
    return ExtractArguments(
        preprocessed_data=str(data),
        endpoint=server.url,
        target_layer_ids=AUX,
        concurrency=3,
        request_timeout=5,
        max_retries=0,
        dtype="float32",
    )


def assert_right(folder: Path, tokens: list[list[int]], rows: list[int], *faults: str) -> None:
    """Exactly these rows are there, each as the server's model has it, and no file that a server could be done with."""
    assert cached_rows(folder) == set(rows)
    for row in rows:
        tensors = load_file(row_path(folder, row))
        assert tensors["token_ids"].tolist() == tokens[row]
        torch.testing.assert_close(tensors["hidden_states"], states_of(tokens[row], SLOTS, HIDDEN))
    others = {path.name for path in folder.iterdir()} - {row_path(folder, row).name for row in rows}
    # A request that is still under way when its run ends keeps its marker until it is answered.
    assert {name for name in others if not name.startswith(("cmpl-", ".peagle-"))} <= RECORDS
    assert ("locked" in faults) or not any(name.startswith("cmpl-") for name in others)


def failing(server, tokens, row: int, fault: str, times: int = 1000) -> None:
    """Let the server fail one row, so many times."""
    left = [times]

    def choose(token_ids: list[int]) -> str | None:
        if token_ids != tokens[row] or left[0] == 0:
            return None
        left[0] -= 1
        return fault

    server.fault = choose


def test_a_server_gives_the_files_and_the_manifest(arguments, server, output, tokens, tiny_verifier):
    report = extract(replace(arguments, validate_outputs=True))
    assert (report.num_rows, report.num_kept, report.num_tokens) == (6, 0, sum(LENGTHS))
    assert_right(output, tokens, list(range(6)))
    manifest = Manifest.read(output)
    assert (manifest.verifier, manifest.aux_layer_ids, manifest.dtype) == (str(tiny_verifier), AUX, "float32")
    assert extract(arguments).num_kept == 6
    assert len(server.asked) == 6


def test_model_and_layers_are_the_servers_where_none_are_named(arguments, server, output, tokens, tiny_verifier):
    write_server_record(output, str(tiny_verifier), [3, 1, 0, LAYERS])
    server.layer_ids = [0, 1, 3, LAYERS]
    report = extract(replace(arguments, target_layer_ids=None))
    assert (report.manifest.verifier, report.manifest.aux_layer_ids) == (str(tiny_verifier), [3, 1, 0])
    states = load_file(row_path(output, 2))["hidden_states"]
    torch.testing.assert_close(states, states_of(tokens[2], [3, 1, 0, LAYERS], HIDDEN))


def test_a_long_prompt_is_sent_without_work_on_each_token(server, tiny_verifier):
    prompt = [7] * 20_000

    def seconds(function, *arguments) -> float:
        start = time.thread_time()
        function(*arguments)
        return time.thread_time() - start

    with FakeWritingVllm(str(tiny_verifier), lambda token_ids, *_: token_ids[:1]) as writing:
        ask, complete = Server(server.url, 60.0, 0).ask, Server(writing.url, 60.0, 0).complete
        ask([7], "warm-up"), complete([7], 1, {7}, {})
        limit = 40 * seconds(json.dumps, prompt)
        assert seconds(ask, prompt, "long") < limit
        assert seconds(complete, prompt, 1, {7}, {}) < limit
        assert server.asked[-1] == writing.requests[-1]["prompt"] == prompt


def test_states_of_several_samples_are_converted_on_one_core_each(arguments, monkeypatch):
    num_cores, used = torch.get_num_threads(), set()
    monkeypatch.setattr("peagle_hf.data.extract.save_states", lambda *_: used.add(torch.get_num_threads()))
    try:
        torch.set_num_threads(3)
        extract(arguments)
        assert (used, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(num_cores)


REASONS = {
    "500": ("the engine is gone", "look at the server's log"),
    "503": ("the model is loading", "wait until the server is ready"),
    "429": ("too many requests", "a larger --max-retries, or fewer requests"),
    "401": ("Unauthorized", "set VLLM_API_KEY"),
    "400": ("the prompt is too long", "a larger --max-model-len"),
    "dead": ("Connection error", "start the server again, or correct its address"),
    "hang": ("timed out", "raise --request-timeout"),
    "locked": ("still writing after 0.3 s", "raise --request-timeout"),
    "missing": ("can't be read", "is full, and at the server's log"),
    "truncated": ("can't be read", "is full, and at the server's log"),
    "disk full": ("can't be read", "is full, and at the server's log"),
    "no states": ("has no hidden_states", "peagle-hf launch-vllm"),
    "tokens": ("other tokens", "without flags that change prompts"),
    "short": ("other tokens", "without flags that change prompts"),
    "nan": ("not finite", "start it with --dtype float32"),
    "inf": ("not finite", "start it with --dtype float32"),
    **dict.fromkeys(NOT_VLLM, ("isn't one of vLLM's", "name the address of vLLM itself")),
}
"""What is said of a row's fault: the reason and the advice."""


@pytest.mark.fault(
    "`extract --endpoint`: a server refuses, hangs, dies, gives cut, empty or wrong files, NaN, or answers of no vLLM",
    "All other rows are made; the row is listed with reason and advice in failed.json; a rerun makes just it.",
)
@pytest.mark.parametrize("fault", REASONS)
def test_a_row_that_fails_is_listed_and_a_rerun_makes_just_that_row(arguments, server, output, tokens, fault):
    failing(server, tokens, 3, fault)
    arguments = replace(arguments, request_timeout=0.3 if fault in ("hang", "locked") else 5)
    with pytest.raises(PeagleError, match=r"1 of 6 samples failed, row 3 with: .*failed\.json"):
        extract(arguments)
    failed = json.loads((output / "failed.json").read_text())
    assert list(failed) == ["3"]
    assert failed["3"].startswith(f"{server.url}: ")
    assert all(words in failed["3"] for words in REASONS[fault])
    assert_right(output, tokens, [0, 1, 2, 4, 5], fault)

    server.fault, server.asked = lambda token_ids: None, []
    server.released.set()
    assert extract(arguments).num_kept == 5
    assert server.asked == [tokens[3]]
    assert_right(output, tokens, list(range(6)), fault)
    assert not (output / "failed.json").exists()


def test_a_request_that_fails_once_is_repeated(arguments, server, output, tokens):
    failing(server, tokens, 3, "500", times=1)
    extract(replace(arguments, max_retries=1))
    assert_right(output, tokens, list(range(6)))
    assert len(server.asked) == 7


FATAL = {
    "outside": r"secret\.safetensors', which is no file of a server in .*it was not read\. Start .*-states-path",
    "link": "which is no file of a server .*--server-hidden-states-path",
    "a row's": r"hs_0\.safetensors', which is no file of a server",
    "layers": r"shape \[\d+, 3, 32\] .* wanted are the layers \[2, 3, 4, 7\] of size 32.*--target-layer-ids 2 3 4\.",
    "size": r"shape \[\d+, 4, 64\].* the same model",
    "integers": r"gives torch\.int64 states",
    "no path": r"extracts no hidden states\. Start it with peagle-hf launch-vllm",
}


@pytest.mark.fault(
    "`extract --endpoint`: a server of other layers, size or dtype, or one that names a file outside its folder",
    "The extraction ends, names row and server and the flags to start it with, and reads no other file.",
)
@pytest.mark.parametrize("fault", FATAL)
def test_a_server_that_is_another_than_asked_for_ends_it(arguments, server, output, tokens, fault):
    secret = output.parent / "secret.safetensors"
    right = {"hidden_states": states_of(tokens[3], SLOTS, HIDDEN), "token_ids": torch.tensor(tokens[3])}
    save_file(right, secret)
    kept = secret.read_bytes()
    extract(replace(arguments, max_samples=1))
    failing(server, tokens, 3, fault)
    with pytest.raises(RowError, match=FATAL[fault]) as error:
        extract(arguments)
    assert str(error.value).startswith(f"row 3 of {arguments.preprocessed_data}: {server.url}: ")
    assert secret.read_bytes() == kept
    assert 0 in cached_rows(output)
    assert 3 not in cached_rows(output)


def test_another_model_or_other_layers_are_found_before_anything_is_asked(arguments, server, output, tiny_verifier):
    server.model = "Qwen/Qwen3-8B"
    with pytest.raises(PeagleError, match=r"runs Qwen/Qwen3-8B, wanted is "):
        extract(replace(arguments, model=str(tiny_verifier)))
    server.model = str(tiny_verifier)
    write_server_record(output, str(tiny_verifier), [1, 2, 3, LAYERS])
    fresh = f"http://localhost:{server.port}/v1"  # each process asks an address only once
    with pytest.raises(PeagleError, match=r"extracts the layers \[1, 2, 3, 7\], wanted are \[2, 3, 4, 7\]"):
        extract(replace(arguments, model=str(tiny_verifier), endpoint=fresh))
    assert server.asked == []


def test_rows_that_a_server_has_no_room_for_are_found_before_anything_is_asked(arguments, server, output):
    server.max_model_len = max(LENGTHS)
    with pytest.raises(PeagleError, match=r"30 tokens.* takes 29 at most.*--max-model-len 31.*--seq-length 29"):
        extract(arguments)
    assert server.asked == []
    server.max_model_len += 1
    assert extract(arguments).num_rows == len(LENGTHS)


def test_a_server_with_other_layers_that_takes_over_midway_ends_it(arguments, server, output, tiny_verifier):
    def restart(token_ids: list[int]) -> None:
        write_server_record(output, str(tiny_verifier), [1, 2, 3, LAYERS])

    server.fault = restart
    with pytest.raises(PeagleError, match=r"extracts the layers \[1, 2, 3, 7\]"):
        extract(arguments)
    assert cached_rows(output) == set()


def test_a_server_that_dies_ends_it_and_when_it_is_back_nothing_is_lost(arguments, server, output, tokens):
    answered = []

    def die(token_ids: list[int]) -> str | None:
        answered.append(token_ids)
        return "dead" if len(answered) > 2 else None

    server.fault = die
    with pytest.raises(PeagleError, match="2 consecutive samples failed, so no more were tried"):
        extract(replace(arguments, concurrency=1, max_consecutive_errors=2))
    assert len(server.asked) in (4, 5), "the thread may have begun another row"
    made = cached_rows(output)
    assert len(made) == 2
    assert_right(output, tokens, sorted(made))
    server.fault = lambda token_ids: None
    assert extract(arguments).num_kept in (2, 3), "that row may have come meanwhile"
    assert_right(output, tokens, list(range(6)))


def test_the_first_failure_ends_it_where_that_is_wanted(arguments, server, tokens, output):
    failing(server, tokens, 3, "500")
    with pytest.raises(PeagleError, match="1 of 6 samples failed"):
        extract(replace(arguments, concurrency=1, fail_on_error=True))
    assert len(server.asked) in (2, 3), "the longest row, then row 3, and the thread may have begun another"


def test_a_server_that_is_not_there_is_named(arguments):
    with pytest.raises(PeagleError, match=r"http://127\.0\.0\.1:9/v1 can't be asked for its model: Connection error"):
        extract(replace(arguments, endpoint="http://127.0.0.1:9"))


def test_other_servers_take_over_from_one_that_dies(arguments, server, output, tokens, tiny_verifier):
    with FakeVllm(output, str(tiny_verifier), SLOTS, HIDDEN, lambda token_ids: "dead") as dying:
        extract(replace(arguments, endpoint=f"{dying.url},{server.url}"))
    assert_right(output, tokens, list(range(6)))
    assert 1 <= len(dying.asked) <= arguments.concurrency, "a server that failed is the last choice"


def test_servers_share_the_rows(arguments, server, output, tokens, tiny_verifier):
    with FakeVllm(output, str(tiny_verifier), SLOTS, HIDDEN) as second:
        extract(replace(arguments, endpoint=f"{server.url},{second.url}", concurrency=6))
    assert (len(server.asked), len(second.asked)) == (3, 3)


def test_ranks_share_the_rows(arguments, server, output, tokens):
    assert extract(replace(arguments, rank=1, world_size=2)).num_rows == 3
    assert cached_rows(output) == {1, 3, 5}
    failing(server, tokens, 2, "500")
    with pytest.raises(PeagleError, match=r"failed_0\.json"):
        extract(replace(arguments, rank=0, world_size=2))
    assert cached_rows(output) == {0, 1, 3, 4, 5}
    with pytest.raises(PeagleError, match=r"--rank is 2 but must be in 0 \.\. 1"):
        extract(replace(arguments, rank=2, world_size=2))


def test_two_extractors_on_one_folder_do_not_disturb_each_other(arguments, server, output, tokens):
    threads = [threading.Thread(target=extract, args=(arguments,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_right(output, tokens, list(range(6)))


def test_files_of_requests_that_were_given_up_are_removed_and_no_others(arguments, server, output, tokens):
    """Those of killed clients at once, those of others never, also when they are old; half-written rows once old."""
    other = OwnRequests(output)
    with other.request() as wanted:
        kept = (f"cmpl-{wanted}-0-ab.safetensors", f"cmpl-{wanted}-0-ab.safetensors.lock", "cmpl-1.safetensors")
        gone = (
            "cmpl-peagle-0123456789abcdef-7-0-ab.safetensors",
            "cmpl-peagle-0123456789abcdef-7-0-ab.safetensors.lock",
        )
        for name in (*kept, *gone, ".peagle-0123456789abcdef.client", ".hs_3.safetensors.ab.tmp", "notes.txt"):
            (output / name).touch()
        extract(arguments)
        assert not any((output / name).exists() for name in (*gone, ".peagle-0123456789abcdef.client"))
        assert all((output / name).exists() for name in (*kept, ".hs_3.safetensors.ab.tmp"))
        for path in output.iterdir():
            os.utime(path, (time.time() - 3600,) * 2)
        extract(arguments)
        assert all((output / name).exists() for name in (*kept, "notes.txt"))
        assert not (output / ".hs_3.safetensors.ab.tmp").exists()
    remove_unwanted(output)
    assert not any((output / name).exists() for name in kept[:2])
    assert (output / "cmpl-1.safetensors").exists(), "it isn't ours"
    assert not list(output.glob(".peagle-*"))


@pytest.mark.parametrize("fault", ["late", "locked"])
def test_states_that_come_after_the_client_gave_up_do_not_fill_the_disk(server, output, tokens, fault, monkeypatch):
    monkeypatch.setattr("peagle_hf.data.endpoint_folder.SWEEP_SECONDS", 0.0)
    endpoint = Endpoint((server.url,), output, tuple(SLOTS), HIDDEN, request_timeout=0.2, max_retries=0)
    server.fault = lambda token_ids: fault if token_ids == tokens[0] else None
    with pytest.raises(EndpointError, match=r"timed out|still writing"):
        endpoint.fetch(tokens[0], torch.float32)
    server.released.set()
    deadline = time.monotonic() + 5
    while not list(output.glob("cmpl-*.safetensors")) and fault == "late" and time.monotonic() < deadline:
        time.sleep(0.02)  # the file comes, although nobody waits for it
    time.sleep(0.1)
    endpoint.fetch(tokens[1], torch.float32)
    assert list(output.iterdir()) == []


def test_an_extractor_that_is_killed_leaves_whole_rows_only(arguments, server, data, output, tokens, tiny_verifier):
    command = [sys.executable, "-m", "peagle_hf", "extract", "--preprocessed-data", str(data), "--endpoint", server.url]
    command += ["--target-layer-ids", *map(str, AUX), "--dtype", "float32", "--concurrency", "1"]
    slow = threading.Event()
    server.fault = lambda token_ids: None if len(server.asked) < 3 else slow.wait() and None
    with subprocess.Popen(command) as process:
        while len(server.asked) < 3:
            time.sleep(0.02)
        process.kill()
    slow.set()
    made = cached_rows(output)
    assert len(made) == 2
    server.fault = lambda token_ids: None
    assert extract(replace(arguments, validate_outputs=True)).num_kept == 2
    assert cached_rows(output) == set(range(6))
    assert all(
        check_file(row_path(output, row), (len(tokens[row]), 4, HIDDEN), torch.tensor(tokens[row])) is None
        for row in range(6)
    )


def test_the_command_says_in_its_status_that_rows_failed(arguments, server, data, tokens, capsys):
    failing(server, tokens, 3, "500")
    flags = ["--preprocessed-data", str(data), "--endpoint", server.url, "--max-retries", "0", "--validate-outputs"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["extract", *flags, "--target-layer-ids", *map(str, AUX), "--concurrency", "32"])
    assert stopped.value.code == 1
    assert "row 3 with" in capsys.readouterr().err


def test_what_is_the_servers_business_is_refused(arguments):
    with pytest.raises(PeagleError, match="tell the server"):
        extract(replace(arguments, verifier_dtype="float32"))
    with pytest.raises(PeagleError, match="No verifier is named"):
        extract(replace(arguments, endpoint=None))


def test_urls_are_completed_or_refused():
    assert endpoint_urls("http://a:8000, https://b/v1/") == ("http://a:8000/v1", "https://b/v1")
    wrong = (
        "localhost:8000",
        "",
        "http://",
        "http://a:0",
        "http://a:70000",
        "http://a:x",
        "http://a,b",
        "http://a?x=1",
    )
    for url in wrong:
        with pytest.raises(PeagleError, match="is no HTTP address"):
            endpoint_urls(url)
    with pytest.raises(PeagleError, match="is no HTTP address") as error:
        endpoint_urls("http://user:secret@a:x")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("request_timeout", 0), ("request_timeout", float("nan")), ("max_retries", -1), ("concurrency", 0)],
)
def test_requests_that_could_not_be_sent_are_refused_by_flag(arguments, server, output, flag, value):
    name = f"--{flag.replace('_', '-')} is {value} but must be"
    with pytest.raises(PeagleError, match=name):
        extract(replace(arguments, **{flag: value}))
    if flag != "concurrency":
        with pytest.raises(PeagleError, match=name):
            PeagleTrainingArguments(use_cpu=True, bf16=False, **{flag: value})
        with pytest.raises(PeagleError, match=name):
            Endpoint((server.url,), output, tuple(SLOTS), HIDDEN, **{flag: value})


def test_a_password_in_the_url_is_sent_and_reaches_no_file_or_message(
    arguments, online, server, output, tokens, tmp_path, caplog, capfd
):
    server.authorization = "Basic " + base64.b64encode(b"user:se cret/@,1").decode()
    url = server.url.replace("//", "//user:se%20cret%2F@,1@")
    with pytest.raises(PeagleError, match=r"401.*VLLM_API_KEY") as error:
        extract(arguments)
    failing(server, tokens, 3, "500")
    with pytest.raises(PeagleError, match="1 of 6 samples failed") as failed:
        extract(replace(arguments, endpoint=url))
    server.fault = lambda token_ids: None
    trainer = train(PeagleTrainingArguments(**{**online, "vllm_endpoint": url, "num_train_epochs": 1}))
    texts = [
        str(error.value),
        str(failed.value),
        caplog.text,
        *capfd.readouterr(),
        repr(trainer.train_dataset.endpoint),
    ]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "run.json" for path in files)
    for secret in ("se cret", "se%20cret"):
        assert not any(secret in text for text in texts)
        assert not any(secret.encode() in path.read_bytes() for path in files)


def test_without_a_record_the_layers_are_demanded(arguments, online, server, output):
    """Defaults would label the states with layers that the server doesn't extract."""
    words = r"server\.json is missing.*--target-layer-ids"
    with pytest.raises(PeagleError, match=words):
        extract(replace(arguments, target_layer_ids=None))
    with pytest.raises(PeagleError, match=words):
        train(PeagleTrainingArguments(**{**online, "target_layer_ids": None}))
    assert server.asked == []
    for damaged in ("{", "[]", '{"layer_ids": "23"}', '{"layer_ids": [3]}', '{"layer_ids": [2, true]}'):
        (output / "server.json").write_text(damaged)
        with pytest.raises(PeagleError, match=r"server\.json is damaged"):
            extract(replace(arguments, target_layer_ids=None))


def test_load_returns_to_a_server_that_was_down_for_a_moment(output, server, tiny_verifier, monkeypatch):
    """It rests, is probed after pauses that grow, and shares the requests again once it is healthy."""
    monkeypatch.setattr("peagle_hf.data.endpoint.FIRST_PAUSE", 0.05)
    with FakeVllm(output, str(tiny_verifier), SLOTS, HIDDEN) as second:
        endpoint = Endpoint((server.url, second.url), output, tuple(SLOTS), HIDDEN, request_timeout=5, max_retries=0)

        def ask(number: int) -> tuple[int, int]:
            before = len(server.asked), len(second.asked)
            for _, result in concurrently(lambda row: endpoint.fetch([5, 6, 7], torch.float32), range(number), 4):
                assert isinstance(result, torch.Tensor), result
            return len(server.asked) - before[0], len(second.asked) - before[1]

        assert min(ask(20)) >= 5
        second.is_down = True
        assert ask(20) == (20, 0)
        time.sleep(0.4)
        ask(1)
        time.sleep(0.05)
        assert 1 <= second.num_health_checks + 1 <= 6, "the pauses grow"
        second.is_down = False
        deadline = time.monotonic() + 10
        while (shares := ask(20)) == (20, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert min(ask(20)) >= 5, shares


def test_what_a_server_refuses_is_no_sign_of_its_health(server, output, tokens):
    endpoint = Endpoint((server.url,), output, tuple(SLOTS), HIDDEN, max_retries=0)
    failing(server, tokens, 3, "400")
    with pytest.raises(RefusedEndpointError, match="the prompt is too long"):
        endpoint.fetch(tokens[3], torch.float32)
    assert endpoint.fetch(tokens[2], torch.float32).shape[0] == len(tokens[2])
    assert server.num_health_checks == 0


def test_results_come_as_they_are_ready_and_nothing_more_is_begun_when_they_are_not_wanted():
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise EndpointError("one")
        return 10 * number

    results = dict(concurrently(work, range(4), 2))
    assert (results[0], results[2], results[3], str(results[1])) == (0, 20, 30, "one")
    begun.clear()
    for _ in concurrently(lambda number: begun.append(number) or time.sleep(0.01), range(1000), 1):
        break
    time.sleep(0.1)
    assert len(begun) <= 3


# Online training


@pytest.fixture
def online(train_flags, tiny_verifier, server, data) -> dict:
    """A short run on the rows of `data`, which has no hidden states."""
    return {
        **train_flags,
        "data_path": str(data),
        "total_seq_len": 40,
        "num_train_epochs": 2,
        "train_data_ratio": 0.7,
        "draft_vocab_size": None,
        "target_layer_ids": AUX,
        "on_missing": "generate",
        "vllm_endpoint": server.url,
        "dataloader_num_workers": 1,
        "request_timeout": 5,
        "max_retries": 0,
    }


def losses(trainer) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_online_training_is_that_on_a_cache(online, server, data, output, tokens, arguments, dtype, tmp_path):
    reference = shutil.copytree(data, tmp_path / "reference")
    extract(replace(arguments, preprocessed_data=str(data), output=str(output), dtype=dtype))
    shutil.rmtree(reference / "hidden_states")
    shutil.copytree(output, reference / "hidden_states")
    cached = {**online, "data_path": str(reference), "on_missing": "raise", "output_dir": str(tmp_path / "cached")}
    wanted = losses(train(PeagleTrainingArguments(**cached)))
    for row in range(6):
        row_path(output, row).unlink()
    server.asked.clear()
    assert losses(train(PeagleTrainingArguments(**online))) == wanted
    assert cached_rows(output) == set()
    train_rows, _ = split_rows(data, online["train_data_ratio"], PeagleTrainingArguments(**online).seed)
    asked = len(train_rows) + 2 * len(tokens)
    assert len(server.asked) == asked, "the linear start, two epochs, and validation after each"

    server.asked.clear()
    keeping = {**online, "on_generate": "cache", "output_dir": str(tmp_path / "keeping")}
    assert losses(train(PeagleTrainingArguments(**keeping))) == wanted
    assert len(server.asked) == len(tokens)
    assert cached_rows(output) == set(range(6))
    for row in range(6):
        kept, extracted = (load_file(row_path(folder, row)) for folder in (output, reference / "hidden_states"))
        assert torch.equal(kept["hidden_states"], extracted["hidden_states"])


def test_a_cache_that_training_begins_has_its_manifest(online, output, tiny_verifier):
    train(PeagleTrainingArguments(**{**online, "on_generate": "cache", "num_train_epochs": 1}))
    manifest = Manifest.read(output)
    assert (manifest.verifier, manifest.aux_layer_ids, manifest.dtype) == (str(tiny_verifier), AUX, "bfloat16")
    assert manifest.storage == "plain"


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["fp8", "fp8-learnt"])
def test_online_training_follows_the_kind_of_the_cache(online, data, output, arguments, storage, tmp_path):
    kind = {"dtype": "bfloat16", "storage": storage}
    extract(replace(arguments, preprocessed_data=str(data), output=str(output), **kind))
    wanted = losses(train(PeagleTrainingArguments(**online)))
    whole = {row: row_path(output, row).read_bytes() for row in range(6)}
    for row in range(6):
        row_path(output, row).unlink()
    for policy in ("delete", "cache"):
        again = {**online, "on_generate": policy, "output_dir": str(tmp_path / policy)}
        assert losses(train(PeagleTrainingArguments(**again))) == wanted
    assert whole == {row: row_path(output, row).read_bytes() for row in range(6)}


def test_rows_are_asked_for_while_the_model_computes():
    arguments = PeagleTrainingArguments(
        on_missing="generate", vllm_endpoint="http://localhost:9", use_cpu=True, bf16=False
    )
    assert arguments.dataloader_num_workers >= 1
    online = {"on_missing": "generate", "vllm_endpoint": "http://localhost:9", "use_cpu": True, "bf16": False}
    assert PeagleTrainingArguments(**online, dataloader_num_workers=0).dataloader_num_workers == 0
    assert PeagleTrainingArguments(on_missing="generate", use_cpu=True, bf16=False).dataloader_num_workers == 0
    assert PeagleTrainingArguments(use_cpu=True, bf16=False).dataloader_num_workers == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dead_server_ends_training_with_a_checkpoint_to_go_on_from(online, server, tmp_path, workers):
    online |= {"train_data_ratio": 1, "total_seq_len": 30}
    reference = train(PeagleTrainingArguments(**{**online, "output_dir": str(tmp_path / "reference")}))
    steps, num_asked = reference.state.global_step, len(server.asked)
    assert steps >= 6
    server.asked.clear()
    server.fault = lambda token_ids: "dead" if len(server.asked) > num_asked - 2 else None
    arguments = PeagleTrainingArguments(**online)
    arguments.dataloader_num_workers = workers
    with pytest.raises(
        PeagleError, match=r"(?s)Training ended after step \d+, and is saved in .*Connection error"
    ) as error:
        train(arguments)
    assert "Traceback" not in str(error.value)
    step = max(checkpoints_by_step(arguments.output_dir))
    assert str(checkpoints_by_step(arguments.output_dir)[step]) in str(error.value)
    assert 0 < step < steps

    server.fault = lambda token_ids: None
    resumed = train(PeagleTrainingArguments(**online))
    assert resumed.state.global_step == steps
    for name, parameter in reference.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


ONLINE = {
    **{fault: REASONS[fault] for fault in REASONS if fault not in (*NOT_VLLM, "short")},
    **{fault: REASONS[fault] for fault in ("html", "empty")},
    "layers": ("of the shape", "--target-layer-ids 2 3 4"),
    "size": ("of the shape", "the same model"),
    "integers": ("torch.int64 states", "--target-layer-ids 2 3 4"),
    "outside": ("it was not read", "--hidden-states-path"),
    "no path": ("extracts no hidden states", "peagle-hf launch-vllm"),
}
OF_THE_SERVER = {"layers", "size", "integers", "outside", "no path"}


@pytest.mark.fault(
    "Online training: each of these faults of a server or of its files",
    "The error names the row, the server, the reason and the advice that fits.",
)
@pytest.mark.parametrize("fault", ONLINE)
def test_a_fault_names_the_row_the_server_and_what_to_do(online, server, data, tokens, fault):
    endpoint = Endpoint((server.url,), server.folder, tuple(SLOTS), HIDDEN, request_timeout=0.3, max_retries=0)
    dataset = HiddenStatesDataset(data, total_seq_len=30, on_missing="generate", endpoint=endpoint)
    failing(server, tokens, 3, fault)
    with pytest.raises(RowError) as raised:
        [dataset[number] for number in range(len(dataset))]
    error, message = raised.value, str(raised.value)
    reason, advice = ONLINE[fault]
    assert (error.row, error.url, error.data_path) == (3, server.url, str(data))
    assert reason in error.reason
    assert advice in error.advice
    assert message.startswith(f"row 3 of {data}: {server.url}: {error.reason}. ")
    assert ("if this row fails every time, leave it out with --skip-rows 3." in message) == (fault not in OF_THE_SERVER)
    assert ("tart the server again" in message) == (fault == "dead")


@pytest.mark.fault(
    "Online training: a server gives other layers, cuts a file, or is gone, in the middle",
    "Training ends without a worker's traceback, and the last finished step is saved.",
)
@pytest.mark.parametrize("fault", ["layers", pytest.param("truncated", marks=pytest.mark.slow)])
def test_a_fault_while_training_keeps_what_was_trained(online, server, tokens, fault):
    online |= {"train_data_ratio": 1, "total_seq_len": 30, "linear_start": False}
    server.fault = lambda token_ids: fault if len(server.asked) > 8 else None
    arguments = PeagleTrainingArguments(**online)
    with pytest.raises(RowError) as raised:
        train(arguments)
    error, message = raised.value, str(raised.value)
    assert tokens[error.row] in server.asked[8:]
    assert "Traceback" not in message
    step, folder = max(checkpoints_by_step(arguments.output_dir).items())
    assert message.startswith(f"Training ended after step {step}, and is saved in {folder}, from which the same")
    assert f"Row {error.row} of {error.data_path}: {error.url}: {error.reason}." in message


def test_an_error_of_a_row_is_the_same_from_a_loader_worker(online, server, tokens):
    server.fault = lambda token_ids: "400" if token_ids == tokens[3] else None
    dataset, _ = build_datasets(PeagleTrainingArguments(**{**online, "train_data_ratio": 1, "total_seq_len": 30}))
    number = next(number for number, rows in enumerate(dataset.plan) if 3 in rows)
    errors = []
    for workers in (0, 1):
        loader = DataLoader(dataset, sampler=[number], num_workers=workers, collate_fn=list)
        with pytest.raises(RowError) as raised:
            next(iter(loader))
        errors.append(raised.value)
    here, there = errors
    assert vars(here) == vars(there) == vars(pickle.loads(pickle.dumps(there)))
    assert str(here) == str(there)
    assert (here.row, here.url) == (3, server.url)
    assert "the prompt is too long" in here.reason


@pytest.mark.fault("Online training: a file of the cache is damaged", "Training ends; row and file are named.")
def test_a_damaged_file_is_a_fault_of_its_row_like_any_other(online, output, tokens, arguments):
    extract(arguments)
    row_path(output, 4).write_bytes(b"torn")
    online |= {"train_data_ratio": 1, "total_seq_len": 30, "linear_start": False, "on_missing": "raise"}
    with pytest.raises(RowError, match=r"ow 4 of .*hs_4\.safetensors can't be read.*peagle-hf extract again") as error:
        train(PeagleTrainingArguments(**online))
    assert error.value.row == 4


@pytest.mark.fault(
    "Online training: the disk that the states are kept on is full", "Training ends; the row is named and all is saved."
)
def test_a_full_disk_is_a_fault_of_the_row_that_is_written(online, monkeypatch):
    def fail(*_) -> None:
        raise PeagleError("No space is left on the disk of hs_1. Free some space.")

    online |= {"train_data_ratio": 1, "total_seq_len": 30, "linear_start": False, "on_generate": "cache"}
    monkeypatch.setattr("peagle_hf.data.dataset.save_states", fail)
    with pytest.raises(RowError, match=r"before its first step\. Row \d of .*No space is left .* Free some space\.$"):
        train(PeagleTrainingArguments(**online))


@pytest.mark.fault(
    "Online training: one row fails every time", "It is left out by name with --skip-rows; training goes on from there."
)
def test_a_row_that_always_fails_is_left_out_by_name_and_training_goes_on(online, server, tokens, caplog):
    online |= {"train_data_ratio": 1, "total_seq_len": 30, "linear_start": False, "num_train_epochs": 1}
    arguments = PeagleTrainingArguments(**{**online, "output_dir": f"{online['output_dir']}/0"})
    plan = build_datasets(arguments)[0].plan
    steps = len(plan)
    failing(server, tokens, 3, "400")
    for _ in range(2):
        with pytest.raises(RowError, match="leave it out with --skip-rows 3") as error:
            train(PeagleTrainingArguments(**online))
        assert error.value.row == 3
    before = len(server.asked)
    caplog.set_level("INFO")
    trainer = train(PeagleTrainingArguments(**online, skip_rows=[3]))
    assert trainer.state.global_step == steps
    assert tokens[3] not in server.asked[before:]
    assert "left out by --skip-rows: 3" in caplog.text
    record = trainer.record()
    assert record["skipped_rows"] == [3]
    assert "| samples left out | 3 |" in str(model_card(trainer.config, "me/drafter", None, record))
    assert "| samples left out |" not in str(
        model_card(trainer.config, "me/drafter", None, record | {"skipped_rows": []})
    )


def test_leaving_out_rows_moves_no_other_row(online, server, data, tokens):
    whole = HiddenStatesDataset(data, total_seq_len=30, on_missing="generate", endpoint=endpoint_of(online, server))
    alone = next(rows[0] for rows in whole.plan if len(rows) == 1)
    skipping = HiddenStatesDataset(
        data, total_seq_len=30, on_missing="generate", endpoint=endpoint_of(online, server), skip_rows=[alone]
    )
    assert skipping.plan == whole.plan
    assert skipping.num_samples == whole.num_samples - 1
    number = whole.plan.index([alone])
    (filler,) = skipping[number]["documents"]
    assert not filler["loss_mask"].any()
    assert tokens[alone] not in server.asked
    collated = CODDataCollator(num_depths=3)([skipping[number]])
    assert (collated["labels"] == -100).all()
    for wrong in ([6], [-1]):
        with pytest.raises(PeagleError, match=rf"--skip-rows names row {wrong[0]}, but the rows of .* are 0 to 5"):
            HiddenStatesDataset(data, skip_rows=wrong)
    with pytest.raises(PeagleError, match="has a token to train on"):
        HiddenStatesDataset(data, on_missing="generate", endpoint=skipping.endpoint, skip_rows=range(6))


def endpoint_of(online: dict, server: FakeVllm) -> Endpoint:
    return Endpoint((server.url,), server.folder, tuple(SLOTS), HIDDEN, max_retries=0)


@pytest.mark.fault(
    "`extract`: one row fails every time", "It is left out with --skip-rows; training takes the flag too."
)
def test_extraction_leaves_out_the_same_rows(arguments, server, output, tokens, online):
    failing(server, tokens, 3, "400")
    with pytest.raises(PeagleError, match=r"leave out what fails every time with --skip-rows 3\."):
        extract(arguments)
    assert extract(replace(arguments, skip_rows=[3])).num_rows == 5
    assert_right(output, tokens, [0, 1, 2, 4, 5])
    cached = {**online, "on_missing": "raise", "num_train_epochs": 1}
    with pytest.raises(PeagleError, match=r"--on-missing skip, or --skip-rows 3 to go on without them"):
        train(PeagleTrainingArguments(**cached))
    train(PeagleTrainingArguments(**cached, skip_rows=[3]))
    with pytest.raises(PeagleError, match="--skip-rows names row 17"):
        extract(replace(arguments, skip_rows=[17]))


@pytest.mark.fault(
    "Online training: a row of the validation fails",
    "Training ends and is saved; the rerun validates first, and ends with the same weights and the same best.",
)
def test_a_validation_that_fails_ends_training_and_is_made_up_for_by_the_rerun(online, server, data, tokens, tmp_path):
    reference = train(PeagleTrainingArguments(**{**online, "output_dir": str(tmp_path / "reference")}))
    _, held_out = split_rows(data, online["train_data_ratio"], online.get("seed", 42))
    failing(server, tokens, held_out[0], "dead")
    for _ in range(2):
        with pytest.raises(RowError, match=r"ended after step \d+, in its validation, and is saved in ") as error:
            train(PeagleTrainingArguments(**online))
        assert error.value.row == held_out[0]
    step = max(checkpoints_by_step(online["output_dir"]))
    assert step == reference.state.global_step // 2
    server.fault = lambda token_ids: None
    trainer = train(PeagleTrainingArguments(**online))
    validated, wanted = (
        {entry["step"]: entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry}
        for one in (trainer, reference)
    )
    assert validated == wanted
    assert trainer.state.best_global_step == reference.state.best_global_step
    assert trainer.state.best_metric == reference.state.best_metric
    for name, parameter in reference.model.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name
    best = [
        (Path(folder) / "checkpoint_best").resolve().name for folder in (tmp_path / "reference", online["output_dir"])
    ]
    assert best[0] == best[1]
    assert not any("validation_owed" in entry for entry in trainer.state.log_history)


@pytest.mark.slow
@pytest.mark.fault(
    "Two processes train online: a row fails in the linear start, in training, or in validation",
    "Both end with the same message, the last finished step is saved, and a rerun goes on from there.",
)
@pytest.mark.parametrize("part", ["linear start", "training", "validation"])
def test_two_processes_end_together_when_the_server_is_gone_and_go_on(online, server, data, tokens, part):
    online |= {"total_seq_len": 30, "dataloader_num_workers": 1, "train_data_ratio": 0.7 if part == "validation" else 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "peagle_hf"]
    command += ["train", *flags(online)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if part == "training":
        server.fault = lambda token_ids: "dead" if len(server.asked) > 6 + 8 else None
    else:
        _, held_out = split_rows(data, 0.7, 42)
        failing(server, tokens, held_out[0], "400")
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert first.returncode != 0
    if part == "linear start":
        assert len(re.findall(rf"row {held_out[0]} of \S+ ?.*the prompt is too long", first.stderr)) == 2
        return
    found = set(re.findall(r"Training ended after step (\d+).*, and is saved in (\S+), .*", first.stderr))
    assert len(found) == 1, first.stderr[-3000:]
    ((step, folder),) = found
    assert max(checkpoints_by_step(online["output_dir"])) == int(step)
    assert first.stderr.count("Training ended after step") == 2, "both processes say it"
    server.fault = lambda token_ids: None
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"Resuming from {folder}" in second.stderr
    assert (Path(online["output_dir"]) / "1" / "model.safetensors").exists(), "the second epoch's"


def test_a_server_that_is_dead_from_the_start_or_another_is_found_before_training(online, server, output):
    with pytest.raises(PeagleError, match="can't be asked for its model"):
        train(PeagleTrainingArguments(**{**online, "vllm_endpoint": "http://127.0.0.1:9/v1"}))
    write_server_record(output, server.model, [1, 2, 3, LAYERS])
    with pytest.raises(PeagleError, match=r"extracts the layers \[1, 2, 3, 7\]"):
        train(PeagleTrainingArguments(**online))


def test_an_endpoint_is_taken_to_other_processes(server, output):
    endpoint = Endpoint((server.url,), output, tuple(SLOTS), HIDDEN)
    endpoint.fetch([5, 6, 7], torch.float32)
    copy = pickle.loads(pickle.dumps(endpoint))
    torch.testing.assert_close(copy.fetch([5, 6, 7], torch.float32), states_of([5, 6, 7], SLOTS, HIDDEN))
