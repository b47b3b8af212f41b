"""Serving a drafter, chatting with it and measuring it from outside."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VllmServer, ended
from safetensors.torch import load_file, save_file

from peagle_hf import EvaluateArguments, PeagleError, cli, evaluate
from peagle_hf.data.endpoint import Server
from peagle_hf.data.errors import EndpointError
from peagle_hf.data.prompts import Prompt
from peagle_hf.data.tokenizer import ChatOptions, load_tokenizer
from peagle_hf.evaluation.report import text
from peagle_hf.evaluation.runs import Condition
from peagle_hf.evaluation.vllm_process import Job, _Conversations, _device, _do
from peagle_hf.fingerprint import weights_of
from peagle_hf.hub.card import model_card
from peagle_hf.hub.evaluation_json import read_evaluation
from peagle_hf.model.served_checkpoint import RUN_RECORD, check_checkpoint
from peagle_hf.serving.chat import ChatArguments
from peagle_hf.serving.client import Client
from peagle_hf.serving.environment import installed_vllm
from peagle_hf.serving.launch import LaunchArguments, ServeArguments, drafting_command, server_command

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}{{ 'w9' if enable_thinking else 'w8' }}"
ROWS = [
    {"question_id": 2, "category": "long", "turns": ["a b c d e f g", "a b c"]},
    {"question_id": 1, "category": "short", "turns": ["a b c"]},
    {"question_id": 3, "category": "short", "turns": ["a b c"]},
]
# One token, then of drafts 1, 2 and 3 tokens by turns: 4 tokens take two drafts, of which one accepts a token;
# 8 tokens take four, with 1 + 2 tokens accepted.
SHORT, LONG = [2, 6, 1, 1, 0, 0], [4, 12, 3, 2, 1, 0]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def arguments(drafter, prompts, tmp_path, server):
    def arguments(**changes) -> EvaluateArguments:
        fields = {"model": str(drafter), "suite": [str(prompts)], "output": str(tmp_path / "out"), "max_tokens": 60}
        return EvaluateArguments(**{**fields, "endpoint": server.url, **changes})

    return arguments


# Serving


def option(command: list[str], name: str) -> dict:
    return json.loads(command[command.index(name) + 1])


def test_the_drafter_is_served_beside_the_verifier_that_it_names(drafter, chain):
    arguments = ServeArguments(str(drafter), num_speculative_tokens=5)
    arguments.vllm_args = ["--port", "8001"]
    command = drafting_command(arguments, on_cpu=False)
    assert command[:5] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(chain)]
    assert command[-2:] == ["--port", "8001"]
    wanted = {"model": str(drafter), "method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": 5}
    wanted["draft_sample_method"] = "probabilistic"
    assert option(command, "--speculative-config") == wanted
    on_cpu = drafting_command(ServeArguments(str(drafter)), on_cpu=True)
    assert on_cpu[2:5] == ["vllm.entrypoints.openai.api_server", "--model", str(chain)]
    assert option(on_cpu, "--speculative-config")["num_speculative_tokens"] == 3
    likely = drafting_command(ServeArguments(str(drafter), draft_sample_method="greedy"), on_cpu=False)
    assert option(likely, "--speculative-config")["draft_sample_method"] == "greedy"


@pytest.mark.parametrize(
    "words",
    [
        ["--speculative-config", '{"method": "ngram"}'],
        ["--speculative_config.num_speculative_tokens", "2"],
        ["-sc.num_speculative_tokens=2"],
        ["--spec-tokens", "2"],
    ],
    ids=lambda words: words[0],
)
def test_flags_by_which_vllm_would_forget_the_drafter_are_refused(drafter, servable_verifier, tmp_path, words):
    with pytest.raises(PeagleError, match=f"{re.escape(words[0])} stands after --, but .* sets --speculative-config"):
        drafting_command(ServeArguments(str(drafter), vllm_args=words), on_cpu=False)
    states = LaunchArguments(str(servable_verifier), str(tmp_path), vllm_args=["--kv-transfer-config", "{}"])
    with pytest.raises(PeagleError, match="--kv-transfer-config stands after --"):
        server_command(states, on_cpu=False)
    for command, arguments in {
        drafting_command: ServeArguments(str(drafter), vllm_args=["--model=another"]),
        server_command: LaunchArguments(str(servable_verifier), str(tmp_path), vllm_args=["--model", "another"]),
    }.items():
        with pytest.raises(PeagleError, match="stands after --, but this command itself sets --model"):
            command(arguments, on_cpu=True)
    with_kv = ServeArguments(str(drafter), vllm_args=["--kv-transfer-config", "{}", "--port", "1"])
    assert drafting_command(with_kv, on_cpu=False)[-4:] == with_kv.vllm_args


@pytest.mark.fault(
    "A checkpoint lacks a tensor, or another verifier is named for it", "`serve` refuses it before vLLM starts."
)
def test_a_bad_checkpoint_or_another_verifier_is_found_before_vllm_starts(drafter, servable_verifier, tmp_path, capsys):
    pytest.importorskip("vllm")
    for words, flags in (
        ("holds no config.json", [str(tmp_path)]),
        ("was made for", [str(drafter), "--verifier", str(servable_verifier)]),
        ("There is no folder no/such", ["no/such"]),
    ):
        with pytest.raises(SystemExit):
            cli.main(["serve", *flags])
        assert words in capsys.readouterr().err


def test_more_tokens_than_the_drafter_was_trained_for_are_warned_of(drafter, caplog):
    trained = check_checkpoint(drafter).num_depths
    for number in (None, trained):
        drafting_command(ServeArguments(str(drafter), num_speculative_tokens=number and str(number)), on_cpu=False)
    assert "never learnt" not in caplog.text
    drafting_command(ServeArguments(str(drafter), num_speculative_tokens=str(trained + 2)), on_cpu=False)
    assert f"was trained to draft {trained} tokens at a time and never learnt the further ones up to {trained + 2}" in (
        caplog.text
    )


def test_a_verifier_with_other_weights_than_in_training_is_warned_of(drafter, chain, tmp_path, caplog):
    folder, other = shutil.copytree(drafter, tmp_path / "drafter"), shutil.copytree(chain, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    (folder / RUN_RECORD).write_text(json.dumps({"verifier": weights_of(chain)}))
    drafting_command(ServeArguments(str(folder)), on_cpu=False)
    drafting_command(ServeArguments(str(drafter), verifier=str(other)), on_cpu=False)  # it has no record
    assert "other weights" not in caplog.text
    drafting_command(ServeArguments(str(folder), verifier=str(other)), on_cpu=False)
    assert f"{other} has other weights than the verifier that the drafter {folder} was trained with" in caplog.text


def test_a_verifier_that_was_moved_is_asked_for(drafter, chain, prompts, tmp_path, monkeypatch, capsys):
    folder, gone = shutil.copytree(drafter, tmp_path / "made elsewhere"), tmp_path / "gone"
    config = folder / "config.json"
    config.write_text(config.read_text().replace(str(chain), str(gone)))
    output = ["--output", str(tmp_path / "out")]
    for command in (
        ["serve", str(folder), "--dry-run"],
        ["evaluate", "--model", str(folder), "--suite", str(prompts), *output],
        ["acceptance", "--model", str(folder), "--data-path", str(tmp_path), *output],
    ):
        with pytest.raises(SystemExit):
            cli.main(command)
        said = capsys.readouterr().err
        assert f"was trained with the verifier in {gone}, but there is no such folder" in said
        assert "name it with --verifier" in said
    cli.main(["serve", str(folder), "--verifier", str(chain), "--dry-run"])
    assert str(chain) in capsys.readouterr().out
    config.write_text(config.read_text().replace(str(gone), "gone/verifier"))  # it could be a name on the hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        cli.main(["serve", str(folder), "--dry-run"])
    assert re.search(r"verifier gone/verifier can't be read.* name it with --verifier", capsys.readouterr().err, re.S)


@pytest.fixture
def trained_drafter(drafter, tmp_path) -> Path:
    """With the record of a training on chats of a chosen template without thoughts."""
    folder = shutil.copytree(drafter, tmp_path / "trained")
    record = {"chat_template": TEMPLATE, "chat_template_kwargs": {"enable_thinking": False}}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


def test_the_server_writes_chats_as_the_training_did(trained_drafter, drafter, tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="peagle_hf")
    command = drafting_command(ServeArguments(str(trained_drafter)), on_cpu=False)
    assert option(command, "--default-chat-template-kwargs") == {"enable_thinking": False}
    assert Path(command[command.index("--chat-template") + 1]).read_text() == TEMPLATE
    (said,) = [record.message for record in caplog.records]
    assert 'the chat template and the chat template\'s variables {"enable_thinking": false}' in said

    caplog.clear()
    own = tmp_path / "own template.jinja"
    own.write_text("{{ messages }}")
    flags = ["--chat-template", str(own), "--chat-template-kwargs", '{"a": "ä"}', "--dry-run"]
    cli.main(["serve", str(trained_drafter), *flags])
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("--chat-template") + 1] == str(own)
    assert option(words, "--default-chat-template-kwargs") == {"a": "ä"}
    assert "From the training" not in caplog.text
    warns = not torch.cuda.is_available() and installed_vllm().samples_wrongly_on_cpu
    assert ("Name none above 0, or serve without a drafter" in caplog.text) == warns
    assert ("--override-generation-config" in words) == warns
    if warns:
        assert option(words, "--override-generation-config") == {"temperature": 0}

    for folder, changes in ((drafter, {}), (trained_drafter, {"chat_template": str(own), "chat_template_kwargs": {}})):
        command = drafting_command(ServeArguments(str(folder), **changes), on_cpu=False)
        assert "--default-chat-template-kwargs" not in command
        assert ("--chat-template" in command) == bool(changes)
    by_name = drafting_command(ServeArguments(str(trained_drafter), chat_template="default"), on_cpu=False)
    assert "{{ message['content'] }}" in Path(by_name[by_name.index("--chat-template") + 1]).read_text()
    with pytest.raises(PeagleError, match=r"--chat-template nowhere is neither a template of .* \(it has default\)"):
        drafting_command(ServeArguments(str(drafter), chat_template="nowhere"), on_cpu=False)


def test_a_template_is_written_for_a_user_without_a_name(trained_drafter, monkeypatch):
    """As in a container that is run with a number that /etc/passwd doesn't have."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    command = drafting_command(ServeArguments(str(trained_drafter)), on_cpu=False)
    assert Path(command[command.index("--chat-template") + 1]).read_text() == TEMPLATE


