"""Serving and measuring: checkpoints that vLLM would load wrongly are refused, and real vLLM gives exact figures.

The verifier is a Markov chain and the drafter always proposes the same token (conftest.py): what vLLM must count can be
worked out by hand.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import CHAIN_LENGTH, VOCAB
from html5lib import HTMLParser
from safetensors.torch import load_file, save_file

from peagle_hf import EvaluateArguments, PeagleError, evaluate
from peagle_hf.arguments import command_text
from peagle_hf.cli.parsing import parse_arguments
from peagle_hf.data.prompts import Prompt
from peagle_hf.evaluation.figures import Trial, compare, difference, figures
from peagle_hf.evaluation.report import draw, html, text
from peagle_hf.evaluation.runs import Run
from peagle_hf.evaluation.suites import load_prompts
from peagle_hf.evaluation.task import drafting_of, follow_links
from peagle_hf.hub.training_json import recorded_chat_options
from peagle_hf.model import served_checkpoint
from peagle_hf.model.served_checkpoint import check_checkpoint, check_verifier, speculative_config
from peagle_hf.serving.client import Answer, summarize
from peagle_hf.serving.environment import vllm_environment
from peagle_hf.serving.launch import ServeArguments, drafting_command
from peagle_hf.serving.tokens_by_load import describe, recommend, scheduled


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
    config = check_checkpoint(drafter)
    check_verifier(drafter, config, str(chain), False)
    expected = {"model": str(drafter), "method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": 3}
    expected["draft_sample_method"] = "probabilistic"
    assert speculative_config(drafter, config) == expected
    assert speculative_config(drafter, config, None, "greedy") == {**expected, "draft_sample_method": "greedy"}
    assert speculative_config(drafter, config, 8) == {**expected, "num_speculative_tokens": 8}
    check_checkpoint(spoil(model_type="absent", tensors={"embed_tokens.weight": None}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            {"model_type": "qwen3", "speculators_model_type": "absent", "speculators_config": "absent"},
            "config.json: This is the configuration of a qwen3 model, not of a drafter. Name a folder",
        ),
        ({"model_type": "peagle"}, "model_type must be 'speculators'"),
        ({"speculators_model_type": "eagle3"}, "speculators_model_type must be 'peagle'"),
        ({"norm_before_residual": "absent"}, "norm_before_residual is missing"),
        ({"mask_token_id": "absent"}, "mask_token_id"),
        ({"mask_token_id": VOCAB}, f"mask_token_id {VOCAB} is outside the vocabulary"),
        ({"draft_vocab_size": VOCAB + 1}, f"draft_vocab_size {VOCAB + 1}"),
        ({"draft_vocab_size": "many"}, "draft_vocab_size"),
        ({"eagle_aux_hidden_state_layer_ids": "absent"}, "eagle_aux_hidden_state_layer_ids"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "num_aux_hidden_states must be 2"),
        ({"eagle_aux_hidden_state_layer_ids": 5}, "type 'int' has no len"),
        ({"speculators_config": "x"}, "'str' object has no attribute"),
        ({"dtype": "x"}, "has no attribute 'x'"),
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
    with pytest.raises(PeagleError, match=r"holds no config\.json.*Name a folder that training wrote"):
        check_checkpoint(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint_best").symlink_to(drafter)
    with pytest.raises(PeagleError, match=rf"holds no config\.json.* Name {run}/checkpoint_best\."):
        check_checkpoint(run)
    (spoil() / "model.safetensors").unlink()
    with pytest.raises(PeagleError, match=r"holds no model\.safetensors"):
        check_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((drafter / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(PeagleError, match=r"model\.safetensors can't be read"):
        check_checkpoint(tmp_path)
    for damage in ("{", "[]"):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(PeagleError, match=r"config\.json is damaged: .*Export the checkpoint again"):
            check_checkpoint(tmp_path)
    for damage in ("[]", '{"chat_template": 5}', '{"seed": "x"}'):
        (tmp_path / "training.json").write_text(damage)
        with pytest.raises(PeagleError, match=r"training\.json is damaged: .*Copy it from another checkpoint"):
            recorded_chat_options(tmp_path)


def test_another_verifier_is_refused_by_both_names(drafter, chain, tmp_path):
    config = json.loads((chain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(PeagleError, match="2 layers") as refused:
        check_verifier(drafter, check_checkpoint(drafter), str(tmp_path), False)
    assert str(chain) in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_a_checkpoint_is_read_once_to_serve_and_to_evaluate_it(drafter, chain, tmp_path, monkeypatch):
    read = []
    check = served_checkpoint._check_tensors
    monkeypatch.setattr(served_checkpoint, "_check_tensors", lambda *args: read.append(check(*args)))
    drafting_command(ServeArguments(str(drafter)), on_cpu=True)
    assert len(read) == 1
    arguments = EvaluateArguments(model=str(drafter), suite=["prompts.jsonl"], output=str(tmp_path))
    assert len(drafting_of(arguments, follow_links(arguments), str(chain))) == 1
    assert len(read) == 2


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
        "conditional_acceptance": [0.2, 0.5],
        "num_drafts": 40,
        "num_draft_tokens": 80,
        "num_accepted_tokens": 12,
    }
    assert summarize([[0, 0, 0, 0, 0]])["acceptance_length"] == 1


def test_conditional_acceptance_is_not_known_where_no_draft_arrives():
    assert summarize([[10, 40, 5, 4, 1, 0, 0]])["conditional_acceptance"] == [0.4, 0.25, 0, None]
    assert summarize([[0, 0, 0, 0, 0]])["conditional_acceptance"] == [None, None]


def run_of(token_ids, drafting=None, seconds=4.0):
    """A run in which each answer took a second."""
    counts = drafting or [[None] * len(chat) for chat in token_ids]
    chats = [
        [Answer(token_ids=ids, seconds=1.0, drafting=counted) for ids, counted in zip(*chat, strict=True)]
        for chat in zip(token_ids, counts, strict=True)
    ]
    return Run(2, chats, seconds)


def test_different_text_is_found_at_its_first_token():
    prompts = [Prompt(name, "chat", [], ["one", "two"]) for name in "abc"]
    without = run_of([[[1, 2], [3, 4]], [[1, 2], [3, 4, 5]], [[1, 2], [3]]])
    drafted = run_of([[[1, 2], [3, 4]], [[1, 2], [3, 9, 5]], [[1], [3]]])
    found = compare(prompts, without, drafted)
    assert found["differences"] == [{"id": "b", "turn": 1, "token": 1}, {"id": "c", "turn": 0, "token": 1}]
    assert (found["text_identical"], found["num_identical"]) == (False, 1)
    assert compare(prompts, None, drafted)["text_identical"] is None


def trial_of(name, accepted, *seconds):
    """For each prompt ten drafts of one token, so many of them accepted, and ten tokens; a round for each time."""
    seconds = seconds or (4.0, 4.0)
    drafting = [[[10, 10, count, count]] for count in accepted]
    return Trial(name, 1, [[run_of([[[1] * 10]] * len(accepted), drafting, time) for time in seconds]])


EASY_AND_HARD = [8] * 6 + [1] * 6
PROMPTS = [Prompt(str(number), "easy" if number < 6 else "hard", [], ["one"]) for number in range(12)]


def test_a_small_difference_on_the_same_prompts_is_found_and_chance_is_not():
    """A draft more of ten on each prompt is much less than the prompts differ by, but pairs show it."""
    alone = trial_of("a", EASY_AND_HARD)
    spread = figures(alone.runs[0], None, PROMPTS, None, is_greedy=True)["intervals"]["acceptance_length"]
    better = difference(trial_of("b", [count + 1 for count in EASY_AND_HARD]), alone, PROMPTS, is_greedy=True)
    assert spread[1] - spread[0] > 0.3
    assert better["acceptance_length"]["value"] == pytest.approx(0.1)
    assert better["acceptance_length"]["interval"] == pytest.approx([0.1, 0.1])
    assert better["acceptance_length"]["is_difference"] is True
    mixed = difference(trial_of("b", [9, 7] * 3 + [0, 2] * 3), alone, PROMPTS, is_greedy=True)
    assert mixed["acceptance_length"]["is_difference"] is False
    assert {name: row["is_difference"] for name, row in mixed["by_category"].items()} == {"easy": False, "hard": False}
    faster = difference(trial_of("b", EASY_AND_HARD, 2.0, 2.0), alone, PROMPTS, is_greedy=True)
    assert faster["by_concurrency"][0]["tokens_per_second_ratio"]["interval"] == pytest.approx([2, 2])
    assert faster["by_concurrency"][0]["tokens_per_second_ratio"]["is_difference"] is True
    assert difference(alone, alone, PROMPTS[:5], is_greedy=True)["acceptance_length"]["is_difference"] is None


def test_prompts_share_the_time_by_how_long_they_were_answered():
    trial = trial_of("a", EASY_AND_HARD)
    measured = figures(trial.runs[0], trial_of("a", EASY_AND_HARD, 8.0, 8.0).runs[0], PROMPTS, "easy", is_greedy=True)
    assert (measured["num_prompts"], measured["acceptance_length"]) == (6, 1.8)
    assert measured["tokens_per_second"] == pytest.approx(30)
    assert measured["tokens_per_second_without"] == pytest.approx(15)
    assert (measured["speed_up"], measured["intervals"]["speed_up"]) == (pytest.approx(2), pytest.approx([2, 2]))
    assert measured["break_even_length"] == 1  # the model gives 0.9, and no length is below 1
    assert measured["intervals"]["break_even_length"] == [1, 1]


@dataclass
class Request:
    """A request of `simulated`."""

    needed: int
    started: float
    first: float = 0.0
    tokens: float = 0.0
    rounds: int = 0


def simulated(concurrency, prompt_seconds, round_seconds, length=1.0, num_prompts=64):
    """A run of an engine that reads prompts and goes on with all answers in the same step.

    Args:
        prompt_seconds: time that each prompt adds to a step.
        round_seconds: time of a step with answers, each of which gets `length` tokens on average.
    """
    needed = np.random.default_rng(0).integers(80, 240, num_prompts).tolist()
    waiting, active, answers, now = deque(needed), [], [], 0.0
    while waiting or active:
        old = list(active)
        while waiting and len(active) < concurrency:
            active.append(Request(waiting.popleft(), now))
        now += prompt_seconds * (len(active) - len(old)) + round_seconds * bool(old)
        for one in active[:]:
            if one in old:
                one.tokens, one.rounds = one.tokens + length, one.rounds + 1
            else:
                one.tokens, one.first = 1.0, now - one.started
            if one.tokens >= one.needed:
                active.remove(one)
                by_position = [round(one.rounds * min(max(length - place, 0), 1)) for place in range(1, 9)]
                counts = [one.rounds, 8 * one.rounds, sum(by_position), *by_position]
                answers.append(Answer("", [1] * one.needed, "stop", one.first, now - one.started, counts))
    return Run(concurrency, [[answer] for answer in answers], now)


@pytest.mark.parametrize("length", [1.2, 2.5])
@pytest.mark.parametrize("concurrency", [1, 4, 16])
@pytest.mark.parametrize("share", [0.02, 0.05, 0.2, 0.5])
def test_the_break_even_length_leaves_out_the_time_of_prompts(share, concurrency, length):
    """Against the length at which the simulated engine takes the same time with the drafter as without."""
    round_seconds = 1.5
    prompt_seconds = 160 / 1.67 * share / (1 - share)  # of a prompt, with one chat at a time and length 2.5
    without = simulated(concurrency, prompt_seconds, 1.0)
    run, alone = (simulated(number, prompt_seconds, round_seconds, length) for number in (concurrency, 1))
    prompts = [Prompt(str(number), "chat", [], ["one"]) for number in range(64)]
    measured = figures([run], [without], prompts, None, is_greedy=True, alone=[alone])
    found = measured["break_even_length"]
    low, high = 1.0, 9.0
    for _ in range(30):
        middle = (low + high) / 2
        faster = simulated(concurrency, prompt_seconds, round_seconds, middle).seconds < without.seconds
        low, high = (low, middle) if faster else (middle, high)
    if concurrency == 1 or share == 0.02:
        assert found == pytest.approx(low, rel=0.01 if concurrency == 1 else 0.05)
    elif found is None:  # the report says on which side of the limits it is
        assert (low > measured["acceptance_length"] / measured["speed_up"]) == (measured["speed_up"] < 1)
    else:
        assert found == pytest.approx(low, rel=0.05)


def test_rounds_that_differ_are_no_difference_and_one_round_tells_nothing():
    """Twice as fast in the first round and half as fast in the second: the machine, not the drafter."""
    slow_then_fast, fast_then_slow = trial_of("a", EASY_AND_HARD, 4.0, 2.0), trial_of("b", EASY_AND_HARD, 2.0, 4.0)
    measured = figures(slow_then_fast.runs[0], fast_then_slow.runs[0], PROMPTS, None, is_greedy=True)
    assert measured["intervals"]["speed_up"] == pytest.approx([0.5, 2])
    assert measured["is_speed_up_or_down"] is False
    (row,) = difference(slow_then_fast, fast_then_slow, PROMPTS, is_greedy=True)["by_concurrency"]
    assert row["tokens_per_second_ratio"]["is_difference"] is False
    one = trial_of("a", EASY_AND_HARD, 1.0)
    assert (
        figures(one.runs[0], trial_of("b", EASY_AND_HARD, 4.0).runs[0], PROMPTS, None, is_greedy=True)[
            "is_speed_up_or_down"
        ]
        is None
    )
    (row,) = difference(one, trial_of("b", EASY_AND_HARD, 4.0), PROMPTS, is_greedy=True)["by_concurrency"]
    assert row["tokens_per_second_ratio"]["is_difference"] is None


def make_entry(drafter="a/checkpoint_best", accepted=EASY_AND_HARD, speed=20.0, **changes):
    trial = trial_of(drafter, accepted, 120 / speed, 120 / speed)
    without = trial_of(drafter, accepted, 3.0, 3.0).runs[0]
    measured = figures(trial.runs[0], without, PROMPTS, None, is_greedy=True)
    latency = {"latency_seconds": trial.runs[0][0].latency(), "latency_seconds_without": without[0].latency()}
    return {
        "drafter": drafter,
        "drafter_link": None,
        "num_speculative_tokens": 1,
        **measured,
        "by_category": {
            name: figures(trial.runs[0], without, PROMPTS, name, is_greedy=True) for name in ("easy", "hard")
        },
        "by_concurrency": [{"concurrency": 2, "chats_at_a_time": 2, **measured, **latency}],
        "text_identical": True,
        "num_identical": 12,
        "differences": [],
        **changes,
    }


def make_report(*others, **changes):
    return {
        "verifier": "org/model",
        "prompts": "suite.jsonl",
        "max_tokens": 16,
        "temperature": 0.0,
        "seed": 0,
        "interval_method": {"confidence": 0.95, "name": "jackknife"},
        "dropped_prompts": [],
        "concurrency": 2,
        "counts": "by draft",
        "rounds": 2,
        "dtype": "float32",
        "device": "CPU",
        "versions": {"vllm": "0.32.0"},
        "command": "peagle-hf evaluate --model 'a <b>'",
        "recommended_num_speculative_tokens": recommend([make_entry(**changes)]),
        "others": list(others),
        **make_entry(**changes),
    }


def test_text_says_what_was_measured():
    said = text(make_report())
    assert re.search(r"  1\.450 \(1\.\d+ to 1\.\d+\) ", said)
    assert "\nSpeed with 2 chats at a time: 20.0 tokens/s with the drafter, 40.0 without: 0.50 (" in said
    assert "The drafter slows vLLM down" in said
    assert "identical with and without the drafter for all 12 prompts" in said

    assert "1.50 (1.50 to 1.50) times as fast" in text(make_report(speed=60.0))
    assert "That is no difference" in text(make_report(speed=40.0))
    assert "Run at least 6 prompts with --rounds 2 or more" in text(make_report(is_speed_up_or_down=None))
    assert "sampled" in text(make_report(text_identical=None))

    differences = [{"id": "q7", "turn": 0, "token": 12}]
    said = text(make_report(text_identical=False, num_identical=11, differences=differences) | {"dtype": "bfloat16"})
    assert "DIFFERENT with the drafter for 1 of 12 prompts: q7 (turn 0, token 12)" in said
    assert "--dtype float32" in said


@pytest.mark.parametrize(
    ("speed", "side"), [(20.0, "more than 2.90"), (60.0, "1.00 (always)"), (45.0, "less than 1.29")]
)
def test_a_break_even_length_that_is_not_known_well_has_a_side(speed, side):
    report = make_report(speed=speed, break_even_length=None)
    report["by_concurrency"][0]["break_even_length"] = None
    said = text(report)
    assert (
        f"The acceptance length from which a drafter pays here is {side} with 2 chats at a time; this drafter has 1.45."
        in said
    )
    assert said.count(side) == 2
    assert ("Where only one side" in said) == ("than" in side)
    assert f"<dd>{side}</dd>" in html(report)


def recommendation(*speeds):
    """Of K 0 (no drafter), 2 and 4 at 1, 4, 16 … chats at a time."""
    return [
        {
            "concurrency": 4**number,
            "num_speculative_tokens": max(by_k, key=by_k.get),
            "tokens_per_second_by_k": {str(tokens): speed for tokens, speed in by_k.items()},
            "speed_up": max(by_k.values()) / by_k[0] if 0 in by_k else None,
        }
        for number, by_k in enumerate(speeds)
    ]


def test_the_fastest_k_at_each_load_is_recommended():
    entries = []
    for tokens, speeds in ((2, [30, 70, 80]), (4, [40, 60, 50])):
        rows = zip([1, 4, 16], [1, 4, 16], speeds, [20, 50, 90], strict=True)
        names = ("concurrency", "chats_at_a_time", "tokens_per_second", "tokens_per_second_without")
        entries.append(
            {"num_speculative_tokens": tokens, "by_concurrency": [dict(zip(names, row, strict=True)) for row in rows]}
        )
    recommended = recommend(entries)
    assert [row["num_speculative_tokens"] for row in recommended] == [4, 2, 0]
    assert [row["speed_up"] for row in recommended] == [2, 1.4, 1]
    assert recommended[0]["tokens_per_second_by_k"] == {"0": 20, "2": 30, "4": 40}
    assert describe(recommended) == (
        "Fastest: K 4 with 1 chat at a time (2.00 times as fast as without), K 2 with 4 (1.40 times as fast as "
        "without), no drafter with 16."
    )
    for entry in entries:
        for row in entry["by_concurrency"]:
            row["tokens_per_second_without"] = None
    assert "K 2 with 16." in describe(recommend(entries))
    assert describe(recommend(entries[:1])) == ""


def test_vllm_is_told_one_k_and_where_it_drafts(caplog):
    """The best K over all loads; where it doesn't pay, nothing is drafted. vLLM can't mix several in parallel."""
    pays_at_few = recommendation({0: 20, 2: 30, 4: 40}, {0: 50, 2: 60, 4: 55}, {0: 90, 2: 60, 4: 50})
    assert scheduled(pays_at_few, True) == {
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 8, 4], [9, 16, 0]],
    }
    assert scheduled(pays_at_few, False) == {"num_speculative_tokens": 4}
    assert "can't choose K by load" in caplog.text
    caplog.set_level("INFO")
    almost_pays = recommendation({0: 20, 2: 30, 4: 40}, {0: 57, 2: 30, 4: 55})
    assert scheduled(almost_pays, True) == {"num_speculative_tokens": 4}
    assert "No drafter was faster by at most 5 % with so many chats at a time: 4. vLLM" in caplog.text
    pays = recommendation({0: 20, 2: 30, 4: 40}, {0: 50, 2: 90, 4: 60})
    assert scheduled(pays, True) == {"num_speculative_tokens": 2}
    assert "no speed of the verifier alone" not in caplog.text
    assert scheduled(recommendation({2: 30, 4: 40}, {2: 90, 4: 60}), True) == {"num_speculative_tokens": 2}
    assert "no speed of the verifier alone" in caplog.text
    with pytest.raises(PeagleError, match="it had fewer prompts than chats at a time"):
        scheduled([], True)
    with pytest.raises(PeagleError, match=r"slower than the verifier alone at each load .*\(chats at a time: 1, 4\)"):
        scheduled(recommendation({0: 20, 2: 10}, {0: 50, 2: 40}), True)


def make_comparison():
    own, better = trial_of("a/checkpoint_best", EASY_AND_HARD), trial_of("b/checkpoint_best", [9, 7] * 3 + [3] * 6)
    other = make_entry("b/checkpoint_best", [9, 7] * 3 + [3] * 6)
    reference = {"from": {"drafter": "a/checkpoint_best", "num_speculative_tokens": 1}}
    return make_report(other | {"difference": reference | difference(better, own, PROMPTS, is_greedy=True)})


def test_drafters_are_compared_in_words():
    said = text(make_comparison())
    assert "Acceptance length of B, K=1 against A, K=1: higher, +0.100 (" in said
    assert "A, K=1: Speed with 2 chats at a time: 20.0 tokens/s with the drafter" in said
    assert "A, K=1: The acceptance length from which a drafter pays here" in said
    lines = [line.split() for line in said.splitlines()]
    (easy,) = [line for line in lines if "length," in line and "easy" in line]
    (hard,) = [line for line in lines if "length," in line and "hard" in line]
    assert easy[-2:] == ["no", "difference"]
    assert hard[-1] == "higher"


def test_the_page_needs_no_other_file(tmp_path):
    page = html(make_comparison())
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == page.count("<source") == 3
    assert not re.search(r"https?://|<script|<link", page)
    HTMLParser(strict=True).parse(page)
    summary = page[: page.index("<p>")]
    for figure in ("a/checkpoint_best, K=1", "b/checkpoint_best, K=1", "org/model", "1.450 (", "<dd>yes</dd>"):
        assert figure in summary
    assert "peagle-hf evaluate --model &#39;a &lt;b&gt;&#39;" in page
    assert "vllm 0.32.0" in page
    assert "no difference" in page
    draw(make_report(), tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


NAMES = [
    r"$\frac$",
    "$x^",
    "<script>alert(1)</script>",
    "line\nbreak\t\x1b[31m\x00",
    "",
    " ",
    "long " * 500,
    "\U0001f600",
    "\u05e9\u05dc\u05d5\u05dd",
    "a & b | c",
    r"\alpha_{",
    "%s {}",
]


@pytest.mark.filterwarnings("error")
def test_any_name_of_a_category_is_drawn_and_written(tmp_path):
    entry = make_entry()
    named = dict.fromkeys(NAMES, entry["by_category"]["easy"])
    report = make_report(by_category=named)
    draw(report, tmp_path / "evaluation.png")
    page, said = html(report), text(report)
    assert page.count('src="data:image/svg+xml;base64,') == 3
    assert "<script" not in page
    HTMLParser(strict=True).parse(page)
    assert "\x1b" not in said
    assert r"line break \x1b[31m\x00" in said
    assert max(map(len, said.splitlines())) < 250
    assert said.count("(no name)") == 2


def write_suite(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_suites_are_run_together_evenly_by_category(tmp_path, caplog):
    one, two = (
        write_suite(
            tmp_path / f"{suite}.jsonl",
            *[{"question_id": 7, "category": name, "turns": [f"{suite} {name}"]} for name in categories],
        )
        for suite, categories in (("one", "aaab"), ("two", "a"))
    )
    arguments = EvaluateArguments("m", [one, two], "out", max_prompts=4)
    assert [prompt.category for prompt in load_prompts(arguments, [])] == ["one/a", "one/b", "two/a", "one/a"]
    assert [prompt.id for prompt in load_prompts(arguments, [])] == ["one/7", "one/7", "two/7", "one/7"]
    assert "2 prompts occur more than once in the same suite" in caplog.text
    arguments.suite = [one]
    assert [prompt.category for prompt in load_prompts(arguments, [])] == ["a", "b", "a", "a"]
    arguments.suite = [one, str(tmp_path / "x" / ".." / "one.jsonl")]
    with pytest.raises(PeagleError, match="names a suite twice"):
        load_prompts(arguments, [])
    (tmp_path / "one.txt").write_text("Another text.")
    arguments.suite = [one, str(tmp_path / "one.txt")]
    assert {prompt.category for prompt in load_prompts(arguments, [])} == {"one.jsonl/a", "one.jsonl/b", "one.txt/text"}


def test_a_text_file_is_one_prompt(tmp_path):
    (tmp_path / "long.txt").write_text("Many words. What do they say?")
    (tmp_path / "empty.md").write_text(" ")
    suite = write_suite(tmp_path / "one.jsonl", {"turns": ["short"]})
    long = str(tmp_path / "long.txt")
    prompts = load_prompts(EvaluateArguments("m", [long, suite], "out"), [])
    assert [(prompt.id, prompt.category) for prompt in prompts] == [
        ("long/long.txt", "long/text"),
        ("one/0", "one/chat"),
    ]
    assert prompts[0].turns == ["Many words. What do they say?"]
    for name, words in (("empty.md", "is empty"), ("absent.txt", "can't be read as UTF-8 text")):
        with pytest.raises(PeagleError, match=words):
            load_prompts(EvaluateArguments("m", [str(tmp_path / name)], "out"), [])


def test_suites_of_one_name_or_with_the_same_prompts_are_told_apart(tmp_path, caplog):
    """The second suite's copy of a prompt is left out and counted: it would be asked twice, and count twice."""
    same, more = {"category": "a", "turns": ["both"]}, {"category": "a", "turns": ["only here"]}
    suites = [
        write_suite(tmp_path / "x" / "prompts.jsonl", same),
        write_suite(tmp_path / "y" / "prompts.jsonl", same | {"category": "b"}, more),
    ]
    dropped = []
    prompts = load_prompts(EvaluateArguments("m", suites, "out"), dropped)
    assert [(prompt.category, prompt.turns) for prompt in prompts] == [
        ("x/prompts/a", ["both"]),
        ("y/prompts/a", ["only here"]),
    ]
    assert [(drop["category"], drop["reason"]) for drop in dropped] == [("b", "it is in x/prompts too")]
    assert f"Left out, because they are in x/prompts too: 1 prompt of {suites[1]}" in caplog.text
    copy = write_suite(tmp_path / "z" / "copy.jsonl", same)
    with pytest.raises(PeagleError, match=r"All prompts of .*copy\.jsonl are in the suites before it"):
        load_prompts(EvaluateArguments("m", [suites[0], copy], "out"), [])


