"""Serving and measuring: checkpoints that vLLM would load wrongly are refused, and real vLLM gives exact figures.

The verifier is a Markov chain and the drafter always proposes the same token (conftest.py): what vLLM must count can be
worked out by hand.
"""

import json
import logging
import subprocess
import sys

import pytest
import torch
from conftest import CHAIN_LENGTH, VOCAB
from safetensors.torch import load_file, save_file

from peagle_hf import EvaluateArguments, PeagleError, evaluate
from peagle_hf.data.prompts import Prompt
from peagle_hf.evaluation import _compare, draw, summarize, table
from peagle_hf.serving import check_checkpoint, speculative_config, vllm_environment


@pytest.fixture
def spoil(drafter, tmp_path):
    """Copy the drafter with other fields of its configuration, other tensors."""

    def spoil(tensors=None, layer=None, **fields):
        config = json.loads((drafter / "config.json").read_text())
        config["transformer_layer_config"] |= layer or {}
        config = {key: value for key, value in (config | fields).items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        weights = load_file(drafter / "model.safetensors") | (tensors or {})
        weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    return spoil


def test_sound_checkpoint_is_served_as_it_was_trained(drafter, chain, spoil):
    config = check_checkpoint(drafter, verifier=str(chain))
    expected = {"model": str(drafter), "method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": 3}
    assert speculative_config(drafter, config) == expected
    assert speculative_config(drafter, config, 8) == {**expected, "num_speculative_tokens": 8}
    check_checkpoint(spoil(model_type="absent", tensors={"embed_tokens.weight": None}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"model_type": "peagle"}, "model_type must be 'speculators'"),
        ({"speculators_model_type": "eagle3"}, "speculators_model_type must be 'peagle'"),
        ({"norm_before_residual": "absent"}, "norm_before_residual is missing"),
        ({"mask_token_id": "absent"}, "mask_token_id"),
        ({"mask_token_id": VOCAB}, f"mask_token_id {VOCAB} is outside the vocabulary"),
        ({"draft_vocab_size": VOCAB + 1}, f"draft_vocab_size {VOCAB + 1}"),
        ({"draft_vocab_size": "many"}, "draft_vocab_size"),
        ({"eagle_aux_hidden_state_layer_ids": "absent"}, "eagle_aux_hidden_state_layer_ids"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "num_aux_hidden_states must be 2"),
        ({"fc_norm": True}, "fc_norm"),
        ({"norm_output": True}, "norm_output"),
        ({"layer": {"model_type": "gemma3"}}, "gemma3"),
        ({"speculators_config": {"verifier": {"name_or_path": "org/model"}}}, "proposal_methods"),
        ({"speculators_config": {"proposal_methods": [{"speculative_tokens": 3}]}}, "verifier.name_or_path is missing"),
        ({"tensors": {"fc.weight": None}}, "fc.weight is missing"),
        ({"tensors": {"d2t": None}}, "d2t is missing"),
        ({"tensors": {"verifier_norm.weight": torch.ones(VOCAB)}}, "verifier_norm.weight is superfluous"),
        ({"tensors": {"fc.weight": torch.ones(VOCAB, VOCAB)}}, "fc.weight has the shape"),
        ({"tensors": {"d2t": torch.full((40,), VOCAB)}}, "d2t doesn't map"),
    ],
)
def test_checkpoint_that_vllm_would_load_wrongly_is_refused(spoil, fault, words):
    with pytest.raises(PeagleError, match=r"config\.json|model\.safetensors") as refused:
        check_checkpoint(spoil(**fault))
    assert words in str(refused.value)