# Measuring


def test_servers_are_asked_with_the_template_variables_of_the_training(
    arguments, server, trained_drafter, prompts, tmp_path, caplog
):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    question = {"messages": [{"role": "user", "content": "a b"}], "tools": tools}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, question]))
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    journals = []
    output = Path(arguments().output)
    server.chat_fault = lambda message: journals.extend(path.read_text() for path in output.glob("*.journal"))
    for changes, kwargs, template in (
        ({}, {"enable_thinking": False}, None),
        ({"chat_template_kwargs": '{"a": 1}'}, {"a": 1}, None),
        ({"chat_template_kwargs": {}, "chat_template": str(own)}, None, own.read_text()),
    ):
        server.requests.clear()
        caplog.clear()
        report = evaluate(arguments(model=str(trained_drafter), **changes))
        assert [request.get("chat_template_kwargs") for request in server.requests] == [kwargs] * 10
        assert [request.get("chat_template") for request in server.requests] == [template] * 10
        offered = [(request["tools"], request["tool_choice"]) for request in server.requests if "tools" in request]
        assert offered == [(tools, "none")]
        assert report["chat_template_kwargs"] == kwargs
        assert report["chat_template"].startswith("sha256 ")
        assert json.loads(journals[-1].splitlines()[0])["settings"]["chat_template_kwargs"] == kwargs
        assert ("was trained with another chat template or other variables" in caplog.text) == bool(changes)
        assert ("Make sure that the servers were started with the chat template" in caplog.text) == (template is None)
    assert "--chat-template-kwargs '{}'" in report["command"]
    evaluate(arguments(model=arguments().model))
    assert "chat_template_kwargs" not in server.requests[-1]
    with pytest.raises(PeagleError, match="is not valid JSON"):
        arguments(chat_template_kwargs="{enable")