def test_a_row_whose_text_no_tokenizer_takes_is_left_out_and_named(tmp_path, caplog):
    """Half an emoji in a turn; in a category it is written as an escape, and null is no category at all."""
    rows = [
        {"turns": ["whole"], "category": None, "question_id": None},
        {"turns": ["cut \ud83d"]},
        {"turns": ["named"], "category": "cut \ud83d"},
    ]
    suite, dropped = write_suite(tmp_path / "prompts.jsonl", *rows), []
    prompts = load_prompts(EvaluateArguments("m", [suite], "out"), dropped)
    assert [(prompt.id, prompt.category) for prompt in prompts] == [("0", "chat"), ("2", r"cut \ud83d")]
    (drop,) = dropped
    assert (drop["place"], "surrogate" in drop["reason"]) == ("prompts.jsonl, line 2", True)
    assert "prompts.jsonl, line 2 is left out: it holds half a surrogate pair" in caplog.text
    json.dumps(dropped, ensure_ascii=False).encode()


def test_the_command_is_the_one_that_says_the_same():
    argv = ["--model", "a b", "--prompts", "x.jsonl", "--output", "out", "--concurrency", "1", "4", "--seed", "3"]
    arguments = parse_arguments(EvaluateArguments, argv)
    command = command_text(arguments, "evaluate")
    assert command == "peagle-hf evaluate --model 'a b' --suite x.jsonl --output out --seed 3 --concurrency 1 4"
    assert parse_arguments(EvaluateArguments, shlex.split(command)[2:]) == arguments


