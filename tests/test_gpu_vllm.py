"""On a GPU with vLLM: what tests/test_serving.py and tests/test_vllm_server.py do on a CPU, in the GPU's precision.

    pytest -s tests/test_gpu_vllm.py

prints device, versions and errors. The verifier of `serve` and `evaluate` is a chain of exact numbers (conftest.py), so
its texts and counts are known in bfloat16 too, and its drafter has a draft vocabulary of 40 of the 96 tokens.
"""

import gc
from importlib.util import find_spec

import pytest
import torch
from conftest import AUX, write_prepared
from test_serving import asked_of, check_a_chat, check_that_a_server_counts_alike, serve_in_vllm
from test_vllm_server import LENGTHS, Launched, largest_difference, left_behind

from peagle_hf import EvaluateArguments, evaluate
from peagle_hf.data.extract import ExtractArguments, extract
from peagle_hf.model.served_checkpoint import check_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM"),
]

DTYPE = "bfloat16"
A_PART = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "1G")
"""Of the GPU's memory, since two servers run at the same time, and perhaps other programs. A fixed KV cache needs no
measurement of free memory, in which vLLM fails when another program gives memory back meanwhile."""


@pytest.fixture(scope="module")
def flags(drafter, tmp_path_factory) -> dict:
    return asked_of(drafter, tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def here(flags, tmp_path_factory) -> dict:
    """The report of vLLM in processes of their own."""
    gc.collect()  # frees what other test modules left in this process
    torch.cuda.empty_cache()
    output = str(tmp_path_factory.mktemp("here"))
    return evaluate(EvaluateArguments(**flags, output=output, dtype=DTYPE, vllm_args=list(A_PART)))


@pytest.fixture(scope="module")
def served(drafter, tmp_path_factory):
    log = tmp_path_factory.mktemp("served") / "vllm.log"
    with serve_in_vllm(drafter, log, "--dtype", DTYPE, *A_PART) as served:
        yield served


def test_vllm_in_process_gives_exact_counts_with_a_draft_vocabulary(here, drafter):
    print(f"{here['device']}, {here['versions']}, {here['model_runner']}, {here['speed_up']:.2f} times as fast")
    assert check_checkpoint(drafter).draft_vocab_size == 40
    assert (here["dtype"], here["text_identical"]) == (DTYPE, True)
    assert here["by_category"]["cycle"]["acceptance_length"] == 1 + 58 / 119
    assert here["model_runner"]["with a drafter"] == "first"


def test_a_server_counts_what_vllm_in_process_counts(served, here, flags, tmp_path):
    check_that_a_server_counts_alike(served, here, flags, tmp_path)


def test_a_chat_with_the_server(served, monkeypatch, capsys):
    check_a_chat(served, monkeypatch, capsys)


def test_states_of_a_server_are_as_exact_as_those_of_this_process(servable_verifier, tmp_path):
    """Against float32 in this process, both are wrong by bfloat16's rounding."""
    data = str(write_prepared(tmp_path / "data", LENGTHS))

    def extracted(name: str, **options) -> ExtractArguments:
        return ExtractArguments(str(servable_verifier), data, str(tmp_path / name), target_layer_ids=AUX, **options)

    # On a GPU the verifier computes in bfloat16 unless it is told otherwise, whatever its states are stored in.
    exact = extract(extracted("exact", dtype="float32", verifier_dtype="float32")).output
    alone = extract(extracted("alone", dtype=DTYPE)).output
    folder = tmp_path / "states"
    with Launched(servable_verifier, folder, tmp_path / "vllm.log", DTYPE, *A_PART) as server:
        options = {"endpoint": server.url, "server_hidden_states_path": str(folder), "dtype": DTYPE}
        report = extract(extracted("served", **options))
        assert left_behind(folder) == set()
    assert report.num_tokens == sum(LENGTHS)
    ours, theirs = (largest_difference(output, exact, same_dtype=False) for output in (alone, report.output))
    between = largest_difference(report.output, alone)
    print(f"error against float32: this process {ours:.4f}, server {theirs:.4f}; between both {between:.4f}")
    assert theirs < 2 * ours
    assert between < 3 * ours