def test_vllm_in_this_machine_is_given_the_template_and_the_tools(chain):
    """Also where vLLM's own tokenizer takes neither, as that of Mistral's models with tekken.json."""
    engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=99))
    llm, tokenizer = SimpleNamespace(llm_engine=engine, renderer=None), load_tokenizer(str(chain), False)
    prompts = [Prompt("1", "chat", [], ["w5"], tools=[{"name": "w20"}])]
    template = "{{ tools[0].name }} {{ messages[0].content }} {{ word }}"
    job = Job(prompts, [], 8, options=ChatOptions(template, {"word": "w7"}))
    assert _Conversations(llm, tokenizer, job, 0.0, None).inputs(0) == {"prompt_token_ids": [20, 5, 7]}
    refusing = replace(job, options=ChatOptions("{{ raise_exception('no tools here') }}"))
    with pytest.raises(PeagleError, match=r"Turn 0 of prompt 1 .*refuses it \(no tools here\)"):
        _Conversations(llm, tokenizer, refusing, 0.0, None).inputs(0)


def test_a_report_says_how_many_gpus_were_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for number, device in ((1, "NVIDIA H200"), (8, "8 x NVIDIA H200")):
        config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=number))
        assert _device(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))) == device


def test_each_load_is_warmed_up_with_as_many_chats_before_it_is_timed(chain, monkeypatch):
    pytest.importorskip("vllm")
    done: list[tuple[str, int]] = []
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=99)),
        renderer=None,
        get_metrics=list,
        generate=lambda inputs, sampling, use_tqdm: done.append((f"{sampling.max_tokens} tokens", len(inputs))),
    )
    monkeypatch.setattr(_Conversations, "hold", lambda self, indices, load, report: done.append(("timed", load)))
    prompts = [Prompt(str(number), "chat", [], ["w5"]) for number in range(3)]
    job = Job(prompts, [Condition(0.0, load) for load in (1, 2, 9)], 60)
    _do(job, llm, load_tokenizer(str(chain), False), False, lambda run: None)
    assert done == [("8 tokens", 1), ("timed", 1), ("8 tokens", 2), ("timed", 2), ("8 tokens", 3), ("timed", 9)]


def test_servers_give_the_report_that_vllm_in_process_gives(arguments, server, baseline, drafter, capsys):
    report = evaluate(arguments(baseline_endpoint=baseline.url, concurrency=[1, 3], rounds=2))
    categories = report["by_category"]
    assert [(name, row["num_prompts"]) for name, row in categories.items()] == [("long", 1), ("short", 2)]
    assert categories["short"]["per_position_acceptance"] == [0.5, 0, 0]
    counts = [short * 2 + long + short for short, long in zip(SHORT, LONG, strict=True)]
    counted = [report[name] for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")]
    assert counted == counts[:3]
    assert report["per_position_acceptance"] == [count / counts[0] for count in counts[3:]]
    places = zip([counts[0], *counts[3:-1]], counts[3:], strict=True)
    assert report["conditional_acceptance"] == pytest.approx([accepted / reached for reached, accepted in places])
    assert report["acceptance_length"] == 1 + counts[2] / counts[0]
    assert (report["num_speculative_tokens"], report["concurrency"], report["num_prompts"]) == (3, 3, 3)
    assert (report["text_identical"], report["num_identical"]) == (True, 3)
    assert report["versions"]["vllm"] == "0.32.0"
    assert [row["concurrency"] for row in report["by_concurrency"]] == [1, 3]
    for row in report["by_concurrency"]:
        assert row["num_drafts"] == counts[0]
        for suffix in ("", "_without"):
            assert row[f"tokens_per_second{suffix}"] > 0
            times = row[f"latency_seconds{suffix}"]
            assert 0 < times["first_token"]["median"] < times["request"]["median"] <= times["request"]["p99"] < 5
            assert 0 <= times["output_token"]["mean"] < times["request"]["mean"]
    assert report["tokens_per_second"] == report["by_concurrency"][1]["tokens_per_second"]

    output = Path(arguments().output)
    assert json.loads((output / "evaluation.json").read_text()) == report
    assert (output / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "without" in table
    assert "Of those that reach it" in table
    assert "To first token, s" in table
    assert report["others"] == []
    # Each run begins with as many short requests at a time as it will have, since vLLM compiles kernels for them.
    assert Counter(request["max_tokens"] for request in server.requests) == {2: 1, 8: 2 * (1 + 3), 60: 2 * 2 * 4}
    (output / "evaluation.json").write_text(json.dumps(report | {"break_even_length": 1.4}))
    card = model_card(
        check_checkpoint(drafter), "my-lab/d", None, None, read_evaluation(output / "evaluation.json", drafter)
    ).text
    assert "| tokens per second without |" in card
    assert "| pays from acceptance length | 1.40 |" in card
    assert server.url not in card


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"vllm_args": ["--quantization", "fp8"]}, "A running server has its own flags"),
        ({"vllm_args": ["--load_format=dummy"], "endpoint": None}, "a verifier of random weights accepts no drafter's"),
    ],
)
def test_flags_for_vllm_that_an_evaluation_could_not_use_are_refused(arguments, flags, words):
    with pytest.raises(PeagleError, match=words):
        arguments(**flags)