def arguments(drafter, folder, rows, **changes):
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return EvaluateArguments(model=str(drafter), suite=[str(prompts)], output=str(folder / "out"), **changes)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"turns": ["w4"]}, "{oops"], "line 2"),
        ([{"answers": "w4"}], "line 1"),
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
def test_vllm_counts_what_the_chain_and_the_drafter_must_give(drafter, tmp_path, capsys):
    """w5 is drafted: right once in two forward passes for the cycle w5 w6 w7, never for the chain that ends.

    After w7 comes w5 (accepted) and then w6, the verifier's own; after w6 it's w7 (nothing accepted). Of 60 tokens the
    prompt's pass gives the first and a rejection the second; 19 times a rejection and an acceptance give three more,
    and the last comes from a rejection: 19 of 40 drafts.
    """
    rows = [
        {"question_id": 1, "category": "cycle", "turns": ["w9 w7"]},
        {"question_id": 2, "category": "ends", "turns": ["w20"]},
        {"question_id": 3, "category": "cycle", "messages": [{"role": "user", "content": "w7"}] * 2},
    ]
    report = evaluate(arguments(drafter, tmp_path, rows, max_tokens=60, concurrency=[1, 3]))
    cycle, ends = report["by_category"]["cycle"], report["by_category"]["ends"]
    assert cycle["num_prompts"] == 2
    assert cycle["per_position_acceptance"] == [19 / 40, 0, 0]
    assert cycle["conditional_acceptance"] == [19 / 40, 0, None]
    assert cycle["acceptance_length"] == 1 + 19 / 40
    assert ends["acceptance_length"] == 1
    assert cycle["intervals"] == {}  # two prompts are too few for intervals
    assert ends["num_drafts"] <= 3  # the answer ends with EOS long before 60 tokens
    assert report["num_drafts"] == cycle["num_drafts"] + ends["num_drafts"]
    assert report["num_draft_tokens"] == 3 * report["num_drafts"]
    assert report["num_accepted_tokens"] == cycle["num_accepted_tokens"]
    assert report["text_identical"] is True
    assert report["num_identical"] == report["num_prompts"] == 3
    assert min(report["tokens_per_second"], report["tokens_per_second_without"]) > 0
    assert [row["concurrency"] for row in report["by_concurrency"]] == [1, 3]
    for row in report["by_concurrency"]:
        assert row["num_accepted_tokens"] == report["num_accepted_tokens"]
        assert 0 < row["latency_seconds"]["first_token"]["mean"] < row["latency_seconds"]["request"]["mean"]
    assert report["dtype"] == "float32" or torch.cuda.is_available()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 1000
    assert "data:image/svg+xml" in (tmp_path / "out" / "evaluation.html").read_text()
    assert "Acceptance length" in capsys.readouterr().out