def test_broken_files_are_refused(drafter, spoil, tmp_path):
    with pytest.raises(PeagleError, match=r"holds no config\.json"):
        check_checkpoint(tmp_path)
    (spoil() / "model.safetensors").unlink()
    with pytest.raises(PeagleError, match=r"holds no model\.safetensors"):
        check_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((drafter / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(PeagleError, match=r"model\.safetensors can't be read"):
        check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PeagleError, match=r"config\.json is not valid JSON"):
        check_checkpoint(tmp_path)


def test_another_verifier_is_refused_by_both_names(drafter, chain, tmp_path):
    config = json.loads((chain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(PeagleError, match="2 layers") as refused:
        check_checkpoint(drafter, verifier=str(tmp_path))
    assert str(chain) in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_missing_vllm_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PeagleError, match=r"peagle-hf\[vllm\].*make install"):
        vllm_environment()


def test_acceptance_from_counters():
    """Two runs: 10 drafts of 2 tokens of which 5 and 1 were accepted, 30 drafts of which 3 and 3 were."""
    summary = summarize([[10, 20, 6, 5, 1], [30, 60, 6, 3, 3]])
    assert summary == {
        "acceptance_length": 1.3,
        "acceptance_rate": 0.15,
        "per_position_acceptance": [0.2, 0.1],
        "num_drafts": 40,
        "num_draft_tokens": 80,
        "num_accepted_tokens": 12,
    }
    assert summarize([[0, 0, 0, 0, 0]])["acceptance_length"] == 1


def test_different_text_is_found_at_its_first_token():
    prompts = [Prompt(name, "chat", [], ["one", "two"]) for name in "abc"]
    without = {"token_ids": [[[1, 2], [3, 4]], [[1, 2], [3, 4, 5]], [[1, 2], [3]]]}
    drafted = {"token_ids": [[[1, 2], [3, 4]], [[1, 2], [3, 9, 5]], [[1], [3]]]}
    found = _compare(prompts, without, drafted, greedy=True)
    assert found["differences"] == [{"id": "b", "turn": 1, "token": 1}, {"id": "c", "turn": 0, "token": 1}]
    assert (found["text_identical"], found["num_identical"]) == (False, 1)
    assert _compare(prompts, without, drafted, greedy=False)["text_identical"] is None


def make_report(**changes):
    return {
        "drafter": "checkpoints/checkpoint_best",
        "verifier": "org/model",
        "num_speculative_tokens": 2,
        "num_prompts": 3,
        **summarize([[40, 80, 12, 8, 4]]),
        "tokens_per_second": 30.0,
        "tokens_per_second_without": 40.0,
        "concurrency": 4,
        "text_identical": True,
        "num_identical": 3,
        "differences": [],
        "by_category": {"chat": {"num_prompts": 3, **summarize([[40, 80, 12, 8, 4]])}},
        "max_tokens": 16,
        "dtype": "float32",
        "device": "CPU",
        "versions": {"vllm": "0.32.0"},
        **changes,
    }


def test_table_says_what_was_measured():
    text = table(make_report())
    assert "Acceptance length   1.300" in text
    assert "20.0%  10.0%" in text
    assert "The drafter slows vLLM down" in text
    assert "identical with and without the drafter for all 3 prompts" in text

    text = table(make_report(tokens_per_second=60.0, text_identical=None))
    assert "1.50x" in text
    assert "slows" not in text
    assert "sampled" in text

    differences = [{"id": "q7", "turn": 0, "token": 12}]
    text = table(make_report(text_identical=False, num_identical=2, differences=differences, dtype="bfloat16"))
    assert "DIFFERENT with the drafter for 1 of 3 prompts: q7 (turn 0, token 12)" in text
    assert "--dtype float32" in text


def test_picture_is_drawn(tmp_path):
    draw(make_report(), tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def arguments(drafter, folder, rows, **changes):
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return EvaluateArguments(model=str(drafter), prompts=str(prompts), output=str(folder / "out"), **changes)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"turns": ["w4"]}, "{oops"], "line 2"),
        ([{"question": "w4"}], "line 1"),
        ([{"turns": []}], "line 1"),
        ([{"messages": [{"role": "system", "content": "w4"}]}], "no prompt that can be run"),
        ([], "empty"),
    ],
)
def test_bad_prompts_are_refused(drafter, tmp_path, rows, words):
    pytest.importorskip("vllm")
    with pytest.raises(PeagleError, match=words):
        evaluate(arguments(drafter, tmp_path, rows))