def test_one_prompt_is_no_plural_and_no_draft_is_no_acceptance(arguments, baseline, prompts, caplog, capsys):
    prompts.write_text(json.dumps({"turns": ["a b c"]}) + "\n")
    for tokens in (60, 1):
        evaluate(arguments(baseline_endpoint=baseline.url, max_tokens=tokens))
        printed = capsys.readouterr().out
        assert not re.search(r"(?<![\d.,])1 (chat|prompt|token)s\b", printed + caplog.text)
        assert "identical with and without the drafter for the only prompt" in printed
        assert ("vLLM drafted nothing, so acceptance isn't known" in printed) == (tokens == 1)


def test_what_is_asked_is_what_vllm_in_process_is_given(arguments, server, baseline):
    """Later turns follow the answers without the drafter; neither the prefix cache nor the model's defaults play in."""
    baseline.first = 50
    report = evaluate(arguments(baseline_endpoint=baseline.url))
    second = next(request for request in server.requests if len(request["messages"]) == 3)
    assert second["messages"][1]["content"].startswith("w50 w51")
    assert (second["temperature"], second["repetition_penalty"], second["max_tokens"]) == (0, 1, 60)
    assert [request["max_tokens"] for request in server.requests] == [2, 8, 8, 8, 60, 60, 60, 60]
    assert len({request["cache_salt"] for request in server.requests[1:]}) == 7
    assert report["text_identical"] is False
    assert [place["token"] for place in report["differences"]] == [0, 0, 0]


def test_k_by_load_is_read_from_the_evaluation_beside_the_drafter(arguments, baseline, drafter, tmp_path, caplog):
    """Of this drafter, named or found; where it doesn't pay, vLLM is told to draft nothing."""
    caplog.set_level("INFO", logger="peagle_hf")
    report = evaluate(arguments(baseline_endpoint=baseline.url, concurrency=[1, 3]))
    one, three = report["recommended_num_speculative_tokens"]
    assert [row["concurrency"] for row in (one, three)] == [1, 3]
    assert {*one["tokens_per_second_by_k"]} == {"0", "3"}
    one["tokens_per_second_by_k"], three["tokens_per_second_by_k"] = {"0": 1.0, "3": 2.0}, {"0": 2.0, "3": 1.0}
    link = tmp_path / "run" / "checkpoint_best"
    link.parent.mkdir()
    link.symlink_to(drafter)
    auto = {"num_speculative_tokens": "auto"}
    with pytest.raises(PeagleError, match=r"there is no evaluation\.json .* Name it with --evaluation"):
        drafting_command(ServeArguments(str(link), **auto), on_cpu=False)
    path = link.parent / "evaluation.json"
    path.write_text(json.dumps(report))
    for changes in ({}, {"evaluation": str(path)}):
        command = drafting_command(ServeArguments(str(link), **auto, **changes), on_cpu=False)
        config = json.loads(command[command.index("--speculative-config") + 1])
        assert config["num_speculative_tokens"] == 3
        assert config["num_speculative_tokens_per_batch_size"] == [[1, 1, 3], [2, 3, 0]]
    assert f"comes from the report {path}, measured on a vLLM server with vLLM 0.32.0" in caplog.text
    beside = link.parent / "evaluation" / "evaluation.json"
    beside.parent.mkdir()
    path.rename(beside)
    path.write_text(json.dumps(report | {"drafter_weights": "other"}))  # the report of another drafter is passed over
    assert drafting_command(ServeArguments(str(link), **auto), on_cpu=False) == command
    beside.unlink()
    with pytest.raises(PeagleError, match=r"evaluates a different checkpoint .*evaluate --model '[^']*'\."):
        drafting_command(ServeArguments(str(link), **auto), on_cpu=False)
    del report["recommended_num_speculative_tokens"]
    path.write_text(json.dumps(report))
    with pytest.raises(PeagleError, match="recommends nothing"):
        drafting_command(ServeArguments(str(link), **auto), on_cpu=False)
    for tokens in ("0", "-1", "many"):
        with pytest.raises(PeagleError, match=f"--num-speculative-tokens is {tokens} but"):
            ServeArguments(str(link), num_speculative_tokens=tokens)
    with pytest.raises(PeagleError, match="--evaluation is read for"):
        ServeArguments(str(link), evaluation=str(path))