@pytest.mark.vllm
def test_vllm_counts_the_drafts_of_each_segment(drafter, tmp_path):
    """The template thinks from w5 to w6, so of w5 w6 w7 w5 w6 w7 ... only w7 is text.

    The first two drafts begin at w6 (the end of a thought) and at w7, and nothing is right. Then they begin by turns at
    w5, which is right, and at w7: 19 times each, until the last one begins at the last token.
    """
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ 'w5 ' + m.reasoning_content + ' w6 ' if m.reasoning_content else '' }}"
        "{{ m.content }} {% endfor %}"
    )
    rows = [{"turns": ["w9 w7"]}]
    report = evaluate(arguments(drafter, tmp_path, rows, max_tokens=60, chat_template=str(template)))
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "per_position_acceptance")
    assert {name: [row[count] for count in names] for name, row in report["by_segment"].items()} == {
        "reasoning": [20, 60, 19, [19 / 20, 0, 0]],
        "text": [20, 60, 0, [0, 0, 0]],
    }
    assert (report["num_drafts"], report["num_accepted_tokens"]) == (40, 19)


@pytest.mark.vllm
@pytest.mark.slow
def test_several_numbers_of_tokens_and_checkpoints_are_compared_on_the_same_prompts(drafter, tmp_path):
    """The drafter never gets a second token right, and the other one is its copy."""
    other = shutil.copytree(drafter, tmp_path / "other")
    rows = [{"category": "cycle", "turns": ["w9 w7", "w9 w6"]}, *[{"category": "cycle", "turns": ["w9 w6"]}] * 5]
    changes = {"num_speculative_tokens": [1, 2], "compare": [str(other)], "max_tokens": 20}
    report = evaluate(arguments(drafter, tmp_path, rows, **changes))
    entries = [report, *report["others"]]
    tried = [(entry["drafter"], entry["num_speculative_tokens"]) for entry in entries]
    assert tried == [(str(drafter), 2), (str(drafter), 1), (str(other), 1), (str(other), 2)]
    assert len({entry["acceptance_length"] for entry in entries}) == 1
    assert [len(entry["per_position_acceptance"]) for entry in entries] == [2, 1, 1, 2]
    against = [tuple(entry["difference"]["from"].values()) for entry in report["others"]]
    assert against == [(str(drafter), 2), (str(drafter), 1), (str(drafter), 2)]
    for entry in report["others"]:
        assert entry["difference"]["acceptance_length"] == {"value": 0, "interval": [0, 0], "is_difference": False}
        assert entry["text_identical"] is True


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
    with pytest.raises(
        PeagleError, match=r"vLLM failed without the drafter.*vllm_without_drafter\.log\. It said: \S*Error: 1 "
    ):
        evaluate(arguments(drafter, tmp_path, rows, max_model_len=10 * CHAIN_LENGTH))
    assert "max_model_len" in caplog.text
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.vllm
def test_prompt_that_is_too_long_is_named(drafter, tmp_path):
    rows = [{"turns": ["w7"]}, {"question_id": "long one", "turns": ["w7 " * CHAIN_LENGTH]}]
    with pytest.raises(PeagleError, match=r"prompt long one has 256 tokens.*--max-model-len"):
        evaluate(arguments(drafter, tmp_path, rows, max_tokens=4))