@pytest.mark.vllm
def test_vllm_counts_what_the_chain_and_the_drafter_must_give(drafter, tmp_path, caplog):
    """w5 is drafted: right once in two forward passes for the cycle w5 w6 w7, never for the chain that ends.

    After w7 comes w5 (accepted) and then w6, the verifier's own; after w6 it's w7 (nothing accepted). Of 60 tokens the
    prompt's pass gives the first and a rejection the second; 19 times a rejection and an acceptance give three more,
    and the last comes from a rejection: 19 of 40 drafts.
    """
    caplog.set_level(logging.INFO, logger="peagle_hf")
    rows = [
        {"question_id": 1, "category": "cycle", "turns": ["w9 w7"]},
        {"question_id": 2, "category": "ends", "turns": ["w20"]},
        {"question_id": 3, "category": "cycle", "messages": [{"role": "user", "content": "w7"}] * 2},
    ]
    report = evaluate(arguments(drafter, tmp_path, rows, max_tokens=60))
    cycle, ends = report["by_category"]["cycle"], report["by_category"]["ends"]
    assert cycle["num_prompts"] == 2
    assert cycle["per_position_acceptance"] == [19 / 40, 0, 0]
    assert cycle["acceptance_length"] == 1 + 19 / 40
    assert ends["acceptance_length"] == 1
    assert ends["num_drafts"] <= 3  # it ends at EOS, long before 60 tokens
    assert report["num_drafts"] == cycle["num_drafts"] + ends["num_drafts"]
    assert report["num_draft_tokens"] == 3 * report["num_drafts"]
    assert report["num_accepted_tokens"] == cycle["num_accepted_tokens"]
    assert report["text_identical"] is True
    assert report["num_identical"] == report["num_prompts"] == 3
    assert min(report["tokens_per_second"], report["tokens_per_second_without"]) > 0
    assert report["dtype"] == "float32" or torch.cuda.is_available()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 1000
    assert "Acceptance length" in caplog.text


def serve_by_itself(drafter, **environment):
    """30 tokens of the cycle: the first two as above, nine times three with one accepted, one more."""
    script = (
        "import sys; from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], dtype='float32', enforce_eager=True, disable_log_stats=False)\n"
        "output = llm.generate({'prompt_token_ids': [7]}, SamplingParams(temperature=0, max_tokens=30))[0].outputs[0]\n"
        "accepted = [m.value for m in llm.get_metrics() if m.name == 'vllm:spec_decode_num_accepted_tokens']\n"
        "assert 'peagle_hf' not in sys.modules\n"
        "print('RESULT', list(output.token_ids) == [5, 6, 7] * 10, accepted)"
    )
    environment = vllm_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment
    done = subprocess.run(
        [sys.executable, "-c", script, str(drafter)], env=environment, capture_output=True, text=True, check=False
    )
    assert "RESULT True [9]" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.vllm
def test_drafter_serves_by_itself_where_peagle_hf_was_never_imported(drafter):
    serve_by_itself(drafter)


@pytest.mark.vllm
def test_failure_inside_vllm_is_reported_with_its_log(drafter, tmp_path, caplog):
    rows = [{"turns": ["w7"]}]
    with pytest.raises(PeagleError, match=r"vLLM failed without the drafter.*vllm_without_drafter\.log"):
        evaluate(arguments(drafter, tmp_path, rows, max_model_len=10 * CHAIN_LENGTH))
    assert "max_model_len" in caplog.text
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.vllm
def test_prompt_that_is_too_long_is_named(drafter, tmp_path):
    rows = [{"turns": ["w7"]}, {"question_id": "long one", "turns": ["w7 " * CHAIN_LENGTH]}]
    with pytest.raises(PeagleError, match=r"prompt long one has 256 tokens.*--max-model-len"):
        evaluate(arguments(drafter, tmp_path, rows, max_tokens=4))