def test_a_load_for_which_there_are_too_few_prompts_is_named_and_recommends_nothing(
    arguments, baseline, caplog, capsys
):
    report = evaluate(arguments(baseline_endpoint=baseline.url, concurrency=[1, 3, 16]))
    assert "--concurrency is 16, but the suite has only 3 prompts" in caplog.text
    assert [row["chats_at_a_time"] for row in report["by_concurrency"]] == [1, 3, 3]
    assert [row["concurrency"] for row in report["recommended_num_speculative_tokens"]] == [1, 3]
    assert report["concurrency"] == 3
    printed = capsys.readouterr().out
    assert "Only 3 chats ran at a time at --concurrency 16" in printed
    assert "3 of 16" in printed
    caplog.clear()
    alone = evaluate(arguments())
    assert alone["recommended_num_speculative_tokens"] == []
    assert "no more than 3 chats at a time can run there" in caplog.text


def test_several_temperatures_are_measured_side_by_side(arguments, server, baseline, capsys):
    """Both ask the same; only at temperature 0 texts are compared, and the main figures are those of the first."""
    report = evaluate(arguments(baseline_endpoint=baseline.url, temperature=[0, 1], concurrency=[1, 3]))
    assert {request["temperature"] for request in server.requests[2:]} == {0, 1}
    greedy, sampled = report["by_temperature"]
    assert (greedy["temperature"], sampled["temperature"]) == (0, 1)
    assert (report["temperature"], report["text_identical"]) == (0, True)
    assert (greedy["text_identical"], sampled["text_identical"]) == (True, None)
    assert greedy["acceptance_length"] == sampled["acceptance_length"] == report["acceptance_length"]
    assert [row["concurrency"] for row in sampled["by_concurrency"]] == [1, 3]
    assert report["draft_sample_method"] is None
    printed = capsys.readouterr().out
    assert "By temperature" in printed
    assert "as the server makes them" in printed
    assert "--temperature 0.0 1.0" in report["command"]
    assert "by_temperature" not in evaluate(arguments(temperature=0))
    with pytest.raises(PeagleError, match=r"--temperature is 1\.0 0\.0 but needs distinct and ascending"):
        arguments(temperature=[1, 0])
    for method in ("probabilistic", "greedy"):
        with pytest.raises(PeagleError, match=r"its own .*--draft-sample-method"):
            arguments(draft_sample_method=method)


def test_without_a_baseline_nothing_is_compared(arguments, drafter, capsys):
    report = evaluate(arguments())
    assert report["tokens_per_second_without"] is report["text_identical"] is None
    assert report["by_concurrency"][0]["latency_seconds_without"] is None
    assert "the speed without it was not measured" in capsys.readouterr().out
    path = Path(arguments().output) / "evaluation.json"
    card = model_card(check_checkpoint(drafter), "my-lab/d", None, None, read_evaluation(path, drafter)).text
    assert "a second without" not in card


def test_a_server_that_only_counts_as_a_whole_gives_no_intervals_of_acceptance(
    arguments, server, baseline, prompts, caplog
):
    """Its figures are those of a server that counts by request; a second pass asks each category by itself."""
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 2))
    by_request = evaluate(arguments(baseline_endpoint=baseline.url, rounds=2))
    assert set(by_request["intervals"]) > {"acceptance_length", "per_position_acceptance", "speed_up"}
    assert by_request["is_speed_up_or_down"] in (True, False)
    server.by_request = False
    server.requests.clear()
    baseline.requests.clear()
    report = evaluate(arguments(baseline_endpoint=baseline.url))
    assert [len(one.requests) for one in (server, baseline)] == [1 + 6 + 8 + 8, 6 + 8]
    assert "--per-request-spec-decode-metrics detailed" in caplog.text
    assert (by_request["counts"], report["counts"]) == ("by draft", "by category")
    assert "known by segment or by position in the context, because the server (0.32.0)" in text(report)
    assert set(report["intervals"]) == {"tokens_per_second", "tokens_per_second_without", "speed_up"}
    names = ("acceptance_length", "num_drafts", "num_accepted_tokens", "per_position_acceptance")
    for name in names:
        assert report[name] == by_request[name]
        for category, row in report["by_category"].items():
            assert row[name] == by_request["by_category"][category][name]


def test_a_password_in_an_endpoint_reaches_no_file_and_no_message(arguments, server, baseline, caplog):
    caplog.set_level("INFO", logger="peagle_hf")
    output, journals = Path(arguments().output), []
    urls = [one.url.replace("http://", "http://user:sesame@") for one in (server, baseline)]
    server.chat_fault = lambda message: journals.extend(path.read_text() for path in output.glob("*.journal"))
    report = evaluate(arguments(endpoint=urls[0], baseline_endpoint=urls[1]))
    assert f"--endpoint {server.url} --baseline-endpoint {baseline.url}" in report["command"]
    assert "http://127.0.0.1" in journals[-1]
    written = [path.read_bytes() for path in output.iterdir()]
    assert len(written) == 4
    assert not any(b"sesame" in content for content in written)
    assert "sesame" not in "".join(journals) + caplog.text


@pytest.mark.fault("The picture of an evaluation can not be drawn", "The report is written all the same.")
def test_a_picture_that_cannot_be_drawn_loses_nothing(arguments, server, caplog, capsys, monkeypatch):
    """The table is printed and evaluation.json is there before anything is drawn."""
    caplog.set_level("INFO", logger="peagle_hf")
    output, seen, printed = Path(arguments().output), [], []

    def fail(report, axes):
        printed.append(capsys.readouterr().out)
        kept = json.loads((output / "evaluation.json").read_text())
        seen.append("Acceptance rate" in "".join(printed) and kept == report)
        raise RuntimeError("no <fonts>")

    output.mkdir()
    (output / "evaluation.png").write_bytes(b"of an earlier evaluation")
    monkeypatch.setattr("peagle_hf.evaluation.report._PICTURES", [("Speed", fail)])
    report = evaluate(arguments())
    assert seen == [True, True]
    assert "evaluation.png could not be drawn (RuntimeError: no <fonts>). All figures are in" in caplog.text
    page = (output / "evaluation.html").read_text()
    assert "could not be drawn: no &lt;fonts&gt;" in page
    assert f"{report['acceptance_length']:.3f}" in page
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "evaluation.html", "evaluation.json"]


def test_a_drafter_that_is_missing_or_named_twice_is_refused(arguments, drafter, tmp_path):
    here = {"endpoint": None}
    with pytest.raises(PeagleError, match=r"There is no folder nowhere/at-all, and no drafter of that name"):
        evaluate(arguments(**here, compare=["nowhere/at-all"]))
    link = tmp_path / "checkpoint_best"
    link.symlink_to(drafter)
    with pytest.raises(PeagleError, match=f"name a drafter twice: {drafter} and {link} are both {drafter}"):
        evaluate(arguments(**here, compare=[str(link)]))


def test_as_many_requests_as_are_wanted_are_in_flight(arguments, server):
    in_flight, most = [], []

    def fault(message: str) -> None:
        in_flight.append(message)
        time.sleep(0.05)
        most.append(len(in_flight))
        in_flight.remove(message)

    server.chat_fault = fault
    evaluate(arguments(concurrency=[1]))
    assert max(most) == 1
    most.clear()
    evaluate(arguments(concurrency=[2]))
    assert max(most) == 2


@pytest.mark.fault(
    "A server fails, cuts an answer, or counts the drafts of other users during an evaluation",
    "An error says so, and no figure is reported.",
)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("400", r"Turn 1 of prompt 2 got no answer.*the prompt is too long"),
        ("cut", r"cut the answer to turn 1 of prompt 2 after 2 of 60 tokens: .*--max-model-len"),
        ("dies", r"Turn 1 of prompt 2 got no answer.*Connection error"),
        ("error", "the engine died"),
        ("breaks off", "the answer breaks off"),
        ("no token ids", "no token ids"),
        ("uncounted", "restarted in between, or several servers answer there"),
        ("started anew", "restarted in between"),
        ("others", "generated 41 tokens, but this evaluation asked for 20 only: others use it too"),
        ("miscounts", r"sum to \[.*\] .* counters say"),
    ],
)
def test_a_server_that_fails_or_counts_others_is_no_measure(arguments, server, prompts, fault, words, monkeypatch):
    monkeypatch.setattr("peagle_hf.serving.client.SETTLE_SECONDS", 0.2)
    server.chat_fault = lambda message: fault if message == "a b c" else None
    with pytest.raises(PeagleError, match=words):
        evaluate(arguments(concurrency=[1]))
    assert not Path(arguments().output, "evaluation.json").exists()


@pytest.mark.fault(
    "A server of an evaluation is dead or serves another model",
    "An error names the server before anything is measured.",
)
def test_servers_that_are_dead_or_others_are_refused(arguments, server, baseline, drafter, servable_verifier):
    with pytest.raises(PeagleError, match=r"127\.0\.0\.1:9/v1 can't be asked which model it runs.*peagle-hf serve"):
        evaluate(arguments(endpoint="http://127.0.0.1:9"))
    with pytest.raises(PeagleError, match=r"serves no drafter\. Start it with peagle-hf serve '/[^']*/a drafter0'"):
        evaluate(arguments(endpoint=baseline.url))
    with pytest.raises(PeagleError, match="has a drafter too"):
        evaluate(arguments(baseline_endpoint=server.url))
    with pytest.raises(PeagleError, match="names 2 servers"):
        evaluate(arguments(endpoint=f"{server.url},{baseline.url}"))
    baseline.model = str(servable_verifier)
    with pytest.raises(PeagleError, match=f"runs {servable_verifier}, but the drafter's verifier is"):
        evaluate(arguments(baseline_endpoint=baseline.url))
    server.model = str(drafter)  # as `vllm serve DRAFTER` calls itself
    evaluate(arguments(max_tokens=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_speculative_tokens": [2]}, "A running server has one drafter"),
        ({"compare": ["other"]}, "A running server has one drafter"),
        ({"endpoint": None, "baseline_endpoint": "http://localhost:8001"}, "needs --endpoint"),
        ({"concurrency": [0]}, "--concurrency is 0 but needs positive"),
        ({"concurrency": [4, 1]}, "--concurrency is 4 1 but needs .* ascending"),
        ({"concurrency": []}, "--concurrency is empty but needs"),
        ({"endpoint": None, "compare": ["b", "b"]}, "name a drafter twice"),
        ({"endpoint": None, "num_speculative_tokens": [2, 2]}, "--num-speculative-tokens is 2 2 but needs .* distinct"),
        ({"endpoint": None, "num_speculative_tokens": [0]}, "--num-speculative-tokens is 0"),
        ({"rounds": 0}, "--rounds is 0 but must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"max_prompts": 0}, "--max-prompts is 0"),
        ({"endpoint": None, "max_model_len": 0}, "--max-model-len is 0"),
        ({"temperature": -0.5}, "--temperature is -0.5 but must be at least 0"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, changes, words):
    with pytest.raises(PeagleError, match=words):
        arguments(**changes)


# Chatting


def chat(monkeypatch, said: str, *flags: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    cli.main(["chat", *flags])


def test_a_chat_shows_what_each_answer_accepted(server, monkeypatch, capsys):
    flags = ["--endpoint", server.url, "--system", "be kind", "--max-tokens", "9", "--temperature", "0"]
    flags += ["--chat-template-kwargs", '{"enable_thinking": false}']
    chat(monkeypatch, "a b c\n\na b c d e f g\n", *flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "w0 w1 w2 w3 "
    assert lines[2].startswith("[acceptance length 1.50, by position 50% 0% 0%; 4 tokens, ")
    assert lines[4].startswith("[acceptance length 1.75, by position 50% 25% 0%; 8 tokens, ")
    assert [message["role"] for message in server.requests[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert server.requests[1]["messages"][2]["content"] == "w0 w1 w2 w3 "
    assert (server.requests[0]["max_tokens"], server.requests[0]["temperature"]) == (9, 0)
    assert [request["chat_template_kwargs"] for request in server.requests] == [{"enable_thinking": False}] * 2


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"http_proxy": "http://me:secret@localhost:9"}, "the proxy http://localhost:9: .* add 127.0.0.1 to no_"),
        ({"all_proxy": "socks://me:secret@localhost:9", "no_proxy": "127.0.0.1"}, "Unknown scheme .* unset all_proxy"),
        ({"VLLM_API_KEY": "secret\nkey"}, "VLLM_API_KEY holds a character that no key can have"),
        ({"http_proxy": "http://localhost:9", "no_proxy": "127.0.0.1", "VLLM_API_KEY": "\n"}, ""),
    ],
)
def test_an_error_of_a_proxy_or_key_names_the_variable_and_shows_no_secret(server, monkeypatch, variables, words):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not words:
        assert Client(server.url).model["id"]
        return
    with pytest.raises(PeagleError, match=words) as error:
        Client(server.url)
    assert "secret" not in str(error.value)


def test_https_is_answered_with_what_to_do(server):
    with pytest.raises(PeagleError, match=r"Write http:// in place of https://"):
        Client(server.url.replace("http", "https"))
    with (
        pytest.raises(EndpointError, match="certificate in the variable SSL_CERT_FILE"),
        Server(server.url, 1.0, 0).reasons(),
    ):
        raise pytest.importorskip("openai").OpenAIError from OSError(
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed"
        )


def test_a_chat_without_a_drafter_or_beside_others_says_so(server, baseline, monkeypatch, capsys):
    chat(monkeypatch, "a b c\n", "--endpoint", baseline.url)
    assert "[no drafter is served; 4 tokens, " in capsys.readouterr().out
    assert "temperature" not in baseline.requests[0]
    server.chat_fault = lambda message: "others"
    chat(monkeypatch, "a b c\n", "--endpoint", server.url)
    assert "other users' answers included; 4 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        chat(monkeypatch, "a b c\n", "--endpoint", "http://127.0.0.1:9")
    assert "can't be asked which model it runs" in capsys.readouterr().err


@pytest.mark.fault(
    "An answer of a chat fails or is stopped with Ctrl-C", "The conversation continues without that message."
)
def test_an_answer_that_fails_or_is_stopped_ends_neither_the_chat_nor_stays_in_it(server, monkeypatch, capsys):
    def fault(message: str) -> str | None:
        if message == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return {"too long": "400", "breaks": "breaks off", "error": "error"}.get(message)

    server.chat_fault = fault
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(SystemExit) as stopped:
        chat(monkeypatch, "a b c\ntoo long\nstop\nbreaks\nerror\n\ud83d\nd e\n", "--endpoint", server.url)
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    asked = [[message["content"] for message in request["messages"]] for request in server.requests]
    assert asked[-1] == ["a b c", "w0 w1 w2 w3 ", "d e"]
    assert shown.out.count("[Stopped; the conversation continues without this message.]") == 1
    reasons = [line for line in shown.err.splitlines() if line.startswith("[No answer")]
    wanted = ("the prompt is too long", "the answer breaks off", "the engine died", "characters that can't be sent")
    assert all(words in reason for words, reason in zip(wanted, reasons, strict=True))
    assert "4 of 7 messages got no answer" in shown.err
    assert "Traceback" not in shown.err


def test_a_server_that_takes_too_long_is_no_reason_to_name_a_flag_that_the_command_lacks(
    arguments, server, monkeypatch, capsys
):
    """Neither evaluate nor chat has --request-timeout."""
    monkeypatch.setattr("peagle_hf.serving.client.TIMEOUT_SECONDS", 0.2)
    server.chat_fault = lambda message: time.sleep(0.6)
    with pytest.raises(PeagleError, match=r"timed out.*start it again if it hangs") as caught:
        evaluate(arguments())
    with pytest.raises(SystemExit):
        chat(monkeypatch, "a b c\n", "--endpoint", server.url)
    said = capsys.readouterr().err
    assert "start it again if it hangs" in said
    assert "--request-timeout" not in str(caught.value) + said


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_a_key_at_the_prompt_ends_the_chat_with_a_line(server, monkeypatch, capsys, end):
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int = -1) -> str:
            if line := super().readline():
                return line
            raise end

    monkeypatch.setattr("sys.stdin", Keyboard("a b c\ntoo long\n"))
    server.chat_fault = lambda message: "400" if message == "too long" else None
    cli.main(["chat", "--endpoint", server.url])
    assert capsys.readouterr().out.splitlines()[-1] == "The chat has ended."


@pytest.mark.fault("A chat server is gone for a moment", "The chat goes on.")
def test_a_chat_goes_on_when_the_server_counts_nothing_or_is_gone_for_a_moment(server, monkeypatch, capsys):
    monkeypatch.setattr(server, "_metrics", lambda: "nothing")
    server.chat_fault = lambda message: setattr(server, "is_down", message == "go") or None
    with pytest.raises(SystemExit):
        chat(monkeypatch, "a b c\ngo\nd e\n", "--endpoint", server.url)
    shown = capsys.readouterr()
    assert "[the server doesn't count drafts; 4 tokens, " in shown.out
    assert f"The vLLM server {server.url} failed: Connection error" in shown.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 0}, "--max-tokens is 0 but must be at least 1"),
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": float("inf")}, "--temperature is inf"),
        ({"endpoint": "localhost"}, "'localhost' is no HTTP address"),
    ],
)
def test_impossible_values_of_a_chat_are_refused(changes, words):
    with pytest.raises(PeagleError, match=words):
        ChatArguments(**changes)


def test_a_drafter_is_not_served_with_impossible_values():
    with pytest.raises(PeagleError, match="--num-speculative-tokens is 0 but must be at least 1"):
        ServeArguments("drafter", num_speculative_tokens=0)


# Real vLLM; tests/test_gpu_vllm.py does the same on a GPU


def serve_in_vllm(drafter: Path, log: Path, *flags: str) -> VllmServer:
    return VllmServer(["peagle_hf", "serve", str(drafter), "--"], ["--trust-request-chat-template", *flags], log)


def asked_of(drafter: Path, folder: Path) -> dict:
    """Arguments of an evaluation whose counts are worked out in test_evaluation.py; w5 begins a thought, w6 ends it.

    After w6 an answer begins a step later in the cycle, and 20 of 39 drafts are right. (A prompt of one token would not
    do: where it joins others that run, vLLM 0.32 counts its first step as a draft.)
    """
    rows = [
        {"question_id": 1, "category": "cycle", "turns": ["w9 w7"]},
        {"question_id": 2, "category": "ends", "turns": ["w9 w20"]},
        {"question_id": 3, "category": "cycle", "turns": ["w9 w7", "w9 w6"]},
    ]
    prompts, template = folder / "prompts.jsonl", folder / "template.jinja"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(
        "{% for m in messages %}{{ 'w5 ' + m.reasoning_content + ' w6 ' if m.reasoning_content else '' }}"
        "{{ m.content }} {% endfor %}"
    )
    return {"model": str(drafter), "suite": [str(prompts)], "max_tokens": 60, "chat_template": str(template)}


def check_that_a_server_counts_alike(served: VllmServer, here: dict, flags: dict, folder: Path) -> None:
    """A server with the drafter, against the report of vLLM in a process on the same prompts."""
    there = evaluate(EvaluateArguments(**flags, output=str(folder / "there"), endpoint=served.url, concurrency=[1, 4]))
    for category, row in here["by_category"].items():
        same = there["by_category"][category]
        for name in ("num_drafts", "num_accepted_tokens", "per_position_acceptance"):
            assert same[name] == row[name]
        assert same["intervals"].get("acceptance_length") == row["intervals"].get("acceptance_length")
    assert there["by_segment"] == here["by_segment"]
    assert there["counts"] == here["counts"]
    if here["counts"] == "by draft":  # vLLM counts drafts from 0.29 on
        assert sum(row["num_drafts"] for row in there["by_segment"].values()) == there["num_drafts"]
        assert there["by_segment"]["reasoning"]["num_accepted_tokens"] == there["num_accepted_tokens"]
    assert there["by_category"]["cycle"]["acceptance_length"] == 1 + 58 / 119
    assert there["num_speculative_tokens"] == here["num_speculative_tokens"] == 3
    assert there["versions"]["vllm"] == here["versions"]["vllm"]
    for row in there["by_concurrency"]:
        assert row["num_drafts"] == here["num_drafts"]
        assert 0 < row["latency_seconds"]["first_token"]["mean"] < row["latency_seconds"]["request"]["mean"]


def check_a_chat(served: VllmServer, monkeypatch, capsys) -> None:
    capsys.readouterr()  # what was printed before
    chat(monkeypatch, "w9 w7\n", "--endpoint", served.url, "--max-tokens", "60", "--temperature", "0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["w5", "w6", "w7"] * 20
    assert lines[2].startswith("[acceptance length 1.48, by position 48% 0% 0%; 60 tokens, ")


@pytest.fixture(scope="module")
def served(drafter, tmp_path_factory):
    with serve_in_vllm(drafter, tmp_path_factory.mktemp("served") / "vllm.log", "--dtype", "float32") as served:
        yield served


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_server_counts_what_vllm_in_process_counts(served, drafter, tmp_path, monkeypatch, capsys):
    flags = asked_of(drafter, tmp_path)
    here = evaluate(EvaluateArguments(**flags, output=str(tmp_path / "here"), dtype="float32"))
    assert here["counts"] == "by draft"
    check_that_a_server_counts_alike(served, here, flags, tmp_path)
    check_a_chat(served, monkeypatch, capsys)
    Path(*flags["suite"]).write_text(json.dumps({"turns": ["w7 " * 250]}))
    with pytest.raises(PeagleError, match="cut the answer to turn 0 of prompt 0 after 6 of 60 tokens"):
        evaluate(EvaluateArguments(**flags, output=str(tmp_path / "long"), endpoint=served.url))


@pytest.mark.vllm
@pytest.mark.slow
def test_an_interrupt_ends_all_that_serve_has_started(served):
    assert served.tree
    assert served.stop(signal.SIGINT) == 128 + signal.SIGINT
    assert ended(served.tree)
